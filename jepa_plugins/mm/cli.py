"""What the command-line tools share: options of the launchers, the configuration of a run, its model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner

from jepa_plugins.config_files import default_work_dir, find_config
from jepa_plugins.core.checkpoints import TRUST, load_into, state_dict_of
from jepa_plugins.mm.checkpoints import load_from_local
from jepa_plugins.mm.distributed import LAUNCHERS
from jepa_plugins.mm.model import DMTJEPA


def launcher_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that training and testing share, in mmsegmentation's style."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a file, or the name of one of this project's configurations")
    parser.add_argument(
        "--work-dir",
        help="folder of logs, checkpoints and results; without it work_dirs/NAME, NAME as below mmseg/",
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="auto", help="auto: torchrun's or srun's processes, or one"
    )
    parser.add_argument(
        "--trust", action="append", default=[], metavar="FILE", help="a checkpoint that may run code"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def launched_configuration(args: argparse.Namespace) -> Config:
    """The configuration with what the shared options say; process and trusted files go into the environment."""
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if args.trust:
        os.environ[TRUST] = os.pathsep.join(args.trust)
    cfg = configuration(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = default_work_dir(args.config)
    return cfg


def runner_of(cfg: Config) -> Runner:
    """The configuration's runner, mmengine's unless it names another."""
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


def configuration(name: str, changes: Mapping[str, Any] | None = None) -> Config:
    """A configuration by path or by name, with the changes of ``--cfg-options``."""
    cfg = Config.fromfile(find_config(name))
    if changes is not None:
        cfg.merge_from_dict(dict(changes))
    return cfg


def image_format(cfg: Config) -> str:
    """Order of the channels that the model trains on."""
    return cfg.train_dataloader.dataset.get("image_format", "RGB")


def untrained_model(cfg: Config, seed: int | None = None) -> DMTJEPA:
    """The configuration's model in eval mode as a seed makes it; None: the configuration's own.

    Raises:
        ValueError: the configuration describes another model.
    """
    kind = cfg.get("model", {}).get("type")
    if kind != "DMTJEPA":
        raise ValueError(
            f"{cfg.filename} describes the model {kind}: give the configuration of a pre-training (DMTJEPA)"
        )
    torch.manual_seed((cfg.get("randomness", {}).get("seed") or 0) if seed is None else seed)
    return MODELS.build(cfg.model).eval()


def built_model(cfg: Config, weights: str | None) -> DMTJEPA:
    """The configuration's model in eval mode: untrained, or with the targets of a checkpoint.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: another model; no such file, or one that lacks targets.
    """
    model = untrained_model(cfg)
    if weights is not None:
        # Targets must come from the file; the predictor need not.
        required = ["target_encoder"] + ["target_head"] * (model.target_head is not None)
        load_into(model, state_dict_of(load_from_local(weights)), required=required, source=weights)
    return model
