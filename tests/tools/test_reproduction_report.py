"""Reports on the papers' rows: numbers, gaps in them, and what the Markdown, the page and the terminal show."""

from __future__ import annotations

import io
import math
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from statistics import median

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.reproduction import report, report_html
from jepa_plugins.reproduction.manifest import Manifest, ManifestError, load_manifest
from jepa_plugins.reproduction.plots import draw_figure_1, figure_1_bars
from jepa_plugins.reproduction.report_cells import number, ours_text, signed
from jepa_plugins.reproduction.report_rows import Line, RowReport, metric_label, report_rows, sections
from jepa_plugins.reproduction.results import Result

PQ, AP, MIOU = "panoptic_seg/PQ", "segm/AP", "sem_seg/mIoU"
EVIL = 'a <b>bold</b> | pipe & "quote" *star*'
STATES = {
    16: "builds",
    18: "full run",
    20: "full run",
    36: "quoted",
    38: "full run",
    55: "full run",
    64: "drawable",
}


def content() -> dict:
    """A manifest with a row of every kind."""
    experiment = {"config": "detectron2/fine.yaml", "data": ["ade20k"]}
    with_jepa = {**experiment, "pretraining": "mj"}
    experiments = {
        "base_pan": {
            **experiment,
            "title": "M2F panoptic",
            "metrics": {PQ: 39.7, AP: 26.5},
            "tables": ["MJ T1"],
        },
        "base_sem": {
            **experiment,
            "title": "M2F semantic",
            "metrics": {MIOU: 46.6},
            "tables": ["MJ T1", "MJ T10"],
        },
        "jepa_pan": {
            **with_jepa,
            "metrics": {PQ: 41.5, AP: 27.5},
            "tables": ["MJ T1"],
            "baseline": "base_pan",
        },
        "jepa_sem": {
            **with_jepa,
            "title": f"M2F + MJ {EVIL}",
            "metrics": {MIOU: 48.3},
            "tables": ["MJ T1", "MJ T2"],
            "baseline": "base_sem",
            "spread": {MIOU: 0.12},
        },
        "zoo": {**experiment, "weights": "zoo", "finished": True, "metrics": {}, "tables": ["DMT T1"]},
    }
    mj = {"paper": ["mask_jepa"], "origin": ["TRAIN"], "toolkits": ["detectron2"], "where": ["4.1"]}
    rows = {
        1: {**mj, "item": "pre-training", "kind": "run", "pretrainings": ["mj"]},
        16: {
            **mj,
            "item": "Cost report",
            "kind": "run",
            "costs": ["detectron2/pre.yaml", "detectron2/fine.yaml"],
            "quotes": [{"label": "MJ R50", "metrics": {"cost/gpu_hours": 100.0}, "tables": ["MJ T8"]}],
        },
        18: {**mj, "item": "panoptic", "kind": "run", "experiments": ["jepa_pan"]},
        20: {**mj, "item": EVIL, "kind": "run", "experiments": ["jepa_sem"], "notes": ["re_run"]},
        36: {
            **mj,
            "item": "MaskFormer",
            "kind": "quote",
            "origin": ["QUOTE"],
            "quotes": [
                {"label": "MaskFormer R50", "metrics": {PQ: 34.7}, "tables": ["MJ T1"], "source": "its paper"}
            ],
        },
        38: {**mj, "item": "Mask2Former", "kind": "run", "experiments": ["base_pan", "base_sem"]},
        55: {**mj, "item": "again", "kind": "run", "where": ["MJ T2"], "experiments": ["jepa_sem"]},
        64: {**mj, "item": "bars", "kind": "figure", "commands": ["tools/reproduce.py report"]},
        68: {
            "item": "recipe",
            "paper": ["dmt_jepa"],
            "kind": "component",
            "tests": ["tests/core/test_x.py::test_y"],
        },
        96: {
            "item": "zoo",
            "paper": ["dmt_jepa"],
            "kind": "run",
            "experiments": ["zoo"],
            "toolkits": ["mmengine"],
        },
        97: {
            "item": "DAVIS",
            "paper": ["dmt_jepa"],
            "kind": "run",
            "waits_for": "label propagation",
            "weights": ["zoo"],
        },
    }
    return {
        "families": {
            "pre": {
                "match": ["*/pre*"],
                "launcher": "train_net",
                "seed_key": "SEED",
                "pretrains": True,
                "quick_config": "detectron2/quick/pre.yaml",
            },
            "fine": {"match": ["*"], "launcher": "train_net", "seed_key": "SEED"},
        },
        "data": {
            "ade20k": {
                "how": "python tools/prepare_data.py ade20k --out DATA/ADE",
                "needs": ["ADEChallengeData2016"],
            }
        },
        "weights": {"zoo": {"file": "weights/zoo.pkl", "how": "from the zoo", "licence": "CC BY-NC 4.0"}},
        "pretrainings": {"mj": {"config": "detectron2/pre.yaml", "overrides": {"SOLVER.MAX_ITER": 187500}}},
        "experiments": experiments,
        "rows": rows,
        "notes": {"re_run": "The gain is +1.7 over the\n re-run."},
    }


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    path = tmp_path_factory.mktemp("manifest") / "reproduction.yaml"
    path.write_text(yaml.safe_dump(content(), sort_keys=False), encoding="utf-8")
    return load_manifest(path)


