#!/usr/bin/env python3
"""Pre-train DMT-JEPA or I-JEPA, or train any mmengine configuration, in mmsegmentation's command-line style.

python tools/train.py mmseg/quick/dmt_jepa.py  # into work_dirs/quick/dmt_jepa
python tools/train.py mmseg/dmt_jepa/vit_base16.py --cfg-options train_dataloader.dataset.source=imagenet/train \\
    optim_wrapper.accumulative_counts=8
torchrun --nproc-per-node 8 tools/train.py mmseg/dmt_jepa/vit_base16.py
srun --ntasks-per-node 8 --gpus-per-node 8 python tools/train.py mmseg/dmt_jepa/vit_base16.py
python tools/train.py ... --resume
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from mmengine.config import Config  # noqa: E402
from mmengine.runner import find_latest_checkpoint  # noqa: E402

from jepa_plugins.core.cli import one_sentence  # noqa: E402
from jepa_plugins.mm.cli import launched_configuration, launcher_parser, runner_of  # noqa: E402
from jepa_plugins.mm.distributed import leave_processes, start_processes  # noqa: E402
from jepa_plugins.mm.run_hooks import EvaluationFileHook, SameBuffersHook  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """mmsegmentation's options and ours."""
    parser = launcher_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint of the folder")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast for our optimiser wrapper")
    return parser


def configuration(args: argparse.Namespace) -> Config:
    """The configuration with the command line's changes."""
    cfg = launched_configuration(args)
    if args.amp:
        use_mixed_precision(cfg)
    cfg.resume = args.resume
    if args.resume and cfg.get("load_from"):
        go_on(cfg)
    return cfg


def go_on(cfg: Config) -> None:
    """A resumed run takes its own last checkpoint, not what it started from, unless it has none yet."""
    if os.path.isdir(cfg.work_dir) and find_latest_checkpoint(cfg.work_dir):
        cfg.load_from = None
    else:
        cfg.resume = False


def use_mixed_precision(cfg: Config) -> None:
    """What --amp means for the configured optimiser wrapper."""
    kind = cfg.optim_wrapper.get("type", "OptimWrapper")
    if kind == "PretrainOptimWrapper":
        cfg.optim_wrapper.dtype = "bfloat16"
    elif kind == "OptimWrapper":
        cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale = "AmpOptimWrapper", "dynamic"
    elif kind != "AmpOptimWrapper":
        raise ValueError(f"--amp does not know the optimiser wrapper {kind}: set its precision in the config")


def run() -> None:
    """Train as the command line says."""
    args = build_parser().parse_args()
    cfg = configuration(args)
    start_processes(cfg)
    runner = runner_of(cfg)
    for hook in (SameBuffersHook(), EvaluationFileHook(args.config)):
        runner.register_hook(hook)
    runner.train()
    leave_processes()


def main() -> None:
    """Command line; TypeError is mmengine's word for an entry that a class does not take."""
    one_sentence(run, more=(TypeError,))()


if __name__ == "__main__":
    main()
