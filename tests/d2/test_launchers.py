"""detectron2's own tools/train_net.py and tools/lazyconfig_train_net.py, unmodified, against our tools/train_net.py.

The two scripts come from the source distribution that tools/install_detectron2.py knows. It is downloaded once into
the user's cache folder; without it and without a package index these tests are skipped.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

import install_detectron2  # noqa: E402
import train_net  # noqa: E402
from detectron2.engine import SimpleTrainer  # noqa: E402
from prepare_data import make_synthetic  # noqa: E402
from tiny import BACKBONE, PRETRAIN, SMALL, options  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "detectron2"
# Runs a script as `python script arguments` would, several times, and notes every iteration's losses.
DRIVER = """
import json, os, runpy, shutil, sys
from detectron2.engine import SimpleTrainer
script, out, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
record, write = {}, SimpleTrainer._write_metrics
def watch(self, losses, *args, **kwargs):
    record[name].append({key: float(value.detach()) for key, value in losses.items()})
    return write(self, losses, *args, **kwargs)
SimpleTrainer._write_metrics = watch
for name, arguments, checkpoint in runs:
    record[name] = []
    if checkpoint:  # a run that was interrupted behind it
        os.makedirs(os.path.join(out, name))
        shutil.copy(checkpoint, os.path.join(out, name))
        with open(os.path.join(out, name, "last_checkpoint"), "w") as file:
            file.write(os.path.basename(checkpoint))
    print("=== run", name, flush=True)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
with open(os.path.join(out, "losses.json"), "w") as file:
    json.dump(record, file)
"""
STEPS = {"SOLVER.MAX_ITER": 10, "SOLVER.CHECKPOINT_PERIOD": 5}
# A quick LazyConfig as small as `tiny` makes the yaml files.
LAZY = [
    "model.backbone.name=test_resnet",
    "model.sem_seg_head.input_shape={res2:32,res3:48,res4:192,res5:96}",
    "model.sem_seg_head.pixel_decoder.conv_dim=32",
    "model.sem_seg_head.pixel_decoder.mask_dim=32",
    "model.sem_seg_head.pixel_decoder.transformer_enc_layers=1",
    "model.sem_seg_head.pixel_decoder.transformer_nheads=4",
    "model.sem_seg_head.pixel_decoder.transformer_dim_feedforward=32",
    "model.sem_seg_head.transformer_predictor.hidden_dim=32",
    "model.sem_seg_head.transformer_predictor.nheads=4",
    "model.sem_seg_head.transformer_predictor.dim_feedforward=32",
    "model.sem_seg_head.transformer_predictor.dec_layers=2",
    "model.sem_seg_head.transformer_predictor.num_queries=8",
    "dataloader.train.total_batch_size=2",
    "optimizer.lr=0.001",
    "train.max_iter=10",
    "train.checkpointer.period=5",
    "train.seed=5",
]
LAZY_MASK_JEPA = [
    *LAZY,
    "dataloader.train.crop_size=[64,64]",
    "model.head.settings.mask_patch=2",
    "model.head.settings.self_attention_blocks=1",
    "model.ema=[0.996,1.0]",
]
LAZY_SEMANTIC = [
    *LAZY,
    "optimizer.lr=0.01",
    "model.criterion.num_points=64",
    "dataloader.train.mapper.crop_size=[64,64]",
    "dataloader.train.mapper.min_size=[64]",
    "dataloader.train.mapper.size_divisibility=64",
    "dataloader.test.min_size=64",
]
ACCUMULATED = ["dataloader.train.total_batch_size=1", "optimizer.accumulation=2", "train.max_iter=20"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """Folder of detectron2's tools."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepa_plugins"
    archive = cache / "pb1-detectron2-0.6.tar.gz"
    folder = tmp_path_factory.mktemp("source")
    if not archive.is_file():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIP_RETRIES", "1")
            patch.setenv("PIP_DEFAULT_TIMEOUT", "15")
            try:
                found = install_detectron2.download(folder)
            except install_detectron2.InstallError as error:
                pytest.skip(f"detectron2's own launchers are not here, and {error}")
        cache.mkdir(parents=True, exist_ok=True)
        whole = cache / f"{archive.name}.{os.getpid()}"
        shutil.copy(found, whole)
        os.replace(whole, archive)
    install_detectron2.check_hash(archive)
    with tarfile.open(archive) as content:
        for name in ("train_net.py", "lazyconfig_train_net.py"):
            member = content.extractfile(f"pb1-detectron2-0.6/tools/{name}")
            (folder / name).write_bytes(member.read())
    return folder