def result(name: str, metrics: dict, seed: int = 0, scale: str = "full", **more) -> Result:
    config = "detectron2/fine.yaml"
    return Result(name, "experiment", scale, seed, config, metrics, {"crop": [512, 512]}, **more)


def line_of(rows: list[RowReport], row: int, metric: str) -> Line:
    return next(
        line
        for found in rows
        if found.row.number == row
        for group in found.groups
        for line in (*group.lines, *group.further)
        if line.metric == metric
    )


# --- numbers


def test_difference_and_gain_are_over_medians(manifest):
    results = [result("jepa_sem", {MIOU: value}, seed) for seed, value in enumerate((48.0, 49.0, 48.2))]
    results += [result("base_sem", {MIOU: value}, seed) for seed, value in enumerate((46.0, 47.0))]
    line = line_of(report_rows(manifest, results, "full", STATES), 20, MIOU)
    assert (line.ours.median, line.ours.low, line.ours.high, line.ours.seeds) == (48.2, 48.0, 49.0, 3)
    assert line.difference == pytest.approx(-0.1)
    assert line.paper_gain == pytest.approx(1.7)
    assert line.gain == pytest.approx(48.2 - 46.5)
    assert line.paper_spread == 0.12


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(0, 100) | st.sampled_from([math.nan, math.inf, None]), max_size=6),
    data=st.data(),
)
def test_only_finite_numbers_count_in_any_order(manifest, values, data):
    results = [result("jepa_sem", {MIOU: value}, seed) for seed, value in enumerate(values)]
    shuffled = data.draw(st.permutations(results))
    line = line_of(report_rows(manifest, shuffled, "full", STATES), 20, MIOU)
    finite = [value for value in values if value is not None and math.isfinite(value)]
    assert line.broken == len(values) - len(finite)
    if finite:
        assert line.ours.median == median(finite)
        assert (line.ours.low, line.ours.high, line.ours.seeds) == (min(finite), max(finite), len(finite))
    else:
        assert line.ours is None and line.difference is None and line.gain is None


def test_results_of_other_scales_stay_out(manifest):
    results = [result("jepa_sem", {MIOU: 1.0}, scale="smoke"), result("base_sem", {MIOU: 40.0})]
    rows = report_rows(manifest, results, "full", STATES)
    assert line_of(rows, 20, MIOU).ours is None
    assert line_of(rows, 38, MIOU).ours.median == 40.0
    assert line_of(report_rows(manifest, results, "smoke", STATES), 20, MIOU).ours.median == 1.0


