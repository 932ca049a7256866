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
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from jepa_plugins.reproduction.manifest import Experiment
from jepa_plugins.reproduction.needs import weights_remedy
from jepa_plugins.reproduction.plan import Choice, Planner, Stage, config_hash, joined
from jepa_plugins.reproduction.protocol import protocol_of
from jepa_plugins.reproduction.results import (
    Result,
    Results,
    commit_of,
    hardware,
    read_json,
    read_result,
    versions,
    write_json,
)

MARK = "stage.json"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 45.0  # seconds between SIGTERM and SIGKILL; torchrun gives its workers 30


def fingerprint_of(planner: Planner, stage: Stage, commit: str) -> str:
    """Of what decides the outcome of a stage: what it runs, its configuration, and the stages before it.

    Neither the machine counts, nor how the batch is spread over it, nor where the data are; the commit counts for
    smoke runs.

    Raises:
        FileNotFoundError: a configuration is not there.
    """
    content = [stage.name, stage.identity]
    if stage.config:
        content.append(config_hash(stage.config))
    if planner.choice.scale == "smoke":
        content.append(commit)
    content += [fingerprint_of(planner, planner.stages[name], commit) for name in stage.needs]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


class StageError(ValueError):
    """One sentence on a stage that failed, with its log."""


class Interrupted(StageError):
    """The runner was told to end, by a signal; its command has ended too."""

    def __init__(self, stage: Stage, number: int) -> None:
        super().__init__(
            f"{stage.name} was interrupted by {signal.Signals(number).name}: the same command goes on from there"
        )
        self.exit_code = 128 + number


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
        self._signal = 0  # that told the runner to end
        self._lock = -1  # file descriptor of the lock of the stage that runs

    def run(self, stages: Sequence[Stage]) -> list[Result]:
        """Run what has not finished, in order; returns the results of all experiments and pre-trainings.

        Raises:
            StageError: a command failed; what was finished before stays.
            Interrupted: SIGINT, SIGTERM or SIGHUP came.
        """
        found = []
        with self._ending():
            for number, stage in enumerate(stages, 1):
                self.say(f"[{number}/{len(stages)}] {stage.name}")
                with self._alone(stage):
                    self._unless_finished(stage, stages)
                if stage.run is not None:
                    path = self.results.path(stage.run.name, self.choice.scale, stage.seed)
                    found.append(read_result(path))
        return found

    def _unless_finished(self, stage: Stage, stages: Sequence[Stage]) -> None:
        finished, lost = self.finished(stage), self.lost(stage, stages)
        if finished and not lost:
            self.say("    finished before")
            return
        if finished:
            self.say(f"    finished before, but {lost} is gone: it runs again")
            _forget_lost_checkpoint(stage.folder)
        self._run(stage)

    def lost(self, stage: Stage, stages: Sequence[Stage]) -> str:
        """What is gone of a finished stage; empty when nothing is, or when all that reads it has finished too."""
        readers = [other for other in stages if stage.name in other.needs]
        if readers and not any(self.pending(other, stages) for other in readers):
            return ""
        return stage.lost()

    def pending(self, stage: Stage, stages: Sequence[Stage]) -> bool:
        """Whether a stage of a plan would run."""
        return not self.finished(stage) or bool(self.lost(stage, stages))

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
        """See `fingerprint_of`."""
        return fingerprint_of(self.planner, stage, self.commit)

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
        """One process at a time runs a stage; its command holds the lock too, and keeps it should the runner die."""
        lock = self.planner.base / "locks" / stage.name.replace("/", "__")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StageError(f"{stage.name} is running in another process: wait for it") from None
            self._lock = file.fileno()
            yield

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Note signals that end the runner, for `_wait` to end its command first; those that are ignored stay so."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number

        ours = threading.current_thread() is threading.main_thread()  # others may not set handlers
        before = {number: signal.getsignal(number) for number in ENDING if ours}
        changed = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in changed:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number in changed:
                signal.signal(number, before[number] or signal.SIG_DFL)

    def _wait(self, process: subprocess.Popen[bytes], stage: Stage) -> int:
        """Exit code of a command; a signal to the runner ends it and all that it has started."""
        while not self._signal:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=1.0)
        self.say(f"    {signal.Signals(self._signal).name}: ending it")
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        raise Interrupted(stage, self._signal)

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
        self._call(replace(stage, command=(*stage.machine.prefix(), *words)))

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
            if self._signal:
                raise Interrupted(stage, self._signal)
            process = subprocess.Popen(
                command,
                cwd=self.root,
                stdout=sink,
                stderr=sink,
                env=environment,
                pass_fds=(self._lock,),
                start_new_session=True,
            )
            code = self._wait(process, stage)
        if code:
            said = _last_line(log)
            if stage.run is not None and stage.run.weights and "could not be fetched" in said:
                said += f": {weights_remedy(self.planner, stage.run.weights)}"
            raise StageError(f"{stage.name} failed: {said} (its log is {log})")

    def _result(self, stage: Stage, seconds: float) -> Result:
        run = stage.run
        assert run is not None
        experiment = isinstance(run, Experiment)
        evaluated = _evaluation(stage.folder) if experiment else {}
        return Result(
            name=run.name,
            kind="experiment" if experiment else "pretraining",
            scale=self.choice.scale,
            seed=stage.seed,
            config=stage.config,
            config_hash=config_hash(stage.config),
            overrides=dict(stage.overrides),
            pretraining=run.pretraining if isinstance(run, Experiment) else "",
            metrics=dict(evaluated.get("metrics", {})),
            undefined=tuple(evaluated.get("undefined", ())),
            fingerprint=self.fingerprint(stage),
            protocol=protocol_of(stage.folder, run.toolkit) if experiment else {},
            commit=self.commit,
            versions=versions(),
            hardware=hardware(),
            processes=stage.machine.processes,
            seconds=seconds,
            command=stage.shell(),
            finished=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


def _evaluation(folder: Path) -> dict[str, Any]:
    """A run's evaluation.json: metrics, and names of those that are undefined."""
    path = folder / "evaluation.json"
    if not path.is_file():
        raise StageError(
            f"{path} is not there, though the command succeeded: its configuration evaluates nothing"
        )
    found = read_json(path, dict, "move it away and run again")
    if not isinstance(found.get("metrics"), dict):
        raise StageError(f"{path} holds no metrics: move it away and run again")
    return dict(found)


def _forget_lost_checkpoint(folder: Path) -> None:
    """Let a training whose last checkpoint is gone resume from the newest that is left, or else start anew."""
    pointer = folder / "last_checkpoint"
    if not pointer.is_file() or (folder / pointer.read_text(encoding="utf-8").strip()).is_file():
        return
    left = [*folder.glob("model_[0-9]*.pth"), *folder.glob("iter_*.pth"), *folder.glob("epoch_*.pth")]
    if left:
        newest = max(left, key=lambda path: path.stat().st_mtime)
        pointer.write_text(newest.name if newest.name.startswith("model_") else str(newest), encoding="utf-8")
    else:
        pointer.unlink()


def _last_line(log: Path) -> str:
    """What a failed command said: its last error, or its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")
