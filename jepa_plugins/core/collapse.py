"""Measures that tell learning from collapse; a falling loss alone does not."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_VECTORS = 2048


def rank_me(vectors: Tensor, *, centred: bool) -> float:
    """Effective rank: the exponential of the entropy of the singular values (Garrido et al., RankMe, 2023).

    Args:
        vectors: [n, C]; of more than 2,048 an evenly spaced subset is used. centred: subtract the mean
            vector first.

    Returns:
        Between 1 and min(n, C); 1 when all vectors are zero; NaN when one is not finite.
    """
    if len(vectors) > MAX_VECTORS:
        step = torch.linspace(0, len(vectors) - 1, MAX_VECTORS, device=vectors.device).long()
        vectors = vectors[step]
    vectors = vectors.detach().float()
    if not bool(vectors.isfinite().all()):
        return float("nan")  # torch's decomposition would end the run, before what is wrong is said in words
    if centred:
        vectors = vectors - vectors.mean(0)
    values = torch.linalg.svdvals(vectors)
    shares = values / values.sum().clamp(min=1e-12)
    return float((-(shares * shares.clamp(min=1e-12).log()).sum()).exp())


def rank_metrics(target: Tensor) -> dict[str, float]:
    """RankMe of [B, cells, C]: pooled over cells and dense, raw and centred."""
    pooled, dense = target.mean(1), target.flatten(0, 1)
    return {
        f"rankme_{name}_{kind}": rank_me(vectors, centred=kind == "centred")
        for name, vectors in (("pooled", pooled), ("dense", dense))
        for kind in ("raw", "centred")
    }


RECOVERED = 2.0  # above so many times its floor a measure may be warned of again


class CollapseWatch:
    """Says in words when the target collapses: once, and again when it had recovered in between.

    Args:
        variance_floor: warn when the target's variance falls below this share of its first value.
        rank_floor: warn when the dense centred RankMe falls below this share of its first value.
    """

    def __init__(self, variance_floor: float = 0.25, rank_floor: float = 0.35) -> None:
        self.floors = {"target_variance": variance_floor, "rankme_dense_centred": rank_floor}
        self.first: dict[str, float] = {}
        self.warned: set[str] = set()

    def state_dict(self) -> dict:
        """What a resume needs."""
        return {"first": dict(self.first), "warned": sorted(self.warned)}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.first = dict(state["first"])
        self.warned = set(state["warned"])

    def update(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Take the metrics of a step, each of as many images as before; returns the new warnings."""
        sentences = []
        for name, floor in self.floors.items():
            if name not in metrics:
                continue
            first = self.first.setdefault(name, metrics[name])
            if metrics[name] > min(RECOVERED * floor, 1.0) * first:
                self.warned.discard(name)
            if metrics[name] < floor * first and name not in self.warned:
                self.warned.add(name)
                sentences.append(
                    f"step {step}: the target is collapsing: {name} is {metrics[name]:.3g}, below "
                    f"{floor:.0%} of its first value {first:.3g}. A falling loss means nothing now; lower "
                    "the learning rate or raise the EMA momentum."
                )
        return sentences


class HeldOutMeter:
    """Explained variance of the prediction and R2 of denoising on held-out images of one size.

    The prediction is measured against two references: the variance over all cells and images, and the
    variance over images at the same cell, which a prediction that knows only the position would reach.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._pooled: list[Tensor] = []

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().double().cpu()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def update(self, maps: dict[str, Tensor]) -> None:
        """Take one batch's maps, as `MaskJEPAHead.forward` returns them."""
        if "target" in maps:
            target = maps["target"]  # [B, cells, C]
            self._add("images", torch.tensor(float(len(target))))
            self._add("cell_sum", target.sum(0))
            self._add("cell_square", target.square().sum(0))
            self._add("error", maps["errors"].sum() / target.shape[-1])
            self._add("hidden", maps["hidden_count"])
            self._pooled.append(target.detach().mean(1).cpu())
        if "denoise_error" in maps:
            self._add("denoise_error", maps["denoise_error"])
            self._add("noise_count", maps["denoise_count"])
            self._add("noise_sum", maps["denoise_sum"])
            self._add("noise_square", maps["denoise_square"])

    def merge(self, other: HeldOutMeter) -> None:
        """Add what another process measured."""
        for name, value in other._sums.items():
            self._add(name, value)
        self._pooled.extend(other._pooled)

    def result(self) -> dict[str, float]:
        """Metrics of everything seen; empty before the first batch."""
        sums, out = self._sums, {}
        if "images" in sums:
            images, cells = sums["images"], sums["cell_sum"].shape[0]
            mean_square = sums["cell_square"].sum(0) / (images * cells)
            overall = (mean_square - (sums["cell_sum"].sum(0) / (images * cells)).square()).mean()
            at_cell = (sums["cell_square"] / images - (sums["cell_sum"] / images).square()).mean()
            error = sums["error"] / sums["hidden"]
            out = {
                "target_variance": float(overall),
                "position_explained_variance": float(1 - at_cell / overall),
                "explained_variance": float(1 - error / overall),
                "explained_variance_beyond_position": float(1 - error / at_cell)
                if images > 1
                else float("nan"),
                # Over all images, which a batch of training has too few of.
                "rankme_pooled_centred": rank_me(torch.cat(self._pooled), centred=True),
            }
        if "denoise_error" in sums:
            mean = sums["noise_sum"] / sums["noise_count"]
            variance = (sums["noise_square"] / sums["noise_count"] - mean.square()).mean()
            error = sums["denoise_error"] / (sums["noise_count"] * len(mean))
            out["denoise_r2"] = float(1 - error / variance)
        return out