def test_unreported_metrics_stand_apart_and_classes_stay_in_the_files(manifest):
    metrics = {MIOU: 48.0, "sem_seg/pACC": 80.0, "sem_seg/IoU-wall": 70.0}
    results = [result("jepa_sem", metrics), result("zoo", {"bbox/AP": 51.6, AP: 45.9})]
    rows = {found.row.number: found for found in report_rows(manifest, results, "full", STATES)}
    group = rows[20].groups[0]
    assert [line.metric for line in group.lines] == [MIOU]
    assert [(line.metric, line.paper) for line in group.further] == [("sem_seg/pACC", None)]
    # An experiment of which the paper reports nothing shows what was measured.
    assert [(line.label, line.difference) for line in rows[96].groups[0].lines] == [
        ("box AP", None),
        ("mask AP", None),
    ]


def test_rows_can_be_chosen_and_costs_find_theirs(manifest):
    costs = [
        {
            "hardware": "GPU",
            "commit": "c",
            "runs": [{"config": "configs/detectron2/pre.yaml", "parameters": 47}],
        },
        [{"config": "x"}],
    ]
    rows = report_rows(manifest, [], "full", {}, [manifest.row(16), manifest.row(18)], costs)
    assert [(found.row.number, found.state) for found in rows] == [(16, "unknown"), (18, "unknown")]
    assert [dict(entry) for entry in rows[0].costs] == [
        {"machine": "GPU", "commit": "c", **costs[0]["runs"][0]}
    ]
    assert rows[1].costs == ()


def test_tables_keep_the_papers_apart_and_an_experiment_once(manifest):
    found = sections(report_rows(manifest, [], "full", STATES))
    titles = ["Mask-JEPA, table 1", "Mask-JEPA, table 2", "Mask-JEPA, table 10", "DMT-JEPA, table 1"]
    assert [section.title for section in found] == titles
    entries = {entry.group.title: entry for entry in found[0].entries}
    assert len(entries) == len(found[0].entries) == 5
    assert entries[f"M2F + MJ {EVIL}"].numbers == "20, 55"
    assert entries["MaskFormer R50"].state == "quoted"
    assert found[0].notes == (("20", "The gain is +1.7 over the re-run."),)
    assert found[3].notes == ()
    order = list(entries)
    assert order.index("M2F semantic") < order.index(f"M2F + MJ {EVIL}")
    assert {entry.group.title: entry.numbers for entry in found[1].entries} == {f"M2F + MJ {EVIL}": "55"}


@pytest.mark.parametrize("scale", ["smoke", "quick", "full"])
def test_differences_are_those_of_the_papers_recipe(manifest, scale):
    results = [result("jepa_sem", {MIOU: 44.25}, scale=scale), result("base_sem", {MIOU: 40.0}, scale=scale)]
    found = report.build_report(manifest, results, scale, STATES)
    line = line_of(found.rows, 20, MIOU)
    assert line.gain == 4.25 and line.difference == (pytest.approx(-4.05) if scale == "full" else None)
    for shown in (
        report.markdown(found),
        Page(report.html(found)).text,
        report.show_text(manifest, manifest.row(20), "state", results),
    ):
        assert ("\u22124.05" in shown) == (scale == "full") and "44.25" in shown and "+4.25" in shown


def test_what_an_evaluation_leaves_undefined_is_no_missing_result(manifest):
    results = [result("jepa_pan", {PQ: 0.0}, scale="smoke", undefined=(AP, "segm/AP-wall"))]
    results += [result("zoo", {}, scale="smoke", undefined=("segm/APs",))]
    found = report.build_report(manifest, results, "smoke", STATES)
    line = line_of(found.rows, 18, AP)
    assert line.ours is None and line.undefined == 1 and line.difference is None
    assert line_of(found.rows, 96, "segm/APs").undefined == 1
    assert {row.row.number: row.summary for row in found.rows}[96] == "1 of 1 runs"
    for shown in (report.markdown(found), Page(report.html(found)).text):
        assert "undefined (1 seed)" in shown and "AP-wall" not in shown
    both = [*results, result("jepa_pan", {PQ: 1.0, AP: 2.0}, 1, "smoke")]
    rows = report_rows(manifest, both, "smoke", STATES, [manifest.row(18)])
    assert ours_text(line_of(rows, 18, AP), rows[0].groups[0]) == "2.00 (1 seed; 1 seed undefined)"


