"""Mask2Former under its published names: importing this package registers them."""

from .criterion import SetCriterion
from .head import MaskFormerHead
from .matcher import HungarianMatcher
from .meta_arch import MaskFormer
from .pixel_decoder import MSDeformAttnPixelDecoder, build_pixel_decoder
from .swin import D2SwinTransformer
from .transformer_decoder import (
    TRANSFORMER_DECODER_REGISTRY,
    MultiScaleMaskedTransformerDecoder,
    build_transformer_decoder,
)

__all__ = [
    "TRANSFORMER_DECODER_REGISTRY",
    "D2SwinTransformer",
    "HungarianMatcher",
    "MSDeformAttnPixelDecoder",
    "MaskFormer",
    "MaskFormerHead",
    "MultiScaleMaskedTransformerDecoder",
    "SetCriterion",
    "build_pixel_decoder",
    "build_transformer_decoder",
]
