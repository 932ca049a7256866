"""Plain Vision Transformer without class token, and I-JEPA's predictor (DMT-JEPA, sections 3.1 and A.1).

Parameter names are those that I-JEPA, timm (`class_token=False`) and detectron2's ViT share, so one checkpoint
file serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from timm.layers import PatchEmbed
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


def size_of(arch: str | Mapping[str, int], key: str) -> tuple[int, int, int]:
    """Width, depth and heads of a named or given size.

    Args:
        arch: one of `SIZES`, or dict(width, depth, heads). key: the configuration's entry, for messages.

    Raises:
        ValueError: another name, another dict, or heads that do not divide the width.
    """
    if isinstance(arch, str):
        if arch not in SIZES:
            raise ValueError(
                f"{key} is one of {', '.join(SIZES)}, or dict(width=, depth=, heads=), got {arch!r}"
            )
        return SIZES[arch]
    if not isinstance(arch, Mapping) or set(arch) != {"width", "depth", "heads"}:
        raise ValueError(f"{key} needs width, depth and heads and no more, got {arch!r}")
    width, depth, heads = arch["width"], arch["depth"], arch["heads"]
    if width % heads:
        raise ValueError(f"{key}: {heads} heads do not divide the width {width}")
    return width, depth, heads


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


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> Tensor:
    """A table [1, prefix + N, D] for another grid: bicubic as MAE and detectron2 do it; first rows stay.

    Releases of timm's function leave the table as it is where the new grid is a square of as many patches, such as
    16x16 for 8x32.
    """
    if old == new:
        return table
    first, rest = table[:, :prefix], table[:, prefix:]
    image = rest.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    image = nn.functional.interpolate(image, new, mode="bicubic")
    return torch.cat([first, image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


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


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # else an index made for an evaluation could not serve a training
def relative_index(grid: tuple[int, int], prefix: int, device: str | torch.device = "cpu") -> Tensor:
    """Rows of a table of relative positions, in BEiT's order: int64 [prefix + N, prefix + N], N = height * width.

    Rows are counted by vertical, then horizontal offset of the query from the key; with a class token
    (`prefix` 1) the last three belong to it: as a query, as a key, and both. Made once, on `device`.
    """
    rows = torch.arange(grid[0])[:, None].expand(grid).flatten()
    columns = torch.arange(grid[1])[None].expand(grid).flatten()
    down = rows[:, None] - rows[None] + grid[0] - 1
    right = columns[:, None] - columns[None] + grid[1] - 1
    index = down * (2 * grid[1] - 1) + right
    if not prefix:
        return index.to(device)
    last = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    index = nn.functional.pad(index, (1, 0, 1, 0))
    index[0], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return index.to(device)


def resample_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of relative positions for another grid: [(2h - 1)(2w - 1) (+ 3), heads], bicubic.

    The class token's three rows, if there are any, stay as they are.
    """
    if old == new:
        return table
    height, width = 2 * old[0] - 1, 2 * old[1] - 1
    offsets, rest = table[: height * width], table[height * width :]
    resampled = resample_positions(offsets[None], (height, width), (2 * new[0] - 1, 2 * new[1] - 1))[0]
    return torch.cat([resampled, rest])


class RelativeSelfAttention(SelfAttention):
    """Self-attention with BEiT's bias of relative positions: one table [offsets (+ 3), heads] a block."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int], prefix: int) -> None:
        super().__init__(width, heads)
        self.grid, self.prefix = grid, prefix
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3 * prefix, heads))

    def bias(self, grid: tuple[int, int]) -> Tensor:
        """Added to the scores of a grid of patches: [1, heads, n, n]."""
        table = resample_bias_table(self.relative_position_bias_table, self.grid, grid)
        index = relative_index(grid, self.prefix, table.device)
        return table[index].permute(2, 0, 1)[None]


class RelativeBlock(Block):
    """timm's block, which tells its attention the grid that the tokens come from."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """[B, n, D] -> [B, n, D]."""
        attention: RelativeSelfAttention = self.attn  # type: ignore[assignment]
        bias = attention.bias(grid).to(x.dtype)
        x = x + self.drop_path1(self.ls1(attention(self.norm1(x), bias)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def make_block(
    width: int,
    heads: int,
    drop_path: float = 0.0,
    init_values: float | None = None,
    relative: tuple[tuple[int, int], int] | None = None,
) -> Block:
    """timm's pre-norm block around our attention; `relative`: grid and class tokens of a relative bias."""
    kind = Block if relative is None else RelativeBlock
    block = kind(width, heads, qkv_bias=True, drop_path=drop_path, init_values=init_values, norm_layer=NORM)  # type: ignore[arg-type]
    block.attn = (
        SelfAttention(width, heads) if relative is None else RelativeSelfAttention(width, heads, *relative)
    )
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
        class_token: a token before the patches; init_values: of LayerScale; rel_pos_bias: a bias of relative
            positions in every block (BEiT): all three for weights of other methods.
        checkpointing: recompute the blocks' activations in the backward pass.

    Raises:
        ValueError: when the patch does not divide `img_size`, or a value makes no sense.
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
        rel_pos_bias: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if patch_size < 1 or depth < 1:
            raise ValueError(f"patch_size and depth are at least 1, got {patch_size} and {depth}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path is a rate from 0, below 1, got {drop_path}")
        self.patch_size, self.width, self.heads = patch_size, width, heads
        self.prefix, self.rel_pos_bias = int(class_token), rel_pos_bias
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
        relative = (self.grid, self.prefix) if rel_pos_bias else None
        self.blocks = nn.ModuleList(make_block(width, heads, rate, init_values, relative) for rate in rates)
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
        return resample_positions(self.pos_embed, self.grid, grid, self.prefix)

    def embed(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images [B, c, H, W] -> tokens with positions [B, n, D]; of the patches `keep` int64 [B, n] only."""
        grid = self.grid_of(x.shape[-2], x.shape[-1])
        tokens, table = self.patch_embed(x), self.positions(grid).to(x.dtype)
        tokens = tokens + table[:, self.prefix :]
        if keep is not None:
            tokens = pick(tokens, keep)
        if self.cls_token is not None:
            tokens = torch.cat([(self.cls_token + table[:, :1]).expand(len(x), -1, -1), tokens], dim=1)
        return tokens

    def run_block(self, block: nn.Module, tokens: Tensor, *args: Any) -> Tensor:
        """One block, its activations recomputed in the backward pass if so configured."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, tokens, *args, use_reentrant=False)
        return block(tokens, *args)

    def layers(self, tokens: Tensor, grid: tuple[int, int]) -> Iterator[Tensor]:
        """The tokens [B, n, D] of a grid of patches after each block."""
        for block in self.blocks:
            tokens = (
                self.run_block(block, tokens, grid) if self.rel_pos_bias else self.run_block(block, tokens)
            )
            yield tokens

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [B, c, H, W]; keep: int64 [B, n], patches in raster order that alone are encoded, or None.

        Returns:
            [B, n, D] after the final norm, the class token first if there is one.

        Raises:
            ValueError: when the patch does not divide the image; `keep` with relative positions.
        """
        if keep is not None and self.rel_pos_bias:
            raise ValueError("an encoder with rel_pos_bias encodes whole images only: keep must be None")
        tokens = self.embed(x, keep)
        for after in self.layers(tokens, self.grid_of(x.shape[-2], x.shape[-1])):
            tokens = after
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
        return resample_positions(self.predictor_pos_embed, self.grid, grid)

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