def test_origin_is_that_of_the_experiments_numbers():
    changed = content()
    changed["rows"][38]["origin"] = ["ZOO", "TRAIN"]
    changed["experiments"]["base_pan"]["origin"] = "ZOO"
    changed["experiments"]["base_sem"] |= {"origin": "TRAIN", "rerun": True}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reproduction.yaml"
        path.write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
        manifest = load_manifest(path)
    found = report.build_report(manifest, full_results(), "full", STATES)
    origins = {entry.group.name: entry.origin for part in sections(found.rows) for entry in part.entries}
    assert origins["base_pan"] == "ZOO" and origins["base_sem"] == "TRAIN*"
    assert origins["jepa_sem"] == "TRAIN" and origins[""] == "QUOTE"
    assert origins["zoo"] == "not in the paper"  # which reports no number of it
    assert "| TRAIN\\* |" in report.markdown(found) and "TRAIN*;" in Page(report.html(found)).text


def test_labels_tell_tasks_apart():
    assert metric_label(AP, [PQ, AP]) == "AP panoptic"
    assert metric_label(AP, ["bbox/AP", AP]) == "mask AP"
    assert metric_label(AP, [AP]) == "AP"
    assert metric_label("sem_seg/IoU", [PQ]) == "mIoU panoptic"
    assert metric_label("sem_seg/fwIoU") == "fwIoU"


def test_text_of_numbers():
    assert [number(value) for value in (48.0, 27.53, None, math.nan)] == [
        "48.0",
        "27.53",
        "-",
        "not a number",
    ]
    assert [signed(value) for value in (1.5, -0.25, 0.0, -0.001, None)] == [
        "+1.50",
        "\u22120.25",
        "0.00",
        "0.00",
        "-",
    ]


# --- Markdown and the page


class Page(HTMLParser):
    """Checks that tags close in order, and gathers what the tests look at."""

    VOID = ("meta", "br", "input", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def full_results() -> list[Result]:
    values = {"jepa_pan": {PQ: 41.25, AP: 27.0}, "jepa_sem": {MIOU: 48.5}, "base_pan": {PQ: 39.5, AP: 26.0}}
    more = {"commit": "0123456789abcdef0123456789abcdef01234567-dirty", "hardware": {"gpus": ["<GPU>"]}}
    found = [result(name, metrics, seed, **more) for name, metrics in values.items() for seed in (0, 1)]
    return [*found, result("zoo", {MIOU: math.nan})]


@pytest.fixture(scope="module")
def pages(manifest) -> dict[str, str]:
    """The page without and with results."""
    given = {"without": [], "with": full_results()}
    return {key: report.html(report.build_report(manifest, r, "full", STATES)) for key, r in given.items()}


@pytest.mark.parametrize("results", ["without", "with"])
def test_page_is_whole_and_asks_for_nothing(manifest, pages, results):
    text = pages[results]
    page = Page(text)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for a in page.named("a")] + re.findall(r"url\((#[^)]+)\)", text)
    assert {target.lstrip("#") for target in targets} <= set(ids)
    assert not [a for _, a in page.tags if "src" in a] and not page.named("link")
    assert not re.findall(r"""(?:href|src)=["'](?!#)|url\((?!#)|@import""", text)
    tables = page.named("table")
    assert len(tables) == len(page.named("caption")) > 4
    assert all("scope" in cell for cell in page.named("th"))
    assert "viewport" in {a.get("name") for a in page.named("meta")} and "prefers-color-scheme" in text
    assert "<b>bold" not in text and EVIL in page.text
    assert "no result yet" in page.text and "nan" not in page.text.lower().split()
    assert all(f">{row}<" in text for row in manifest.rows)


