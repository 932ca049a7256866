"""Local Aggregation Targets: heads that gather neighbours into targets (DMT-JEPA, section 3.3, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_plugins.core.attention import attention
from jepa_plugins.core.neighbours import Neighbours, pick_neighbours
from jepa_plugins.core.vit import NORM, init_like_ijepa

LAT_TYPES = ("learned", "parameter_free")
ATTENTIONS = ("cross", "self", "average", "max", "none")
CONTEXTS = ("broadcast", "token", "none")


class AggregationAttention(nn.Module):
    """Multi-head attention with separate projections for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """[..., n, D] -> [..., heads, n, D / heads]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """query [B, n, D] looks at tokens [B, m, D] -> [B, n, D]."""
        out = attention(self.split(self.q(query)), self.split(self.k(tokens)), self.split(self.v(tokens)))
        return self.proj(out.transpose(1, 2).flatten(2))


class AggregationBlock(nn.Module):
    """Norm, attention, norm, MLP, both with residuals; the same weights serve every reading."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = NORM(width), NORM(width)
        self.attn = AggregationAttention(width, heads)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Residual MLP: [..., D] -> [..., D]."""
        return x + self.mlp(self.norm2(x))

    def over_neighbours(self, query: Tensor, patches: Tensor, chosen: Neighbours) -> Tensor:
        """What each patch's query reads of itself and of its neighbours, without the residual.

        Keys and values are projected once a patch, not once for each window that it is a neighbour in.

        Args:
            query: [B, N or 1, D]; patches: [B, N, D].

        Returns:
            [B, N, D].
        """
        attn, heads = self.attn, self.attn.num_heads
        normed, own = self.norm1(patches), self.norm1(query)
        batch, count, width = patches.shape
        pair = torch.cat([attn.k(normed), attn.v(normed)], dim=-1)
        keys, values = pick_neighbours(pair, chosen.index).split(width, dim=-1)  # [B, N, k, D] each
        own_key, own_value = (layer(own).expand(-1, count, -1)[:, :, None] for layer in (attn.k, attn.v))
        keys, values = torch.cat([own_key, keys], 2), torch.cat([own_value, values], 2)
        queries = attn.q(own).expand(-1, count, -1)
        queries = queries.reshape(batch, count, heads, 1, width // heads)
        keys, values = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (keys, values))
        scores = (queries * queries.shape[-1] ** -0.5 * keys).sum(-1)  # [B, N, heads, 1 + k]
        if chosen.valid is not None:
            known = F.pad(chosen.valid, (1, 0), value=True)[:, :, None]
            scores = scores.masked_fill(~known, float("-inf"))
        weights = scores.float().softmax(-1).to(values.dtype)
        gathered = (weights[..., None] * values).sum(3).flatten(2)
        return attn.proj(gathered)


class AggregationHead(nn.Module):
    """The learned head h_theta: `depth` blocks and a final norm.

    The context branch trains one, whose moving average aggregates the targets.
    """

    def __init__(self, width: int, heads: int, depth: int = 2) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(AggregationBlock(width, heads) for _ in range(depth))
        self.norm = NORM(width)
        init_like_ijepa(self, self.blocks)

    def targets(self, patches: Tensor, chosen: Neighbours | None, kind: str, residual: bool) -> Tensor:
        """One vector per patch: [B, N, D] -> [B, N, D].

        Args:
            chosen: neighbours, or None for all patches of the image, the same vector for each of its patches.
            kind: "cross" (the query alone is updated) or "self" (the neighbours too).
            residual: start from the mean of the image's patches; else from nothing (eq. 4 has no residual).
        """
        mean = patches.mean(1, keepdim=True)
        if chosen is None:
            out = self._read(mean, patches, kind, residual)
            return out.expand(-1, patches.shape[1], -1)
        if kind == "self":
            near = pick_neighbours(patches, chosen.index).flatten(0, 1)
            query = mean.expand(-1, patches.shape[1], -1).flatten(0, 1)[:, None]
            return self._read(query, near, kind, residual).view_as(patches)
        query = mean
        for depth, block in enumerate(self.blocks):
            read = block.over_neighbours(query, patches, chosen)
            query = block.feed_forward(query + read if residual or depth else read)
        return self.norm(query)

    def _read(self, query: Tensor, tokens: Tensor, kind: str, residual: bool) -> Tensor:
        """query [B, 1, D] reads itself and tokens [B, n, D] -> [B, 1, D]."""
        for depth, block in enumerate(self.blocks):
            both = torch.cat([query, tokens], dim=1)
            normed = block.norm1(both)
            start = both if kind == "self" else query
            read = block.attn(normed[:, : start.shape[1]], normed)
            if not residual and depth == 0:
                start = torch.cat([torch.zeros_like(query), start[:, 1:]], dim=1)
            out = block.feed_forward(start + read)
            query, tokens = out[:, :1], out[:, 1:] if kind == "self" else tokens
        return self.norm(query)

    def context(self, tokens: Tensor, kind: str, readout: str) -> Tensor:
        """Context tokens [B, n, D] with their aggregate: [B, n, D], or [B, n + 1, D] for "token".

        Args:
            kind: "cross": the mean of the tokens looks at them and at itself; "self": the tokens look at each
                other. readout: the aggregate is added to every token ("broadcast") or is one more ("token").
        """
        extra = None
        for block in self.blocks:
            if kind == "self":
                normed = block.norm1(tokens)
                tokens = block.feed_forward(tokens + block.attn(normed, normed))
                continue
            mean = tokens.mean(1, keepdim=True) if extra is None else extra
            normed = block.norm1(torch.cat([mean, tokens], dim=1))
            read = block.attn(normed[:, :1], normed)
            if readout == "token":
                extra = block.feed_forward(mean + read)
            else:
                tokens = block.feed_forward(tokens + read)
        return self.norm(tokens if extra is None else torch.cat([tokens, extra], dim=1))


def parameter_free(query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """Equation 4 without weights: softmax(q k^T / sqrt(D)) k.

    Args:
        query: [..., 1, D]; keys: [..., n, D]; mask: bool [..., n], True where a key counts.

    Returns:
        [..., 1, D].
    """
    scores = (query * keys).sum(-1) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1)[..., None] * keys).sum(-2, keepdim=True)


def pooled_targets(patches: Tensor, chosen: Neighbours | None, kind: str, residual: bool) -> Tensor:
    """Targets without weights: [B, N, D] -> [B, N, D].

    Args:
        kind: "cross" is `parameter_free` from the image's mean; "average" and "max" pool the neighbours.
    """
    mean = patches.mean(1, keepdim=True)
    near = patches[:, None] if chosen is None else pick_neighbours(patches, chosen.index)  # [B, N or 1, k, D]
    valid = None if chosen is None or chosen.valid is None else chosen.valid
    if kind == "cross":
        out = parameter_free(mean[:, :, None], near, valid)[..., 0, :]
        out = out + mean if residual else out
    elif kind == "max":
        hidden = near if valid is None else near.masked_fill(~valid[..., None], float("-inf"))
        out = hidden.amax(-2)
    elif valid is None:
        out = near.mean(-2)
    else:
        out = (near * valid[..., None]).sum(-2) / valid.sum(-1, keepdim=True)
    return out.expand_as(patches)


def pooled_context(tokens: Tensor, kind: str, readout: str) -> Tensor:
    """Context tokens [B, n, D] with an aggregate without weights; see `AggregationHead.context`."""
    mean = tokens.mean(1, keepdim=True)
    pooled = {
        "cross": lambda: parameter_free(mean, tokens),
        "average": lambda: mean,
        "max": lambda: tokens.amax(1, keepdim=True),
    }[kind]()
    return torch.cat([tokens, pooled], dim=1) if readout == "token" else tokens + pooled
