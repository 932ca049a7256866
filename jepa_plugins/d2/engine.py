"""The training loop: gradient accumulation, mixed precision on any device, resumable data, our solver and
evaluators."""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.engine.hooks import PeriodicWriter
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from jepa_plugins.d2 import solver
from jepa_plugins.d2.checkpoint import Checkpointer
from jepa_plugins.d2.data.catalog import check_num_classes, ensure_registered
from jepa_plugins.d2.data.loader import build_labelled_loader, build_unlabelled_loader
from jepa_plugins.d2.data.mappers import build_mapper
from jepa_plugins.d2.evaluation import build_evaluator
from jepa_plugins.d2.evaluation_file import EvaluationFileHook
from jepa_plugins.d2.held_out import HeldOutEvaluator, build_held_out_loader
from jepa_plugins.d2.hooks import CollapseHook, PretrainingNote, TargetHook, monitoring_hooks, unwrapped
from jepa_plugins.d2.launchers import load_trainer_state, seed_iteration, trainer_state
from jepa_plugins.d2.mask_jepa import MaskJEPA
from jepa_plugins.d2.registration import build_model

logger = logging.getLogger(__name__)


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Precision of the forward under autocast; None for float32.

    Raises:
        ValueError: for an unknown SOLVER.AMP.DTYPE.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if cfg.SOLVER.AMP.DTYPE == "auto":
        return torch.float16 if cfg.MODEL.DEVICE.startswith("cuda") else torch.bfloat16
    if cfg.SOLVER.AMP.DTYPE not in known:
        raise ValueError(f"SOLVER.AMP.DTYPE is {cfg.SOLVER.AMP.DTYPE!r}; give auto, float16 or bfloat16")
    return known[cfg.SOLVER.AMP.DTYPE]


def check_batch(cfg: CfgNode, world: int) -> int:
    """Images per process and forward; prints the effective batch and holds it to the recipe.

    Raises:
        ValueError: when the batch does not divide, or is not the recipe's.
    """
    total, parts, recipe = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION, cfg.SOLVER.RECIPE_IMS_PER_BATCH
    if parts < 1 or total % (world * parts):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {total} must be a multiple of {world} processes x "
            f"SOLVER.ACCUMULATION {parts}"
        )
    local = total // (world * parts)
    fit = f"SOLVER.IMS_PER_BATCH {recipe} (raise SOLVER.ACCUMULATION if it does not fit)"
    check_recipe(local, world, parts, recipe, fit, "SOLVER.RECIPE_IMS_PER_BATCH 0")
    return local


def check_recipe(local: int, world: int, parts: int, recipe: int, fit: str, off: str) -> None:
    """Print the effective batch and hold it to the recipe's.

    Args:
        local, world, parts: images of a process and forward, processes, accumulated forwards.
        recipe: images of an optimiser step; 0 accepts any.
        fit: how to get that batch; off: how to turn the check off.

    Raises:
        ValueError: the batch is another.
    """
    total = local * world * parts
    logger.info("effective batch %d = %d images x %d processes x %d accumulated", total, local, world, parts)
    if recipe and recipe != total:
        raise ValueError(
            f"the effective batch is {total}, the recipe's {recipe}: set {fit}, or {off} to run it all the same"
        )


def ddp_devices(device: str) -> list[int] | None:
    """What DistributedDataParallel takes: this process's GPU, or None on the CPU."""
    return [torch.cuda.current_device()] if str(device).startswith("cuda") else None


class StartedLate:
    """An iterable that builds its loader when it is asked for, or at the first batch: then the start iteration
    is known."""

    def __init__(self, build: Callable[[int], Any]) -> None:
        self.build = build
        self.start_iteration = 0
        self._built: tuple[int, Any] | None = None

    def loader(self) -> Any:
        """The loader that starts at `start_iteration`; one for each start."""
        if self._built is None or self._built[0] != self.start_iteration:
            self._built = (self.start_iteration, self.build(self.start_iteration))
        return self._built[1]

    def __iter__(self) -> Iterator[list[dict]]:
        yield from self.loader()


class Loop(SimpleTrainer):
    """One iteration: `accumulation` micro-batches, then an optimiser step.

    The global generators are seeded by (seed, iteration, process), so nothing of their state needs saving: a
    resumed run draws what it would have drawn.

    Args:
        dtype: of autocast, or None. float16 on CUDA runs under a gradient scaler.
    """

    def __init__(
        self, model: torch.nn.Module, loader: Any, optimizer: Any, *, accumulation: int, dtype: Any, seed: int
    ) -> None:
        super().__init__(model, loader, optimizer)
        self.accumulation, self.dtype, self.seed = accumulation, dtype, seed
        self.device_type = unwrapped(model).device.type
        scaling = dtype == torch.float16 and self.device_type == "cuda"
        self.grad_scaler = torch.amp.GradScaler("cuda", enabled=scaling)
        self.stepped = False  # whether the last iteration moved the weights

    def _autocast(self) -> Any:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def _unsynchronised(self, last: bool) -> Any:
        """Gradients of all but the last micro-batch need no exchange between processes."""
        return (
            contextlib.nullcontext() if last or not hasattr(self.model, "no_sync") else self.model.no_sync()
        )

    def run_step(self) -> None:
        """Forward, backward, step, metrics."""
        seed_iteration(self.seed, self.iter)
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        data_time = 0.0
        for part in range(self.accumulation):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._unsynchronised(part + 1 == self.accumulation):
                with self._autocast():
                    losses = self.model(data)
                    total = sum(losses.values()) / self.accumulation
                self.grad_scaler.scale(total).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach() / self.accumulation
        self._write_metrics(sums, data_time)
        self.optimizer.grad_norm = None
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        norm = self.optimizer.grad_norm
        self.stepped = norm is not None  # the scaler skips a step whose gradients overflowed
        if norm is not None:
            get_event_storage().put_scalar("grad_norm", float(norm), smoothing_hint=False)


