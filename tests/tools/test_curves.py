"""Curves of runs: resumed logs are joined, both toolkits are read, and a picture shows what the table says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import curves  # noqa: E402
from PIL import Image  # noqa: E402


def write_log(file: Path, lines: Iterable[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def entry(step: int, **more: float) -> dict:
    """A line of mmengine: RankMe is measured every 100 steps and repeated between."""
    rank = 20.0 - (step - 1) // 100
    values = {"loss": 1 / step, "target_variance": 0.5 + step / 1000, "rankme_dense_centred": rank}
    return {**values, "explained_variance": -2 + step / 100, "lr": 1e-3, "iter": step, "step": step, **more}


@pytest.fixture
def mm_run(tmp_path: Path) -> Path:
    """A run of 400 steps that stopped at 260 and went on from 200."""
    folder = tmp_path / "mm"
    write_log(folder / "20260101_000000/vis_data/scalars.json", (entry(i) for i in range(20, 261, 20)))
    later = [entry(i, loss=9.0 if i == 220 else 1 / i) for i in range(220, 401, 20)]
    write_log(folder / "20260102_000000/vis_data/scalars.json", later)
    return folder


@pytest.fixture
def d2_run(tmp_path: Path) -> Path:
    lines = [
        {"iteration": i, "total_loss": 3.0 - i / 100, "target_variance": 0.7} for i in range(19, 200, 20)
    ]
    lines.insert(1, {"iteration": 0, "rankme_dense_centred": 40.0})
    lines += [{"iteration": 100, "rankme_dense_centred": 10.0}, {"iteration": 199, "explained_variance": 0.1}]
    write_log(tmp_path / "d2" / "metrics.json", lines)
    return tmp_path / "d2"


def probe_file(path: Path, run: str = "mm", size: int = 80, untrained: float = 24.0, **rows: dict) -> Path:
    content = {
        name: {"linear_mIoU": value} for name, value in (("position", 17.0), ("colour_position", 22.0))
    }
    content |= {"untrained_0": {"linear_mIoU": 23.0}, "untrained": {"linear_mIoU": untrained}}
    for step, value in ((100, 21.0), (400, 25.0)):
        about = {"run": run, "step": step, "encoder": "target", "file": "x"}
        content[f"{run}/iter_{step}"] = {"linear_mIoU": value, **about}
    protocol = {"config": f"configs/{path.stem}.py", "size": [size, size], "untrained_seeds": [0]}
    path.write_text(json.dumps({**content, **rows, "protocol": protocol}))
    return path


# --- reading


def test_a_resumed_run_is_one_series(mm_run: Path) -> None:
    series = curves.read_run(str(mm_run))
    assert list(series["loss"]) == list(range(20, 401, 20))
    assert series["loss"][200] == 1 / 200 and series["loss"][220] == 9.0  # the course that was kept


def test_what_was_given_up_is_left_out(tmp_path: Path) -> None:
    write_log(tmp_path / "1/vis_data/scalars.json", (entry(i) for i in range(5, 101, 5)))
    write_log(tmp_path / "2/vis_data/scalars.json", (entry(i) for i in (60, 90)))
    assert list(curves.read_run(str(tmp_path))["loss"]) == [*range(5, 60, 5), 60, 90]


def test_the_names_of_both_toolkits_meet(mm_run: Path, d2_run: Path) -> None:
    loss, variance, rank, explained = curves.MEASURES
    theirs = curves.read_run(str(d2_run))
    assert loss.of(theirs)[19] == pytest.approx(2.81) and len(loss.of(theirs)) == 10
    assert rank.of(theirs) == {0: 1.0, 100: 0.25}  # relative to the first value
    assert set(variance.of(theirs).values()) == {0.7} and explained.of(theirs) == {199: 0.1}
    ours = curves.read_run(str(mm_run))
    assert rank.of(ours) == {20: 1.0, 120: 0.95, 220: 0.9, 320: 0.85, 400: 0.85}  # without its repetitions
    assert len(explained.of(ours)) == 20


def test_a_line_that_is_being_written_is_left_out_and_no_other(tmp_path: Path) -> None:
    file = write_log(tmp_path / "1/vis_data/scalars.json", [entry(20), entry(40)])
    whole = file.read_text()
    file.write_text(whole + '{"loss": 0.')
    assert list(curves.read_run(str(tmp_path))["loss"]) == [20, 40]
    file.write_text('{"loss": 0.\n' + whole)
    with pytest.raises(ValueError, match="line 1 of .*scalars.json' is no JSON object"):
        curves.read_run(str(tmp_path))


def test_probes_of_files_and_of_logs(tmp_path: Path) -> None:
    context = {"linear_mIoU": 12.0, "run": "mm", "step": 400, "encoder": "context", "file": "x"}
    unknown = {"linear_mIoU": 50.0, "run": "mm", "step": None, "encoder": "target", "file": "x"}
    first = probe_file(tmp_path / "a.json", **{"c": context, "u": unknown})
    second = probe_file(tmp_path / "b.json", run="other", untrained=26.0)
    probes = curves.read_probes([str(first), str(second)], "linear_mIoU")
    assert probes.curves == {
        ("mm", "target"): {100: 21.0, 400: 25.0},
        ("mm", "context"): {400: 12.0},
        ("other", "target"): {100: 21.0, 400: 25.0},
    }
    assert probes.floors == {"position": 17, "colour_position": 22, "untrained": 24, "untrained (b)": 26}
    logged = {"probe/linear_mIoU": {0: 1.0}, "probe/linear_mIoU_pixels_position": {0: 9.0, 5: 9.0}}
    curves.add_logged(probes, "mm", logged, "linear_mIoU")  # the file's are there already
    assert ("mm", "target") in probes.curves and "pixels_position" not in probes.floors
    curves.add_logged(probes, "third", logged, "linear_mIoU")
    assert probes.curves["third", "target"] == {0: 1.0} and probes.floors["pixels_position"] == 9.0


def test_probed_runs_of_one_name_stay_apart(tmp_path: Path) -> None:
    files = []
    for method, value in (("dmt_jepa", 30.0), ("ijepa", 28.0)):
        row = {"linear_mIoU": value, "run": "vit", "step": 9, "encoder": "target"}
        row["file"] = f"work_dirs/{method}/vit/iter_9.pth"
        content = {"vit/iter_9": row, "protocol": {"config": f"{method}.py", "size": [80, 80]}}
        files.append(tmp_path / f"{method}.json")
        files[-1].write_text(json.dumps(content))
    probes = curves.read_probes([str(file) for file in files], "linear_mIoU")
    names = curves.run_names(["work_dirs/dmt_jepa/vit/", "work_dirs/ijepa/vit"])
    assert probes.curves == {(names[0], "target"): {9: 30.0}, (names[1], "target"): {9: 28.0}}
    assert list(curves.read_probes([str(files[0])], "linear_mIoU").curves) == [("vit", "target")]


# --- table and picture


def test_the_table_gives_quarters_and_the_lowest() -> None:
    points = {step: float((step - 60) ** 2) for step in range(0, 101, 10)}
    assert curves.at_quarters(points) == [3600, 1600, 100, 100, 1600]  # nearest: the first of two
    text = curves.summary([("run", "loss", {**points, 70: math.nan}), ("longer name", "x", {5: math.nan})])
    head, first, second = text.splitlines()
    assert head.split()[2:] == ["0%", "25%", "50%", "75%", "100%", "lowest", "at", "step"]
    assert first.split()[-2:] == ["0", "60"] and second.split()[-2:] == ["nan", "-"]


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the command in this process; gives what it printed or its exit message."""
    monkeypatch.delenv("JEPA_TRACEBACK", raising=False)

    def run(*given: object) -> str:
        monkeypatch.setattr(sys, "argv", ["curves.py", *map(str, given)])
        try:
            curves.main()
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return run


