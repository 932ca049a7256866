"""Numbers of a report as the text of table cells, the same in Markdown, on the page and in a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jepa_plugins.reproduction.report_rows import NO_RESULT, Group, Line, RowReport, is_number, is_summary
from jepa_plugins.reproduction.results import Result

NO_COSTS = "Ours: no measurement yet."
COSTS = {  # of benchmarks/cost.py
    "config": "configuration",
    "error": "does not build",
    "parameters": "parameters",
    "parameters_trained": "of these trained",
    "peak_memory_gib": "peak memory, GiB",
    "seconds_per_step": "seconds a step (quartiles)",
    "images_per_second": "images a second and device",
    "steps": "steps",
    "recipe_batch": "images a step",
    "devices": "devices",
    "gpu_hours": "GPU-hours",
    "cpu_hours": "CPU-hours",
    "hours_scaled": "hours scaled up by",
    "reference": "compared with",
    "ratio_to_reference": "time over that (quartiles)",
    "image_size": "image size",
    "measured_images": "images measured",
    "precision": "precision",
    "device": "device",
    "machine": "machine",
    "commit": "commit",
}


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
    if line.ours is None:
        why = [("not a number", line.broken), ("undefined", line.undefined)]
        return "; ".join(f"{text} ({_seeds(count)})" for text, count in why if count) or NO_RESULT
    ours, seeds = line.ours, _seeds(line.ours.seeds)
    broken = f"; {_seeds(line.broken)} without a number" if line.broken else ""
    broken += f"; {_seeds(line.undefined)} undefined" if line.undefined else ""
    spread = f"{ours.low:.2f}\N{EN DASH}{ours.high:.2f}, " if ours.seeds > 1 else ""
    return f"{ours.median:.2f} ({spread}{seeds}{broken})"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


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
    undefined = [("undefined metrics", ", ".join(filter(is_summary, result.undefined)))]
    return [("metrics", metrics or "none"), *(fact for fact in undefined if fact[1]), *facts]


def _measured(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else "not a number"


def short_commit(commit: Any) -> str:
    """A commit's first 12 digits, and -dirty where files had changed."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}(?=$|-)", r"\1", str(commit or "unknown"))


def commits_of(results: Iterable[Result]) -> dict[str, int]:
    """How many results each commit gave."""
    found: dict[str, int] = {}
    for result in results:
        commit = short_commit(result.commit)
        found[commit] = found.get(commit, 0) + 1
    return found


# --- costs


def cost_lines(row: RowReport) -> list[str]:
    """What the papers say a pre-training costs."""
    return [
        f"The paper, {group.title}: " + ", ".join(f"{line.label} {line.paper:,.6g}" for line in group.lines)
        for group in row.groups
        if group.quoted and group.lines
    ]


def cost_table(entries: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of measured runs: the columns of `COSTS` that any of them has."""
    known = list(entries)
    names = [name for name in COSTS if any(entry.get(name) is not None for entry in known)]
    return [COSTS[name] for name in names], [[_cost(entry, name) for name in names] for entry in known]


def _cost(entry: Mapping[str, Any], name: str) -> str:
    """A measured value, with its quartiles where the benchmark gives them."""
    value = entry.get(name)
    if value is None:
        return "-"
    if name == "commit":
        return short_commit(value)
    if not is_number(value):
        return plain(value)
    stem = name.removesuffix("_to_reference")
    quartiles = [entry[key] for key in (f"{stem}_low", f"{stem}_high") if is_number(entry.get(key))]
    spread = "\N{EN DASH}".join(_short(quartile) for quartile in quartiles)
    return _short(value) + (f" ({spread})" if spread else "")


def _short(value: float) -> str:
    """Whole numbers in full, others to four digits."""
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    )
