"""Rows for a terminal: all in a list, or everything of one."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from jepa_plugins.reproduction.manifest import (
    PAPERS,
    SCALES,
    Experiment,
    Manifest,
    ManifestError,
    Pretraining,
    Row,
    Run,
)
from jepa_plugins.reproduction.report_cells import number, ours_text, paper_text, plain, signed
from jepa_plugins.reproduction.report_rows import NO_RESULT, RowReport, report_rows, title_of
from jepa_plugins.reproduction.results import Result

COLUMNS = ("row", "item", "where", "kind", "origin", "toolkit", "state")
FILTERS = ("paper", "table", "toolkit", "kind", "state")
_STYLES = {
    "row": "bold",
    "item": "",
    "where": "dim",
    "kind": "cyan",
    "origin": "",
    "toolkit": "",
    "state": "green",
}


def filtered(manifest: Manifest, states: Mapping[int, str], filters: Mapping[str, str | None]) -> list[Row]:
    """Rows that pass every filter.

    Args:
        filters: by `FILTERS`; empty ones let everything pass.

    Raises:
        ManifestError: a filter or a table that does not exist.
    """
    if unknown := sorted(set(filters) - set(FILTERS)):
        raise ManifestError(f"there is no filter {', '.join(unknown)}: give {', '.join(FILTERS)}")
    wanted = {key: value for key, value in filters.items() if value}
    rows = manifest.in_table(wanted["table"]) if "table" in wanted else list(manifest.rows.values())
    has = {
        "paper": lambda row: row.paper,
        "toolkit": lambda row: row.toolkits,
        "kind": lambda row: (row.kind,),
        "state": lambda row: (states.get(row.number, "unknown"),),
    }
    return [
        row for row in rows if all(value in has[key](row) for key, value in wanted.items() if key != "table")
    ]


def list_table(
    manifest: Manifest,
    states: Mapping[int, str],
    filters: Mapping[str, str | None] | None = None,
    width: int | None = None,
) -> str:
    """The rows that pass the filters, one a line.

    Args:
        manifest: see `load_manifest`; states: by row number; filters: see `filtered`.
        width: of a terminal, for a table with colours (needs rich); None for tab-free plain text, whole lines.
    """
    rows = filtered(manifest, states, filters or {})
    cells: list[tuple[str, ...]] = [
        (
            str(row.number),
            row.item,
            ", ".join(row.where) or "-",
            row.kind,
            ", ".join(row.origin) or "-",
            ", ".join(row.toolkits) or "-",
            states.get(row.number, "unknown"),
        )
        for row in rows
    ]
    end = f"{len(rows)} of {len(manifest.rows)} rows"
    return (_plain_table(cells) if width is None else _rich_table(cells, width)) + end


def _plain_table(cells: list[tuple[str, ...]]) -> str:
    table = [COLUMNS, *cells]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "".join(line.rstrip() + "\n" for line in lines)


def _rich_table(cells: list[tuple[str, ...]], width: int) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=False)
    for name in COLUMNS:
        fixed = name in ("row", "kind", "state")
        table.add_column(
            name,
            justify="right" if name == "row" else "left",
            no_wrap=fixed,
            ratio=1 if name == "item" else None,
        )
    for line in cells:
        styled = (Text(cell, style=_STYLES[name]) for name, cell in zip(COLUMNS, line, strict=True))
        table.add_row(*styled)
    buffer = io.StringIO()
    Console(file=buffer, width=width, force_terminal=True).print(table)
    return buffer.getvalue()


def print_list(
    manifest: Manifest,
    states: Mapping[int, str],
    filters: Mapping[str, str | None] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Print `list_table`, with colours on a terminal that has rich, else plain."""
    stream = stream or sys.stdout
    print(list_table(manifest, states, filters, _terminal_width() if stream.isatty() else None), file=stream)


def _terminal_width() -> int | None:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console().width


# --- one row


def show_text(
    manifest: Manifest,
    row: Row,
    state: str,
    results: Iterable[Result] = (),
    checks: str = "",
    data: str = "datasets",
) -> str:
    """Everything of a row: what it runs, on what, the paper's numbers, and results of every scale.

    Args:
        manifest: see `load_manifest`; state, checks: see `States`; results: of any scale.
        data: root of all data sets.
    """
    found = list(results)
    lines = [f"row {row.number}: {row.item}"]
    lines += _facts(
        ("paper", ", ".join(PAPERS[name] for name in row.paper)),
        ("where", ", ".join(row.where)),
        ("kind", row.kind),
        ("origin", ", ".join(row.origin)),
        ("toolkit", ", ".join(row.toolkits)),
        ("state", state),
        ("checked", checks),
        ("waits for", row.waits_for),
    )
    for name in row.pretrainings:
        lines += ["", *_run(manifest, manifest.pretrainings[name], found)]
    for name in row.experiments:
        lines += ["", *_run(manifest, manifest.experiments[name], found)]
    lines += _named("number of another paper", (_quote(quote) for quote in row.quotes))
    lines += _named("test", row.tests)
    lines += _named("command", row.commands)
    lines += _named("configuration whose cost is measured", row.costs)
    lines += _needs(manifest, row, data)
    lines += _named(
        "the papers contradict themselves", (" ".join(manifest.notes[key].split()) for key in row.notes)
    )
    lines += _numbers(manifest, row, state, found)
    return "\n".join(lines) + "\n"