def test_the_whole_command(tool, mm_run: Path, d2_run: Path, tmp_path: Path, monkeypatch) -> None:
    kept = []
    monkeypatch.setattr(curves.plt, "close", kept.append)
    out = tmp_path / "new" / "curves.png"
    text = tool(mm_run, d2_run, "--out", out, "--probe", probe_file(tmp_path / "p.json", run="elsewhere"))
    rows = [line.split()[0] for line in text.splitlines()[1:-1]]
    assert rows == ["mm"] * 4 + ["d2"] * 4 + ["elsewhere"] and text.splitlines()[-1] == str(out)
    assert Image.open(out).format == "PNG" and Image.open(out).size[0] > 1000
    (figure,) = kept
    titles = [axis.get_title() for axis in figure.axes[:5]]
    assert titles[:4] == [m.title for m in curves.MEASURES] and "linear mIoU" in titles[4]
    drawn = [[list(line.get_xdata()) for line in axis.lines[:2]] for axis in figure.axes[:2]]
    assert drawn == [[list(range(20, 401, 20)), list(range(19, 200, 20))]] * 2
    assert figure.axes[3].get_ylim()[0] == -1  # explained variance starts at -1.8
    assert list(figure.axes[4].lines[0].get_ydata()) == [21, 25] and len(figure.axes[4].lines) == 1 + 3
    legend = [part.get_text() for part in figure.axes[5].get_legend().get_texts()]
    assert legend == ["mm", "d2", "elsewhere"]
    colours = {axis.lines[1].get_color() for axis in figure.axes[:4]}
    assert len(colours) == 1


