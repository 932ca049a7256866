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
COST_ROWS = (16, 78)  # what pre-training costs, one row a paper
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
}


@dataclass(frozen=True)
class Line:
    """A metric of an experiment, or of a quote.

    Attributes:
        metric: name in the results; label: for people.
        paper: the paper's number, None where it reports none; paper_spread: its spread over seeds.
        ours: median, lowest, highest and number of seeds; None without a result.
        broken: results whose number is NaN, infinite or no number; they are left out of `ours`.
        paper_gain, gain: over the experiment's baseline, the paper's and ours.
    """

    metric: str
    label: str
    paper: float | None = None
    paper_spread: float | None = None
    ours: Summary | None = None
    broken: int = 0
    paper_gain: float | None = None
    gain: float | None = None

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.ours is None or self.paper is None else self.ours.median - self.paper


@dataclass(frozen=True)
class Group:
    """An experiment or a quote with its metrics.

    Attributes:
        name: of the experiment, empty for a quote; title: for people; baseline: title of what gains are over.
        tables: where the paper prints it; source: of a quote; waits_for: what the project does not have yet.
        lines: what the paper reports, or everything where it reports nothing; further: the rest.
    """

    name: str
    title: str
    tables: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    further: tuple[Line, ...] = ()
    baseline: str = ""
    source: str = ""
    waits_for: str = ""

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
            done = sum(any(line.ours or line.broken for line in (*g.lines, *g.further)) for g in runs)
            return f"{done} of {len(runs)} experiments" if done else NO_RESULT
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
        return ", ".join(str(report.row.number) for report in self.rows)

    @property
    def origin(self) -> str:
        """Of its rows."""
        return ", ".join(dict.fromkeys(origin for report in self.rows for origin in report.row.origin)) or "-"

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
    if "panoptic_seg/PQ" in known and metric in ("segm/AP", "sem_seg/mIoU"):
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
    return [_row_report(manifest, row, found, states, measured) for row in chosen]


def _row_report(
    manifest: Manifest,
    row: Row,
    results: Mapping[str, list[Result]],
    states: Mapping[int, str],
    costs: Sequence[Mapping[str, Any]],
) -> RowReport:
    groups = [
        _experiment(manifest, manifest.experiments[name], row, results)
        for name in dict.fromkeys(row.experiments)
    ]
    groups += [_quote(quote, row) for quote in row.quotes]
    runs = [*manifest.experiments_of([row]), *manifest.pretrainings_of([row])]
    configs = {run.config for run in runs} if row.number in COST_ROWS else set()
    return RowReport(
        row=row,
        state=states.get(row.number, "unknown"),
        groups=tuple(groups),
        notes=tuple(" ".join(str(manifest.notes[key]).split()) for key in row.notes),
        costs=tuple(entry for entry in costs if _same_config(str(entry.get("config", "")), configs)),
        results=tuple(result for run in runs for result in results.get(run.name, ())),
    )


def _same_config(config: str, configs: Iterable[str]) -> bool:
    return any(config == known or config.endswith(f"/{known}") for known in configs)


def cost_runs(costs: Iterable[Any]) -> list[Mapping[str, Any]]:
    """Measured runs in files of benchmarks/cost.py: {"runs": [...]}, a list, or one run."""
    found: list[Mapping[str, Any]] = []
    for content in costs:
        if isinstance(content, Mapping) and "runs" in content:
            shared = {k: v for k, v in content.items() if k != "runs" and not isinstance(v, (Mapping, list))}
            found += [{**shared, **run} for run in content["runs"]]
        else:
            found += content if isinstance(content, list) else [content]
    return found


