"""Runs of plans with stand-ins of the tools: skipping, resuming, failing, results and states."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from reproduction_small import project, small_manifest

from jepa_plugins.reproduction.plan import Choice, Machine, Planner, config_hash
from jepa_plugins.reproduction.results import Result, Results, commit_of, read_result, summarise, write_json
from jepa_plugins.reproduction.runner import Interrupted, Runner, StageError
from jepa_plugins.reproduction.state import BUILDS, States, has_test, has_tool


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    project(tmp_path / "project")
    return tmp_path


def run(
    place: Path, *rows: int, scale: str = "full", commit: str = "c1", restart: bool = False, **more
) -> list[Result]:
    manifest = small_manifest()
    planner = Planner(manifest, Choice(place / "out", place / "data", scale, **more))
    runner = Runner(planner, place / "project", say=lambda line: None, restart=restart)
    runner.commit = commit
    return runner.run(planner.plan(manifest.row(number) for number in rows))


def calls(place: Path) -> list[str]:
    file = place / "calls.txt"
    return file.read_text().splitlines() if file.is_file() else []


def states(place: Path, commit: str = "c1") -> dict[int, str]:
    return States(small_manifest(), place / "out", place / "project", commit).all()


def test_results_hold_what_a_reader_asks_for(place: Path) -> None:
    results = {result.name: result for result in run(place, 2)}
    tuned = results["tuned"]
    assert tuned.metrics == {"sem_seg/mIoU": 40.0} and tuned.pretraining == "mask_jepa"
    assert tuned.config_hash == config_hash(tuned.config) and tuned.commit == "c1"
    assert tuned.fingerprint and tuned.fingerprint != results["base"].fingerprint
    assert tuned.versions["torch"] and tuned.hardware["cores"] >= 1 and tuned.finished.endswith("+00:00")
    assert tuned.overrides["SEED"] == 0 and "tools/train_net.py" in tuned.command
    assert results["mask_jepa"].kind == "pretraining" and results["mask_jepa"].metrics == {}
    assert read_result(Results(place / "out").path("tuned", "full", 0)) == tuned


def test_finished_stages_are_skipped_and_pretrainings_shared(place: Path) -> None:
    run(place, 2)
    before = calls(place)
    assert len(before) == 4
    run(place, 2)
    assert calls(place) == before
    run(place, 3)  # another export and experiment of the same pre-training
    assert [line.split()[0] for line in calls(place)[4:]] == ["export.py", "train_net.py"]
    run(place, 2, seeds=(0, 1))
    assert len(calls(place)) == 8
    assert [r.metrics["sem_seg/mIoU"] for r in Results(place / "out").of("tuned", "full")] == [40.0, 41.0]


def test_a_failure_keeps_what_is_finished_and_goes_on_from_there(place: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAIL", "experiments/tuned")
    with pytest.raises(StageError, match="experiment/tuned/seed_0 failed: it rains .its log is .*stage.log"):
        run(place, 2)
    monkeypatch.delenv("FAIL")
    done = len(calls(place))
    run(place, 2)
    assert len(calls(place)) == done + 1 and "--resume" in calls(place)[-1]


def test_a_smoke_run_vouches_for_its_commit_only(place: Path) -> None:
    run(place, 2, scale="smoke")
    assert states(place)[2] == "smoke passed" and states(place, "c2")[2] == "unchecked"
    before = len(calls(place))
    run(place, 2, scale="smoke", commit="c2")
    assert len(calls(place)) == 2 * before and states(place, "c2")[2] == "smoke passed"


def test_another_configuration_starts_anew_only_when_told_and_keeps_the_old_run(place: Path) -> None:
    run(place, 2)
    folder = place / "out" / "full" / "experiments" / "tuned" / "seed_0"
    mark = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({**mark, "fingerprint": "other"}))
    with pytest.raises(
        StageError, match="tuned/seed_0 has run in .* with another configuration: .* --restart"
    ):
        run(place, 2)
    run(place, 2, restart=True)
    old = folder.with_name("seed_0.old1")
    assert (old / "model_final.pth").is_file() and (old / "tuned__seed_0.json").is_file()
    assert len(calls(place)) == 5


def test_another_machine_or_place_of_the_data_is_no_other_run(place: Path) -> None:
    run(place, 2, 4)
    before = calls(place)
    manifest = small_manifest()
    machine = Machine(gpus=2, launcher="torchrun", images_per_gpu=2)
    planner = Planner(manifest, Choice(place / "out", place / "elsewhere", machine=machine))
    stages = planner.plan([manifest.row(2), manifest.row(4)])
    assert "torchrun" in stages[0].shell() and "elsewhere" in stages[0].shell()
    Runner(planner, place / "project", say=lambda line: None).run(stages)
    assert calls(place) == before


def test_torchrun_on_several_nodes_is_for_people(place: Path) -> None:
    planner = Planner(small_manifest(), Choice(place, place, machine=Machine(2, 8, "torchrun")))
    with pytest.raises(StageError, match="torchrun starts on every node by hand"):
        Runner(planner, place)


def test_the_last_checkpoint_is_what_is_evaluated(place: Path, monkeypatch) -> None:
    """A run that was interrupted behind its last checkpoint has the evaluation of an earlier one."""
    monkeypatch.setenv("EVALUATED", "iter_1.pth")
    result = run(place, 4)[-1]
    assert result.metrics["sem_seg/mIoU"] == 90.0 and calls(place)[-1].startswith("test.py")
    again = [line for line in calls(place) if line.startswith("test.py")]
    run(place, 4)
    assert [line for line in calls(place) if line.startswith("test.py")] == again


def test_the_time_of_interrupted_attempts_counts(place: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAIL", "experiments/tuned")
    with pytest.raises(StageError):
        run(place, 2)
    mark = place / "out" / "full" / "experiments" / "tuned" / "seed_0" / "stage.json"
    held = json.loads(mark.read_text())
    assert held["seconds"] > 0 and held["finished"] is False
    mark.write_text(json.dumps({**held, "seconds": 1000.0}))
    monkeypatch.delenv("FAIL")
    assert run(place, 2)[-1].seconds > 1000.0


def test_changes_are_part_of_the_commit(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        who = ("-c", "user.name=x", "-c", "user.email=x@y")
        subprocess.run(["git", "-C", str(tmp_path), *who, *args], check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    found = [commit_of(tmp_path)]
    for content in ("2", "3"):
        (tmp_path / "a").write_text(content)
        found.append(commit_of(tmp_path))
    assert len(set(found)) == 3 and "-dirty-" in found[1] and all(c.startswith(found[0]) for c in found)


def test_two_processes_do_not_run_one_stage(place: Path) -> None:
    manifest = small_manifest()
    planner = Planner(manifest, Choice(place / "out", place / "data"))
    stages = planner.plan([manifest.row(1)])
    runner = Runner(planner, place / "project", say=lambda line: None)
    with runner._alone(stages[0]), pytest.raises(StageError, match="is running in another process"):
        runner.run(stages)


# A tool that writes its process and that of a child, and trains until somebody ends it.
ENDLESS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.environ["CALLS"] + ".tmp", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(os.environ["CALLS"] + ".tmp", os.environ["CALLS"])
time.sleep(600)
"""
RUN_ROW_1 = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from pathlib import Path
from reproduction_small import small_manifest
from jepa_plugins.reproduction.plan import Choice, Planner
from jepa_plugins.reproduction.runner import Interrupted, Runner
place, manifest = Path(sys.argv[1]), small_manifest()
planner = Planner(manifest, Choice(place / "out", place / "data"))
try:
    Runner(planner, place / "project").run(planner.plan([manifest.row(1)]))
