"""The training tool as a user runs it: pre-train, resume, evaluate, and what it says when it cannot."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "d2"))

from tiny import BACKBONE, PRETRAIN, SMALL, options, save_pictures  # noqa: E402

CONFIG = "detectron2/quick/mask_jepa.yaml"


def command(*arguments: str) -> subprocess.CompletedProcess:
    """Run the tool in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, str(TESTS.parent / "tools" / "train_net.py"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


def overrides(folder: Path, images: str, **changes) -> list[str]:
    """The command line's KEY VALUE pairs of a tiny run; `__` in a name stands for a dot."""
    own = {"OUTPUT_DIR": str(folder), "DATASETS.UNLABELLED": (images,)}
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return [str(item) for item in options(SMALL, BACKBONE, PRETRAIN, own, named)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture()
def tool(monkeypatch):
    """Run the tool's main in this process, since starting Python takes longer than a tiny run.

    Gives the exit message, or None when it succeeds.
    """
    import train_net

    monkeypatch.delenv("JEPA_TRACEBACK", raising=False)

    def run(*arguments: str) -> str | None:
        parser = train_net.build_parser()
        try:
            train_net.main(parser.parse_args(list(arguments)))
        except SystemExit as stop:
            return str(stop.code)
        finally:
            for name in ("detectron2", "fvcore", "jepa_plugins"):  # as they were, for other tests
                logger = logging.getLogger(name)
                logger.handlers.clear()
                logger.propagate = True
        return None

    return run


def test_pre_training_resuming_and_evaluating(tool, images, tmp_path) -> None:
    first = command("--config-file", CONFIG, *overrides(tmp_path, images, SOLVER__MAX_ITER=2))
    assert first.returncode == 0, first.stderr
    log = (tmp_path / "log.txt").read_text()
    assert "effective batch 2 = 2 images x 1 processes x 1 accumulated" in log
    assert re.search(r"MaskJEPA: [\d,]+ parameters, [\d,]+ trained", log)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert int(saved["model"]["step"]) == 2 and saved["iteration"] == 1
    assert saved["jepa_pretraining"]["trained_level_rows"] == [2]

    longer = overrides(tmp_path, images, SOLVER__MAX_ITER=3)
    assert tool("--config-file", CONFIG, "--resume", *longer) is None
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert int(saved["model"]["step"]) == 3
    assert "Starting training from iteration 2" in (tmp_path / "log.txt").read_text()

    held_out = overrides(
        tmp_path / "eval",
        images,
        DATASETS__UNLABELLED_TEST=(images,),
        MODEL__WEIGHTS=str(tmp_path / "model_final.pth"),
    )
    assert tool("--config-file", CONFIG, "--eval-only", *held_out) is None
    assert "explained_variance" in (tmp_path / "eval" / "log.txt").read_text()
    assert not (tmp_path / "eval" / "model_final.pth").exists()


def test_an_error_is_one_sentence_and_an_exit_code(tmp_path) -> None:
    done = command("--config-file", CONFIG, *overrides(tmp_path, str(tmp_path / "nowhere")))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: DATASETS.UNLABELLED: ") and "nowhere' does not exist" in last


@pytest.mark.parametrize(
    ("config", "changes", "sentence"),
    [
        ("detectron2/quick/mask_jep.yaml", {}, "error: No config .*detectron2/quick/mask_jepa.yaml"),
        (
            CONFIG,
            {"SOLVER__MAX_ITR": 2},
            "error: .*SOLVER.MAX_ITR, which is no .*did you mean SOLVER.MAX_ITER",
        ),
        (CONFIG, {"MODEL__WEIGHTS": "none.pth"}, "error: .*none.pth"),
        (CONFIG, {"SOLVER__RECIPE_IMS_PER_BATCH": 32}, "error: the effective batch is 2, the recipe's 32"),
        (
            CONFIG,
            {"MODEL__MASK_JEPA__MASK__PATCH": 5},
            "error: a mask patch of 5x5 cells is larger than half",
        ),
        (CONFIG, {"MODEL__TIMM__NAME": "resnet19"}, "error: MODEL.TIMM.NAME: timm has no model 'resnet19'"),
        (CONFIG, {"MODEL__PIXEL_MEAN": (1.0,), "MODEL__PIXEL_STD": (1.0,)}, "error: .*has 3 channels"),
        (CONFIG, {"MODEL__META_ARCHITECTURE": "MaskJEP"}, "error: .*MaskJEP"),
        (CONFIG, {"DATASETS__UNLABELLED": ()}, "error: DATASETS.UNLABELLED is empty"),
    ],
)
def test_each_mistake_is_one_sentence(tool, images, tmp_path, config, changes, sentence) -> None:
    message = tool("--config-file", config, *overrides(tmp_path, images, **changes))
    assert message is not None and re.match(sentence, message), message
    assert "\n" not in message


def test_a_resume_of_another_models_checkpoint_is_refused(tool, images, tmp_path) -> None:
    torch.save({"model": {"weight": torch.zeros(3)}, "iteration": 4}, tmp_path / "model_0000004.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    message = tool("--config-file", CONFIG, "--resume", *overrides(tmp_path, images))
    assert message is not None and message.startswith("error: ") and "\n" not in message
