"""Plain Vision Transformer without class token, and I-JEPA's predictor (DMT-JEPA, sections 3.1 and A.1).

Parameter names are those that I-JEPA, timm (`class_token=False`) and detectron2's ViT share, so one checkpoint
file serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_plugins.core.attention import attention

# width, depth, heads; the predictor's width and depth (I-JEPA; DMT-JEPA, appendix A.1)
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
NORM = partial(nn.LayerNorm, eps=1e-6)


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions: float32 [1, H * W, width]; the first half of the channels tells the column.

    Raises:
        ValueError: when `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {width}")
    quarter = width // 4
    frequencies = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    rows = torch.arange(grid[0], dtype=torch.float64)[:, None].expand(grid)
    columns = torch.arange(grid[1], dtype=torch.float64)[None].expand(grid)
    parts = []
    for axis in (columns, rows):
        angles = axis.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()[None]


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D] (or [1, N, D]) at index int64 [B, n] -> [B, n, D]."""
    tokens = tokens.expand(index.shape[0], -1, -1)
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


class SelfAttention(nn.Module):
    """Multi-head self-attention under timm's parameter names, through `core.attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        batch, count, width = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(attention(query, key, value, attn_mask).transpose(1, 2).flatten(2))


def make_block(width: int, heads: int, drop_path: float = 0.0, init_values: float | None = None) -> Block:
    """timm's pre-norm block around our attention."""
    block = Block(width, heads, qkv_bias=True, drop_path=drop_path, init_values=init_values, norm_layer=NORM)  # type: ignore[arg-type]
    block.attn = SelfAttention(width, heads)
    return block


def init_like_ijepa(module: nn.Module, blocks: Iterable[Any]) -> None:
    """Truncated normal weights (std 0.02), no bias; the blocks' output layers are scaled down by depth."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for depth, block in enumerate(blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            weight.data.div_(math.sqrt(2.0 * depth))


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """One number or (height, width) -> (height, width)."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


class VisionTransformer(nn.Module):
    """Patches, fixed positions, pre-norm blocks, a final norm.

    Args:
        img_size: pixels, one side or (height, width), that the table of positions is made for; other sizes
            resample it. patch_size: side of a patch in pixels.
        width, depth, heads: of the encoder. in_chans: channels of the image.
        drop_path: rate at the last block, growing linearly from 0.
        class_token: a token before the patches, for weights of other methods; init_values: LayerScale.
        checkpointing: recompute the blocks' activations in the backward pass.

    Raises:
        ValueError: when the patch does not divide `img_size`.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        *,
        width: int,
        depth: int,
        heads: int,
        in_chans: int = 3,
        drop_path: float = 0.0,
        class_token: bool = False,
        init_values: float | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.width, self.heads = patch_size, width, heads
        self.checkpointing = checkpointing
        self.grid = self.grid_of(*as_pair(img_size))
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, width, strict_img_size=False, dynamic_img_pad=False
        )
        table = sincos_positions(width, self.grid)
        if class_token:
            self.cls_token: Tensor | None = nn.Parameter(
                nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02)
            )
            table = torch.cat([torch.zeros(1, 1, width), table], dim=1)
        else:
            self.cls_token = None
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(make_block(width, heads, rate, init_values) for rate in rates)
        self.norm = NORM(width)
        init_like_ijepa(self, self.blocks)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches along height and width of an image in pixels; ValueError when they do not fit."""
        if height % self.patch_size or width % self.patch_size or min(height, width) < self.patch_size:
            raise ValueError(
                f"an image of {height}x{width} pixels is no whole number of {self.patch_size}x"
                f"{self.patch_size} patches: resize or crop it to multiples of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table for a grid of patches, with the class token's row first if there is one: [1, n, D]."""
        if grid == self.grid:
            return self.pos_embed
        prefix = 0 if self.cls_token is None else 1
        return resample_abs_pos_embed(
            self.pos_embed, list(grid), old_size=list(self.grid), num_prefix_tokens=prefix
        )

    def embed(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images [B, c, H, W] -> tokens with positions [B, n, D]; of the patches `keep` int64 [B, n] only."""
        grid = self.grid_of(x.shape[-2], x.shape[-1])
        tokens, table = self.patch_embed(x), self.positions(grid).to(x.dtype)
        prefix = 0 if self.cls_token is None else 1
        tokens = tokens + table[:, prefix:]
        if keep is not None:
            tokens = pick(tokens, keep)
        if self.cls_token is not None:
            tokens = torch.cat([(self.cls_token + table[:, :1]).expand(len(x), -1, -1), tokens], dim=1)
        return tokens

    def run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """One block, its activations recomputed in the backward pass if so configured."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B, c, H, W]; keep: int64 [B, n], patches in raster order that alone are encoded, or None.

        Returns:
            [B, n, D] after the final norm, the class token first if there is one.

        Raises:
            ValueError: when the patch does not divide the image.
        """
        tokens = self.embed(x, keep)
        for block in self.blocks:
            tokens = self.run_block(block, tokens)
        return self.norm(tokens)


class Predictor(nn.Module):
    """I-JEPA's predictor: target patches from the context's features and their positions.

    Args:
        grid: patches along height and width that the table of positions is made for.
        embed_dim: width D of the encoder. width, depth, heads: of the predictor.
    """

    def __init__(self, grid: tuple[int, int], embed_dim: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.predictor_embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.predictor_pos_embed = nn.Parameter(sincos_positions(width, grid), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(make_block(width, heads) for _ in range(depth))
        self.predictor_norm = NORM(width)
        self.predictor_proj = nn.Linear(width, embed_dim)
        init_like_ijepa(self, self.predictor_blocks)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table for a grid of patches: [1, n, width]."""
        if grid == self.grid:
            return self.predictor_pos_embed
        return resample_abs_pos_embed(
            self.predictor_pos_embed, list(grid), old_size=list(self.grid), num_prefix_tokens=0
        )

    def forward(self, context: Tensor, keep: Tensor, targets: Tensor, grid: tuple[int, int]) -> Tensor:
        """
        Args:
            context: [B, n, D], features of the patches `keep` int64 [B, m]; tokens beyond the m-th have no
                position.
            targets: int64 [B, blocks, K], patches to predict; each block is predicted by itself.

        Returns:
            [blocks * B, K, D], block by block.
        """
        batch, blocks, size = targets.shape
        table = self.positions(grid)
        tokens = self.predictor_embed(context)
        place = pick(table, keep).to(tokens.dtype)
        if tokens.shape[1] > place.shape[1]:
            place = nn.functional.pad(place, (0, 0, 0, tokens.shape[1] - place.shape[1]))
        tokens = tokens + place
        wanted = targets.transpose(0, 1).reshape(blocks * batch, size)
        queries = self.mask_token.to(tokens.dtype) + pick(table, wanted).to(tokens.dtype)
        x = torch.cat([tokens.repeat(blocks, 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, -size:])
