"""Counter-based random numbers, keyed by (seed, sample, stream).

A draw is a hash of its key and of its coordinates, so it depends neither on the number of processes or
workers, nor on the device, nor on the size to which a batch is padded, and a resumed run draws what it would
have drawn. The hash is the finaliser of SplitMix64 (Steele et al., "Fast splittable pseudorandom number
generators", 2014).
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_AXIS_BITS = 20  # coordinates of one axis lie below 2**20, so three axes share one 64-bit counter


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


def _counters(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if len(shape) > 3 or any(size >= 1 << _AXIS_BITS for size in shape):
        raise ValueError(f"keyed draws take up to three axes below {1 << _AXIS_BITS}, got {shape}")
    counter = torch.zeros((), dtype=torch.int64, device=device)
    for size in shape:
        axis = torch.arange(size, dtype=torch.int64, device=device)
        counter = (counter << _AXIS_BITS).unsqueeze(-1) + axis
    return counter


def _bits(keys: Tensor, shape: tuple[int, ...], lane: int) -> Tensor:
    counter = _counters(shape, keys.device)
    keys = keys.view(-1, *([1] * len(shape)))
    return _mix(keys + (2 * counter + lane + 1) * _GOLDEN)


def _unit(bits: Tensor) -> Tensor:
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def keyed_uniform(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform values in [0, 1): float32 [B, *shape].

    The value at a coordinate does not depend on `shape`: a larger draw contains the smaller one.
    """
    return _unit(_bits(keys, shape, lane=0))


def keyed_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values (Box-Muller): float32 [B, *shape]; a larger draw contains the smaller one."""
    radius = torch.sqrt(-2.0 * torch.log1p(-_unit(_bits(keys, shape, lane=0))))
    return radius * torch.cos(2.0 * math.pi * _unit(_bits(keys, shape, lane=1)))
