"""The probe command for ViT checkpoints as a user runs it, on generated data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "mm"))

import vit_probe  # noqa: E402
from mm_tiny import tiny_config, write_labelled  # noqa: E402

from jepa_plugins.core.checkpoints import save_atomic  # noqa: E402
from jepa_plugins.mm.cli import configuration, untrained_model  # noqa: E402

KINDS = ("linear", "knn", "kmeans")
SCORES = {f"{kind}_{score}" for kind in KINDS for score in ("mIoU", "accuracy")}
FLOORS = ["position", "colour_position", "pixels_position"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set, a tiny configuration, and checkpoints of step 10 and 20 in "run"."""
    root = tmp_path_factory.mktemp("vit_probe")
    write_labelled(root / "data", count=3, columns=4)
    tiny_config(root, root / "run").dump(str(root / "config.py"))
    (root / "run").mkdir()
    for step in (10, 20):
        model = untrained_model(configuration(str(root / "config.py")), seed=step)
        model.step.fill_(step)
        with torch.no_grad():
            model.encoder.patch_embed.proj.weight.zero_()  # the context encoder is blind
        save_atomic({"state_dict": model.state_dict()}, root / "run" / f"iter_{step}.pth")
    return root


def arguments(folder: Path, *more: str) -> list[str]:
    sets = [f"--{key}=folder_semantic@{folder / 'data'}@{split}" for key, split in
            (("train", "training"), ("val", "validation"))]  # fmt: skip
    return [str(folder / "config.py"), *sets, *more]


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the command in this process; gives what it printed or its exit message."""
    monkeypatch.delenv("JEPA_TRACEBACK", raising=False)

    def run(*given: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vit_probe.py", *given])
        try:
            vit_probe.main()
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return run


def test_the_whole_command(folder: Path, tmp_path: Path) -> None:
    files = [str(folder / "run" / f"iter_{step}.pth") for step in (10, 20)]
    out = tmp_path / "new" / "probe.json"
    more = ["--weights", *files, "--which", "target", "context", "--seeds", "4", "5", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(TESTS.parent / "tools" / "vit_probe.py"), *arguments(folder, *more)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    protocol = content.pop("protocol")
    labels = ["run/iter_10", "run/iter_10 context", "run/iter_20", "run/iter_20 context"]
    assert list(content) == [*FLOORS, "untrained_4", "untrained_5", "untrained", *labels]
    assert all(
        set(row) >= SCORES and all(0 <= row[name] <= 100 for name in SCORES) for row in content.values()
    )
    for name in SCORES:
        mean = (content["untrained_4"][name] + content["untrained_5"][name]) / 2
        assert content["untrained"][name] == pytest.approx(mean)
    row = content["run/iter_20 context"]
    assert (row["run"], row["step"], row["encoder"], row["file"]) == ("run", 20, "context", files[1])
    assert content["run/iter_20"]["linear_mIoU"] > 90 > 60 > row["linear_mIoU"]
    assert (protocol["train_images"], protocol["classes"], protocol["size"]) == (3, 3, [32, 32])
    assert protocol["patch_size"] == 4 and protocol["untrained_seeds"] == [4, 5]
    assert protocol["probes"]["linear"]["steps"] >= 100 and protocol["probes"]["knn"]["k"] == 20
    lines = done.stdout.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("features"))
    rows = [line.rsplit(maxsplit=len(SCORES))[0].strip() for line in lines[start + 1 : -1]]
    assert rows == list(content)


def test_the_chosen_probes_alone_run_and_repeat_themselves(tool, folder: Path, tmp_path: Path) -> None:
    found = []
    for i in range(2):
        out = tmp_path / f"{i}.json"
        more = ["--probes", "linear", "--tokens", "40", "--images", "2", "--seeds", "--size", "24", "40"]
        assert str(out) in tool(*arguments(folder, *more, "--out", str(out)))
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]
    assert found[0].pop("protocol")["cells"] == 40
    assert list(found[0]) == FLOORS
    assert all(set(row) == {"linear_mIoU", "linear_accuracy"} for row in found[0].values())


def test_labels_are_short_where_they_can_be() -> None:
    files = ["a/run/iter_1.pth", "b/run/iter_1.pth", "b/run/iter_2.pth"]
    assert vit_probe.labels_of(files) == [files[0], files[1], "run/iter_2"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--size", "30", "32"], "image size is (30, 32): give height and width, multiples of the patch's 4"),
        (["--tokens", "0"], "at least one cell, got 0"),
        (["--images", "-1"], "--images is a number of images, or 0 for all, got -1"),
        (["--weights", "absent.pth"], "there is no checkpoint 'absent.pth' (--weights)"),
        (["--val", "camvid"], "data set 'camvid' is not known here: give folder_semantic@ROOT@SPLIT"),
        (["--val", "folder_semantic@no@x"], "the image folder 'no/images/x' does not exist"),
        (["--cfg-options", "model.type=JEPAViT"], "describes the model JEPAViT: give the configuration"),
    ],
)
def test_each_mistake_is_one_sentence(tool, folder: Path, more: list[str], sentence: str) -> None:
    message = tool(*arguments(folder, *more))
    assert message.startswith("error: ") and sentence in message and "\n" not in message


def test_files_of_another_kind_are_one_sentence(tool, folder: Path, tmp_path: Path) -> None:
    model = untrained_model(configuration(str(folder / "config.py")))
    held = {k: v for k, v in model.state_dict().items() if not k.startswith("target_encoder")}
    save_atomic({"state_dict": held}, tmp_path / "half.pth")
    fast = ["--probes", "linear", "--seeds", "--weights", str(tmp_path / "half.pth")]
    message = tool(*arguments(folder, *fast))
    assert "half.pth holds no 'target_encoder'" in message and "\n" not in message
    assert "half" in tool(*arguments(folder, *fast, "--encoder", "context"))
    message = tool(*arguments(folder, *fast, "--encoder", "context", "--cfg-options", "model.arch.depth=2"))
    assert "half.pth has 1 blocks and the model 2" in message and "\n" not in message
