"""A tiny pre-training on mmengine, for tests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmengine")  # of every test that imports this file
pytest.importorskip("mmcv")

from mmengine.config import Config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.registry import HOOKS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = REPOSITORY / "configs" / "mmseg" / "quick"
_numbers = itertools.count()


@HOOKS.register_module()
class StopAt(Hook):
    """Ends a run early, without making it a shorter one."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        runner.train_loop.stop_training = runner.iter + 1 >= self.iteration


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 48)) -> Path:
    """PNG files of blobs and noise, each different."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
        pixels = (pixels + rng.integers(-20, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def write_labelled(root: Path, count: int = 4, columns: int = 6) -> Path:
    """A semantic data set of pictures [32, 8 * columns] whose label, one of three, is written in their colour, in
    squares of 8 pixels; the first row of squares is ignored."""
    colours = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250]], np.uint8)
    rng = np.random.default_rng(3)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            labels = rng.integers(0, 3, (4, columns)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            Image.fromarray(colours[labels]).save(root / "images" / split / f"{i}.png")
            labels[:8] = 255
            Image.fromarray(labels).save(root / "annotations" / split / f"{i}.png")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


def tiny_config(source: Path, work_dir: Path, name: str = "dmt_jepa", **changes: Any) -> Config:
    """A quick configuration made tiny; `changes` are keys with "__" for dots."""
    cfg = Config.fromfile(QUICK / f"{name}.py")
    cfg.merge_from_dict(
        {
            "model.arch": {"width": 24, "depth": 1, "heads": 2},
            "model.predictor": {"width": 16, "depth": 1, "heads": 2},
            "model.img_size": 32,
            "model.patch_size": 4,
            "train_dataloader.dataset.source": str(source),
            "train_dataloader.dataset.pipeline": [{"type": "KeyedResizedCrop", "size": 32}],
            "train_dataloader.batch_size": 4,
            "train_cfg.recipe": None,
            "train_cfg.steps": 6,
            "param_scheduler": [
                {"type": "WarmupCosineLR", "start": 1e-4, "final": 1e-6, "warmup_steps": 2},
                {"type": "RisingWeightDecay", "final": 0.4},
            ],
            "default_hooks.held_out.source": None,
            "default_hooks.held_out.pipeline": [{"type": "KeyedResizedCrop", "size": 32}],
            "default_hooks.logger.interval": 1,
            "default_hooks.checkpoint.interval": 2,
            "default_hooks.checkpoint.max_keep_ckpts": -1,
            "work_dir": str(work_dir),
            "experiment_name": f"tiny{next(_numbers)}",
            "log_level": "WARNING",
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )
    return cfg


def train(cfg: Config) -> Runner:
    """Run to the end."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The model of a checkpoint."""
    return torch.load(path, weights_only=True)["state_dict"]


def log_lines(work_dir: Path) -> list[dict[str, float]]:
    """What each iteration logged, of the newest log in a folder."""
    newest = sorted(work_dir.glob("*/vis_data/scalars.json"))[-1]
    return [json.loads(line) for line in newest.read_text().splitlines()]


def logged(work_dir: Path, key: str) -> list[float]:
    """A logged value by iteration, of the newest log in a folder."""
    return [line[key] for line in log_lines(work_dir)]
