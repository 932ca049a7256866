"""Where each row stands: derived from what exists and what has run, never typed by hand."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jepa_plugins.reproduction.manifest import Experiment, Manifest, ManifestError, Row, Run
from jepa_plugins.reproduction.plan import Choice, Machine, Planner, config_chain, config_hash
from jepa_plugins.reproduction.results import Result, Results, read_json
from jepa_plugins.reproduction.runner import fingerprint_of

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
_PASSED = {"full": "full run", "quick": "quick run", "smoke": "smoke passed"}  # the best first
_ANY = Machine(images_per_gpu=1_000_000)  # no machine changes a fingerprint: one that takes every batch


class States:
    """Derives states.

    Args:
        manifest: see `load_manifest`; out: folder of results; root: of the project; commit: of the project now.

    Attributes:
        remarks: sentences on files of results that do not count, after states were asked for.

    Raises:
        ValueError: one sentence with a file that cannot be read.
    """

    def __init__(self, manifest: Manifest, out: Path, root: Path, commit: str) -> None:
        self.manifest, self.out, self.root, self.commit = manifest, out, root, commit
        self.kept = Results(out)
        self.results = {scale: _by_name(self.kept.load(scale)) for scale in _PASSED}
        self.builds = read_builds(out)
        self.remarks: dict[Path, str] = {}
        self._planners: dict[tuple[str, int, bool], Planner] = {}
        self._counts: dict[tuple[str, str, int], bool] = {}

    def all(self) -> dict[int, str]:
        """State of every row."""
        return {number: self.of(row) for number, row in self.manifest.rows.items()}

    def of(self, row: Row) -> str:
        """State of a row: one of `STATES`. What does not build is broken, whatever else there is."""
        runs = self._runs(row)
        ready = [run for run in runs if not run.waits_for]
        states = [self.state_of_run(run) for run in ready]
        if row.costs:
            states.append(self._measured(row))
        if "broken" in states:
            return "broken"
        if row.kind == "run" and states and not row.waits_for:
            return min(states, key=_RUNS.index) if len(ready) == len(runs) else "partly waits"
        if row.waits_for or row.kind == "run":
            return "waits"
        if row.kind == "quote":
            return "quoted"
        if row.kind == "component":
            return "shown" if all(has_test(self.root, name) for name in row.tests) else "broken"
        return "drawable" if all(has_tool(self.root, command) for command in row.commands) else "broken"

    def checks(self, row: Row) -> str:
        """How many of a row's configurations build, and how many of its smoke runs passed, at this commit."""
        runs = [run for run in self._runs(row) if not run.waits_for]
        configs = dict.fromkeys((*(run.config for run in runs), *row.costs))
        if not configs:
            return ""
        builds = sum(self._build(config) == "builds" for config in configs)
        passed = sum(self._holds(run, "smoke") for run in runs)
        text = f"{builds} of {len(configs)} configurations build"
        return text + (f", {passed} of {len(runs)} smoke runs passed" if runs else "") + " at this commit"

    def _runs(self, row: Row) -> list[Run]:
        """Of a row, with the pre-trainings of its experiments, each once."""
        return [*self.manifest.experiments_of([row]), *self.manifest.pretrainings_of([row])]

    def _measured(self, row: Row) -> str:
        """State of a row's costs."""
        builds = [self._build(config) for config in row.costs]
        if "broken" in builds:
            return "broken"
        for scale, state in _PASSED.items():
            if self._costs_hold(row, scale):
                return state
        return min(builds, key=_RUNS.index)

    def _costs_hold(self, row: Row, scale: str) -> bool:
        """Whether every configuration of a row has been measured, at this commit for the smoke scale."""
        path = self.out / scale / "costs" / f"row_{row.number}" / "costs.json"
        if not path.is_file():
            return False
        content = read_json(path, dict, "move it away and measure again")
        runs = content.get("runs")
        entries = [entry for entry in runs if isinstance(entry, Mapping)] if isinstance(runs, list) else []
        measured = [entry.get("config") for entry in entries if "error" not in entry]
        if missing := [c for c in self.manifest.costs_of(row, scale) if c not in measured]:
            self.remarks[path] = f"{path} does not count: it has no measurement of {', '.join(missing)}"
            return False
        return scale != "smoke" or content.get("commit") == self.commit

    def state_of_run(self, run: Run) -> str:
        """The most that is true of one pre-training or experiment now; `stale` when all that it has is outdated."""
        build = self._build(run.config)
        if build == "broken":
            return build
        for scale, state in _PASSED.items():
            if self._holds(run, scale):
                return state
        outdated = any(self.results[scale].get(run.name) for scale in ("full", "quick"))
        return "stale" if outdated and build == "unchecked" else build

    def _build(self, config: str) -> str:
        """broken, builds, or unchecked when nobody has tried at this commit."""
        try:
            digest = config_hash(config)
        except FileNotFoundError:
            return "broken"
        build = self.builds.get(config)
        if build is None or build["hash"] != digest or build["commit"] != self.commit:
            return "unchecked"
        return "broken" if build.get("error") else "builds"

    def _holds(self, run: Run, scale: str) -> bool:
        """Whether the results of a run are those that it would give now: every seed, or of smoke runs any."""
        found = [self._is_current(run, result) for result in self.results[scale].get(run.name, ())]
        return bool(found) and (any(found) if scale == "smoke" else all(found))

    def _is_current(self, run: Run, result: Result) -> bool:
        """Whether a result was made as it would be made now: configuration, overrides, pre-training and weights."""
        key = (result.scale, result.name, result.seed)
        if key not in self._counts:
            reason = self._outdated(run, result)
            self._counts[key] = not reason
            if reason and result.scale != "smoke":  # those of another commit are no news
                path = self.kept.path(result.name, result.scale, result.seed)
                self.remarks[path] = f"{path} does not count: {reason}"
        return self._counts[key]

    def _outdated(self, run: Run, result: Result) -> str:
        """Why a result is none of a run as it stands; empty when it is one."""
        try:
            config_chain(result.config)
            expected = [self._fingerprint(run, result, own) for own in (False, True)]
        except FileNotFoundError as error:
            return str(error)
        except ManifestError as error:
            return f"{run.name} has no such run now ({error})"
        return "" if result.fingerprint in expected else "its run would be another one now"

    def _fingerprint(self, run: Run, result: Result, own: bool) -> str:
        """Of a run at a result's scale and seed; own: with a pre-training of its own for each seed.

        Raises:
            FileNotFoundError: a configuration is not there; ManifestError: no such run at this scale.
        """
        place = (result.scale, result.seed, own)
        if place not in self._planners:
            choice = Choice(self.out, Path("data"), result.scale, _ANY, (result.seed,), own)
            self._planners[place] = Planner(self.manifest, choice)
        planner = self._planners[place]
        tuned, trained = ((run.name,), ()) if isinstance(run, Experiment) else ((), (run.name,))
        planner.plan([Row(0, run.name, "run", (), experiments=tuned, pretrainings=trained)])
        stage = next((s for s in planner.stages.values() if s.run == run and s.seed == result.seed), None)
        return fingerprint_of(planner, stage, self.commit) if stage else ""


def _by_name(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.name, []).append(result)
    return found


def read_builds(out: Path) -> dict[str, Mapping[str, Any]]:
    """What building every configuration gave, by its name: hash, commit, parameters, error.

    Raises:
        ValueError: one sentence with the file, which cannot be read.
    """
    path, remedy = out / BUILDS, "move it away and run 'reproduce.py build'"
    if not path.is_file():
        return {}
    found = read_json(path, dict, remedy)
    bad = [
        name
        for name, entry in found.items()
        if not isinstance(entry, dict) or not {"hash", "commit"} <= {*entry}
    ]
    if bad:
        raise ValueError(f"{path} says nothing of how {', '.join(bad)} was built: {remedy}")
    return found


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
