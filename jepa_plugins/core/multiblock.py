"""I-JEPA's multi-block masks (I-JEPA, section 3; DMT-JEPA, appendix A.1), drawn for a whole batch at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    keys = sample_keys(seed, sample_index, "target places")
    places = keyed_uniform(keys, (settings.targets, 2))
    targets = blocks_at(places, target, shape, settings.grid)
    kept = context_cells(settings, targets, context, shape, sample_keys(seed, sample_index, "context places"))
    fewest = int(kept.sum(1).min())
    index = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :fewest]
    return Masks(index, targets)


def blocks_at(uniforms: Tensor, size: tuple[int, int], shape: tuple[int, int], grid: str) -> Tensor:
    """Patches of blocks at random places: uniforms [..., 2] in [0, 1) -> int64 [..., height * width]."""
    room = [side - part + (grid == "full_grid") for side, part in zip(shape, size, strict=True)]
    top = (uniforms[..., 0] * room[0]).long()
    left = (uniforms[..., 1] * room[1]).long()
    rows = top[..., None] + torch.arange(size[0])
    columns = left[..., None] + torch.arange(size[1])
    return (rows[..., :, None] * shape[1] + columns[..., None, :]).flatten(-2)


def as_cells(index: Tensor, count: int) -> Tensor:
    """Patch numbers int64 [..., n] -> bool [..., count]."""
    return torch.zeros(*index.shape[:-1], count, dtype=torch.bool).scatter_(-1, index, True)


def context_cells(
    settings: MultiBlock, targets: Tensor, size: tuple[int, int], shape: tuple[int, int], keys: Tensor
) -> Tensor:
    """Context blocks without target patches: bool [B, patches], each with more than `min_keep` patches.

    Places are tried again for the images where too few are left; after every `TRIES` failures one more of
    their target blocks, from the last, may overlap the context.
    """
    count = shape[0] * shape[1]
    taken = as_cells(targets, count)  # [B, blocks, patches]
    kept = torch.zeros(len(targets), count, dtype=torch.bool)
    open_rows = torch.arange(len(targets))
    for attempt in range(TRIES * (settings.targets + 1)):
        respected = settings.targets - attempt // TRIES
        draws = keyed_uniform(keys[open_rows], (attempt + 1, 2))[:, -1]
        block = as_cells(blocks_at(draws, size, shape, settings.grid), count)
        free = block & ~taken[open_rows, :respected].any(1)
        enough = free.sum(1) > settings.min_keep
        kept[open_rows[enough]] = free[enough]
        open_rows = open_rows[~enough]
        if len(open_rows) == 0:
            return kept
    raise ValueError(
        f"context blocks of {size[0]}x{size[1]} patches hold no more than min_keep {settings.min_keep}: "
        "give larger images, smaller patches or a lower min_keep"
    )
