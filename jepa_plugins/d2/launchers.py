"""What detectron2's own launchers lack for our models: a stream of data that starts where a run stands, safe and
complete checkpoints, our evaluators.

Nothing of theirs is edited. detectron2's classes give ours for our models and our data sets, and only for those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage

from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.random import iteration_seed
from jepa_plugins.d2.checkpoint import Checkpointer
from jepa_plugins.d2.hooks import PretrainingNote, unwrapped
from jepa_plugins.d2.mask_jepa import MaskJEPA

logger = logging.getLogger(__name__)


def is_ours(model: Any) -> bool:
    """Whether a model's class is one of this package."""
    return type(unwrapped(model)).__module__.startswith("jepa_plugins.")


def share_log() -> None:
    """Our messages go where detectron2's go, when a launcher has set up its logger and none for us."""
    ours, theirs = logging.getLogger("jepa_plugins"), logging.getLogger("detectron2")
    if theirs.handlers and not ours.handlers:
        ours.setLevel(logging.INFO)
        for handler in theirs.handlers:
            ours.addHandler(handler)


# --- the stream


def seed_iteration(seed: int, iteration: int) -> None:
    """Seed the global generators by (seed, iteration, process), so that nothing of their state needs saving: a
    resumed run draws what it would have drawn."""
    seed_all_rng(iteration_seed(seed, iteration, comm.get_rank()))


class Stream:
    """Batches for a loop that is not ours: they start at the loop's iteration and seed the global generators.

    Args:
        build: from the number of batches already seen to the batches that follow.
        seed: of the run.
    """

    def __init__(self, build: Callable[[int], Iterable[list[dict]]], seed: int) -> None:
        self.build, self.seed = build, seed

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator: the loop asks for its first batch when it has resumed and knows its iteration.
        try:
            start = get_event_storage().iter
        except AssertionError:  # no training loop around us
            start = 0
        for iteration, batch in enumerate(self.build(start), start):
            seed_iteration(self.seed, iteration)
            yield batch


# --- the state of a default trainer


def trainer_state(trainer: Any) -> dict[str, Any]:
    """Iteration, hooks, optimiser and scaler of a `DefaultTrainer`; detectron2's 0.6 tag leaves out the last two."""
    inner = trainer._trainer
    scaler = getattr(inner, "grad_scaler", None)
    state = {
        "optimizer": inner.optimizer.state_dict(),
        "grad_scaler": {} if scaler is None else scaler.state_dict(),
    }
    return {**TrainerBase.state_dict(trainer), "_trainer": state}


def load_trainer_state(trainer: Any, state: dict[str, Any]) -> None:
    """Restore it; the schedule's length stays the configuration's.

    Raises:
        CheckpointError: the optimiser's state is missing.
    """
    inner, saved = trainer._trainer, state.get("_trainer")
    if saved is None:
        raise CheckpointError(
            f"the last checkpoint in {trainer.cfg.OUTPUT_DIR} lacks the optimiser's state, so a run cannot "
            "resume from it: start without --resume and give it as MODEL.WEIGHTS"
        )
    TrainerBase.load_state_dict(trainer, state)
    inner.optimizer.load_state_dict(saved["optimizer"])
    if saved.get("grad_scaler") and hasattr(inner, "grad_scaler"):
        inner.grad_scaler.load_state_dict(saved["grad_scaler"])
    if hasattr(trainer.scheduler, "max_iters"):
        trainer.scheduler.max_iters = trainer.max_iter


class _WholeTrainer:
    """A `DefaultTrainer` as a checkpointable with its optimiser."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return trainer_state(self.trainer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_trainer_state(self.trainer, state)


# --- checkpoints


class LauncherCheckpointer(Checkpointer):
    """What a launcher gets for a model of ours when it asks for detectron2's checkpointer.

    Its files are those of our own launcher: either launcher resumes the other's run.
    """

    def __init__(
        self, model: torch.nn.Module, save_dir: str = "", *, save_to_disk: bool | None = None, **others: Any
    ) -> None:
        """
        Args:
            others: checkpointables, as detectron2's.
        """
        share_log()
        trainer = others.get("trainer")
        self._default_trainer = trainer if hasattr(trainer, "_trainer") else None
        if self._default_trainer is not None:
            others["trainer"] = _WholeTrainer(trainer)
        if trainer is not None and isinstance(unwrapped(model), MaskJEPA):
            others["jepa_pretraining"] = PretrainingNote(unwrapped(model))
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **others)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `Checkpointer.load`; leaves out what MODEL.WEIGHTS_LEAVE_OUT of the trainer's configuration says.

        An update of MaskJEPA's targets that another loop left pending is made up for.
        """
        cfg = getattr(self._default_trainer, "cfg", None)
        if cfg is not None:
            self.leave_out = list(cfg.MODEL.WEIGHTS_LEAVE_OUT)
        others = super().load(path, *args, **kwargs)
        model = unwrapped(self.model)
        if getattr(model, "ema_by_hook", False) and bool(model.ema_pending):
            model.update_target()
        return others


def serve_checkpointer() -> None:
    """Make `DetectionCheckpointer(model, ...)` a `LauncherCheckpointer` for every model of ours."""

    def new(cls: type, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        ours = cls is DetectionCheckpointer and is_ours(model)
        return object.__new__(LauncherCheckpointer if ours else cls)

    DetectionCheckpointer.__new__ = staticmethod(new)


# --- evaluators


def serve_evaluators() -> None:
    """Make detectron2's semantic and instance evaluators ours for data sets that our names register.

    Theirs want a label image for each record and things that are numbered 0 ... n - 1, which a panoptic data set
    need not have.
    """
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, SemSegEvaluator

    from jepa_plugins.d2.data.builtin import NAMES
    from jepa_plugins.d2.evaluation import InstanceEvaluator, SemanticEvaluator

    def registered_by_name(name: str) -> bool:
        return "@" in name or name in NAMES

    def new_semantic(cls: type, dataset_name: str, *args: Any, **kwargs: Any) -> Any:
        if cls is SemSegEvaluator and registered_by_name(dataset_name):
            return SemanticEvaluator(dataset_name)
        return object.__new__(cls)

    def new_instances(cls: type, dataset_name: str, *args: Any, **kwargs: Any) -> Any:
        if cls is not COCOEvaluator or not registered_by_name(dataset_name):
            return object.__new__(cls)
        if MetadataCatalog.get(dataset_name).get("json_file"):
            return object.__new__(InstanceEvaluator)
        logger.warning("Data set '%s' has no instances json: its AP is not measured", dataset_name)
        return DatasetEvaluators([])

    SemSegEvaluator.__new__ = staticmethod(new_semantic)
    COCOEvaluator.__new__ = staticmethod(new_instances)
