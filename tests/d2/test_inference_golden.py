"""Semantic, panoptic and instance results against numbers of the published implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from jepa_plugins.d2.mask2former.inference import image_results  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "mask2former_postprocess"
META = json.loads((GOLDEN / "meta.json").read_text())
WANT = np.load(GOLDEN / "arrays.npz")


def results(**flags) -> dict:
    settings = {
        "num_classes": 133,
        "thing_ids": range(80),
        "semantic_on": True,
        "panoptic_on": False,
        "instance_on": False,
        "object_mask_threshold": META["object_mask_threshold"],
        "overlap_threshold": META["overlap_threshold"],
        "topk": META["topk"],
        "resize_before_semantic": False,
    }
    sizes = [tuple(META[name]) for name in ("padded_size", "image_size", "output_size")]
    arrays = [torch.from_numpy(WANT[name]) for name in ("pred_logits", "pred_masks")]
    return image_results(*arrays, *sizes, **(settings | flags))


def same(got: torch.Tensor, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got.numpy() - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("flag", ["resize_before_semantic", "panoptic_on", "instance_on"])
def test_semantic_golden(flag):
    got = results(**{flag: True})["sem_seg"]
    same(got[::8, ::2, ::2], WANT["sem_seg_every_8th_class"])
    assert np.array_equal(got.argmax(0).numpy(), WANT["sem_seg_argmax"])


def test_semantic_resized_after_golden():
    got = results()
    assert list(got) == ["sem_seg"]
    same(got["sem_seg"][::8, ::2, ::2], WANT["sem_seg_resized_after_every_8th_class"])


def test_panoptic_golden():
    panoptic, segments = results(panoptic_on=True)["panoptic_seg"]
    assert panoptic.dtype == torch.int32
    assert segments == META["segments_info"]
    assert np.array_equal(panoptic.numpy(), WANT["panoptic_seg"])


def test_instances_golden():
    got = results(panoptic_on=True, instance_on=True)["instances"]
    order = got.scores.argsort(descending=True, stable=True)
    same(got.scores[order], WANT["instances_scores"])
    assert np.array_equal(got.pred_classes[order].numpy(), WANT["instances_classes"])
    packed = np.packbits(got.pred_masks[order].flatten(1).numpy(), axis=1)
    assert np.array_equal(packed, WANT["instances_masks_packed"])
    assert got.pred_boxes.tensor.shape == (len(order), 4) and not got.pred_boxes.tensor.any()
    assert got.image_size == tuple(META["output_size"])
