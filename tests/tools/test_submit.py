"""Submitting with submitit: its executor on this machine for real, and what it asks of Slurm."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("submitit")

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "mm")]

import command  # noqa: E402
import submit  # noqa: E402
from launched import TOOLS  # noqa: E402


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("detectron2/mask_jepa/R50_in1k.yaml", "yaml"),
        ("detectron2/lazy/mask_rcnn_vitb_100ep.py", "lazy"),
        ("detectron2/lazy/quick/mask_jepa.py", "lazy"),
        ("mmseg/dmt_jepa/vit_base16.py", "mmengine"),
        ("configs/mmseg/quick/upernet.py", "mmengine"),
    ],
)
def test_the_tool_of_a_configuration(name: str, kind: str) -> None:
    assert command.kind_of(name) == kind


def test_a_users_own_lazyconfig(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from detectron2.config import LazyCall as L\n")
    assert command.kind_of(str(tmp_path / "mine.py")) == "lazy"
    (tmp_path / "mine.toml").write_text("")
    with pytest.raises(ValueError, match="mine.toml is no configuration: give a .yaml or .py file"):
        command.kind_of(str(tmp_path / "mine.toml"))


def test_commands_in_each_tools_own_options() -> None:
    yaml, lazy = "detectron2/quick/semantic.yaml", "detectron2/lazy/quick/semantic.py"
    mmengine = "mmseg/quick/upernet.py"
    options = {"out": "a b", "seed": 3, "resume": True}
    assert command.train_command(yaml, ["SOLVER.MAX_ITER", "2"], **options) == [
        *(f"{TOOLS}/train_net.py", "--config-file", yaml, "--resume"),
        *("SOLVER.MAX_ITER", "2", "OUTPUT_DIR", "a b", "SEED", "3"),
    ]
    assert command.train_command(lazy, ["train.max_iter=2"], **options)[1:] == [
        *("--config-file", lazy, "--resume", "train.max_iter=2", "train.output_dir='a b'", "train.seed=3")
    ]
    assert command.train_command(mmengine, ["--amp"], **options)[1:] == [
        *(mmengine, "--work-dir", "a b", "--resume", "--amp", "--cfg-options", "randomness.seed=3")
    ]
    changed = command.train_command(mmengine, ["--cfg-options", "a.b=1", "--amp"], seed=3)
    assert changed[2:] == ["--cfg-options", "randomness.seed=3", "a.b=1", "--amp"]
    assert command.test_command(yaml, "c.pth", out="o")[3:] == [
        *("--eval-only", "MODEL.WEIGHTS", "c.pth", "OUTPUT_DIR", "o")
    ]
    assert command.test_command(lazy, "it's.pth")[3:] == ["--eval-only", r"train.init_checkpoint='it\'s.pth'"]
    assert command.test_command(mmengine, "c.pth", ["--tta"], out="o") == [
        *(f"{TOOLS}/test.py", mmengine, "c.pth", "--work-dir", "o", "--tta")
    ]


def test_the_lazy_quotes_are_read_back() -> None:
    config = pytest.importorskip("detectron2.config")
    from omegaconf import OmegaConf

    changes = command.changes("lazy", {"OUTPUT_DIR": "a b, it's (one)", "SEED": 4})
    cfg = config.LazyConfig.apply_overrides(
        OmegaConf.create({"train": {"output_dir": "", "seed": 0}}), changes
    )
    assert cfg.train == {"output_dir": "a b, it's (one)", "seed": 4}


def test_seeds_are_for_trainings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an evaluation has no seeds"):
        submit.submit("mmseg/quick/upernet.py", tmp_path, checkpoint="a.pth", seeds=[1])
    with pytest.raises(ValueError, match="seed 4 is given twice, and two jobs cannot share a folder"):
        submit.submit("mmseg/quick/upernet.py", tmp_path, seeds=[4, 1, 4])


def test_without_slurm_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        submit.main(["mmseg/quick/upernet.py", str(tmp_path / "out"), "--cluster", "slurm"])
    sentence = "error: cluster slurm, but srun is not on the PATH: submit on a machine of the cluster, or to"
    assert stop.value.code.startswith(sentence) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", [["submitit"], ["submitit", "cloudpickle"]])
def test_without_submitit_one_sentence(missing: list[str]) -> None:
    code = "import runpy, sys; sys.modules.update(dict.fromkeys({!r})); {}"
    for start in (f"runpy.run_path({str(TOOLS / 'submit.py')!r}, run_name='__main__')", "import submit"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(missing, start)], cwd=TOOLS, capture_output=True, text=True
        )
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1
        assert last.split(": ", 1)[1].startswith("tools/submit.py needs submitit (") and "pip install" in last
        assert len(done.stderr.splitlines()) == 1 or start == "import submit"


def test_a_requeued_job_is_the_same_without_its_process() -> None:
    job = submit.Job(["a.py", "--resume"], "out")
    job.process = submit.subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    again = job.checkpoint().function
    assert job.process.wait() == -signal.SIGKILL
    assert (again.words, again.folder, again.process) == (job.words, job.folder, None)
    assert pickle.loads(submit.cloudpickle.dumps(job)).words == job.words


STEPS = 30


def configuration(folder: Path) -> str:
    """A tiny pre-training that leaves a checkpoint after every fifth step."""
    from mm_tiny import tiny_config, write_images

    cfg = tiny_config(
        write_images(folder / "images", 10),
        folder / "unused",
        train_cfg__steps=STEPS,
        train_dataloader__batch_size=2,
        model__rank_period=0,
        default_hooks__checkpoint__interval=5,
        log_level="INFO",
    )
    cfg.pop("experiment_name")
    cfg.dump(str(folder / "tiny.py"))
    return str(folder / "tiny.py")


def until(happens, seconds: float = 300.0):
    """The first true value of a function."""
    end = time.monotonic() + seconds
    while not (value := happens()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds a job's processes in Linux's /proc")
def test_a_preempted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes; the signal that Slurm would send reaches both when there is a checkpoint."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out of runs"
    local = {"cluster": "local", "gpus_per_node": 0, "tasks_per_node": 2}
    (job,) = submit.submit(configuration(tmp_path), out, seeds=[3], **local)
    folder = out / "seed_3"
    until(lambda: (folder / "last_checkpoint").exists() or job.done())
    assert not job.done(), job.stderr()
    controller = job._process.pid
    for child in Path(f"/proc/{controller}/task/{controller}/children").read_text().split():
        os.kill(int(child), signal.SIGUSR2)
    assert job.results() == [str(folder)] * 2
    runs = sorted(folder.glob("*/vis_data/scalars.json"))
    steps = [[json.loads(line)["step"] for line in run.read_text().splitlines()] for run in runs]
    assert len(steps) == 2 and steps[1][0] in range(6, STEPS, 5) and steps[1][-1] == STEPS
    saved = torch.load(folder / f"iter_{STEPS}.pth", weights_only=True)
    assert int(saved["state_dict"]["step"]) == STEPS and saved["meta"]["seed"] == 3
    assert "2 images x 2 processes" in next(folder.glob("*/*.log")).read_text()
