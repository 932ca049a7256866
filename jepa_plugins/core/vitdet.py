"""Plain Vision Transformer for detection and its simple feature pyramid (ViTDet, Li et al. 2022, sections 3 and A).

Most blocks attend inside windows, a few across the whole map; decomposed relative positions (MViTv2, Li et al. 2021,
eq. 4) may be added. Parameter names are those of detectron2's published ViTDet models. Maps are [B, H, W, C] inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_plugins.core.attention import attention
from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.swin import from_windows, to_windows
from jepa_plugins.core.vit import NORM, as_pair, resample_positions

# --- positions ----------------------------------------------------------------------------------------


def resample_relative(table: Tensor, size: int) -> Tensor:
    """A table of relative positions for another number of places: [L, d] -> [2 * size - 1, d], linear."""
    if len(table) == 2 * size - 1:
        return table
    return F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T


def relative_rows(table: Tensor, size: int) -> Tensor:
    """For each pair of places the row of its table: [L, d] -> [size, size, d], query first."""
    place = torch.arange(size, device=table.device)
    return resample_relative(table, size)[place[:, None] - place + size - 1]


def attend_with_positions(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + q . rows + q . columns) v over a map.

    A score's addends for the key's row and column are dot products, too: the query is extended by its products with
    all rows and columns, the key by its own place, one-hot. So no bias of queries x keys exists, and fused attention
    stays fused.

    Args:
        query, key, value: [B, heads, H * W, d]. rows: [H, H, d], columns: [W, W, d], of `relative_rows`.

    Returns:
        [B, heads, H * W, d].
    """
    height, width = len(rows), len(columns)
    batch, heads, tokens, depth = query.shape
    grid = query.view(batch, heads, height, width, depth)
    by_row = torch.einsum("bnhwd,hkd->bnhwk", grid, rows.to(query.dtype))
    by_column = torch.einsum("bnhwd,wkd->bnhwk", grid, columns.to(query.dtype))
    added = torch.cat([by_row, by_column], dim=-1).flatten(2, 3).to(query.dtype)
    row = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, dim=0)
    column = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
    place = torch.cat([row, column], dim=1).expand(batch, heads, -1, -1)
    out = attention(
        torch.cat([query * depth**-0.5, added], dim=-1),
        torch.cat([key, place], dim=-1),
        F.pad(value, (0, height + width)),  # flash kernels want one width for all three
        scale=1.0,
    )
    return out[..., :depth]


# --- the transformer ----------------------------------------------------------------------------------


