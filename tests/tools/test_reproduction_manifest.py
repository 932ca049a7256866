"""The manifest of what the papers report: complete, true to their numbers, and checked while it is read."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from preparing.check import select

from jepa_plugins.config_files import config_root
from jepa_plugins.reproduction.manifest import (
    KINDS,
    Experiment,
    Manifest,
    ManifestError,
    Run,
    default_path,
    load_manifest,
)
from jepa_plugins.reproduction.plan import Choice, Planner, config_chain
from jepa_plugins.reproduction.state import has_test, has_tool

ROOT = Path(__file__).parents[2]
ROWS = 123


@cache
def manifest() -> Manifest:
    """The project's, read once."""
    return load_manifest()


def runs() -> list[Run]:
    """Everything that trains or evaluates."""
    return [*manifest().pretrainings.values(), *manifest().experiments.values()]


# --- complete


def test_all_rows_are_there_in_the_papers_order():
    rows = manifest().rows
    assert list(rows) == list(range(1, ROWS + 1))
    assert {row.kind for row in rows.values()} == set(KINDS)
    assert max(Counter(row.item for row in rows.values()).values()) == 1


def test_every_entry_serves_a_row():
    all_of, rows = manifest(), manifest().rows.values()
    used = set().union(*(row.experiments for row in rows))
    assert set(all_of.experiments) == used
    baselines = {experiment.baseline for experiment in all_of.experiments.values()} - {""}
    assert baselines <= used
    pretrainings = set().union(*(row.pretrainings for row in rows))
    pretrainings |= {experiment.pretraining for experiment in all_of.experiments.values()}
    assert set(all_of.pretrainings) == pretrainings - {""}
    assert set(all_of.notes) == set().union(*(row.notes for row in rows))
    weights = {run.weights for run in runs()} | set().union(*(row.weights for row in rows))
    assert set(all_of.weights) == weights - {""}
    assert set(all_of.data) == set().union(*(run.data for run in runs()))


def test_every_configuration_is_there():
    for run in runs():
        if run.config:
            assert (config_root() / run.config).is_file(), run.name
        else:
            assert run.waits_for, run.name


def test_every_ablation_has_a_pretraining():
    """But for two files that are another's twin."""
    twins = {"table8_both.py", "tableD3_average.py"}  # vit_small16.py, table8_msn.py
    named = {run.config for run in runs()}
    for folder in ("detectron2/mask_jepa", "mmseg/dmt_jepa"):
        files = {
            f"{folder}/ablations/{file.name}" for file in (config_root() / folder / "ablations").iterdir()
        }
        assert {Path(file).name for file in files - named} <= twins | {"__pycache__"}


def test_every_test_that_a_row_names_is_there():
    for row in manifest().rows.values():
        assert [name for name in row.tests if "::" not in name or not has_test(ROOT, name)] == [], row.number


def test_commands_name_tools_options_and_configurations_that_exist():
    for row in manifest().rows.values():
        for command in row.commands:
            assert has_tool(ROOT, command), command
            words = command.split()
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            for word in words[2:]:
                if word.startswith("--"):
                    assert f'"{word}"' in source, command
                if word.endswith((".yaml", ".py")):
                    assert (config_root() / word).is_file(), command


def test_what_is_missing_is_named_by_the_part():
    text = default_path().read_text(encoding="utf-8")
    assert "issue" not in text.lower()
    for row in manifest().rows.values():
        waiting = [manifest().experiments[name].waits_for for name in row.experiments]
        if row.experiments and all(waiting):  # nothing of it runs
            assert row.waits_for or row.pretrainings, row.number


# --- runs fit their configurations


chain = cache(config_chain)