def test_page_and_markdown_show_the_same_numbers(manifest, pages):
    found = report.build_report(manifest, full_results(), "full", STATES)
    page, text = Page(pages["with"]).text, report.markdown(found)
    for shown in (page, text):
        assert all(
            part in shown
            for part in ("41.25", "48.50", "+0.20", "+1.75", "not a number", "0123456789ab-dirty")
        )
        assert "The gain is +1.7 over the re-run." in shown and "label propagation" in shown
    assert "crop: 512, 512" in page and "crop: 512, 512" in text
    lines = text.splitlines()
    for index, line in enumerate(lines):  # cells never break a table
        if set(line) <= set("|-: ") and "---" in line:
            columns = line.count("|")
            body = [row for row in lines[index:] if row.startswith("|")]
            assert lines[index - 1].count("|") == columns and body
            rows = lines[
                index : index + next((i for i, row in enumerate(lines[index:]) if not row), len(lines))
            ]
            assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {columns}
    assert "<b>" not in text and "<details>" in text


@pytest.mark.parametrize(
    ("scale", "words"),
    [("smoke", "its numbers mean nothing"), ("quick", "not comparable with the papers' numbers")],
)
def test_small_scales_say_so_in_every_title(manifest, scale, words):
    rows = [manifest.row(number) for number in (16, 18, 20, 96)]
    found = report.build_report(manifest, [result("jepa_sem", {MIOU: 2.0}, scale=scale)], scale, STATES, rows)
    headings = [line for line in report.markdown(found).splitlines() if re.match(r"# |### |## [FCAR]", line)]
    assert len(headings) == 9 and all(words in heading for heading in headings)
    text = report.html(found)
    escaped = words.replace("'", "&#x27;")
    for tag in ("caption", "h1", "h2", "h3", "figcaption", "summary"):
        shown = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.DOTALL)
        shown = [title for title in shown if not title.startswith(("jepa_sem, seed", "Other config"))]
        assert shown and all(escaped in title for title in shown), tag
    assert all(escaped in label for label in re.findall(r'<svg[^>]*aria-label="(.*?)"', text))
    assert f"ours ({scale})" in text
    assert words in Page(text).text and f"Scale {scale}" in text
    assert words not in report.markdown(report.build_report(manifest, [], "full", STATES))


def test_figure_1_shows_the_papers_bars_alone_until_ours_are_there(manifest, pages):
    alone = figure_1_bars(manifest, [], "full")
    assert [(bar.backbone, bar.label, bar.with_jepa, bar.paper) for bar in alone] == [
        ("ResNet-50", "PQ", True, 41.5),
        ("ResNet-50", "PQ", False, 39.7),
        ("ResNet-50", "mIoU", True, 48.3),
        ("ResNet-50", "mIoU", False, 46.6),
    ]
    assert all(bar.ours is None for bar in alone)
    svg = draw_figure_1(alone)
    assert "paper, without" in svg and "ours" not in re.sub(r'aria-label="[^"]*"', "", svg)
    both = figure_1_bars(manifest, full_results(), "full")
    assert [bar.ours and bar.ours.median for bar in both] == [41.25, 39.5, 48.5, None]
    assert "ours, with Mask-JEPA" in draw_figure_1(both)
    page = pages["without"]
    assert "Ours: no result yet." in page and "The paper&#x27;s numbers alone: ours no result yet." in page


def test_plots_follow_the_pages_colours_and_keep_text_as_text(manifest):
    svg = draw_figure_1(figure_1_bars(manifest, full_results(), "full"))
    assert "var(--accent)" in svg and "var(--ink)" in svg and "#0102" not in svg
    assert ">41.2<" in svg or ">41.3<" in svg
    assert svg.startswith("<svg role=") and "xml version" not in svg and "<metadata" not in svg


def test_a_page_without_matplotlib_says_so(manifest, monkeypatch):
    monkeypatch.setattr(report_html, "_can_plot", lambda: False)
    page = Page(report.html(report.build_report(manifest, full_results(), "full", STATES)))
    assert not page.named("svg") and "No plots: matplotlib is not installed." in page.text


