"""Keyed random numbers: a draw belongs to its sample, whatever surrounds it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core.random import iteration_seed, keyed_normal, keyed_uniform, sample_keys

SAMPLES = torch.arange(16)
# Regression pins of seed 7, stream "noise", samples 0, 1 and 1,000,000,000.
KEYS = [-2274963019438967070, -3865875751171465603, -8296889682970717312]
BITS = [
    [[5720703, 10951833], [4243879, 610786]],
    [[9393288, 15841057], [12700177, 15585766]],
    [[9982182, 880694], [16276282, 15536568]],
]
NORMAL = [[-0.828973, 0.815673], [0.982908, 2.39979], [0.69614, -0.105112]]
DRAWS = {"uniform": keyed_uniform, "normal": keyed_normal}


def shapes(most: int = 9):
    return st.lists(st.integers(1, most), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize("name", DRAWS)
@given(order=st.permutations(range(16)), cut=st.integers(1, 15), shape=shapes(), seed=st.integers(0, 2**40))
@settings(max_examples=25, deadline=None)
def test_a_draw_does_not_depend_on_order_or_batch(name, order, cut, shape, seed) -> None:
    draw = DRAWS[name]
    whole = draw(sample_keys(seed, SAMPLES, "noise"), shape)
    order = torch.tensor(order)
    parts = [draw(sample_keys(seed, part, "noise"), shape) for part in (order[:cut], order[cut:])]
    assert torch.equal(torch.cat(parts), whole[order])


@pytest.mark.parametrize("name", DRAWS)
@given(shape=shapes(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_larger_draw_contains_the_smaller(name, shape, data) -> None:
    larger = tuple(size + data.draw(st.integers(0, 7)) for size in shape)
    keys = sample_keys(5, SAMPLES[:3], "tiles")
    corner = (slice(None), *(slice(size) for size in shape))
    assert torch.equal(DRAWS[name](keys, larger)[corner], DRAWS[name](keys, shape))


@pytest.mark.parametrize("draw", DRAWS.values())
def test_samples_streams_and_seeds_are_independent(draw) -> None:
    """128 draws of 2,048 values each: no two correlate beyond chance (5 standard errors of 8,128 pairs)."""
    draws = [
        draw(sample_keys(seed, SAMPLES, stream), (2048,))
        for seed in (0, 1, 2**31, 2**31 + 1)
        for stream in ("noise", "tiles")
    ]
    correlation = np.corrcoef(torch.cat(draws).double().numpy())
    np.fill_diagonal(correlation, 0)
    assert abs(correlation).max() < 5.5 / math.sqrt(2048)


def test_neighbouring_coordinates_are_independent() -> None:
    values = keyed_uniform(sample_keys(0, torch.arange(4), "noise"), (3, 128, 128)).double()
    for axis in (1, 2, 3):
        size = values.shape[axis] - 1
        left, right = values.narrow(axis, 0, size).flatten(), values.narrow(axis, 1, size).flatten()
        assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 5 / math.sqrt(len(left))


def test_uniform_range_and_moments() -> None:
    values = keyed_uniform(sample_keys(3, torch.arange(8), "tiles"), (256, 256))
    assert values.dtype == torch.float32
    assert 0 <= float(values.min()) and float(values.max()) < 1
    values = values.double().flatten()
    count = values.numel()
    assert float(values.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / count))
    assert float(values.var()) == pytest.approx(1 / 12, rel=5 * math.sqrt(0.8 / count))
    histogram = torch.histc(values, 64, 0, 1)
    chi_square = float(((histogram - count / 64).square() / (count / 64)).sum())
    assert 63 - 5 * math.sqrt(126) < chi_square < 63 + 5 * math.sqrt(126)


def test_normal_moments() -> None:
    values = keyed_normal(sample_keys(3, torch.arange(8), "noise"), (3, 128, 128))
    assert values.dtype == torch.float32 and bool(values.isfinite().all())
    values = values.double().flatten()
    count = values.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        got = float(values.pow(power).mean())
        assert got == pytest.approx(moment, abs=5 * math.sqrt(variance / count)), power
    assert float((values.abs() > 3).double().mean()) == pytest.approx(0.0027, abs=5e-4)


def test_known_values() -> None:
    """A resumed run of another version must draw the same numbers; integers, so the same on every device."""
    keys = sample_keys(7, torch.tensor([0, 1, 10**9]), "noise")
    assert keys.tolist() == KEYS
    bits = (keyed_uniform(keys, (2, 2)).double() * 2**24).long()
    assert bits.tolist() == BITS
    want = torch.tensor(NORMAL)
    assert torch.allclose(keyed_normal(keys, (2,)), want, atol=1e-5)


def test_hash_is_splitmix64() -> None:
    """Against a plain Python version with integers of unlimited size."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    keys = sample_keys(11, torch.arange(3), "x")
    drawn = keyed_uniform(keys, (2, 3, 4))
    for i, key in enumerate(keys.tolist()):
        for a in range(2):
            for b in range(3):
                for c in range(4):
                    counter = (a << 40) + (b << 20) + c
                    bits = mix((key + (2 * counter + 1) * golden) & mask)
                    assert float(drawn[i, a, b, c]) == (bits >> 40) / 2**24


@given(shape=shapes(), start=st.integers(0, 300))
@settings(max_examples=25, deadline=None)
def test_a_draw_from_a_start_on_is_the_end_of_the_longer_one(shape, start) -> None:
    keys = sample_keys(5, SAMPLES[:3], "tiles")
    longer = keyed_uniform(keys, (start + shape[0], *shape[1:]))
    assert torch.equal(keyed_uniform(keys, shape, start), longer[:, start:])


@pytest.mark.parametrize(
    ("shape", "start"), [((1, 2, 3, 4), 0), ((1 << 20,), 0), ((2, 1), (1 << 20) - 2), ((1, 1 << 20), 3)]
)
def test_shapes_that_do_not_fit_the_counter_are_refused(shape, start) -> None:
    with pytest.raises(ValueError, match="up to three axes"):
        keyed_uniform(sample_keys(0, SAMPLES[:1], "x"), shape, start)


def test_seeds_of_iterations_differ_and_stay() -> None:
    seeds = {iteration_seed(seed, step, rank) for seed in (0, 1) for step in range(100) for rank in range(8)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**31 for seed in seeds)
    assert iteration_seed(7, 1000, 3) == 1714800445  # as runs so far were seeded
