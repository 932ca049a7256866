"""The Swin transformer as detectron2 backbone, configured by the published MODEL.SWIN keys."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from jepa_plugins.core.swin import FEATURES, SwinSettings, SwinTransformer
from jepa_plugins.d2.registration import register_published


def swin_settings(cfg: CfgNode, image_channels: int) -> SwinSettings:
    """MODEL.SWIN as core takes it.

    Raises:
        ValueError: naming the key, for an architecture that cannot be.
    """
    node = cfg.MODEL.SWIN
    return SwinSettings(
        image_channels=image_channels,
        pretrain_size=node.PRETRAIN_IMG_SIZE,
        patch_size=node.PATCH_SIZE,
        embed_dim=node.EMBED_DIM,
        depths=tuple(node.DEPTHS),
        heads=tuple(node.NUM_HEADS),
        window=node.WINDOW_SIZE,
        mlp_ratio=node.MLP_RATIO,
        qkv_bias=node.QKV_BIAS,
        qk_scale=node.QK_SCALE,
        drop_rate=node.DROP_RATE,
        attn_drop_rate=node.ATTN_DROP_RATE,
        drop_path_rate=node.DROP_PATH_RATE,
        absolute_position=node.APE,
        patch_norm=node.PATCH_NORM,
        out_features=tuple(node.OUT_FEATURES),
        checkpointing=node.USE_CHECKPOINT,
    )


@register_published(BACKBONE_REGISTRY)
class D2SwinTransformer(SwinTransformer, Backbone):
    """Swin-T, S, B or L with the published names; `res2` to `res5`, those of MODEL.SWIN.OUT_FEATURES.

    Args:
        cfg: reads MODEL.SWIN.
        input_shape: its channels are the model's input channels.
    """

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec) -> None:
        settings = swin_settings(cfg, input_shape.channels)
        super().__init__(settings)
        self._out_features = list(settings.out_features)
        self._out_feature_channels = dict(zip(FEATURES, settings.widths, strict=True))
        self._out_feature_strides = dict(zip(FEATURES, settings.strides, strict=True))

    @property
    def size_divisibility(self) -> int:
        """Input sides are padded to a multiple of this many pixels."""
        return self.settings.strides[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, c, H, W] -> "res2" [B, C, H/4, W/4] to "res5" [B, 8 C, H/32, W/32]."""
        return super().forward(x)
