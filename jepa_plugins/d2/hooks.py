"""Hooks of the training loop."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from jepa_plugins.core.collapse import CollapseWatch
from jepa_plugins.core.probing import Rows, table, undisturbed
from jepa_plugins.d2.mask_jepa import MaskJEPA
from jepa_plugins.d2.pictures import Painter, fixed_images
from jepa_plugins.d2.probing import ProbeSettings, labelled_records, probe_floors, probe_model
from jepa_plugins.d2.summary import summary

logger = logging.getLogger(__name__)
# Features whose scores are logged without a suffix: those that pre-training is for.
MAIN_ROW = "stride8"


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel."""
    return getattr(model, "module", model)


class TargetHook(HookBase):
    """Moves MaskJEPA's targets once after each optimiser step; stands before the checkpointer."""

    def __init__(self, model: MaskJEPA) -> None:
        self.model = model

    def before_train(self) -> None:
        """Take the update over from the model, after the one that another loop may have left pending."""
        self.model.ema_by_hook = True
        if bool(self.model.ema_pending):
            self.model.update_target()

    def after_step(self) -> None:
        """One update an iteration that moved the weights, however many micro-batches it had."""
        if self.trainer._trainer.stepped:
            self.model.update_target()

    def after_train(self) -> None:
        """Give the update back."""
        self.model.ema_by_hook = False


