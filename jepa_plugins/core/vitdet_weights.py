"""The weights of a detector's ViT out of a pre-training checkpoint, or any plain ViT's file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.vit_convert import Wishes, convert
from jepa_plugins.core.vit_weights import INFO, ViTShape, recognise
from jepa_plugins.core.vitdet import DetectionViT


@dataclass
class BackboneWeights:
    """A ViT's weights under a detector's names.

    notes: what was chosen and changed, in words. resized: names of what was resampled. left_out: names of the file
    that have no place.
    """

    weights: OrderedDict[str, Tensor]
    notes: list[str]
    resized: list[str]
    left_out: list[str]


def holds_detector(content: Mapping[str, Any], into: str = "backbone.net.") -> bool:
    """Whether a checkpoint has a detector's names already, and is not the work of tools/convert_weights.py."""
    nested = (content.get(key) for key in ("model", "state_dict"))
    names = next((found for found in nested if isinstance(found, Mapping)), content)
    return INFO not in content and any(isinstance(name, str) and into in name for name in names)


def backbone_weights(
    net: DetectionViT, content: Mapping[str, Any], source: str, into: str = "backbone.net."
) -> BackboneWeights:
    """The weights of a detector's ViT out of a pre-training checkpoint, or any file that `recognise` knows.

    Of a pre-training checkpoint the target encoder is taken. Positions and patches of another size are resampled; a
    final norm, a class token and heads have no place. Channels stay in the file's order, blue first if it was
    converted so.

    Raises:
        CheckpointError: one sentence, for a file without target encoder or ViT, of another architecture, or
            incomplete.
    """
    found = recognise(content, source=source, heads=net.num_heads, expected=net.grid)
    _check_size(net, found.shape, source)
    size = (net.grid[0] * net.patch_size, net.grid[1] * net.patch_size)
    converted = convert(found, "detectron2", Wishes(patch_size=net.patch_size, img_size=size, bgr=found.bgr))
    weights = converted.encoder.weights
    changed = {
        "pos_embed": found.shape.grid != net.grid,
        "patch_embed.proj.weight": found.shape.patch_size != net.patch_size,
    }
    if net.pretrain_use_cls_token:
        weights["pos_embed"] = F.pad(weights["pos_embed"], (0, 0, 1, 0))
    return BackboneWeights(
        OrderedDict((into + name, value) for name, value in weights.items()),
        [*found.notes, *converted.exactly, *converted.by_design],
        [into + name for name, resampled in changed.items() if resampled],
        found.left_out,
    )


def _check_size(net: DetectionViT, shape: ViTShape, source: str) -> None:
    pairs = {"EMBED_DIM": (shape.width, net.embed_dim), "DEPTH": (shape.depth, net.depth)}
    other = [
        f"MODEL.VIT.{key} {theirs} (it is {ours})" for key, (theirs, ours) in pairs.items() if theirs != ours
    ]
    if other:
        raise CheckpointError(
            f"{source} holds a ViT of another size: set {', '.join(other)}, or in a LazyConfig the arguments of "
            "these names, or give weights of this model"
        )
