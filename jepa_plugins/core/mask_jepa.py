"""Mask-JEPA: the pretext task on Mask2Former's pixel decoder and transformer decoder (Mask-JEPA, section 3).

Everything here is plain PyTorch. The toolkit's adapter runs backbone and pixel decoders and hands over their
maps; the transformer decoder is read through its published attribute names only, so any member of the family
serves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_plugins.core.distributed import mean_count
from jepa_plugins.core.random import keyed_normal, keyed_uniform
from jepa_plugins.core.transformer import cross_attention_layer, feed_forward_layer, self_attention_layer

READOUTS = ("spatial_queries", "masked_queries")
DENOISE_TARGETS = ("noise", "image")
NOISE_CELL = 4  # pixels: the denoised feature has stride 4 (section 3.4)
LEVEL_STRIDES = (32, 16, 8)  # of the pixel decoder's maps, in its order
# Parameters of the transformer decoder that the predictor uses, by the first part of their names.
PREDICTOR_PARTS = (
    "transformer_cross_attention_layers",
    "transformer_self_attention_layers",
    "transformer_ffn_layers",
    "decoder_norm",
    "level_embed",
    "input_proj",
)


@dataclass(frozen=True)
class MaskJEPASettings:
    """The method's hyper-parameters; the defaults are the paper's (section 4.1).

    Args:
        noise_sigma: standard deviation of the noise in units of ImageNet's per-channel standard deviation.
        mask_ratio: share of tiles hidden, 0 < ratio < 1.
        mask_patch: side p of a tile in cells of the reconstructed map.
        recon_stride: stride of the reconstructed map: 8, 16 or 32.
        self_attention_blocks: M extra blocks after the decoder's own layers.
        readout: one query per cell ("spatial_queries") or per hidden cell ("masked_queries").
        denoise_target: what the 1x1 convolution predicts: the "noise" or the clean "image".
        recon_weight, denoise_weight: of the two losses; 0 turns a loss off.

    Raises:
        ValueError: one sentence for a value that makes no sense.
    """

    noise_sigma: float = 0.4
    mask_ratio: float = 0.5
    mask_patch: int = 8
    recon_stride: int = 8
    self_attention_blocks: int = 2
    readout: str = "spatial_queries"
    denoise_target: str = "noise"
    recon_weight: float = 1.0
    denoise_weight: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            (self.noise_sigma < 0, f"the noise's sigma must not be negative, got {self.noise_sigma}"),
            (not 0 < self.mask_ratio < 1, f"the mask ratio must lie between 0 and 1, got {self.mask_ratio}"),
            (self.mask_patch < 1, f"a mask patch has at least one cell, got {self.mask_patch}"),
            (self.recon_stride not in LEVEL_STRIDES, f"the stride is 8, 16 or 32, got {self.recon_stride}"),
            (self.self_attention_blocks < 0, f"M must not be negative, got {self.self_attention_blocks}"),
            (self.readout not in READOUTS, f"the read-out is one of {READOUTS}, got {self.readout!r}"),
            (self.denoise_target not in DENOISE_TARGETS, f"the target is one of {DENOISE_TARGETS}"),
            (min(self.recon_weight, self.denoise_weight) < 0, "loss weights must not be negative"),
            (
                self.recon_weight == self.denoise_weight == 0,
                "both losses are off, so there is nothing to train",
            ),
            (
                self.denoise_weight > 0 and self.denoise_target == "noise" and self.noise_sigma == 0,
                "predicting the noise makes no sense with sigma 0",
            ),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise ValueError(sentence)

    @property
    def level(self) -> int:
        """Index of the reconstructed map in the pixel decoder's list."""
        return LEVEL_STRIDES.index(self.recon_stride)


