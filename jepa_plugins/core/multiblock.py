"""I-JEPA's multi-block masks (I-JEPA, section 3; DMT-JEPA, appendix A.1), drawn for a whole batch at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from jepa_plugins.core.random import keyed_uniform, sample_keys

GRIDS = ("ijepa", "full_grid")
TRIES = 20  # positions tried for a context before one target block is allowed to overlap it


@dataclass(frozen=True)
class MultiBlock:
    """The sampler's settings; the defaults are the paper's.

    Args:
        target_scale, context_scale: lowest and highest share of the patches in a block.
        target_aspect: lowest and highest height / width of a target block; context blocks are square.
        targets: blocks per image. min_keep: a context holds more patches than this.
        grid: "ijepa" as the published sampler, whose blocks never touch the last row and column; "full_grid"
            places them anywhere.

    Raises:
        ValueError: one sentence for a value that makes no sense.
    """

    target_scale: tuple[float, float] = (0.15, 0.2)
    context_scale: tuple[float, float] = (0.85, 1.0)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    targets: int = 4
    min_keep: int = 10
    grid: str = "ijepa"

    def __post_init__(self) -> None:
        for name in ("target_scale", "context_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} is two shares, 0 < low <= high <= 1, got {(low, high)}")
        if not 0 < self.target_aspect[0] <= self.target_aspect[1]:
            raise ValueError(f"target_aspect is two ratios, 0 < low <= high, got {self.target_aspect}")
        if self.targets < 1:
            raise ValueError(f"at least one target block is needed, got {self.targets}")
        if self.grid not in GRIDS:
            raise ValueError(f"the mask grid is one of {', '.join(GRIDS)}, got {self.grid!r}")

    def block_size(
        self, draw: float, shape: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
    ) -> tuple[int, int]:
        """Height and width in patches; `draw` in [0, 1) rules both the area and the aspect, as published.

        A block is smaller than the grid in "ijepa", at most as large in "full_grid".
        """
        area = int(shape[0] * shape[1] * (scale[0] + draw * (scale[1] - scale[0])))
        ratio = aspect[0] + draw * (aspect[1] - aspect[0])
        largest = [side - 1 if self.grid == "ijepa" else side for side in shape]
        height = min(round(math.sqrt(area * ratio)), largest[0])
        width = min(round(math.sqrt(area / ratio)), largest[1])
        return height, width

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError when a grid of patches is too small for these blocks."""
        patches = shape[0] * shape[1]
        if self.targets > patches:
            raise ValueError(
                f"{self.targets} target blocks are more than the {patches} patches of a grid of "
                f"{shape[0]}x{shape[1]}: give fewer targets (the paper has 4)"
            )
        if patches * self.context_scale[1] <= self.min_keep or min(shape) < 2:
            raise ValueError(
                f"a grid of {shape[0]}x{shape[1]} patches is too small: a context must keep more than "
                f"{self.min_keep} patches; give larger images, smaller patches or a lower min_keep"
            )
        if int(patches * self.target_scale[0]) < 1:
            raise ValueError(
                f"target blocks of {self.target_scale[0]:g} of {shape[0]}x{shape[1]} patches hold none: give "
                "larger images, smaller patches or a higher target_scale"
            )
        # Area and aspect grow with the draw, so a side need not be shortest at one of its ends.
        sizes = [self.block_size(i / 64, shape, self.target_scale, self.target_aspect) for i in range(65)]
        if min(map(min, sizes)) < 1:
            raise ValueError(
                f"target blocks of the aspects {self.target_aspect} have no row or column on {shape[0]}x{shape[1]} "
                "patches: give a target_aspect nearer to 1, larger images or smaller patches"
            )


@dataclass
class Masks:
    """Patches in raster order: `context` int64 [B, n], `targets` int64 [B, blocks, K]."""

    context: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Masks:
        """On another device."""
        return Masks(self.context.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))


