#!/usr/bin/env python3
"""Evaluate a trained model of any mmengine configuration, in mmsegmentation's command-line style.

python tools/test.py mmseg/quick/upernet.py work_dirs/quick/upernet/iter_300.pth
python tools/test.py mmseg/upernet/vit_base16_ade20k_512x512_160k.py FILE
torchrun --nproc-per-node 8 tools/test.py CONFIG CHECKPOINT
srun --ntasks-per-node 8 --gpus-per-node 8 python tools/test.py CONFIG CHECKPOINT

The figures go to evaluation.json in the work folder, too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from mmengine.config import Config  # noqa: E402

from jepa_plugins.core.checkpoints import check_file  # noqa: E402
from jepa_plugins.core.cli import one_sentence  # noqa: E402
from jepa_plugins.mm.cli import launched_configuration, launcher_parser, runner_of  # noqa: E402
from jepa_plugins.mm.distributed import leave_processes, start_processes  # noqa: E402
from jepa_plugins.mm.run_hooks import EvaluationFileHook  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """mmsegmentation's options and ours."""
    parser = launcher_parser(__doc__)
    parser.add_argument("checkpoint", help="of the trained model")
    parser.add_argument("--out", help="folder for the predictions")
    parser.add_argument("--show", action="store_true", help="show the predictions")
    parser.add_argument("--show-dir", help="folder for painted images")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds that a prediction is shown")
    parser.add_argument("--tta", action="store_true", help="several scales and flips, as tta_pipeline says")
    return parser


def configuration(args: argparse.Namespace) -> Config:
    """The configuration with the command line's changes."""
    cfg = launched_configuration(args)
    cfg.load_from = args.checkpoint
    if cfg.get("test_dataloader") is None:
        raise ValueError(f"{args.config} has no test_dataloader: there is nothing to evaluate")
    if args.show or args.show_dir:
        paint(cfg, args)
    if args.tta:
        use_tta(cfg)
    if args.out is not None:
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    return cfg


def paint(cfg: Config, args: argparse.Namespace) -> None:
    """Turn the painting hook on."""
    hook = cfg.default_hooks.get("visualization")
    if hook is None:
        raise ValueError(
            "--show needs default_hooks.visualization, such as dict(type='SegVisualizationHook')"
        )
    hook.draw = True
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def use_tta(cfg: Config) -> None:
    """Wrap the model, and read images in the several ways of the configuration."""
    if "tta_pipeline" not in cfg or "tta_model" not in cfg:
        raise ValueError("--tta needs tta_pipeline and tta_model in the configuration")
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


@one_sentence
def main() -> None:
    """Evaluate."""
    args = build_parser().parse_args()
    if "://" not in args.checkpoint:
        check_file(args.checkpoint)
    cfg = configuration(args)
    start_processes(cfg)
    runner = runner_of(cfg)
    runner.register_hook(EvaluationFileHook(args.config))
    runner.test()
    leave_processes()


if __name__ == "__main__":
    main()
