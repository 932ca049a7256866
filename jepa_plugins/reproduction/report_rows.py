"""What a report says of each row: the papers' numbers, ours, and what lies between them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jepa_plugins.reproduction.manifest import PAPERS, Experiment, Manifest, Quote, Row
from jepa_plugins.reproduction.results import Result, Summary, summarise

NO_RESULT = "no result yet"
TITLES = {
    "smoke": "smoke: shows that everything runs; its numbers mean nothing",
    "quick": "quick: minutes on generated data; not comparable with the papers' numbers",
    "full": "full: the papers' recipes",
}
_SHORT_PAPERS = {"MJ": "mask_jepa", "DMT": "dmt_jepa"}
_LABELS = {
    "panoptic_seg/PQ": "PQ",
    "segm/AP": "AP",
    "segm/AP50": "AP50",
    "segm/AP75": "AP75",
    "segm/APs": "AP small",
    "segm/APm": "AP medium",
    "segm/APl": "AP large",
    "bbox/AP": "box AP",
    "sem_seg/mIoU": "mIoU",
    "sem_seg/IoU": "mIoU",  # Cityscapes' own evaluator
    "imagenet/linear": "linear top-1",
    "imagenet/finetune": "fine-tuned top-1",
    "clevr/count": "Clevr/Count",
    "clevr/dist": "Clevr/Dist",
    "cost/params_M": "parameters (M)",
    "cost/memory_GB": "memory (GB)",
    "cost/gpu_hours": "GPU-hours",
    "cost/step_ms": "ms a step",
}


@dataclass(frozen=True)
class Line:
    """A metric of an experiment, or of a quote.

    Attributes:
        metric: name in the results; label: for people.
        paper: the paper's number, None where it reports none; paper_spread: its spread over seeds.
        ours: median, lowest, highest and number of seeds; None without a result.
        broken: results whose number is NaN, infinite or no number; undefined: results whose evaluation found no
            finite value; both are left out of `ours`.
        paper_gain, gain: over the experiment's baseline, the paper's and ours.
        comparable: ours was made with the paper's recipe.
    """

    metric: str
    label: str
    paper: float | None = None
    paper_spread: float | None = None
    ours: Summary | None = None
    broken: int = 0
    undefined: int = 0
    paper_gain: float | None = None
    gain: float | None = None
    comparable: bool = True

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's; None unless the two can be compared."""
        if self.ours is None or self.paper is None or not self.comparable:
            return None
        return self.ours.median - self.paper


@dataclass(frozen=True)
class Group:
    """An experiment or a quote with its metrics.

    Attributes:
        name: of the experiment, empty for a quote; title: for people; baseline: title of what gains are over.
        tables: where the paper prints it; source: of a quote; waits_for: what the project does not have yet.
        lines: what the paper reports, or everything where it reports nothing; further: the rest.
        origin: of the paper's numbers where it is not the rows'; rerun: it marks them as its own re-run;
        reported: it prints any.
    """

    name: str
    title: str
    tables: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    further: tuple[Line, ...] = ()
    baseline: str = ""
    source: str = ""
    waits_for: str = ""
    origin: str = ""
    rerun: bool = False
    reported: bool = True

    @property
    def quoted(self) -> bool:
        """Whether this is a number of another paper."""
        return not self.name


@dataclass(frozen=True)
class RowReport:
    """A row of the papers.

    Attributes:
        row: see the manifest; state: see `States`; groups: experiments, then quotes.
        notes: contradictions of the papers that touch it; costs: measurements of its configurations.
        results: of its experiments and pre-trainings.
    """

    row: Row
    state: str
    groups: tuple[Group, ...] = ()
    notes: tuple[str, ...] = ()
    costs: tuple[Mapping[str, Any], ...] = ()
    results: tuple[Result, ...] = ()

    @property
    def summary(self) -> str:
        """In a few words, what there is of it."""
        runs = [group for group in self.groups if not group.quoted]
        if runs:
            done = sum(any(x.ours or x.broken or x.undefined for x in (*g.lines, *g.further)) for g in runs)
            return f"{done} of {len(runs)} runs" if done else NO_RESULT
        if self.row.costs:
            return f"{len(self.costs)} measured" if self.costs else NO_RESULT
        if self.row.kind == "run":
            return f"{len(self.results)} pre-trainings" if self.results else NO_RESULT
        return {"quote": "quoted, no run", "component": "shown by tests", "figure": "drawn by a command"}[
            self.row.kind
        ]


@dataclass(frozen=True)
class Entry:
    """A group in a table, with the rows that name it."""

    rows: tuple[RowReport, ...]
    group: Group

    @property
    def numbers(self) -> str:
        """Of its rows."""
        return ", ".join(map(str, sorted(report.row.number for report in self.rows)))

    @property
    def origin(self) -> str:
        """Of the paper's numbers: its own, else its rows'; with a * where the paper marks a re-run."""
        if not self.group.reported:
            return "not in the paper"
        rows = ", ".join(dict.fromkeys(origin for report in self.rows for origin in report.row.origin))
        return (self.group.origin or rows or "-") + ("*" if self.group.rerun else "")

    @property
    def state(self) -> str:
        """Of its rows; of a quote, that it is one."""
        if self.group.quoted:
            return "quoted"
        if self.group.waits_for:
            return f"waits for {self.group.waits_for}"
        return ", ".join(dict.fromkeys(report.state for report in self.rows))