def _experiment(
    manifest: Manifest, experiment: Experiment, row: Row, results: Mapping[str, list[Result]]
) -> Group:
    own = results.get(experiment.name, [])
    base = manifest.experiments[experiment.baseline] if experiment.baseline else None
    theirs = results.get(base.name, []) if base else []
    found = dict.fromkeys(metric for result in own for metric in result.metrics if is_summary(metric))
    further = [metric for metric in found if metric not in experiment.metrics]
    beside = (*experiment.metrics, *found)

    def line(metric: str) -> Line:
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
            paper_gain=None if paper is None or base_paper is None else paper - base_paper,
            gain=None if ours is None or base_ours is None else ours.median - base_ours.median,
        )

    reported, rest = [line(m) for m in experiment.metrics], [line(m) for m in further]
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
    """The papers' tables that the rows' experiments and quotes stand in, each experiment once a table."""
    tables: dict[tuple[str, str], dict[Any, Entry]] = {}
    for report in reports:
        for group in report.groups:
            for table in group.tables or ("no table",):
                entries = tables.setdefault((_paper_of(table, report.row), table), {})
                key = group.name or (group.title, tuple(line.paper for line in group.lines))
                known = entries.get(key)
                entries[key] = Entry((*(known.rows if known else ()), report), group)
    ordered = sorted(
        tables, key=lambda key: (list(PAPERS).index(key[0]) if key[0] in PAPERS else 9, _natural(key[1]))
    )
    return [
        Section(paper, table, tuple(tables[paper, table].values()), _notes(tables[paper, table].values()))
        for paper, table in ordered
    ]


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
    return tuple((", ".join(map(str, dict.fromkeys(numbers))), note) for note, numbers in rows.items())


# --- text of numbers


def number(value: float | None, missing: str = "-") -> str:
    """A paper's number, as printed there: one decimal, or more where it has them."""
    if value is None:
        return missing
    if not is_number(value):
        return "not a number"
    return f"{value:.1f}" if math.isclose(value, round(value, 1), abs_tol=1e-9) else f"{value:g}"


def signed(value: float | None, missing: str = "-", digits: int = 2) -> str:
    """A difference."""
    if value is None:
        return missing
    text = f"{value:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else f"{0:.{digits}f}"


def paper_text(line: Line) -> str:
    """The paper's number with its spread."""
    spread = f" \N{PLUS-MINUS SIGN} {line.paper_spread:g}" if line.paper_spread is not None else ""
    return number(line.paper, "not reported") + spread


def ours_text(line: Line, group: Group) -> str:
    """Our number: median, range and seeds, or why there is none."""
    if group.quoted:
        return "quoted, no run"
    broken = f"{line.broken} not a number" if line.broken else ""
    if line.ours is None:
        return broken or NO_RESULT
    ours = line.ours
    seeds = f"{ours.seeds} seed{'s' if ours.seeds > 1 else ''}"
    spread = f"{ours.low:.2f}\N{EN DASH}{ours.high:.2f}, " if ours.seeds > 1 else ""
    return f"{ours.median:.2f} ({spread}{seeds}{'; ' + broken if broken else ''})"


def plain(value: Any) -> str:
    """A value of a protocol or configuration in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(part) for part in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(str(value).split()) if value is not None and value != "" else "not set"


def facts_of(result: Result) -> list[tuple[str, str]]:
    """What decides a result, by name: protocol, machine, command."""
    facts = [
        ("configuration", f"{result.config} ({result.config_hash or 'hash unknown'})"),
        ("overrides", plain(result.overrides)),
        ("pre-training", result.pretraining or "none"),
        ("protocol", "; ".join(f"{k}: {plain(v)}" for k, v in result.protocol.items()) or "not recorded"),
        ("machine", f"{plain(result.hardware)}; {result.processes} process(es), {result.seconds:,.0f} s"),
        ("versions", plain(result.versions)),
        ("commit", result.commit or "unknown"),
        ("command", result.command or "unknown"),
        ("finished", result.finished or "unknown"),
    ]
    metrics = ", ".join(f"{k} {_measured(v)}" for k, v in result.metrics.items() if is_summary(k))
    return [("metrics", metrics or "none"), *facts]


def _measured(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else "not a number"


def commits_of(results: Iterable[Result]) -> dict[str, int]:
    """How many results each commit gave."""
    found: dict[str, int] = {}
    for result in results:
        commit = result.commit or "unknown"
        found[commit] = found.get(commit, 0) + 1
    return found


def results_of(reports: Iterable[RowReport]) -> list[Result]:
    """All results that a report rests on, each once."""
    found = {(r.kind, r.name, r.seed): r for report in reports for r in report.results}
    return list(found.values())
