"""Plans: the commands of rows, in order, for every machine."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reproduction_small import small_manifest

from jepa_plugins.reproduction.manifest import Experiment, ManifestError, Weights, load_manifest
from jepa_plugins.reproduction.needs import Stock, hours_of, needs_of
from jepa_plugins.reproduction.plan import (
    Choice,
    Machine,
    Planner,
    Stage,
    config_chain,
    config_hash,
)

OUT, DATA = Path("/out"), Path("/data")


def plan(*rows: int, scale: str = "full", machine: Machine | None = None, **more) -> list[Stage]:
    manifest = small_manifest()
    choice = Choice(OUT, DATA, scale, machine or Machine(), **more)
    return Planner(manifest, choice).plan(manifest.row(number) for number in rows)


def options(stage: Stage) -> dict[str, str]:
    """KEY VALUE pairs or KEY=VALUE of a command."""
    words = shlex.split(stage.shell())
    pairs = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    return {**dict(zip(words, words[1:], strict=False)), **pairs}


def test_a_row_is_pretrained_exported_and_tuned_in_order() -> None:
    stages = plan(2)
    assert [stage.name for stage in stages] == [
        "experiment/base/seed_0",
        "pretrain/mask_jepa/seed_0",
        "export/mask_jepa/seed_0/export",
        "experiment/tuned/seed_0",
    ]
    exported = "/out/full/pretrain/mask_jepa/seed_0/export/export.pth"
    assert stages[2].shell() == (
        f"python tools/export.py /out/full/pretrain/mask_jepa/seed_0/model_final.pth {exported}"
    )
    tuned = options(stages[3])
    assert tuned["MODEL.WEIGHTS"] == exported and tuned["SEED"] == "0"
    assert tuned["--config-file"] == "detectron2/mask2former/ade20k/semantic_R50_mask_jepa.yaml"
    assert options(stages[0])["MODEL.WEIGHTS"] == "R-50.pkl"
    assert stages[3].shell().startswith("DETECTRON2_DATASETS=/data python tools/train_net.py ")


def test_rows_share_a_pretraining_and_every_stage_comes_after_what_it_needs() -> None:
    stages = plan(1, 2, 3, seeds=(0, 1))
    names = [stage.name for stage in stages]
    assert len(names) == len(set(names))
    assert names.count("pretrain/mask_jepa/seed_0") == 1 and "pretrain/mask_jepa/seed_1" not in names
    for stage in stages:
        assert all(names.index(need) < names.index(stage.name) for need in stage.needs)
    own = [s.name for s in plan(2, seeds=(0, 1), pretraining_seeds=True)]
    assert {"pretrain/mask_jepa/seed_0", "pretrain/mask_jepa/seed_1"} <= set(own)
    second = next(
        s for s in plan(2, seeds=(0, 1), pretraining_seeds=True) if s.name == "experiment/tuned/seed_1"
    )
    assert "pretrain/mask_jepa/seed_1" in options(second)["MODEL.WEIGHTS"]


def test_other_export_options_are_another_export() -> None:
    stages = {stage.name: stage for stage in plan(2, 3)}
    dropped = stages["export/mask_jepa/seed_0/export_drop_predictor"]
    assert dropped.shell().endswith("--drop predictor")
    assert options(stages["experiment/no_decoder/seed_0"])["MODEL.WEIGHTS"].startswith(str(dropped.folder))


def test_mmengine_reads_the_last_checkpoint_of_the_pretraining() -> None:
    first, second = plan(4)
    assert options(first)["train_dataloader.dataset.source"] == "/data/imagenet/train"
    pointer = "/out/full/pretrain/dmt_jepa/seed_0/last_checkpoint"
    assert f'model.backbone.init_cfg.checkpoint="$(cat {pointer})"' in second.shell().replace("'", "")
    assert "--work-dir /out/full/experiments/upernet/seed_0 --resume" in second.shell()
    with pytest.raises(FileNotFoundError, match="has not finished"):
        second.resolved()


@pytest.mark.parametrize(
    ("machine", "start"),
    [
        (Machine(), "python tools/train.py"),
        (Machine(gpus=8, launcher="torchrun"), "torchrun --standalone --nproc-per-node=8 tools/train.py"),
        (
            Machine(2, 8, "torchrun"),
            "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=$MASTER_ADDR:29500 ",
        ),
        (
            Machine(2, 8, "slurm", cpus_per_task=6),
            "srun --nodes=2 --ntasks-per-node=8 --cpus-per-task=6 --gpus-per-node=8 --kill-on-bad-exit=1 python ",
        ),
    ],
)
def test_launchers(machine, start) -> None:
    assert plan(4, machine=machine)[0].shell().startswith(start)


@given(nodes=st.integers(1, 4), gpus=st.sampled_from([1, 2, 4, 8]), most=st.sampled_from([None, 16, 64, 256]))
def test_the_batch_is_the_recipes_on_every_machine(nodes: int, gpus: int, most: int | None) -> None:
    processes = nodes * gpus
    if 2048 % processes:
        return
    launcher = "torchrun" if processes > 1 else "plain"
    stage = plan(4, machine=Machine(nodes, gpus, launcher, most))[0]
    got = stage.overrides
    local, parts = got["train_dataloader.batch_size"], got["optim_wrapper.accumulative_counts"]
    assert local * parts * processes == 2048
    assert local <= (most or 256)


def test_the_batch_of_detectron2_is_split_by_accumulation() -> None:
    assert plan(1)[0].overrides["SOLVER.ACCUMULATION"] == 8
    assert plan(1, machine=Machine(gpus=8, launcher="torchrun"))[0].overrides["SOLVER.ACCUMULATION"] == 1
    with pytest.raises(ManifestError, match="32 images do not divide among 3 processes"):
        plan(1, machine=Machine(gpus=3, launcher="torchrun"))


def test_smoke_makes_its_data_and_ignores_public_weights() -> None:
    stages = plan(2, scale="smoke")
    assert stages[0].kind == "data" and "/out/smoke/data" in stages[0].shell()
    base = next(stage for stage in stages if stage.name == "experiment/base/seed_0")
    assert options(base)["MODEL.WEIGHTS"] == "" and options(base)["SOLVER.MAX_ITER"] == "2"
    assert base.environment == {"DETECTRON2_DATASETS": "/out/smoke/data"}
    listed = plan(4, scale="smoke")[-1].shell()
    assert "'model.neck.rescales=[4,2]'" in listed


def test_public_models_are_evaluated_only_and_have_a_stand_in_at_small_scales() -> None:
    (stage,) = plan(8)
    assert "--eval-only" in stage.shell() and options(stage)["MODEL.WEIGHTS"] == "R-50.pkl"
    _, first, second = plan(8, scale="smoke")
    assert first.run is None and "--resume" in first.shell() and "--eval-only" in second.shell()
    assert options(second)["MODEL.WEIGHTS"] == str(first.folder / "model_final.pth")


def test_quick_takes_the_stand_in_configuration() -> None:
    (stage,) = plan(1, scale="quick")
    assert stage.config == "detectron2/quick/mask_jepa.yaml"
    assert stage.overrides["DATASETS.UNLABELLED"] == "('/out/quick/data/x',)"
    with pytest.raises(ManifestError, match="row 2 has no quick version; rows that have one: 1"):
        plan(2, scale="quick")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [(5, "row 5 is a component"), (6, "row 6 is a figure"), (7, "row 7 waits .* the view-level loss")],
)
def test_rows_without_runs_say_so(row, sentence) -> None:
    if row == 7:  # its run could start, but the row's own part is missing
        manifest = small_manifest()
        run = replace(manifest.pretrainings["dmt_jepa"], waits_for="the view-level loss")
        manifest.pretrainings["dmt_jepa"] = run
        with pytest.raises(ManifestError, match=sentence):
            Planner(manifest, Choice(OUT, DATA)).plan([manifest.row(7)])
        return
    with pytest.raises(ManifestError, match=sentence):
        plan(row)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 1), "0 nodes"),
        ((1, 2, "mpi"), "launcher 'mpi' is unknown"),
        ((2, 0), "2 processes need --launcher torchrun or slurm"),
        ((1, 1, "plain", 0), "--images-per-gpu is a number from 1 on, got 0"),
        ((1, 1, "plain", -3), "--images-per-gpu is a number from 1 on, got -3"),
        ((1, 1, "plain", None, 0), "--cpus-per-task is a number from 1 on, got 0"),
    ],
)
def test_impossible_machines(arguments, sentence) -> None:
    with pytest.raises(ManifestError, match=sentence):
        Machine(*arguments)


def test_the_hash_covers_the_bases() -> None:
    name = "detectron2/mask2former/ade20k/semantic_R50_mask_jepa.yaml"
    chain = [path.name for path in config_chain(name)]
    assert chain == ["semantic_R50_mask_jepa.yaml", "semantic_R50.yaml", "mask2former_R50.yaml"]
    assert [path.name for path in config_chain("mmseg/ijepa/vit_base16.py")][0] == "vit_base16.py"
    assert "pretrain.py" in [path.name for path in config_chain("mmseg/dmt_jepa/vit_base16.py")]
    assert len(config_hash(name)) == 16 != config_hash("mmseg/ijepa/vit_base16.py")
    with pytest.raises(FileNotFoundError, match="absent.yaml is not there"):
        config_chain("detectron2/absent.yaml")


def planner_in(root: Path, **more) -> Planner:
    return Planner(small_manifest(), Choice(OUT, root, root=root, **more))


def test_what_is_missing(tmp_path: Path) -> None:
    planner = planner_in(tmp_path)
    stages = planner.plan([planner.manifest.row(2)])
    data, weights = needs_of(planner, stages)
    assert (data.name, data.there, data.what) == ("imagenet", False, "data")
    assert str(data) == f"data imagenet: MISSING: no {tmp_path}/imagenet/train; unpack it"
    assert str(weights).startswith(
        "weights r50: MISSING: no R-50.pkl; download it; or name another place with "
    )
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    (tmp_path / "R-50.pkl").write_text("weights")
    assert all(need.there for need in needs_of(planner, stages))


def test_data_are_counted_by_the_check_that_the_manifest_names(tmp_path: Path) -> None:
    planner = planner_in(tmp_path)
    planner.manifest.data["imagenet"]["check"] = "imagenet_files"
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    stages = planner.plan([planner.manifest.row(1)])
    asked = []

    def check(name: str, root: Path) -> Stock:
        asked.append((name, root))
        return Stock(4, ("train/*/*.JPEG 4 of 1,281,167 files",))

    need = needs_of(planner, stages, check)[0]
    assert asked == [("imagenet_files", tmp_path)]
    assert str(need) == "data imagenet: MISSING: train/*/*.JPEG 4 of 1,281,167 files; unpack it"
    whole = needs_of(planner, stages, lambda name, root: Stock(1281167))[0]
    assert whole.there and str(whole) == "data imagenet: there, 1,281,167 files"


def test_weights_are_read_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    url = "detectron2://ImageNetPretrained/R-50.pkl"

    def read(**more) -> tuple[str, str, str]:
        planner = planner_in(tmp_path, **more)
        planner.manifest.weights["r50"] = Weights("r50", "checkpoints/R-50.pkl", "download it", url=url)
        (stage,) = planner.plan([planner.manifest.row(8)])
        return options(stage)["MODEL.WEIGHTS"], str(needs_of(planner, [stage])[-1]), stage.identity

    fetched, said, identity = read()
    assert fetched == url and said == "weights r50: fetched when it is needed"
    cached = tmp_path / "cache" / "detectron2" / "ImageNetPretrained" / "R-50.pkl"
    cached.parent.mkdir(parents=True)
    cached.write_text("weights")
    assert read()[1] == "weights r50: there, fetched before"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "R-50.pkl").write_text("weights")
    assert read()[:2] == ("checkpoints/R-50.pkl", "weights r50: there, checkpoints/R-50.pkl")
    elsewhere = read(weights={"r50": "/mine/R-50.pkl"})
    assert elsewhere[0] == "/mine/R-50.pkl" and "MISSING: no /mine/R-50.pkl" in elsewhere[1]
    assert read()[2] == elsewhere[2] == identity  # where a file lies makes no other run
    with pytest.raises(ManifestError, match="--weights names r51: the manifest knows r50"):
        planner_in(tmp_path, weights={"r51": "x"})


def test_hours_have_a_source_or_say_how_to_measure() -> None:
    manifest = small_manifest()
    stages = plan(2, seeds=(0, 1, 2), pretraining_seeds=True)
    hours = {run.name: run for run in hours_of(stages)}
    first = hours["pretrain/mask_jepa/seed_2"]
    assert (first.hours, first.source) == (100.0, "table 8")
    assert len(hours) == 3 + 3 + 3
    unknown = str(hours["experiment/tuned/seed_0"])
    assert unknown.endswith("no public figure; measure with benchmarks/cost.py and --costs")
    config = manifest.experiments["tuned"].config
    costs = [
        {"hardware": {"gpus": ["A card"]}, "runs": [{"config": config, "gpu_hours": 7.0}, {"config": "x"}]}
    ]
    measured = {run.name: run for run in hours_of(stages, costs)}["experiment/tuned/seed_1"]
    assert (measured.hours, measured.source) == (7.0, "measured on A card")


def test_a_component_that_names_pretrainings_is_planned() -> None:
    manifest = small_manifest()
    manifest.rows[5] = replace(manifest.rows[5], pretrainings=("mask_jepa", "dmt_jepa"))
    stages = Planner(manifest, Choice(OUT, DATA)).plan([manifest.row(5)])
    assert [stage.name for stage in stages] == ["pretrain/mask_jepa/seed_0", "pretrain/dmt_jepa/seed_0"]


def test_every_pretraining_that_does_not_wait_is_planned_by_a_row() -> None:
    manifest = load_manifest()
    planner = Planner(manifest, Choice(OUT, DATA))
    for row in manifest.rows.values():
        try:
            planner.plan([row])
        except ManifestError:
            continue  # nothing to run, or it waits
    ready = {name for name, run in manifest.pretrainings.items() if not run.waits_for}
    assert ready == {stage.run.name for stage in planner.stages.values() if stage.kind == "pretrain"}


def test_public_models_are_evaluated_once_however_many_seeds() -> None:
    assert [stage.name for stage in plan(8, seeds=(0, 1, 2))] == ["experiment/zoo/seed_0"]


def test_what_a_scale_does_not_have_is_left_out_by_name() -> None:
    manifest = small_manifest()
    manifest.rows[3] = replace(manifest.rows[3], pretrainings=("mask_jepa",))
    planner = Planner(manifest, Choice(OUT, DATA, "quick"))
    assert [stage.name for stage in planner.plan([manifest.row(3)])] == ["pretrain/mask_jepa/seed_0"]
    assert planner.left_out == {"no_decoder": "has no quick version"}


def with_batches(batch: int) -> Planner:
    manifest = small_manifest()
    tuned: Experiment = replace(manifest.experiments["tuned"], batch=batch)
    manifest.experiments["tuned"] = tuned
    return Planner(manifest, Choice(OUT, DATA, machine=Machine(4, 8, "slurm")))


def test_fine_tuning_takes_as_many_gpus_as_divide_its_batch_and_pretraining_all() -> None:
    planner = with_batches(16)
    stages = {stage.kind: stage for stage in planner.plan([planner.manifest.row(2)])}
    tuned = stages["experiment"]
    assert "--nodes=4 --ntasks-per-node=8" in stages["pretrain"].shell() and not stages["pretrain"].note
    assert "--nodes=2 --ntasks-per-node=8" in tuned.shell() and tuned.machine.processes == 16
    assert tuned.note == "on 2 x 8 of the 4 x 8 GPUs: its batch of 16 divides among no more"
    manifest = small_manifest()
    planner = Planner(manifest, Choice(OUT, DATA, machine=Machine(gpus=12, launcher="torchrun")))
    with pytest.raises(ManifestError, match="32 images .* 12 processes; .* is 8: --nodes 1 --gpus 8"):
        planner.plan([manifest.row(1)])


@given(nodes=st.integers(1, 8), gpus=st.integers(1, 9), batch=st.integers(1, 70))
def test_the_largest_part_of_a_machine(nodes: int, gpus: int, batch: int) -> None:
    part = Machine(nodes, gpus, "slurm").dividing(batch)
    assert batch % part.processes == 0 and part.nodes <= nodes and part.gpus <= gpus
    better = [n * g for n in range(1, nodes + 1) for g in range(1, gpus + 1) if batch % (n * g) == 0]
    assert part.processes == max(better)
    assert not any(
        n < part.nodes and n * g == part.processes for n in range(1, nodes) for g in range(1, gpus + 1)
    )


def test_what_cannot_accumulate_says_so() -> None:
    manifest = small_manifest()
    run = replace(manifest.experiments["upernet"], batch=16)
    manifest.experiments["upernet"] = run
    family = replace(manifest.families["upernet"], batch_keys={"train_dataloader.batch_size": "{local}"})
    manifest.families["upernet"] = family
    one = Planner(manifest, Choice(OUT, DATA, machine=Machine()))
    assert one.plan([manifest.row(4)])[-1].overrides["train_dataloader.batch_size"] == 16
    small = Planner(manifest, Choice(OUT, DATA, machine=Machine(images_per_gpu=4)))
    with pytest.raises(ManifestError, match="upernet cannot accumulate: 16 images"):
        small.plan([manifest.row(4)])


def test_a_public_model_is_evaluated_on_any_number_of_gpus() -> None:
    (stage,) = plan(8, machine=Machine(gpus=3, launcher="torchrun"))
    assert "SOLVER.ACCUMULATION" not in stage.shell()


def test_small_scales_run_as_one_process() -> None:
    with pytest.raises(ManifestError, match="--scale smoke runs as one process"):
        plan(2, scale="smoke", machine=Machine(gpus=2, launcher="torchrun"))


def test_costs_are_measured() -> None:
    (stage,) = plan(9)
    assert stage.shell().startswith("python benchmarks/cost.py detectron2/mask_jepa/R50_in1k.yaml --out ")
    small = plan(9, scale="smoke")[-1].shell()
    assert "detectron2/quick/mask_jepa.yaml --scale quick --out /out/smoke/costs/row_9/costs.json" in small


def test_runs_that_wait_are_left_out_by_name() -> None:
    manifest = small_manifest()
    manifest.experiments["base"] = replace(manifest.experiments["base"], waits_for="rain")
    planner = Planner(manifest, Choice(OUT, DATA))
    assert "experiment/base/seed_0" not in [stage.name for stage in planner.plan([manifest.row(2)])]
    assert planner.left_out == {"base": "waits for rain"}


def test_the_projects_own_plans_keep_every_recipes_batch() -> None:
    """On 1, 8 and 16 GPUs, whatever can run: images of a process x processes x accumulation."""
    manifest = load_manifest()
    ready = [row for row in manifest.rows.values() if row.kind == "run" and not row.waits_for]
    for nodes, gpus in ((1, 1), (1, 8), (2, 8)):
        launcher = "torchrun" if gpus > 1 else "plain"
        planner = Planner(manifest, Choice(OUT, DATA, machine=Machine(nodes, gpus, launcher)))
        for stage in planner.plan(ready):
            if stage.run is None or stage.run.finished:
                continue
            local = stage.overrides.get("train_dataloader.batch_size")
            parts = stage.overrides.get("optim_wrapper.accumulative_counts", 1)
            assert stage.run.batch, stage.name
            if stage.run.toolkit == "mmengine":
                assert local * parts * nodes * gpus == stage.run.batch, stage.name
            else:
                assert stage.run.batch % (stage.overrides["SOLVER.ACCUMULATION"] * nodes * gpus) == 0, (
                    stage.name
                )
    paper = Planner(manifest, Choice(OUT, DATA, machine=Machine(1, 8, "torchrun")))
    (stage,) = [s for s in paper.plan([manifest.row(70)]) if s.kind == "pretrain"]
    assert stage.overrides["train_dataloader.batch_size"] == 256
    assert stage.overrides["optim_wrapper.accumulative_counts"] == 1
