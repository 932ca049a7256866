"""The training loop: counts in optimiser steps, checks the recipe, resumes without reading what it skips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop

from jepa_plugins.core.random import iteration_seed
from jepa_plugins.core.sources import UnreadableImages
from jepa_plugins.mm.data import RunBatchSampler
from jepa_plugins.mm.model import DMTJEPA
from jepa_plugins.mm.optim import accumulation_of


@LOOPS.register_module()
class PretrainLoop(IterBasedTrainLoop):
    """Training by optimiser steps on a `RunBatchSampler`.

    Args:
        epochs, or steps: length of the run, in passes over the data or in optimiser steps.
        recipe: what the run must agree with, any of dict(batch, images, steps_per_epoch, steps); None accepts
            whatever the data and the processes give.
        max_bad: largest tolerated share of unreadable images.

    Raises:
        ValueError: one sentence for a run that is not the recipe's, or for another sampler.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        epochs: float | None = None,
        steps: int | None = None,
        recipe: Mapping[str, int] | None = None,
        max_bad: float = 0.01,
        **kwargs: Any,
    ) -> None:
        if isinstance(dataloader, Mapping):
            dataloader = runner.build_dataloader(dataloader, seed=runner.seed)
        sampler = dataloader.batch_sampler
        if not isinstance(sampler, RunBatchSampler):
            raise ValueError(
                "PretrainLoop needs train_dataloader.batch_sampler = dict(type='RunBatchSampler'), "
                f"got {type(sampler).__name__}"
            )
        self.sampler = sampler
        self.accumulation = sampler.accumulation = accumulation_of(runner.optim_wrapper)
        self.steps = run_length(epochs, steps, sampler.steps_per_epoch)
        if not 0 <= max_bad <= 1:
            raise ValueError(f"train_cfg.max_bad is a share from 0 to 1, got {max_bad}")
        self.max_bad = max_bad
        check_recipe(recipe, sampler, self.steps)
        super().__init__(runner, dataloader, max_iters=self.steps * self.accumulation, **kwargs)
        # Some versions of mmengine start the workers here, at the first image; `run` starts them where it resumes.
        self.dataloader_iterator = None

    def run(self) -> Any:
        """Train to the end; returns the model."""
        runner = self.runner
        self._prepare()
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        unreadable = UnreadableImages(
            self.dataloader.dataset.files,
            runner.work_dir,
            self.max_bad,
            rank=get_rank(),
            resume=self._iter > 0,
            limit_key="train_cfg.max_bad",
        )
        batches = iter(self.dataloader)
        while self._iter < self._max_iters and not self.stop_training:
            runner.model.train()
            batch = next(batches)
            unreadable.update(batch.pop("reports"))
            # Here, so that what the model draws depends neither on how the data is read nor on what ran before.
            torch.manual_seed(iteration_seed(runner.seed, self._iter, get_rank()))
            self.run_iter(batch)
            self._decide_current_val_interval()
            if (
                runner.val_loop is not None
                and self._iter >= self.val_begin
                and (self._iter % self.val_interval == 0 or self._iter == self._max_iters)
            ):
                runner.val_loop.run()
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _prepare(self) -> None:
        """Tell everybody the length of the run, and where it stands."""
        runner, sampler = self.runner, self.sampler
        sampler.start = self._iter
        sampler.sampler.seed = runner.seed  # a resumed run takes its checkpoint's
        model = getattr(runner.model, "module", runner.model)
        if isinstance(model, DMTJEPA):
            if self._iter != model.steps_done * self.accumulation:
                raise ValueError(
                    f"the run stands at iteration {self._iter}, its model at step {model.steps_done} of "
                    f"{self.accumulation} accumulated iterations: resume with default_hooks.checkpoint = "
                    "dict(type='PretrainCheckpointHook'), which counts them anew"
                )
            model.total_steps, model.accumulation = self.steps, self.accumulation
        for scheduler in runner.param_schedulers or []:
            if hasattr(scheduler, "configure"):
                scheduler.configure(
                    self.steps, self.accumulation, sampler.steps_per_epoch, sampler.global_batch
                )
        runner.logger.info("%s", self.summary())

    def summary(self) -> str:
        """What the run is, in lines of text."""
        runner, sampler = self.runner, self.sampler
        images, per_epoch = sampler.sampler.size, sampler.steps_per_epoch
        batch, world = sampler.global_batch, get_world_size()
        model = getattr(runner.model, "module", runner.model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        dtype = getattr(runner.optim_wrapper, "dtype", None)
        rows = {
            "model": f"{type(model).__name__}, {total:,} parameters, of which {trained:,} trained",
            "data": f"{images:,} images, {per_epoch:,} steps an epoch"
            + ("" if images % batch == 0 else " (the last is smaller)" * (not sampler.drop_last)),
            "effective batch": f"{batch} = {sampler.batch_size} images x {world} processes x "
            f"{self.accumulation} accumulated",
            "length": f"{self.steps:,} steps, {self.steps / per_epoch:,.2f} epochs, "
            f"{self.steps * (batch if sampler.drop_last else images / per_epoch):,.0f} images",
            "precision": "float32" if dtype is None else f"mixed, {str(dtype).removeprefix('torch.')}",
            "device": f"{world} x {next(model.parameters()).device.type}, {torch.get_num_threads()} threads each",
        }
        for scheduler in runner.param_schedulers or []:
            if hasattr(scheduler, "describe"):
                rows[scheduler.param_name.replace("_", " ")] = scheduler.describe()
        if isinstance(model, DMTJEPA):
            rows["method"] = str(model.settings)
            rows["EMA momentum"] = f"{model.ema[0]:g} to {model.ema[1]:g}"
        if self._iter:
            rows["resumed"] = f"at step {self._iter // self.accumulation:,}"
        width = max(map(len, rows))
        return "\n".join(["start-up summary", *(f"  {k.ljust(width)}  {v}" for k, v in rows.items())])


def run_length(epochs: float | None, steps: int | None, steps_per_epoch: int) -> int:
    """Optimiser steps of a run; ValueError unless one of the two is given, and at least one step."""
    if (epochs is None) == (steps is None):
        raise ValueError("train_cfg takes either epochs or steps; set the other to None")
    length = round((epochs or 0) * steps_per_epoch) if steps is None else steps
    if not isinstance(length, int) or length < 1:
        raise ValueError(
            f"train_cfg.{'epochs' if steps is None else 'steps'} gives a run of {length!r} steps: it takes a whole "
            "number from 1 on"
        )
    return length


def check_recipe(recipe: Mapping[str, int] | None, sampler: RunBatchSampler, steps: int) -> None:
    """Raise ValueError when a run is not what its recipe says."""
    found = {
        "batch": sampler.global_batch,
        "images": sampler.sampler.size,
        "steps_per_epoch": sampler.steps_per_epoch,
        "steps": steps,
    }
    wanted = dict(recipe or {})
    if unknown := [name for name in wanted if name not in found]:
        raise ValueError(f"train_cfg.recipe has no {', '.join(unknown)}; it knows {', '.join(found)}")
    wrong = [
        f"{name.replace('_', ' ')} {found[name]:,} instead of {value:,}"
        for name, value in wanted.items()
        if found[name] != value
    ]
    if not wrong:
        return
    batch = wanted.get("batch", found["batch"])
    parts = sampler.batch_size * sampler.world
    hint = ""
    if batch != found["batch"] and batch % parts == 0:
        hint = f"set optim_wrapper.accumulative_counts={batch // parts} for the recipe's batch, or "
    raise ValueError(
        f"the run is not its recipe's: {'; '.join(wrong)} (the batch is {sampler.batch_size} images x "
        f"{sampler.world} processes x {sampler.accumulation} accumulated): {hint}set train_cfg.recipe=None to "
        "train it as it is"
    )
