"""States of rows: no more than what is known of builds, smoke runs, results and measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reproduction_small import project, small_manifest

from jepa_plugins.reproduction.manifest import Manifest, load_manifest
from jepa_plugins.reproduction.plan import Choice, Planner, config_hash
from jepa_plugins.reproduction.results import Results, read_costs, read_json, read_result, write_json
from jepa_plugins.reproduction.runner import Runner
from jepa_plugins.reproduction.state import BUILDS, States, read_builds

TUNED = "detectron2/mask2former/ade20k/semantic_R50_mask_jepa.yaml"
MASK_JEPA = "detectron2/mask_jepa/R50_in1k.yaml"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    project(tmp_path / "project")
    return tmp_path


def run(place: Path, row: int, scale: str = "full", commit: str = "c1", **more: Any) -> None:
    planner = Planner(small_manifest(), Choice(place / "out", place / "data", scale, **more))
    runner = Runner(planner, place / "project", say=lambda line: None)
    runner.commit = commit
    runner.run(planner.plan([small_manifest().row(row)]))


def of(place: Path, commit: str = "c1", manifest: Manifest | None = None) -> States:
    return States(manifest or small_manifest(), place / "out", place / "project", commit)


def built(place: Path, config: str, commit: str = "c1", **more: Any) -> None:
    entry = {"hash": config_hash(config), "commit": commit, **more}
    write_json(place / "out" / BUILDS, {**read_builds(place / "out"), config: entry})


def change(path: Path, **values: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **values})


def costs(*configs: str, **more: Any) -> dict[str, Any]:
    return {"commit": "c1", "hardware": {"gpus": []}, "runs": [{"config": c} for c in configs], **more}


# --- the best that is true


def test_what_does_not_build_is_broken_whatever_else_there_is(place: Path) -> None:
    run(place, 2)
    run(place, 2, "smoke")
    assert of(place).all()[2] == "full run"
    built(place, TUNED, error="no such key")
    assert of(place).all()[2] == "broken"
    assert of(place, "c2").all()[2] == "full run"  # another commit may have mended it
    built(place, MASK_JEPA, error="no such key")  # what it starts from
    built(place, TUNED)
    assert of(place).all()[2] == "broken"


def test_a_row_that_partly_waits_is_broken_when_the_rest_does_not_build(place: Path) -> None:
    manifest = small_manifest()
    manifest.experiments["base"] = replace(manifest.experiments["base"], waits_for="rain")
    assert of(place, manifest=manifest).all()[2] == "partly waits"
    built(place, TUNED, error="no such key")
    assert of(place, manifest=manifest).all()[2] == "broken"


def test_an_outdated_result_hides_no_smoke_run(place: Path) -> None:
    run(place, 1)
    path = Results(place / "out").path("mask_jepa", "full", 0)
    change(path, fingerprint="of before")
    states = of(place)
    assert states.all()[1] == "stale" and "another one now" in states.remarks[path]
    built(place, MASK_JEPA)
    assert of(place).all()[1] == "builds"
    run(place, 1, "smoke")
    assert of(place).all()[1] == "smoke passed" and of(place, "c2").all()[1] == "stale"
    assert of(place).checks(small_manifest().row(1)) == (
        "1 of 1 configurations build, 1 of 1 smoke runs passed at this commit"
    )


@pytest.mark.parametrize("scale", ["full", "smoke"])
def test_seeds_count_with_a_shared_pretraining_or_with_their_own(place: Path, scale: str) -> None:
    run(place, 2, scale, seeds=(0, 1), pretraining_seeds=True)
    expected = "full run" if scale == "full" else "smoke passed"
    assert of(place).all()[2] == expected
    other = place / "shared"
    project(other / "project")
    run(other, 2, scale, seeds=(0, 1))
    assert of(other).all()[2] == expected and not of(other).remarks


@pytest.mark.parametrize("what", ["overrides", "pretraining"])
def test_changes_in_the_manifest_count(place: Path, what: str) -> None:
    """As they do for a run that would start again."""
    run(place, 2)
    manifest = small_manifest()
    if what == "overrides":
        changed = replace(manifest.experiments["tuned"], overrides={"SOLVER.BASE_LR": 0.5})
        manifest.experiments["tuned"] = changed
    else:
        changed = replace(manifest.pretrainings["mask_jepa"], overrides={"SOLVER.BASE_LR": 0.5})
        manifest.pretrainings["mask_jepa"] = changed
    assert of(place).all()[2] == "full run" and of(place, manifest=manifest).all()[2] == "stale"


def test_a_result_whose_configuration_is_gone_is_stale_and_named(place: Path) -> None:
    run(place, 1)
    path = Results(place / "out").path("mask_jepa", "full", 0)
    change(path, config="detectron2/gone.yaml")
    states = of(place)
    assert states.all()[1] == "stale"
    assert str(path) in states.remarks[path] and "gone.yaml is not there" in states.remarks[path]


# --- costs


@pytest.mark.parametrize(
    "content",
    [{}, costs(), costs("other.yaml"), costs(runs=[{"config": MASK_JEPA, "error": "no"}]), costs(runs=[1])],
)
def test_a_file_without_measurements_is_no_run(place: Path, content: dict[str, Any]) -> None:
    path = place / "out" / "full" / "costs" / "row_9" / "costs.json"
    write_json(path, content)
    states = of(place)
    assert states.all()[9] == "unchecked"
    assert str(path) in states.remarks[path] and MASK_JEPA in states.remarks[path]


def test_measured_costs_count_at_their_scale(place: Path) -> None:
    folder = place / "out"
    write_json(folder / "smoke" / "costs" / "row_9" / "costs.json", costs("detectron2/quick/mask_jepa.yaml"))
    assert of(place).all()[9] == "smoke passed" and of(place, "c2").all()[9] == "unchecked"
    write_json(folder / "quick" / "costs" / "row_9" / "costs.json", costs("detectron2/quick/mask_jepa.yaml"))
    assert of(place, "c2").all()[9] == "quick run"
    write_json(folder / "full" / "costs" / "row_9" / "costs.json", costs(MASK_JEPA))
    assert of(place, "c2").all()[9] == "full run"
    built(place, MASK_JEPA, error="no such key")
    assert of(place).all()[9] == "broken"


def test_the_projects_cost_rows_measure_what_the_plan_measures(place: Path) -> None:
    manifest = load_manifest()
    for scale in ("full", "quick"):
        for number in (16, 78):
            row = manifest.row(number)
            planner = Planner(manifest, Choice(place, place, scale))
            stage = next(stage for stage in planner.plan([row]) if stage.kind == "cost")
            assert set(manifest.costs_of(row, scale)) <= set(stage.shell().split())


# --- files that are broken


BROKEN = ["{", "[]", "3", "\x00"]


@pytest.mark.parametrize("text", BROKEN)
def test_every_broken_file_is_named_with_the_remedy(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    for path, read in (
        (out / BUILDS, lambda: read_builds(out)),
        (out / "full" / "results" / "x__seed_0.json", lambda: Results(out).load("full")),
        (tmp_path / "costs.json", lambda: read_costs(tmp_path / "costs.json")),
        (out / "full" / "costs" / "row_9" / "costs.json", lambda: of(tmp_path).all()),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        with pytest.raises(ValueError, match=r": (move it away|write it)") as error:
            read()
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        path.unlink()


@pytest.mark.parametrize(
    "wrong", [{"metrics": []}, {"seed": "0"}, {"undefined": 3}, {"other": 1}, {"config": None}]
)
def test_a_result_of_other_types_is_named(place: Path, wrong: dict[str, Any]) -> None:
    run(place, 1)
    path = Results(place / "out").path("mask_jepa", "full", 0)
    change(path, **wrong)
    with pytest.raises(ValueError, match="mask_jepa__seed_0.json is no result of this project") as error:
        read_result(path)
    assert next(iter(wrong)) in str(error.value) or "iterable" in str(error.value)


def test_builds_and_costs_of_another_form_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / BUILDS, {"a.yaml": {"hash": "h"}})
    with pytest.raises(ValueError, match=f"{BUILDS} says nothing of how a.yaml was built"):
        read_builds(tmp_path)
    file = tmp_path / "costs.json"
    for content in ({}, {"runs": []}, {"runs": [{}]}, costs(runs=[{"config": "c", "gpu_hours": "1"}])):
        write_json(file, content)
        with pytest.raises(ValueError, match="holds no list of measured runs"):
            read_costs(file)
    write_json(file, {"runs": [{"config": "c"}]})
    with pytest.raises(ValueError, match="on which hardware"):
        read_costs(file)
    with pytest.raises(FileNotFoundError, match="absent.json is not there: write it with"):
        read_costs(tmp_path / "absent.json")
    write_json(file, costs("c"))
    assert read_costs(file) == read_json(file, dict, "")