def test_held_out_images_have_panels_where_a_run_logged_them(tool, tmp_path: Path, monkeypatch) -> None:
    kept = []
    monkeypatch.setattr(curves.plt, "close", kept.append)
    beyond, overall = "explained_variance_beyond_position", "explained_variance"
    measured = [
        {f"held_out_{beyond}": -9.0 + 3 * (i // 100), f"held_out_{overall}": i / 400} for i in range(401)
    ]
    write_log(tmp_path / "mm/1/vis_data/scalars.json", (entry(i, **measured[i]) for i in range(100, 401, 20)))
    lines = [{"iteration": i, "total_loss": 1.0} for i in range(0, 200, 20)]
    write_log(tmp_path / "d2/metrics.json", [*lines, {"iteration": 199, f"held_out/{beyond}": 0.25}])
    text = tool(tmp_path / "mm", tmp_path / "d2", "--out", tmp_path / "c.png")
    (figure,) = kept
    shown = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(shown)[:4] == [m.title for m in curves.MEASURES]
    assert list(shown)[4:] == ["held out: explained variance", "held out: explained beyond position"]
    axis = shown["held out: explained beyond position"]
    drawn = [
        dict(zip(*(map(float, values) for values in line.get_data()), strict=True)) for line in axis.lines
    ]
    assert drawn == [{100: -6, 200: -3, 300: 0, 400: 3}, {199: 0.25}]  # without the repetitions between
    assert axis.get_ylim()[0] == -1
    assert (
        len(figure.axes) == 9 and not figure.axes[8].axison
    )  # four, two, the probes' and the legend; one empty
    assert [line.split("  ")[0] for line in text.splitlines() if "beyond position" in line] == ["mm", "d2"]


def test_without_probes_and_with_equal_names(tool, mm_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "b" / "mm"
    write_log(other / "1/vis_data/scalars.json", [entry(20)])
    text = tool(mm_run, other, "--out", tmp_path / "c.svg")
    assert text.count(str(other)) == 4 and (tmp_path / "c.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["absent", "--out", "a.png"], "the run's folder 'absent' does not exist"),
        (["{empty}", "--out", "a.png"], "holds no values of a run: give a work_dir"),
        (["{mm}", "--out", "a.xyz"], "--out a.xyz: give a name that ends in .png"),
        (["{mm}", "--out", "a.png", "--probe", "no.json"], "there is no file 'no.json' (--probe)"),
        (["{mm}", "--out", "a.png", "--probe", "{log}"], "is no valid json"),
        (["{mm}", "--out", "a.png", "--probe", "{list}"], 'has no "protocol": give what vit_probe.py wrote'),
        (["{mm}", "--out", "a.png", "--probe", "{p}", "--score", "knn_mIoU"], "--score one of linear_mIoU"),
        (["{mm}", "--out", "a.png", "--probe", "{p}", "{q}"], "measured with other values of size"),
    ],
)
def test_each_mistake_is_one_sentence(tool, mm_run: Path, tmp_path: Path, given: list, sentence: str) -> None:
    places = {
        "mm": mm_run,
        "empty": tmp_path,
        "log": next(mm_run.rglob("scalars.json")),
        "list": tmp_path / "list.json",
        "p": probe_file(tmp_path / "p.json"),
        "q": probe_file(tmp_path / "q.json", size=96),
    }
    (tmp_path / "list.json").write_text("[1]")
    message = tool(*(part.format(**places) for part in given))
    assert message.startswith("error: ") and sentence in message and "\n" not in message
