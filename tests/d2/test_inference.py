"""Semantic, panoptic and instance results against loops over queries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("detectron2")

from jepa_plugins.d2.mask2former.inference import (  # noqa: E402
    image_results,
    instance_inference,
    panoptic_inference,
    resize_masks,
    semantic_inference,
)

CLASSES = 5
THINGS = {0, 1, 4}


def make_outputs(seed, queries=8, sharpness=4.0, size=(24, 31)):
    generator = torch.Generator().manual_seed(seed)
    mask_cls = sharpness * torch.randn(queries, CLASSES + 1, generator=generator)
    return mask_cls, resize_masks(4 * torch.randn(queries, 4, 5, generator=generator), size)


def plain_panoptic(mask_cls, mask_pred, object_threshold, overlap_threshold):
    probabilities = mask_cls.softmax(1)
    kept = []
    for q in range(len(mask_cls)):
        score, label = probabilities[q].max(0)
        if label != CLASSES and score > object_threshold:
            kept.append((float(score), int(label), mask_pred[q].sigmoid()))
    panoptic = torch.zeros(mask_pred.shape[1:], dtype=torch.int32)
    segments, stuff = [], {}
    if not kept:
        return panoptic, segments
    winner = torch.stack([score * mask for score, _, mask in kept]).argmax(0)
    for k, (_, label, mask) in enumerate(kept):
        won, inside = winner == k, mask >= 0.5
        if not (won & inside).any() or int(won.sum()) / int(inside.sum()) < overlap_threshold:
            continue
        if label not in THINGS and label in stuff:
            panoptic[won & inside] = stuff[label]
            continue
        segments.append({"id": len(segments) + 1, "isthing": label in THINGS, "category_id": label})
        stuff[label] = len(segments)
        panoptic[won & inside] = len(segments)
    return panoptic, segments


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0, 0.9), st.floats(0, 1))
def test_panoptic_equals_a_loop_over_queries(seed, queries, object_threshold, overlap_threshold):
    mask_cls, mask_pred = make_outputs(seed, queries)
    got = panoptic_inference(mask_cls, mask_pred, CLASSES, THINGS, object_threshold, overlap_threshold)
    want = plain_panoptic(mask_cls, mask_pred, object_threshold, overlap_threshold)
    assert got[1] == want[1]
    assert torch.equal(got[0], want[0])


def test_stuff_of_one_class_is_one_segment_and_things_are_several():
    mask_cls = torch.full((4, CLASSES + 1), -20.0)
    mask_cls[torch.arange(4), torch.tensor([2, 2, 0, 0])] = 20
    mask_pred = torch.full((4, 2, 8), -20.0)
    for q in range(4):
        mask_pred[q, :, 2 * q : 2 * q + 2] = 20
    panoptic, segments = panoptic_inference(mask_cls, mask_pred, CLASSES, THINGS, 0.8, 0.8)
    assert panoptic[0].tolist() == [1, 1, 1, 1, 2, 2, 3, 3]
    assert [(s["category_id"], s["isthing"]) for s in segments] == [(2, False), (0, True), (0, True)]


def test_panoptic_without_a_confident_query_is_empty():
    mask_cls, mask_pred = make_outputs(0)
    mask_cls[:, -1] = 100
    panoptic, segments = panoptic_inference(mask_cls, mask_pred, CLASSES, THINGS, 0.8, 0.8)
    assert segments == [] and panoptic.dtype == torch.int32
    assert panoptic.shape == mask_pred.shape[1:] and not panoptic.any()


def test_semantic_equals_a_loop_over_queries():
    mask_cls, mask_pred = make_outputs(1)
    want = torch.zeros(CLASSES, *mask_pred.shape[1:])
    for logits, mask in zip(mask_cls, mask_pred, strict=True):
        want += logits.softmax(0)[:CLASSES, None, None] * mask.sigmoid()
    assert torch.allclose(semantic_inference(mask_cls, mask_pred), want, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 60), st.booleans())
def test_instances_equal_a_loop_over_pairs(seed, queries, topk, things_only):
    mask_cls, mask_pred = make_outputs(seed, queries, sharpness=1)
    pairs = [(float(mask_cls[q].softmax(0)[c]), q, c) for q in range(queries) for c in range(CLASSES)]
    pairs = sorted(pairs, reverse=True)[:topk]
    if things_only:
        pairs = [pair for pair in pairs if pair[2] in THINGS]
    got = instance_inference(mask_cls, mask_pred, topk, CLASSES, THINGS if things_only else None)
    assert got.pred_classes.tolist() == [c for _, _, c in pairs]
    assert got.pred_masks.dtype == torch.bool and got.image_size == (24, 31)
    assert got.pred_masks.shape == (len(pairs), 24, 31) and len(got.pred_boxes) == len(pairs)
    for i, (probability, q, _) in enumerate(pairs):
        inside = mask_pred[q] > 0
        assert torch.equal(got.pred_masks[i], inside)
        mean = float(mask_pred[q].sigmoid()[inside].mean()) if inside.any() else 0.0
        assert float(got.scores[i]) == pytest.approx(probability * mean, rel=1e-4)


def test_an_empty_mask_scores_zero():
    mask_cls, mask_pred = make_outputs(2)
    got = instance_inference(mask_cls, -mask_pred.abs() - 1, 10, CLASSES)
    assert len(got) == 10 and not got.scores.any() and not got.pred_masks.any()


@pytest.mark.parametrize(
    "flags", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
@pytest.mark.parametrize("resize_first", [False, True])
def test_results_have_the_size_and_the_parts_asked_for(flags, resize_first):
    mask_cls, _ = make_outputs(3)
    results = image_results(
        mask_cls.bfloat16(),
        torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16(),
        padded_size=(24, 32),
        image_size=(20, 31),
        output_size=(41, 57),
        num_classes=CLASSES,
        thing_ids=THINGS,
        semantic_on=flags[0],
        panoptic_on=flags[1],
        instance_on=flags[2],
        object_mask_threshold=0.3,
        overlap_threshold=0.3,
        topk=7,
        resize_before_semantic=resize_first,
    )
    names = [n for n, on in zip(("sem_seg", "panoptic_seg", "instances"), flags, strict=True) if on]
    assert list(results) == names
    if flags[0]:
        assert results["sem_seg"].shape == (CLASSES, 41, 57) and results["sem_seg"].dtype == torch.float32
    if flags[1]:
        assert results["panoptic_seg"][0].shape == (41, 57)
    if flags[2]:
        assert results["instances"].image_size == (41, 57)
        # Every class is an instance unless panoptic results are wanted too.
        assert (
            set(results["instances"].pred_classes.tolist()) <= THINGS
            if flags[1]
            else len(results["instances"]) == 7
        )
