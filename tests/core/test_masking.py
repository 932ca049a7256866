"""Noise and hidden tiles, by their properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core.masking import draw_noise, draw_tiles, expand_noise, hidden_cells, valid_cells
from jepa_plugins.core.random import sample_keys


def keys(count: int, stream: str = "tiles", seed: int = 0):
    return sample_keys(seed, torch.arange(count), stream)


def full(batch: int, height: int, width: int):
    return torch.ones(batch, height, width, dtype=torch.bool)


def tile_mask(keys_, valid, patch, ratio, sampling="exact"):
    return hidden_cells(draw_tiles(keys_, valid, patch, ratio, sampling), patch, valid)


# --- noise


def test_noise_has_its_deviation_at_a_quarter_of_the_resolution() -> None:
    noise = draw_noise(keys(4, "noise"), 3, (512, 512), 0.4)
    assert noise.shape == (4, 3, 128, 128)
    assert float(noise.std()) == pytest.approx(0.4, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.005)
    between = torch.corrcoef(noise.flatten(2).flatten(0, 1).double())
    assert float((between - torch.eye(12)).abs().max()) < 5 / 128


def test_noise_fills_cells_and_never_tiles() -> None:
    noise = torch.arange(2 * 3 * 2 * 3, dtype=torch.float32).view(2, 3, 2, 3)
    wide = expand_noise(noise)
    assert wide.shape == (2, 3, 8, 12)
    rows, columns = torch.arange(8) // 4, torch.arange(12) // 4
    assert torch.equal(wide, noise[:, :, rows][:, :, :, columns])
    assert torch.equal(F.avg_pool2d(wide, 4), noise)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_noise_does_not_depend_on_padding_or_batch_mates(height, width, below, beside) -> None:
    alone = draw_noise(keys(3, "noise")[1:2], 3, (4 * height, 4 * width), 0.4)
    padded = draw_noise(keys(3, "noise"), 3, (4 * (height + below), 4 * (width + beside)), 0.4)
    assert torch.equal(padded[1:2, :, :height, :width], alone)


def test_noise_needs_sides_of_whole_cells() -> None:
    with pytest.raises(ValueError, match=r"multiples of 4, got \(32, 30\)"):
        draw_noise(keys(1), 3, (32, 30), 0.4)


# --- cells and tiles


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([4, 8, 16, 32]))
@settings(max_examples=40, deadline=None)
def test_valid_cells_are_those_that_hold_a_pixel(height, width, stride) -> None:
    grid = (-(-96 // stride), -(-96 // stride))
    got = valid_cells([(height, width), (96, 96)], grid, stride)
    pixels = torch.zeros(2, 1, 96, 96)
    pixels[0, 0, :height, :width] = 1
    pixels[1] = 1
    assert torch.equal(got, F.max_pool2d(pixels, stride)[:, 0] > 0)


@st.composite
def tile_cases(draw):
    """Images of different sizes in one grid, whose tiles may be partial at every border."""
    patch = draw(st.integers(1, 6))
    sides = st.integers(2 * patch, 5 * patch)
    sizes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=4))
    ratio = draw(st.sampled_from([0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75]))
    return patch, sizes, ratio, draw(st.integers(0, 1000))


@given(tile_cases())
@settings(max_examples=80, deadline=None)
def test_exactly_the_share_of_whole_tiles_is_hidden_inside_the_image(case) -> None:
    patch, sizes, ratio, seed = case
    grid = (max(h for h, _ in sizes) + 1, max(w for _, w in sizes) + 2)
    valid = valid_cells(sizes, grid, 1)
    mask = tile_mask(keys(len(sizes), seed=seed), valid, patch, ratio)
    assert mask.shape == valid.shape and mask.dtype == torch.bool
    assert not bool((mask & ~valid).any())
    for (height, width), hidden in zip(sizes, mask, strict=True):
        tiles = [
            hidden[top : min(top + patch, height), left : min(left + patch, width)]
            for top in range(0, height, patch)
            for left in range(0, width, patch)
        ]
        assert all(bool(tile.all()) or not bool(tile.any()) for tile in tiles)
        assert sum(bool(tile.any()) for tile in tiles) == math.floor(ratio * len(tiles) + 0.5)


@given(tile_cases())
@settings(max_examples=25, deadline=None)
def test_tiles_do_not_depend_on_padding_or_batch_mates(case) -> None:
    patch, sizes, ratio, seed = case
    grid = (max(h for h, _ in sizes) + patch, max(w for _, w in sizes) + 1)
    every = keys(len(sizes), seed=seed)
    together = tile_mask(every, valid_cells(sizes, grid, 1), patch, ratio)
    for i, (height, width) in enumerate(sizes):
        alone = tile_mask(every[i : i + 1], full(1, height, width), patch, ratio)
        assert torch.equal(together[i, :height, :width], alone[0])


@pytest.mark.parametrize(("patch", "tiles"), [(8, 64), (4, 256), (16, 16)])
def test_the_papers_sizes(patch, tiles) -> None:
    mask = tile_mask(keys(6), full(6, 64, 64), patch, 0.5)
    assert mask.flatten(1).sum(1).tolist() == [2048] * 6
    per_tile = F.avg_pool2d(mask[:, None].float(), patch).flatten(1)
    assert set(per_tile.unique().tolist()) == {0.0, 1.0}
    assert per_tile.sum(1).tolist() == [tiles / 2] * 6


def test_every_tile_is_hidden_equally_often() -> None:
    mask = tile_mask(keys(4000), full(4000, 4, 4), 1, 0.5).flatten(1).double()
    assert float((mask.mean(0) - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(4000)
    # without replacement: two tiles are hidden together in 8/16 * 7/15 of the images
    together = (mask.T @ mask / 4000)[~torch.eye(16, dtype=torch.bool)]
    assert float((together - 8 / 16 * 7 / 15).abs().max()) < 5.5 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize(
    ("sizes", "patch", "ratio"), [([(16, 16), (16, 7)], 4, 0.5), ([(15, 16)], 8, 0.5), ([(8, 8)], 4, 0.05)]
)
def test_maps_with_too_few_tiles_are_refused(sizes, patch, ratio) -> None:
    with pytest.raises(ValueError, match="make the mask patch smaller or the images larger"):
        tile_mask(keys(len(sizes)), valid_cells(sizes, (16, 16), 1), patch, ratio)


# --- each tile by itself


def test_bernoulli_hides_each_tile_by_itself() -> None:
    tiles = draw_tiles(keys(4000), full(4000, 4, 4), 1, 0.3, "bernoulli").flatten(1).double()
    assert float((tiles.mean(0) - 0.3).abs().max()) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    counts = tiles.sum(1)
    assert counts.unique().numel() > 5  # not an exact count
    assert float(counts.var()) == pytest.approx(16 * 0.3 * 0.7, rel=0.1)
    assert float((torch.corrcoef(tiles.T) - torch.eye(16)).abs().max()) < 5.5 / math.sqrt(4000)


@pytest.mark.parametrize("ratio", [1e-6, 1 - 1e-6])
def test_bernoulli_never_hides_nothing_or_everything(ratio) -> None:
    valid = valid_cells([(4, 4), (4, 3)], (4, 4), 1)
    tiles = draw_tiles(keys(2), valid, 1, ratio, "bernoulli")
    counts = tiles.flatten(1).sum(1).tolist()
    assert counts == ([1, 1] if ratio < 0.5 else [15, 11])
    assert not bool((tiles & ~valid).any())


@given(tile_cases())
@settings(max_examples=25, deadline=None)
def test_bernoulli_does_not_depend_on_padding_or_batch_mates(case) -> None:
    patch, sizes, ratio, seed = case
    grid = (max(h for h, _ in sizes) + patch, max(w for _, w in sizes) + 1)
    every = keys(len(sizes), seed=seed)
    together = tile_mask(every, valid_cells(sizes, grid, 1), patch, ratio, "bernoulli")
    for i, (height, width) in enumerate(sizes):
        alone = tile_mask(every[i : i + 1], full(1, height, width), patch, ratio, "bernoulli")
        assert torch.equal(together[i, :height, :width], alone[0])


def test_the_same_tiles_at_every_stride() -> None:
    tiles = draw_tiles(keys(3), full(3, 16, 16), 8, 0.5)  # 64 pixels wide at stride 8
    coarse, middle, fine = (hidden_cells(tiles, 64 // s, full(3, 128 // s, 128 // s)) for s in (32, 16, 8))
    assert torch.equal(coarse.repeat_interleave(4, 1).repeat_interleave(4, 2), fine)
    assert torch.equal(middle.repeat_interleave(2, 1).repeat_interleave(2, 2), fine)
