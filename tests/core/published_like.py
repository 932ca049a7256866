"""The transformer decoder's published interface out of torch's own modules: a reference for ours."""

import torch
import torch.nn.functional as F
from torch import nn

from jepa_plugins.core.position import PositionEmbeddingSine

WIDTH, HEADS, LEVELS, QUERIES = 16, 4, 3, 5


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
        self.query_feat = nn.Embedding(QUERIES, WIDTH)
        self.query_embed = nn.Embedding(QUERIES, WIDTH)
        self.pe_layer = PositionEmbeddingSine(WIDTH // 2, normalize=True)
        self.num_heads = HEADS

    def memory(self, head, level, feature, hidden, no_key):
        """Tokens and positions of one masked map, sequence first; `hidden` bool [B, cells]."""
        cells = feature.flatten(2).transpose(1, 2).clone()
        cells[hidden] = head.mask_token
        tokens = self.input_proj[level](cells.transpose(1, 2).reshape(feature.shape))
        tokens = first(tokens.flatten(2).transpose(1, 2) + self.level_embed.weight[level])
        pos = first(self.pe_layer(feature).flatten(2).transpose(1, 2))
        if head.settings.placement == "image":
            tokens = extra_blocks(head, tokens, pos, no_key)
        return tokens, pos

    def predict(self, head, levels, index, valid_queries=None):
        """What `MaskJEPAHead.predict` should give, [B, N, C].

        `levels` as there; `valid_queries` bool [B, n], True where real.
        """
        settings, padding, memories = head.settings, {}, {}
        for i, given in levels.items():
            valid = given.valid.flatten(1)
            padding[i] = None if bool(valid.all()) else ~valid
            memories[i] = self.memory(head, i, given.feature, given.hidden.flatten(1), padding[i])
        pos = first(self.pe_layer(levels[settings.level].feature).flatten(2).transpose(1, 2))
        no_query = None if valid_queries is None else ~valid_queries
        if settings.readout == "query_mix":
            x, query_pos = (
                t.weight[:, None].expand(-1, len(index), -1) for t in (self.query_feat, self.query_embed)
            )
            no_query = None
        else:
            query_pos = torch.stack([pos[rows, i] for i, rows in enumerate(index)], dim=1)
            x = head.query.expand(query_pos.shape)
        if settings.placement == "pre":
            x = extra_blocks(head, x, query_pos, no_query)
        for layer in range(len(self.transformer_ffn_layers)):
            level = layer % 3 if settings.levels == "round_robin" else settings.level
            tokens, places = memories[level]
            x = self.transformer_cross_attention_layers[layer].cross_attention(
                x, tokens, places, query_pos, padding[level], settings.pos_on_value
            )
            x = self.transformer_self_attention_layers[layer].self_attention(x, query_pos, no_query)
            x = self.transformer_ffn_layers[layer].feed_forward(x)
        if settings.placement == "post":
            x = extra_blocks(head, x, query_pos, no_query)
        x = first(self.decoder_norm(x) if settings.readout_norm else x)
        if settings.readout != "query_mix":
            return head.prediction(x)
        cells = torch.einsum("bqc,nq->bnc", x, head.prediction.weight) + head.prediction.bias[:, None]
        return torch.stack([cells[i, rows] for i, rows in enumerate(index)])


def extra_blocks(head, x, pos, padding):
    """The M self-attention blocks, out of torch's modules; x [N, B, C]."""
    for block in head.self_attention_blocks:
        placed = x + pos
        attention = block.attention.self_attn
        x = x + attention(placed, placed, x, key_padding_mask=padding, need_weights=False)[0]
        x = block.attention.norm(x)
        x = block.ffn.norm(x + block.ffn.linear2(F.relu(block.ffn.linear1(x))))
    return x
