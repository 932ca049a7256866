"""Swin transformer (Liu et al. 2021) as a pyramid of features, under the published parameter names.

Maps are [B, H, W, C] inside; any input size will do, since every stage pads to whole windows.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_plugins.core.attention import attention
from jepa_plugins.core.checkpoints import CheckpointError

STAGES = 4
FEATURES = tuple(f"res{i + 2}" for i in range(STAGES))
# What is added to the score of a pair that shifting brought together: a number, not infinity, as published.
APART = -100.0


@dataclass(frozen=True)
class SwinSettings:
    """Architecture; the defaults are Swin-T.

    image_channels: of the input. pretrain_size: side in pixels of the images that the absolute position
    embedding was trained on. embed_dim: channels of the first stage, doubled by each further one. depths,
    heads: blocks and attention heads of the four stages. window: side in tokens. mlp_ratio: hidden width over
    width. qk_scale: of the scores; None or 0 is (width of a head) ** -0.5. drop_rate, attn_drop_rate: of
    dropout. drop_path_rate: of stochastic depth in the last block, rising linearly from 0 in the first.
    out_features: which of FEATURES to give. checkpointing: recompute each block in the backward pass.
    """

    image_channels: int = 3
    pretrain_size: int = 224
    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.2
    absolute_position: bool = False
    patch_norm: bool = True
    out_features: tuple[str, ...] = FEATURES
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if len(self.depths) != STAGES or len(self.heads) != STAGES or min(self.depths) < 1:
            raise ValueError(
                f"a Swin transformer has {STAGES} stages of at least one block: MODEL.SWIN.DEPTHS "
                f"{list(self.depths)} and MODEL.SWIN.NUM_HEADS {list(self.heads)} need {STAGES} numbers each"
            )
        for width, heads in zip(self.widths, self.heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(
                    f"{width} channels cannot be divided among {heads} heads: MODEL.SWIN.EMBED_DIM, doubled by "
                    "each stage, must be a multiple of MODEL.SWIN.NUM_HEADS"
                )
        unknown = sorted(set(self.out_features) - set(FEATURES))
        if unknown or not self.out_features:
            raise ValueError(
                f"MODEL.SWIN.OUT_FEATURES {list(self.out_features)} must be among {', '.join(FEATURES)}"
            )

    @property
    def widths(self) -> list[int]:
        """Channels of the four stages."""
        return [self.embed_dim * 2**i for i in range(STAGES)]

    @property
    def strides(self) -> list[int]:
        """Of the four stages, in pixels."""
        return [self.patch_size * 2**i for i in range(STAGES)]


# --- windows ------------------------------------------------------------------------------------------


def to_windows(x: Tensor, window: int) -> Tensor:
    """[B, H, W, C], sides multiples of `window` -> [B, windows, window * window, C]."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(batch, -1, window * window, channels)


