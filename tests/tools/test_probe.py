"""The probe command as a user runs it, on generated data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")
TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "d2"))

import probe  # noqa: E402
from tiny import BACKBONE, PRETRAIN, SMALL, options, save_segmentation, tiny_model  # noqa: E402

from jepa_plugins.core.checkpoints import save_atomic  # noqa: E402

OVERRIDES = [str(item) for item in options(SMALL, BACKBONE, PRETRAIN)]
KINDS = ("linear", "knn", "kmeans")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return save_segmentation(tmp_path_factory.mktemp("data"), count=3, classes=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("weights") / "model_final.pth")
    save_atomic({"model": tiny_model(seed=3).state_dict()}, path)
    return path


def arguments(data: str, *more: str, config: str = "mask_jepa") -> list[str]:
    sets = ["--train", f"folder_semantic@{data}@training", "--val", f"folder_semantic@{data}@validation"]
    size = ["--size", "64", "96"]
    return ["--config-file", f"detectron2/quick/{config}.yaml", *sets, *size, *more, "--opts", *OVERRIDES]


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_the_whole_command(data, checkpoint) -> None:
    chosen = ["--weights", checkpoint, "--which", "online", "ema", "--features", "stride8", "stride4"]
    done = subprocess.run(
        [sys.executable, str(TESTS.parent / "tools" / "probe.py"), *arguments(data, *chosen)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    features = ["stride8", "stride4", "stride8_ema", "stride4_ema"]
    assert [(row["weights"], row["features"]) for row in rows] == [
        ("none", "position"),
        ("none", "colour_position"),
        *(("untrained", name) for name in features),
        *((checkpoint, name) for name in features),
    ]
    scores = {f"{kind}_{score}" for kind in KINDS for score in ("mIoU", "accuracy")}
    for row in rows:
        assert set(row) == {"weights", "features", *scores}
        assert all(0 <= row[name] <= 100 for name in scores)
    # an untrained target is a copy of the online model; the checkpoint holds other weights
    by_row = {(row["weights"], row["features"]): [row[name] for name in sorted(scores)] for row in rows}
    assert by_row["untrained", "stride8"] == by_row["untrained", "stride8_ema"]
    assert by_row["untrained", "stride8"] != by_row[checkpoint, "stride8"]


@pytest.fixture()
def tool(monkeypatch, capsys):
    """Run the command in this process; gives its rows or its exit message."""
    monkeypatch.delenv("JEPA_TRACEBACK", raising=False)

    def run(*given: str) -> list[dict] | str:
        monkeypatch.setattr(sys, "argv", ["probe.py", *given])
        try:
            probe.main()
        except SystemExit as stop:
            return str(stop.code)
        return rows_of(capsys.readouterr().out)

    return run


def test_the_chosen_probes_alone_run_and_repeat_themselves(tool, data) -> None:
    given = arguments(data, "--probes", "knn", "--cells", "50")
    rows = tool(*given)
    assert [row["features"] for row in rows] == ["position", "colour_position", "stride8"]
    assert all(set(row) == {"weights", "features", "knn_mIoU", "knn_accuracy"} for row in rows)
    assert tool(*given) == rows


@pytest.mark.parametrize(
    ("more", "config", "sentence"),
    [
        (["--size", "64", "100"], "mask_jepa", "image size is (64, 100): give two multiples of 32"),
        (["--weights", "none.pth"], "mask_jepa", "none.pth"),
        (
            ["--val", "folder_semantic@nowhere@x"],
            "mask_jepa",
            "the image folder 'nowhere/images/x' does not exist",
        ),
        ([], "semantic", "give the configuration of a pre-training (MaskJEPA)"),
    ],
)
def test_each_mistake_is_one_sentence(tool, data, more, config, sentence) -> None:
    message = tool(*arguments(data, *more, config=config))
    assert isinstance(message, str) and message.startswith("error: ")
    assert sentence in message and "\n" not in message
