"""Mask2Former's three decoder sub-layers as functions of a layer's parameters.

They run our layers and the published ones alike (a layer is known by `.multihead_attn` or `.self_attn`,
`.norm`, `.linear1`, `.linear2`, `.normalize_before`), batch first and through `core.attention`: calling a
published layer would
return, and so materialise, its attention weights.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from jepa_plugins.core.attention import multihead_attention


def _add(x: Tensor, position: Tensor | None) -> Tensor:
    return x if position is None else x + position


def _drop(layer: Any, x: Tensor) -> Tensor:
    dropout = getattr(layer, "dropout", None)
    return x if dropout is None else dropout(x)


def self_attention_layer(
    layer: Any, x: Tensor, query_pos: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """x [B, N, C], query_pos [B or 1, N, C] added to queries and keys, mask as in `attention` -> [B, N,
    C]."""
    pre_norm = getattr(layer, "normalize_before", False)
    source = layer.norm(x) if pre_norm else x
    placed = _add(source, query_pos)
    out = x + _drop(layer, multihead_attention(layer.self_attn, placed, placed, source, mask))
    return out if pre_norm else layer.norm(out)


def cross_attention_layer(
    layer: Any,
    x: Tensor,
    memory: Tensor,
    *,
    mask: Tensor | None = None,
    pos: Tensor | None = None,
    query_pos: Tensor | None = None,
    pos_on_value: bool = False,
) -> Tensor:
    """x [B, N, C] looks at memory [B, K, C]; `pos` [B or 1, K, C] is added to the keys (and values if
    `pos_on_value`).

    Returns:
        [B, N, C].
    """
    pre_norm = getattr(layer, "normalize_before", False)
    source = layer.norm(x) if pre_norm else x
    key = _add(memory, pos)
    value = key if pos_on_value else memory
    out = x + _drop(
        layer, multihead_attention(layer.multihead_attn, _add(source, query_pos), key, value, mask)
    )
    return out if pre_norm else layer.norm(out)


def feed_forward_layer(layer: Any, x: Tensor) -> Tensor:
    """[B, N, C] -> [B, N, C]."""
    pre_norm = getattr(layer, "normalize_before", False)
    activation = getattr(layer, "activation", F.relu)
    source = layer.norm(x) if pre_norm else x
    out = x + _drop(layer, layer.linear2(_drop(layer, activation(layer.linear1(source)))))
    return out if pre_norm else layer.norm(out)
