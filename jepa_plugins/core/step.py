"""What a training step of either method gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class StepOutput:
    """What one forward gives: losses (to be summed), metrics (to be logged) and, if asked for, the maps
    behind them."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    maps: dict[str, Tensor] = field(default_factory=dict)


def merge(into: StepOutput, part: StepOutput, weight: float) -> None:
    """Add a part's losses, weighted, its metrics and its maps."""
    into.losses.update({name: weight * loss for name, loss in part.losses.items()})
    into.metrics.update(part.metrics)
    into.maps.update(part.maps)


def channel_variance(vectors: Tensor) -> Tensor:
    """Variance of [n, C] over n, averaged over channels; 0-dimensional."""
    return vectors.float().var(dim=0, unbiased=False).mean()


def channel_moments(vectors: Tensor) -> Tensor:
    """Mean and mean square of [n, C] over n: [2, C] float32. The moments of a whole are the means of its parts'."""
    vectors = vectors.float()
    mean = vectors.mean(dim=0)
    # through the variance, which keeps the digits that a mean of squares loses
    return torch.stack([mean, vectors.var(dim=0, unbiased=False) + mean.square()])


def variance_of(moments: Tensor) -> Tensor:
    """What `channel_variance` gives, from `channel_moments` [2, C]."""
    return (moments[1] - moments[0].square()).clamp(min=0).mean()
