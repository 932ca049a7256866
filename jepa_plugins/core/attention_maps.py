"""What a ViT and an aggregation head look at, and which patches look alike (DMT-JEPA, figures 2 and D.1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_plugins.core.aggregation import AggregationHead
from jepa_plugins.core.dmt_jepa import DMTJEPAModel
from jepa_plugins.core.neighbours import Neighbours, pick_neighbours
from jepa_plugins.core.vit import VisionTransformer


@torch.no_grad()
def last_attention(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Attention of an encoder's last block, in eval mode as `encoder` itself should be.

    Args:
        images: [B, c, H, W], normalised.

    Returns:
        float32 [B, heads, n, n], query by key, rows sum to 1; n counts the class token, first, if there is one.

    Raises:
        ValueError: when the patch does not divide the images.
    """
    grid = encoder.grid_of(images.shape[-2], images.shape[-1])
    tokens = encoder.embed(images)
    for after in islice(encoder.layers(tokens, grid), len(encoder.blocks) - 1):
        tokens = after
    block: Any = encoder.blocks[-1]
    qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, encoder.heads, -1))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if encoder.rel_pos_bias:
        scores = scores + block.attn.bias(grid)
    return scores.float().softmax(-1)


@contextmanager
def _outputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer returns while the context lasts, call by call."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@torch.no_grad()
def aggregation_weights(
    head: AggregationHead,
    patches: Tensor,
    chosen: Neighbours | None,
    kind: str = "cross",
    residual: bool = True,
) -> Tensor:
    """Attention of a head's last block, of each patch's query over itself and the patch's neighbours.

    The query starts as the mean of the image's patches, so the first weight is that of the image as a whole.

    Args:
        patches: [B, N, D], normalised; chosen, kind, residual: as of `AggregationHead.targets`.

    Returns:
        float32 [B, N, heads, 1 + k], rows sum to 1, 0 for neighbours that are not valid; with `chosen` None, when
        every patch reads the whole image alike, [B, 1, heads, 1 + N].
    """
    attn = head.blocks[-1].attn
    # The head's own run projects the queries and keys: how the query gets to the last block is told once.
    with _outputs_of(attn.q) as queries, _outputs_of(attn.k) as keys:
        head.targets(patches, chosen, kind, residual)
    batch, count, _ = patches.shape
    valid = None
    if chosen is not None and kind == "cross":  # keys of all patches, then the query's own
        near = pick_neighbours(keys[0], chosen.index)
        own = keys[1].expand(-1, count, -1)[:, :, None]
        key, query = torch.cat([own, near], dim=2), queries[0].expand(-1, count, -1)[:, :, None]
        valid = chosen.valid
    else:  # keys of the query and of what it reads, one row for each patch or image
        key, query = (t.unflatten(0, (batch, -1)) for t in (keys[0], queries[0][:, :1]))
    query, key = attn.split(query), attn.split(key)
    scores = ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1))[..., 0, :]
    if valid is not None:
        scores = scores.masked_fill(~F.pad(valid, (1, 0), value=True)[:, :, None], float("-inf"))
    return scores.float().softmax(-1)


@torch.no_grad()
def parameter_free_weights(patches: Tensor, chosen: Neighbours | None) -> Tensor:
    """Weights of equation 4, in the form of `aggregation_weights` with one head.

    The query is no key of its own there: the first weight is 0.
    """
    near = patches[:, None] if chosen is None else pick_neighbours(patches, chosen.index)
    mean = patches.mean(1)[:, None, None]
    scores = (near * mean).sum(-1) * patches.shape[-1] ** -0.5
    if chosen is not None and chosen.valid is not None:
        scores = scores.masked_fill(~chosen.valid, float("-inf"))
    return F.pad(scores.float().softmax(-1), (1, 0))[:, :, None]


@torch.no_grad()
def target_weights(
    model: DMTJEPAModel, features: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor] | None:
    """What each target gathers.

    Args:
        features: of the target encoder, [B, N, D]; grid: patches along height and width.

    Returns:
        Weight of the query itself, [B, N], and of every patch, [B, N, N], both the mean over heads; together a row
        sums to 1. None when the settings aggregate without attention.
    """
    settings = model.settings
    if settings.target not in ("cross", "self"):
        return None
    patches = F.layer_norm(features.float(), features.shape[-1:])
    chosen = model.aggregate(patches, grid)[1]
    if settings.lat == "learned":
        weights = aggregation_weights(
            model.target_head, patches, chosen, settings.target, settings.target_residual
        )
    else:
        weights = parameter_free_weights(patches, chosen)
    mean, count = weights.mean(2), patches.shape[1]
    own, near = mean[..., 0].expand(-1, count), mean[..., 1:]
    if chosen is None:
        return own, near.expand(-1, count, -1)
    return own, near.new_zeros(*near.shape[:2], count).scatter_add(2, chosen.index, near)


def cosine_maps(features: Tensor, query: Tensor) -> Tensor:
    """Cosine similarity of one patch of each image to all of its patches.

    Args:
        features: [B, N, D]; query: int64 [B], the patch in raster order.

    Returns:
        float32 [B, N] in [-1, 1], 1 at the query.
    """
    unit = F.normalize(features.float(), dim=-1)
    own = unit[torch.arange(len(unit), device=unit.device), query]
    return (unit @ own[..., None])[..., 0].clamp(-1, 1)


def most_similar(similarity: Tensor, share: float = 0.1) -> Tensor:
    """Marks the most similar patches: bool [B, N], `share` of N, rounded, in every row and at least one.

    Args:
        similarity: [B, N]; the query is among its patches. share: in (0, 1].

    Raises:
        ValueError: another share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of most similar patches lies in (0, 1], got {share}")
    count = max(round(share * similarity.shape[1]), 1)
    best = similarity.topk(count, dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter(1, best, True)
