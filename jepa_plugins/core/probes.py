"""Probes of frozen dense features: a linear classifier, k nearest neighbours, k-means; and the floors beside them.

Each is fitted on labelled cells of one set and scored on another's. No part of them is random but the start of
k-means, whose seed is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

PROBES = ("linear", "knn", "kmeans")
FLOORS = ("position", "colour_position", "pixels_position")
SCORES_AT_ONCE = 2**22  # similarities or distances held in memory at a time


@dataclass(frozen=True)
class Cells:
    """Labelled cells: `features` float32 [n, C], `labels` int64 [n]."""

    features: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Cells:
        """A copy on another device."""
        return Cells(self.features.to(device), self.labels.to(device))


# --- linear


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


def standard_scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of features [n, C]; a constant channel, which nothing can be read from,
    gets a scale of 1."""
    deviation = features.std(0, correction=0)
    return features.mean(0), torch.where(deviation > 1e-6, deviation, 1.0)


@torch.enable_grad()
def fit_linear(
    features: Tensor, labels: Tensor, classes: int, *, l2: float = 1e-4, steps: int = 200
) -> LinearProbe:
    """Fit by L-BFGS from zero weights, so that the result has no random part.

    Args:
        features: float32 [n, C]; labels: int64 [n] in [0, classes).
        l2: weight of half the squared norm of the weights, beside the mean cross-entropy.
        steps: largest number of L-BFGS iterations.
    """
    mean, scale = standard_scale(features)
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


# --- k nearest neighbours


