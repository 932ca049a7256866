"""slurm_train.sh and slurm_test.sh with stand-ins for sbatch, srun and scontrol that start real processes here."""

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

from launched import TOOLS, environment, in_processes, stand_ins  # noqa: E402

UPERNET = "mmseg/quick/upernet.py"


def script(name: str, *arguments: object, programs: Path, **variables: object) -> subprocess.CompletedProcess:
    command = ["bash", str(TOOLS / name), *map(str, arguments)]
    env = environment(programs, **variables)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture()
def programs(tmp_path: Path) -> Path:
    return stand_ins(tmp_path / "bin", dry=True)


def submitted(programs: Path) -> tuple[dict, list[str]]:
    (line,) = (programs / "submitted.jsonl").read_text().splitlines()
    options, words = json.loads(line)
    return options, words


def test_what_is_asked_of_slurm(programs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out of runs"
    variables = {
        "PARTITION": "gpu",
        "NODES": 2,
        "GPUS_PER_NODE": 4,
        "CPUS_PER_TASK": 6,
        "TIME": "1-00:00:00",
        "JOB_NAME": "a name",
        "SEEDS": "0 7 2",
        "SBATCH_ARGS": "--account=x --exclusive",
    }
    done = script("slurm_train.sh", UPERNET, out, "--amp", programs=programs, **variables)
    assert done.returncode == 0, done.stderr
    options, words = submitted(programs)
    assert options == {
        **{"job-name": "a name", "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4"},
        **{"cpus-per-task": "6", "partition": "gpu", "time": "1-00:00:00", "account": "x", "exclusive": ""},
        **{"requeue": "", "open-mode": "append", "signal": "B:USR1@120", "array": "0-2"},
        "output": f"{out}/slurm-%A_%a.out",
    }
    assert words[0].endswith("shell/slurm_job.sh") and out.is_dir()
    assert words[2:] == [str(out), "0 7 2", "--resume", "train", UPERNET, "--amp"]


def test_processes_on_the_cpu(programs: Path, tmp_path: Path) -> None:
    variables = {"GPUS_PER_NODE": 0, "TASKS_PER_NODE": 3}
    done = script("slurm_test.sh", UPERNET, "a b.pth", tmp_path / "out", programs=programs, **variables)
    assert done.returncode == 0, done.stderr
    options, words = submitted(programs)
    assert options["ntasks-per-node"] == "3" and options["job-name"] == "upernet_test"
    assert not {"gpus-per-node", "array", "signal", "time", "partition"} & set(options)
    assert words[3:] == ["", "test", UPERNET, "a b.pth"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("mmseg/quick/upernt.py", "out"), 1, "error: No config 'mmseg/quick/upernt.py'"),
        ((UPERNET,), 2, "tools/slurm_train.sh CONFIG OUT_DIR"),
    ],
)
def test_a_mistake_shows_when_submitting(programs, tmp_path, arguments, code, sentence) -> None:
    done = script("slurm_train.sh", *arguments, programs=programs)
    assert done.returncode == code and sentence in done.stderr
    assert not (programs / "submitted.jsonl").exists()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"SEEDS": "0,1,2"},
            "SEEDS holds '0,1,2': give whole numbers with blanks between them, such as SEEDS=",
        ),
        ({"SEEDS": "0 a b"}, "SEEDS holds 'a': give whole numbers with blanks between them"),
        ({"SEEDS": "1 01"}, "SEEDS holds '01': give whole numbers"),
        ({"SEEDS": "0 3 0"}, "SEEDS holds 0 twice, and two jobs cannot share a folder: give each seed once"),
        ({"NODES": "two"}, "NODES is 'two': give a whole number, 1 or more"),
        ({"NODES": "0"}, "NODES is '0': give a whole number, 1 or more"),
        ({"GPUS_PER_NODE": "x"}, "GPUS_PER_NODE is 'x': give a whole number, 0 or more"),
        ({"TASKS_PER_NODE": "0"}, "TASKS_PER_NODE is '0': give a whole number, 1 or more"),
        ({"CPUS_PER_TASK": "1.5"}, "CPUS_PER_TASK is '1.5': give a whole number, 1 or more"),
        ({"GRACE": "2m"}, "GRACE is '2m': give a whole number, 1 or more"),
        ({"MAX_REQUEUES": "-1"}, "MAX_REQUEUES is '-1': give a whole number, 0 or more"),
    ],
)
def test_variables_that_make_no_sense(programs, tmp_path, variables, sentence) -> None:
    done = script("slurm_train.sh", UPERNET, tmp_path / "out", programs=programs, **variables)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {sentence}")
    assert done.stderr.count("\n") == 1
    assert not (programs / "submitted.jsonl").exists() and not (tmp_path / "out").exists()


