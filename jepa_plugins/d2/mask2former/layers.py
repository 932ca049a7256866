"""Sub-layers of the masked transformer decoder, batch first, under the published parameter names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from jepa_plugins.core.transformer import cross_attention_layer, feed_forward_layer, self_attention_layer

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}


def _reset(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class SelfAttentionLayer(nn.Module):
    """Self-attention over the queries, with residual and norm."""

    def __init__(
        self, d_model: int, nhead: int, dropout: float = 0.0, normalize_before: bool = False
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.normalize_before = normalize_before
        _reset(self)

    def forward(self, x: Tensor, query_pos: Tensor | None = None) -> Tensor:
        """x [B, Q, C], query_pos [B, Q, C] -> [B, Q, C]."""
        return self_attention_layer(self, x, query_pos)


class CrossAttentionLayer(nn.Module):
    """Attention of the queries over the memory, with residual and norm."""

    def __init__(
        self, d_model: int, nhead: int, dropout: float = 0.0, normalize_before: bool = False
    ) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.normalize_before = normalize_before
        _reset(self)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """x [B, Q, C], memory and pos [B, K, C], mask bool [B, 1, Q, K] (True: may look) -> [B, Q, C]."""
        return cross_attention_layer(self, x, memory, mask=mask, pos=pos, query_pos=query_pos)


class FFNLayer(nn.Module):
    """Two linear layers, with residual and norm."""

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        activation: str = "relu",
        normalize_before: bool = False,
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.activation = _ACTIVATIONS[activation]
        self.normalize_before = normalize_before
        _reset(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, C]."""
        return feed_forward_layer(self, x)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_dim] -> [..., output_dim]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
