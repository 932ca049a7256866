"""Learning rate and weight decay over a run (I-JEPA; DMT-JEPA, section 4.1 and appendix A.1)."""

from __future__ import annotations

import math


def _share(step: int, total: int) -> float:
    return min(step / max(total, 1), 1.0)


def warmup_cosine(step: int, total: int, warmup: int, start: float, peak: float, final: float) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then half a cosine to `final` at `total`.

    Optimiser step number i (0-based) uses `step` i + 1, as the published code does.
    """
    if step < warmup:
        return start + _share(step, warmup) * (peak - start)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * _share(step - warmup, total - warmup)))


def rising(step: int, total: int, start: float, final: float, shape: str = "linear") -> float:
    """From `start` to `final`, along a line or half a "cosine"; `step` counts as in `warmup_cosine`.

    Raises:
        ValueError: for another shape.
    """
    share = _share(step, total)
    if shape == "linear":
        return start + (final - start) * share
    if shape == "cosine":
        return final + (start - final) * 0.5 * (1 + math.cos(math.pi * share))
    raise ValueError(f"a weight decay schedule is linear or cosine, got {shape!r}")