def test_an_evaluations_variables_are_checked(programs: Path, tmp_path: Path) -> None:
    arguments = (UPERNET, "a.pth", tmp_path / "out")
    done = script("slurm_test.sh", *arguments, programs=programs, GPUS_PER_NODE="all")
    assert done.returncode == 1 and done.stderr.startswith(
        "error: GPUS_PER_NODE is 'all': give a whole number"
    )
    assert not (programs / "submitted.jsonl").exists()


def test_seeds_on_lines_of_their_own(programs: Path, tmp_path: Path) -> None:
    done = script("slurm_train.sh", UPERNET, tmp_path / "out", programs=programs, SEEDS="\n0 1\n2\n")
    assert done.returncode == 0, done.stderr
    options, words = submitted(programs)
    assert options["array"] == "0-2" and words[3] == "0 1 2"


STEPS = 30


def written(folder: Path) -> str:
    """A tiny pre-training that leaves a checkpoint after every fifth step, in a file with blanks in its path."""
    from mm_tiny import tiny_config, write_images

    folder.mkdir()
    cfg = tiny_config(
        write_images(folder / "images", 10),
        folder / "unused",
        train_cfg__steps=STEPS,
        train_dataloader__batch_size=2,
        model__rank_period=0,
        default_hooks__checkpoint__interval=5,
        default_hooks__checkpoint__max_keep_ckpts=2,
    )
    cfg.pop("experiment_name")
    path = folder / "tiny config.py"
    cfg.dump(str(path))
    return str(path)


@pytest.mark.slow
def test_a_requeued_training_equals_one_that_never_stopped(tmp_path: Path) -> None:
    """Two nodes of one process; Slurm's signal comes when there is a checkpoint, and ends the job for a while."""
    programs, out = stand_ins(tmp_path / "bin"), tmp_path / "out of runs"
    config = written(tmp_path / "a folder")
    import jepa_plugins.mm  # noqa: F401  before the processes fork

    plain = tmp_path / "plain"
    seeded = [config, "--work-dir", str(plain), "--cfg-options", "randomness.seed=3"]
    in_processes(2, "train.py", seeded, plain)
    folder = out / "seed_3"
    variables = {"NODES": 2, "GPUS_PER_NODE": 0, "TASKS_PER_NODE": 1, "SEEDS": "3"}
    signal = {"SIGNAL_WHEN_THERE": folder / "last_checkpoint", "SRUN_IMPORTS": "jepa_plugins.mm"}
    done = script("slurm_train.sh", config, out, programs=programs, **variables, **signal)
    (log,) = out.glob("slurm-*_0.out")
    text = log.read_text()
    assert done.returncode == 0, done.stderr + text[-3000:]
    assert text.count("requeueing job") == 1 and text.count("$ srun --kill-on-bad-exit=1") == 2
    runs = sorted(folder.glob("*/vis_data/scalars.json"))
    steps = [[json.loads(line)["step"] for line in run.read_text().splitlines()] for run in runs]
    assert (
        len(steps) == 2 and steps[0][0] == 1 and steps[1][0] in range(6, STEPS, 5) and steps[1][-1] == STEPS
    )
    want, found = (
        torch.load(where / f"iter_{STEPS}.pth", weights_only=True)["state_dict"] for where in (plain, folder)
    )
    assert want.keys() == found.keys()
    assert [name for name in want if not torch.equal(want[name], found[name])] == []


