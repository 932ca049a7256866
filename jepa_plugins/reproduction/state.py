"""Where each row stands: derived from what exists and what has run, never typed by hand."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jepa_plugins.reproduction.manifest import Experiment, Manifest, Row, Run
from jepa_plugins.reproduction.plan import config_chain, config_hash
from jepa_plugins.reproduction.results import Result, Results

BUILDS = "builds.json"
# from nothing to everything; a run's state is the lowest of what it needs
STATES = (
    "waits",
    "partly waits",
    "broken",
    "stale",
    "unchecked",
    "builds",
    "smoke passed",
    "quick run",
    "full run",
    "shown",
    "drawable",
    "quoted",
)
_RUNS = ("broken", "stale", "unchecked", "builds", "smoke passed", "quick run", "full run")


class States:
    """Derives states.

    Args:
        manifest: see `load_manifest`; out: folder of results; root: of the project; commit: of the project now.
    """

    def __init__(self, manifest: Manifest, out: Path, root: Path, commit: str) -> None:
        self.manifest, self.out, self.root, self.commit = manifest, out, root, commit
        results = Results(out)
        self.results = {scale: _by_name(results.load(scale)) for scale in ("smoke", "quick", "full")}
        self.builds = read_builds(out)

    def all(self) -> dict[int, str]:
        """State of every row."""
        return {number: self.of(row) for number, row in self.manifest.rows.items()}

    def of(self, row: Row) -> str:
        """State of a row: one of `STATES`."""
        if row.kind == "run":
            return self._run(row)
        if row.waits_for:
            return "waits"
        if row.kind == "quote":
            return "quoted"
        if row.kind == "component":
            return "shown" if all(has_test(self.root, name) for name in row.tests) else "broken"
        return "drawable" if all(has_tool(self.root, command) for command in row.commands) else "broken"

    def _run(self, row: Row) -> str:
        runs: list[Run] = [self.manifest.experiments[name] for name in row.experiments]
        runs += [self.manifest.pretrainings[name] for name in row.pretrainings]
        for run in [*runs]:
            if isinstance(run, Experiment) and run.pretraining:
                runs.append(self.manifest.pretrainings[run.pretraining])
        ready = [run for run in runs if not run.waits_for]
        if row.waits_for or not (ready or row.costs):
            return "waits"
        if len(ready) < len(runs):
            return "partly waits"
        states = [self.state_of_run(run) for run in ready]
        if row.costs:
            states.append(self._measured(row))
        return min(states, key=_RUNS.index)

    def _measured(self, row: Row) -> str:
        for scale, state in (("full", "full run"), ("quick", "quick run"), ("smoke", "smoke passed")):
            path = self.out / scale / "costs" / f"row_{row.number}" / "costs.json"
            if path.is_file():
                commit = json.loads(path.read_text(encoding="utf-8")).get("commit")
                if scale != "smoke" or commit == self.commit:
                    return state
        return "unchecked"

    def state_of_run(self, run: Run) -> str:
        """State of one pre-training or experiment."""
        try:
            config_chain(run.config)
        except FileNotFoundError:
            return "broken"
        for scale, state in (("full", "full run"), ("quick", "quick run")):
            if found := self.results[scale].get(run.name):
                same = all(result.config_hash == config_hash(result.config) for result in found)
                return state if same else "stale"
        if any(result.commit == self.commit for result in self.results["smoke"].get(run.name, ())):
            return "smoke passed"
        build = self.builds.get(run.config)
        if build is None or build["hash"] != config_hash(run.config) or build["commit"] != self.commit:
            return "unchecked"
        return "broken" if build.get("error") else "builds"


def _by_name(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.name, []).append(result)
    return found


def read_builds(out: Path) -> dict[str, Mapping[str, Any]]:
    """What building every configuration gave, by its name: hash, commit, parameters, error."""
    path = out / BUILDS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def has_test(root: Path, name: str) -> bool:
    """Whether file::test or file::Class::test exists."""
    file, *names = name.split("::")
    path = root / file
    return path.is_file() and (not names or names[-1].split("[")[0] in _definitions(path))


@cache
def _definitions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


def has_tool(root: Path, command: str) -> bool:
    """Whether the script that a command names exists."""
    scripts = [word for word in shlex.split(command) if re.fullmatch(r"(tools|benchmarks)/.+\.(py|sh)", word)]
    return bool(scripts) and all((root / script).is_file() for script in scripts)
