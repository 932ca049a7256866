"""Reports: the papers' tables beside ours as Markdown and as one HTML page, and rows for a terminal."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jepa_plugins.reproduction.manifest import PAPERS, Manifest, Row
from jepa_plugins.reproduction.plots import FIGURE_1, Bar, figure_1_bars
from jepa_plugins.reproduction.report_cells import (
    NO_COSTS,
    commits_of,
    cost_lines,
    cost_table,
    facts_of,
    ours_text,
    paper_text,
    signed,
)
from jepa_plugins.reproduction.report_html import html
from jepa_plugins.reproduction.report_rows import (
    NO_RESULT,
    TITLES,
    Entry,
    RowReport,
    Section,
    cost_runs,
    report_rows,
    results_of,
    sections,
)
from jepa_plugins.reproduction.report_text import list_table, print_list, show_text
from jepa_plugins.reproduction.results import Result

__all__ = [
    "Report",
    "build_report",
    "html",
    "list_table",
    "markdown",
    "print_list",
    "report_rows",
    "show_text",
    "write",
]


@dataclass(frozen=True)
class Report:
    """What both renderings show.

    Attributes:
        scale: of the results; rows: see `report_rows`; bars: of Mask-JEPA's figure 1, empty without its rows.
        other_costs: measurements that belong to none of the rows; left_out: rows that were not asked for.
    """

    scale: str
    rows: Sequence[RowReport]
    bars: Sequence[Bar]
    other_costs: Sequence[Mapping[str, Any]] = ()
    left_out: int = 0

    @property
    def scale_text(self) -> str:
        """What numbers of this scale are worth."""
        return TITLES[self.scale]

    @property
    def beside(self) -> str:
        """What every heading says of numbers that cannot be compared, in parentheses; empty at the full scale."""
        return "" if self.scale == "full" else f" ({self.scale_text})"

    @property
    def title(self) -> str:
        """Of the page: says the scale."""
        return f"The papers' results and ours ({self.scale_text})"

    @property
    def warning(self) -> str:
        """For scales whose numbers cannot be compared; empty for the full one."""
        if self.scale == "full":
            return ""
        name, text = self.scale_text.split(": ", 1)
        return f"Scale {name}: {text}. Differences and gains say nothing about either method."

    @cached_property
    def results(self) -> list[Result]:
        """Everything that the report rests on."""
        return results_of(self.rows)

    @property
    def facts(self) -> list[str]:
        """Of the whole report, a sentence each."""
        runs = [group for row in self.rows for group in row.groups if not group.quoted]
        names = {group.name for group in runs}
        done = {r.name for r in self.results if r.kind == "experiment"}
        states = Counter(row.state for row in self.rows)
        commits = ", ".join(f"{commit} ({count})" for commit, count in commits_of(self.results).items())
        partly = (
            [f"{self.left_out} rows were not asked for: tables show the others alone"]
            if self.left_out
            else []
        )
        return [
            *partly,
            f"{len(self.rows)} rows: "
            + (", ".join(f"{n} {state}" for state, n in states.most_common()) or "none"),
            f"{len(names & done)} of {len(names)} experiments have a result",
            f"Commits of the results: {commits or NO_RESULT}",
            "Ours is the median over seeds, with the lowest and the highest; a gain is over the baseline named with "
            "the experiment",
            "Origin of the papers' numbers: TRAIN, trained by their authors; LOAD, public weights, then trained; "
            "ZOO, a public model as it is; QUOTE, a number of another paper; with a * the paper's own re-run of "
            "the official code",
        ]


def build_report(
    manifest: Manifest,
    results: Iterable[Result],
    scale: str,
    states: Mapping[int, str],
    rows: Iterable[Row] | None = None,
    costs: Iterable[Any] = (),
) -> Report:
    """Everything for `markdown` and `html`; arguments as of `report_rows`."""
    chosen = None if rows is None else list(rows)
    found, measured = list(results), cost_runs(costs)
    shown = report_rows(manifest, found, scale, states, chosen, [measured])
    wanted = {row.row.number for row in shown} & {row for rows in FIGURE_1.values() for row in rows}
    bars = figure_1_bars(manifest, found, scale) if wanted else []
    placed = [entry for row in shown for entry in row.costs]
    return Report(
        scale, shown, bars, [e for e in measured if e not in placed], len(manifest.rows) - len(shown)
    )


def write(
    manifest: Manifest,
    results: Iterable[Result],
    scale: str,
    states: Mapping[int, str],
    rows: Iterable[Row] | None,
    costs: Iterable[Any],
    folder: str | Path,
) -> list[Path]:
    """Write report.md and report.html into a folder; arguments as of `report_rows`.

    A report on some of the rows stands beside that on all: report_rows_18-20_38.md and .html.
    """
    report = build_report(manifest, results, scale, states, rows, costs)
    folder, name = Path(folder), _name(report)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _write(folder / f"{name}.md", markdown(report)),
        _write(folder / f"{name}.html", html(report)),
    ]


def _name(report: Report) -> str:
    """Of the files, without their endings: names the rows, unless it has all."""
    if not report.left_out:
        return "report"
    ranges: list[list[int]] = []
    for number in sorted(row.row.number for row in report.rows):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return "report_rows_" + "_".join("-".join(map(str, pair)) for pair in ranges)


def _write(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


# --- Markdown


def markdown(report: Report) -> str:
    """The papers' tables with ours, the papers' contradictions, costs, all rows, and every result's protocol."""
    parts = [f"# {_cell(report.title)}"]
    if report.warning:
        parts.append(f"**{_cell(report.warning)}**")
    parts.append("\n".join(f"- {_cell(fact)}" for fact in report.facts))
    parts += _figure_1(report)
    paper = None
    for section in sections(report.rows):
        if section.paper != paper:
            paper = section.paper
            parts.append(f"## {PAPERS.get(paper, 'Other')}")
        parts += _section(section, report)
    parts += _costs(report)
    parts += _overview(report)
    parts += _appendix(report)
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text that Markdown takes as text, on one line."""
    text = " ".join(str(text).split()).replace("\\", "\\\\")
    for letter, safe in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("*", "\\*"),
        ("_", "\\_"),
    ):
        text = text.replace(letter, safe)
    return text.replace("`", "\\`").replace("[", "\\[")


def _table(head: Sequence[str], body: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    lines = [head, ["--:" if name in right else "---" for name in head]]
    lines += [[_cell(cell) for cell in row] for row in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _section(section: Section, report: Report) -> list[str]:
    head = (
        "Row",
        "Experiment",
        "Metric",
        "Paper",
        "Ours",
        "Difference",
        "Gain, paper",
        "Gain, ours",
        "Origin",
        "State",
    )
    body = [line for entry in section.entries for line in _entry(entry)]
    notes = [f"- Row {_cell(rows)}: {_cell(note)}" for rows, note in section.notes]
    return [
        f"### {_cell(section.title + report.beside)}",
        _table(head, body, ("Paper", "Ours", "Difference", "Gain, paper", "Gain, ours")),
        *(["\n".join(notes)] if notes else []),
    ]


def _entry(entry: Entry) -> Iterable[Sequence[str]]:
    group = entry.group
    beside = (
        f" (gains over {group.baseline})" if group.baseline else f" ({group.source})" if group.source else ""
    )
    if not group.lines:
        yield (
            entry.numbers,
            group.title,
            "none reported",
            "-",
            NO_RESULT,
            "-",
            "-",
            "-",
            entry.origin,
            entry.state,
        )
    for index, line in enumerate(group.lines):
        yield (
            entry.numbers,
            group.title + (beside if index == 0 else ""),
            line.label,
            paper_text(line),
            ours_text(line, group),
            signed(line.difference),
            signed(line.paper_gain, digits=1),
            signed(line.gain),
            entry.origin,
            entry.state,
        )


def _figure_1(report: Report) -> list[str]:
    if not report.bars:
        return []
    body = [
        (
            bar.backbone,
            bar.label,
            "with" if bar.with_jepa else "without",
            "not reported" if bar.paper is None else f"{bar.paper:.1f}",
            NO_RESULT if bar.ours is None else f"{bar.ours.median:.2f}",
        )
        for bar in report.bars
    ]
    head = ("Backbone", "Metric", "Mask-JEPA", "Paper", "Ours")
    return [f"## Figure 1 of Mask-JEPA{_cell(report.beside)}", _table(head, body, ("Paper", "Ours"))]


def _costs(report: Report) -> list[str]:
    parts: list[str] = []
    for row in (row for row in report.rows if row.row.costs):
        where = f" ({', '.join(row.row.where)})" if row.row.where else ""
        parts.append(f"### {_cell(f'Row {row.row.number}: {row.row.item}{where}{report.beside}')}")
        parts += [_cell(text) for text in cost_lines(row)]
        parts.append(_table(*cost_table(row.costs)) if row.costs else NO_COSTS)
        parts += [f"- {_cell(note)}" for note in row.notes]
    if report.other_costs:
        parts += ["### Other configurations", _table(*cost_table(report.other_costs))]
    return [f"## Costs of training{_cell(report.beside)}", *parts] if parts else []


def _overview(report: Report) -> list[str]:
    body = [
        (
            str(row.row.number),
            row.row.item + (f" (waits for {row.row.waits_for})" if row.row.waits_for else ""),
            ", ".join(row.row.where) or "-",
            row.row.kind,
            ", ".join(row.row.origin) or "-",
            row.state,
            row.summary,
            "; ".join((*row.row.tests, *row.row.commands)) or "-",
        )
        for row in report.rows
    ]
    head = ("Row", "Item", "Where", "Kind", "Origin", "State", "Result", "Shown by")
    return [f"## All rows{_cell(report.beside)}", _table(head, body, ("Row",))]


def _appendix(report: Report) -> list[str]:
    parts = [f"## Results and their protocols{_cell(report.beside)}"]
    if not report.results:
        return [*parts, f"{NO_RESULT.capitalize()} at the scale {report.scale}."]
    for result in report.results:
        facts = "\n".join(f"- {name}: {_cell(value)}" for name, value in facts_of(result))
        head = _cell(f"{result.name}, seed {result.seed} ({result.kind})")
        parts.append(f"<details><summary>{head}</summary>\n\n{facts}\n\n</details>")
    return parts