class CollapseHook(HookBase):
    """Warns in words when the logged measures show a collapse."""

    def __init__(self) -> None:
        self.watch = CollapseWatch()

    def after_step(self) -> None:
        """Look at the newest metrics."""
        latest = self.trainer.storage.latest()
        now = self.trainer.iter
        metrics = {}
        for name in self.watch.floors:
            value = latest.get(name)
            if value is not None and value[1] == now and math.isfinite(value[0]):
                metrics[name] = value[0]
        for sentence in self.watch.update(now, metrics):
            logger.warning(sentence)

    def state_dict(self) -> dict:
        """First values and warnings given."""
        return self.watch.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore them."""
        self.watch.load_state_dict(state)


class _Periodic(HookBase):
    """Does `act` on the main process before the first step, then every `period` steps and after the last one."""

    def __init__(self, model: MaskJEPA, period: int) -> None:
        self.model, self.period = model, period

    def before_train(self) -> None:
        """The state that training starts from; a resumed run has seen it."""
        if comm.is_main_process() and self.trainer.start_iter == 0:
            self.guarded()

    def after_step(self) -> None:
        """Act when it is time."""
        done = self.trainer.iter + 1
        if comm.is_main_process() and (done % self.period == 0 or done == self.trainer.max_iter):
            self.guarded()

    def guarded(self) -> None:
        """`act`, without leaving a trace in the training."""
        with undisturbed(self.model):
            self.act()

    def act(self) -> None:
        """What the hook is for."""
        raise NotImplementedError


class ProbeHook(_Periodic):
    """Scores the model's features by the final probes while it trains.

    Logged are "probe/linear_mIoU", "probe/knn_mIoU", "probe/kmeans_mIoU" and accuracies, in percent. A suffix
    names what is not the online stride-8 map: "_stride4", "_stride8_ema", and the floors, measured once at the
    start: "_position", "_colour_position" and the model's own first scores, "_stride8_initial". A resumed run
    keeps them. Only the main process works, so the labelled images should be few.
    """

    def __init__(self, model: MaskJEPA, period: int, settings: ProbeSettings) -> None:
        super().__init__(model, period)
        self.settings = settings
        self.floors: Rows = {}

    def before_train(self) -> None:
        """Measure the floors, unless the checkpoint held them."""
        if comm.is_main_process() and not self.floors:
            with undisturbed(self.model):
                self.floors = probe_floors(self.settings, self.model.device)
            if self.trainer.start_iter > 0:
                logger.warning(
                    "the run began without these probes: the scores of its initial model are not known"
                )
        super().before_train()

    def act(self) -> None:
        """Measure and log."""
        start = time.perf_counter()
        rows = probe_model(self.model, self.settings)
        if self.trainer.iter == 0 and not any(name.endswith("_initial") for name in self.floors):
            for name in self.settings.features:  # both copies are equal then
                self.floors[f"{name}_initial"] = rows[name] if name in rows else rows[f"{name}_ema"]
        rows = {**rows, **self.floors}
        for name, scores in rows.items():
            suffix = "" if name == MAIN_ROW else f"_{name}"
            named = {f"probe/{score}{suffix}": value for score, value in scores.items()}
            self.trainer.storage.put_scalars(smoothing_hint=False, **named)
        logger.info(
            "probes at iteration %d, in %.1f s\n%s",
            self.trainer.iter,
            time.perf_counter() - start,
            table(rows),
        )

    def state_dict(self) -> dict:
        """The floors, and what they were measured on."""
        return {"settings": dataclasses.asdict(self.settings), "floors": self.floors}

    def load_state_dict(self, state: dict) -> None:
        """Restore floors that were measured on the same images in the same way."""
        if state["settings"] == dataclasses.asdict(self.settings):
            self.floors = state["floors"]


class PictureHook(_Periodic):
    """Puts pictures of a few fixed images into the event storage, and so into TensorBoard; see `Painter`."""

    def __init__(self, model: MaskJEPA, period: int, inputs: list[dict], image_format: str) -> None:
        super().__init__(model, period)
        self.inputs, self.painter = inputs, Painter(model, image_format)

    def act(self) -> None:
        """Draw."""
        for kind, pictures in self.painter.draw(self.inputs).items():
            for i, picture in enumerate(pictures):
                self.trainer.storage.put_image(f"{kind}/{i}", picture)


class SummaryHook(HookBase):
    """Logs the start-up summary, when the data has been found and before the first step."""

    def before_train(self) -> None:
        """One block."""
        loop, cfg = self.trainer._trainer, self.trainer.cfg
        dataset = getattr(loop.data_loader.loader(), "dataset", None)
        text = summary(
            cfg,
            unwrapped(loop.model),
            images=len(dataset) if hasattr(dataset, "__len__") else None,
            dtype=loop.dtype,
            processes=comm.get_world_size(),
        )
        logger.info("%s", text)


def monitoring_hooks(cfg: CfgNode, model: Any) -> list[HookBase]:
    """The hooks that only look: the summary, and for MaskJEPA the probes and pictures that are configured.

    Raises:
        ValueError, FileNotFoundError: probes of another model, or of data that is not there.
    """
    hooks: list[HookBase] = [SummaryHook()]
    period = cfg.TEST.PROBE.PERIOD
    if not isinstance(model, MaskJEPA):
        if period > 0:
            raise ValueError(
                f"TEST.PROBE measures MaskJEPA's features while it pre-trains, not {cfg.MODEL.META_ARCHITECTURE}'s: "
                "set TEST.PROBE.PERIOD 0"
            )
        return hooks
    if period > 0:
        settings = ProbeSettings.from_config(cfg)
        for name in (settings.train, settings.val):
            labelled_records(name)
        hooks.append(ProbeHook(model, period, settings))
    if cfg.VIS_PERIOD > 0:
        hooks.append(PictureHook(model, cfg.VIS_PERIOD, fixed_images(cfg), cfg.INPUT.FORMAT))
    return hooks


class PretrainingNote:
    """What an exporter must know of a pre-training run; saved in each checkpoint as "jepa_pretraining"."""

    def __init__(self, model: MaskJEPA) -> None:
        self.model = model

    def state_dict(self) -> dict:
        """Plain values only."""
        settings = self.model.settings
        return {
            "trained_level_rows": self.model.trained_level_rows(),
            "trained_predictor_parts": list(settings.predictor_parts()),
            "reconstruction": settings.recon_weight > 0,
            "denoising": settings.denoise_weight > 0,
            "readout": settings.readout,
            "step": int(self.model.step),
            "settings": json.dumps(settings.__dict__, sort_keys=True),
        }

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore: the configuration decides."""