class Runs:
    """Results of one launcher's runs, each in a folder of its name."""

    def __init__(self, folder: Path, losses: dict[str, list[dict[str, float]]], log: str) -> None:
        self.folder, self.losses, self.log = folder, losses, log

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / name / "model_final.pth", weights_only=True)["model"]

    def halfway(self, name: str) -> Path:
        return self.folder / name / "model_0000004.pth"

    def figures(self, name: str) -> dict[str, str]:
        """Evaluation tables that a run printed last: "copypaste" lines, values by names."""
        own = self.log.split(f"=== run {name}\n")[1].split("=== run ")[0]
        found = re.findall(r"copypaste: (.*)", own)  # twice each, when two loggers write to the terminal
        lines = [line for i, line in enumerate(found) if i == 0 or line != found[i - 1]]
        return {lines[i]: f"{lines[i + 1]}: {lines[i + 2]}" for i in range(0, len(lines), 3)}


def started(script: Path, out: Path, runs: list, **environment: str) -> subprocess.Popen:
    out.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(script), str(out), json.dumps(runs)],
        env={**env, **environment},
        stdout=(out / "log.txt").open("w"),
        stderr=subprocess.STDOUT,
    )


def finished(process: subprocess.Popen, out: Path) -> Runs:
    code, log = process.wait(), (out / "log.txt").read_text()
    assert code == 0, log[-5000:]
    return Runs(out, json.loads((out / "losses.json").read_text()), log)


def yaml_run(out: Path, name: str, config: str, *groups: dict, flags: tuple = (), changes=None) -> list:
    """A run's name and arguments for either train_net.py."""
    own = {"OUTPUT_DIR": str(out / name), **(changes or {})}
    pairs = [str(item) for item in options(SMALL, BACKBONE, STEPS, *groups, own)]
    return [name, ["--config-file", str(CONFIGS / "quick" / config), *flags, *pairs]]


