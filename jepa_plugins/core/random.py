"""Counter-based random numbers, keyed by (seed, sample, stream).

A draw is a hash of its key and of its coordinates, so it depends neither on the number of processes or
workers, nor on the device, nor on the size to which a batch is padded, and a resumed run draws what it would
have drawn. The hash is the finaliser of SplitMix64 (Steele et al., "Fast splittable pseudorandom number
generators", 2014).
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_AXIS_BITS = 20  # coordinates of one axis lie below 2**20, so three axes share one 64-bit counter


def iteration_seed(seed: int, iteration: int, rank: int) -> int:
    """Seed of a process's global generators for one iteration, below 2**31.

    A loop that sets it before every iteration needs to save no generator's state: a resumed run draws what it would
    have drawn. Keyed draws depend on less and are better; this is for layers that draw by themselves (dropout, drop
    path).
    """
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1)[0]) % 2**31


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def sample_keys(seed: int, sample_index: Tensor, stream: str) -> Tensor:
    """One key per sample.

    Args:
        seed: of the run.
        sample_index: int64 [B], position of each sample in the whole run (step x global batch + place in it).
        stream: what is drawn ("noise", "tiles", ...); different streams are independent.

    Returns:
        int64 [B].
    """
    index = sample_index.to(torch.int64)
    base = _mix(torch.full_like(index, seed) * _GOLDEN + zlib.crc32(stream.encode()))
    return _mix(base + (index + 1) * _GOLDEN)


def _counters(shape: tuple[int, ...], device: torch.device, start: int = 0) -> Tensor:
    ends = [size + start * (axis == 0) for axis, size in enumerate(shape)]
    if len(shape) > 3 or any(end >= 1 << _AXIS_BITS for end in ends):
        raise ValueError(
            f"keyed draws take up to three axes below {1 << _AXIS_BITS}, got {shape}"
            + f" from {start} on" * (start > 0)
        )
    counter = torch.zeros((), dtype=torch.int64, device=device)
    for end, size in zip(ends, shape, strict=True):
        axis = torch.arange(end - size, end, dtype=torch.int64, device=device)
        counter = (counter << _AXIS_BITS).unsqueeze(-1) + axis
    return counter


def _bits(keys: Tensor, shape: tuple[int, ...], lane: int, start: int = 0) -> Tensor:
    counter = _counters(shape, keys.device, start)
    keys = keys.view(-1, *([1] * len(shape)))
    return _mix(keys + (2 * counter + lane + 1) * _GOLDEN)


def _unit(bits: Tensor) -> Tensor:
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def keyed_uniform(keys: Tensor, shape: tuple[int, ...], start: int = 0) -> Tensor:
    """Uniform values in [0, 1): float32 [B, *shape].

    The value at a coordinate does not depend on `shape`: a larger draw contains the smaller one.

    Args:
        start: coordinate of the first value along the first axis: the draw is what one of `start + shape[0]` holds
            from there on, without drawing what precedes it.

    Raises:
        ValueError: more than three axes, or a coordinate of 2**20 - 1 or more.
    """
    return _unit(_bits(keys, shape, lane=0, start=start))


def keyed_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values (Box-Muller): float32 [B, *shape]; a larger draw contains the smaller one."""
    radius = torch.sqrt(-2.0 * torch.log1p(-_unit(_bits(keys, shape, lane=0))))
    return radius * torch.cos(2.0 * math.pi * _unit(_bits(keys, shape, lane=1)))
