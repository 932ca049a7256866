"""Two and four processes of mmengine's tools give what one gives: losses, weights and figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "mm")]

from launched import in_processes, largest_difference, share_beyond  # noqa: E402
from mm_tiny import logged, tiny_config, weights, write_images  # noqa: E402

import jepa_plugins.mm  # noqa: E402, F401  so that forked processes need not import it

STEPS, BATCH, IMAGES = 7, 4, 11


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), IMAGES)


def run(source: Path, folder: Path, world: int, accumulation: int = 1, images: int = IMAGES) -> Path:
    """Two epochs and one step: 11 images in batches of 4 leave 3, which neither 2 nor 4 divide.

    In 4 processes one has no image of that batch.
    """
    cfg = tiny_config(
        source,
        folder,
        train_cfg__steps=STEPS,
        train_dataloader__batch_size=BATCH // world // accumulation,
        optim_wrapper__accumulative_counts=accumulation,
        model__mask__scope="global",
        model__rank_period=0,
        log_processor__window_size=1,
        default_hooks__checkpoint__interval=STEPS,
    )
    cfg.pop("experiment_name")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.py"
    cfg.dump(str(path))
    in_processes(world, "train.py", [str(path)], folder)
    return folder


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory) -> Path:
    return run(source, tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (4, 1), (2, 2)])
def test_dmt_jepa(source, alone, tmp_path, world, accumulation) -> None:
    run(source, tmp_path, world, accumulation)
    loss = logged(tmp_path, "loss")
    if accumulation == 1:
        for key in ("loss", "grad_norm", "lr", "context_patches", "target_variance", "explained_variance"):
            assert logged(tmp_path, key) == pytest.approx(logged(alone, key), rel=1e-4), key
    else:  # the log has one line an iteration, and the loss of a step is their mean
        loss = [(a + b) / 2 for a, b in zip(loss[::2], loss[1::2], strict=True)]
        assert loss == pytest.approx(logged(alone, "loss"), rel=1e-4)
    want, got = weights(alone / f"iter_{STEPS}.pth"), weights(tmp_path / f"iter_{STEPS}.pth")
    assert largest_difference(want, got) < 1e-4
    assert share_beyond(want, got, 2e-6) < 0.01
    assert int(got["step"]) == STEPS


def test_upernets_evaluation(tmp_path) -> None:
    pytest.importorskip("mmseg")
    from preparing.synthetic import make_synthetic
    from test_upernet import SMALL_HEADS, options  # tests/mm

    # 3 images: the second process has one to spare
    make_synthetic(
        tmp_path / "synthetic", train=4, val=3, unlabelled=0, size=48, seed=0, workers=1, overwrite=False
    )
    config = "mmseg/quick/upernet_scratch.py"
    shrunk = [*options(tmp_path), *SMALL_HEADS]
    one, two = tmp_path / "one", tmp_path / "two"
    in_processes(1, "train.py", [config, "--work-dir", str(one), "--cfg-options", *shrunk], one)
    trained = json.loads((one / "evaluation.json").read_text())
    checkpoint = str(one / "iter_2.pth")
    arguments = [config, checkpoint, "--work-dir", str(two), "--cfg-options", *shrunk]
    in_processes(2, "test.py", arguments, two)
    tested = json.loads((two / "evaluation.json").read_text())
    assert tested["metrics"] == trained["metrics"] and "mIoU" in tested["metrics"]
    assert tested["images"] == trained["images"] == 3 and tested["config"] == config
    assert tested["checkpoint"] == trained["checkpoint"] == checkpoint