class MapAttention(nn.Module):
    """Multi-head self-attention over a map, with decomposed relative positions if `size` is given.

    Args:
        size: rows and columns that the tables of relative positions are made for; another map, or another
            checkpoint's tables, are resampled.
        zero_init: start the tables at 0, else truncated normal (std 0.02).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        size: tuple[int, int] | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = heads
        self.size = size
        if size is not None:  # before the rest, in the published order
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * size[0] - 1, width // heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * size[1] - 1, width // heads))
            if not zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if self.size is None:
            out = attention(query, key, value)
        else:
            rows, columns = relative_rows(self.rel_pos_h, height), relative_rows(self.rel_pos_w, width)
            out = attend_with_positions(query, key, value, rows, columns)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Tables made for another size are resampled."""
        for name, size in zip(("rel_pos_h", "rel_pos_w"), self.size or (), strict=False):
            table = state_dict.get(prefix + name)
            if table is not None and table.dim() == 2 and len(table) != 2 * size - 1:
                state_dict[prefix + name] = resample_relative(table, size)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DetectionBlock(nn.Module):
    """Pre-norm block; `window` > 0 attends inside windows of that side, which zeros fill at the borders."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int,
        drop_path: float,
        mlp_ratio: float,
        norm_layer: Callable[[int], nn.Module] = NORM,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1 = norm_layer(width)
        self.attn = MapAttention(width, heads, **attention_options)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def attend(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same, each token having looked at its window or at the whole map."""
        if not self.window:
            return self.attn(x)
        height, width, channels = x.shape[1:]
        x = F.pad(x, (0, 0, 0, -width % self.window, 0, -height % self.window))
        windows = to_windows(x, self.window)
        out = self.attn(windows.reshape(-1, self.window, self.window, channels)).view(windows.shape)
        return from_windows(out, self.window, *x.shape[1:3])[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMap(nn.Module):
    """Patches projected to the transformer's width."""

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, H / patch, W / patch, C]."""
        return self.proj(x).permute(0, 2, 3, 1)


class DetectionViT(nn.Module):
    """The ViT of a detector: one map, of the last block, without final norm and class token.

    Loading resamples positions of another square grid, and relative ones; a class token's row of the position table
    is dropped or, where `pretrain_use_cls_token` keeps its place, filled with zeros.

    Args:
        img_size: side in pixels that the relative positions of whole-map attention are made for; any image whose
            sides are multiples of the patch will do. patch_size: in pixels.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: of the transformer.
        drop_path_rate: at the last block, growing linearly from 0. norm_layer: of the blocks, from the width.
        use_rel_pos: decomposed relative positions; rel_pos_zero_init: they start at 0.
        window_size: side of a window in tokens; window_block_indexes: the blocks, from 0, that attend in windows.
        use_act_checkpoint: recompute the blocks' activations in the backward pass.
        pretrain_img_size: pixels, one side or (height, width), of the pre-training: the position table's grid.
        pretrain_use_cls_token: the table has a first row for a class token, which is not used (published models).

    Raises:
        ValueError: heads that do not divide the width, windows of no size, blocks that do not exist, or a patch that
            does not divide the sizes.
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = NORM,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        window_block_indexes: Sequence[int] = (),
        use_act_checkpoint: bool = False,
        pretrain_img_size: int | Sequence[int] = 224,
        pretrain_use_cls_token: bool = False,
    ) -> None:
        super().__init__()
        _check_architecture(embed_dim, depth, num_heads, window_size, window_block_indexes)
        self.patch_size, self.embed_dim, self.depth, self.num_heads = patch_size, embed_dim, depth, num_heads
        self.pretrain_use_cls_token, self.use_act_checkpoint = pretrain_use_cls_token, use_act_checkpoint
        self.grid = self.grid_of(*as_pair(pretrain_img_size))
        whole = self.grid_of(*as_pair(img_size))
        rows = self.grid[0] * self.grid[1] + int(pretrain_use_cls_token)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, rows, embed_dim), std=0.02))
        self.patch_embed = PatchMap(patch_size, in_chans, embed_dim)
        windows = [window_size if i in set(window_block_indexes) else 0 for i in range(depth)]
        self.blocks = nn.ModuleList(
            DetectionBlock(
                embed_dim,
                num_heads,
                window=window,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                mlp_ratio=mlp_ratio,
                norm_layer=norm_layer,
                qkv_bias=qkv_bias,
                size=None if not use_rel_pos else (window, window) if window else whole,
                zero_init=rel_pos_zero_init,
            )
            for i, window in enumerate(windows)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches along height and width of an image in pixels; ValueError when they do not fit."""
        if height % self.patch_size or width % self.patch_size or min(height, width) < self.patch_size:
            raise ValueError(
                f"an image of {height}x{width} pixels is no whole number of {self.patch_size}x"
                f"{self.patch_size} patches: resize or pad it to multiples of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid of patches: [1, h, w, D]."""
        table = self.pos_embed[:, int(self.pretrain_use_cls_token) :]
        return resample_positions(table, self.grid, grid).view(1, *grid, -1)

    def features(self, x: Tensor) -> Tensor:
        """Images [B, c, H, W] -> map of the last block [B, D, H / patch, W / patch].

        Raises:
            ValueError: when the patch does not divide the images.
        """
        grid = self.grid_of(x.shape[-2], x.shape[-1])
        x = self.patch_embed(x)
        x = x + self.positions(grid).to(x.dtype)
        for block in self.blocks:
            if self.use_act_checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x.permute(0, 3, 1, 2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Positions of another grid are resampled."""
        table = state_dict.get(prefix + "pos_embed")
        if table is not None and table.dim() == 3 and table.shape != self.pos_embed.shape:
            state_dict[prefix + "pos_embed"] = self._own_table(table)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _own_table(self, table: Tensor) -> Tensor:
        """A checkpoint's position table as this model holds it."""
        rows, cells = table.shape[1], self.grid[0] * self.grid[1]
        if rows == cells + 1 or (rows != cells and not _is_square(rows) and _is_square(rows - 1)):
            table = table[:, 1:]  # the class token's row goes
            rows -= 1
        if rows != cells and not _is_square(rows):
            raise CheckpointError(
                f"the checkpoint's position table has {rows} rows, which is no square grid with or without a class "
                "token: set MODEL.VIT.PRETRAIN_IMG_SIZE (LazyConfig: pretrain_img_size) to the height and width of "
                "its pre-training images"
            )
        old = self.grid if rows == cells else (math.isqrt(rows), math.isqrt(rows))
        table = resample_positions(table, old, self.grid)
        return F.pad(table, (0, 0, 1, 0)) if self.pretrain_use_cls_token else table


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _check_architecture(
    width: int, depth: int, heads: int, window: int, window_blocks: Sequence[int]
) -> None:
    if heads < 1 or width % heads:
        raise ValueError(
            f"{heads} attention heads do not divide a width of {width}: set num_heads to a divisor"
        )
    absent = [i for i in window_blocks if not 0 <= i < depth]
    if absent:
        raise ValueError(
            f"window_block_indexes names block {absent[0]}, but a transformer of depth {depth} has blocks 0 to "
            f"{depth - 1}"
        )
    if window_blocks and window < 1:
        raise ValueError(f"window_size is {window}, so the blocks of window_block_indexes have no windows")


# --- the pyramid --------------------------------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W] (detectron2's "LN")."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_norm(norm: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module] | None:
    """From a norm's name to what makes it for a number of channels: "LN", "" for none, or a callable."""
    if not isinstance(norm, str):
        return norm
    if norm not in ("", "LN"):
        raise ValueError(f"the simple feature pyramid has the norms 'LN' and '', got {norm!r}")
    return ChannelNorm if norm else None


class ConvNorm(nn.Conv2d):
    """A convolution with its norm, if there is one, as `norm`; the norm's bias stands in for the convolution's."""

    def __init__(self, channels: int, out: int, kernel: int, norm: Callable[[int], nn.Module] | None) -> None:
        super().__init__(channels, out, kernel, padding=kernel // 2, bias=norm is None)
        self.norm = None if norm is None else norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


def pyramid_level(
    width: int, scale: float, out: int, norm: Callable[[int], nn.Module] | None
) -> nn.Sequential:
    """From the ViT's map to one of `scale` (4, 2, 1, 1/2, 1/4, ...) times its size, with `out` channels.

    Raises:
        ValueError: another scale.
    """
    layers: list[nn.Module] = []
    if scale == 4:
        middle = [] if norm is None else [norm(width // 2)]
        layers = [nn.ConvTranspose2d(width, width // 2, 2, 2), *middle, nn.GELU()]
        if norm is None:
            layers.insert(1, nn.Identity())  # keeps the published numbers of the layers
        layers.append(nn.ConvTranspose2d(width // 2, width // 4, 2, 2))
        width = width // 4
    elif scale == 2:
        layers = [nn.ConvTranspose2d(width, width // 2, 2, 2)]
        width = width // 2
    elif 0 < scale < 1 and math.log2(scale).is_integer():
        layers = [nn.MaxPool2d(round(1 / scale), round(1 / scale))]
    elif scale != 1:
        raise ValueError(f"scale_factors are 4, 2, 1, 0.5, 0.25 and so on, got {scale}")
    return nn.Sequential(*layers, ConvNorm(width, out, 1, norm), ConvNorm(out, out, 3, norm))


class SimpleFeaturePyramid(nn.Module):
    """Levels of several scales, all from one map; named "simfp_N" with stride 2 ** N, as published.

    Args:
        width, stride: channels of the map, and the pixels between its cells. out_channels: of every level.
        scale_factors: size of each level over the map's, each half of the one before. norm: see `make_norm`.

    Raises:
        ValueError: strides that are no powers of 2, or do not double; an unknown norm.
    """

    def __init__(
        self,
        width: int,
        stride: int,
        out_channels: int,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        norm: str | Callable[[int], nn.Module] = "LN",
    ) -> None:
        super().__init__()
        self.strides = [int(stride / scale) for scale in scale_factors]
        doubling = all(b == 2 * a for a, b in zip(self.strides, self.strides[1:], strict=False))
        if (
            not self.strides
            or not doubling
            or self.strides[0] < 1
            or not math.log2(self.strides[0]).is_integer()
        ):
            raise ValueError(
                f"a patch of {stride} pixels and scale_factors {list(scale_factors)} give levels of strides "
                f"{self.strides}: each must be a power of 2 and double the one before"
            )
        self.level_names = [f"simfp_{round(math.log2(value))}" for value in self.strides]
        make = make_norm(norm)
        for name, scale in zip(self.level_names, scale_factors, strict=True):
            self.add_module(name, pyramid_level(width, scale, out_channels, make))

    def levels(self, features: Tensor) -> list[Tensor]:
        """[B, D, h, w] -> one map [B, out_channels, ., .] for each scale."""
        return [self.get_submodule(name)(features) for name in self.level_names]
