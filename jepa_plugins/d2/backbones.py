"""Building the configured backbone, and one besides detectron2's own: any timm model that gives features of
strides 4 to 32."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any

import timm
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.utils import comm
from torch import Tensor, nn

from jepa_plugins.core.checkpoints import load_into, read_checkpoint, state_dict_of
from jepa_plugins.d2.inputs import check_channels
from jepa_plugins.d2.registration import look_up

logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32)


def build_backbone(cfg: CfgNode) -> Backbone:
    """The backbone that `MODEL.BACKBONE.NAME` names, on as many channels as MODEL.PIXEL_MEAN has; ours also
    where it is called `JEPA<name>`.

    Without CUDA, torch's synchronised batch norm is replaced (`without_sync_batch_norm`).

    Raises:
        KeyError: no such backbone. ValueError: its configuration cannot be, or its first layer takes another
            number of channels.
    """
    channels = check_channels(cfg)
    factory = look_up(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME)
    backbone = factory(cfg, ShapeSpec(channels=channels))
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} gives a {type(backbone).__name__}, which is no "
            "detectron2 Backbone: derive it from detectron2.modeling.Backbone"
        )
    taken = {module.in_channels for module in backbone.modules() if isinstance(module, nn.Conv2d)}
    if channels not in taken and 3 in taken:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} takes images of 3 channels, MODEL.PIXEL_MEAN has "
            f"{channels} values: use a backbone that builds its first convolution for input_shape.channels"
        )
    return backbone if cfg.MODEL.DEVICE.startswith("cuda") else without_sync_batch_norm(backbone)


def without_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Replace torch's SyncBatchNorm, which trains on CUDA input only; parameters and names stay. Returns
    `module`, changed in place.

    One process takes plain batch norm; several take detectron2's, whose statistics span them too.
    """
    kind = nn.BatchNorm2d if comm.get_world_size() == 1 else NaiveSyncBatchNorm
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.SyncBatchNorm)
    ]
    for parent, name, old in found:
        new = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
        new.weight, new.bias = old.weight, old.bias
        for key, value in old.named_buffers():
            setattr(new, key, value)
        parent.add_module(name, new.train(old.training))
    if found:
        logger.info("SyncBN needs CUDA: %d layers of the backbone are %s instead", len(found), kind.__name__)
    return module


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """A timm `features_only` model as `res2` to `res5`.

    Args:
        name: of the timm model; kwargs: further arguments of `timm.create_model`.
        in_channels: of the images.
        weights: a file with timm's names; "" starts from random weights.
        freeze: no gradient, and normalisation in eval mode.

    Raises:
        ValueError: when timm has no such model, or it lacks one of the strides 4, 8, 16, 32.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        in_channels: int = 3,
        weights: str = "",
        freeze: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net, indices = create_features(name, in_channels, kwargs or {})
        # Some of timm's transformers (Swin) give [B, H, W, C].
        self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self.frozen = freeze
        self._out = [f"res{i}" for i in range(2, 6)]
        channels = self.net.feature_info.channels()
        self._out_feature_channels = dict(zip(self._out, channels, strict=True))
        self._out_feature_strides = dict(zip(self._out, STRIDES, strict=True))
        self._out_features = self._out
        if weights:
            self.load_weights(weights)
        if self.frozen:
            self.requires_grad_(False)
            self.eval()

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        """Arguments from detectron2's configuration."""
        node = cfg.MODEL.TIMM
        return {
            "name": node.NAME,
            "in_channels": input_shape.channels,
            "weights": node.WEIGHTS,
            "freeze": node.FREEZE,
            "kwargs": node.KWARGS,
        }

    def load_weights(self, path: str) -> None:
        """Load a checkpoint of the same timm model; its classifier and unused stages are left out."""
        state = state_dict_of(read_checkpoint(path))
        logger.info("Loaded %s", load_into(self.net, state, required=[""], source=path, adapt_stem=True))

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
