"""Runs stages one after another: finished ones are skipped, interrupted ones go on, and each leaves a result."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jepa_plugins.reproduction.manifest import Experiment
from jepa_plugins.reproduction.plan import Choice, Planner, Stage, config_hash, joined
from jepa_plugins.reproduction.protocol import protocol_of
from jepa_plugins.reproduction.results import (
    Result,
    Results,
    commit_of,
    hardware,
    read_result,
    versions,
    write_json,
)

MARK = "stage.json"


class StageError(ValueError):
    """One sentence on a stage that failed, with its log."""


class Runner:
    """Runs a plan.

    Args:
        planner: that made it; root: of the project, where tools/ is.
        say: takes lines for the user.
        restart: start runs anew whose configuration has changed, beside what they were.

    Raises:
        StageError: torchrun on several nodes, which is for a person on each of them.
    """

    def __init__(self, planner: Planner, root: Path, say: Any = print, restart: bool = False) -> None:
        machine = planner.choice.machine
        if machine.launcher == "torchrun" and machine.nodes > 1:
            raise StageError("torchrun starts on every node by hand: see 'plan', or use --launcher slurm")
        self.planner, self.root, self.say, self.restart = planner, root, say, restart
        self.choice: Choice = planner.choice
        self.results = Results(self.choice.out)
        self.commit = commit_of(root)

    def run(self, stages: Sequence[Stage]) -> list[Result]:
        """Run what has not finished, in order; returns the results of all experiments and pre-trainings.

        Raises:
            StageError: a command failed; what was finished before stays.
        """
        found = []
        for number, stage in enumerate(stages, 1):
            self.say(f"[{number}/{len(stages)}] {stage.name}")
            with self._alone(stage):
                if self.finished(stage):
                    self.say("    finished before")
                else:
                    self._run(stage)
            if stage.run is not None:
                found.append(read_result(self.results.path(stage.run.name, self.choice.scale, stage.seed)))
        return found

    def finished(self, stage: Stage) -> bool:
        """Whether a stage has run as it would run now, and its result is there.

        At full and quick size the configuration and the command count, and the code may have moved on; a smoke
        run vouches for the commit that it ran at.
        """
        mark = self._mark(stage)
        if not mark.get("finished") or mark.get("fingerprint") != self.fingerprint(stage):
            return False
        if stage.run is None:
            return True
        return self.results.path(stage.run.name, self.choice.scale, stage.seed).is_file()

    def fingerprint(self, stage: Stage) -> str:
        """Of what decides the outcome of a stage: what it runs, its configuration, and the stages before it.

        Neither the machine counts, nor how the batch is spread over it, nor where the data are.
        """
        content = [stage.name, stage.identity]
        if stage.config:
            content.append(config_hash(stage.config))
        if self.choice.scale == "smoke":
            content.append(self.commit)
        content += [self.fingerprint(self.planner.stages[name]) for name in stage.needs]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]

    def _mark(self, stage: Stage) -> dict[str, Any]:
        path = stage.folder / MARK
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            raise StageError(f"{path} is no JSON: move it away, and the stage starts anew") from None

    @contextlib.contextmanager
    def _alone(self, stage: Stage) -> Iterator[None]:
        """One process at a time runs a stage."""
        lock = self.planner.base / "locks" / stage.name.replace("/", "__")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StageError(f"{stage.name} is running in another process: wait for it") from None
            yield

    def _run(self, stage: Stage) -> None:
        fingerprint, mark = self.fingerprint(stage), self._mark(stage)
        if mark.get("fingerprint", fingerprint) != fingerprint:
            self._put_away(stage)
            mark = {}
        stage.folder.mkdir(parents=True, exist_ok=True)
        before = float(mark.get("seconds", 0.0))  # of attempts that were interrupted
        state: dict[str, Any] = {
            "fingerprint": fingerprint,
            "finished": False,
            "command": stage.shell(),
            "seconds": before,
        }
        write_json(stage.folder / MARK, state)
        start = time.monotonic()
        try:
            self._call(stage)
            if stage.kind == "experiment":
                self._evaluate_the_last(stage)
        finally:
            state["seconds"] = round(before + time.monotonic() - start, 3)
            write_json(stage.folder / MARK, state)
        if stage.run is not None:
            self.results.save(self._result(stage, state["seconds"]))
        write_json(stage.folder / MARK, {**state, "finished": True})
        self.say(f"    done in {time.monotonic() - start:.0f} s")

    def _put_away(self, stage: Stage) -> None:
        """What another command or configuration left; smoke runs are not worth keeping."""
        if self.choice.scale == "smoke":
            shutil.rmtree(stage.folder)
            return
        if not self.restart:
            raise StageError(
                f"{stage.name} has run in {stage.folder} with another configuration: put that back, or start anew "
                "with --restart, which keeps the old folder beside the new one"
            )
        number = 1
        while (old := stage.folder.with_name(f"{stage.folder.name}.old{number}")).exists():
            number += 1
        stage.folder.rename(old)
        if stage.run is not None:
            result = self.results.path(stage.run.name, self.choice.scale, stage.seed)
            if result.is_file():
                result.rename(old / result.name)
        self.say(f"    its configuration has changed: what was there is now {old}")

    def _evaluate_the_last(self, stage: Stage) -> None:
        """mmengine writes the last checkpoint before the last validation: a run that was interrupted between them
        resumes at its end and validates no more."""
        pointer = stage.folder / "last_checkpoint"
        if stage.run is None or stage.run.toolkit != "mmengine" or not pointer.is_file():
            return
        last = pointer.read_text(encoding="utf-8").strip()
        path = stage.folder / "evaluation.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found.get("checkpoint") and Path(found["checkpoint"]).name == Path(last).name:
            return
        words = ["tools/test.py", stage.config, last, "--work-dir", str(stage.folder), "--cfg-options"]
        words += [str(joined(f"{key}=", value)) for key, value in stage.overrides.items()]
        self._call(replace(stage, command=(*self.choice.machine.prefix(), *words)))

    def _call(self, stage: Stage) -> None:
        command = [sys.executable if word == "python" else word for word in stage.resolved()]
        if command[0] == "torchrun":
            command[:1] = [sys.executable, "-m", "torch.distributed.run"]
        log = stage.folder / "stage.log"
        self.say(f"    $ {stage.shell()}")
        with log.open("a", encoding="utf-8") as sink:
            sink.write(f"$ {shlex.join(command)}\n")
            sink.flush()
            environment = {**os.environ, **stage.environment}
            code = subprocess.run(
                command, cwd=self.root, stdout=sink, stderr=sink, env=environment
            ).returncode
        if code:
            raise StageError(f"{stage.name} failed: {_last_line(log)} (its log is {log})")

    def _result(self, stage: Stage, seconds: float) -> Result:
        run = stage.run
        assert run is not None
        experiment = isinstance(run, Experiment)
        metrics = _metrics(stage.folder) if experiment else {}
        return Result(
            name=run.name,
            kind="experiment" if experiment else "pretraining",
            scale=self.choice.scale,
            seed=stage.seed,
            config=stage.config,
            config_hash=config_hash(stage.config),
            overrides=dict(stage.overrides),
            pretraining=run.pretraining if isinstance(run, Experiment) else "",
            metrics=metrics,
            protocol=protocol_of(stage.folder, run.toolkit) if experiment else {},
            commit=self.commit,
            versions=versions(),
            hardware=hardware(),
            processes=self.choice.machine.processes,
            seconds=seconds,
            command=stage.shell(),
            finished=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


def _metrics(folder: Path) -> dict[str, float]:
    """Of a run's evaluation.json."""
    path = folder / "evaluation.json"
    if not path.is_file():
        raise StageError(
            f"{path} is not there, though the command succeeded: its configuration evaluates nothing"
        )
    return dict(json.loads(path.read_text(encoding="utf-8"))["metrics"])


def _last_line(log: Path) -> str:
    """What a failed command said: its last error, or its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")