def lazy_run(out: Path, name: str, config: str, *overrides: str, flags: tuple = ()) -> list:
    path = str(CONFIGS / "lazy" / "quick" / config)
    return [name, ["--config-file", path, *flags, *overrides, f"train.output_dir='{out / name}'"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_synthetic(root, train=4, val=8, unlabelled=5, size=96, seed=0, workers=1, overwrite=False)
    return root


def keys_of(data: Path) -> tuple[dict, dict, dict]:
    pretrain = {**PRETRAIN, "DATASETS.UNLABELLED": (str(data / "unlabelled"),)}
    semantic = {
        "DATASETS.TRAIN": (f"folder_semantic@{data}@training",),
        "DATASETS.TEST": (f"folder_semantic@{data}@validation",),
        "SOLVER.BASE_LR": 0.01,  # enough for more than zeros in the evaluation
    }
    panoptic = {
        "DATASETS.TRAIN": (f"coco_panoptic@{data}@train2017",),
        "DATASETS.TEST": (f"coco_panoptic@{data}@val2017",),
        "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
        "SOLVER.BASE_LR": 0.01,
    }
    return pretrain, semantic, panoptic


@pytest.fixture(scope="module")
def ours(data, tmp_path_factory) -> Runs:
    """Our tools/train_net.py, in this process."""
    out = tmp_path_factory.mktemp("ours")
    pretrain, semantic, panoptic = keys_of(data)
    constant = {"SOLVER.POLY_LR_POWER": 0.0, "SOLVER.ACCUMULATION": 2}
    runs = [
        yaml_run(out, "mask_jepa", "mask_jepa.yaml", pretrain),
        yaml_run(out, "accumulated", "mask_jepa.yaml", pretrain, constant),
        yaml_run(out, "semantic", "semantic.yaml", semantic),
        yaml_run(out, "panoptic", "panoptic.yaml", panoptic),
    ]
    return in_this_process(out, runs)


def in_this_process(out: Path, runs: list) -> Runs:
    losses, write, log = {}, SimpleTrainer._write_metrics, ""

    def watch(self, values, *args, **kwargs):
        losses[name].append({key: float(value) for key, value in values.items()})
        return write(self, values, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleTrainer, "_write_metrics", watch)
        patch.setenv("JEPA_TRACEBACK", "1")
        for name, arguments in runs:
            losses[name] = []
            train_net.main(train_net.build_parser().parse_args(arguments))
            for logger in map(logging.getLogger, ("detectron2", "fvcore", "jepa_plugins")):
                logger.handlers.clear()  # as they were, for other tests
                logger.propagate = True
            log += f"=== run {name}\n" + (out / name / "log.txt").read_text()
    return Runs(out, losses, log)


@pytest.fixture(scope="module")
def launched(scripts, data, ours, tmp_path_factory) -> dict[str, Runs]:
    """detectron2's two scripts, side by side, each in a process of its own."""
    out = tmp_path_factory.mktemp("theirs")
    stock, lazy = out / "stock", out / "lazy"
    pretrain, semantic, panoptic = keys_of(data)
    weights = {"MODEL.WEIGHTS": str(stock / "semantic" / "model_final.pth")}
    stock_runs = [
        [*yaml_run(stock, "mask_jepa", "mask_jepa.yaml", pretrain), None],
        [
            *yaml_run(stock, "resumed", "mask_jepa.yaml", pretrain, flags=("--resume",)),
            str(stock / "mask_jepa" / "model_0000004.pth"),
        ],
        [*yaml_run(stock, "semantic", "semantic.yaml", semantic), None],
        [
            *yaml_run(stock, "resumed_ours", "semantic.yaml", semantic, flags=("--resume",)),
            str(ours.halfway("semantic")),
        ],
        [
            *yaml_run(stock, "evaluated", "semantic.yaml", semantic, flags=("--eval-only",), changes=weights),
            None,
        ],
        [*yaml_run(stock, "panoptic", "panoptic.yaml", panoptic), None],
    ]
    images = f"dataloader.train.sources=['{data}/unlabelled']"
    sets = [
        f"model.metadata.dataset='folder_semantic@{data}@training'",
        f"dataloader.train.datasets=['folder_semantic@{data}@training']",
        f"dataloader.test.dataset='folder_semantic@{data}@validation'",
    ]
    jepa = [images, *LAZY_MASK_JEPA]
    accumulated = [*jepa, *ACCUMULATED, "lr_multiplier.power=0.0"]
    fine = [*sets, *LAZY_SEMANTIC]
    final = f"train.init_checkpoint='{lazy / 'semantic' / 'model_final.pth'}'"
    lazy_runs = [
        [*lazy_run(lazy, "mask_jepa", "mask_jepa.py", *jepa), None],
        [*lazy_run(lazy, "accumulated", "mask_jepa.py", *accumulated), None],
        [
            *lazy_run(lazy, "resumed", "mask_jepa.py", *accumulated, flags=("--resume",)),
            str(lazy / "accumulated" / "model_0000004.pth"),
        ],
        [*lazy_run(lazy, "semantic", "semantic.py", *fine), None],
        [
            *lazy_run(lazy, "resumed_semantic", "semantic.py", *fine, flags=("--resume",)),
            str(lazy / "semantic" / "model_0000004.pth"),
        ],
        [*lazy_run(lazy, "evaluated", "semantic.py", *fine, final, flags=("--eval-only",)), None],
    ]
    processes = {
        stock: started(
            scripts / "train_net.py", stock, stock_runs, DETECTRON2_ENV_MODULE="jepa_plugins.d2.env"
        ),
        lazy: started(scripts / "lazyconfig_train_net.py", lazy, lazy_runs, DETECTRON2_ENV_MODULE=""),
    }
    return {folder.name: finished(process, folder) for folder, process in processes.items()}


def assert_equal_weights(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, differing


@pytest.mark.parametrize("launcher", ["stock", "lazy"])
@pytest.mark.parametrize("name", ["mask_jepa", "semantic"])
def test_ten_steps_equal_ours(ours, launched, launcher, name) -> None:
    """Losses of every step and all weights, MaskJEPA's targets and counters among them, to the last bit."""
    theirs = launched[launcher]
    assert len(ours.losses[name]) == 10 and ours.losses[name][0] != ours.losses[name][1]
    assert theirs.losses[name] == ours.losses[name]
    assert_equal_weights(theirs.weights(name), ours.weights(name))
    if name == "mask_jepa":
        assert int(theirs.weights(name)["step"]) == 10 and not bool(theirs.weights(name)["ema_pending"])


@pytest.mark.parametrize(
    ("launcher", "name", "straight", "left"),
    [
        ("stock", "resumed", "mask_jepa", 5),
        ("stock", "resumed_ours", "semantic", 5),  # where our launcher was interrupted
        ("lazy", "resumed_semantic", "semantic", 5),
        ("lazy", "resumed", "accumulated", 15),  # interrupted between two steps of the optimiser
    ],
)
def test_resuming_equals_never_having_stopped(launched, launcher, name, straight, left) -> None:
    runs = launched[launcher]
    assert len(runs.losses[name]) == left
    assert runs.losses[name] == runs.losses[straight][-left:]
    assert_equal_weights(runs.weights(name), runs.weights(straight))


def test_our_launcher_goes_on_where_theirs_stopped(data, ours, launched, tmp_path) -> None:
    halfway = launched["stock"].halfway("mask_jepa")
    (tmp_path / "taken_over").mkdir()
    shutil.copy(halfway, tmp_path / "taken_over")
    (tmp_path / "taken_over" / "last_checkpoint").write_text(halfway.name)
    run = yaml_run(tmp_path, "taken_over", "mask_jepa.yaml", keys_of(data)[0], flags=("--resume",))
    taken_over = in_this_process(tmp_path, [run])
    assert taken_over.losses["taken_over"] == ours.losses["mask_jepa"][5:]
    assert_equal_weights(taken_over.weights("taken_over"), ours.weights("mask_jepa"))


def test_an_accumulating_optimiser_equals_accumulation_in_our_loop(ours, launched) -> None:
    """Twenty batches of one image and ten steps; targets and step counter move with the optimiser alone."""
    theirs = launched["lazy"]
    halves = [sum(losses.values()) for losses in theirs.losses["accumulated"]]
    whole = [sum(losses.values()) for losses in ours.losses["accumulated"]]
    assert len(halves) == 20
    assert [(a + b) / 2 for a, b in zip(halves[::2], halves[1::2], strict=True)] == pytest.approx(
        whole, rel=1e-6
    )
    one, other = theirs.weights("accumulated"), ours.weights("accumulated")
    assert int(one["step"]) == int(other["step"]) == 10
    assert max(float((one[name].double() - other[name].double()).abs().max()) for name in one) < 1e-6


def test_evaluation_under_their_launchers_equals_ours(ours, launched) -> None:
    want = ours.figures("semantic")
    assert list(want) == ["Task: sem_seg"] and not want["Task: sem_seg"].endswith("0.0000,0.0000")
    assert launched["stock"].figures("semantic") == want  # at the end of training
    assert launched["stock"].figures("evaluated") == want  # and by --eval-only
    assert launched["lazy"].figures("semantic") == want
    assert launched["lazy"].figures("evaluated") == want


def test_panoptic_sets_of_a_name_are_evaluated_under_their_launcher(ours, launched) -> None:
    want = ours.figures("panoptic")
    assert set(want) == {"Task: panoptic_seg", "Task: segm", "Task: sem_seg"}
    assert launched["stock"].figures("panoptic") == want


def test_their_log_says_what_is_ours(launched) -> None:
    for name in ("optimizer", "lr_scheduler", "detection_train_loader", "detection_test_loader"):
        assert f"build_{name} of jepa_plugins instead of detectron2's" in launched["stock"].log