except Interrupted as interrupted:
    print(interrupted)
    sys.exit(interrupted.exit_code)
"""


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened for a minute"
        time.sleep(0.05)


def runs_still(process: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def endless(place: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A runner in a process of its own, and the processes of its training."""
    (place / "project" / "tools" / "train_net.py").write_text(ENDLESS)
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join((str(root), str(root / "tests" / "tools")))
    runner = subprocess.Popen(
        [sys.executable, "-c", RUN_ROW_1, str(place)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    until((place / "calls.txt").is_file)
    training = [int(word) for word in (place / "calls.txt").read_text().split()]
    yield runner, training
    runner.kill()
    runner.wait()
    for process in filter(runs_still, training):
        os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_runner_that_is_told_to_end_ends_its_training(place: Path, endless, number) -> None:
    runner, training = endless
    assert all(map(runs_still, training))
    runner.send_signal(number)
    said, _ = runner.communicate(timeout=60)
    assert runner.returncode == 128 + number
    assert f"pretrain/mask_jepa/seed_0 was interrupted by {number.name}: the same command goes on" in said
    until(lambda: not any(map(runs_still, training)))
    project_again(place)
    assert run(place, 1)[0].name == "mask_jepa"  # the lock is free, and the stage resumes


def test_a_training_that_outlives_its_runner_keeps_the_lock(place: Path, endless) -> None:
    runner, training = endless
    runner.kill()
    runner.communicate()
    assert runs_still(training[0])
    with pytest.raises(StageError, match="pretrain/mask_jepa/seed_0 is running in another process"):
        run(place, 1)
    os.kill(training[0], signal.SIGKILL)
    until(lambda: not runs_still(training[0]))
    project_again(place)
    assert run(place, 1)[0].name == "mask_jepa"


def project_again(place: Path) -> None:
    """The usual stand-ins of the tools."""
    shutil.rmtree(place / "project")
    project(place / "project")


def test_a_signal_between_stages_starts_no_more(place: Path) -> None:
    manifest = small_manifest()
    planner = Planner(manifest, Choice(place / "out", place / "data"))

    def say(line: str) -> None:
        if line.startswith("    done in"):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="pretrain/mask_jepa/seed_0 was interrupted by SIGTERM"):
        Runner(planner, place / "project", say=say).run(planner.plan([manifest.row(2)]))
    assert len(calls(place)) == 1 and signal.getsignal(signal.SIGTERM) is before


def said_by(place: Path, *rows: int, scale: str = "full") -> str:
    manifest, lines = small_manifest(), []
    planner = Planner(manifest, Choice(place / "out", place / "data", scale))
    runner = Runner(planner, place / "project", say=lines.append)
    runner.commit = "c1"
    runner.run(planner.plan(manifest.row(number) for number in rows))
    return "\n".join(lines)


def test_a_product_that_is_gone_is_made_again_when_something_reads_it(place: Path) -> None:
    run(place, 1, 2, scale="smoke")
    before = len(calls(place))
    data, pretraining = place / "out" / "smoke" / "data", place / "out" / "smoke" / "pretrain" / "mask_jepa"
    shutil.rmtree(data)
    (pretraining / "seed_0" / "model_final.pth").unlink()
    run(place, 2, scale="smoke")  # its export and experiments are there: nothing reads the two
    assert len(calls(place)) == before
    said = said_by(place, 3, scale="smoke")  # another export of the same pre-training
    assert f"finished before, but {data} is gone: it runs again" in said
    assert f"finished before, but the checkpoint in {pretraining}/seed_0 is gone: it runs again" in said
    assert [line.split()[0] for line in calls(place)[before:]] == [
        "prepare_data.py",
        "train_net.py",
        "export.py",
        "train_net.py",
    ]
    assert said_by(place, 1, 2, 3, scale="smoke").count("finished before") == 7


def test_the_last_product_of_a_plan_is_looked_at(place: Path) -> None:
    run(place, 1)
    folder = place / "out" / "full" / "pretrain" / "mask_jepa" / "seed_0"
    (folder / "last_checkpoint").write_text("model_final.pth")
    (folder / "model_final.pth").rename(folder / "model_0000001.pth")
    assert "is gone: it runs again" in said_by(place, 1)
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"  # where it resumed
    for path in folder.glob("*.pth"):
        path.unlink()
    (folder / "last_checkpoint").write_text("model_final.pth")
    run(place, 1)
    assert len(calls(place)) == 3 and not (folder / "last_checkpoint").exists()


def test_weights_that_cannot_be_fetched_name_the_remedy(place: Path) -> None:
    tool = place / "project" / "tools" / "train_net.py"
    tool.write_text("import sys; sys.exit('error: r50 could not be fetched (URLError): set MODEL.WEIGHTS')")
    with pytest.raises(
        StageError, match="fetched .*; or name another place with --weights r50=FILE .its log"
    ):
        run(place, 1)


def test_results_say_how_many_processes_trained(place: Path) -> None:
    manifest = small_manifest()
    manifest.experiments["base"] = replace(manifest.experiments["base"], batch=2)
    planner = Planner(manifest, Choice(place / "out", place / "data", machine=Machine(1, 4, "torchrun")))
    (stage,) = [s for s in planner.plan([manifest.row(2)]) if s.name == "experiment/base/seed_0"]
    runner = Runner(planner, place / "project", say=lambda line: None)
    stage.folder.mkdir(parents=True)
    (stage.folder / "evaluation.json").write_text(json.dumps({"metrics": {}}))
    assert stage.machine.processes == 2 and runner._result(stage, 1.0).processes == 2


def test_a_command_that_evaluates_nothing_is_an_error(place: Path) -> None:
    tool = place / "project" / "tools" / "train_net.py"
    tool.write_text(tool.read_text().replace("evaluation.json", "other.json"))
    with pytest.raises(StageError, match="evaluation.json is not there, though the command succeeded"):
        run(place, 2)


def test_states_are_derived(place: Path) -> None:
    assert states(place) == {
        1: "unchecked",
        2: "unchecked",
        3: "unchecked",
        4: "unchecked",
        5: "broken",  # the stand-in project has no tests and no tools/figures.py
        6: "broken",
        7: "waits",
        8: "unchecked",
        9: "unchecked",
    }
    manifest = small_manifest()
    configs = [run.config for run in (*manifest.pretrainings.values(), *manifest.experiments.values())]
    builds = {name: {"hash": config_hash(name), "commit": "c1"} for name in configs}
    builds["mmseg/upernet/vit_base16_ade20k_512x512_160k.py"]["error"] = "no such key"
    write_json(place / "out" / BUILDS, builds)
    found = states(place)
    assert (found[2], found[4]) == ("builds", "broken") and states(place, "c2")[2] == "unchecked"
    run(place, 2)
    assert states(place, "c9")[2] == "full run" and states(place)[3] == "builds"
    path = Results(place / "out").path("tuned", "full", 0)
    write_json(path, {**json.loads(path.read_text()), "fingerprint": "of before"})
    assert states(place)[2] == "builds" and states(place, "c2")[2] == "stale"
    manifest = small_manifest()
    manifest.experiments["base"] = replace(manifest.experiments["base"], waits_for="rain")
    assert States(manifest, place / "out", place / "project", "c1").all()[2] == "partly waits"


def test_what_exists_is_looked_up_in_the_files() -> None:
    root = Path(__file__).resolve().parents[2]
    here = "tests/tools/test_reproduction_runner.py"
    assert has_test(root, here) and has_test(root, f"{here}::test_states_are_derived[x]")
    assert not has_test(root, f"{here}::test_absent") and not has_test(root, "tests/absent.py")
    assert has_tool(root, "python tools/figures.py kmeans") and not has_tool(root, "python tools/absent.py")
    assert not has_tool(root, "echo")


def test_a_broken_result_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "full" / "results" / "x__seed_0.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="x__seed_0.json is no result of this project"):
        Results(tmp_path).load("full")


def test_summaries_over_seeds() -> None:
    results = [Result("x", "experiment", "full", s, "c", {"mIoU": v}) for s, v in enumerate((3.0, 1.0, 2.0))]
    found = summarise(results, "mIoU")
    assert found is not None and (found.median, found.low, found.high, found.seeds) == (2.0, 1.0, 3.0, 3)
    assert summarise(results, "PQ") is None
