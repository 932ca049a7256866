"""One attention for every module of this package: fused where that is faster or the weights would not fit."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

# Up to this many scores per head (queries x keys) the weights are multiplied out; what is not listed is always
# fused (benchmarks/attention.py; torch 2.14, one thread). In bfloat16 explicit softmax takes 0.2 to 0.8 of the
# fused kernel's time, forward and backward, up to 1,024 x 1,024. In float32 the fused kernel takes 0.3 to 0.9 of
# the explicit one's; small maps stay explicit there, because that rounds as the published layers do and costs
# about a millisecond.
EXPLICIT_UP_TO: dict[tuple[str, torch.dtype], int] = {
    ("cpu", torch.float32): 96 * 96,
    ("cpu", torch.bfloat16): 1024 * 1024,
    ("cpu", torch.float16): 512 * 512,
}
_logged: set[tuple[str, torch.dtype, bool]] = set()


def uses_explicit_softmax(device: str, dtype: torch.dtype, scores: int) -> bool:
    """Whether `attention` multiplies out the weights for this device type, precision and scores per head."""
    return scores <= EXPLICIT_UP_TO.get((device, dtype), 0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T) v.

    Args:
        query: [B, heads, Nq, d].
        key, value: [B, heads, Nk, d].
        mask: broadcastable to [B, heads, Nq, Nk]. bool: True where a query may look, each row needs one True.
            In query's floating type: added to the scores, such as a relative position bias.
        scale: of the scores; d ** -0.5 if None.
        dropout: rate on the weights, 0 to 1; the caller gives 0 outside training.

    Returns:
        [B, heads, Nq, d].
    """
    device = query.device.type
    explicit = uses_explicit_softmax(device, query.dtype, query.shape[-2] * key.shape[-2])
    choice = (device, query.dtype, explicit)
    if choice not in _logged:
        _logged.add(choice)
        logger.info(
            "attention on %s in %s: %s (%d x %d scores a head)",
            device,
            str(query.dtype).removeprefix("torch."),
            "explicit softmax" if explicit else "torch's fused kernel",
            query.shape[-2],
            key.shape[-2],
        )
    if not explicit:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ value


def multihead_attention(
    module: torch.nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """What `module` computes, through its parameters and `attention`: no weights are materialised for the
    caller.

    Args:
        module: as published checkpoints hold it (`in_proj_weight`, `in_proj_bias`, `out_proj`); its dropout
            is applied by the caller's layer only.
        query: [B, Nq, C]; key, value: [B, Nk, C], batch first whatever `module.batch_first` says.
        mask: as in `attention`.

    Returns:
        [B, Nq, C].
    """
    width, heads = module.embed_dim, module.num_heads
    weights = module.in_proj_weight.split(width)
    biases = module.in_proj_bias.split(width) if module.in_proj_bias is not None else (None,) * 3

    def project(x: Tensor, i: int) -> Tensor:
        return F.linear(x, weights[i], biases[i]).unflatten(-1, (heads, width // heads)).transpose(1, 2)

    out = attention(project(query, 0), project(key, 1), project(value, 2), mask)
    return module.out_proj(out.transpose(1, 2).flatten(2))
