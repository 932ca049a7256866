"""Masked-attention transformer decoder of Mask2Former."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d
from detectron2.utils.registry import Registry
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from jepa_plugins.core.position import PositionEmbeddingSine
from jepa_plugins.d2.registration import look_up, register_published

from .layers import MLP, CrossAttentionLayer, FFNLayer, SelfAttentionLayer

logger = logging.getLogger(__name__)

TRANSFORMER_DECODER_REGISTRY = Registry("JEPA_TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = (
    "Transformer decoders, called as (cfg, in_channels, mask_classification)."
)


def build_transformer_decoder(cfg, in_channels: int, mask_classification: bool = True) -> nn.Module:
    """The transformer decoder that `MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME` names."""
    name = cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME
    return look_up(TRANSFORMER_DECODER_REGISTRY, name)(cfg, in_channels, mask_classification)


def keep_untrained_rows(table: Tensor, loaded: Tensor, trained_rows: Sequence[int]) -> Tensor:
    """`loaded` [rows, C] where a row was trained, `table`'s own value elsewhere."""
    out = table.detach().clone().to(loaded.dtype)
    rows = [row for row in trained_rows if row < len(loaded)]
    out[rows] = loaded[rows].to(out.device)
    return out


@register_published(TRANSFORMER_DECODER_REGISTRY)
class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Queries read the three encoder maps in turn, each only inside the mask it predicted last.

    Args:
        in_channels: of the maps; hidden_dim: width C; mask_dim: channels of the mask features.
        dec_layers: number of layers L (the configuration's DEC_LAYERS counts one more, for the loss on the
            queries).
        enforce_input_project: project the maps even when their width is C.
    """

    _version = 2
    num_feature_levels = 3

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        nheads: int,
        dim_feedforward: int,
        dec_layers: int,
        pre_norm: bool,
        mask_dim: int,
        enforce_input_project: bool,
    ) -> None:
        super().__init__()
        if not mask_classification:
            raise ValueError("the transformer decoder supports mask classification only")
        self.mask_classification = mask_classification
        self.pe_layer = PositionEmbeddingSine(hidden_dim // 2, normalize=True)
        self.num_heads, self.num_layers, self.num_queries = nheads, dec_layers, num_queries
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, nheads, normalize_before=pre_norm) for _ in range(dec_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, nheads, normalize_before=pre_norm) for _ in range(dec_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(hidden_dim, dim_feedforward, normalize_before=pre_norm) for _ in range(dec_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(self.num_feature_levels, hidden_dim)
        self.input_proj = nn.ModuleList()
        for _ in range(self.num_feature_levels):
            if in_channels != hidden_dim or enforce_input_project:
                self.input_proj.append(Conv2d(in_channels, hidden_dim, kernel_size=1))
                c2_xavier_fill(self.input_proj[-1])
            else:
                self.input_proj.append(nn.Sequential())
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg, in_channels: int, mask_classification: bool) -> dict:
        """Arguments from detectron2's configuration."""
        node = cfg.MODEL.MASK_FORMER
        if node.DEC_LAYERS < 1:
            raise ValueError(f"MODEL.MASK_FORMER.DEC_LAYERS must be at least 1, not {node.DEC_LAYERS}")
        return {
            "in_channels": in_channels,
            "mask_classification": mask_classification,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": node.HIDDEN_DIM,
            "num_queries": node.NUM_OBJECT_QUERIES,
            "nheads": node.NHEADS,
            "dim_feedforward": node.DIM_FEEDFORWARD,
            "dec_layers": node.DEC_LAYERS - 1,
            "pre_norm": node.PRE_NORM,
            "enforce_input_project": node.ENFORCE_INPUT_PROJ,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
        }

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        version = local_metadata.get("version")
        if version is None or version < 2:
            old = [key for key in state_dict if key.startswith(prefix) and "static_query" in key]
            for key in old:
                state_dict[key.replace("static_query", "query_feat")] = state_dict.pop(key)
            if old:
                logger.warning(
                    "renamed %d tensors of an old checkpoint: static_query -> query_feat", len(old)
                )
        rows, key = local_metadata.get("trained_level_rows"), f"{prefix}level_embed.weight"
        if rows is not None and key in state_dict and state_dict[key].shape == self.level_embed.weight.shape:
            state_dict[key] = keep_untrained_rows(self.level_embed.weight, state_dict[key], rows)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(self, x: Sequence[Tensor], mask_features: Tensor, mask: Tensor | None = None) -> dict:
        """
        Args:
            x: three maps [B, C_in, H_i, W_i], strides 32, 16, 8.
            mask_features: [B, mask_dim, H/4, W/4].
            mask: ignored, as in the published decoder.

        Returns:
            "pred_logits" [B, Q, classes + 1], "pred_masks" [B, Q, H/4, W/4] (logits), and "aux_outputs",
            the same two of the queries themselves and of every layer but the last.
        """
        if len(x) != self.num_feature_levels:
            raise ValueError(f"the transformer decoder reads {self.num_feature_levels} maps, got {len(x)}")
        memories, positions, sizes = [], [], []
        for i, level in enumerate(x):
            sizes.append(level.shape[-2:])
            positions.append(self.pe_layer(level).flatten(2).transpose(1, 2))
            projected = self.input_proj[i](level).flatten(2).transpose(1, 2)
            memories.append(projected + self.level_embed.weight[i])
        batch = mask_features.shape[0]
        query_pos = self.query_embed.weight.expand(batch, -1, -1)
        queries = self.query_feat.weight.expand(batch, -1, -1)

        logits, masks, visible = self._predict(queries, mask_features, sizes[0])
        predictions = [(logits, masks)]
        for i in range(self.num_layers):
            level = i % self.num_feature_levels
            queries = self.transformer_cross_attention_layers[i](
                queries, memories[level], mask=visible, pos=positions[level], query_pos=query_pos
            )
            queries = self.transformer_self_attention_layers[i](queries, query_pos)
            queries = self.transformer_ffn_layers[i](queries)
            following = sizes[(i + 1) % self.num_feature_levels] if i + 1 < self.num_layers else None
            logits, masks, visible = self._predict(queries, mask_features, following)
            predictions.append((logits, masks))
        named = [{"pred_logits": logits, "pred_masks": masks} for logits, masks in predictions]
        return {**named[-1], "aux_outputs": named[:-1]}

    def _predict(
        self, queries: Tensor, mask_features: Tensor, attention_size: torch.Size | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, Q, C] -> class logits, mask logits, and where each query may look next: bool [B, 1, Q, H_i *
        W_i]."""
        normed = self.decoder_norm(queries)
        logits = self.class_embed(normed)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(normed), mask_features)
        if attention_size is None:
            return logits, masks, None
        with torch.no_grad():
            resized = F.interpolate(masks.detach(), size=attention_size, mode="bilinear", align_corners=False)
            visible = resized.flatten(2).sigmoid() >= 0.5
            # A query that predicts an empty mask looks everywhere instead of nowhere.
            visible |= ~visible.any(dim=-1, keepdim=True)
        return logits, masks, visible.unsqueeze(1)