def _facts(*facts: tuple[str, str], indent: str = "  ") -> list[str]:
    return [f"{indent}{name + ':':<14} {value}" for name, value in facts if value]


def _named(title: str, entries: Iterable[str]) -> list[str]:
    found = list(entries)
    return ["", f"{title}:", *(f"  {entry}" for entry in found)] if found else []


def _quote(quote: Any) -> str:
    numbers = ", ".join(f"{metric} {number(value)}" for metric, value in quote.metrics.items())
    places = ", ".join((*quote.tables, *([quote.source] if quote.source else ())))
    return f"{quote.label}: {numbers or 'no number'}" + (f" ({places})" if places else "")


def _run(manifest: Manifest, run: Run, results: list[Result]) -> list[str]:
    head = f"pre-training {run.name}" if isinstance(run, Pretraining) else f"experiment {run.name}"
    hours = (
        f"{run.gpu_hours:,g} ({run.hours_source or 'source unknown'})"
        if run.gpu_hours is not None
        else "unknown"
    )
    facts = [("config", run.config), ("overrides", plain(run.overrides))]
    if isinstance(run, Experiment):
        head += f": {run.title}" if run.title else ""
        weights = f"weights {run.weights}" if run.weights else "none: random weights or those of its config"
        facts.append(("starts from", f"pre-training {run.pretraining}" if run.pretraining else weights))
        facts.append(("export", " ".join(run.export_options)))
        facts.append(("only tested", "yes" if run.finished else ""))
        facts.append(("baseline", title_of(manifest.experiments[run.baseline]) if run.baseline else ""))
        facts.append(("tables", ", ".join(run.tables)))
        rerun = "the paper's own re-run" if run.rerun else ""
        facts.append(("origin", ", ".join(filter(None, (run.origin, rerun)))))
    else:
        facts.append(("starts from", f"weights {run.weights}" if run.weights else ""))
    facts += [("data", ", ".join(run.data)), ("batch", str(run.batch or "")), ("GPU-hours", hours)]
    facts.append(("waits for", run.waits_for))
    done = [f"{r.scale} seed {r.seed}" for r in results if r.name == run.name]
    facts.append(("results", ", ".join(done) or NO_RESULT))
    return [head, *_facts(*facts)]


def _needs(manifest: Manifest, row: Row, root: str) -> list[str]:
    runs: list[Run] = [*manifest.experiments_of([row]), *manifest.pretrainings_of([row])]
    sets = {name: manifest.data[name] for run in runs for name in run.data}
    names = [*(run.weights for run in runs if run.weights), *row.weights]
    weights = [manifest.weights[name] for name in dict.fromkeys(names)]
    return [
        *_named("data", (line for name, entry in sets.items() for line in _data_set(name, entry, root))),
        *_named("weights", (f"{w.name}: {w.file}; {w.how}; licence {w.licence}" for w in weights)),
    ]


def _data_set(name: str, entry: Mapping[str, Any], root: str) -> list[str]:
    """What a data set is found by, and what makes it."""
    places = ", ".join(str(Path(root) / place) for place in entry.get("needs", ()))
    how = re.sub(r"\bDATA\b", lambda _: root, str(entry.get("how", "")))
    return [f"{name}" + (f": {places}" if places else ""), *([f"  to have it: {how}"] if how else [])]


def _numbers(manifest: Manifest, row: Row, state: str, results: list[Result]) -> list[str]:
    lines: list[str] = []
    for scale in reversed(SCALES):
        report = report_rows(manifest, results, scale, {row.number: state}, [row])[0]
        if scale == "full" or report.results:
            lines += _scale(report, scale)
    return lines


def _scale(report: RowReport, scale: str) -> list[str]:
    lines = []
    for group in (group for group in report.groups if not group.quoted and group.lines):
        lines.append(f"  {group.title}" + (f" (gains over {group.baseline})" if group.baseline else ""))
        for line in group.lines:
            differs = f", difference {signed(line.difference)}" if line.difference is not None else ""
            gains = [
                f"{who} {signed(value, digits=digits)}"
                for who, value, digits in (("paper", line.paper_gain, 1), ("ours", line.gain, 2))
                if value is not None
            ]
            gain = f", gain {' and '.join(gains)}" if gains else ""
            lines.append(
                f"    {line.label}: paper {paper_text(line)}, ours {ours_text(line, group)}{differs}{gain}"
            )
    meaning = {"smoke": " (they mean nothing)", "quick": " (not comparable with the paper's)"}.get(scale, "")
    return ["", f"numbers, scale {scale}{meaning}:", *lines] if lines else []
