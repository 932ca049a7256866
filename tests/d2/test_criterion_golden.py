"""Losses and gradients of the criterion against numbers of the published implementation."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from jepa_plugins.d2.mask2former.criterion import SetCriterion  # noqa: E402
from jepa_plugins.d2.mask2former.matcher import HungarianMatcher  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
FILL = runpy.run_path(str(GOLDEN / "fill.py"))
META = json.loads((GOLDEN / "mask2former_criterion" / "meta.json").read_text())
WANT = np.load(GOLDEN / "mask2former_criterion" / "arrays.npz")


def fixture_outputs() -> dict:
    layers = [
        {
            "pred_logits": torch.from_numpy(
                FILL["uniform"](400 + 2 * i, [2, 10, 21], -3, 3)
            ).requires_grad_(),
            "pred_masks": torch.from_numpy(
                FILL["uniform"](401 + 2 * i, [2, 10, 16, 24], -4, 4)
            ).requires_grad_(),
        }
        for i in range(3)
    ]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def fixture_targets() -> list[dict[str, torch.Tensor]]:
    labels = torch.from_numpy(WANT["labels"])
    return [
        {"masks": torch.from_numpy(FILL["rectangles"](450, 3, 64, 96)), "labels": labels[:3]},
        {"masks": torch.from_numpy(FILL["rectangles"](451, 5, 64, 96)), "labels": labels[3:]},
    ]


def fixture_criterion() -> SetCriterion:
    matcher = HungarianMatcher(cost_class=2, cost_mask=5, cost_dice=5, num_points=META["num_points"])
    return SetCriterion(
        META["classes"],
        matcher=matcher,
        weight_dict=META["weights"],
        eos_coef=META["no_object_weight"],
        losses=["labels", "masks"],
        num_points=META["num_points"],
        oversample_ratio=META["oversample_ratio"],
        importance_sample_ratio=META["importance_sample_ratio"],
    )


@pytest.fixture
def fixed_points(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.from_numpy(FILL["points"](*shape)))


def test_losses_golden(fixed_points):
    losses = fixture_criterion()(fixture_outputs(), fixture_targets())
    want = META["losses_unweighted"]
    assert losses.keys() == want.keys()
    for name, value in losses.items():
        assert float(value) == pytest.approx(want[name], rel=1e-5), name


def test_gradients_golden(fixed_points):
    outputs = fixture_outputs()
    losses = fixture_criterion()(outputs, fixture_targets())
    weights = META["weights"]
    sum(weights["_".join(name.split("_")[:2])] * value for name, value in losses.items()).backward()
    for name in ("pred_logits", "pred_masks"):
        want = WANT[f"grad_{name}"]
        got = outputs[name].grad.numpy()
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
