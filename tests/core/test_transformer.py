"""The decoder's sub-layers as functions, against torch's own modules put together as the published layers are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jepa_plugins.core.transformer import cross_attention_layer, feed_forward_layer, self_attention_layer

WIDTH, HEADS = 16, 4


class PublishedLike(nn.Module):
    """A sub-layer that follows the published interface: sequence first, attention through torch's module."""

    def __init__(self, kind: str, pre_norm: bool, dropout: float = 0.0) -> None:
        super().__init__()
        if kind == "ffn":
            self.linear1, self.linear2 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
            self.activation = F.relu
        else:
            name = "self_attn" if kind == "self" else "multihead_attn"
            self.add_module(name, nn.MultiheadAttention(WIDTH, HEADS))
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.normalize_before = pre_norm
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def run(self, inner, x):
        """Residual and norm, in the order that `normalize_before` says; x [N, B, C]."""
        if self.normalize_before:
            return x + self.dropout(inner(self.norm(x)))
        return self.norm(x + self.dropout(inner(x)))

    def self_attention(self, x, query_pos, padding=None):
        def inner(source):
            placed = source if query_pos is None else source + query_pos
            return self.self_attn(placed, placed, source, key_padding_mask=padding, need_weights=False)[0]

        return self.run(inner, x)

    def cross_attention(self, x, memory, pos, query_pos, padding=None, pos_on_value=False):
        def inner(source):
            key = memory + pos
            value = key if pos_on_value else memory
            query = source + query_pos
            return self.multihead_attn(query, key, value, key_padding_mask=padding, need_weights=False)[0]

        return self.run(inner, x)

    def feed_forward(self, x):
        return self.run(lambda source: self.linear2(self.dropout(self.activation(self.linear1(source)))), x)


def first(tensor):
    """Batch first <-> sequence first."""
    return tensor.transpose(0, 1)


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
    outputs = {mode: [feed_forward_layer(layer.train(mode), tensors["x"]) for _ in range(2)] for mode in (0, 1)}
    assert torch.equal(*outputs[0])
    assert not torch.equal(*outputs[1])


@pytest.mark.parametrize("masked", [False, True])
def test_a_hidden_key_or_query_has_no_influence(tensors, masked) -> None:
    layer = PublishedLike("self", False)
    mask = tensors["valid_queries"][:, None, None] if masked else None
    changed = tensors["x"].clone()
    changed[1, 3:] += 10
    one, other = (self_attention_layer(layer, x, tensors["query_pos"], mask) for x in (tensors["x"], changed))
    assert torch.allclose(one[1, :3], other[1, :3], atol=1e-6) == masked
