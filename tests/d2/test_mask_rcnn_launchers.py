"""Mask R-CNN from a pre-training checkpoint, by four launchers: our two tools and detectron2's two, unmodified.

On generated data; and on real images where they are there.
"""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

import lazyconfig_train_net  # noqa: E402
from detectron2.engine import SimpleTrainer  # noqa: E402
from prepare_data import make_synthetic  # noqa: E402
from test_launchers import CONFIGS, Runs, finished, in_this_process, scripts, started  # noqa: E402, F401
from tiny import options  # noqa: E402
from vit_tiny import LAZY, YAML, lazy_overrides, pretraining_checkpoint  # noqa: E402

LAZY_FILE = str(CONFIGS / "lazy" / "quick" / "mask_rcnn.py")
REAL = Path(os.environ.get("JEPA_SHARED", CONFIGS.parents[2] / "shared")) / "data" / "coco_tiny"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[Path, int]]:
    """Data sets in COCO's layout, with their number of classes."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_synthetic(root, train=4, val=3, unlabelled=1, size=72, seed=0, workers=1, overwrite=False)
    found = {"generated": (root, 8)}
    return {**found, "real": (REAL, 80)} if REAL.is_dir() else found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return pretraining_checkpoint(tmp_path_factory.mktemp("pretraining") / "epoch_1.pth")


def yaml_run(out: Path, name: str, source: tuple[Path, int], weights: Path, *flags: str) -> list:
    root, classes = source
    own = {
        "OUTPUT_DIR": str(out / name),
        "MODEL.WEIGHTS": str(weights),
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        "DATASETS.TRAIN": (f"coco_instance@{root}@train2017",),
        "DATASETS.TEST": (f"coco_instance@{root}@val2017",),
    }
    pairs = [str(item) for item in options(YAML, own)]
    return [name, ["--config-file", str(CONFIGS / "quick" / "mask_rcnn.yaml"), *flags, *pairs]]


def lazy_run(out: Path, name: str, source: tuple[Path, int], weights: Path, *flags: str) -> list:
    root, classes = source
    own = {
        "train.output_dir": out / name,
        "train.init_checkpoint": weights,
        "model.roi_heads.num_classes": classes,
        "dataloader.train.datasets": [f"coco_instance@{root}@train2017"],
        "dataloader.test.dataset": f"coco_instance@{root}@val2017",
    }
    return [name, ["--config-file", LAZY_FILE, *flags, *lazy_overrides(LAZY, own)]]


def our_lazy_runs(out: Path, runs: list) -> Runs:
    """tools/lazyconfig_train_net.py in this process."""
    losses, write, log = {}, SimpleTrainer._write_metrics, ""

    def watch(self, values, *args, **kwargs):
        losses[name].append({key: float(value) for key, value in values.items()})
        return write(self, values, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleTrainer, "_write_metrics", watch)
        patch.setenv("JEPA_TRACEBACK", "1")
        for name, arguments in runs:
            losses[name] = []
            lazyconfig_train_net.main(lazyconfig_train_net.build_parser().parse_args(arguments))
            for logger in map(logging.getLogger, ("detectron2", "fvcore", "jepa_plugins")):
                logger.handlers.clear()  # as they were, for other tests
                logger.propagate = True
            log += f"=== run {name}\n" + (out / name / "log.txt").read_text()
    return Runs(out, losses, log)


@pytest.fixture(scope="module")
def ours(sources, checkpoint, tmp_path_factory) -> dict[str, Runs]:
    yaml, lazy = tmp_path_factory.mktemp("yaml"), tmp_path_factory.mktemp("lazy")
    generated = sources["generated"]
    final = lazy / "generated" / "model_final.pth"
    return {
        "yaml": in_this_process(
            yaml, [yaml_run(yaml, name, source, checkpoint) for name, source in sources.items()]
        ),
        "lazy": our_lazy_runs(
            lazy,
            [
                lazy_run(lazy, "generated", generated, checkpoint),
                lazy_run(lazy, "evaluated", generated, final, "--eval-only"),
            ],
        ),
    }


@pytest.fixture(scope="module")
def theirs(scripts, sources, checkpoint, tmp_path_factory) -> dict[str, Runs]:  # noqa: F811
    """detectron2's scripts, side by side, each in a process of its own."""
    out = tmp_path_factory.mktemp("theirs")
    stock, lazy = out / "yaml", out / "lazy"
    stock_runs = [[*yaml_run(stock, "generated", sources["generated"], checkpoint), None]]
    lazy_runs = [[*lazy_run(lazy, name, source, checkpoint), None] for name, source in sources.items()]
    processes = {
        stock: started(
            scripts / "train_net.py", stock, stock_runs, DETECTRON2_ENV_MODULE="jepa_plugins.d2.env"
        ),
        lazy: started(scripts / "lazyconfig_train_net.py", lazy, lazy_runs, DETECTRON2_ENV_MODULE=""),
    }
    return {folder.name: finished(process, folder) for folder, process in processes.items()}