def from_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`: [B, windows, window * window, C] -> [B, height, width, C]."""
    batch, _, _, channels = x.shape
    x = x.view(batch, height // window, width // window, window, window, channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


# Two sizes of four stages: the largest mask of a 1024 x 2048 image takes 26 MB.
@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # a mask made while evaluating serves training too
def shifted_window_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Scores to add in a shifted window: 0 between tokens that were neighbours before the shift, else -100.

    Args:
        height, width: of the padded map in tokens, multiples of `window`.

    Returns:
        float32 [windows, window * window, window * window] (section 3.2, figure 4).
    """

    def band(size: int) -> Tensor:
        place = torch.arange(size, device=device)
        return (place >= size - window).long() + (place >= size - window // 2).long()

    regions = 3 * band(height)[:, None] + band(width)
    regions = to_windows(regions[None, :, :, None], window)[0, :, :, 0]
    apart = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(apart.shape, device=device).masked_fill_(apart, APART)


def relative_position_index(window: int) -> Tensor:
    """int64 [N, N] with N = window ** 2: for each pair of tokens the row of the bias table (eq. 4)."""
    place = torch.arange(window)
    grid = torch.stack(torch.meshgrid(place, place, indexing="ij")).flatten(1)
    offset = grid[:, :, None] - grid[:, None, :] + window - 1
    return offset[0] * (2 * window - 1) + offset[1]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for each relative position (eq. 4)."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, settings: SwinSettings) -> None:
        super().__init__()
        self.heads = heads
        self.scale = settings.qk_scale or (width // heads) ** -0.5
        self.dropout = settings.attn_drop_rate
        window = settings.window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(width, 3 * width, bias=settings.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(settings.drop_rate)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self) -> Tensor:
        """[heads, N, N], added to the scores."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            x: [B, windows, N, C], N tokens a window.
            mask: [windows, N, N], added to the scores, or None.

        Returns:
            [B, windows, N, C].
        """
        batch, windows, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, windows, tokens, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        bias = self.bias()
        if mask is None:
            qkv = qkv.flatten(1, 2)  # windows are part of the batch and share one bias
        else:
            # Part of the heads, each with its own bias: no fused kernel needs it once for every image then.
            qkv = qkv.flatten(2, 3)
            bias = (bias + mask[:, None]).flatten(0, 1)
        dropout = self.dropout if self.training else 0.0
        query, key, value = qkv.unbind(0)
        out = attention(query, key, value, bias.to(qkv.dtype), scale=self.scale, dropout=dropout)
        out = out.reshape(batch, windows, self.heads, tokens, -1).transpose(2, 3)
        return self.proj_drop(self.proj(out.reshape(x.shape)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The index follows from the window: files may lack it (timm's do)."""
        state_dict.setdefault(prefix + "relative_position_index", self.relative_position_index)
        super()._load_from_state_dict(state_dict, prefix, *args)


# --- the network --------------------------------------------------------------------------------------


class SwinBlock(nn.Module):
    """Window attention and a multilayer perceptron, each with a norm before and stochastic depth (eq. 3).

    Args:
        shifted: whether the windows are shifted by half a window.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self, width: int, heads: int, settings: SwinSettings, *, shifted: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.window = settings.window
        self.shift = settings.window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, settings)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * settings.mlp_ratio), drop=settings.drop_rate)

    def attend(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same, each token having looked at its window."""
        height, width = x.shape[1:3]
        below, right = -height % self.window, -width % self.window
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        padded, mask = (height + below, width + right), None
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
            mask = shifted_window_mask(*padded, self.window, x.device)
        x = from_windows(self.attn(to_windows(x, self.window), mask), self.window, *padded)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Neighbours of 2 x 2 tokens concatenated and projected to twice the width; odd sides are padded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2 C]."""
        batch, height, width, channels = x.shape
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.view(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
        # The published order of the four is down before right.
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinStage(nn.Module):
    """Blocks of one resolution and, but for the last stage, the step to the next."""

    def __init__(self, index: int, settings: SwinSettings) -> None:
        super().__init__()
        width, heads = settings.widths[index], settings.heads[index]
        first, last = sum(settings.depths[:index]), max(sum(settings.depths) - 1, 1)
        self.checkpointing = settings.checkpointing
        self.blocks = nn.ModuleList(
            SwinBlock(
                width,
                heads,
                settings,
                shifted=bool(i % 2),
                drop_path=settings.drop_path_rate * (first + i) / last,
            )
            for i in range(settings.depths[index])
        )
        self.downsample = PatchMerging(width) if index < STAGES - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], before the step to the next stage."""
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class PatchEmbed(nn.Module):
    """Non-overlapping patches projected to the first stage's width."""

    def __init__(self, settings: SwinSettings) -> None:
        super().__init__()
        self.patch_size = settings.patch_size
        self.proj = nn.Conv2d(
            settings.image_channels, settings.embed_dim, settings.patch_size, settings.patch_size
        )
        self.norm = nn.LayerNorm(settings.embed_dim) if settings.patch_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, ceil(H / patch), ceil(W / patch), C]; zeros fill the last patches."""
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            x = F.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.proj(x).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)


class SwinTransformer(nn.Module):
    """The four stages, each with a norm for the feature that it gives.

    Loading weights of another architecture raises CheckpointError with one sentence, whoever loads them.
    Weights start as the paper's: truncated normal with deviation 0.02, no bias.
    """

    def __init__(self, settings: SwinSettings | None = None) -> None:
        super().__init__()
        self.settings = settings = settings or SwinSettings()
        self.patch_embed = PatchEmbed(settings)
        if settings.absolute_position:
            side = settings.pretrain_size // settings.patch_size
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, settings.embed_dim, side, side))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(settings.drop_rate)
        self.layers = nn.ModuleList(SwinStage(i, settings) for i in range(STAGES))
        for i, width in enumerate(settings.widths):
            self.add_module(f"norm{i}", nn.LayerNorm(width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._freeze_unused()

    def _freeze_unused(self) -> None:
        """What no given feature depends on keeps its published name, but takes no gradient."""
        wanted = [name in self.settings.out_features for name in FEATURES]
        self._last = max(i for i in range(STAGES) if wanted[i])
        for i, stage in enumerate(self.layers):
            self.get_submodule(f"norm{i}").requires_grad_(wanted[i])
            if i > self._last:
                stage.requires_grad_(False)
            elif i == self._last and stage.downsample is not None:
                stage.downsample.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, c, H, W], normalised -> "res2" [B, C, H/4, W/4] to "res5" [B, 8 C, H/32, W/32], as far as
        wanted; sides rounded up."""
        x = self.patch_embed(x)
        if self.settings.absolute_position:
            place = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic")
            x = x + place.permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        features = {}
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if FEATURES[i] in self.settings.out_features:
                out = self.get_submodule(f"norm{i}")(x)
                features[FEATURES[i]] = out.permute(0, 3, 1, 2).contiguous()
            if i == self._last:
                break
            x = stage.get_submodule("downsample")(x)
        return features

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_architecture(state_dict, self.settings, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


# --- what weights are of ------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwinShape:
    """The architecture that a file's tensors show; None, or 0 for a stage, where they do not show it."""

    embed_dim: int | None
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int | None
    patch_size: int | None


_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)")


def swin_shape(weights: Mapping[str, Tensor], prefix: str = "") -> SwinShape:
    """The architecture of the Swin transformer whose names start with `prefix`."""
    depths: dict[int, int] = {}
    heads: dict[int, int] = {}
    window = None
    for name, value in weights.items():
        if not name.startswith(prefix) or not (found := _BLOCK.fullmatch(name[len(prefix) :])):
            continue
        stage, block = int(found[1]), int(found[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
        if found[3] == "attn.relative_position_bias_table" and value.dim() == 2:
            window, heads[stage] = (round(value.shape[0] ** 0.5) + 1) // 2, value.shape[1]
    stages = range(max(depths, default=-1) + 1)
    patches = weights.get(prefix + "patch_embed.proj.weight")
    return SwinShape(
        embed_dim=None if patches is None else patches.shape[0],
        depths=tuple(depths.get(i, 0) for i in stages),
        heads=tuple(heads.get(i, 0) for i in stages),
        window=window,
        patch_size=None if patches is None else patches.shape[-1],
    )


def downsamples_first(weights: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Whether the step between two stages opens the second (timm's names) and does not end the first."""
    return any(name.startswith(f"{prefix}layers.{STAGES - 1}.downsample.") for name in weights)


def check_architecture(weights: Mapping[str, Tensor], settings: SwinSettings, prefix: str = "") -> None:
    """Raise CheckpointError with one sentence when weights below `prefix` are of another Swin transformer.

    Tensors that are absent are no error here: whoever loads reports them.
    """

    def as_far_as_shown(theirs: tuple[int, ...], ours: tuple[int, ...]) -> list[int]:
        return [number or own for number, own in itertools.zip_longest(theirs, ours, fillvalue=0)]

    shape = swin_shape(weights, prefix)
    pairs = {
        "PATCH_SIZE": (shape.patch_size, settings.patch_size),
        "EMBED_DIM": (shape.embed_dim, settings.embed_dim),
        "DEPTHS": (as_far_as_shown(shape.depths, settings.depths), list(settings.depths)),
        "NUM_HEADS": (as_far_as_shown(shape.heads, settings.heads), list(settings.heads)),
        "WINDOW_SIZE": (shape.window, settings.window),
    }
    other = [key for key, (theirs, ours) in pairs.items() if theirs not in (None, ours)]
    if other:
        words = [f"MODEL.SWIN.{key} {pairs[key][0]} (it is {pairs[key][1]})" for key in other]
        raise CheckpointError(
            f"the checkpoint holds another Swin transformer in '{prefix}layers' than the model: set "
            f"{', '.join(words)}, or give weights of this model"
        )
    bare = [i for i, depth in enumerate(shape.depths) if depth and not shape.heads[i]]
    if bare:  # a loader that matches by suffix and shape has left them out
        raise CheckpointError(
            f"the checkpoint has no '{prefix}layers.{bare[0]}.blocks.0.attn.relative_position_bias_table' for "
            f"windows of {settings.window} and {settings.heads[bare[0]]} heads: set MODEL.SWIN.WINDOW_SIZE and "
            "MODEL.SWIN.NUM_HEADS to those of the weights, or give weights of this model"
        )
    if len(shape.depths) == STAGES and downsamples_first(weights, prefix):
        raise CheckpointError(
            f"the checkpoint's '{prefix}layers.{STAGES - 1}.downsample' is one of timm's names: convert the "
            "file by tools/convert_backbone.py swin"
        )