@cache
def content(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def merged(config: str, *keys: str) -> Any:
    """A value of a yaml configuration; None where no file of its chain sets it."""
    for path in chain(config):
        value: Any = content(path)
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def detectron2_runs() -> list[Run]:
    return [run for run in runs() if run.toolkit == "detectron2"]


def test_batches_are_those_of_the_configurations():
    assert {run.batch for run in detectron2_runs()} == {16, 32, 64}
    for run in detectron2_runs():
        assert merged(run.config, "SOLVER", "IMS_PER_BATCH") == run.batch, run.name


def test_a_process_holds_no_more_images_than_the_configuration_has():
    """Of pre-trainings, which accumulate the rest; what cannot accumulate has to hold them all."""
    config = pytest.importorskip("mmengine.config").Config
    held = {}
    for run in manifest().pretrainings.values():
        if run.toolkit == "mmengine":
            most = run.images_per_gpu or manifest().family(run.config).images_per_gpu
            batch_size = config.fromfile(config_root() / run.config).train_dataloader.batch_size
            assert most <= batch_size, run.name
            held[run.name] = most
    assert held["dmt_jepa_vit_huge16"] == held["dmt_jepa_vit_huge14"] == 128
    for run in detectron2_runs():
        assert (run.images_per_gpu or manifest().family(run.config).images_per_gpu) <= run.batch, run.name


def test_data_are_those_of_the_configurations():
    """What a run needs is what `prepare_data.py check` says of the data set that its configuration names."""
    for run in detectron2_runs():
        names = merged(run.config, "DATASETS", "TRAIN") or merged(run.config, "DATASETS", "UNLABELLED")
        names = re.findall(r"[\w/]+", names) if isinstance(names, str) else names
        for name in names:
            checks = [item.name for key in run.data for item in select([manifest().data[key]["check"]])]
            assert {item.name for item in select([name])} <= set(checks), (run.name, name)


def test_data_sets_say_where_they_are_and_what_makes_them():
    for name, entry in manifest().data.items():
        assert entry["how"] and isinstance(entry["needs"], list) and entry["needs"], name
        assert all(path.startswith(entry["root"]) for path in entry["needs"]), name
        if name not in ("davis", "clevr"):  # no command prepares them yet
            folders = {item.folder for item in select([entry["check"]])}
            assert folders == {entry["root"]}, name


def test_the_baseline_is_run_at_both_learning_rates():
    runs = manifest().experiments
    twins = [e for e in runs.values() if e.overrides.get("SOLVER.BASE_LR") == 0.0002]
    compared = {
        e.baseline for e in runs.values() if "mask2former" in e.config and e.pretraining and e.baseline
    }
    trained = {name for name in compared if not runs[name].finished and not runs[name].pretraining}
    assert trained and {f"{name}_lr_2e-4" for name in trained} <= {e.name for e in twins}
    for experiment in twins:
        assert merged(experiment.config, "SOLVER", "BASE_LR") == 0.0001 and not experiment.metrics
        assert manifest().experiments[experiment.name.replace("_lr_2e-4", "")].config == experiment.config


def test_metrics_are_those_that_the_evaluators_write():
    for experiment in manifest().experiments.values():
        metrics, config = set(experiment.metrics), experiment.config
        if not config or not metrics:
            continue
        if config.startswith("mmseg/upernet/"):
            assert metrics == {"mIoU"}
        elif "mask_rcnn" in config:
            assert metrics == {"bbox/AP", "segm/AP"}
        else:
            miou = "sem_seg/IoU" if "cityscapes" in config else "sem_seg/mIoU"
            expected = {"panoptic_seg/PQ", "segm/AP", miou}
            if "panoptic" not in config:
                expected = {"segm/AP", "segm/AP50", "segm/APs", "segm/APm", "segm/APl"}
                expected = {miou} if "semantic" in config else expected
            assert metrics <= expected, experiment.name


def test_a_gain_is_over_the_same_task():
    for experiment in manifest().experiments.values():
        if experiment.baseline:
            base = manifest().experiments[experiment.baseline]
            assert base.data == experiment.data and not base.finished, experiment.name
            assert set(base.metrics) >= set(experiment.metrics), experiment.name
            assert not base.pretraining or base.pretraining.startswith("ijepa"), experiment.name


def test_hours_have_a_source():
    known = [run for run in runs() if run.gpu_hours is not None]
    assert known and all(run.hours_source for run in known)
    assert manifest().pretrainings["mask_jepa_R50"].gpu_hours == 100.0
    for run in runs():
        assert bool(run.hours_source) == (run.gpu_hours is not None), run.name
    steps = {"dmt_jepa_vit_base16": 608.2, "ijepa_vit_base16": 606.4}
    for name, milliseconds in steps.items():
        hours = 375600 * milliseconds / 1000 / 3600 * 8
        assert manifest().pretrainings[name].gpu_hours == pytest.approx(hours, abs=0.06)


def length(run: Run) -> int:
    """Of a pre-training: images of all its steps, or where a configuration counts epochs its recipe's steps."""
    if run.toolkit == "detectron2":
        return merged(run.config, "SOLVER", "MAX_ITER") * run.batch
    config = pytest.importorskip("mmengine.config").Config.fromfile(config_root() / run.config)
    return config.train_cfg.recipe.steps * run.batch


def test_scaled_hours_are_those_of_the_other_run_times_what_is_said():
    ways = Counter()
    for run in manifest().pretrainings.values():
        if "scaled" not in run.hours_source:
            continue
        name, way, number = re.match(r"scaled from (\S+) by (.+) \(x ([\d.]+)", run.hours_source).groups()
        other, factor = manifest().pretrainings[name], float(number)
        assert run.gpu_hours == pytest.approx(factor * other.gpu_hours, rel=1e-3), run.name
        origin = run.hours_source.rsplit(": ", 1)[-1]
        assert origin in other.hours_source, run.name
        if way == "length":
            assert length(run) / length(other) == pytest.approx(factor, rel=1e-3), run.name
        ways[way.split()[0]] += 1
    assert ways["length"] > 30 and set(ways) == {"length", "multiply-adds", "patches", "time"}


def test_every_table_that_hours_come_from_names_its_paper():
    for run in runs():
        tables = re.findall(r"([\w-]*),? ?table \w", run.hours_source)
        assert set(tables) <= {"Mask-JEPA", "DMT-JEPA"}, run.name


def test_the_papers_test_size_stands_beside_the_rows_that_it_touches():
    for number in (81, 99):
        assert "test_size" in manifest().row(number).notes
    note = " ".join(manifest().notes["test_size"].split())
    assert "INPUT.MIN_SIZE_TEST 800 INPUT.MAX_SIZE_TEST 1333" in note and "1024" in note
    config = manifest().experiments["coco_mask_rcnn_vit_base16_dmt_jepa"].config
    assert merged(config, "INPUT", "MIN_SIZE_TEST") == 1024


def test_the_document_lists_the_rows_that_have_a_quick_version():
    only = set(manifest().scale_data["quick"]["only"])
    rows = {
        number
        for number, row in manifest().rows.items()
        if row.kind == "run"
        and not row.waits_for
        and (row.costs or only & {*row.experiments, *row.pretrainings})
    }
    text = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    listed = set()
    for part in re.search(r"- \*\*quick\*\*.*?rows ([\d, to\n]+)", text)[1].replace("\n", " ").split(","):
        numbers = [int(number) for number in re.findall(r"\d+", part)]
        listed |= set(range(numbers[0], numbers[-1] + 1))
    assert listed == rows


def test_licences_of_public_weights_are_named():
    for weights in manifest().weights.values():
        assert weights.licence != "unknown" and "https://" in weights.how, weights.name
        assert weights.file in weights.how and "://" not in weights.file, weights.name
        assert not weights.url or weights.url.replace("detectron2://", "") in weights.how, weights.name
    non_commercial = {name for name, item in manifest().weights.items() if item.licence == "CC BY-NC 4.0"}
    assert {"ijepa_vit_huge14", "mae_vit_base16", "mae_vit_large16", "vicregl_R50"} <= non_commercial


def test_runs_that_start_from_public_weights_read_them():
    for run in runs():
        if not run.weights or run.waits_for or run.weights == "R50":  # every R50 configuration names R-50.pkl
            continue
        planner = Planner(manifest(), Choice(Path("/out"), Path("/data")))
        row = next(
            row for row in manifest().rows.values() if run.name in (*row.experiments, *row.pretrainings)
        )
        stage = next(stage for stage in planner.plan([row]) if stage.run == run)
        assert manifest().weights[run.weights].file in stage.shell().split(), run.name
        assert ("--eval-only" in stage.shell()) == run.finished


# --- true to the papers


@dataclass(frozen=True)
class Printed:
    """A line of the tables of target numbers: table, method, metric (or backbone), cells with numbers."""

    table: str
    method: str
    metric: str
    cells: tuple[str, ...]

    @property
    def decimals(self) -> list[float]:
        """Numbers with a decimal point, in their order."""
        return [float(text) for cell in self.cells for text in re.findall(r"\d+\.\d+", cell)]

    @property
    def numbers(self) -> set[float]:
        """All numbers, in thousands with commas too."""
        found = re.findall(r"\d{1,3}(?:,\d{3})+|\d+\.\d+|\d+", " ".join(self.cells))
        return {float(text.replace(",", "")) for text in found}


@pytest.fixture(scope="module")
def printed(shared) -> list[Printed]:
    path = shared / "design" / "COVERAGE.md"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    part = path.read_text(encoding="utf-8").split("## Part C.")[1]
    first, second = part.split("### C.2 DMT-JEPA")
    lines = []
    for paper, text in (("MJ", first), ("DMT", second.split("### C.3")[0])):
        for line in re.findall(r"^\|.*\|$", text, re.MULTILINE):
            cells = [cell.strip().replace("*", "") for cell in line.strip("|").split("|")]
            table = cells[0].split(" ")[0]
            if table in ("Table", "App.") or set(table) <= {"-"}:
                continue
            lines.append(Printed(f"{paper} {table}", cells[2], cells[3], tuple(cells[4:])))
    return lines


def entries_of(table: str) -> list[tuple[str, bool, tuple[float, ...]]]:
    """Title, whether it is pre-trained here, and numbers of what stands in a table, each once."""
    found = [
        (experiment.title, bool(experiment.pretraining), tuple(experiment.metrics.values()))
        for experiment in manifest().experiments.values()
        if table in experiment.tables
    ]
    for row in manifest().rows.values():
        found += [(q.label, False, tuple(q.metrics.values())) for q in row.quotes if table in q.tables]
    return found


def numbers_of(entries: Iterable[tuple[str, bool, tuple[float, ...]]]) -> set[float]:
    return {float(value) for _, _, values in entries for value in values}


def test_every_printed_number_stands_under_its_table(printed):
    tables = dict.fromkeys(line.table for line in printed)
    assert len(tables) == 13 + 14
    for table in tables:
        wanted = {value for line in printed if line.table == table for value in line.decimals}
        assert wanted and wanted - numbers_of(entries_of(table)) == set(), table


def test_no_number_stands_there_that_the_papers_do_not_print(printed):
    known: dict[str, set[float]] = {}
    for line in printed:
        known.setdefault(line.table, set()).update(line.numbers)
    for experiment in manifest().experiments.values():
        allowed = set().union(*(known[table] for table in experiment.tables))
        assert {float(v) for v in experiment.metrics.values()} <= allowed, experiment.name
    for row in manifest().rows.values():
        for quote in row.quotes:
            allowed = set().union(*(known[table] for table in quote.tables))
            assert {float(v) for v in quote.metrics.values()} <= allowed, row.number


def test_numbers_with_and_without_mask_jepa_are_not_mixed_up(printed):
    for line in printed:
        if not line.table.startswith("MJ ") or line.table == "MJ T8":
            continue
        entries = entries_of(line.table)
        base, ours = (dataclasses.replace(line, cells=(cell,)).decimals for cell in line.cells)
        assert set(base) <= numbers_of(entry for entry in entries if not entry[1]), line
        assert set(ours) <= numbers_of(entry for entry in entries if entry[1]), line


def test_numbers_of_one_model_stay_together(printed):
    """PQ, AP and mIoU of a panoptic model; AP of instances with its parts by size, or AP50."""
    size = {"PQ / AP_pan / mIoU_pan": 3, "AP (S/M/L)": 4, "AP / AP50": 2}
    checked = 0
    for line in printed:
        counts = [size[part] for part in re.split("; ", line.metric) if part in size]
        for cell in line.cells if counts else ():
            numbers = dataclasses.replace(line, cells=(cell,)).decimals
            for count in counts if len(numbers) >= sum(counts) else ():
                group, numbers = tuple(numbers[:count]), numbers[count:]
                assert group in {values for _, _, values in entries_of(line.table)}, line
                checked += 1
    assert checked > 25


def test_every_quoted_number_has_a_source():
    quotes = [(row, quote) for row in manifest().rows.values() for quote in row.quotes]
    assert len(quotes) > 40
    for row, quote in quotes:
        assert quote.source, (row.number, quote.label)
        if quote.source.startswith("as printed in DMT-JEPA"):  # and then in its own tables
            shown = re.findall(r"[A-Z]\.\d|\b\d", quote.source.split(", table")[1])
            assert shown == [table.removeprefix("DMT ").removeprefix("T") for table in quote.tables]


def test_the_papers_re_runs_are_marked(shared):
    """What table 1 to 3 print with a * is a re-run, and so is trained by the paper; the zoo's numbers are not."""
    path = shared / "design" / "COVERAGE.md"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    part = path.read_text(encoding="utf-8").split("### C.1")[1].split("### C.2")[0]
    known: dict[str, set[float]] = {}
    for line in re.findall(r"^\| (?:T1|T2|T3) \|.*\|$", part, re.MULTILINE):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        base = cells[4]
        known.setdefault(f"MJ {cells[0]}", set()).update(map(float, re.findall(r"(\d+\.\d+)\*", base)))
    assert sum(map(len, known.values())) == 25
    marked = [e for e in manifest().experiments.values() if e.rerun]
    for table, starred in known.items():
        values = {v for e in marked if table in e.tables for v in e.metrics.values()}
        assert starred <= values and values - starred <= {41.9, 61.5}, table  # the rest of a marked model
    rows = manifest().rows.values()
    for experiment in manifest().experiments.values():
        theirs = {o for row in rows if experiment.name in row.experiments for o in row.origin}
        origin = {experiment.origin} if experiment.origin else theirs
        if experiment.rerun:
            assert origin == {"TRAIN"} and not experiment.finished, experiment.name
        if experiment.metrics and experiment.name != "cityscapes_panoptic_deeplab_zoo":
            assert len(origin) == 1, experiment.name
        if experiment.metrics and experiment.finished:
            assert "ZOO" in origin, experiment.name


def test_other_pretrainings_stand_beside_the_one_that_they_are_compared_with():
    for number in (3, 4):
        names = manifest().row(number).experiments
        assert {f"ade20k_{task}_R50_mask_jepa" for task in ("panoptic", "instance", "semantic")} <= set(names)


def test_ablations_have_their_own_numbers_in_order(printed):
    lines = [line for line in printed if line.table in ("MJ T5", "MJ T6")]
    assert len(lines) == 6
    for number, line in zip(range(57, 63), lines, strict=True):
        named = [manifest().experiments[name] for name in manifest().row(number).experiments]
        ours = [e.metrics["sem_seg/mIoU"] for e in named if e.pretraining]
        assert ours == dataclasses.replace(line, cells=line.cells[1:]).decimals, number


def test_public_models_have_the_numbers_of_their_recipe():
    """But for the one that the paper has trained again."""
    experiments = manifest().experiments
    zoo = {name: e for name, e in experiments.items() if name.endswith("R50_zoo") and e.metrics}
    differing = [name for name, e in zoo.items() if e.metrics != experiments[name[: -len("_zoo")]].metrics]
    assert len(zoo) == 7 and differing == ["ade20k_semantic_R50_zoo"]
    assert experiments["ade20k_semantic_R50_zoo"].metrics == {"sem_seg/mIoU": 47.2}


def test_numbers_of_a_method_are_that_methods(printed):
    methods = {"MAE", "I-JEPA", "DMT-JEPA", "BEiT", "iBOT", "DINO", "data2vec"}
    checked = 0
    for line in printed:
        if line.table.startswith("DMT ") and line.method in methods:
            own = [entry for entry in entries_of(line.table) if re.search(rf"\b{line.method}\b", entry[0])]
            assert set(line.decimals) <= numbers_of(own), line
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("table", ["DMT T2", "DMT T8", "DMT D.3", "DMT D.4", "DMT D.6"])
def test_j_and_f_belong_together(printed, table):
    triples = {values for _, _, values in entries_of(table)}
    for line in printed:
        if line.table == table:
            numbers = line.decimals
            wanted = set(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
            assert wanted <= triples


def test_spreads_are_those_of_the_appendix():
    spreads = {e.name: dict(e.spread) for e in manifest().experiments.values() if e.spread}
    assert spreads == {
        "ade20k_upernet_vit_base16_dmt_jepa": {"mIoU": 0.12},
        "davis_vit_large16_dmt_jepa": {"davis/J&F": 0.14},
        "coco_mask_rcnn_vit_base16_dmt_jepa": {"bbox/AP": 0.11},
    }


def test_the_headline_stands_in_all_its_tables():
    headline = manifest().experiments["ade20k_semantic_R50_mask_jepa"]
    assert headline.metrics == {"sem_seg/mIoU": 48.3}
    assert set(headline.tables) == {f"MJ {t}" for t in ("T1", "T5", "T6", "T7", "TI", "TK", "TL", "TM")}
    shown = {row.number for row in manifest().in_table("MJ TI")}
    assert shown >= {10, 20, 38, 57, 63} and not shown & {18, 19}


# --- a manifest with a mistake is one sentence that names the entry

SMALL = """
families:
  pre: {match: detectron2/mask_jepa/*, launcher: train_net, pretrains: true, seed_key: SEED}
  fine: {match: detectron2/mask2former/*, launcher: train_net, seed_key: SEED}
data:
  imagenet: {how: unpack it}
weights:
  R50: {file: R-50.pkl, how: download it}
notes:
  contradiction: the text and the table disagree
pretrainings:
  p: {config: detectron2/mask_jepa/R50_in1k.yaml, data: imagenet, weights: R50}
experiments:
  base: {config: detectron2/mask2former/ade20k/semantic_R50.yaml, metrics: {sem_seg/mIoU: 46.6}, tables: MJ T1}
  e: {config: detectron2/mask2former/ade20k/semantic_R50_mask_jepa.yaml, pretraining: p, baseline: base}
rows:
  1: {item: one, kind: run, paper: mask_jepa, where: MJ T1, experiments: [base, e], notes: contradiction}
  2: {item: two, kind: quote, paper: dmt_jepa, quotes: [{label: MAE, metrics: {mIoU: 48.1}, tables: DMT T1}]}
  3: {item: three, kind: component, paper: [mask_jepa, dmt_jepa], tests: tests/a.py::test_a}
"""


def load(tmp_path: Path, text: str) -> Manifest:
    path = tmp_path / "manifest.yaml"
    path.write_text(text, encoding="utf-8")
    return load_manifest(path)


def test_the_small_manifest_is_read(tmp_path):
    small = load(tmp_path, SMALL)
    assert small.experiments["base"].tables == ("MJ T1",) and small.rows[2].quotes[0].metrics == {
        "mIoU": 48.1
    }
    assert isinstance(small.experiments["e"], Experiment) and small.experiments["e"].toolkit == "detectron2"
    assert [row.number for row in small.in_table("DMT T1")] == [2]
    with pytest.raises(ManifestError, match="'T9'"):
        small.in_table("T9")
    with pytest.raises(ManifestError, match="there is no row 4"):
        small.row(4)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("pretraining: p,", "pretraining: q,", ["e names 'q'", "pretrainings"]),
        ("baseline: base", "baseline: bass", ["e names 'bass'", "experiments"]),
        ("data: imagenet", "data: imagenet2", ["p names 'imagenet2'", "data"]),
        ("weights: R50", "weights: R51", ["p names 'R51'", "weights"]),
        ("notes: contradiction", "notes: other", ["row 1 names 'other'", "notes"]),
        ("experiments: [base, e]", "experiments: [base, f]", ["row 1 names 'f'", "experiments"]),
        ("where: MJ T1", "weights: R51", ["row 1 names 'R51'", "weights"]),
        ("where: MJ T1", "origin: GUESS", ["row 1 names 'GUESS'", "origins"]),
        ("baseline: base", "origin: GUESS", ["e names 'GUESS'", "origins"]),
        ("paper: dmt_jepa", "paper: mae", ["row 2 names 'mae'", "papers"]),
        ("kind: quote", "kind: rumour", ["row 2", "'rumour'", "quote"]),
        ("kind: quote", "kind: figure", ["row 2 is a figure", "commands"]),
        ("tests: tests/a.py::test_a", "toolkits: detectron2", ["row 3 is a component", "tests"]),
        ("metrics: {sem_seg/mIoU: 46.6}", "metrics: 46.6", ["experiments base", "metrics"]),
        ("sem_seg/mIoU: 46.6", "sem_seg/mIoU: high", ["experiments base", "sem_seg/mIoU"]),
        ("{mIoU: 48.1}", "{mIoU: '48.1'}", ["quote MAE", "mIoU"]),
        ("baseline: base", "base_line: base", ["experiments e", "base_line", "it knows"]),
        ("label: MAE,", "", ["quote None", "label"]),
        ("quotes: [", "quotes: [MAE, ", ["row 2", "quotes"]),
        ("item: three, ", "", ["row 3", "item"]),
        ("weights: R50}", "weights: R50}\n  q: {data: imagenet}", ["q has no config", "waits"]),
        ("weights: R50}", "weights: R50}\n  p: {data: imagenet}", ["p stands twice"]),
        ("mask_jepa/R50_in1k.yaml", "mask2former/ade20k/semantic_R50.yaml", ["p stands in the wrong part"]),
        ("mask_jepa/R50_in1k.yaml", "mask_rcnn/vitb_100ep.yaml", ["no family", "mask_rcnn/vitb_100ep.yaml"]),
        ("notes:\n", "remarks: {}\nnotes:\n", ["unknown parts remarks", "it knows"]),
        ("  R50: {file: R-50.pkl, how: download it}", "  R50: R-50.pkl", ["weights R50 is no mapping"]),
        ("  imagenet: {how: unpack it}", "  [a, b]", ["imagenet"]),
        ("rows:", "rows: {", ["is no yaml file"]),
    ],
)
def test_a_mistake_is_one_sentence_with_the_entry(tmp_path, old, new, named):
    assert SMALL.count(old) >= 1
    with pytest.raises(ManifestError) as error:
        load(tmp_path, SMALL.replace(old, new, 1))
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in named), text


