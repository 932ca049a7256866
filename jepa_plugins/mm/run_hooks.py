"""Hooks of any mmengine run: the recipe's batch, and what an evaluation measures and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import broadcast, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from jepa_plugins.core.evaluation_file import write_evaluation
from jepa_plugins.mm.optim import accumulation_of


@HOOKS.register_module()
class RecipeBatchHook(Hook):
    """Prints the effective batch, and holds it to the recipe's before anything is trained.

    Under mmengine's own loops; `PretrainLoop` checks more. Stands in default_hooks as "recipe".

    Args:
        batch: images of an optimiser step over all processes; None accepts any.

    Raises:
        ValueError: the run's batch is another.
    """

    def __init__(self, batch: int | None = None) -> None:
        self.batch = batch

    def before_run(self, runner: Any) -> None:
        """Check; a run that does not train has no batch."""
        if runner._train_loop is None or isinstance(runner._train_loop, dict):
            return
        loader = runner.train_dataloader
        local = loader.batch_size or loader.batch_sampler.batch_size
        world, parts = get_world_size(), accumulation_of(runner.optim_wrapper)
        total = local * world * parts
        made_of = f"{local} images x {world} processes x {parts} accumulated"
        runner.logger.info("effective batch %d = %s", total, made_of)
        if self.batch is None or total == self.batch:
            return
        share, rest = divmod(self.batch, world * parts)
        fit = (
            "take a number of processes that divides it"
            if rest
            else f"set train_dataloader.batch_size={share}"
        )
        raise ValueError(
            f"the effective batch is {total} ({made_of}), the recipe's {self.batch}: {fit}, or "
            "default_hooks.recipe.batch=None to train it all the same"
        )


@HOOKS.register_module()
class SameBuffersHook(Hook):
    """Gives all processes the first one's buffers before a validation, since those are in its checkpoint.

    Without it each would measure with the running statistics that its batch norms have of its own images.
    """

    def before_val_epoch(self, runner: Any) -> None:
        """Broadcast them."""
        for buffer in runner.model.buffers():
            broadcast(buffer)


@HOOKS.register_module()
class EvaluationFileHook(Hook):
    """Writes what each validation and test found into evaluation.json of the work folder.

    Args:
        config: name of the configuration, as it was given.
    """

    priority = "LOWEST"

    def __init__(self, config: str | None = None) -> None:
        self.config = config

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Of the weights in training, whose checkpoint may have just been written."""
        last = runner.message_hub.runtime_info.get("last_ckpt")
        done = {f"iter_{runner.iter}", f"epoch_{runner.epoch}"}
        checkpoint = last if last and Path(last).stem in done else None
        self.write(runner, metrics, checkpoint, runner.val_loop)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Of the checkpoint that is tested."""
        self.write(runner, metrics, runner._load_from, runner.test_loop)

    def write(self, runner: Any, metrics: dict[str, float] | None, checkpoint: str | None, loop: Any) -> None:
        """On the main process, if there are figures."""
        if metrics and is_main_process():
            images = len(loop.dataloader.dataset)
            write_evaluation(
                runner.work_dir, metrics, checkpoint=checkpoint, config=self.config, images=images
            )
