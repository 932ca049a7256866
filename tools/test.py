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
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from mmengine.config import Config, DictAction  # noqa: E402
from mmengine.registry import RUNNERS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from jepa_plugins.config_files import default_work_dir, find_config  # noqa: E402
from jepa_plugins.core.checkpoints import check_file  # noqa: E402
from jepa_plugins.core.cli import one_sentence  # noqa: E402
from jepa_plugins.mm.checkpoints import TRUST  # noqa: E402
from jepa_plugins.mm.distributed import LAUNCHERS, leave_processes, start_processes  # noqa: E402
from jepa_plugins.mm.run_hooks import EvaluationFileHook  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """mmsegmentation's options and ours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a file, or the name of one of this project's configurations")
    parser.add_argument("checkpoint", help="of the trained model")
    parser.add_argument(
        "--work-dir", help="folder of logs and results; without it work_dirs/NAME, NAME as below mmseg/"
    )
    parser.add_argument("--out", help="folder for the predictions")
    parser.add_argument("--show", action="store_true", help="show the predictions")
    parser.add_argument("--show-dir", help="folder for painted images")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds that a prediction is shown")
    parser.add_argument("--tta", action="store_true", help="several scales and flips, as tta_pipeline says")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="auto", help="auto: torchrun's or srun's processes, or one"
    )
    parser.add_argument(
        "--trust", action="append", default=[], metavar="FILE", help="a checkpoint that may run code"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def configuration(args: argparse.Namespace) -> Config:
    """The configuration with the command line's changes."""
    cfg = Config.fromfile(find_config(args.config))
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = default_work_dir(args.config)
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
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if args.trust:
        os.environ[TRUST] = os.pathsep.join(args.trust)
    if "://" not in args.checkpoint:
        check_file(args.checkpoint)
    cfg = configuration(args)
    start_processes(cfg)
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    runner.register_hook(EvaluationFileHook(args.config))
    runner.test()
    leave_processes()


if __name__ == "__main__":
    main()