class Trainer(DefaultTrainer):
    """detectron2's default trainer around `Loop`, for MaskJEPA and the Mask2Former family.

    Args:
        trust: checkpoint files that may run code when they are read.
        config: the configuration's name, for evaluation.json.

    Raises:
        ValueError, FileNotFoundError: one sentence each for a configuration that cannot run.
    """

    def __init__(self, cfg: CfgNode, trust: Sequence[str] = (), config: str | None = None) -> None:
        TrainerBase.__init__(self)
        check_batch(cfg, comm.get_world_size())
        prepare_data(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=ddp_devices(cfg.MODEL.DEVICE))
        self._trainer = Loop(
            wrapped,
            self.build_train_loader(cfg),
            optimizer,
            accumulation=cfg.SOLVER.ACCUMULATION,
            dtype=amp_dtype(cfg),
            seed=max(cfg.SEED, 0),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        notes = {"jepa_pretraining": PretrainingNote(model)} if isinstance(model, MaskJEPA) else {}
        self.checkpointer = Checkpointer(
            wrapped,
            cfg.OUTPUT_DIR,
            leave_out=cfg.MODEL.WEIGHTS_LEAVE_OUT,
            trust=trust,
            trainer=weakref.proxy(self),
            **notes,
        )
        self.start_iter, self.max_iter, self.cfg, self.config = 0, cfg.SOLVER.MAX_ITER, cfg, config
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's; the data stream then starts where the run stands."""
        super().resume_or_load(resume)
        self._trainer.data_loader.start_iteration = self.start_iter

    def state_dict(self) -> dict:
        """Iteration, hooks, optimiser and scaler; detectron2's 0.6 tag leaves out the last two."""
        return trainer_state(self)

    def load_state_dict(self, state: dict) -> None:
        """Restore them; raises as `load_trainer_state`."""
        load_trainer_state(self, state)

    def build_hooks(self) -> list:
        """detectron2's, with ours before the checkpointer; those that only look stand before the writer."""
        hooks = super().build_hooks()
        model = unwrapped(self._trainer.model)
        if isinstance(model, MaskJEPA):
            hooks[1:1] = [TargetHook(model), CollapseHook()]
        writers = [i for i, hook in enumerate(hooks) if isinstance(hook, PeriodicWriter)]
        place = min(writers, default=len(hooks))
        hooks[place:place] = [EvaluationFileHook(), *monitoring_hooks(self.cfg, model)]
        return hooks

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """The model, with a line on its size instead of its whole listing."""
        model = build_model(cfg)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(
            "%s: %s parameters, %s trained", cfg.MODEL.META_ARCHITECTURE, f"{total:,}", f"{trained:,}"
        )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """See `solver.build_optimizer`."""
        return solver.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Poly (`WarmupPolyLR`) or detectron2's own schedules."""
        return solver.build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> StartedLate:
        """Unlabelled crops for MaskJEPA, else DATASETS.TRAIN through the configured mapper; in
        micro-batches."""
        micro, parts = cfg.clone(), cfg.SOLVER.ACCUMULATION
        micro.defrost()
        micro.SOLVER.IMS_PER_BATCH //= parts
        if cfg.MODEL.META_ARCHITECTURE == "MaskJEPA":
            return StartedLate(
                lambda start: build_unlabelled_loader(micro, start_iteration=start, accumulation=parts)
            )
        return StartedLate(lambda start: build_labelled_loader(micro, start_iteration=start * parts))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """One image at a time, resized as the training recipe says."""
        ensure_registered(dataset_name)
        return build_detection_test_loader(cfg, dataset_name, mapper=build_mapper(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """By the data set's kind."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: Any = None) -> dict:
        """MaskJEPA on DATASETS.UNLABELLED_TEST; other models as detectron2 does."""
        if not isinstance(unwrapped(model), MaskJEPA):
            return super().test(cfg, model, evaluators)
        if not cfg.DATASETS.UNLABELLED_TEST:
            return {}
        results = inference_on_dataset(model, build_held_out_loader(cfg), HeldOutEvaluator())
        if comm.is_main_process():
            print_csv_format(results)
        return results


def prepare_data(cfg: CfgNode) -> None:
    """What must hold of a configuration's data before anything runs.

    Labelled data sets are registered and hold NUM_CLASSES; held-out images are there; a frozen backbone without
    weights is warned about.
    """
    timm = cfg.MODEL.BACKBONE.NAME == "TimmBackbone"
    if cfg.MODEL.META_ARCHITECTURE == "MaskJEPA":
        frozen = cfg.MODEL.MASK_JEPA.FREEZE_BACKBONE
        if cfg.DATASETS.UNLABELLED_TEST:
            build_held_out_loader(cfg)
    else:
        frozen = timm and cfg.MODEL.TIMM.FREEZE
        names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        ensure_registered(names)
        for name in names:
            check_num_classes(cfg, name)
    if frozen and not cfg.MODEL.WEIGHTS and not (timm and cfg.MODEL.TIMM.WEIGHTS):
        logger.warning(
            "the backbone is frozen at random weights: give it some by MODEL.WEIGHTS%s, or let it train",
            " or MODEL.TIMM.WEIGHTS" if timm else "",
        )
