"""tools/reproduce.py: every command, and a sample of real smoke runs of both toolkits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools" / "reproduce.py")
SAMPLE = ("20", "81")  # Mask-JEPA into Mask2Former; DMT-JEPA and I-JEPA into Mask R-CNN


def reproduce(*args: object, ok: bool = True) -> str:
    """Output of a command, and what it says on standard error when it is not to succeed."""
    command = [sys.executable, "-W", "ignore", TOOL, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout if ok else done.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the smoke runs of the sample."""
    for package in ("detectron2", "mmengine", "panopticapi"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("reproduction")
    said = reproduce("run", *SAMPLE, "--scale", "smoke", "--gpus", 0, "--out", folder)
    assert "ade20k_semantic_R50_mask_jepa, seed 0: sem_seg/mIoU" in said
    assert "coco_mask_rcnn_vit_base16_dmt_jepa, seed 0: bbox/AP" in said
    return folder


def test_smoke_runs_leave_results_with_their_protocol(out: Path) -> None:
    files = {path.stem: json.loads(path.read_text()) for path in (out / "smoke" / "results").glob("*.json")}
    semantic = files["ade20k_semantic_R50_mask_jepa__seed_0"]
    assert semantic["protocol"]["test sets"] == ["ade20k_sem_seg_val"]
    assert semantic["protocol"]["test short side"] == 64 and semantic["protocol"]["scales"] == "single"
    assert semantic["pretraining"] == "mask_jepa_R50" and 0 <= semantic["metrics"]["sem_seg/mIoU"] <= 100
    boxes = files["coco_mask_rcnn_vit_base16_dmt_jepa__seed_0"]
    assert {"bbox/AP", "segm/AP"} <= set(boxes["metrics"])
    assert boxes["pretraining"] == "dmt_jepa_vit_base16" and boxes["versions"]["detectron2"]
    assert files["dmt_jepa_vit_base16__seed_0"]["kind"] == "pretraining"


def test_a_second_run_does_nothing_again(out: Path) -> None:
    said = reproduce("run", "20", "--scale", "smoke", "--gpus", 0, "--out", out)
    assert said.count("finished before") == 4


def test_states_follow_from_what_has_run(out: Path) -> None:
    listed = reproduce("list", "--out", out, "--kind", "run", "--state", "smoke passed")
    numbers = re.findall(r"^(\d+) ", listed, re.MULTILINE)
    # Rows 1, 18 ... share runs with the sample; those with a run that has not passed are not here.
    assert {"1", "20", "81"} <= set(numbers) and not {"18", "19", "82", "99"} & set(numbers)


def test_the_report_says_what_it_was_made_from(out: Path) -> None:
    written = [Path(line) for line in reproduce("report", "--scale", "smoke", "--out", out).split()]
    page = next(path for path in written if path.suffix == ".html").read_text()
    assert "smoke" in re.search(r"<title>(.*?)</title>", page, re.DOTALL)[1]
    assert not re.findall(r"(?:src|href)=[\"']https?:", page)
    text = next(path for path in written if path.suffix == ".md").read_text()
    assert "48.3" in text and "its numbers mean nothing" in text


def test_every_row_is_listed_and_shown() -> None:
    listed = reproduce("list")
    assert [int(n) for n in re.findall(r"^(\d+)  ", listed, re.MULTILINE)] == list(range(1, 124))
    assert "123 of 123 rows" in listed
    shown = reproduce("show", "20", "MJ T7")
    assert "semantic_R50_mask_jepa.yaml" in shown and "row 15" in shown and "48.3" in shown


def test_a_plan_names_what_is_missing_and_what_it_costs(tmp_path: Path) -> None:
    plan = reproduce("plan", "20", "--nodes", 2, "--gpus", 8, "--launcher", "slurm", "--data", tmp_path)
    assert "srun --nodes=2 --ntasks-per-node=8 --cpus-per-task=8 --gpus-per-node=8" in plan
    assert "data imagenet: MISSING: train/*/*.JPEG missing; python tools/prepare_data.py imagenet" in plan
    assert "pretrain/mask_jepa_R50/seed_0: 100.0 (Mask-JEPA, table 8)" in plan


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("plan", "124"), "there is no row 124"),
        (("plan", "36"), "row 36 is a quote"),
        (("run", "43"), "row 43 waits for"),
        (("run", "21", "--scale", "quick"), "row 21 has no quick version"),
        (("plan", "MJ T99"), "no row stands in table 'MJ T99'"),
        (("plan", "20", "--seeds", "0"), "--seeds is a number from 1 on"),
        (("plan", "20", "--gpus", "3"), "32 images do not divide among 3 processes"),
    ],
)
def test_errors_are_one_sentence(args, sentence, tmp_path: Path) -> None:
    said = reproduce(*args, "--out", tmp_path, ok=False)
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
