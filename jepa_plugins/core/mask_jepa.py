"""Mask-JEPA: the pretext task on Mask2Former's pixel decoder and transformer decoder (Mask-JEPA, section 3).

Everything here is plain PyTorch. The toolkit's adapter runs backbone and pixel decoders and hands over their
maps; the transformer decoder is read through its published attribute names only, so any member of the family
serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_plugins.core.distributed import mean_count
from jepa_plugins.core.masking import NOISE_CELL, draw_tiles, hidden_cells, valid_cells
from jepa_plugins.core.predictor import (
    Level,
    Queries,
    SelfAttentionBlock,
    choose_queries,
    decoder_layers,
    masked_memory,
    run_layers,
)
from jepa_plugins.core.settings import LEVEL_STRIDES, QUERY_TABLES, MaskJEPASettings
from jepa_plugins.core.step import StepOutput, channel_variance, merge


class MaskJEPAHead(nn.Module):
    """The parts that exist only while pre-training, and the step itself.

    Args:
        settings: the method's options.
        feature_dim: channels C of the pixel decoder's maps; mask_dim: of its stride-4 mask features.
        hidden_dim, heads, feedforward: of the transformer decoder.
        image_channels: of the input.
        num_queries, grid: the decoder's number of queries and the (height, width) in cells of the one map that
            the read-out "query_mix" serves; no other read-out needs them.

    Raises:
        ValueError: a read-out "query_mix" without them, or between different widths.
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
        num_queries: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.grid = grid
        if settings.recon_weight > 0:
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(feature_dim), std=0.02))
            self.self_attention_blocks = nn.ModuleList(
                SelfAttentionBlock(hidden_dim, heads, feedforward)
                for _ in range(settings.self_attention_blocks)
            )
            if settings.readout == "query_mix":
                self.prediction = self._mixing(feature_dim, hidden_dim, num_queries)
            else:
                self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(hidden_dim), std=0.02))
                self.prediction = nn.Linear(hidden_dim, feature_dim)
        if settings.denoise_weight > 0:
            channels = mask_dim if settings.denoise_feature == "mask_features" else feature_dim
            self.denoise = nn.Conv2d(channels, image_channels, kernel_size=1)

    def _mixing(self, feature_dim: int, hidden_dim: int, num_queries: int | None) -> nn.Linear:
        if num_queries is None or self.grid is None:
            raise ValueError("the read-out query_mix needs the number of queries and the grid of the map")
        if feature_dim != hidden_dim:
            raise ValueError(
                f"the read-out query_mix mixes queries of width {hidden_dim} into cells of {feature_dim} "
                "channels, and the two must be equal: set MODEL.MASK_FORMER.HIDDEN_DIM and "
                "MODEL.SEM_SEG_HEAD.CONVS_DIM alike, or use another read-out"
            )
        return nn.Linear(num_queries, self.grid[0] * self.grid[1])

    def _count(self, cells: Tensor, device: torch.device) -> Tensor:
        """Number of True cells; in training the mean over processes, which in evaluation may be out of step."""
        count = int(cells.sum())
        return (
            mean_count(count, device) if self.training else torch.tensor(float(max(count, 1)), device=device)
        )

    def _initial_queries(self, decoder: Any, pos: Tensor, queries: Queries) -> tuple[Tensor, Tensor]:
        """X_0 and its positions, both broadcastable to [B, N, hidden_dim]."""
        batch = queries.index.shape[0]
        if self.settings.readout != "query_mix":
            place = pos[0][queries.index]
            return self.query.to(pos.dtype).expand(*queries.index.shape, -1), place
        tables: list[Any] = [getattr(decoder, name, None) for name in QUERY_TABLES]
        if None in tables:
            raise ValueError(
                f"the read-out query_mix trains the decoder's own {' and '.join(QUERY_TABLES)}, which "
                f"{type(decoder).__name__} lacks: use another read-out"
            )
        content, place = (table.weight.to(pos.dtype).expand(batch, -1, -1) for table in tables)
        return content, place

    def _read_out(self, x: Tensor, queries: Queries) -> Tensor:
        """Queries [B, N, hidden_dim] -> predictions [B, n, C] of the cells `queries.index`."""
        if self.settings.readout != "query_mix":
            return self.prediction(x)
        cells = self.prediction(x.transpose(1, 2)).transpose(1, 2)
        return cells.gather(1, queries.index[..., None].expand(-1, -1, cells.shape[-1]))

    def predict(self, decoder: Any, levels: Mapping[int, Level], queries: Queries) -> Tensor:
        """Let the transformer decoder's own layers predict cells of the reconstructed map (eq. 3 to 5).

        Args:
            decoder: the transformer decoder, read by its published attribute names.
            levels: by index, the maps that the layers read; queries: the cells, on the maps' device.

        Returns:
            [B, N, C], one prediction per cell.

        Raises:
            ValueError: the read-out "query_mix" on a map of another size, or on a decoder without queries.
        """
        settings = self.settings
        order = settings.reading_order(len(decoder_layers(decoder)))
        memories = {i: masked_memory(decoder, i, levels[i], self.mask_token) for i in sorted(set(order))}
        if settings.placement == "image":
            for memory in memories.values():
                for block in self.self_attention_blocks:
                    memory.tokens = block(memory.tokens, memory.pos, memory.mask)
        feature = levels[settings.level].feature
        if settings.readout == "query_mix" and tuple(feature.shape[-2:]) != self.grid:
            height, width = self.grid or (0, 0)
            raise ValueError(
                f"the read-out query_mix is bound to maps of {height}x{width} cells, got "
                f"{feature.shape[-2]}x{feature.shape[-1]}: give images of INPUT.PRETRAIN_CROP_SIZE, or use "
                "another read-out"
            )
        pos = decoder.pe_layer(feature[:1]).flatten(2).transpose(1, 2).to(memories[order[0]].tokens.dtype)
        x, query_pos = self._initial_queries(decoder, pos, queries)
        mixed = settings.readout == "query_mix"
        self_mask = None if queries.valid is None or mixed else queries.valid[:, None, None, :]
        if settings.placement == "pre":
            for block in self.self_attention_blocks:
                x = block(x, query_pos, self_mask)
        x = run_layers(decoder, x, query_pos, self_mask, memories, order, settings.pos_on_value)
        if settings.placement == "post":
            for block in self.self_attention_blocks:
                x = block(x, query_pos, self_mask)
        return self._read_out(decoder.decoder_norm(x) if settings.readout_norm else x, queries)

    def reconstruct(self, decoder: Any, levels: Mapping[int, Level], target: Tensor) -> StepOutput:
        """L_recon (eq. 5): squared error against the normalised target, over hidden cells and channels.

        Args:
            levels: by index, the maps that the layers read, and the reconstructed one.
            target: target map [B, C, H, W] of the reconstructed level.
        """
        given, device = levels[self.settings.level], target.device
        normed = normalised_target(target)
        hidden, valid = given.hidden.flatten(1), given.valid.flatten(1)
        chosen = choose_queries(hidden, valid, self.settings.readout == "masked_queries")
        counted = hidden.gather(1, chosen.index)  # all real queries, or the hidden ones among all cells
        count = self._count(counted, device)
        queries = chosen.to(device)
        predicted = self.predict(decoder, levels, queries)
        aim = normed.gather(1, queries.index[..., None].expand(-1, -1, normed.shape[-1]))
        each = (predicted.float() - aim).square().sum(-1)
        errors = each * counted.to(device)
        loss = reduced(errors, count, normed.shape[-1], self.settings.recon_reduction)
        variance = channel_variance(normed[valid.to(device)])
        mean_squared = errors.detach().sum() / (count * normed.shape[-1])
        metrics = {"target_variance": variance, "explained_variance": 1 - mean_squared / variance}
        # Measures over cells and images are for images of one size: those cells that every image covers.
        inside = normed if bool(valid.all()) else normed[:, valid.all(0).to(device)]
        maps = {"target": inside, "errors": errors.detach(), "hidden_count": hidden.sum()}
        if not self.training:
            maps["hidden"] = given.hidden
            maps["cell_errors"] = _as_map(each.detach() / normed.shape[-1], queries, given.hidden.shape)
        return StepOutput({"loss_recon": loss}, metrics, maps)

    def denoise_loss(self, feature: Tensor, noise: Tensor, image: Tensor, valid: Tensor) -> StepOutput:
        """L_denoise (eq. 6): mean squared error of a 1x1 convolution of the stride-4 map.

        Args:
            feature: [B, C, H/4, W/4]; noise: [B, c, H/4, W/4], as drawn; image: clean [B, c, H, W]; valid:
                bool [B, H/4, W/4].
        """
        aim = self._denoise_target(noise, image)
        count = self._count(valid, noise.device) * noise.shape[1]
        inside = valid.to(noise.device)
        denoised = self.denoise(feature).float()
        errors = (denoised - aim).square() * inside[:, None]
        loss = errors.sum() / count
        values = aim.permute(0, 2, 3, 1)[inside]
        maps = {
            "denoise_error": errors.detach().sum(),
            "denoise_count": valid.sum(),
            "denoise_sum": values.sum(0),
            "denoise_square": values.square().sum(0),
        }
        if not self.training:
            maps.update(denoised=denoised.detach(), denoise_target=aim)
        metrics = {"denoise_r2": 1 - loss.detach() / channel_variance(values)}
        return StepOutput({"loss_denoise": loss}, metrics, maps)

    def _denoise_target(self, noise: Tensor, image: Tensor) -> Tensor:
        settings = self.settings
        if settings.denoise_target == "noise":
            return noise / settings.noise_sigma if settings.denoise_noise_scale == "unit" else noise
        if settings.denoise_downsample == "area":
            return F.avg_pool2d(image, NOISE_CELL)
        options = {"align_corners": False} if settings.denoise_downsample == "bilinear" else {}
        return F.interpolate(image, size=noise.shape[-2:], mode=settings.denoise_downsample, **options)

    def masked_levels(
        self,
        levels: Sequence[Tensor],
        layers: int,
        tile_keys: Tensor,
        image_sizes: Sequence[tuple[int, int]],
    ) -> dict[int, Level]:
        """The maps that are read or reconstructed, all with the same tiles hidden."""
        settings = self.settings
        covered = {
            i: valid_cells(
                image_sizes, (int(levels[i].shape[-2]), int(levels[i].shape[-1])), LEVEL_STRIDES[i]
            )
            for i in sorted({settings.level, *settings.reading_order(layers)})
        }
        tiles = draw_tiles(
            tile_keys,
            covered[settings.level],
            settings.mask_patch,
            settings.mask_ratio,
            settings.mask_sampling,
        )
        pixels = settings.mask_patch * settings.recon_stride
        return {
            i: Level(levels[i], hidden_cells(tiles, pixels // LEVEL_STRIDES[i], valid), valid)
            for i, valid in covered.items()
        }

    def forward(
        self,
        decoder: Any,
        *,
        levels: Sequence[Tensor],
        denoise_feature: Tensor | None,
        target: Tensor | None,
        noise: Tensor,
        image: Tensor,
        tile_keys: Tensor,
        image_sizes: Sequence[tuple[int, int]],
    ) -> StepOutput:
        """One step after the encoders: both losses, weighted, and their metrics.

        Args:
            levels: online maps [B, C, H_i, W_i] at strides 32, 16, 8; target: [B, C, H, W], of the
                reconstructed level, or None without L_recon.
            denoise_feature: online stride-4 map, or None without L_denoise. noise, image: as drawn, and the
                clean network input.
            tile_keys: int64 [B] on the CPU. image_sizes: (H, W) of each image in pixels, without padding.
        """
        out = StepOutput({}, {})
        if self.settings.recon_weight > 0:
            assert target is not None
            given = self.masked_levels(levels, len(decoder_layers(decoder)), tile_keys, image_sizes)
            merge(out, self.reconstruct(decoder, given, target), self.settings.recon_weight)
        if self.settings.denoise_weight > 0:
            assert denoise_feature is not None
            grid = (int(noise.shape[-2]), int(noise.shape[-1]))
            valid = valid_cells(image_sizes, grid, NOISE_CELL)
            merge(out, self.denoise_loss(denoise_feature, noise, image, valid), self.settings.denoise_weight)
        return out


def reduced(errors: Tensor, count: Tensor, channels: int, reduction: str) -> Tensor:
    """Squared errors summed over channels [B, N], 0 where not counted -> the loss over `count` cells."""
    if reduction == "mean":
        return errors.sum() / (count * channels)
    if reduction == "norm":
        # the root's slope at 0 is infinite
        errors = errors.clamp(min=1e-12).sqrt() * (errors > 0)
    return errors.sum() / count


def _as_map(values: Tensor, queries: Queries, shape: torch.Size) -> Tensor:
    """[B, N] of the cells `queries.index` -> [B, H, W], NaN where there is none."""
    if queries.valid is not None:
        values = values.masked_fill(~queries.valid, float("nan"))
    flat = values.new_full((shape[0], shape[1] * shape[2]), float("nan"))
    return flat.scatter(1, queries.index, values).view(shape)


def normalised_target(target: Tensor) -> Tensor:
    """Layer norm over channels without affine, eps 1e-5: [B, C, H, W] -> float32 [B, H*W, C], no gradient."""
    cells = target.detach().flatten(2).transpose(1, 2).float()
    return F.layer_norm(cells, cells.shape[-1:])
