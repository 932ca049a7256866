"""The decoder's sub-layers as functions, against torch's modules put together as the published layers are."""

import pytest
import torch
from published_like import WIDTH, PublishedLike, first

from jepa_plugins.core.transformer import cross_attention_layer, feed_forward_layer, self_attention_layer


@pytest.fixture()
def tensors():
    generator = torch.Generator().manual_seed(0)
    names = {"x": 5, "query_pos": 5, "memory": 9, "pos": 9}
    out = {name: torch.randn(2, n, WIDTH, generator=generator) for name, n in names.items()}
    out["valid_queries"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    out["valid_keys"] = torch.rand(2, 9, generator=generator) > 0.3
    return out


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_self_attention(tensors, pre_norm, masked, placed) -> None:
    layer = PublishedLike("self", pre_norm)
    position = tensors["query_pos"] if placed else None
    padding = ~tensors["valid_queries"] if masked else None
    want = layer.self_attention(first(tensors["x"]), None if position is None else first(position), padding)
    mask = tensors["valid_queries"][:, None, None] if masked else None
    got = self_attention_layer(layer, tensors["x"], position, mask)
    assert torch.allclose(got, first(want), atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pos_on_value", [False, True])
def test_cross_attention(tensors, pre_norm, masked, pos_on_value) -> None:
    layer = PublishedLike("cross", pre_norm)
    x, memory, pos, query_pos = (tensors[name] for name in ("x", "memory", "pos", "query_pos"))
    padding = ~tensors["valid_keys"] if masked else None
    want = layer.cross_attention(*(first(t) for t in (x, memory, pos, query_pos)), padding, pos_on_value)
    got = cross_attention_layer(
        layer,
        x,
        memory,
        mask=tensors["valid_keys"][:, None, None] if masked else None,
        pos=pos,
        query_pos=query_pos,
        pos_on_value=pos_on_value,
    )
    assert torch.allclose(got, first(want), atol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_feed_forward(tensors, pre_norm) -> None:
    layer = PublishedLike("ffn", pre_norm)
    want = layer.feed_forward(first(tensors["x"]))
    assert torch.allclose(feed_forward_layer(layer, tensors["x"]), first(want), atol=1e-5)


def test_dropout_follows_the_layers_mode(tensors) -> None:
    layer = PublishedLike("ffn", False, dropout=0.5)
    outputs = {
        mode: [feed_forward_layer(layer.train(mode), tensors["x"]) for _ in range(2)]
        for mode in (False, True)
    }
    assert torch.equal(*outputs[False])
    assert not torch.equal(*outputs[True])


@pytest.mark.parametrize("masked", [False, True])
def test_a_hidden_key_or_query_has_no_influence(tensors, masked) -> None:
    layer = PublishedLike("self", False)
    mask = tensors["valid_queries"][:, None, None] if masked else None
    changed = tensors["x"].clone()
    changed[1, 3:] += 10
    one, other = (self_attention_layer(layer, x, tensors["query_pos"], mask) for x in (tensors["x"], changed))
    assert torch.allclose(one[1, :3], other[1, :3], atol=1e-6) == masked
