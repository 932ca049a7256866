"""tools/reproduce.py with ranges, reports on some rows, and files that are broken or outdated."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from jepa_plugins.reproduction import report_html

ROOT = Path(__file__).resolve().parents[2]
RESULT = {"name": "mask_jepa_R50", "kind": "pretraining", "scale": "full", "seed": 0, "metrics": {}}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce_tool", ROOT / "tools" / "reproduce.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        spec.loader.exec_module(module)
    return module


@dataclass
class Done:
    """What a command left: its exit code, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def reproduce(tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Runs a command in this process, without plots."""
    monkeypatch.setattr(report_html, "_can_plot", lambda: False)
    monkeypatch.delenv("JEPA_TRACEBACK", raising=False)

    def run(*args: object) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                tool.main([*map(str, args)])
            except SystemExit as stop:
                return Done(1, out.getvalue(), f"{err.getvalue()}{stop.code}\n")
        return Done(0, out.getvalue(), err.getvalue())

    return run


@pytest.mark.parametrize("command", ["show", "report", "plan"])
def test_a_range_that_runs_backwards_holds_no_row(reproduce, command: str, tmp_path: Path) -> None:
    done = reproduce(command, "20-18", "--out", tmp_path)
    assert done.returncode == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr == "error: 20-18 holds no row: write the smaller number first, 18-20\n"


def test_a_report_on_some_rows_keeps_the_full_one(reproduce, tmp_path: Path) -> None:
    full = reproduce("report", "--out", tmp_path).stdout.split()
    assert [Path(file).name for file in full] == ["report.md", "report.html"]
    before = Path(full[0]).read_text()
    part = reproduce("report", "18-20", "36", "--out", tmp_path).stdout.split()
    assert [Path(file).name for file in part] == ["report_rows_18-20_36.md", "report_rows_18-20_36.html"]
    assert Path(full[0]).read_text() == before and "123 rows" in before
    assert "119 rows were not asked for" in Path(part[0]).read_text()


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"runs": [{"config": 1}]}'])
@pytest.mark.parametrize("command", ["plan", "report"])
def test_broken_costs_are_named_before_anything_is_printed(
    reproduce, command: str, text: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "costs.json"
    if text is not None:
        file.write_text(text)
    done = reproduce(command, "1", "--out", tmp_path / "out", "--costs", file)
    assert done.returncode == 1 and not done.stdout and done.stderr.startswith(f"error: {file} ")
    assert "python benchmarks/cost.py CONFIG --out FILE" in done.stderr and done.stderr.count("\n") == 1


def test_files_that_do_not_count_are_named_beside_the_list_and_the_report(reproduce, tmp_path: Path) -> None:
    result = tmp_path / "full" / "results" / "mask_jepa_R50__seed_0.json"
    costs = tmp_path / "full" / "costs" / "row_78" / "costs.json"
    for path, content in ((result, {**RESULT, "config": "detectron2/gone.yaml"}), (costs, {})):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    listed = reproduce("list", "--out", tmp_path, "--kind", "run")
    rows = {line.split()[0]: line for line in listed.stdout.splitlines()[1:-1]}
    assert rows["1"].endswith("stale") and rows["78"].endswith("unchecked")
    written = reproduce("report", "--out", tmp_path)
    for done in (listed, written):
        assert done.returncode == 0
        lines = done.stderr.splitlines()
        assert len(lines) == 2 and all(line.startswith("note: ") for line in lines)
        assert f"{result} does not count" in done.stderr and "gone.yaml is not there" in done.stderr
        assert f"{costs} does not count" in done.stderr and "mmseg/dmt_jepa/vit_base16.py" in done.stderr
    assert len(written.stdout.split()) == 2


def test_costs_that_were_measured_stand_in_the_report(reproduce, tmp_path: Path) -> None:
    costs = tmp_path / "quick" / "costs" / "row_78" / "costs.json"
    costs.parent.mkdir(parents=True)
    runs = [{"config": f"mmseg/quick/{name}.py", "parameters": 1234567} for name in ("dmt_jepa", "ijepa")]
    costs.write_text(json.dumps({"hardware": {"gpus": []}, "commit": "c", "runs": runs}))
    page = Path(
        reproduce("report", "78", "--scale", "quick", "--out", tmp_path).stdout.split()[0]
    ).read_text()
    assert page.count("1,234,567") == 2 and "no measurement" not in page and "quick run" in page
    assert "Other configurations" not in page


def test_show_is_for_people(reproduce, tmp_path: Path) -> None:
    shown = reproduce("show", "20", "16", "--out", tmp_path).stdout
    assert "ade20k: " in shown and "DATA" not in shown and "check ade20k" not in shown
    assert "0 of 2 configurations build, 0 of 2 smoke runs passed at this commit" in shown
    assert "cost is measured:\n  detectron2/mask_jepa/R50_in1k.yaml" in shown
