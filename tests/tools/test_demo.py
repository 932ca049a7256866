"""The demo's own decisions; the demo itself runs in CI at its smallest size."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
spec = importlib.util.spec_from_file_location("demo", TOOLS / "demo.py")
demo = importlib.util.module_from_spec(spec)
sys.modules["demo"] = demo
spec.loader.exec_module(demo)


def results(pq: float, miou: float) -> dict[str, float]:
    return {"PQ": pq, "AP": 3.0, "mIoU": miou}


@pytest.mark.parametrize(
    "pq, miou, word",
    [(20, 40, ""), (20, 14.9, "mIoU"), (20, 70.1, "mIoU"), (5.0, 40, "PQ"), (20, float("nan"), "mIoU")],
)
def test_uninformative_comparisons_are_named(pq, miou, word):
    problem = demo.informative(results(pq, miou))
    assert (word in problem) if word else problem == ""


def test_table_shows_the_gain():
    rows = demo.table(results(10.0, 40.0), results(12.5, 39.0)).splitlines()
    assert rows[-1].split() == ["gain", "+2.50", "+0.00", "-1.00"]


def test_final_metrics_are_the_last_ones(tmp_path):
    lines = [
        {"iteration": 10, "panoptic_seg/PQ": 1.0, "segm/AP": 1.0, "sem_seg/mIoU": 1.0},
        {"iteration": 20, "panoptic_seg/PQ": 2.0, "segm/AP": 3.0, "sem_seg/mIoU": 4.0},
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert demo.final_metrics(tmp_path) == {"PQ": 2.0, "AP": 3.0, "mIoU": 4.0}


def test_final_miou_is_the_newest_runs_last(tmp_path):
    for number, values in enumerate(([5.0], [1.0, 2.5])):
        file = tmp_path / f"2026010{number}" / "vis_data" / "scalars.json"
        file.parent.mkdir(parents=True)
        lines = [{"loss": 1.0, "step": 1}, *({"mIoU": value, "step": 2} for value in values)]
        file.write_text("\n".join(map(json.dumps, lines)) + "\n")
        os.utime(file, (number, number))
    assert demo.final_miou(tmp_path) == 2.5


def run_main(monkeypatch, tmp_path, size, without, scratch=20.0):
    outcome = {"without": without, "with": results(20, 45), "pictures": ["a.png"], "seconds": {"data": 1.0}}
    outcome.update(scratch=scratch, dmt_jepa=21.5, vit_pictures=["b.png"])
    monkeypatch.setattr(demo, "run", lambda *_: outcome)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--size", size, "--out", str(tmp_path)])
    demo.main()


def test_an_uninformative_demo_fails(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="uninformative"):
        run_main(monkeypatch, tmp_path, "full", results(20, 5))
    assert json.loads((tmp_path / "full" / "demo.json").read_text())["informative"] is False


def test_an_informative_demo_ends_well_and_prints_everything(monkeypatch, tmp_path, capsys):
    run_main(monkeypatch, tmp_path, "full", results(20, 40))
    shown = capsys.readouterr().out
    assert "a.png" in shown and "b.png" in shown and "with Mask-JEPA" in shown and "+5.00" in shown
    assert "from scratch 20.00, from DMT-JEPA 21.50" in shown and "uninformative" not in shown
    assert json.loads((tmp_path / "full" / "demo.json").read_text())["informative"] is True


def test_an_uninformative_comparison_of_vits_is_named(monkeypatch, tmp_path, capsys):
    run_main(monkeypatch, tmp_path, "full", results(20, 40), scratch=6.9)
    shown = capsys.readouterr().out
    assert (
        "This comparison is uninformative: without pre-training the mIoU is 6.9, outside 15 to 70." in shown
    )
    assert json.loads((tmp_path / "full" / "demo.json").read_text())["vit_informative"] is False


def test_the_smallest_size_does_not_pretend(monkeypatch, tmp_path, capsys):
    run_main(monkeypatch, tmp_path, "smoke", results(0, 1))
    assert "its numbers mean nothing" in capsys.readouterr().out


def test_a_failing_stage_ends_the_demo_with_its_log(tmp_path, capsys):
    with pytest.raises(SystemExit, match="the stage data failed") as stop:
        demo.Stages(tmp_path).run("data", "prepare_data.py", "synthetic", "--train", "none")
    assert "invalid int value" in str(stop.value)


@pytest.mark.slow
@pytest.mark.skipif(
    "JEPA_FULL_DEMO" not in os.environ, reason="minutes: set JEPA_FULL_DEMO=1 to run the whole demo"
)
def test_the_whole_demo_is_informative(tmp_path):
    command = [sys.executable, str(TOOLS / "demo.py"), "--out", str(tmp_path)]
    assert subprocess.run(command).returncode == 0
    result = json.loads((tmp_path / "full" / "demo.json").read_text())
    assert result["informative"] and 15 <= result["without"]["mIoU"] <= 70 and result["without"]["PQ"] > 5
    assert all(Path(picture).is_file() for picture in result["pictures"] + result["vit_pictures"])