def test_merges_may_change_what_they_take_over(tmp_path):
    family = "{match: detectron2/mask2former/*, launcher: train_net, seed_key: SEED}"
    third = "{<<: *fine, match: a/*, smoke: &small {A: 1, B: 2}}"
    fourth = "{<<: *third, match: b/*, smoke: {<<: *small, B: 3}}"
    new = f"&fine {family}\n  third: &third {third}\n  fourth: {fourth}"
    families = load(tmp_path, SMALL.replace(family, new)).families
    assert families["fourth"].match == ("b/*",) and families["fourth"].launcher == "train_net"
    assert families["third"].smoke == {"A": 1, "B": 2} and families["fourth"].smoke == {"A": 1, "B": 3}


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="holds no mapping"):
        load(tmp_path, "- a\n- b\n")
    with pytest.raises(ManifestError, match="rows is no mapping"):
        load(tmp_path, "rows: [1, 2]\n")
    with pytest.raises(FileNotFoundError):
        load_manifest(tmp_path / "none.yaml")
    with pytest.raises(ManifestError, match="no yaml file"):
        load(tmp_path, "rows: !!python/object/apply:os.getcwd []\n")


@given(
    part=st.sampled_from(["pretrainings", "experiments", "weights", "families"]),
    key=st.from_regex(r"\A[a-z_]{3,12}\Z"),
)
def test_unknown_keys_are_named_in_every_part(tmp_path_factory, part, key):
    changed = yaml.safe_load(SMALL)
    name, entry = next(iter(changed[part].items()))
    entry[key] = "x"
    folder = tmp_path_factory.mktemp("manifest")
    try:
        load(folder, yaml.safe_dump(changed))
    except ManifestError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        assert key in {
            "title",
            "arm",
            "overrides",
            "licence",
            "waits_for",
            "weights_key",
            "quick_config",
            "tables",
        }


@given(
    st.lists(st.sampled_from(["MJ T1", "MJ TI", "DMT T1", "DMT D.6"]), min_size=1, max_size=4, unique=True)
)
def test_a_string_stands_for_a_list_of_one(tmp_path_factory, tables):
    changed = yaml.safe_load(SMALL)
    changed["experiments"]["base"]["tables"] = tables if len(tables) > 1 else tables[0]
    small = load(tmp_path_factory.mktemp("manifest"), yaml.safe_dump(changed))
    assert small.experiments["base"].tables == tuple(tables)
    assert all(small.row(1) in small.in_table(table) for table in tables)
