"""Sine position encoding of a grid (DETR), as the transformer decoder and Mask-JEPA's predictor use it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PositionEmbeddingSine(nn.Module):
    """Normalised sine encoding: `num_pos_feats` channels of y, then as many of x. No parameters.

    Args:
        num_pos_feats: channels per axis (C / 2).
        temperature: base of the wavelengths.
        normalize: scale coordinates to (0, scale].
        scale: 2 pi by default.

    Raises:
        ValueError: when `scale` is given without `normalize`.
    """

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: float = 10000,
        normalize: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError("a scale needs normalize=True")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale

    def _axis(self, valid: Tensor, dim: int) -> Tensor:
        """[B, H, W] -> [B, H, W, num_pos_feats]; sine and cosine of each wavelength side by side."""
        position = valid.cumsum(dim, dtype=torch.float32)
        if self.normalize:
            last = position.select(dim, position.shape[dim] - 1).unsqueeze(dim)
            position = position / (last + 1e-6) * self.scale
        channel = torch.arange(self.num_pos_feats, dtype=torch.float32, device=valid.device)
        wavelength = self.temperature ** (2 * (channel // 2) / self.num_pos_feats)
        phase = position[..., None] / wavelength
        return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=-1).flatten(-2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B, C, H, W], only its shape and device matter.
            mask: bool [B, H, W], True where there is padding.

        Returns:
            float32 [B, 2 * num_pos_feats, H, W].
        """
        if mask is None:
            mask = torch.zeros((x.shape[0], *x.shape[-2:]), dtype=torch.bool, device=x.device)
        valid = ~mask
        return torch.cat((self._axis(valid, 1), self._axis(valid, 2)), dim=-1).permute(0, 3, 1, 2)