def draw_masks(
    settings: MultiBlock, shape: tuple[int, int], seed: int, sample_index: Tensor, batch_key: int
) -> Masks:
    """Masks of a batch; every image has one context, without the patches of its targets.

    The sizes of the blocks are shared by the batch and keyed by (seed, batch_key); places are keyed by
    (seed, sample). Contexts are cut to the shortest, keeping the first patches in raster order, as published.

    Args:
        shape: patches along height and width. sample_index: int64 [B], on the CPU.

    Raises:
        ValueError: the grid is too small, or the targets leave too few patches.
    """
    settings.check(shape)
    sizes = sample_keys(seed, torch.tensor([batch_key]), "block sizes")
    draws = keyed_uniform(sizes, (2,))[0].tolist()
    target = settings.block_size(draws[0], shape, settings.target_scale, settings.target_aspect)
    context = settings.block_size(draws[1], shape, settings.context_scale, (1.0, 1.0))
    places = Places(target, shape, settings.grid)
    drawn = places.at(keyed_uniform(sample_keys(seed, sample_index, "target places"), (settings.targets, 2)))
    keys = sample_keys(seed, sample_index, "context places")
    kept = context_cells(settings, ~places.cells, drawn, Places(context, shape, settings.grid), keys)
    return Masks(first_patches(kept), places.patches.index_select(0, drawn.flatten()).view(*drawn.shape, -1))


class Places:
    """All places of a block in a grid, by their top row, then their left column.

    A batch shares its block sizes and a grid has few places, so images take rows of two small tables.

    Attributes:
        patches: of each place, int64 [places, height * width]; cells: the same as bool [places, all patches].
    """

    def __init__(self, size: tuple[int, int], shape: tuple[int, int], grid: str) -> None:
        self.size = size
        self.room = [side - part + (grid == "full_grid") for side, part in zip(shape, size, strict=True)]
        corners, offsets = (
            (torch.arange(height)[:, None] * shape[1] + torch.arange(width)).flatten()
            for height, width in (self.room, size)
        )
        self.patches = corners[:, None] + offsets
        self.cells = torch.zeros(len(corners), shape[0] * shape[1], dtype=torch.bool)
        self.cells.scatter_(1, self.patches, True)

    def at(self, uniforms: Tensor) -> Tensor:
        """Numbers of places: uniforms [..., 2] in [0, 1) -> int64 [...]."""
        top = (uniforms[..., 0] * self.room[0]).long()
        return top * self.room[1] + (uniforms[..., 1] * self.room[1]).long()


def first_patches(kept: Tensor) -> Tensor:
    """Patches that are kept, bool [B, patches], as many as every image has: int64 [B, n], in raster order."""
    # The smallest type that can count them: these are the largest arrays of a draw.
    rank = kept.cumsum(1, dtype=torch.int16 if kept.shape[1] < 2**15 else torch.int32)
    fewest = int(rank[:, -1].min())
    # numpy finds them several times as fast as torch does
    flat = torch.from_numpy(np.flatnonzero((kept & (rank <= fewest)).numpy())).view(len(kept), fewest)
    return flat - torch.arange(len(kept))[:, None] * kept.shape[1]


def context_cells(
    settings: MultiBlock, outside: Tensor, targets: Tensor, context: Places, keys: Tensor
) -> Tensor:
    """Context blocks without target patches: bool [B, patches], each with more than `min_keep` patches.

    Places are tried again for the images where too few are left; after every `TRIES` failures one more of
    their target blocks, from the last, may overlap the context.

    Args:
        outside: bool [places, patches], what a target block leaves; targets: their places, int64 [B, blocks].
        context: places of its block, chosen by keys int64 [B].
    """
    kept = torch.zeros(len(targets), outside.shape[1], dtype=torch.bool)
    open_rows = torch.arange(len(targets))
    last = TRIES * (settings.targets + 1)
    # The first try, which nearly every image needs alone, then what is left of its TRIES, then TRIES at a time.
    for start, stop in pairwise([0, 1, *range(TRIES, last + 1, TRIES)]):
        draws = keyed_uniform(keys[open_rows], (stop - start, 2), start)
        allowed = free_of(outside, targets[open_rows, : settings.targets - start // TRIES])
        free = context.cells.index_select(0, context.at(draws).flatten()).unflatten(0, draws.shape[:2])
        free &= allowed[:, None]
        enough = free.sum(2) > settings.min_keep  # [rows, tries]
        found, first = enough.any(1), enough.byte().argmax(1)
        kept[open_rows[found]] = free[found, first[found]]
        open_rows = open_rows[~found]
        if len(open_rows) == 0:
            return kept
    height, width = context.size
    raise ValueError(
        f"context blocks of {height}x{width} patches hold no more than min_keep {settings.min_keep}: "
        "give larger images, smaller patches or a lower min_keep"
    )


def free_of(outside: Tensor, targets: Tensor) -> Tensor:
    """Patches in none of the target blocks at places int64 [B, n]: bool [B, patches]."""
    free = torch.ones(len(targets), outside.shape[1], dtype=torch.bool)
    for place in targets.unbind(1):
        free &= outside.index_select(0, place)
    return free
