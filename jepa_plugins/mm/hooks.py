"""Hooks: the targets' moving average, the collapse warning, and checkpoints that a crash cannot spoil."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from torch import Tensor

from jepa_plugins.core.checkpoints import atomic_write, load_into, state_dict_of
from jepa_plugins.core.collapse import CollapseWatch, HeldOutMeter
from jepa_plugins.core.labelled import labelled_images
from jepa_plugins.core.probes import PROBES
from jepa_plugins.core.probing import Protocol, Rows, check_classes, probe_floors, table, undisturbed
from jepa_plugins.core.sources import UnreadableImages
from jepa_plugins.mm.checkpoints import ATOMIC_BACKEND
from jepa_plugins.mm.data import Place, UnlabelledImages, collate_images
from jepa_plugins.mm.loops import PretrainLoop
from jepa_plugins.mm.model import DMTJEPA
from jepa_plugins.mm.optim import accumulation_of
from jepa_plugins.mm.probing import check_which, image_size, probe_vit

# of the configuration, in messages
HELD_OUT_KEYS = ("default_hooks.held_out.source (None measures nothing)", "default_hooks.held_out.root")
KEPT_HISTORY = 1000  # values of each logged scalar that a checkpoint keeps


def model_of(runner: Any) -> DMTJEPA:
    """The model inside its wrapper.

    Raises:
        ValueError: it is none of ours.
    """
    model = getattr(runner.model, "module", runner.model)
    if not isinstance(model, DMTJEPA):
        raise ValueError(
            f"the hooks of jepa_plugins.mm serve DMTJEPA, not {type(model).__name__}: remove them from "
            "custom_hooks"
        )
    return model


def plain(value: Any) -> Any:
    """The same nested dicts and lists without numpy's scalars and mmengine's `HistoryBuffer`, of which the newest
    values become two tensors."""
    if isinstance(value, dict):
        return type(value)((key, plain(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(plain(part) for part in value)
    if isinstance(value, HistoryBuffer):
        return [torch.as_tensor(part[-KEPT_HISTORY:], dtype=torch.float64) for part in value.data]
    return value.item() if isinstance(value, np.generic) else value


def go_on_at(checkpoint: dict[str, Any], steps: int, accumulation: int) -> None:
    """Count a checkpoint's iterations as this run does, which may accumulate another number of them a step."""
    iterations = steps * accumulation
    checkpoint["meta"]["iter"] = iterations
    schedules = checkpoint.get("param_schedulers") or []
    for state in schedules if isinstance(schedules, list) else []:
        state["last_step"] = state["_global_step"] = iterations


