"""Hooks of the training loop."""

from __future__ import annotations

import json
import math
from typing import Any

from detectron2.engine import HookBase

from jepa_plugins.core.collapse import CollapseWatch
from jepa_plugins.d2.mask_jepa import MaskJEPA


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
        self.watch.update(now, metrics)

    def state_dict(self) -> dict:
        """First values and warnings given."""
        return self.watch.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore them."""
        self.watch.load_state_dict(state)


class PretrainingNote:
    """What an exporter must know of a pre-training run; saved in each checkpoint as "jepa_pretraining"."""

    def __init__(self, model: MaskJEPA) -> None:
        self.model = model

    def state_dict(self) -> dict:
        """Plain values only."""
        settings = self.model.settings
        return {
            "trained_level_rows": [settings.level] if settings.recon_weight > 0 else [],
            "reconstruction": settings.recon_weight > 0,
            "denoising": settings.denoise_weight > 0,
            "readout": settings.readout,
            "step": int(self.model.step),
            "settings": json.dumps(settings.__dict__, sort_keys=True),
        }

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore: the configuration decides."""