def draw_noise(keys: Tensor, channels: int, size: tuple[int, int], sigma: float) -> Tensor:
    """Noise at a quarter of the image's resolution (section 3.2).

    Args:
        keys: int64 [B], of `sample_keys`; size: (H, W) of the image batch in pixels.

    Returns:
        float32 [B, channels, H/4, W/4], standard deviation `sigma`.

    Raises:
        ValueError: when H or W is no multiple of 4.
    """
    if size[0] % NOISE_CELL or size[1] % NOISE_CELL:
        raise ValueError(f"the noise needs image sides that are multiples of {NOISE_CELL}, got {size}")
    return sigma * keyed_normal(keys, (channels, size[0] // NOISE_CELL, size[1] // NOISE_CELL))


def expand_noise(noise: Tensor) -> Tensor:
    """[B, c, H/4, W/4] -> [B, c, H, W]: each value fills its 4x4 cell."""
    return noise.repeat_interleave(NOISE_CELL, dim=-2).repeat_interleave(NOISE_CELL, dim=-1)


def valid_cells(image_sizes: Sequence[tuple[int, int]], grid: tuple[int, int], stride: int) -> Tensor:
    """Cells that a picture covers, at least in part: bool [B, H, W] on the CPU."""
    covered = torch.tensor([(math.ceil(h / stride), math.ceil(w / stride)) for h, w in image_sizes])
    rows = torch.arange(grid[0]) < covered[:, :1]
    columns = torch.arange(grid[1]) < covered[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def draw_tile_mask(keys: Tensor, valid: Tensor, patch: int, ratio: float) -> Tensor:
    """Hide exactly floor(ratio * tiles + 0.5) tiles of each image (section 3.3).

    Args:
        keys: int64 [B]; valid: bool [B, H, W], cells inside the image. Tiles of patch x patch cells start at
            the top left; those at the right and bottom border may be partial.

    Returns:
        bool [B, H, W], True where hidden; never outside the image.

    Raises:
        ValueError: when a tile is larger than half of an image's map, or none, or all, would be hidden.
    """
    _, height, width = valid.shape
    smallest = int(torch.minimum(valid.any(2).sum(1), valid.any(1).sum(1)).min())
    if 2 * patch > smallest:
        raise ValueError(
            f"a mask patch of {patch}x{patch} cells is larger than half of an image's map, whose smaller "
            f"side has {smallest} cells; make the mask patch smaller or the images larger"
        )
    inside = F.max_pool2d(valid[:, None].float(), patch, ceil_mode=True)[:, 0] > 0
    scores = keyed_uniform(keys, tuple(inside.shape[1:])).masked_fill(~inside, 2.0).flatten(1)
    tiles = inside.flatten(1).sum(1)
    hidden = (ratio * tiles.double() + 0.5).floor().long()
    if bool(((hidden == 0) | (hidden == tiles)).any()):
        raise ValueError(
            f"a map of {height}x{width} cells has {int(tiles.min())} tiles of {patch}x{patch}: with a mask "
            f"ratio of {ratio} nothing or everything would be hidden; make the mask patch smaller "
            "or the images larger"
        )
    # Stable, so that two equal scores are ordered alike whatever padding stands beside them.
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    chosen = (rank < hidden[:, None]).view_as(inside)
    cells = chosen.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
    return cells[:, :height, :width] & valid


class SelfAttentionBlock(nn.Module):
    """Self-attention and FFN with residuals and post-norm: one of the M extra blocks, for pre-training
    only."""

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.attention = _Named(self_attn=nn.MultiheadAttention(width, heads), norm=nn.LayerNorm(width))
        self.ffn = _Named(
            linear1=nn.Linear(width, feedforward),
            linear2=nn.Linear(feedforward, width),
            norm=nn.LayerNorm(width),
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, query_pos: Tensor | None, mask: Tensor | None) -> Tensor:
        """[B, N, C] -> [B, N, C]; mask bool [B, 1, 1, N], True for real queries."""
        return feed_forward_layer(self.ffn, self_attention_layer(self.attention, x, query_pos, mask))


class _Named(nn.Module):
    """Sub-layers under the attribute names that `core.transformer` reads."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


@dataclass
class Queries:
    """The predictor's queries: `index` int64 [B, N] of their cells, `valid` bool [B, N] or None when all are
    real."""

    index: Tensor
    valid: Tensor | None


def choose_queries(hidden: Tensor, valid: Tensor, readout: str) -> Queries:
    """Cells that get a query: all of the image, or the hidden ones; short rows are filled up with other
    cells.

    Args:
        hidden, valid: bool [B, cells], on the CPU, so that counting them stalls no accelerator.
    """
    wanted = hidden if readout == "masked_queries" else valid
    counts = wanted.sum(1)
    longest = int(counts.max())
    index = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    full = bool((counts == longest).all())
    return Queries(index, None if full else wanted.gather(1, index))


@dataclass
class StepOutput:
    """What one forward gives: losses (to be summed), metrics (to be logged) and, if asked for, the maps
    behind them."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    maps: dict[str, Tensor] = field(default_factory=dict)


class MaskJEPAHead(nn.Module):
    """The parts that exist only while pre-training, and the step itself.

    Args:
        settings: the method's options.
        feature_dim: channels C of the pixel decoder's maps; mask_dim: of its stride-4 map.
        hidden_dim, heads, feedforward: of the transformer decoder.
        image_channels: of the input.
    """

    def __init__(
        self,
        settings: MaskJEPASettings,
        *,
        feature_dim: int,
        mask_dim: int,
        hidden_dim: int,
        heads: int,
        feedforward: int,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.settings = settings
        if settings.recon_weight > 0:
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(feature_dim), std=0.02))
            self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(hidden_dim), std=0.02))
            self.self_attention_blocks = nn.ModuleList(
                SelfAttentionBlock(hidden_dim, heads, feedforward)
                for _ in range(settings.self_attention_blocks)
            )
            self.prediction = nn.Linear(hidden_dim, feature_dim)
        if settings.denoise_weight > 0:
            self.denoise = nn.Conv2d(mask_dim, image_channels, kernel_size=1)

    def _count(self, cells: Tensor, device: torch.device) -> Tensor:
        """Number of True cells; in training the mean over processes, which in evaluation may be out of step."""
        count = int(cells.sum())
        return (
            mean_count(count, device) if self.training else torch.tensor(float(max(count, 1)), device=device)
        )

    def predict(
        self, decoder: Any, feature: Tensor, hidden: Tensor, valid: Tensor, queries: Queries
    ) -> Tensor:
        """Fill the hidden cells and let the transformer decoder's own layers predict them (eq. 3 to 5).

        Args:
            decoder: the transformer decoder, read by its published attribute names.
            feature: [B, C, H, W], the online map; hidden, valid: bool [B, H*W]; queries: on the map's device.

        Returns:
            [B, N, C], one prediction per query.
        """
        level = self.settings.level
        cells = feature.flatten(2).transpose(1, 2)
        filled = torch.where(hidden[..., None], self.mask_token.to(cells.dtype), cells)
        as_map = filled.transpose(1, 2).unflatten(-1, feature.shape[-2:])
        memory = decoder.input_proj[level](as_map).flatten(2).transpose(1, 2)
        memory = memory + decoder.level_embed.weight[level]
        pos = decoder.pe_layer(feature[:1]).flatten(2).transpose(1, 2).to(memory.dtype)
        key_mask = None if bool(valid.all()) else valid[:, None, None, :].to(memory.device)
        self_mask = None if queries.valid is None else queries.valid[:, None, None, :]

        query_pos = pos[0][queries.index]
        x = self.query.to(memory.dtype).expand(*queries.index.shape, -1)
        layers = zip(
            decoder.transformer_cross_attention_layers,
            decoder.transformer_self_attention_layers,
            decoder.transformer_ffn_layers,
            strict=True,
        )
        for cross, self_attention, ffn in layers:
            x = cross_attention_layer(cross, x, memory, mask=key_mask, pos=pos, query_pos=query_pos)
            x = self_attention_layer(self_attention, x, query_pos, self_mask)
            x = feed_forward_layer(ffn, x)
        for block in self.self_attention_blocks:
            x = block(x, query_pos, self_mask)
        return self.prediction(decoder.decoder_norm(x))

    def reconstruct(
        self, decoder: Any, feature: Tensor, target: Tensor, hidden: Tensor, valid: Tensor
    ) -> StepOutput:
        """L_recon (eq. 5): mean squared error against the normalised target, over hidden cells and channels.

        Args:
            feature, target: online and target map [B, C, H, W]; hidden, valid: bool [B, H, W] on the CPU.
        """
        device = feature.device
        normed = normalised_target(target)
        hidden_flat, valid_flat = hidden.flatten(1), valid.flatten(1)
        queries = choose_queries(hidden_flat, valid_flat, self.settings.readout)
        counted = hidden_flat.gather(1, queries.index)  # all real queries, or the hidden ones among all cells
        count = self._count(counted, device) * normed.shape[-1]
        queries = Queries(
            queries.index.to(device), None if queries.valid is None else queries.valid.to(device)
        )
        predicted = self.predict(decoder, feature, hidden_flat.to(device), valid_flat, queries)
        aim = normed.gather(1, queries.index[..., None].expand(-1, -1, normed.shape[-1]))
        errors = (predicted.float() - aim).square().sum(-1) * counted.to(device)
        loss = errors.sum() / count
        variance = channel_variance(normed[valid_flat.to(device)])
        metrics = {"target_variance": variance, "explained_variance": 1 - loss.detach() / variance}
        # Measures over cells and images are for images of one size: those cells that every image covers.
        inside = normed if bool(valid.all()) else normed[:, valid_flat.all(0).to(device)]
        maps = {"target": inside, "errors": errors.detach(), "hidden_count": hidden.sum()}
        return StepOutput({"loss_recon": loss}, metrics, maps)

    def denoise_loss(self, mask_features: Tensor, noise: Tensor, image: Tensor, valid: Tensor) -> StepOutput:
        """L_denoise (eq. 6): mean squared error of a 1x1 convolution of the stride-4 map.

        Args:
            mask_features: [B, C, H/4, W/4]; noise: [B, c, H/4, W/4]; image: clean [B, c, H, W]; valid: bool
                [B, H/4, W/4].
        """
        aim = noise if self.settings.denoise_target == "noise" else F.avg_pool2d(image, NOISE_CELL)
        count = self._count(valid, noise.device) * noise.shape[1]
        inside = valid.to(noise.device)
        errors = (self.denoise(mask_features).float() - aim).square() * inside[:, None]
        loss = errors.sum() / count
        values = aim.permute(0, 2, 3, 1)[inside]
        maps = {
            "denoise_error": errors.detach().sum(),
            "denoise_count": valid.sum(),
            "denoise_sum": values.sum(0),
            "denoise_square": values.square().sum(0),
        }
        metrics = {"denoise_r2": 1 - loss.detach() / channel_variance(values)}
        return StepOutput({"loss_denoise": loss}, metrics, maps)

    def forward(
        self,
        decoder: Any,
        *,
        feature: Tensor,
        mask_features: Tensor,
        target: Tensor | None,
        noise: Tensor,
        image: Tensor,
        tile_keys: Tensor,
        image_sizes: Sequence[tuple[int, int]],
    ) -> StepOutput:
        """One step after the encoders: both losses, weighted, and their metrics.

        Args:
            feature, target: online and target maps [B, C, H, W] of the reconstructed level; target may be
                None without L_recon.
            mask_features: online stride-4 map. noise, image: as drawn, and the clean network input.
            tile_keys: int64 [B] on the CPU. image_sizes: (H, W) of each image in pixels, without padding.
        """
        out = StepOutput({}, {})
        if self.settings.recon_weight > 0:
            assert target is not None
            grid = (int(feature.shape[-2]), int(feature.shape[-1]))
            valid = valid_cells(image_sizes, grid, self.settings.recon_stride)
            hidden = draw_tile_mask(tile_keys, valid, self.settings.mask_patch, self.settings.mask_ratio)
            _merge(out, self.reconstruct(decoder, feature, target, hidden, valid), self.settings.recon_weight)
        if self.settings.denoise_weight > 0:
            grid = (int(noise.shape[-2]), int(noise.shape[-1]))
            valid = valid_cells(image_sizes, grid, NOISE_CELL)
            _merge(out, self.denoise_loss(mask_features, noise, image, valid), self.settings.denoise_weight)
        return out


def _merge(into: StepOutput, part: StepOutput, weight: float) -> None:
    into.losses.update({name: weight * loss for name, loss in part.losses.items()})
    into.metrics.update(part.metrics)
    into.maps.update(part.maps)


def normalised_target(target: Tensor) -> Tensor:
    """Layer norm over channels without affine, eps 1e-5: [B, C, H, W] -> float32 [B, H*W, C], no gradient."""
    cells = target.detach().flatten(2).transpose(1, 2).float()
    return F.layer_norm(cells, cells.shape[-1:])


def channel_variance(vectors: Tensor) -> Tensor:
    """Variance of [n, C] over n, averaged over channels; 0-dimensional."""
    return vectors.float().var(dim=0, unbiased=False).mean()