def detectron2_arguments(folder: Path) -> list[str]:
    """Of a tiny Mask-JEPA that leaves a checkpoint after every fifth step."""
    import tiny

    changes = {
        "DATASETS.UNLABELLED": (tiny.save_pictures(folder),),
        "SOLVER.MAX_ITER": STEPS,
        "SOLVER.CHECKPOINT_PERIOD": 5,
        "MODEL.MASK_JEPA.RANK_PERIOD": 0,
    }
    return [str(word) for word in tiny.options(tiny.SMALL, tiny.BACKBONE, tiny.PRETRAIN, changes)]


@pytest.mark.slow
def test_a_requeued_training_of_detectron2_equals_one_that_never_stopped(tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    import jepa_plugins.d2  # noqa: F401  before the processes fork

    programs, out, plain = stand_ins(tmp_path / "bin"), tmp_path / "out of runs", tmp_path / "plain"
    config, changes = "detectron2/quick/mask_jepa.yaml", detectron2_arguments(tmp_path / "pictures")
    own = ["OUTPUT_DIR", str(plain), "SEED", "3"]
    in_processes(2, "train_net.py", ["--config-file", config, *changes, *own], plain)
    folder = out / "seed_3"
    variables = {"NODES": 2, "GPUS_PER_NODE": 0, "TASKS_PER_NODE": 1, "SEEDS": "3"}
    signal = {"SIGNAL_WHEN_THERE": folder / "last_checkpoint", "SRUN_IMPORTS": "jepa_plugins.d2"}
    done = script("slurm_train.sh", config, out, *changes, programs=programs, **variables, **signal)
    (log,) = out.glob("slurm-*_0.out")
    text = log.read_text()
    assert done.returncode == 0, done.stderr + text[-3000:]
    assert text.count("requeueing job") == 1 and text.count("$ srun --kill-on-bad-exit=1") == 2
    starts = re.findall(r"Starting training from iteration (\d+)", (folder / "log.txt").read_text())
    assert starts[0] == "0" and len(starts) == 2 and int(starts[1]) in range(5, STEPS, 5)
    want, found = (
        torch.load(where / "model_final.pth", weights_only=True)["model"] for where in (plain, folder)
    )
    assert want.keys() == found.keys() and int(found["step"]) == STEPS
    assert [name for name in want if not torch.equal(want[name], found[name])] == []


@pytest.mark.slow
def test_an_evaluation_by_two_tasks(tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    import tiny

    labelled = tiny.save_segmentation(tmp_path / "data")
    sets = {f"DATASETS.{key}": (f"folder_semantic@{labelled}@validation",) for key in ("TRAIN", "TEST")}
    model = tiny.tiny_model(sets, name="semantic")
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    changes = tiny.options(tiny.SMALL, tiny.BACKBONE, sets)
    programs, out = stand_ins(tmp_path / "bin"), tmp_path / "out"
    arguments = ["detectron2/quick/semantic.yaml", tmp_path / "model.pth", out, *changes]
    variables = {"GPUS_PER_NODE": 0, "TASKS_PER_NODE": 2, "SRUN_IMPORTS": "jepa_plugins.d2"}
    done = script("slurm_test.sh", *arguments, programs=programs, **variables)
    (log,) = out.glob("slurm-*.out")
    assert done.returncode == 0, done.stderr + log.read_text()[-3000:]
    found = json.loads((out / "evaluation.json").read_text())
    assert "sem_seg/mIoU" in found["metrics"] and found["images"] == 3
    assert found["checkpoint"] == str(tmp_path / "model.pth")
    assert "Rank of current process: 0. World size: 2" in (out / "log.txt").read_text()


@pytest.mark.slow
def test_a_failing_tool_fails_the_job(tmp_path: Path) -> None:
    programs, out = stand_ins(tmp_path / "bin"), tmp_path / "out"
    arguments = ["detectron2/quick/mask_jepa.yaml", out, "DATASETS.UNLABELLED", "()", "SOLVER.MAX_ITR", 1]
    done = script("slurm_train.sh", *arguments, programs=programs, GPUS_PER_NODE=0)
    (log,) = out.glob("slurm-*.out")
    assert done.returncode == 1 and "did you mean SOLVER.MAX_ITER" in log.read_text()
