"""tools/reproduce.py before it runs anything: what is missing, what is left out, and what it refuses."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import reproduce


def call(*args: object) -> None:
    reproduce.main([str(arg) for arg in args])


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """Folders as the manifest names them, with an image in each."""
    root = tmp_path / "data"
    for file in (
        "imagenet/train/n01440764/a.JPEG",
        "ADEChallengeData2016/images/training/a.jpg",
        "ADEChallengeData2016/images/validation/a.jpg",
        "ADEChallengeData2016/annotations_detectron2/training/a.png",
        "ADEChallengeData2016/annotations_detectron2/validation/a.png",
    ):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return root


def test_stand_ins_are_no_data_set(stand_ins: Path, tmp_path: Path, capsys) -> None:
    call("plan", 20, "--data", stand_ins, "--out", tmp_path, "--gpus", 8)
    said = capsys.readouterr().out
    assert "data imagenet: MISSING: train/*/*.JPEG 1 of 1,281,167 files; python tools/prepare_data.py" in said
    assert "data ade20k: MISSING: images/training/*.jpg 1 of 20,210 files" in said


def test_a_full_run_refuses_to_start_without_its_data(
    stand_ins: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    ran = []
    monkeypatch.setattr(reproduce.Runner, "run", lambda self, stages: ran.append(len(stages)) or [])
    arguments = ("run", 20, "--scale", "full", "--data", stand_ins, "--out", tmp_path, "--gpus", 0)
    with pytest.raises(
        SystemExit, match="nothing was run, for data imagenet, data ade20k would be missing; "
    ):
        call(*arguments)
    assert "# data ade20k: MISSING" in capsys.readouterr().out and not ran
    call(*arguments, "--any-data")
    assert ran == [3] and "# data ade20k: MISSING" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing was run, for weights R50 would be missing"):
        call(*arguments, "--any-data", "--weights", f"R50={tmp_path / 'absent.pkl'}")


def test_arms_without_a_quick_version_are_named(tmp_path: Path, capsys) -> None:
    call("plan", 60, "--scale", "quick", "--out", tmp_path)
    said = capsys.readouterr().out
    for sigma in ("0.2", "0.3", "0.5"):
        assert f"# left out: ade20k_semantic_R50_mask_jepa_sigma_{sigma} has no quick version" in said


def test_a_plan_says_which_stage_uses_less_than_the_machine(tmp_path: Path, capsys) -> None:
    call("plan", 82, "--nodes", 4, "--gpus", 8, "--launcher", "slurm", "--out", tmp_path)
    said = capsys.readouterr().out
    assert (
        "# experiment/ade20k_upernet_vit_base16_dmt_jepa/seed_0, on 2 x 8 of the 4 x 8 GPUs: its batch of 16 "
        in said
    )


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--images-per-gpu", -3), "--images-per-gpu is a number from 1 on, got -3"),
        (("--cpus-per-task", 0), "--cpus-per-task is a number from 1 on, got 0"),
        (("--weights", "R50"), "--weights takes NAME=FILE, got 'R50'"),
    ],
)
def test_options_that_make_no_sense(args, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=sentence):
        call("plan", 20, "--out", tmp_path, *args)


def test_an_interrupted_run_ends_with_the_signal(tmp_path: Path, capsys, monkeypatch) -> None:
    def run(self: reproduce.Runner, stages: list[reproduce.Stage]) -> None:
        raise reproduce.Interrupted(stages[0], signal.SIGTERM)

    monkeypatch.setattr(reproduce.Runner, "run", run)
    with pytest.raises(SystemExit) as ended:
        call("run", 20, "--scale", "smoke", "--out", tmp_path)
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == (
        "error: data/stand_ins was interrupted by SIGTERM: the same command goes on from there\n"
    )


def test_what_is_hidden_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet" / "train"
    for k in range(20):
        (folder / f"n{k}").mkdir(parents=True)
        for name in ("a.JPEG", "b.JPEG", ".c.JPEG", "d.txt"):
            (folder / f"n{k}" / name).write_text("")
    (folder / ".n99").mkdir()
    (folder / ".n99" / "a.JPEG").write_text("")
    found = reproduce.stock("imagenet", tmp_path)
    assert found.files == 40 and found.lacking == ("train/*/*.JPEG 40 of 1,281,167 files",)
