"""Segmentation head of Mask2Former: pixel decoder and transformer decoder."""

from __future__ import annotations

import logging

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from jepa_plugins.d2.registration import register_published

from .pixel_decoder import build_pixel_decoder
from .transformer_decoder import build_transformer_decoder

logger = logging.getLogger(__name__)


@register_published(SEM_SEG_HEADS_REGISTRY)
class MaskFormerHead(nn.Module):
    """Pixel decoder, then transformer decoder.

    Args:
        input_shape: of the backbone's features.
        transformer_in_feature: what the transformer decoder reads: "multi_scale_pixel_decoder" (Mask2Former).
    """

    _version = 2

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        pixel_decoder: nn.Module,
        loss_weight: float = 1.0,
        ignore_value: int = -1,
        transformer_predictor: nn.Module,
        transformer_in_feature: str,
    ) -> None:
        super().__init__()
        if transformer_in_feature != "multi_scale_pixel_decoder":
            raise ValueError(
                f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is {transformer_in_feature!r}; "
                "only 'multi_scale_pixel_decoder' (Mask2Former) is supported"
            )
        ordered = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in ordered]
        self.ignore_value = ignore_value
        self.common_stride = 4
        self.loss_weight = loss_weight
        self.pixel_decoder = pixel_decoder
        self.predictor = transformer_predictor
        self.transformer_in_feature = transformer_in_feature
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments from detectron2's configuration."""
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "ignore_value": head.IGNORE_VALUE,
            "num_classes": head.NUM_CLASSES,
            "pixel_decoder": build_pixel_decoder(cfg, input_shape),
            "loss_weight": head.LOSS_WEIGHT,
            "transformer_in_feature": cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE,
            "transformer_predictor": build_transformer_decoder(cfg, head.CONVS_DIM, mask_classification=True),
        }

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        """Version 1 checkpoints had the pixel decoder's tensors directly under the head."""
        version = local_metadata.get("version")
        if version is None or version < 2:
            # The published head renames whatever it meets. Version 1 had no name under `pixel_decoder`, so
            # leaving those alone also loads a current checkpoint that was saved as a plain dict and lost its
            # versions.
            ours = (f"{prefix}predictor", f"{prefix}pixel_decoder.")
            old = [k for k in state_dict if k.startswith(prefix) and not k.startswith(ours)]
            for key in old:
                state_dict[f"{prefix}pixel_decoder.{key[len(prefix) :]}"] = state_dict.pop(key)
            if old:
                logger.warning(
                    "renamed %d tensors of a version 1 checkpoint to %spixel_decoder.*", len(old), prefix
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(self, features: dict[str, Tensor], mask: Tensor | None = None) -> dict:
        """Backbone features by name -> the transformer decoder's outputs."""
        mask_features, _, multi_scale = self.pixel_decoder.forward_features(features)
        return self.predictor(multi_scale, mask_features, mask)
