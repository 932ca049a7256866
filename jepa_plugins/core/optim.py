"""Optimisers that clip the gradient of the whole model, so that any training loop that calls `step` clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Clipping(torch.optim.Optimizer):
    """Mixin: before each step clip the norm of all gradients together to `max_norm`; remember it in
    `grad_norm`."""

    max_norm: float | None = None
    grad_norm: Tensor | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip, then step. Under AMP the gradient scaler has unscaled the gradients by now."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        limit = float("inf") if self.max_norm is None or self.max_norm <= 0 else self.max_norm
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return super().step(closure)


class ClippedAdamW(_Clipping, torch.optim.AdamW):
    """AdamW with full-model clipping.

    Args:
        max_norm: largest norm of the whole gradient; None or 0 clips nothing (the norm is measured all the
            same).
    """

    def __init__(self, params: Any, *, max_norm: float | None = None, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.max_norm = max_norm


class ClippedSGD(_Clipping, torch.optim.SGD):
    """SGD with full-model clipping; arguments as `ClippedAdamW`."""

    def __init__(self, params: Any, *, max_norm: float | None = None, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.max_norm = max_norm
