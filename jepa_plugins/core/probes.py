"""A linear probe of frozen features: what is linearly readable from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised features; see `fit_linear`."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """[n, C] -> class ids int64 [n]."""
        return F.linear((features - self.mean) / self.scale, self.weight, self.bias).argmax(-1)


def fit_linear(
    features: Tensor, labels: Tensor, classes: int, *, l2: float = 1e-4, steps: int = 200
) -> LinearProbe:
    """Fit by L-BFGS from zero weights, so that the result has no random part.

    Args:
        features: float32 [n, C]; labels: int64 [n] in [0, classes).
        l2: weight of half the squared norm of the weights, beside the mean cross-entropy.
        steps: largest number of L-BFGS iterations.
    """
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    x = (features - mean) / scale
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return LinearProbe(mean, scale, weight.detach(), bias.detach())


def confusion_matrix(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 [classes, classes]: rows are the truth."""
    return torch.bincount(truth * classes + predicted, minlength=classes * classes).view(classes, classes)


def scores(matrix: Tensor) -> dict[str, float]:
    """mIoU over the classes that occur, and accuracy, in percent."""
    hits = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    occurs = union > 0
    return {
        "mIoU": float(100 * (hits[occurs] / union[occurs]).mean()),
        "accuracy": float(100 * hits.sum() / matrix.sum()),
    }


def spread_subset(count: int, most: int) -> Tensor:
    """At most `most` indices below `count`, evenly spread: int64."""
    if count <= most:
        return torch.arange(count)
    return torch.linspace(0, count - 1, most).round().long()
