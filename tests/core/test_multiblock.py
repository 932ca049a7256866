"""Multi-block masks by their properties, and those drawn so far: a run that resumes must draw the same."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core import multiblock
from jepa_plugins.core.multiblock import TRIES, Masks, MultiBlock, Places, draw_masks
from jepa_plugins.core.random import keyed_uniform, sample_keys

SHAPES = st.tuples(st.integers(6, 20), st.integers(6, 20))


def is_block(cells, width: int) -> bool:
    """Whether patch numbers fill a rectangle."""
    rows, columns = cells // width, cells % width
    box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    return len(cells.unique()) == len(cells) == int(box)


@given(SHAPES, st.integers(0, 1000), st.sampled_from(["ijepa", "full_grid"]))
@settings(max_examples=60, deadline=None)
def test_targets_are_blocks_and_contexts_avoid_them(shape, seed, grid) -> None:
    method = MultiBlock(grid=grid)
    masks = draw_masks(method, shape, seed, torch.arange(5), 7)
    count = shape[0] * shape[1]
    assert masks.targets.shape[:2] == (5, 4)
    assert int(masks.targets.max()) < count and int(masks.context.max()) < count
    for targets, context in zip(masks.targets, masks.context, strict=True):
        assert all(is_block(block, shape[1]) for block in targets)
        assert bool((context[1:] > context[:-1]).all())  # raster order, no patch twice
        assert len(context) > method.min_keep
    # A context may overlap targets only where they leave too few patches of every block of its size.
    height, width = method.block_size(0.0, shape, method.context_scale, (1.0, 1.0))
    for targets, context in zip(masks.targets, masks.context, strict=True):
        taken = set(targets.flatten().tolist())
        surely_free = height * width - len(taken)
        assert surely_free <= method.min_keep or not set(context.tolist()) & taken


@given(SHAPES, st.integers(0, 1000), st.sampled_from(["ijepa", "full_grid"]))
@settings(max_examples=30, deadline=None)
def test_a_samples_masks_do_not_depend_on_its_batch(shape, seed, grid) -> None:
    method, index = MultiBlock(grid=grid), torch.tensor([40, 3, 17])
    together = draw_masks(method, shape, seed, index, 2)
    for i in range(3):
        alone = draw_masks(method, shape, seed, index[i : i + 1], 2)
        assert torch.equal(together.targets[i], alone.targets[0])
        fewest = together.context.shape[1]
        assert torch.equal(together.context[i], alone.context[0, :fewest])


def test_only_the_full_grid_reaches_the_last_row_and_column() -> None:
    used = {}
    for grid in ("ijepa", "full_grid"):
        cells = torch.zeros(12, 16, dtype=torch.bool).flatten()
        for call in range(80):
            masks = draw_masks(MultiBlock(grid=grid), (12, 16), 1, torch.arange(4) + 4 * call, call)
            cells[masks.targets.flatten()] = True
        used[grid] = cells.view(12, 16)
    assert not bool(used["ijepa"][-1].any() | used["ijepa"][:, -1].any())
    assert bool(used["full_grid"].all())


def digest(masks: Masks) -> str:
    """Of shapes, types and values."""
    sums = hashlib.sha256()
    for part in (masks.context, masks.targets):
        sums.update(str((tuple(part.shape), part.dtype)).encode())
        sums.update(part.contiguous().numpy().tobytes())
    return sums.hexdigest()[:16]


# Settings, grid, seed, images, and what the sampler drew when the first runs were trained.
DRAWN = [
    ({}, (14, 14), 0, 256, "9c87e5bbe76e3270"),
    ({}, (14, 14), 3, 2048, "02681e1cfad7132d"),
    ({"grid": "full_grid"}, (14, 14), 1, 64, "777709bc59bcac8f"),
    ({}, (10, 10), 0, 32, "9741b42d064a8d76"),
    ({"grid": "full_grid"}, (26, 26), 2, 16, "903300968df7ff5b"),
    ({}, (16, 9), 7, 33, "3b9c796fd40ad691"),
    ({"target_scale": (0.4, 0.4), "min_keep": 20}, (6, 6), 0, 64, "a3b1c9ed789e24af"),  # places tried again
    ({"grid": "full_grid", "targets": 6, "min_keep": 30}, (8, 70), 5, 48, "f1b39035bddd07cb"),
]


@pytest.mark.parametrize(("options", "shape", "seed", "images", "want"), DRAWN)
def test_the_same_masks_as_ever(options, shape, seed, images, want) -> None:
    index = torch.arange(images) + 5 * images
    assert digest(draw_masks(MultiBlock(**options), shape, seed, index, 5 * images)) == want


def contexts_one_try_at_a_time(
    method: MultiBlock, shape: tuple[int, int], seed: int, index
) -> list[list[int]]:
    """As the sampler is defined: try `a` of an image takes the a-th pair of its key's numbers."""
    draws = keyed_uniform(sample_keys(seed, torch.tensor([int(index[0])]), "block sizes"), (2,))[0].tolist()
    target = method.block_size(draws[0], shape, method.target_scale, method.target_aspect)
    places = Places(target, shape, method.grid)
    context = Places(method.block_size(draws[1], shape, method.context_scale, (1.0, 1.0)), shape, method.grid)
    where = places.at(keyed_uniform(sample_keys(seed, index, "target places"), (method.targets, 2)))
    found = []
    for blocks, key in zip(places.cells[where], sample_keys(seed, index, "context places"), strict=True):
        for attempt in range(TRIES * (method.targets + 1)):
            uniforms = keyed_uniform(key[None], (attempt + 1, 2))[0, -1]
            kept = context.cells[context.at(uniforms)] & ~blocks[: method.targets - attempt // TRIES].any(0)
            if int(kept.sum()) > method.min_keep:
                break
        found.append(kept.nonzero().flatten().tolist())
    fewest = min(map(len, found))
    return [cells[:fewest] for cells in found]


@given(
    st.tuples(st.integers(5, 9), st.integers(5, 9)),
    st.integers(0, 1000),
    st.sampled_from(["ijepa", "full_grid"]),
    st.integers(1, 12),
    st.integers(0, 14),
)
@settings(max_examples=30, deadline=None)
def test_places_tried_again_take_the_numbers_in_turn(shape, seed, grid, targets, min_keep) -> None:
    method = MultiBlock(grid=grid, targets=targets, min_keep=min_keep, target_scale=(0.3, 0.4))
    index = torch.arange(6) + 6 * seed
    want = contexts_one_try_at_a_time(method, shape, seed, index)
    assert draw_masks(method, shape, seed, index, int(index[0])).context.tolist() == want


def test_very_many_targets_draw_no_number_twice(monkeypatch) -> None:
    drawn = []

    def counted(keys, shape, *start):
        drawn.append(len(keys) * shape[0])
        return keyed_uniform(keys, shape, *start)

    monkeypatch.setattr(multiblock, "keyed_uniform", counted)
    draw_masks(MultiBlock(targets=100), (14, 14), 0, torch.arange(2), 0)
    sizes, places, *tries = drawn
    assert sizes == 2 and places == 2 * 100
    assert 2 * TRIES * 50 < sum(tries) <= 2 * TRIES * 101  # most targets have to overlap the context


def test_small_grids_let_targets_overlap_the_context_rather_than_fail() -> None:
    crowded = MultiBlock(target_scale=(0.4, 0.4), min_keep=20)
    masks = draw_masks(crowded, (6, 6), 0, torch.arange(64), 0)
    assert masks.context.shape[1] > 20


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_scale": (0.0, 0.2)}, "target_scale is two shares"),
        ({"context_scale": (0.9, 0.8)}, "context_scale is two shares"),
        ({"target_aspect": (0.0, 1.0)}, "target_aspect is two ratios"),
        ({"targets": 0}, "at least one target block"),
        ({"grid": "all"}, "the mask grid is one of ijepa, full_grid"),
    ],
)
def test_settings_that_make_no_sense(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        MultiBlock(**options)


@pytest.mark.parametrize(
    ("options", "shape", "sentence"),
    [
        ({}, (3, 3), "a grid of 3x3 patches is too small"),
        ({"targets": 65}, (8, 8), "65 target blocks are more than the 64 patches of a grid of 8x8"),
        ({"min_keep": 0}, (2, 2), "target blocks of 0.15 of 2x2 patches hold none"),
        ({"min_keep": 35}, (6, 6), "hold no more than min_keep 35"),
        ({"target_aspect": (0.01, 0.02)}, (8, 8), "have no row or column on 8x8 patches"),
    ],
)
def test_grids_that_are_too_small(options, shape, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        draw_masks(MultiBlock(**options), shape, 0, torch.arange(2), 0)