def test_costs_stand_in_both(manifest, pages):
    measured = {
        "config": "detectron2/pre.yaml",
        "parameters": 47012345,
        "gpu_hours": None,
        "parts": {"backbone": 1},
    }
    measured |= {"seconds_per_step": 0.25, "seconds_per_step_low": 0.24, "seconds_per_step_high": 0.31}
    twin = {"config": "detectron2/quick/pre.yaml", "parameters": 4321}  # no measurement of the recipe
    other = {"config": "mmseg/quick.py", "error": "its <data> is not there"}
    costs = [{"commit": "ab" * 20, "hardware": {"cores": 2}, "threads": 1, "runs": [measured, twin, other]}]
    found = report.build_report(manifest, [], "full", STATES, [manifest.row(16)], costs)
    for shown in (
        Page(report.html(found)).text,
        report.markdown(found).replace("&lt;", "<").replace("&gt;", ">"),
    ):
        assert "47,012,345" in shown and "0.25 (0.24\u20130.31)" in shown and "abababababab" in shown
        assert "Other configurations" in shown and "its <data> is not there" in shown
        assert "no measurement" not in shown and "GPU-hours 100" in shown
        assert shown.index("47,012,345") < shown.index("Other configurations") < shown.index("4,321")
    without = report.build_report(manifest, [], "full", STATES)
    assert "Ours: no measurement yet." in report.markdown(without)
    assert "Ours: no measurement yet." in pages["without"]


def test_write_leaves_two_files(manifest, pages, tmp_path):
    rows = [manifest.row(36)]
    written = report.write(manifest, [], "full", STATES, rows, [], tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "report_rows_36.html",
        "report_rows_36.md",
    }
    page = Page(written[1].read_text(encoding="utf-8"))
    assert "All 1 rows" in page.text and "Figure 1" not in page.text
    assert "10 rows were not asked for" in page.text and "not asked for" not in pages["with"]


def test_a_report_on_some_rows_leaves_the_full_one_alone(manifest, tmp_path):
    def names(*numbers: int) -> list[str]:
        rows = [manifest.row(number) for number in numbers] or None
        return [path.name for path in report.write(manifest, [], "full", STATES, rows, [], tmp_path)]

    assert names() == ["report.md", "report.html"] == names(*manifest.rows)
    assert names(20, 18, 36) == ["report_rows_18_20_36.md", "report_rows_18_20_36.html"]
    assert names(96, 97, 16) == ["report_rows_16_96-97.md", "report_rows_16_96-97.html"]
    assert f"All {len(manifest.rows)} rows" in (tmp_path / "report.html").read_text(encoding="utf-8")


# --- the terminal


def test_list_has_every_row_and_filters(manifest):
    lines = report.list_table(manifest, STATES).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [str(row) for row in manifest.rows]
    assert lines[-1] == "11 of 11 rows" and EVIL in lines[4]

    def rows(**filters: str) -> list[int]:
        text = report.list_table(manifest, STATES, filters).splitlines()[1:-1]
        return [int(line.split()[0]) for line in text]

    assert rows(kind="quote") == [36]
    assert rows(paper="dmt_jepa", kind="run") == [96, 97]
    assert rows(toolkit="mmengine", state="") == [96]
    assert rows(state="drawable") == [64]
    assert rows(table="MJ T1", kind="run") == [18, 20, 38, 55]
    assert rows(state="broken") == []
    with pytest.raises(ManifestError, match="no row stands in table 'T99'"):
        rows(table="T99")
    with pytest.raises(ManifestError, match="there is no filter colour: give paper"):
        rows(colour="red")


def test_list_has_colours_on_a_terminal_only(manifest, monkeypatch):
    pytest.importorskip("rich")
    pipe = io.StringIO()
    report.print_list(manifest, STATES, {}, pipe)
    assert "\x1b" not in pipe.getvalue()
    shown = report.list_table(manifest, STATES, {}, width=80)
    assert "\x1b[" in shown and all(f" {row}" in shown for row in manifest.rows)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(len(line) for line in plain.splitlines()) <= 80

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal = Terminal()
    report.print_list(manifest, STATES, {}, terminal)
    assert terminal.getvalue() == pipe.getvalue()


