"""Two and four processes of the tools give what one gives: losses, weights, figures, also at the ends of the data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from launched import in_processes, largest_difference, share_beyond

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "d2")]

import tiny  # noqa: E402

# Without batch statistics, which each process has of its own images.
PLAIN = {"MODEL.TIMM.NAME": "test_convnext", "MODEL.TIMM.FREEZE": False, "SOLVER.BACKBONE_MULTIPLIER": 1.0}
# Its steps are as long as the gradients: rounding stays rounding. Adam makes a step of it, see `share_beyond`.
SGD = {"SOLVER.OPTIMIZER": "SGD", "SOLVER.BASE_LR": 0.01, "SOLVER.CLIP_GRADIENTS.ENABLED": False}
STEPS, BATCH = 4, 4


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return tiny.save_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    return tiny.save_segmentation(tmp_path_factory.mktemp("labelled"), count=5)


def arguments(config: str, out: Path, changes: dict, *flags: str) -> list[str]:
    own = {
        "SOLVER.IMS_PER_BATCH": BATCH,
        "SOLVER.MAX_ITER": STEPS,
        "SOLVER.CHECKPOINT_PERIOD": 1,
        "MODEL.MASK_JEPA.RANK_PERIOD": 0,
        "OUTPUT_DIR": str(out),
    }
    pairs = tiny.options(tiny.SMALL, tiny.BACKBONE, tiny.PRETRAIN, PLAIN, own, changes)
    return ["--config-file", f"detectron2/quick/{config}.yaml", *flags, *map(str, pairs)]


def write_every_step() -> None:
    """Figures of each step alone in metrics.json; detectron2's own are medians, every 20 steps."""
    from detectron2.engine import hooks
    from detectron2.utils import events

    periodic, lines = hooks.PeriodicWriter.__init__, events.JSONWriter.__init__
    hooks.PeriodicWriter.__init__ = lambda self, writers, period: periodic(self, writers, 1)
    events.JSONWriter.__init__ = lambda self, json_file: lines(self, json_file, 1)


def weights(folder: Path, name: str = "model_final") -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.pth", weights_only=True)["model"]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of a number that is trained or averaged."""
    real, found = ({k: v for k, v in state.items() if v.is_floating_point()} for state in (one, other))
    return largest_difference(real, found)


def written(folder: Path, *names: str) -> list[float]:
    """Of each written iteration."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [line[name] for line in lines for name in names if name in line]


def assert_equal_figures(one: Path, other: Path, names: tuple[str, ...], tolerance: float = 1e-5) -> None:
    for name in names:
        want = written(one, name)
        assert len(want) == STEPS and written(other, name) == pytest.approx(want, rel=tolerance), name


def assert_equal_weights(one: Path, other: Path) -> None:
    """After steps of SGD: the rounding of numbers near 1, and far below what the steps moved."""
    away, moved = (
        distance(weights(one), weights(other)),
        distance(weights(one), weights(one, "model_0000000")),
    )
    assert away < 1e-6 and away < 1e-4 * moved


JEPA_LOSSES = ("total_loss", "loss_recon", "loss_denoise", "grad_norm")


def run_mask_jepa(world: int, images: str, out: Path, optimiser: dict) -> Path:
    """4 steps of 4 of 5 images, so that batches stand across the ends of the data."""
    changes = {"DATASETS.UNLABELLED": (images,), "DATASETS.UNLABELLED_TEST": (images,), **optimiser}
    changes["MODEL.MASK_JEPA.FREEZE_BACKBONE"] = False
    words = arguments("mask_jepa", out, changes)
    in_processes(world, "train_net.py", words, out, before=write_every_step)
    return out


@pytest.fixture(scope="module")
def mask_jepa(images, tmp_path_factory) -> Path:
    return run_mask_jepa(1, images, tmp_path_factory.mktemp("one"), SGD)


@pytest.mark.parametrize("world", [2, 4])
def test_mask_jepa(mask_jepa, images, tmp_path, world) -> None:
    run_mask_jepa(world, images, tmp_path, SGD)
    assert_equal_figures(mask_jepa, tmp_path, JEPA_LOSSES)
    assert_equal_weights(mask_jepa, tmp_path)
    assert int(weights(tmp_path)["step"]) == STEPS
    log = (tmp_path / "log.txt").read_text()
    assert f"effective batch 4 = {BATCH // world} images x {world} processes x 1 accumulated" in log
    want, found = (json.loads((out / "evaluation.json").read_text()) for out in (mask_jepa, tmp_path))
    assert found["metrics"] == pytest.approx(want["metrics"], rel=1e-3) and found["images"] is None


def test_mask_jepa_with_the_recipes_optimiser(images, tmp_path) -> None:
    one, two = (run_mask_jepa(world, images, tmp_path / str(world), {}) for world in (1, 2))
    assert_equal_figures(one, two, JEPA_LOSSES, tolerance=1e-4)
    assert share_beyond(weights(one), weights(two), 1e-6) < 0.001


def fixed_points() -> None:
    """Mask2Former draws points of a process's own: here all take the same."""
    write_every_step()
    from jepa_plugins.d2.mask2former import criterion, matcher

    def points(*shape: int, device=None) -> torch.Tensor:
        count = shape[-2]
        line = torch.linspace(0.03, 0.97, count, device=device)
        return torch.stack([line, (line * 7.3) % 1], dim=-1).expand(*shape)

    class Torch:
        rand = staticmethod(points)

        def __getattr__(self, name: str):
            return getattr(torch, name)

    criterion.torch = matcher.torch = Torch()


def test_mask2former_and_its_evaluation(labelled, tmp_path) -> None:
    sets = {
        **SGD,
        "DATASETS.TRAIN": (f"folder_semantic@{labelled}@training",),
        "DATASETS.TEST": (f"folder_semantic@{labelled}@validation",),
    }
    for world, name in ((1, "one"), (2, "two")):
        out = tmp_path / name
        in_processes(world, "train_net.py", arguments("semantic", out, sets), out, before=fixed_points)
    one, two = tmp_path / "one", tmp_path / "two"
    assert_equal_figures(one, two, ("total_loss", "loss_ce", "loss_mask", "loss_dice", "grad_norm"))
    assert_equal_weights(one, two)
    same = {**sets, "MODEL.WEIGHTS": str(one / "model_final.pth")}
    out = tmp_path / "evaluated"
    in_processes(2, "train_net.py", arguments("semantic", out, same, "--eval-only"), out)
    want, found = (json.loads((folder / "evaluation.json").read_text()) for folder in (one, out))
    assert found["metrics"] == want["metrics"] and "sem_seg/mIoU" in found["metrics"]
    assert found["images"] == want["images"] == 5
    assert found["checkpoint"] == want["checkpoint"] == str(one / "model_final.pth")
    assert found["config"] == want["config"] == "detectron2/quick/semantic.yaml"