@dataclass(frozen=True)
class Section:
    """A table of a paper: its entries, and the papers' contradictions with the numbers of their rows."""

    paper: str
    table: str
    entries: tuple[Entry, ...]
    notes: tuple[tuple[str, str], ...]

    @property
    def title(self) -> str:
        """For people."""
        name = self.table.removeprefix("MJ ").removeprefix("DMT ")
        name = re.sub(r"^T(?=\w)", "table ", name)
        name = f"table {name}" if re.match(r"[A-Z]\.\d", name) else name
        name = f"section {name}" if re.match(r"\d", name) else name
        return f"{PAPERS.get(self.paper, self.paper)}, {name}" if self.paper else name

    @property
    def measured(self) -> bool:
        """Whether any of its numbers is there."""
        return any(line.ours for entry in self.entries for line in entry.group.lines)


def metric_label(metric: str, beside: Iterable[str] = ()) -> str:
    """A metric for people; in panoptic and box tables AP and mIoU are told apart from those of single tasks.

    Args:
        metric: as in the results; beside: all metrics of the experiment.
    """
    label = _LABELS.get(metric, metric.rsplit("/", 1)[-1])
    known = set(beside)
    if "panoptic_seg/PQ" in known and metric in ("segm/AP", "sem_seg/mIoU", "sem_seg/IoU"):
        return f"{label} panoptic"
    return "mask AP" if metric == "segm/AP" and "bbox/AP" in known else label


def report_rows(
    manifest: Manifest,
    results: Iterable[Result],
    scale: str,
    states: Mapping[int, str],
    rows: Iterable[Row] | None = None,
    costs: Iterable[Any] = (),
) -> list[RowReport]:
    """What there is to say of rows.

    Args:
        manifest: see `load_manifest`; results: of any scale, those of others are left out; scale: of `SCALES`.
        states: by row number; rows: which, all by default.
        costs: contents of the JSON files of benchmarks/cost.py, or lists of their runs.
    """
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.scale == scale:
            found.setdefault(result.name, []).append(result)
    measured = cost_runs(costs)
    chosen = manifest.rows.values() if rows is None else rows
    given = _Given(manifest, found, scale, states, measured)
    return [_row_report(row, given) for row in chosen]


@dataclass(frozen=True)
class _Given:
    """Arguments of `report_rows`, results by name."""

    manifest: Manifest
    results: Mapping[str, list[Result]]
    scale: str
    states: Mapping[int, str]
    costs: Sequence[Mapping[str, Any]]


def _row_report(row: Row, given: _Given) -> RowReport:
    manifest = given.manifest
    groups = [_experiment(manifest.experiments[name], row, given) for name in dict.fromkeys(row.experiments)]
    groups += [_quote(quote, row) for quote in row.quotes]
    runs = [*manifest.experiments_of([row]), *manifest.pretrainings_of([row])]
    configs = manifest.costs_of(row, given.scale)
    return RowReport(
        row=row,
        state=given.states.get(row.number, "unknown"),
        groups=tuple(groups),
        notes=tuple(" ".join(str(manifest.notes[key]).split()) for key in row.notes),
        costs=tuple(entry for entry in given.costs if _same_config(str(entry.get("config", "")), configs)),
        results=tuple(result for run in runs for result in given.results.get(run.name, ())),
    )


def _same_config(config: str, configs: Iterable[str]) -> bool:
    return any(config == known or config.endswith(f"/{known}") for known in configs)


def cost_runs(costs: Iterable[Any]) -> list[Mapping[str, Any]]:
    """Measured runs in files of benchmarks/cost.py: {"runs": [...]} with what they share, a list, or one run."""
    found: list[Mapping[str, Any]] = []
    for content in costs:
        if isinstance(content, Mapping) and "runs" in content:
            shared = {"machine": content.get("hardware"), "commit": content.get("commit")}
            found += [{**shared, **run} for run in content["runs"]]
        else:
            found += content if isinstance(content, list) else [content]
    return found


def _experiment(experiment: Experiment, row: Row, given: _Given) -> Group:
    manifest, own = given.manifest, given.results.get(experiment.name, [])
    base = manifest.experiments[experiment.baseline] if experiment.baseline else None
    names = (metric for result in own for metric in (*result.metrics, *result.undefined))
    found = dict.fromkeys(metric for metric in names if is_summary(metric))
    further = [metric for metric in found if metric not in experiment.metrics]
    beside = (*experiment.metrics, *found)
    reported, rest = (
        [_line(metric, experiment, base, beside, given) for metric in metrics]
        for metrics in (experiment.metrics, further)
    )
    waits = experiment.waits_for or row.waits_for
    if not waits and experiment.pretraining:
        waits = manifest.pretrainings[experiment.pretraining].waits_for
    return Group(
        name=experiment.name,
        title=title_of(experiment),
        tables=experiment.tables or row.where,
        lines=tuple(reported or rest),
        further=tuple(rest if reported else ()),
        baseline=title_of(base) if base else "",
        waits_for=waits,
        origin=experiment.origin,
        rerun=experiment.rerun,
        reported=bool(reported),
    )


