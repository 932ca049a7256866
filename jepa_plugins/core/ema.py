"""The target copies: exponential moving averages of the online modules (Mask-JEPA eq. 8; I-JEPA)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def momentum_at(step: int, total_steps: int, start: float, end: float) -> float:
    """Momentum of the update that follows optimiser step `step` (0-based): linear from `start` to `end`.

    `step` beyond `total_steps` keeps `end`.
    """
    share = min(step / max(total_steps, 1), 1.0)
    return start + (end - start) * share


def target_copy(module: M) -> M:
    """A copy that starts equal, never takes a gradient and is in eval mode."""
    target = copy.deepcopy(module)
    target.requires_grad_(False)
    return target.eval()


def _floating(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.is_floating_point()]


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target = momentum * target + (1 - momentum) * online, for parameters; buffers are copied."""
    targets = _floating(target.parameters())
    torch._foreach_lerp_(targets, _floating(online.parameters()), 1.0 - momentum)
    for ours, theirs in zip(target.buffers(), online.buffers(), strict=True):
        ours.copy_(theirs)
