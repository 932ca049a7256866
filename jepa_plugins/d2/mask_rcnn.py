"""Mask R-CNN as ViTDet has it: detectron2's model with square padding, and heads with LayerNorm.

Everything else is detectron2's own, so weights have the names of its published ViTDet models. The classes work where
detectron2 knows neither square padding nor the norm "LN".
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    GeneralizedRCNN,
)
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, ImageList, Instances
from torch import Tensor
from torch.nn import functional as F

import jepa_plugins.d2.vit  # noqa: F401  registers the backbone
from jepa_plugins.core.vitdet import ChannelNorm


def _head_norm(norm: Any) -> Any:
    """A head's norm in a form that every detectron2 takes."""
    return ChannelNorm if norm == "LN" else norm


@ROI_BOX_HEAD_REGISTRY.register()
class JEPABoxHead(FastRCNNConvFCHead):
    """detectron2's head of convolutions and linear layers, which also knows the norm "LN".

    Args:
        kwargs: conv_dims, fc_dims and the other arguments of `FastRCNNConvFCHead`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_norm: Any = "", **kwargs: Any) -> None:
        super().__init__(input_shape, conv_norm=_head_norm(conv_norm), **kwargs)


@ROI_MASK_HEAD_REGISTRY.register()
class JEPAMaskHead(MaskRCNNConvUpsampleHead):
    """detectron2's mask head, which also knows the norm "LN".

    Args:
        kwargs: num_classes, conv_dims and the other arguments of `MaskRCNNConvUpsampleHead`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_norm: Any = "", **kwargs: Any) -> None:
        super().__init__(input_shape, conv_norm=_head_norm(conv_norm), **kwargs)


@META_ARCH_REGISTRY.register()
class JEPAMaskRCNN(GeneralizedRCNN):
    """detectron2's `GeneralizedRCNN` for the backbones of `jepa_plugins.d2.vit`, under every launcher.

    Args: those of `GeneralizedRCNN`.
    """

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalised images, padded with zeros on the right and below.

        Up to the backbone's `square_pad` pixels a side they are padded to a square of it, as in
        ViTDet; larger ones to multiples of its `size_divisibility`.
        """
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        square = getattr(self.backbone, "square_pad", 0)
        if max(height, width) <= square:
            height = width = square
        divisor = max(self.backbone.size_divisibility, 1)
        height, width = height + -height % divisor, width + -width % divisor
        padded = [F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in images]
        return ImageList(torch.stack(padded), sizes)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: "image" [C, H, W]; in training also "instances" with gt_boxes, gt_classes and gt_masks,
                bool [N, H, W] or detectron2's masks.

        Returns:
            In training losses by name, else "instances" of each image.

        Raises:
            ValueError: a class that the heads do not have.
        """
        if self.training:
            batched_inputs = [self._with_masks(entry) for entry in batched_inputs]
        return super().forward(batched_inputs)

    def _with_masks(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The input with the mapper's masks in detectron2's form."""
        given = entry["instances"]
        classes = self.roi_heads.num_classes
        if len(given) and int(given.gt_classes.max()) >= classes:
            raise ValueError(
                f"'{entry.get('file_name', 'an image')}' has an object of class {int(given.gt_classes.max())}, but "
                f"MODEL.ROI_HEADS.NUM_CLASSES (LazyConfig: model.roi_heads.num_classes) is {classes}: set it to the "
                "data set's number of classes"
            )
        fields = dict(given.get_fields())
        if isinstance(fields.get("gt_masks"), Tensor):
            fields["gt_masks"] = BitMasks(fields["gt_masks"])
        return {**entry, "instances": Instances(given.image_size, **fields)}
