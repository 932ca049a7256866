"""Masked Semantic Neighboring against a plain loop, and by its properties."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_plugins.core.neighbours import (
    Neighbourhood,
    Neighbours,
    candidate_table,
    choose_neighbours,
    pick_neighbours,
    shared_with,
)
from jepa_plugins.core.vit import VisionTransformer, relative_index


def candidates(row: int, column: int, grid, how: Neighbourhood) -> set[int]:
    """Patch numbers, by the definition."""
    height, width = grid
    if not how.window:
        found = set(range(height * width))
    else:
        half, found = how.window // 2, set()
        top, left = row - half, column - half
        if how.border == "shift":
            top = min(max(top, 0), height - how.window)
            left = min(max(left, 0), width - how.window)
        for r in range(top, top + how.window):
            for c in range(left, left + how.window):
                if how.border == "wrap":
                    found.add(r % height * width + c % width)
                elif 0 <= r < height and 0 <= c < width:
                    found.add(r * width + c)
    return found if how.include_self else found - {row * width + column}


@given(
    st.tuples(st.integers(5, 8), st.integers(5, 8)),
    st.sampled_from([0, 3, 5]),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(["shift", "wrap", "mask"]),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_the_most_similar_candidates_are_chosen(grid, window, k, include_self, border, seed) -> None:
    how = Neighbourhood(window=window, k=k, include_self=include_self, border=border)
    features = torch.randn(2, grid[0] * grid[1], 6, generator=torch.Generator().manual_seed(seed))
    got = choose_neighbours(features, grid, how)
    cosine = F.cosine_similarity(features[:, :, None], features[:, None], dim=-1)
    for image in range(2):
        for patch in range(grid[0] * grid[1]):
            open_to = candidates(patch // grid[1], patch % grid[1], grid, how)
            want = set(sorted(open_to, key=lambda other: -float(cosine[image, patch, other]))[:k])
            valid = slice(None) if got.valid is None else got.valid[image, patch]
            assert set(got.index[image, patch][valid].tolist()) == want


@pytest.mark.parametrize("window", [0, 3])
def test_autocast_does_not_round_similarities(window) -> None:
    """Patches that are nearly alike differ in digits that bfloat16 does not have."""
    features = 1 + 0.02 * torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    how = Neighbourhood(window=window)
    want = choose_neighbours(features, (8, 8), how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = choose_neighbours(features, (8, 8), how)
    assert torch.equal(got.index, want.index)


@pytest.mark.parametrize("window", [0, 3])
def test_changing_one_image_leaves_the_others_alone(window) -> None:
    how = Neighbourhood(window=window)
    features = torch.randn(3, 36, 8)
    before = choose_neighbours(features, (6, 6), how).index
    features[1] = torch.randn(36, 8)
    after = choose_neighbours(features, (6, 6), how).index
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


class LargestOutput(TorchDispatchMode):
    """Remembers the most elements that any operation's output had."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def test_memory_is_linear_in_the_patches() -> None:
    watch, features = LargestOutput(), torch.randn(1, 64 * 64, 16)
    with watch:
        choose_neighbours(features, (64, 64), Neighbourhood())
    assert watch.largest <= 64 * 64 * 25  # never patches x patches


def test_shared_neighbours_are_counted() -> None:
    index = torch.tensor([[[1, 2], [3, 4]]])
    assert float(shared_with(Neighbours(index, None), Neighbours(index.flip(-1), None))) == 1
    other = torch.tensor([[[1, 9], [8, 9]]])
    assert float(shared_with(Neighbours(index, None), Neighbours(other, None))) == 0.25
    valid = torch.tensor([[[True, False], [False, False]]])
    assert float(shared_with(Neighbours(index, valid), Neighbours(other, None))) == 1


def test_pick_neighbours() -> None:
    tokens = torch.arange(10.0).view(1, 5, 2)
    got = pick_neighbours(tokens, torch.tensor([[[4, 0], [1, 1]]]))
    assert got.tolist() == [[[[8, 9], [0, 1]], [[2, 3], [2, 3]]]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": 4}, "odd number from 3 on, got 4"),
        ({"window": 1}, "odd number from 3 on, got 1"),
        ({"k": 9}, "between 1 and the 8 candidates, got 9"),
        ({"k": 10, "include_self": True}, "the 9 candidates, got 10"),
        ({"k": 0}, "got 0"),
        ({"border": "clamp"}, "shift, wrap, mask, got 'clamp'"),
    ],
)
def test_settings_that_make_no_sense(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        Neighbourhood(**options)


def test_grids_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="a grid of 4x2 patches is smaller than the 3x3 window"):
        choose_neighbours(torch.randn(1, 8, 4), (4, 2), Neighbourhood())
    with pytest.raises(ValueError, match="k is 4, but a patch has 3 candidates"):
        choose_neighbours(torch.randn(1, 4, 4), (2, 2), Neighbourhood(window=0))


def test_tables_are_made_once_a_device() -> None:
    arguments = ((6, 7), 3, False, "shift")
    cpu, meta = (candidate_table(*arguments, torch.device(name)) for name in ("cpu", "meta"))
    assert candidate_table(*arguments, torch.device("cpu")) is cpu
    assert candidate_table(*arguments, torch.device("meta")) is meta
    assert cpu[0].device.type == "cpu" and meta[0].device.type == meta[1].device.type == "meta"
    index = relative_index((6, 7), 1, torch.device("meta"))
    assert relative_index((6, 7), 1, torch.device("meta")) is index and index.device.type == "meta"


def test_tables_of_an_evaluation_serve_a_training() -> None:
    torch.manual_seed(0)
    model = VisionTransformer((48, 56), 8, width=8, depth=1, heads=2, rel_pos_bias=True)
    candidate_table.cache_clear()
    relative_index.cache_clear()
    images = torch.randn(1, 3, 48, 56)
    with torch.inference_mode():
        choose_neighbours(model(images), (6, 7), Neighbourhood())
    model(images).square().sum().backward()
    table, _ = candidate_table((6, 7), 3, False, "shift", torch.device("cpu"))
    assert not table.is_inference()
    assert bool(model.blocks[0].attn.relative_position_bias_table.grad.isfinite().all())
