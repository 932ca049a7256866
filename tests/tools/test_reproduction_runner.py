"""Runs of plans with stand-ins of the tools: skipping, resuming, failing, results and states."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from reproduction_small import project, small_manifest

from jepa_plugins.reproduction.plan import Choice, Machine, Planner, config_hash
from jepa_plugins.reproduction.results import Result, Results, commit_of, read_result, summarise, write_json
from jepa_plugins.reproduction.runner import Runner, StageError
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
    write_json(path, {**json.loads(path.read_text()), "config_hash": "of before"})
    assert states(place)[2] == "stale"
    write_json(place / "out" / "quick" / "costs" / "row_9" / "costs.json", {"commit": "c1"})
    assert states(place)[9] == "quick run"
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
