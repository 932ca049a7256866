"""Backbones besides detectron2's own: any timm model that gives features of strides 4 to 32."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from jepa_plugins.core.checkpoints import load_into, read_checkpoint, state_dict_of

STRIDES = (4, 8, 16, 32)


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """A timm `features_only` model as `res2` to `res5`.

    Args:
        cfg: reads MODEL.TIMM.{NAME, WEIGHTS, FREEZE, KWARGS}.
        input_shape: its channels are the model's input channels.

    Raises:
        ValueError: when timm has no such model, or it lacks one of the strides 4, 8, 16, 32.
    """

    def __init__(self, cfg, input_shape: ShapeSpec) -> None:
        super().__init__()
        node = cfg.MODEL.TIMM
        self.net, indices = create_features(node.NAME, input_shape.channels, node.KWARGS)
        # Some of timm's transformers (Swin) give [B, H, W, C].
        self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self.frozen = node.FREEZE
        self._out = [f"res{i}" for i in range(2, 6)]
        channels = self.net.feature_info.channels()
        self._out_feature_channels = dict(zip(self._out, channels, strict=True))
        self._out_feature_strides = dict(zip(self._out, STRIDES, strict=True))
        self._out_features = self._out
        if node.WEIGHTS:
            self.load_weights(node.WEIGHTS)
        if self.frozen:
            self.requires_grad_(False)
            self.eval()

    def load_weights(self, path: str) -> None:
        """Load a checkpoint of the same timm model; its classifier and unused stages are left out."""
        state = state_dict_of(read_checkpoint(path))
        load_into(self.net, state, required=[""], source=path)

    def train(self, mode: bool = True) -> TimmBackbone:
        """As usual; frozen, it stays in eval mode."""
        return super().train(mode and not self.frozen)

    @property
    def size_divisibility(self) -> int:
        """Input sides are padded to a multiple of this many pixels."""
        return STRIDES[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, c, H, W] -> "res2" [B, C2, H/4, W/4] to "res5" [B, C5, H/32, W/32]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.net(x)
        if self.channels_last:
            maps = [feature.permute(0, 3, 1, 2).contiguous() for feature in maps]
        return dict(zip(self._out, maps, strict=True))


def create_features(name: str, channels: int, kwargs: Mapping[str, Any]) -> tuple[nn.Module, list[int]]:
    """The features_only model and which of its stages have strides 4, 8, 16, 32 (the last of each)."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"MODEL.TIMM.NAME: timm has no model {name!r}"
            + (f"; perhaps {', '.join(close)}" if close else "")
        )
    probe = timm.create_model(name, features_only=True, pretrained=False, in_chans=channels, **kwargs)
    reductions = list(probe.feature_info.reduction())
    missing = [stride for stride in STRIDES if stride not in reductions]
    if missing:
        raise ValueError(
            f"MODEL.TIMM.NAME: {name} has feature strides {reductions} and lacks {missing}; Mask2Former "
            "needs a hierarchical model with strides 4, 8, 16 and 32"
        )
    indices = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
    if indices == list(range(len(reductions))):
        return probe, indices
    net = timm.create_model(
        name, features_only=True, pretrained=False, in_chans=channels, out_indices=tuple(indices), **kwargs
    )
    return net, indices
