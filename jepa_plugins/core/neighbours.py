"""Masked Semantic Neighboring: each patch's most similar neighbours (DMT-JEPA, section 3.2)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BORDERS = ("shift", "wrap", "mask")


@dataclass(frozen=True)
class Neighbourhood:
    """Which patches are candidates, and how many are chosen.

    Args:
        window: side of the square window of candidates around a patch, odd and at least 3; 0 takes all patches.
        k: neighbours chosen by cosine similarity. include_self: whether a patch is its own candidate.
        border: at the grid's border the window is moved inside ("shift"), continues at the other side ("wrap"),
            or loses the patches outside ("mask").

    Raises:
        ValueError: one sentence for a value that makes no sense.
    """

    window: int = 3
    k: int = 4
    include_self: bool = False
    border: str = "shift"

    def __post_init__(self) -> None:
        if self.window and (self.window < 3 or self.window % 2 == 0):
            raise ValueError(f"the window is 0 (all patches) or an odd number from 3 on, got {self.window}")
        if self.border not in BORDERS:
            raise ValueError(f"the border is one of {', '.join(BORDERS)}, got {self.border!r}")
        candidates = self.window**2 - 1 + self.include_self
        if self.k < 1:
            raise ValueError(f"k, the number of neighbours, is at least 1, got {self.k}")
        if self.window and self.k > candidates:
            raise ValueError(f"k must lie between 1 and the {candidates} candidates, got {self.k}")

    def check(self, grid: tuple[int, int]) -> None:
        """Raise ValueError when a grid of patches is too small."""
        if self.window > min(grid):
            raise ValueError(
                f"a grid of {grid[0]}x{grid[1]} patches is smaller than the {self.window}x{self.window} window: "
                "give larger images, smaller patches or a smaller window"
            )
        patches = grid[0] * grid[1] - 1 + self.include_self
        if not self.window and self.k > patches:
            raise ValueError(f"k is {self.k}, but a patch has {patches} candidates: give a smaller k")


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # else a table made for an evaluation could not serve a training
def candidate_table(
    grid: tuple[int, int], window: int, include_self: bool, border: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Candidates of every patch: int64 [N, n], and whether each lies inside the grid: bool [N, n].

    Both are on `device`, and made once.
    """
    height, width = grid
    half = window // 2
    rows, columns = (
        t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    down, right = (
        t.flatten()
        for t in torch.meshgrid(torch.arange(-half, half + 1), torch.arange(-half, half + 1), indexing="ij")
    )
    centre_row, centre_column = rows, columns
    if border == "shift":
        centre_row, centre_column = rows.clamp(half, height - 1 - half), columns.clamp(half, width - 1 - half)
    at_row, at_column = centre_row[:, None] + down, centre_column[:, None] + right
    inside = (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
    if border == "wrap":
        at_row, at_column, inside = at_row % height, at_column % width, torch.ones_like(inside)
    index = at_row.clamp(0, height - 1) * width + at_column.clamp(0, width - 1)
    if not include_self:
        own = index == torch.arange(height * width)[:, None]
        own &= inside
        # exactly one entry of each row is the patch itself: the others keep their order
        order = own.to(torch.uint8).argsort(dim=1, stable=True)[:, :-1]
        index, inside = index.gather(1, order), inside.gather(1, order)
    return index.to(device), inside.to(device)


@dataclass
class Neighbours:
    """`index` int64 [B, N, k]; `valid` bool [B, N, k], or None when all are neighbours."""

    index: Tensor
    valid: Tensor | None


@torch.no_grad()
def choose_neighbours(features: Tensor, grid: tuple[int, int], settings: Neighbourhood) -> Neighbours:
    """The k candidates of highest cosine similarity, of the same image.

    Time and memory are linear in patches x candidates; only "all patches" compares every pair.

    Args:
        features: [B, N, D], N = grid height x width, in raster order.

    Raises:
        ValueError: the grid is smaller than the window.
    """
    settings.check(grid)
    unit = F.normalize(features.float(), dim=-1)
    if not settings.window:
        with torch.autocast(
            features.device.type, enabled=False
        ):  # rounded similarities choose other neighbours
            similar = unit @ unit.transpose(1, 2)
        if not settings.include_self:
            similar.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
        return Neighbours(similar.topk(settings.k, dim=-1).indices, None)
    table, inside = candidate_table(
        grid, settings.window, settings.include_self, settings.border, features.device
    )
    # one column of candidates at a time: gathering all at once would hold window^2 copies of the features
    similar = torch.stack([(unit * unit[:, column]).sum(-1) for column in table.unbind(1)], dim=-1)
    if settings.border == "mask":
        similar = similar.masked_fill(~inside, float("-inf"))
    best = similar.topk(settings.k, dim=-1)
    index = table.expand(len(features), -1, -1).gather(2, best.indices)
    return Neighbours(index, best.values.isfinite() if settings.border == "mask" else None)


def shared_with(chosen: Neighbours, reference: Neighbours) -> Tensor:
    """Share of the chosen neighbours [B, N, k] that are also in `reference` [1 or B, N, k]; 0-dimensional."""
    found = (chosen.index[..., None] == reference.index[..., None, :]).any(-1)
    if chosen.valid is None:
        return found.float().mean()
    return (found & chosen.valid).float().sum() / chosen.valid.sum()


def pick_neighbours(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D] at index int64 [B, n, k] -> [B, n, k, D]."""
    flat = index.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, flat).unflatten(1, index.shape[1:])
