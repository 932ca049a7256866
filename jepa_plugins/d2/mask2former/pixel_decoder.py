"""MSDeformAttn pixel decoder of Mask2Former: deformable encoder over strides 8-32, then an FPN to stride
4."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from jepa_plugins.core.deformable_attention import MSDeformAttn
from jepa_plugins.core.position import PositionEmbeddingSine
from jepa_plugins.d2.registration import look_up, register_published


def build_pixel_decoder(cfg, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """The pixel decoder that `MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME` names.

    Raises:
        ValueError: when it has no `forward_features`.
    """
    name = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    decoder = look_up(SEM_SEG_HEADS_REGISTRY, name)(cfg, input_shape)
    if not callable(getattr(decoder, "forward_features", None)):
        raise ValueError(
            f"the pixel decoder {name} has no method forward_features, which the segmentation head calls"
        )
    return decoder


class MSDeformAttnTransformerEncoderLayer(nn.Module):
    """Deformable self-attention and FFN, post-norm."""

    def __init__(
        self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, position: Tensor, reference_points: Tensor, shapes: Sequence) -> Tensor:
        """x, position [B, cells, C]; reference_points [1, cells, L, 2] -> [B, cells, C]."""
        x = self.norm1(x + self.dropout1(self.self_attn(x + position, reference_points, x, shapes)))
        hidden = self.linear2(self.dropout2(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout3(hidden))


class MSDeformAttnTransformerEncoder(nn.Module):
    """A stack of layers."""

    def __init__(self, layer: MSDeformAttnTransformerEncoderLayer, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))


class MSDeformAttnTransformerEncoderOnly(nn.Module):
    """The deformable encoder with its level embedding."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_layers: int,
        d_ffn: int,
        dropout: float,
        n_levels: int,
        n_points: int,
    ) -> None:
        super().__init__()
        layer = MSDeformAttnTransformerEncoderLayer(d_model, d_ffn, dropout, n_levels, nhead, n_points)
        self.encoder = MSDeformAttnTransformerEncoder(layer, num_layers)
        self.level_embed = nn.Parameter(torch.empty(n_levels, d_model))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(self, sources: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C, H, W] of each level, and their position encodings -> the same shapes."""
        shapes = [(int(s.shape[-2]), int(s.shape[-1])) for s in sources]
        x = torch.cat([s.flatten(2).transpose(1, 2) for s in sources], dim=1)
        position = torch.cat(
            [p.flatten(2).transpose(1, 2) + e for p, e in zip(positions, self.level_embed, strict=True)],
            dim=1,
        )
        centres = torch.cat([cell_centres(h, w, x.device) for h, w in shapes])
        reference_points = centres[None, :, None, :].expand(1, -1, len(shapes), 2)
        for layer in self.encoder.layers:
            x = layer(x, position, reference_points, shapes)
        cells = x.split([h * w for h, w in shapes], dim=1)
        return [c.transpose(1, 2).unflatten(-1, shape) for c, shape in zip(cells, shapes, strict=True)]


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """(x, y) in (0, 1) of the cells of a grid, row by row: [H*W, 2]."""
    y = torch.linspace(0.5, height - 0.5, height, device=device) / height
    x = torch.linspace(0.5, width - 0.5, width, device=device) / width
    return torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1)


def _by_stride(input_shape: dict[str, ShapeSpec]) -> list[tuple[str, ShapeSpec]]:
    return sorted(input_shape.items(), key=lambda item: item[1].stride)


@register_published(SEM_SEG_HEADS_REGISTRY)
class MSDeformAttnPixelDecoder(nn.Module):
    """Pixel decoder; parameter names and results are the published ones.

    Args:
        input_shape: features of the backbone.
        transformer_in_features: those that the deformable encoder reads (strides 8, 16, 32).
        conv_dim: width C, a multiple of 32 (the group norms have 32 groups); mask_dim: channels of the mask
            features.
        norm: of the FPN convolutions ("GN" or "").
        common_stride: of the mask features (4).

    Raises:
        ValueError: when conv_dim is no multiple of 32 or of the number of heads.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        transformer_dropout: float,
        transformer_nheads: int,
        transformer_dim_feedforward: int,
        transformer_enc_layers: int,
        conv_dim: int,
        mask_dim: int,
        norm: str | Callable | None = None,
        transformer_in_features: Sequence[str],
        common_stride: int,
        transformer_n_points: int = 4,
    ) -> None:
        super().__init__()
        if conv_dim % 32:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.CONVS_DIM must be a multiple of 32 (group norm), not {conv_dim}"
            )
        ordered = _by_stride(input_shape)
        self.in_features = [name for name, _ in ordered]
        self.feature_strides = [spec.stride for _, spec in ordered]
        read = [(name, spec) for name, spec in ordered if name in transformer_in_features]
        self.transformer_in_features = [name for name, _ in read]
        self.transformer_num_feature_levels = len(read)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(spec.channels, conv_dim, kernel_size=1), nn.GroupNorm(32, conv_dim))
            for _, spec in reversed(read)
        )
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight, gain=1)
            nn.init.constant_(projection[0].bias, 0)
        self.transformer = MSDeformAttnTransformerEncoderOnly(
            d_model=conv_dim,
            nhead=transformer_nheads,
            num_layers=transformer_enc_layers,
            d_ffn=transformer_dim_feedforward,
            dropout=transformer_dropout,
            n_levels=len(read),
            n_points=transformer_n_points,
        )
        self.pe_layer = PositionEmbeddingSine(conv_dim // 2, normalize=True)
        self.mask_dim = mask_dim
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        c2_xavier_fill(self.mask_features)
        self.maskformer_num_feature_levels = 3  # that the transformer decoder reads in turn
        self.common_stride = common_stride
        finest = min(spec.stride for _, spec in read)
        self.num_fpn_levels = int(math.log2(finest) - math.log2(common_stride))
        self._add_fpn([spec.channels for _, spec in ordered[: self.num_fpn_levels]], conv_dim, norm)

    def _add_fpn(self, channels: Sequence[int], conv_dim: int, norm: str | Callable | None) -> None:
        use_bias = norm == ""
        lateral_convs, output_convs = [], []
        for i, width in enumerate(channels, start=1):
            lateral = Conv2d(width, conv_dim, kernel_size=1, bias=use_bias, norm=get_norm(norm, conv_dim))
            output = Conv2d(
                conv_dim,
                conv_dim,
                kernel_size=3,
                padding=1,
                bias=use_bias,
                norm=get_norm(norm, conv_dim),
                activation=F.relu,
            )
            c2_xavier_fill(lateral)
            c2_xavier_fill(output)
            self.add_module(f"adapter_{i}", lateral)
            self.add_module(f"layer_{i}", output)
            lateral_convs.append(lateral)
            output_convs.append(output)
        # Plain lists: the modules are registered above, under the published names.
        self.lateral_convs = lateral_convs[::-1]
        self.output_convs = output_convs[::-1]

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments from detectron2's configuration."""
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "transformer_dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            "transformer_nheads": cfg.MODEL.MASK_FORMER.NHEADS,
            # The published code fixes 1024 here; a configuration made by its own function lacks our key.
            "transformer_dim_feedforward": head.get("TRANSFORMER_ENC_DIM_FEEDFORWARD", 1024),
            "transformer_enc_layers": head.TRANSFORMER_ENC_LAYERS,
            "transformer_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "transformer_n_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            "common_stride": head.COMMON_STRIDE,
        }

    def _encode(self, features: dict[str, Tensor]) -> list[Tensor]:
        coarse_first = [features[name].float() for name in reversed(self.transformer_in_features)]
        sources = [projection(x) for projection, x in zip(self.input_proj, coarse_first, strict=True)]
        return self.transformer(sources, [self.pe_layer(x) for x in coarse_first])

    def forward_levels(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The third item of `forward_features` alone, without the cost of the stride-4 map."""
        with torch.autocast(next(iter(features.values())).device.type, enabled=False):
            return self._encode(features)[: self.maskformer_num_feature_levels]

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Backbone features [B, C_i, H_i, W_i] by name -> (mask_features [B, mask_dim, H/4, W/4], the
        coarsest encoder map
        [B, C, H/32, W/32], three encoder maps from stride 32 to stride 8). float32 even under autocast."""
        with torch.autocast(next(iter(features.values())).device.type, enabled=False):
            out = self._encode(features)
            fine_names = reversed(self.in_features[: self.num_fpn_levels])
            for name, lateral, output in zip(fine_names, self.lateral_convs, self.output_convs, strict=True):
                side = lateral(features[name].float())
                up = F.interpolate(out[-1], size=side.shape[-2:], mode="bilinear", align_corners=False)
                out.append(output(side + up))
            return self.mask_features(out[-1]), out[0], out[: self.maskformer_num_feature_levels]
