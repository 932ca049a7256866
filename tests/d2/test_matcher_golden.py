"""The matcher against numbers of the published implementation."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from jepa_plugins.d2.mask2former.matcher import HungarianMatcher, pack_targets  # noqa: E402
from jepa_plugins.d2.mask2former.point_sampling import point_sample, sample_masks  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
FILL = runpy.run_path(str(GOLDEN / "fill.py"))
META = json.loads((GOLDEN / "mask2former_criterion" / "meta.json").read_text())
WANT = np.load(GOLDEN / "mask2former_criterion" / "arrays.npz")
LAYERS = range(3)
IMAGES = range(2)


def same(got: torch.Tensor, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got.detach().numpy() - want).max() <= 1e-5 * np.abs(want).max()


@pytest.fixture
def fixed_points(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.from_numpy(FILL["points"](*shape)))


def outputs_of(layer: int) -> dict[str, torch.Tensor]:
    logits, masks = (400 + 2 * layer, [2, 10, 21], -3, 3), (401 + 2 * layer, [2, 10, 16, 24], -4, 4)
    return {
        "pred_logits": torch.from_numpy(FILL["uniform"](*logits)),
        "pred_masks": torch.from_numpy(FILL["uniform"](*masks)),
    }


def targets_of_fixture() -> list[dict[str, torch.Tensor]]:
    return [
        {
            "masks": torch.from_numpy(FILL["rectangles"](450 + i, count, 64, 96)),
            "labels": torch.from_numpy(np.random.RandomState(460 + i).randint(0, 20, count)),
        }
        for i, count in enumerate((3, 5))
    ]


@pytest.mark.parametrize("weights", [(2, 5, 5), (0, 1, 0), (0, 0, 1)], ids=["all", "mask", "dice"])
def test_costs_golden(fixed_points, weights):
    name = {(2, 5, 5): "cost", (0, 1, 0): "cost_mask", (0, 0, 1): "cost_dice"}[weights]
    matcher = HungarianMatcher(*weights, META["num_points"])
    packed = pack_targets(targets_of_fixture())
    costs = matcher.costs([outputs_of(i) for i in LAYERS], packed)
    for layer in LAYERS:
        for image in IMAGES:
            same(costs[layer, image][:, : packed.counts[image]], WANT[f"{name}_{layer}_{image}"])


def test_pairs_golden(fixed_points):
    matcher = HungarianMatcher(2, 5, 5, META["num_points"])
    packed = pack_targets(targets_of_fixture())
    matchings = matcher.match([outputs_of(i) for i in LAYERS], packed)
    for layer in LAYERS:
        pairs = [WANT[f"pairs_{layer}_{image}"] for image in IMAGES]
        matching = matchings[layer]
        assert matching.image.tolist() == [0] * 3 + [1] * 5
        assert matching.query.tolist() == [*pairs[0][0], *pairs[1][0]]
        assert matching.target.tolist() == [*pairs[0][1], *(pairs[1][1] + 3)]
        for image, (query, target) in enumerate(matcher(outputs_of(layer), targets_of_fixture())):
            assert np.array_equal(np.stack([query, target]), pairs[image])


def test_point_sample_golden():
    points = torch.tensor([[0, 0], [0.05, 0.5], [0.5, 0.5], [1, 1], [0.2, 0.9], [0.99, 0.01]])[None]
    same(point_sample(torch.arange(1.0, 10).view(1, 1, 3, 3), points)[0, 0], WANT["point_sample_3x3"])
    numbers = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3)
    same(sample_masks(numbers, torch.tensor([0]), points)[0], WANT["point_sample_3x3"])
