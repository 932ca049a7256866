"""torchrun's processes for every launcher, through dist_train.sh and dist_test.sh; several machines of detectron2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "mm"), str(TESTS / "d2")]

from launched import TOOLS, environment, free_port, write_program  # noqa: E402

pytestmark = pytest.mark.slow


def script(name: str, *arguments: object, **variables: object) -> subprocess.CompletedProcess:
    command = ["bash", str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=300)


def detectron2_keys(out: Path, images: Path) -> list[object]:
    tiny = pytest.importorskip("tiny")
    own = {"DATASETS.UNLABELLED": (tiny.save_pictures(images),), "SOLVER.MAX_ITER": 2, "OUTPUT_DIR": str(out)}
    return tiny.options(tiny.SMALL, tiny.BACKBONE, tiny.PRETRAIN, own)


def test_train_net(tmp_path: Path) -> None:
    out = tmp_path / "out of runs"
    keys = detectron2_keys(out, tmp_path / "pictures")
    done = script("dist_train.sh", "detectron2/quick/mask_jepa.yaml", 2, *keys)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(torch.load(out / "model_final.pth", weights_only=True)["model"]["step"]) == 2
    assert "effective batch 2 = 1 images x 2 processes x 1 accumulated" in (out / "log.txt").read_text()
    mixed = script("dist_train.sh", "detectron2/quick/mask_jepa.yaml", 1, "--num-gpus", 8, *keys)
    sentence = r"error: torchrun has started 1 processes and --num-gpus 8 --num-machines 1 asks for 8 more: leave out"
    assert mixed.returncode != 0 and re.search(sentence, mixed.stderr)


def test_two_machines_in_detectron2s_own_way(tmp_path: Path) -> None:
    keys = list(map(str, detectron2_keys(tmp_path / "out", tmp_path / "pictures")))
    own = ["--num-gpus", "1", "--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    start = [
        sys.executable,
        str(TOOLS / "train_net.py"),
        "--config-file",
        "detectron2/quick/mask_jepa.yaml",
        *own,
    ]
    running = [
        subprocess.Popen(
            [*start, "--machine-rank", str(rank), *keys], env=environment(), stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1].decode()[-2000:] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert "1 images x 2 processes" in (tmp_path / "out" / "log.txt").read_text()


def test_lazyconfig_train_net(tmp_path: Path) -> None:
    tiny = pytest.importorskip("tiny")
    from test_launchers import LAZY_MASK_JEPA  # tests/d2

    images, out = tiny.save_pictures(tmp_path / "pictures"), tmp_path / "out"
    changes = [f"dataloader.train.sources=['{images}']", *LAZY_MASK_JEPA, f"train.output_dir='{out}'"]
    short = ["train.max_iter=2", "dataloader.train.total_batch_size=2"]
    done = script("dist_train.sh", "detectron2/lazy/quick/mask_jepa.py", 2, *changes, *short)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(torch.load(out / "model_final.pth", weights_only=True)["model"]["step"]) == 2
    assert "effective batch 2 = 1 images x 2 processes x 1 accumulated" in (out / "log.txt").read_text()
    other = [*changes, *short, "train.recipe_batch=32"]
    refused = script("dist_train.sh", "detectron2/lazy/quick/mask_jepa.py", 1, *other)
    sentence = "error: the effective batch is 2, the recipe's 32: set dataloader.train.total_batch_size=32"
    assert refused.returncode != 0 and sentence in refused.stderr


def test_train_and_test(tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    from preparing.synthetic import make_synthetic
    from test_upernet import SMALL_HEADS, options  # tests/mm

    sizes = {"train": 4, "val": 3, "unlabelled": 0, "size": 48, "seed": 0, "workers": 1}
    make_synthetic(tmp_path / "synthetic", **sizes, overwrite=False)
    config, out = "mmseg/quick/upernet_scratch.py", tmp_path / "out of runs"
    changes = ["--cfg-options", *options(tmp_path), *SMALL_HEADS]
    done = script("dist_train.sh", config, 2, "--work-dir", out, *changes)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = json.loads((out / "evaluation.json").read_text())
    done = script("dist_test.sh", config, out / "iter_2.pth", 2, "--work-dir", tmp_path / "tested", *changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "tested" / "evaluation.json").read_text()) == trained


def test_what_torchrun_is_asked_for(tmp_path: Path) -> None:
    write_program(
        tmp_path / "python",
        f'#!/bin/bash\ncase "$1" in *command.py) exec {sys.executable} "$@";; esac\necho "$@"\n',
    )
    words = {"PYTHON": tmp_path / "python"}
    tool = f"{TOOLS}/train.py mmseg/quick/dmt_jepa.py --resume"
    arguments = ("dist_train.sh", "mmseg/quick/dmt_jepa.py", 4, "--resume")
    start = "-m torch.distributed.run --nproc-per-node=4"
    assert script(*arguments, **words).stdout == f"{start} --standalone {tool}\n"
    fixed = f"{start} --master-addr=127.0.0.1 --master-port=29501 {tool}\n"
    assert script(*arguments, **words, PORT=29501).stdout == fixed
    nodes = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "first"}
    several = f"{start} --nnodes=2 --node-rank=1 --master-addr=first --master-port=29500 {tool}\n"
    assert script(*arguments, **words, **nodes).stdout == several
    lost = script(*arguments, **words, NNODES=2)
    assert lost.returncode == 1 and "error: NNODES=2 needs MASTER_ADDR" in lost.stderr


@pytest.mark.parametrize(
    ("count", "variables", "sentence"),
    [
        ("two", {}, "error: GPUS is 'two': give a whole number, 1 or more\n"),
        ("0", {}, "error: GPUS is '0': give a whole number, 1 or more\n"),
        ("1", {"NNODES": "two"}, "error: NNODES is 'two': give a whole number, 1 or more\n"),
        ("1", {"PORT": "http"}, "error: PORT is 'http': give a whole number, 1 or more\n"),
        (
            "1",
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "first"},
            "error: NODE_RANK=2 of NNODES=2: machines are numbered from 0\n",
        ),
    ],
)
@pytest.mark.parametrize("words", [("dist_train.sh", "CONFIG"), ("dist_test.sh", "CONFIG", "a.pth")])
def test_numbers_that_are_none(words, count, variables, sentence) -> None:
    name, *rest = ["mmseg/quick/upernet.py" if word == "CONFIG" else word for word in words]
    done = script(name, *rest, count, **variables)
    assert done.returncode == 1 and done.stderr == sentence
