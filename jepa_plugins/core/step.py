"""What a training step of either method gives."""

from __future__ import annotations

from dataclasses import dataclass, field

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