def knn_predict(
    train: Cells, features: Tensor, classes: int, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Vote of the k nearest training cells by cosine, each weighted by exp(cosine / temperature) (Wu et al.,
    "Unsupervised feature learning via non-parametric instance discrimination", 2018, section 3.4).

    Args:
        train: the cells that vote; fewer than k all vote.
        features: [m, C], compared as they are: centre them first where a common mean rules their direction.

    Returns:
        int64 [m]. At most `SCORES_AT_ONCE` similarities are held at a time.
    """
    k = min(k, len(train.labels))
    known = F.normalize(train.features, dim=1)
    predicted = []
    for part in features.split(max(SCORES_AT_ONCE // len(known), 1)):
        similarity, nearest = (F.normalize(part, dim=1) @ known.T).topk(k, dim=1)
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, train.labels[nearest], (similarity / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted) if predicted else train.labels.new_empty(0)


# --- k-means


@dataclass(frozen=True)
class KMeans:
    """Cluster centres [k, C], and the mean squared distance of the fitted vectors to theirs."""

    centres: Tensor
    inertia: float

    def predict(self, features: Tensor) -> Tensor:
        """[n, C] -> index of the nearest centre, int64 [n]."""
        return _nearest(features, self.centres)[0]


def _nearest(features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest centre and squared distance to it, both [n]."""
    middle = centres.mean(0)  # near the origin the squares lose no digits
    moved = centres - middle
    squares = moved.square().sum(1)
    parts = []
    for part in features.split(max(SCORES_AT_ONCE // len(centres), 1)):
        x = part - middle
        score, index = torch.addmm(squares, x, moved.T, alpha=-2).min(1)
        parts.append((index, (score + x.square().sum(1)).clamp(min=0)))
    return torch.cat([index for index, _ in parts]), torch.cat([distance for _, distance in parts])


def _spread_centres(features: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k vectors, each drawn in proportion to the squared distance from those before it (k-means++: Arthur and
    Vassilvitskii, 2007)."""
    first = int(torch.randint(len(features), (1,), generator=generator))
    centres = [features[first]]
    distance = (features - features[first]).square().sum(1)
    for _ in range(1, k):
        weight = distance.cpu().double()  # drawn on the CPU, so that every device draws the same
        weight = weight if bool(weight.any()) else torch.ones_like(weight)  # only copies are left
        place = torch.rand((), generator=generator, dtype=torch.float64) * weight.sum()
        chosen = min(int(torch.searchsorted(weight.cumsum(0), place, right=True)), len(features) - 1)
        centres.append(features[chosen])
        distance = torch.minimum(distance, (features - features[chosen]).square().sum(1))
    return torch.stack(centres)


def fit_kmeans(
    features: Tensor, k: int, *, seed: int = 0, restarts: int = 4, iterations: int = 100
) -> KMeans:
    """k-means by Lloyd's iterations from k-means++ starts; the best of `restarts` by inertia.

    Args:
        features: float32 [n, C]. seed: of the starts; the same data and seed give the same clusters.
        iterations: at most, for each start; they stop when no vector changes its cluster.

    Raises:
        ValueError: fewer vectors than clusters.
    """
    if len(features) < k:
        raise ValueError(f"k-means with {k} clusters needs as many vectors, got {len(features)}")
    generator = torch.Generator().manual_seed(seed)
    best: KMeans | None = None
    for _ in range(restarts):
        found = _lloyd(features, _spread_centres(features, k, generator), iterations)
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None
    return best


def _lloyd(features: Tensor, centres: Tensor, iterations: int) -> KMeans:
    labels, distance = _nearest(features, centres)
    for _ in range(iterations):
        counts = torch.bincount(labels, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, labels, features)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        before = labels
        labels, distance = _nearest(features, centres)
        if torch.equal(labels, before):
            break
    return KMeans(centres, float(distance.double().mean()))


# --- scores


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


def assign_clusters(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The one-to-one names of clusters that agree with the most labels.

    Args:
        counts: [n, n], how often the vectors of a cluster (rows) have a class (columns).

    Returns:
        The class of each cluster, int64 [n].
    """
    from scipy.optimize import linear_sum_assignment  # the one part of core that needs it

    return linear_sum_assignment(counts, maximize=True)[1]


def probe_scores(train: Cells, val: Cells, classes: int, kinds: Sequence[str] = PROBES) -> dict[str, float]:
    """mIoU and accuracy of each probe fitted on `train` and scored on `val`, in percent.

    All three see features standardised by the training cells. k-means makes as many clusters as there are
    classes and sees no label; each cluster is then named after one class by the training labels.

    Args:
        kinds: some of `PROBES`.

    Returns:
        "linear_mIoU", "linear_accuracy", "knn_mIoU", ...
    """
    mean, scale = standard_scale(train.features)
    known = Cells((train.features - mean) / scale, train.labels)
    unseen = (val.features - mean) / scale

    def by_kmeans() -> Tensor:
        clusters = fit_kmeans(known.features, classes)
        counts = confusion_matrix(clusters.predict(known.features), known.labels, classes)
        names = torch.from_numpy(assign_clusters(counts.cpu().numpy())).to(unseen.device)
        return names[clusters.predict(unseen)]

    predict = {
        "linear": lambda: fit_linear(train.features, train.labels, classes).predict(val.features),
        "knn": lambda: knn_predict(known, unseen, classes),
        "kmeans": by_kmeans,
    }
    return {
        f"{kind}_{name}": value
        for kind in kinds
        for name, value in scores(confusion_matrix(val.labels, predict[kind](), classes)).items()
    }


# --- cells


def spread_subset(count: int, most: int) -> Tensor:
    """At most `most` indices below `count`, evenly spread: int64."""
    if count <= most:
        return torch.arange(count)
    return torch.linspace(0, count - 1, most).round().long()


def at_cell_centres(labels: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """The label under the centre of each cell of a height x width grid: [H, W] -> [height, width]."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    return labels[np.ix_(rows, columns)]


def wave_code(values: Tensor, octaves: int = 4) -> Tensor:
    """Sines and cosines of values in [0, 1] at half a turn, a turn, two turns, ...: [..., q] ->
    [..., q * 2 * octaves]. They let a linear probe, cosines and distances read a plain number."""
    phase = values[..., None] * (math.pi * 2.0 ** torch.arange(octaves, device=values.device))
    return torch.cat((phase.sin(), phase.cos()), dim=-1).flatten(-2)


def floor_maps(images: Tensor, stride: int) -> dict[str, Tensor]:
    """What is known of a cell without any network: what features have to beat.

    Args:
        images: uint8 [B, c, H, W], sides multiples of `stride` in pixels.

    Returns:
        "position" [B, 16, H/stride, W/stride], the cell's place in the image; "colour_position"
        [B, 16 + 8c, ...], with its mean colour; each as `wave_code`. "pixels_position"
        [B, 16 + c * stride ** 2, ...], with all of its pixels in [0, 1].
    """
    colour = F.avg_pool2d(images.float() / 255, stride).permute(0, 2, 3, 1)
    batch, height, width, _ = colour.shape
    rows = (torch.arange(height, device=images.device) + 0.5) / height
    columns = (torch.arange(width, device=images.device) + 0.5) / width
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).expand(batch, -1, -1, -1)
    both = torch.cat((place, colour), dim=-1)
    coded = {"position": wave_code(place), "colour_position": wave_code(both)}
    floors = {name: code.permute(0, 3, 1, 2) for name, code in coded.items()}
    pixels = F.pixel_unshuffle(images.float() / 255, stride)
    return {**floors, "pixels_position": torch.cat((floors["position"], pixels), dim=1)}