def without_step(weights: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """A model's weights without what counts its steps."""
    return OrderedDict(
        (name, value) for name, value in weights.items() if name not in ("step", "ema_pending")
    )


@HOOKS.register_module()
class TargetHook(Hook):
    """Moves DMTJEPA's targets once after each optimiser step, before a checkpoint is written."""

    priority = "ABOVE_NORMAL"

    def before_train(self, runner: Any) -> None:
        """Announce itself to the model."""
        model_of(runner).ema_by_hook = True

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """One update when this iteration moved the weights."""
        if runner.optim_wrapper.should_update():
            momentum = model_of(runner).update_target()
            runner.message_hub.update_scalar("train/ema_momentum", momentum)

    def after_train(self, runner: Any) -> None:
        """Without this hook nothing moves the targets any more."""
        model_of(runner).ema_by_hook = False


@HOOKS.register_module()
class CollapseHook(Hook):
    """Warns in words when the logged measures show a collapse.

    Args:
        variance_floor, rank_floor: see `CollapseWatch`.
    """

    def __init__(self, variance_floor: float = 0.25, rank_floor: float = 0.35) -> None:
        self.watch = CollapseWatch(variance_floor, rank_floor)

    def before_train(self, runner: Any) -> None:
        """A resumed run goes on with its first values."""
        if "collapse_watch" in runner.message_hub.runtime_info:
            self.watch.load_state_dict(runner.message_hub.get_info("collapse_watch"))

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Look at the metrics of a step, unless it is the smaller last one of an epoch."""
        sampler = runner.train_loop.dataloader.batch_sampler
        whole = min(sampler.global_batch, sampler.sampler.size)
        if not runner.optim_wrapper.should_update() or data_batch["place"].total < whole:
            return  # fewer images than before vary less without any collapse
        metrics = {name: float(outputs[name]) for name in self.watch.floors if outputs and name in outputs}
        if not metrics:
            return
        step = runner.iter // accumulation_of(runner.optim_wrapper)
        for sentence in self.watch.update(step, metrics):
            runner.logger.warning(sentence)
        runner.message_hub.update_info("collapse_watch", self.watch.state_dict())


@HOOKS.register_module()
class HeldOutHook(Hook):
    """Measures the prediction on images that do not train, with the same crops and masks each time.

    Logged are "held_out_explained_variance" (1 - squared error / variance of the targets),
    "held_out_explained_variance_beyond_position" (against the variance over images at the same patch, which a
    prediction that knows only the position would reach), "held_out_target_variance" and others of `HeldOutMeter`.
    Stands in default_hooks as "held_out".

    Args:
        source, root, pipeline: see `UnlabelledImages`; a source of None measures nothing. interval: optimiser steps
            between measurements. images: at most so many are used, at least 2. batch_size: of one forward.

    Raises:
        FileNotFoundError, ValueError: a source that is not there or holds fewer than two images; a number below 1.
    """

    def __init__(
        self,
        source: str | Sequence[str] | None,
        pipeline: Sequence[dict | Callable],
        root: str = "",
        interval: int = 1000,
        images: int = 256,
        batch_size: int = 32,
    ) -> None:
        self.dataset: UnlabelledImages | None = None
        self.count, self.interval, self.batch_size = 0, interval, batch_size
        if min(interval, batch_size) < 1:
            raise ValueError(
                "default_hooks.held_out.interval and batch_size are at least 1, got "
                f"{interval} and {batch_size}; a source of None measures nothing"
            )
        if source is not None:
            self.dataset = UnlabelledImages(source, pipeline, root, keys=HELD_OUT_KEYS)
            self.count = min(images, len(self.dataset))
            if self.count < 2:
                raise ValueError(
                    f"default_hooks.held_out measures the variance over at least two images, got {self.count}: give "
                    "a source of more, and images=2 or higher"
                )

    def before_train(self, runner: Any) -> None:
        """Read images as the training does."""
        if self.dataset is not None:
            self.dataset.image_format = runner.train_loop.dataloader.dataset.image_format

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Measure on the main process when it is time."""
        model = model_of(runner)
        moved = runner.optim_wrapper.should_update()
        if self.dataset is None or not moved or not is_main_process():
            return
        if model.steps_done % self.interval == 0:
            for name, value in self.measure(model, self.dataset).items():
                runner.message_hub.update_scalar(f"train/held_out_{name}", value)

    @torch.no_grad()
    def measure(self, model: DMTJEPA, dataset: UnlabelledImages) -> dict[str, float]:
        """The measures of the model as it is, which stays in its mode.

        Raises:
            ImageError: no image can be read.
        """
        meter, training = HeldOutMeter(), model.training
        model.eval()
        for first in range(0, self.count, self.batch_size):
            last = min(first + self.batch_size, self.count)
            places = [Place(0, i, i, first, last - first) for i in range(first, last)]
            batch = collate_images([dataset[place] for place in places])
            if batch["inputs"] is None:
                UnreadableImages(dataset.files, limit_key="what default_hooks.held_out.source holds").update(
                    batch["reports"]
                )
            meter.update(model.maps(**model.data_preprocessor(batch)))
        model.train(training)
        return meter.result()


@HOOKS.register_module()
class ViTProbeHook(Hook):
    """Scores the frozen patch features by the final probes while it trains, which training does not notice.

    Measured are the model before its first step, then every `interval` steps, and the last. Logged at the very
    iteration, in percent, are "probe/linear_mIoU", "probe/knn_mIoU", "probe/kmeans_mIoU" and accuracies. A suffix
    names what is not the target encoder: "_context"; and the floors: "_position", "_colour_position",
    "_pixels_position" and the model's own first scores, "_initial", which a resumed run keeps. Only the main
    process works, so the labelled images should be few.

    Args:
        train, val: names "folder_semantic@ROOT@SPLIT" of what the probes are fitted and measured on.
        interval: optimiser steps between measurements.
        size: (height, width) in pixels of the whole images, multiples of the patch; None: of the training's crops.
        which: some of "target", "context". kinds: some of "linear", "knn", "kmeans".
        cells: patches of each set, at most, evenly spread; images: likewise, 0 takes all.

    Raises:
        ValueError, FileNotFoundError: one sentence for a value that makes no sense, or for missing data.
    """

    def __init__(
        self,
        train: str,
        val: str,
        interval: int = 1000,
        size: Sequence[int] | None = None,
        which: Sequence[str] = ("target",),
        kinds: Sequence[str] = PROBES,
        cells: int = 10000,
        images: int = 0,
    ) -> None:
        if interval < 1 or images < 0:
            raise ValueError(
                f"ViTProbeHook takes an interval of at least one step and no negative number of images, got "
                f"{interval} and {images}"
            )
        self.sets = labelled_images(train).fewer(images), labelled_images(val).fewer(images)
        check_classes(*self.sets)
        self.interval, self.size, self.which = interval, size, check_which(which)
        self.protocol = Protocol((0, 0), kinds=tuple(kinds), cells=cells)  # its size is known with the model
        self.floors: Rows = {}

    def before_train(self, runner: Any) -> None:
        """Measure the floors and the model before its first step, unless the run is resumed and knows them."""
        model = model_of(runner)
        self.protocol = dataclasses.replace(
            self.protocol,
            size=image_size(model, self.size),
            image_format=runner.train_loop.dataloader.dataset.image_format,
        )
        if not is_main_process():
            return
        saved = runner.message_hub.runtime_info.get("vit_probe") if runner.iter else None
        if saved and saved["measured"] == self.measured():
            self.floors = saved["floors"]
            return
        with undisturbed(model):
            device = next(model.parameters()).device
            patch = model.encoder.patch_size
            self.floors = probe_floors(*self.sets, self.protocol, patch, device=device)
        if runner.iter:
            runner.logger.warning(
                "the run began without these probes: its initial model's scores are not known"
            )
        else:
            self.act(runner, 0)
        runner.message_hub.update_info("vit_probe", {"measured": self.measured(), "floors": self.floors})

    def measured(self) -> str:
        """What the floors depend on."""
        return f"{[(data.name, len(data.files)) for data in self.sets]} {self.protocol} {self.which}"

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Measure on the main process when it is time."""
        model = model_of(runner)
        if not is_main_process() or not runner.optim_wrapper.should_update():
            return
        if model.steps_done % self.interval == 0 or model.steps_done == model.total_steps:
            self.act(runner, runner.iter + 1)

    def act(self, runner: Any, iteration: int) -> None:
        """Measure and log, as of so many iterations."""
        start, model = time.perf_counter(), model_of(runner)
        with undisturbed(model):
            found = probe_vit(model, *self.sets, self.protocol, self.which)
        # The main row has no suffix; with the context encoder alone, it is the main row.
        rows = {"" if name == self.which[0] else f"_{name}": scores for name, scores in found.items()}
        if iteration == 0:
            self.floors["initial"] = rows[""]
        named = {
            f"probe/{score}{suffix}": value
            for suffix, scores in {
                **rows,
                **{f"_{name}": scores for name, scores in self.floors.items()},
            }.items()
            for score, value in scores.items()
        }
        runner.visualizer.add_scalars(named, step=iteration)
        spent = time.perf_counter() - start
        text = table({**found, **self.floors})
        runner.logger.info("probes after iteration %d, in %.1f s\n%s", iteration, spent, text)


@HOOKS.register_module()
class PretrainCheckpointHook(CheckpointHook):
    """mmengine's, but: a checkpoint is written whole or not at all, an old one is removed only after that, and
    the file holds plain values and tensors alone, so that every reader with weights only takes it.

    `interval` counts optimiser steps, and so does a file's name: "iter_100.pth" has seen 100, of however many
    accumulated iterations each. A resume loads every tensor of the model or fails, and goes on behind that step with
    its own number of accumulated iterations. No random state is kept: `PretrainLoop` seeds each iteration.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"by_epoch": False, "backend_args": {"backend": ATOMIC_BACKEND}, **kwargs})

    def every_n_train_iters(self, runner: Any, n: int, start: int = 0) -> bool:
        """Whether a checkpoint is due: never within a step, whose gradients it would not hold."""
        steps, inside = divmod(runner.iter + 1, accumulation_of(runner.optim_wrapper))
        return not inside and n > 0 and steps > start and (steps - start) % n == 0

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        if isinstance(runner.train_loop, PretrainLoop):
            step //= runner.train_loop.accumulation
        kept = [] if self.max_keep_ckpts <= 0 else [old for old in self.keep_ckpt_ids if old != step]
        surplus = kept[: max(len(kept) + 1 - self.max_keep_ckpts, 0)]
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend([*kept[len(surplus) :], step])
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = os.path.join(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            text = self.last_ckpt.encode()
            atomic_write(os.path.join(runner.work_dir, "last_checkpoint"), lambda file: file.write(text))
            for old in surplus:
                path = os.path.join(self.out_dir, self.filename_tmpl.format(old))
                if os.path.isfile(path):
                    os.remove(path)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Make the log's history plain."""
        checkpoint["message_hub"] = plain(checkpoint["message_hub"])

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """The reverse; a checkpoint to resume from must fill the whole model.

        One that a new run starts from must hold both encoders; its count of steps is left out.

        Raises:
            CheckpointError: it does not.
        """
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for name, value in scalars.items():
            if isinstance(value, list):
                scalars[name] = HistoryBuffer(*(part.tolist() for part in value))
        weights = state_dict_of(checkpoint)
        required = [""]
        if runner._resume:
            go_on_at(
                checkpoint,
                int(weights["step"]) if "step" in weights else 0,
                accumulation_of(runner.optim_wrapper),
            )
        else:
            required = ["encoder", "target_encoder"]
            weights = without_step(weights)
            checkpoint["state_dict"] = weights  # what mmengine loads next
        source = str(runner._load_from or "the last checkpoint")
        runner.logger.info("%s", load_into(model_of(runner), weights, required=required, source=source))
