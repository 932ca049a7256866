"""The plain ViT with a simple feature pyramid as detectron2 backbone: classes for LazyConfigs, a builder for yaml.

The classes take the arguments of current detectron2's `ViT` and `SimpleFeaturePyramid`, which are not registered, and
work where detectron2 has neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from jepa_plugins.core.vitdet import DetectionViT, SimpleFeaturePyramid


class JEPAViT(DetectionViT, Backbone):
    """`core.vitdet.DetectionViT` as a backbone of one feature.

    Args:
        out_feature: its name.
        residual_block_indexes: published LazyConfigs name them; convolutional blocks are not supported.
        kwargs: see `DetectionViT`.

    Raises:
        ValueError: residual blocks are asked for, or see `DetectionViT`.
    """

    def __init__(
        self, *, out_feature: str = "last_feat", residual_block_indexes: Sequence[int] = (), **kwargs: Any
    ) -> None:
        if residual_block_indexes:
            raise ValueError(
                f"residual_block_indexes names {list(residual_block_indexes)}, but this ViT has no convolutional "
                "blocks: leave it empty and attend across the whole map in some blocks"
            )
        super().__init__(**kwargs)
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: self.embed_dim}
        self._out_feature_strides = {out_feature: self.patch_size}

    @property
    def size_divisibility(self) -> int:
        """Input sides are padded to a multiple of this many pixels."""
        return self.patch_size

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, c, H, W], normalised -> the last block's map [B, D, H / patch, W / patch] under its name."""
        return {self._out_features[0]: self.features(x)}


class JEPASimpleFeaturePyramid(SimpleFeaturePyramid, Backbone):
    """Levels "p2", "p3", ... (stride 2 ** number) over the map of a ViT.

    Args:
        net: gives the map `in_feature`.
        out_channels, scale_factors, norm: see `core.vitdet.SimpleFeaturePyramid`.
        top_block: further levels from the level `top_block.in_feature`, as detectron2's `LastLevelMaxPool`; or None.
        square_pad: images up to this many pixels a side are padded to a square of it; 0 pads to whole cells only.

    Raises:
        ValueError: `square_pad` is no multiple of the last level's stride, or see `SimpleFeaturePyramid`.
    """

    def __init__(
        self,
        *,
        net: Backbone,
        in_feature: str = "last_feat",
        out_channels: int = 256,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        top_block: nn.Module | None = None,
        norm: str | Callable[[int], nn.Module] = "LN",
        square_pad: int = 0,
    ) -> None:
        shape = net.output_shape()[in_feature]
        super().__init__(shape.channels, shape.stride, out_channels, scale_factors, norm)
        if square_pad % self.strides[-1]:
            raise ValueError(
                f"square_pad is {square_pad}, no multiple of the last level's stride {self.strides[-1]}"
            )
        self.net, self.in_feature, self.top_block = net, in_feature, top_block
        self.square_pad = square_pad
        strides = list(self.strides)
        for _ in range(0 if top_block is None else top_block.num_levels):
            strides.append(2 * strides[-1])
        self._out_feature_strides = {f"p{round(math.log2(stride))}": stride for stride in strides}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        if top_block is not None and top_block.in_feature not in self._out_features[: len(self.strides)]:
            raise ValueError(
                f"top_block reads {top_block.in_feature}, but the pyramid has {', '.join(self._out_features)}: "
                "choose scale_factors that give it"
            )

    @property
    def size_divisibility(self) -> int:
        """Input sides are padded to a multiple of this many pixels."""
        return max(self.strides[-1], self.net.size_divisibility)

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What current detectron2's models ask for."""
        return {"size_divisibility": self.size_divisibility, "square_size": self.square_pad}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, c, H, W], normalised, sides multiples of `size_divisibility` -> "p2" [B, out, H / 4, W / 4], ..."""
        maps = self.levels(self.net(x)[self.in_feature])
        if self.top_block is not None:
            maps += self.top_block(maps[self._out_features.index(self.top_block.in_feature)])
        return dict(zip(self._out_features, maps, strict=True))


@BACKBONE_REGISTRY.register()
def build_jepa_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> JEPASimpleFeaturePyramid:
    """The pyramid that MODEL.VIT describes, with detectron2's MODEL.FPN.OUT_CHANNELS and MODEL.FPN.NORM.

    Raises:
        ValueError: naming the argument (the key in lower case) of an architecture that cannot be.
    """
    node = cfg.MODEL.VIT
    net = JEPAViT(
        img_size=node.IMG_SIZE,
        patch_size=node.PATCH_SIZE,
        in_chans=input_shape.channels,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        mlp_ratio=node.MLP_RATIO,
        qkv_bias=node.QKV_BIAS,
        drop_path_rate=node.DROP_PATH_RATE,
        use_rel_pos=node.USE_REL_POS,
        rel_pos_zero_init=node.REL_POS_ZERO_INIT,
        window_size=node.WINDOW_SIZE,
        window_block_indexes=node.WINDOW_BLOCK_INDEXES,
        use_act_checkpoint=node.USE_CHECKPOINT,
        pretrain_img_size=node.PRETRAIN_IMG_SIZE,
        pretrain_use_cls_token=node.PRETRAIN_USE_CLS_TOKEN,
    )
    return JEPASimpleFeaturePyramid(
        net=net,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=node.SCALE_FACTORS,
        top_block=LastLevelMaxPool(),
        norm=cfg.MODEL.FPN.NORM,
        square_pad=node.SQUARE_PAD,
    )
