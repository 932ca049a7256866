"""Attention and similarity maps against plain references, patch by patch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jepa_plugins.core.aggregation import AggregationHead
from jepa_plugins.core.attention_maps import (
    aggregation_weights,
    cosine_maps,
    last_attention,
    most_similar,
    parameter_free_weights,
    target_weights,
)
from jepa_plugins.core.dmt_jepa import IJEPA, DMTJEPAModel, DMTJEPASettings
from jepa_plugins.core.neighbours import Neighbourhood, choose_neighbours
from jepa_plugins.core.vit import Predictor, VisionTransformer

GRID, WIDTH, HEADS = (4, 5), 24, 3
SIZE = WIDTH // HEADS
COUNT = GRID[0] * GRID[1]


def loud(module):
    """Weights large enough that attention is far from uniform."""
    torch.manual_seed(2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def encoder(depth: int = 3, **options) -> VisionTransformer:
    return loud(VisionTransformer((32, 40), 8, width=WIDTH, depth=depth, heads=HEADS, **options)).eval()


def row_of(layer_q, layer_k, query, tokens):
    """Weights of query [D] over tokens [n, D], head by head: [heads, n]."""
    q, k = layer_q(query), layer_k(tokens)
    cuts = [slice(h * SIZE, (h + 1) * SIZE) for h in range(HEADS)]
    return torch.stack([(k[:, cut] @ q[cut] / SIZE**0.5).softmax(0) for cut in cuts])


# --- the encoder


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("options", [{}, {"class_token": True}, {"class_token": True, "rel_pos_bias": True}])
def test_last_attention_makes_the_encoders_output(depth: int, options: dict) -> None:
    model, images = encoder(depth, **options), torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        weights = last_attention(model, images)
        tokens = [model.embed(images), *model.layers(model.embed(images), model.grid)][-2]
        block = model.blocks[-1]
        value = block.attn.qkv(block.norm1(tokens))[..., 2 * WIDTH :].unflatten(-1, (HEADS, SIZE))
        read = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
        tokens = tokens + block.attn.proj(read)
        tokens = tokens + block.mlp(block.norm2(tokens))
        assert torch.allclose(model.norm(tokens), model(images), atol=1e-4)
    side = COUNT + model.prefix
    assert weights.shape == (2, HEADS, side, side)
    assert torch.allclose(weights.sum(-1), torch.ones(2, HEADS, side))
    assert weights.amax() > 2 / COUNT


def test_last_attention_row_by_row_and_at_another_size() -> None:
    model, images = encoder(2), torch.randn(1, 3, 24, 16)
    with torch.no_grad():
        weights, block = last_attention(model, images), model.blocks[1]
        tokens = block.norm1(model.blocks[0](model.embed(images)))[0]
        want = row_of(
            lambda x: block.attn.qkv(x)[..., :WIDTH],
            lambda x: block.attn.qkv(x)[..., WIDTH : 2 * WIDTH],
            tokens[4],
            tokens,
        )
    assert torch.allclose(weights[0, :, 4], want, atol=1e-5)
    with pytest.raises(ValueError, match="no whole number of 8x8 patches"):
        last_attention(model, torch.randn(1, 3, 30, 16))


# --- the aggregation head


def mlp(block, x):
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def reference_weights(head, patches, near, kind, residual):
    """Last weights of one patch over the query and near [k, D]: [heads, 1 + k]."""
    tokens = torch.cat([patches.mean(0, keepdim=True), near])
    for depth, block in enumerate(head.blocks):
        both = block.norm1(tokens)
        weights = [row_of(block.attn.q, block.attn.k, token, both) for token in both]
        values = block.attn.v(both).unflatten(-1, (HEADS, SIZE)).transpose(0, 1)
        read = torch.stack([block.attn.proj((w[:, None] @ values).flatten()) for w in weights])
        start = tokens.clone()
        if not residual and depth == 0:
            start[0] = 0
        new = mlp(block, start + read)
        tokens = new if kind == "self" else torch.cat([new[:1], tokens[1:]])
    return weights[0]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind,border", [("cross", "shift"), ("cross", "mask"), ("self", "wrap")])
@torch.no_grad()
def test_aggregation_weights_patch_by_patch(depth, residual, kind, border) -> None:
    head, patches = loud(AggregationHead(WIDTH, HEADS, depth)), torch.randn(2, COUNT, WIDTH)
    chosen = choose_neighbours(patches, GRID, Neighbourhood(border=border))
    got = aggregation_weights(head, patches, chosen, kind, residual)
    assert got.shape == (2, COUNT, HEADS, 5)
    assert torch.allclose(got.sum(-1), torch.ones(2, COUNT, HEADS))
    for image, patch in ((0, 0), (0, 7), (1, 4), (1, 19)):
        index, keep = chosen.index[image, patch], torch.ones(5, dtype=torch.bool)
        if chosen.valid is not None:
            keep[1:] = chosen.valid[image, patch]
        near = patches[image, index[keep[1:]]]
        want = reference_weights(head, patches[image], near, kind, residual)
        assert torch.allclose(got[image, patch][:, keep], want, atol=1e-4)
        assert not got[image, patch][:, ~keep].any()
    assert not any(layer._forward_hooks for layer in head.modules())


@pytest.mark.parametrize("kind", ["cross", "self"])
@torch.no_grad()
def test_without_neighbours_the_head_looks_at_all_patches(kind: str) -> None:
    head, patches = loud(AggregationHead(WIDTH, HEADS)), torch.randn(2, COUNT, WIDTH)
    got = aggregation_weights(head, patches, None, kind)
    assert got.shape == (2, 1, HEADS, 1 + COUNT)
    for image in range(2):
        want = reference_weights(head, patches[image], patches[image], kind, True)
        assert torch.allclose(got[image, 0], want, atol=1e-4)


@pytest.mark.parametrize("border", ["shift", "mask"])
def test_parameter_free_weights_are_equation_4(border: str) -> None:
    patches = torch.randn(2, COUNT, WIDTH)
    chosen = choose_neighbours(patches, GRID, Neighbourhood(k=8, border=border))
    got = parameter_free_weights(patches, chosen)
    assert got.shape == (2, COUNT, 1, 9)
    for image, patch in ((0, 0), (1, 12)):
        known = torch.ones(8, dtype=torch.bool) if chosen.valid is None else chosen.valid[image, patch]
        near = patches[image, chosen.index[image, patch, known]]
        want = (near @ patches[image].mean(0) / WIDTH**0.5).softmax(0)
        assert torch.allclose(got[image, patch, 0, 1:][known], want, atol=1e-5)
        assert not got[image, patch, 0, 1:][~known].any() and got[image, patch, 0, 0] == 0
    want = (patches[1] @ patches[1].mean(0) / WIDTH**0.5).softmax(0)
    assert torch.allclose(parameter_free_weights(patches, None)[1, 0, 0, 1:], want, atol=1e-5)


def model_of(settings: DMTJEPASettings) -> DMTJEPAModel:
    predictor = Predictor(GRID, WIDTH, width=12, depth=1, heads=HEADS)
    return loud(DMTJEPAModel(encoder(1), predictor, settings)).eval()


@pytest.mark.parametrize("where", [Neighbourhood(), Neighbourhood(border="mask", k=8), None])
@pytest.mark.parametrize("lat", ["learned", "parameter_free"])
def test_target_weights_lie_on_the_chosen_patches(where: Neighbourhood | None, lat: str) -> None:
    model, features = model_of(DMTJEPASettings(where, lat=lat)), torch.randn(2, COUNT, WIDTH)
    own, weights = target_weights(model, features, GRID)
    assert own.shape == (2, COUNT) and weights.shape == (2, COUNT, COUNT)
    assert torch.allclose(own + weights.sum(-1), torch.ones(2, COUNT))
    assert (own > 0).all() == (lat == "learned")
    patches = F.layer_norm(features, (WIDTH,))
    if where is None:
        assert (weights > 0).all() and torch.equal(weights[:, 0], weights[:, 7])
        return
    chosen = choose_neighbours(patches, GRID, where)
    if lat == "learned":
        each = aggregation_weights(model.target_head, patches, chosen)
    else:
        each = parameter_free_weights(patches, chosen)
    for image, patch in ((0, 0), (1, 9)):
        want = torch.zeros(COUNT)
        for place, value in zip(chosen.index[image, patch], each[image, patch].mean(0)[1:], strict=True):
            want[place] += value
        assert torch.allclose(weights[image, patch], want)


@pytest.mark.parametrize("target", ["average", "max"])
def test_pooling_has_no_weights(target: str) -> None:
    settings = DMTJEPASettings(lat="parameter_free", target=target)
    features = torch.randn(1, COUNT, WIDTH)
    assert target_weights(model_of(settings), features, GRID) is None
    assert target_weights(model_of(IJEPA), features, GRID) is None


# --- similarity


def test_cosine_maps_patch_by_patch() -> None:
    features = torch.randn(3, COUNT, WIDTH)
    query = torch.tensor([0, 7, 19])
    got = cosine_maps(features, query)
    for image, q in enumerate(query):
        for patch in (0, 5, 19):
            want = F.cosine_similarity(features[image, q], features[image, patch], dim=0)
            assert torch.allclose(got[image, patch], want, atol=1e-6)
    assert torch.allclose(got[torch.arange(3), query], torch.ones(3))


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 9))
def test_most_similar_marks_the_share_of_highest_values(count: int, share: float, seed: int) -> None:
    values = torch.rand(2, count, generator=torch.Generator().manual_seed(seed))
    marks = most_similar(values, share)
    assert (marks.sum(1) == max(round(share * count), 1)).all()
    for row, marked in zip(values, marks, strict=True):
        assert marked.all() or row[marked].min() >= row[~marked].max()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_of_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="lies in"):
        most_similar(torch.rand(1, 4), share)
