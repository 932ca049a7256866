"""Mask-JEPA's predictor: the transformer decoder's own layers, read by their published attribute names
(section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jepa_plugins.core.transformer import cross_attention_layer, feed_forward_layer, self_attention_layer


class SelfAttentionBlock(nn.Module):
    """Self-attention and FFN with residuals and post-norm: one of the M extra blocks, for pre-training
    only."""

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.attention = _Named(self_attn=nn.MultiheadAttention(width, heads), norm=nn.LayerNorm(width))
        self.ffn = _Named(
            linear1=nn.Linear(width, feedforward),
            linear2=nn.Linear(feedforward, width),
            norm=nn.LayerNorm(width),
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, query_pos: Tensor | None, mask: Tensor | None) -> Tensor:
        """[B, N, C] -> [B, N, C]; mask bool [B, 1, 1, N], True for real queries."""
        return feed_forward_layer(self.ffn, self_attention_layer(self.attention, x, query_pos, mask))


class _Named(nn.Module):
    """Sub-layers under the attribute names that `core.transformer` reads."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


@dataclass
class Level:
    """A map of the pixel decoder with its hidden cells.

    `feature` [B, C, H, W]; `hidden` and `valid` bool [B, H, W] on the CPU, so that counting them stalls no
    accelerator.
    """

    feature: Tensor
    hidden: Tensor
    valid: Tensor


@dataclass
class Memory:
    """What the cross-attention reads: tokens [B, K, C], positions [1, K, C], and bool [B, 1, 1, K] of the cells
    inside the image, or None when all are."""

    tokens: Tensor
    pos: Tensor
    mask: Tensor | None


@dataclass
class Queries:
    """Cells that are predicted: `index` int64 [B, N], and `valid` bool [B, N] or None when all are real."""

    index: Tensor
    valid: Tensor | None

    def to(self, device: torch.device) -> Queries:
        """On another device."""
        return Queries(self.index.to(device), None if self.valid is None else self.valid.to(device))


def choose_queries(hidden: Tensor, valid: Tensor, only_hidden: bool) -> Queries:
    """All cells of the image, or the hidden ones; short rows are filled up with other cells.

    Args:
        hidden, valid: bool [B, cells], on the CPU.
    """
    wanted = hidden if only_hidden else valid
    counts = wanted.sum(1)
    longest = int(counts.max())
    index = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    full = bool((counts == longest).all())
    return Queries(index, None if full else wanted.gather(1, index))


def masked_memory(decoder: Any, level: int, given: Level, mask_token: Tensor) -> Memory:
    """Fill the hidden cells and project as the decoder does (section 3.3)."""
    device = given.feature.device
    cells = given.feature.flatten(2).transpose(1, 2)
    hidden = given.hidden.flatten(1).to(device)
    filled = torch.where(hidden[..., None], mask_token.to(cells.dtype), cells)
    as_map = filled.transpose(1, 2).unflatten(-1, given.feature.shape[-2:])
    tokens = decoder.input_proj[level](as_map).flatten(2).transpose(1, 2) + decoder.level_embed.weight[level]
    pos = decoder.pe_layer(given.feature[:1]).flatten(2).transpose(1, 2).to(tokens.dtype)
    valid = given.valid.flatten(1)
    mask = None if bool(valid.all()) else valid[:, None, None, :].to(device)
    return Memory(tokens, pos, mask)


def decoder_layers(decoder: Any) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    """Its (cross-attention, self-attention, FFN) layers, in order."""
    return list(
        zip(
            decoder.transformer_cross_attention_layers,
            decoder.transformer_self_attention_layers,
            decoder.transformer_ffn_layers,
            strict=True,
        )
    )


def run_layers(
    decoder: Any,
    x: Tensor,
    query_pos: Tensor,
    self_mask: Tensor | None,
    memories: Mapping[int, Memory],
    order: tuple[int, ...],
    pos_on_value: bool,
) -> Tensor:
    """Equations 3 to 5: x [B, N, C] through all layers, layer i reading memory order[i] -> [B, N, C]."""
    for (cross, self_attention, ffn), level in zip(decoder_layers(decoder), order, strict=True):
        memory = memories[level]
        x = cross_attention_layer(
            cross,
            x,
            memory.tokens,
            mask=memory.mask,
            pos=memory.pos,
            query_pos=query_pos,
            pos_on_value=pos_on_value,
        )
        x = self_attention_layer(self_attention, x, query_pos, self_mask)
        x = feed_forward_layer(ffn, x)
    return x
