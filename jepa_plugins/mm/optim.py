"""Optimiser, schedules and optimisation step of the pre-training recipes."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
)
from torch import nn

from jepa_plugins.core.schedules import rising, warmup_cosine

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


def accumulation_of(optim_wrapper: Any) -> int:
    """Iterations an optimiser step, of an optimiser wrapper or of its configuration.

    Raises:
        ValueError: it is no number from 1 on.
    """
    if not isinstance(optim_wrapper, Mapping):
        return optim_wrapper._accumulative_counts
    count = optim_wrapper.get("accumulative_counts", 1)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"optim_wrapper.accumulative_counts is a whole number from 1 on, got {count!r}")
    return count


@OPTIM_WRAPPERS.register_module()
class PretrainOptimWrapper(OptimWrapper):
    """Autocast on any device, the gradient's norm in the log, and no step along one that is not finite.

    Args:
        dtype: of autocast, "bfloat16" or "float32" for none; weights and optimiser stay in float32.

    Raises:
        ValueError: for another dtype, or a clip_grad that is no dict.
    """

    def __init__(self, *args: Any, dtype: str = "float32", **kwargs: Any) -> None:
        clip = kwargs.get("clip_grad")
        if clip is not None and not isinstance(clip, Mapping):
            raise ValueError(f"optim_wrapper.clip_grad is dict(max_norm={clip!r}) or None, got {clip!r}")
        super().__init__(*args, **kwargs)
        if dtype not in DTYPES:
            raise ValueError(
                f"optim_wrapper.dtype is one of {', '.join(DTYPES)}, got {dtype!r} (float16 needs loss scaling: "
                "take mmengine's AmpOptimWrapper, on a GPU)"
            )
        self.dtype = DTYPES[dtype]

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """As mmengine's, under autocast."""
        device = next(model.parameters()).device.type
        with (
            super().optim_context(model),
            torch.autocast(device, dtype=self.dtype, enabled=self.dtype is not None),
        ):
            yield

    def step(self, **kwargs: Any) -> None:
        """Measure and log the norm of the whole gradient, before any clipping, then step.

        Raises:
            FloatingPointError: it is NaN or infinite; the weights stay as they are.
        """
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm}: lower the learning rate, or resume from an earlier checkpoint"
            )
        self.message_hub.update_scalar("train/grad_norm", norm)
        super().step(**kwargs)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights, and biases and 1-D tensors without weight decay, which "decayed" tells apart where the decay begins
    at 0; parameters without gradient are left out."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.dim() == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": decayed, "decayed": True}, {"params": plain, "weight_decay": 0.0, "decayed": False}]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PretrainOptimWrapperConstructor:
    """Builds the optimiser of `parameter_groups`, and its wrapper."""

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if paramwise_cfg:
            raise ValueError("PretrainOptimWrapperConstructor takes no paramwise_cfg: remove it")
        self.config = dict(optim_wrapper_cfg)
        self.optimizer = self.config.pop("optimizer")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, "module", model)
        optimizer = OPTIMIZERS.build({**self.optimizer, "params": parameter_groups(model)})
        return OPTIM_WRAPPERS.build(
            {"type": "PretrainOptimWrapper", **self.config}, default_args={"optimizer": optimizer}
        )


