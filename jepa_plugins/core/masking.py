"""What the predictor is not shown: Mask-JEPA's noise (section 3.2) and its hidden tiles (section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_plugins.core.random import keyed_normal, keyed_uniform

NOISE_CELL = 4  # pixels: the denoised feature has stride 4 (section 3.4)


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


def draw_tiles(keys: Tensor, valid: Tensor, patch: int, ratio: float, sampling: str = "exact") -> Tensor:
    """Choose the tiles to hide (section 3.3).

    Args:
        keys: int64 [B]; valid: bool [B, H, W], cells inside the image. Tiles of patch x patch cells start at
            the top left; those at the right and bottom border may be partial.
        sampling: "exact" hides floor(ratio * tiles + 0.5) tiles of each image; "bernoulli" each tile with
            probability `ratio`, but never none and never all of an image.

    Returns:
        bool [B, ceil(H/patch), ceil(W/patch)], True where hidden; never outside the image.

    Raises:
        ValueError: when a tile is larger than half of an image's map, or none, or all, would be hidden.
    """
    smallest = int(torch.minimum(valid.any(2).sum(1), valid.any(1).sum(1)).min())
    if 2 * patch > smallest:
        raise ValueError(
            f"a mask patch of {patch}x{patch} cells is larger than half of an image's map, whose smaller "
            f"side has {smallest} cells; make the mask patch smaller or the images larger"
        )
    inside = F.max_pool2d(valid[:, None].float(), patch, ceil_mode=True)[:, 0] > 0
    scores = keyed_uniform(keys, tuple(inside.shape[1:])).masked_fill(~inside, 2.0).flatten(1)
    # Stable, so that two equal scores are ordered alike whatever padding stands beside them.
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)
    tiles = inside.flatten(1).sum(1)
    if sampling == "bernoulli":
        drawn = (scores < ratio).sum(1)
        hidden = torch.minimum(drawn.clamp(min=1), tiles - 1)
    else:
        hidden = (ratio * tiles.double() + 0.5).floor().long()
        _check_share(hidden, tiles, patch, ratio, valid.shape)
    return (rank < hidden[:, None]).view_as(inside)


def _check_share(hidden: Tensor, tiles: Tensor, patch: int, ratio: float, shape: Sequence[int]) -> None:
    if bool(((hidden == 0) | (hidden == tiles)).any()):
        raise ValueError(
            f"a map of {shape[1]}x{shape[2]} cells has {int(tiles.min())} tiles of {patch}x{patch}: with a mask "
            f"ratio of {ratio} nothing or everything would be hidden; make the mask patch smaller "
            "or the images larger"
        )


def hidden_cells(tiles: Tensor, side: int, valid: Tensor) -> Tensor:
    """Tiles as cells of one map, `side` cells wide: bool [B, h, w] and valid [B, H, W] -> bool [B, H, W]."""
    cells = tiles.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
    return cells[:, : valid.shape[1], : valid.shape[2]] & valid
