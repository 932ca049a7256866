"""Reports: the papers' tables beside ours as Markdown and as one HTML page, and rows for a terminal."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_plugins.reproduction.manifest import PAPERS, Manifest, Row
from jepa_plugins.reproduction.report_cells import (
    NO_COSTS,
    cost_lines,
    cost_table,
    facts_of,
    ours_text,
    paper_text,
    signed,
)
from jepa_plugins.reproduction.report_contents import Report, build_report
from jepa_plugins.reproduction.report_html import html
from jepa_plugins.reproduction.report_rows import (
    NO_RESULT,
    Entry,
    Section,
    report_rows,
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
