"""What a report shows, whichever way it is rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jepa_plugins.reproduction.manifest import Manifest, Row
from jepa_plugins.reproduction.plots import FIGURE_1, Bar, figure_1_bars
from jepa_plugins.reproduction.report_cells import commits_of
from jepa_plugins.reproduction.report_rows import (
    NO_RESULT,
    TITLES,
    RowReport,
    cost_runs,
    report_rows,
    results_of,
)
from jepa_plugins.reproduction.results import Result


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
