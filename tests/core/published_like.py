"""The transformer decoder's published interface out of torch's own modules: a reference for ours."""

import torch
import torch.nn.functional as F
from torch import nn

from jepa_plugins.core.position import PositionEmbeddingSine

WIDTH, HEADS, LEVELS = 16, 4, 3


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


class Decoder(nn.Module):
    """What Mask-JEPA reads of a transformer decoder, under the published names, with random weights."""

    def __init__(self, layers: int = 2, pre_norm: bool = False, features: int = WIDTH) -> None:
        super().__init__()
        self.transformer_cross_attention_layers = nn.ModuleList(
            PublishedLike("cross", pre_norm) for _ in range(layers)
        )
        self.transformer_self_attention_layers = nn.ModuleList(
            PublishedLike("self", pre_norm) for _ in range(layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(PublishedLike("ffn", pre_norm) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(WIDTH)
        self.level_embed = nn.Embedding(LEVELS, WIDTH)
        self.input_proj = nn.ModuleList(
            nn.Sequential() if features == WIDTH else nn.Conv2d(features, WIDTH, 1) for _ in range(LEVELS)
        )
        self.pe_layer = PositionEmbeddingSine(WIDTH // 2, normalize=True)
        self.num_heads = HEADS

    def predict(self, head, feature, hidden, index, valid_keys=None, valid_queries=None):
        """What `MaskJEPAHead.predict` should give, [B, N, C]; masks are bool [B, n], True where real."""
        level = head.settings.level
        cells = feature.flatten(2).transpose(1, 2).clone()
        cells[hidden] = head.mask_token
        memory = self.input_proj[level](cells.transpose(1, 2).reshape(feature.shape))
        memory = first(memory.flatten(2).transpose(1, 2) + self.level_embed.weight[level])
        pos = first(self.pe_layer(feature).flatten(2).transpose(1, 2))
        query_pos = torch.stack([pos[rows, i] for i, rows in enumerate(index)], dim=1)
        x = head.query.expand(query_pos.shape)
        no_key = None if valid_keys is None else ~valid_keys
        no_query = None if valid_queries is None else ~valid_queries
        for cross, self_attention, ffn in zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        ):
            x = cross.cross_attention(x, memory, pos, query_pos, no_key)
            x = self_attention.self_attention(x, query_pos, no_query)
            x = ffn.feed_forward(x)
        for block in head.self_attention_blocks:
            placed = x + query_pos
            attention = block.attention.self_attn
            x = x + attention(placed, placed, x, key_padding_mask=no_query, need_weights=False)[0]
            x = block.attention.norm(x)
            x = block.ffn.norm(x + block.ffn.linear2(F.relu(block.ffn.linear1(x))))
        return first(head.prediction(self.decoder_norm(x)))