def test_show_has_everything_of_a_run(manifest):
    results = [
        *full_results(),
        result("jepa_sem", {MIOU: 2.5}, scale="quick"),
        result("base_sem", {MIOU: 46.5}),
    ]
    checks = "2 of 2 configurations build"
    text = report.show_text(manifest, manifest.row(20), "full run", results, checks, "/data")
    assert "DATA" not in text and "needs" not in text
    for part in (
        "experiment jepa_sem",
        "detectron2/fine.yaml",
        "pre-training mj",
        "M2F semantic",
        "prepare_data.py ade20k",
        "paper 48.3 \u00b1 0.12, ours 48.50 (48.50\u201348.50, 2 seeds), difference +0.20",
        "gain paper +1.7 and ours +2.00",
        "checked:       2 of 2 configurations build",
        "ade20k: /data/ADEChallengeData2016\n    to have it: python tools/prepare_data.py ade20k --out /data/ADE",
        "scale quick (not comparable with the paper's)",
        "ours 2.50 (1 seed)",
        "The gain is +1.7 over the re-run.",
        "full seed 0, full seed 1, quick seed 0",
    ):
        assert part in text
    assert "no result yet" in report.show_text(manifest, manifest.row(20), "builds")


def test_show_of_the_other_kinds(manifest):
    show = {row.number: report.show_text(manifest, row, "state") for row in manifest.rows.values()}
    assert "MaskFormer R50: panoptic_seg/PQ 34.7 (MJ T1, its paper)" in show[36]
    assert "tests/core/test_x.py::test_y" in show[68]
    assert "tools/reproduce.py report" in show[64]
    assert (
        "zoo: weights/zoo.pkl; from the zoo; licence CC BY-NC 4.0" in show[96] and "only tested" in show[96]
    )
    assert "waits for:     label propagation" in show[97] and "licence CC BY-NC 4.0" in show[97]
    assert "SOLVER.MAX_ITER 187500" in show[1]
    assert "cost is measured:\n  detectron2/pre.yaml\n  detectron2/fine.yaml" in show[16]


# --- the project's own manifest


def test_the_projects_manifest_is_shown_in_full(monkeypatch):
    manifest = load_manifest()
    monkeypatch.setattr(report_html, "_can_plot", lambda: False)
    found = report.build_report(manifest, [], "full", {})
    assert len(found.bars) == 12 and all(bar.paper is not None for bar in found.bars)
    text = report.html(found)
    page = Page(text)
    assert page.open == [] and f"All {len(manifest.rows)} rows" in page.text
    shown = {entry.group.name for section in sections(found.rows) for entry in section.entries}
    assert {name for row in manifest.rows.values() for name in row.experiments} <= shown
    assert all(" ".join(note.split()) in page.text for note in manifest.notes.values())
    assert report.markdown(found).count("no result yet") > 100
    for row in manifest.rows.values():
        assert report.show_text(manifest, row, "unchecked").startswith(f"row {row.number}: ")


@pytest.mark.parametrize("scale", ["full", "quick"])
@pytest.mark.parametrize("number", [16, 78])
def test_measured_costs_reach_the_projects_rows(monkeypatch, number, scale):
    manifest = load_manifest()
    monkeypatch.setattr(report_html, "_can_plot", lambda: False)
    row = manifest.row(number)
    configs = row.costs if scale == "full" else manifest.costs_of(row, scale)
    entries = [{"config": c, "parameters": 7_000_001 + i} for i, c in enumerate(configs)]
    costs = [{"commit": "c", "hardware": {"gpus": []}, "runs": [*entries, {"config": "other.yaml"}]}]
    found = report.build_report(manifest, [], scale, {}, [row], costs)
    assert [entry["config"] for entry in found.rows[0].costs] == list(configs) and configs
    assert found.rows[0].summary == f"{len(configs)} measured"
    assert [entry["config"] for entry in found.other_costs] == ["other.yaml"]
    for shown in (report.markdown(found), Page(report.html(found)).text):
        assert "no measurement" not in shown
        assert f"Row {number}" in shown and shown.index("7,000,001") < shown.index("Other configurations")


def test_no_data_set_is_shown_as_the_manifest_writes_it():
    manifest = load_manifest()
    for row in manifest.rows.values():
        text = report.show_text(manifest, row, "unchecked", (), "", "/sets")
        assert not re.search(r"\bDATA\b", text), row.number
        assert not any(part in text for part in ("check ade20k", "root ade", "needs ")), row.number