def _line(
    metric: str, experiment: Experiment, base: Experiment | None, beside: Sequence[str], given: _Given
) -> Line:
    """A metric of an experiment; base: what gains are over; beside: all metrics of the experiment."""
    own, theirs = given.results.get(experiment.name, []), given.results.get(base.name, []) if base else []
    ours, broken = finite_summary(own, metric)
    paper, base_paper = experiment.metrics.get(metric), base.metrics.get(metric) if base else None
    base_ours = finite_summary(theirs, metric)[0]
    return Line(
        metric=metric,
        label=metric_label(metric, beside),
        paper=paper,
        paper_spread=experiment.spread.get(metric),
        ours=ours,
        broken=broken,
        undefined=sum(metric in result.undefined for result in own),
        paper_gain=None if paper is None or base_paper is None else paper - base_paper,
        gain=None if ours is None or base_ours is None else ours.median - base_ours.median,
        comparable=given.scale == "full",
    )


def title_of(experiment: Experiment) -> str:
    """For people."""
    return experiment.title or experiment.name


def _quote(quote: Quote, row: Row) -> Group:
    lines = tuple(
        Line(metric, metric_label(metric, quote.metrics), value) for metric, value in quote.metrics.items()
    )
    return Group("", quote.label, quote.tables or row.where, lines, source=quote.source)


def is_summary(metric: str) -> bool:
    """Whether a metric is over all classes: those of one class, such as sem_seg/IoU-wall, stay in the files."""
    return "-" not in metric


def finite_summary(results: Iterable[Result], metric: str) -> tuple[Summary | None, int]:
    """A metric over seeds, and how many results have no number for it (NaN, infinity, null, text)."""
    having = [result for result in results if metric in result.metrics]
    good = [result for result in having if is_number(result.metrics[metric])]
    return summarise(good, metric), len(having) - len(good)


def is_number(value: Any) -> bool:
    """Whether a value can be compared."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- tables of the papers


def sections(reports: Sequence[RowReport]) -> list[Section]:
    """The papers' tables that the rows' experiments and quotes stand in, each experiment once a table.

    What pre-training costs is no table here: see `cost_table`.
    """
    tables: dict[tuple[str, str], dict[Any, Entry]] = {}
    for report in reports:
        for group in report.groups:
            if group.quoted and report.row.costs:
                continue
            for table in group.tables or ("no table",):
                entries = tables.setdefault((_paper_of(table, report.row), table), {})
                key = group.name or (group.title, tuple(line.paper for line in group.lines))
                known = entries.get(key)
                entries[key] = Entry((*(known.rows if known else ()), report), group)
    ordered = sorted(tables, key=lambda key: (_place(key[0]), _natural(key[1])))
    found = []
    for paper, table in ordered:
        shown = _paired([_of_table(entry, table) for entry in tables[paper, table].values()])
        found.append(Section(paper, table, tuple(shown), _notes(shown)))
    return found


def _place(paper: str) -> int:
    """Of a paper among the papers, those that are none last."""
    return list(PAPERS).index(paper) if paper in PAPERS else len(PAPERS)


def _of_table(entry: Entry, table: str) -> Entry:
    """Without the rows that use an experiment for other tables only."""
    own = tuple(report for report in entry.rows if table in report.row.where)
    return Entry(own or entry.rows, entry.group)


def _paired(entries: Sequence[Entry]) -> list[Entry]:
    """Each baseline right before the first experiment that is compared with it."""
    titles = {entry.group.title: entry for entry in reversed(entries) if not entry.group.quoted}
    found: dict[int, Entry] = {}
    for entry in entries:
        for one in (titles.get(entry.group.baseline), entry):
            if one is not None:
                found.setdefault(id(one), one)
    return list(found.values())


def _paper_of(table: str, row: Row) -> str:
    """Both papers have a table 1: a prefix decides, or else the row."""
    return _SHORT_PAPERS.get(table.split(" ")[0], row.paper[0] if row.paper else "")


def _natural(table: str) -> tuple:
    """Tables 1 to 8 before those of the appendix, numbers as numbers, sections last."""
    name = table.removeprefix("MJ ").removeprefix("DMT ")
    rank = 0 if re.match(r"T\d", name) else 1 if re.match(r"T\w|[A-Z]\.\d", name) else 2
    return rank, [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", name)], name


def _notes(entries: Iterable[Entry]) -> tuple[tuple[str, str], ...]:
    rows: dict[str, list[int]] = {}
    for entry in entries:
        for report in entry.rows:
            for note in report.notes:
                rows.setdefault(note, []).append(report.row.number)
    return tuple((", ".join(map(str, sorted(set(numbers)))), note) for note, numbers in rows.items())


def results_of(reports: Iterable[RowReport]) -> list[Result]:
    """All results that a report rests on, each once."""
    found = {(r.kind, r.name, r.seed): r for report in reports for r in report.results}
    return list(found.values())
