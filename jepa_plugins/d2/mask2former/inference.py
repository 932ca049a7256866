"""Semantic, panoptic and instance results from the queries (MaskFormer, section 3.4).

All functions work on one image. mask_cls: class logits [Q,K+1], the last being "no object".
mask_pred: mask logits [Q,H,W]. Thresholds are probabilities.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor


def resize_masks(pred_masks: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Mask logits [Q,h,w] at the resolution of the padded input image (H, W), float32 [Q,H,W], bilinear."""
    masks = pred_masks.float()[None]
    return F.interpolate(masks, size=padded_size, mode="bilinear", align_corners=False)[0]


def semantic_inference(mask_cls: Tensor, mask_pred: Tensor) -> Tensor:
    """Class scores of every pixel [K,H,W], >= 0: class times mask probability, summed over queries."""
    classes = mask_cls.float().softmax(-1)[:, :-1]
    return torch.einsum("qc,qhw->chw", classes, mask_pred.float().sigmoid())


def panoptic_inference(
    mask_cls: Tensor,
    mask_pred: Tensor,
    num_classes: int,
    thing_ids: Collection[int],
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Panoptic map int32 [H,W] (0: nothing) and its segments {"id", "isthing", "category_id"}.

    A query takes part when its best class is not "no object" and more probable than
    `object_mask_threshold`. Each pixel goes to the query with the largest product of class and mask
    probability, if that mask's own probability is at least one half. A query is dropped when the pixels it
    wins, divided by the pixels of its mask (probability at least one half), fall below `overlap_threshold`.
    `thing_ids`: contiguous ids of countable classes; queries of the same other class become one segment.
    """
    scores, labels = mask_cls.float().softmax(-1).max(-1)
    keep = (labels != num_classes) & (scores > object_mask_threshold)
    scores, labels, masks = scores[keep], labels[keep], mask_pred[keep].float().sigmoid()
    count = len(labels)
    if count == 0:
        return torch.zeros(mask_pred.shape[-2:], dtype=torch.int32, device=mask_pred.device), []

    owner = (scores[:, None, None] * masks).argmax(0)
    inside = masks >= 0.5
    seen = inside.gather(0, owner[None])[0]
    won = torch.bincount(owner.flatten(), minlength=count)
    visible = torch.bincount(owner[seen], minlength=count)
    whole = inside.flatten(1).sum(1)

    rows = torch.stack([labels, won, visible, whole], 1).tolist()
    # A visible pixel belongs to the mask, so that `whole` is not 0 either.
    accepted = [v > 0 and w / a >= overlap_threshold for _, w, v, a in rows]
    ids, segments = _number_segments([row[0] for row in rows], accepted, set(thing_ids))
    table = torch.tensor(ids, dtype=torch.int32, device=owner.device)
    return table[owner] * seen, segments


def _number_segments(
    labels: list[int], accepted: list[bool], things: set[int]
) -> tuple[list[int], list[dict[str, Any]]]:
    """Segment id of each query (0: dropped) and the segments, in the order of the queries."""
    segments: list[dict[str, Any]] = []
    stuff: dict[int, int] = {}
    ids = []
    for label, is_accepted in zip(labels, accepted, strict=True):
        is_thing = label in things
        if not is_accepted:
            ids.append(0)
        elif not is_thing and label in stuff:
            ids.append(stuff[label])
        else:
            segments.append({"id": len(segments) + 1, "isthing": is_thing, "category_id": label})
            ids.append(len(segments))
            if not is_thing:
                stuff[label] = len(segments)
    return ids, segments


def instance_inference(
    mask_cls: Tensor,
    mask_pred: Tensor,
    topk: int,
    num_classes: int,
    thing_ids: Collection[int] | None = None,
) -> Instances:
    """Instances: pred_masks bool [N,H,W], pred_boxes (zeros), scores [N] in [0, 1], pred_classes [N].

    The `topk` best of all (query, class) pairs by class probability, best first. A score is that
    probability times the mean mask probability over the mask (logit > 0). `thing_ids`: when panoptic
    results are wanted too, the classes that are instances; pairs of other classes are dropped after the
    choice. None keeps every class. Boxes are zeros as in the published code;
    `BitMasks(result.pred_masks).get_bounding_boxes()` gives them when needed.
    """
    probabilities = mask_cls.float().softmax(-1)[:, :num_classes].flatten()
    scores, pairs = probabilities.topk(min(topk, len(probabilities)))
    labels, queries = pairs % num_classes, pairs // num_classes
    if thing_ids is not None:
        is_thing = torch.zeros(num_classes, dtype=torch.bool)
        is_thing[list(thing_ids)] = True
        keep = is_thing.to(labels.device)[labels]
        scores, labels, queries = scores[keep], labels[keep], queries[keep]

    # A query may come with several classes: its mask is judged once.
    inside = mask_pred > 0
    mass = (mask_pred.float().sigmoid() * inside).flatten(1).sum(1)
    quality = mass / (inside.flatten(1).sum(1) + 1e-6)
    result = Instances(tuple(mask_pred.shape[-2:]))
    result.pred_masks = inside[queries]
    result.pred_boxes = Boxes(mask_pred.new_zeros(len(queries), 4, dtype=torch.float32))
    result.scores = scores * quality[queries]
    result.pred_classes = labels
    return result


def image_results(
    mask_cls: Tensor,
    pred_masks: Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    *,
    num_classes: int,
    thing_ids: Collection[int],
    semantic_on: bool,
    panoptic_on: bool,
    instance_on: bool,
    object_mask_threshold: float,
    overlap_threshold: float,
    topk: int,
    resize_before_semantic: bool,
) -> dict[str, Any]:
    """Results of one image: "sem_seg" [K,H,W], "panoptic_seg" (map, segments), "instances".

    mask_cls: [Q,K+1]. pred_masks: [Q,h,w], which cover the padded input. Sizes are (height, width): of the
    padded batch, of this image in it, and of the wanted result. Mask logits are resized to the padded size,
    cut to the image and resized to the output. With semantic results alone and `resize_before_semantic`
    False, the class maps are cut and resized instead: slightly different numbers, less memory when there are
    fewer classes than queries.
    """
    masks = resize_masks(pred_masks, padded_size)
    resize_first = resize_before_semantic or panoptic_on or instance_on
    if resize_first:
        masks = sem_seg_postprocess(masks, image_size, *output_size)
    results: dict[str, Any] = {}
    if semantic_on:
        classes = semantic_inference(mask_cls, masks)
        results["sem_seg"] = (
            classes if resize_first else sem_seg_postprocess(classes, image_size, *output_size)
        )
    if panoptic_on:
        results["panoptic_seg"] = panoptic_inference(
            mask_cls, masks, num_classes, thing_ids, object_mask_threshold, overlap_threshold
        )
    if instance_on:
        things = thing_ids if panoptic_on else None
        results["instances"] = instance_inference(mask_cls, masks, topk, num_classes, things)
    return results
