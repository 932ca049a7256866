#!/usr/bin/env python3
"""Train or evaluate a LazyConfig, in the command-line style of detectron2's script of the same name.

python tools/lazyconfig_train_net.py --config-file detectron2/lazy/mask_rcnn_vitb_100ep.py --num-gpus 8
train.init_checkpoint=work_dirs/dmt_jepa/vit_base16/iter_375600.pth
python tools/lazyconfig_train_net.py --config-file ... --eval-only train.init_checkpoint=output/model_final.pth
python tools/lazyconfig_train_net.py --config-file ... --resume
torchrun --nproc-per-node 8 tools/lazyconfig_train_net.py --config-file ...
srun --ntasks-per-node 8 --gpus-per-node 8 python tools/lazyconfig_train_net.py --config-file ...

detectron2's own script runs the same files. This one reads checkpoints of any model without running their code,
trains in mixed precision without CUDA too, holds the batch to the recipe's (train.recipe_batch), writes the figures
of an evaluation to evaluation.json, and says in one sentence what is wrong.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf.errors import OmegaConfBaseException

import jepa_plugins.d2  # noqa: F401  registers our models
from jepa_plugins.config_files import find_config
from jepa_plugins.core.cli import one_sentence
from jepa_plugins.d2.checkpoint import Checkpointer
from jepa_plugins.d2.distributed import run
from jepa_plugins.d2.engine import Loop, check_recipe, ddp_devices
from jepa_plugins.d2.evaluation_file import record, written
from jepa_plugins.d2.hooks import CollapseHook
from jepa_plugins.d2.launchers import LauncherCheckpointer
from jepa_plugins.d2.mask_jepa import MaskJEPA

logger = logging.getLogger("jepa_plugins")


def configuration(args: Any) -> Any:
    """The configuration with the command line's changes; without a GPU it runs on the CPU.

    Raises:
        ValueError: a change that is no KEY=VALUE, or of a key that does not exist; a file without what it needs.
    """
    args.config, args.config_file = args.config_file, find_config(args.config_file)
    cfg = LazyConfig.load(args.config_file)
    absent = [key for key in ("model", "optimizer", "lr_multiplier", "dataloader", "train") if key not in cfg]
    if absent:
        raise ValueError(f"{args.config_file} defines no {', '.join(absent)}: give a LazyConfig for training")
    for change in args.opts:
        if "=" not in change and not change.startswith("~"):
            raise ValueError(f"'{change}' is no change of the configuration: write KEY=VALUE")
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        logger.info("no GPU is available: running on the CPU")
        cfg.train.device = "cpu"
    return cfg


def precision(cfg: Any) -> torch.dtype | None:
    """Of autocast: float16 on CUDA, bfloat16 elsewhere; None where train.amp is off."""
    if not cfg.train.amp.enabled:
        return None
    return torch.float16 if str(cfg.train.device).startswith("cuda") else torch.bfloat16


def check_batch(cfg: Any) -> None:
    """Print the effective batch, and hold it to the recipe.

    Raises:
        ValueError: it is another, or does not divide among the processes.
    """
    total, world = cfg.dataloader.train.get("total_batch_size"), comm.get_world_size()
    if total is None:
        return  # a loader that is not ours
    if total % world:
        raise ValueError(f"dataloader.train.total_batch_size {total} must be a multiple of {world} processes")
    parts, recipe = cfg.optimizer.get("accumulation", 1), cfg.train.get("recipe_batch", 0)
    fit = f"dataloader.train.total_batch_size={recipe // parts}"
    check_recipe(total // world, world, parts, recipe, fit, "train.recipe_batch=0")


def evaluate(cfg: Any, model: torch.nn.Module, checkpoint: str | None, config: str) -> Any:
    """Figures of the configured evaluator, printed and put into evaluation.json; None without one."""
    if "evaluator" not in cfg.dataloader:
        return None
    loader = instantiate(cfg.dataloader.test)
    results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
    if comm.is_main_process():
        print_csv_format(results)
    images = len(loader.dataset)
    record(cfg.train.output_dir, results, checkpoint=checkpoint, config=config, images=images)
    return results


def train(args: Any, cfg: Any) -> None:
    """Start, or with --resume go on from the last checkpoint."""
    check_batch(cfg)
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    wrapped = create_ddp_model(model, **{**cfg.train.ddp, "device_ids": ddp_devices(cfg.train.device)})
    loop = Loop(
        wrapped,
        instantiate(cfg.dataloader.train),
        optimizer,
        accumulation=1,  # LazyConfigs accumulate in their optimiser
        dtype=precision(cfg),
        seed=max(cfg.train.get("seed", 0), 0),
    )
    states = {"grad_scaler": loop.grad_scaler} if loop.grad_scaler.is_enabled() else {}
    checkpointer = LauncherCheckpointer(
        wrapped, cfg.train.output_dir, optimizer=optimizer, trainer=loop, **states
    )
    checkpointer.trust = args.trust
    main = comm.is_main_process()
    loop.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            CollapseHook() if isinstance(model, MaskJEPA) else None,
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(
                cfg.train.eval_period,
                lambda: evaluate(cfg, wrapped, written(cfg.train.output_dir, loop), args.config),
            ),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter), period=cfg.train.log_period
            )
            if main
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    start = loop.iter + 1 if args.resume and checkpointer.has_checkpoint() else 0
    loop.train(start, cfg.train.max_iter)


@one_sentence
def main(args: Any) -> Any:
    """Train, or evaluate with --eval-only."""
    try:
        cfg = configuration(args)
    except OmegaConfBaseException as error:
        raise ValueError(f"{args.config_file} or the command line: {str(error).splitlines()[0]}") from error
    default_setup(cfg, args)
    setup_logger(output=cfg.train.output_dir, distributed_rank=comm.get_rank(), name="jepa_plugins")
    if not args.eval_only:
        return train(args, cfg)
    if not cfg.train.init_checkpoint:
        raise ValueError("--eval-only needs a checkpoint: set train.init_checkpoint=FILE")
    if "evaluator" not in cfg.dataloader:
        raise ValueError(f"{args.config_file} has no dataloader.evaluator, so nothing can be evaluated")
    model = instantiate(cfg.model).to(cfg.train.device)
    Checkpointer(model, required=[""], trust=args.trust).load(cfg.train.init_checkpoint)
    return evaluate(cfg, model, cfg.train.init_checkpoint, args.config)


def build_parser() -> Any:
    """detectron2's options and ours."""
    parser = default_argument_parser(__doc__)
    parser.set_defaults(dist_url="auto")  # a free port, where all processes are on one machine
    parser.add_argument(
        "--trust", action="append", default=[], metavar="FILE", help="a checkpoint that may run code"
    )
    return parser


if __name__ == "__main__":
    run(main, build_parser().parse_args())
