"""Optimisers that clip the gradient of the whole model and accumulate gradients, so that any training loop that
calls `zero_grad`, `backward` and `step` does so too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Clipping(torch.optim.Optimizer):
    """Mixin: each `accumulation`-th call of `step` moves the weights, by the mean gradient of these calls and after
    clipping the norm of all gradients together to `max_norm`; `grad_norm` remembers the norm before clipping.

    Accumulation serves loops that clear the gradients before every backward. Each call's gradient is taken as it is
    when `step` is called, hence under AMP after the gradient scaler has unscaled it.
    """

    max_norm: float | None = None
    grad_norm: Tensor | None = None
    accumulation: int = 1
    on_step: Callable[[], Any] | None = None  # called after each step that moved the weights

    def _configure(self, max_norm: float | None, accumulation: int) -> None:
        if accumulation < 1:
            raise ValueError(f"accumulation is {accumulation}; it counts the calls of a step, at least 1")
        self.max_norm, self.accumulation = max_norm, accumulation
        self._calls = 0  # since the last step
        self._sums: dict[Tensor, Tensor] = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Accumulate; when a step is due clip, then step. Returns the closure's value, if there is one."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if self.accumulation == 1 or self._gather():
            parameters = [p for p in self._parameters() if p.grad is not None]
            limit = float("inf") if self.max_norm is None or self.max_norm <= 0 else self.max_norm
            self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
            super().step()
            if self.on_step is not None:
                self.on_step()
        return value

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def _gather(self) -> bool:
        """Add this call's gradients; when a step is due put the mean in their place and say True."""
        for parameter in self._parameters():
            if parameter.grad is not None:
                total = self._sums.get(parameter)
                # A copy: the loop clears the gradient, or reuses its memory, before the next backward.
                self._sums[parameter] = (
                    parameter.grad.clone() if total is None else total.add_(parameter.grad)
                )
        self._calls += 1
        if self._calls < self.accumulation:
            return False
        for parameter, total in self._sums.items():
            parameter.grad = total.div_(self.accumulation)
        self._calls, self._sums = 0, {}
        return True

    def state_dict(self) -> dict[str, Any]:
        """As torch's; between two steps also the gradients accumulated so far."""
        state = super().state_dict()
        if self._calls:
            sums = [self._sums.get(parameter) for parameter in self._parameters()]
            state["accumulated"] = {"calls": self._calls, "sums": sums}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        state = dict(state_dict)
        part = state.pop("accumulated", {"calls": 0, "sums": []})
        super().load_state_dict(state)
        self._calls = part["calls"]
        self._sums = {
            parameter: total.to(parameter.device, copy=True)
            for parameter, total in zip(self._parameters(), part["sums"], strict=False)
            if total is not None
        }


class ClippedAdamW(_Clipping, torch.optim.AdamW):
    """AdamW with full-model clipping and accumulation.

    Args:
        max_norm: largest norm of the whole gradient; None or 0 clips nothing (the norm is measured all the
            same).
        accumulation: calls of `step` for each step that moves the weights.

    Raises:
        ValueError: for an accumulation below 1.
    """

    def __init__(
        self, params: Any, *, max_norm: float | None = None, accumulation: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(params, **kwargs)
        self._configure(max_norm, accumulation)


class ClippedSGD(_Clipping, torch.optim.SGD):
    """SGD with full-model clipping and accumulation; arguments as `ClippedAdamW`."""

    def __init__(
        self, params: Any, *, max_norm: float | None = None, accumulation: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(params, **kwargs)
        self._configure(max_norm, accumulation)