def assert_same(one: Runs, other: Runs, name: str) -> None:
    """Losses of every step, all weights, and the figures."""
    assert len(one.losses[name]) == 4 and one.losses[name] == other.losses[name]
    weights = one.weights(name), other.weights(name)
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert one.figures(name) == other.figures(name)


def assert_evaluated(run: Runs, name: str) -> None:
    figures = run.figures(name)
    assert set(figures) == {"Task: bbox", "Task: segm"}
    for line in figures.values():
        assert line.startswith("AP,AP50,AP75,APs,APm,APl: ")
        assert 0 <= float(line.split(": ")[1].split(",")[0]) <= 100


def test_our_two_tools_do_the_same(ours, checkpoint) -> None:
    assert_same(ours["yaml"], ours["lazy"], "generated")
    assert_evaluated(ours["yaml"], "generated")
    for run in ours.values():
        assert "the target encoder ('target_encoder') was taken" in run.log
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    after = ours["yaml"].weights("generated")["backbone.net.blocks.1.mlp.fc1.weight"]
    start = before["target_encoder.blocks.1.mlp.fc1.weight"]
    # four small steps away from the target encoder, and not from the other one
    assert 0 < float((after - start).abs().max()) < 0.01
    assert float((after - before["encoder.blocks.1.mlp.fc1.weight"]).abs().max()) > 0.01


def test_evaluating_a_trained_detector(ours) -> None:
    assert ours["lazy"].figures("evaluated") == ours["lazy"].figures("generated")


def test_detectron2s_own_launchers_do_the_same(ours, theirs) -> None:
    assert_same(ours["yaml"], theirs["yaml"], "generated")
    assert_same(ours["yaml"], theirs["lazy"], "generated")
    assert "build_optimizer of jepa_plugins instead of detectron2's" in theirs["yaml"].log


def test_real_images_through_both_launchers(ours, theirs) -> None:
    if "real" not in ours["yaml"].losses:
        pytest.skip(f"{REAL} does not exist; set JEPA_SHARED to the folder that holds the shared data")
    assert_same(ours["yaml"], theirs["lazy"], "real")
    assert_evaluated(ours["yaml"], "real")


def test_resuming_our_lazy_tool_equals_never_having_stopped(ours, sources, checkpoint, tmp_path) -> None:
    straight = ours["lazy"]
    name, arguments = lazy_run(tmp_path, "resumed", sources["generated"], checkpoint, "--resume")
    (tmp_path / "resumed").mkdir()
    halfway = straight.folder / "generated" / "model_0000001.pth"
    (tmp_path / "resumed" / halfway.name).write_bytes(halfway.read_bytes())
    (tmp_path / "resumed" / "last_checkpoint").write_text(halfway.name)
    resumed = our_lazy_runs(tmp_path, [[name, arguments]])
    assert resumed.losses[name] == straight.losses["generated"][2:]
    one, other = resumed.weights(name), straight.weights("generated")
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- what the user gets wrong


def said(capsys, *arguments: str) -> str:
    """The one sentence that ends our tool."""
    with pytest.raises(SystemExit) as end:
        lazyconfig_train_net.main(lazyconfig_train_net.build_parser().parse_args(list(arguments)))
    for logger in map(logging.getLogger, ("detectron2", "fvcore", "jepa_plugins")):
        logger.handlers.clear()
        logger.propagate = True
    text = str(end.value)
    assert text.startswith("error: ") and "\n" not in text
    return text


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_errors_are_one_sentence(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ["--config-file", LAZY_FILE]
    out = "train.output_dir=out"
    assert "No config 'nothing.py'" in said(capsys, "--config-file", "nothing.py")
    assert "'train.max_iter' is no change" in said(capsys, *config, "train.max_iter")
    assert "--eval-only needs a checkpoint" in said(capsys, *config, "--eval-only", out)
    missing = said(capsys, *config, "--eval-only", out, "train.init_checkpoint=none.pth")
    assert "there is no checkpoint none.pth" in missing
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"model": Payload(tmp_path / "ran")}, protocol=2))
    bad = said(capsys, *config, "--eval-only", out, "train.init_checkpoint=bad.pth")
    assert "bad.pth" in bad and not (tmp_path / "ran").exists()
    (tmp_path / "half.py").write_text("train = dict(max_iter=3)\n")
    assert "defines no model, optimizer" in said(capsys, "--config-file", str(tmp_path / "half.py"))