class _StepSchedule(_ParamScheduler):
    """A schedule over optimiser steps; optimiser step number i (0-based) takes the value at i + 1.

    `configure` tells the length of the run, when the loop knows it.
    """

    def __init__(
        self,
        optimizer: Any,
        param_name: str,
        total: int | None,
        *,
        epoch_length: int | None = None,
        end: int | None = None,
        last_step: int = -1,
        verbose: bool = False,
    ) -> None:
        # mmengine fills in the length of an epoch and an end in epochs, which a schedule in steps has no use for
        self.total, self.accumulation = total, 1
        super().__init__(optimizer, param_name, last_step=last_step, by_epoch=False, verbose=verbose)

    def step(self) -> None:
        """As mmengine's, whose warning that no optimiser step came before is wrong under accumulation."""
        with warnings.catch_warnings() if self._global_step == 0 else contextlib.nullcontext():
            if self._global_step == 0:
                warnings.filterwarnings("ignore", "Detected call of")
            super().step()

    def configure(self, total: int, accumulation: int, steps_per_epoch: int, batch: int) -> None:
        """Optimiser steps of the run, iterations a step, steps an epoch, images a step; sets the current values."""
        self.total, self.accumulation = total, accumulation
        self._configured(steps_per_epoch, batch)
        for group, value in zip(self.optimizer.param_groups, self._get_value(), strict=True):
            group[self.param_name] = value
        self._last_value = [group[self.param_name] for group in self.optimizer.param_groups]

    def _configured(self, steps_per_epoch: int, batch: int) -> None:
        pass

    def _get_value(self) -> list[float]:
        if self.total is None:
            if self.last_step > 0:
                raise ValueError(
                    f"the length of {type(self).__name__} is not known: train with PretrainLoop "
                    "(train_cfg.type), or give its total optimiser steps"
                )
            return [group[self.param_name] for group in self.optimizer.param_groups]
        return self._values(self.last_step // self.accumulation + 1, self.total)

    def _values(self, step: int, total: int) -> list[float]:
        raise NotImplementedError


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_StepSchedule):
    """Learning rate: linear warm-up from `start` to the optimiser's, then half a cosine to `final`.

    Args:
        start, final: at the first and last step. warmup_epochs, or warmup_steps: length of the warm-up.
        ref_batch: batch that the learning rates are meant for; all are scaled by the batch over it. None scales
            nothing.
        total: optimiser steps of the run, set by `PretrainLoop`.
    """

    def __init__(
        self,
        optimizer: Any,
        start: float,
        final: float,
        warmup_epochs: float | None = None,
        warmup_steps: int | None = None,
        ref_batch: int | None = None,
        total: int | None = None,
        **kwargs: Any,
    ) -> None:
        if (warmup_epochs is None) == (warmup_steps is None):
            raise ValueError("WarmupCosineLR takes either warmup_epochs or warmup_steps")
        self.start, self.final = start, final
        self.warmup_epochs, self.warmup, self.ref_batch = warmup_epochs, warmup_steps or 0, ref_batch
        self.scale = 1.0
        super().__init__(optimizer, "lr", total, **kwargs)

    def _configured(self, steps_per_epoch: int, batch: int) -> None:
        if self.warmup_epochs is not None:
            self.warmup = round(self.warmup_epochs * steps_per_epoch)
        self.scale = 1.0 if self.ref_batch is None else batch / self.ref_batch
        if self.total is not None and self.warmup >= self.total:
            raise ValueError(
                f"the warm-up of {self.warmup:,} steps is no shorter than the run of {self.total:,}: set a shorter "
                "warmup_epochs or warmup_steps in param_scheduler, or a longer run"
            )

    def describe(self) -> str:
        """The learning rates in use, for the log."""
        rates = [self.start * self.scale, max(self.base_values) * self.scale, self.final * self.scale]
        text = "warm-up from {:.3g} to {:.3g}, cosine to {:.3g}".format(*rates)
        if self.ref_batch is None:
            return f"{text}, over {self.warmup:,} of {self.total:,} steps, not scaled"
        return f"{text}, over {self.warmup:,} of {self.total:,} steps; scaled by {self.scale:g}, of {self.ref_batch}"

    def _values(self, step: int, total: int) -> list[float]:
        return [
            self.scale * warmup_cosine(step, total, self.warmup, self.start, peak, self.final)
            for peak in self.base_values
        ]


@PARAM_SCHEDULERS.register_module()
class RisingWeightDecay(_StepSchedule):
    """Weight decay: from the optimiser's to `final`, "linear" or half a "cosine"; groups without decay keep none."""

    def __init__(
        self, optimizer: Any, final: float, shape: str = "linear", total: int | None = None, **kwargs: Any
    ) -> None:
        rising(0, 1, 0.0, 1.0, shape)  # refuses an unknown shape at once
        self.final, self.shape = final, shape
        self.decayed = [group.get("decayed", group["weight_decay"] > 0) for group in optimizer.param_groups]
        super().__init__(optimizer, "weight_decay", total, **kwargs)

    def describe(self) -> str:
        """The values in use, for the log."""
        return f"{self.shape}, from {max(self.base_values):g} to {self.final:g}"

    def _values(self, step: int, total: int) -> list[float]:
        return [
            rising(step, total, start, self.final, self.shape) if decayed else 0.0
            for start, decayed in zip(self.base_values, self.decayed, strict=True)
        ]
