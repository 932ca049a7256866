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
        "MODEL.MASK_JEPA.RANK_PERIOD": 0,
        "OUTPUT_DIR": str(out),
    }
    pairs = tiny.options(tiny.SMALL, tiny.BACKBONE, tiny.PRETRAIN, PLAIN, own, changes)
    return ["--config-file", f"detectron2/quick/{config}.yaml", *flags, *map(str, pairs)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def written(folder: Path, *names: str) -> list[float]:
    """Of each written iteration."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [line[name] for line in lines for name in names if name in line]


def assert_equal_runs(one: Path, other: Path, names: tuple[str, ...], learning_rate: float = 0.001) -> None:
    want = written(one, *names)
    assert want and written(other, *names) == pytest.approx(want, rel=1e-4)
    assert largest_difference(weights(one), weights(other)) < learning_rate * STEPS
    assert share_beyond(weights(one), weights(other), 1e-5) < 0.01


JEPA_LOSSES = ("total_loss", "loss_recon", "loss_denoise", "grad_norm")


@pytest.fixture(scope="module")
def mask_jepa(images, tmp_path_factory) -> Path:
    """One process: 4 steps of 4 of 5 images, so that batches stand across the ends of the data."""
    out = tmp_path_factory.mktemp("one")
    changes = {"DATASETS.UNLABELLED": (images,), "DATASETS.UNLABELLED_TEST": (images,)}
    changes["MODEL.MASK_JEPA.FREEZE_BACKBONE"] = False
    in_processes(1, "train_net.py", arguments("mask_jepa", out, changes), out)
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_mask_jepa(mask_jepa, images, tmp_path, world) -> None:
    changes = {"DATASETS.UNLABELLED": (images,), "DATASETS.UNLABELLED_TEST": (images,)}
    changes["MODEL.MASK_JEPA.FREEZE_BACKBONE"] = False
    in_processes(world, "train_net.py", arguments("mask_jepa", tmp_path, changes), tmp_path)
    assert_equal_runs(mask_jepa, tmp_path, JEPA_LOSSES)
    assert int(weights(tmp_path)["step"]) == STEPS
    log = (tmp_path / "log.txt").read_text()
    assert f"effective batch 4 = {BATCH // world} images x {world} processes x 1 accumulated" in log
    want, found = (json.loads((out / "evaluation.json").read_text()) for out in (mask_jepa, tmp_path))
    assert found["metrics"] == pytest.approx(want["metrics"], rel=1e-3) and found["images"] is None


def fixed_points() -> None:
    """Mask2Former draws points of a process's own: here all take the same."""
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
        "DATASETS.TRAIN": (f"folder_semantic@{labelled}@training",),
        "DATASETS.TEST": (f"folder_semantic@{labelled}@validation",),
    }
    for world, name in ((1, "one"), (2, "two")):
        out = tmp_path / name
        in_processes(world, "train_net.py", arguments("semantic", out, sets), out, before=fixed_points)
    one, two = tmp_path / "one", tmp_path / "two"
    assert_equal_runs(one, two, ("total_loss", "loss_ce", "loss_mask", "loss_dice", "grad_norm"))
    same = {**sets, "MODEL.WEIGHTS": str(one / "model_final.pth")}
    out = tmp_path / "evaluated"
    in_processes(2, "train_net.py", arguments("semantic", out, same, "--eval-only"), out)
    want, found = (json.loads((folder / "evaluation.json").read_text()) for folder in (one, out))
    assert found["metrics"] == want["metrics"] and "sem_seg/mIoU" in found["metrics"]
    assert found["images"] == want["images"] == 5
    assert found["checkpoint"] == want["checkpoint"] == str(one / "model_final.pth")
    assert found["config"] == want["config"] == "detectron2/quick/semantic.yaml"
