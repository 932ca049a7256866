"""benchmarks/cost.py: counts, lengths and batches of configurations, steps that really train, what the file holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cost  # noqa: E402

MASK_JEPA, LAZY = "detectron2/quick/mask_jepa.yaml", "detectron2/lazy/quick/mask_jepa.py"
DMT, IJEPA = "mmseg/quick/dmt_jepa.py", "mmseg/quick/ijepa.py"
UPERNET, MASK_RCNN, SEMANTIC = (
    "mmseg/quick/upernet.py",
    "detectron2/quick/mask_rcnn.yaml",
    "detectron2/quick/semantic.yaml",
)
WIDTHS = (32, 48, 192, 96)  # of test_resnet
# what makes them small
SMALL = {
    MASK_JEPA: [
        "MODEL.TIMM.NAME=test_resnet",
        "INPUT.PRETRAIN_CROP_SIZE=(64,64)",
        "MODEL.MASK_JEPA.MASK.PATCH=2",
    ],
    SEMANTIC: ["MODEL.TIMM.NAME=test_resnet", "INPUT.CROP.SIZE=(64,64)", "INPUT.SIZE_DIVISIBILITY=64"],
    LAZY: [
        "model.backbone.name=test_resnet",
        *(
            f"model.sem_seg_head.input_shape.res{i}={width}"
            for i, width in zip((2, 3, 4, 5), WIDTHS, strict=True)
        ),
    ],
    MASK_RCNN: [
        "MODEL.VIT.DEPTH=2",
        "MODEL.VIT.WINDOW_BLOCK_INDEXES=[0]",
        "MODEL.VIT.EMBED_DIM=48",
        "INPUT.IMAGE_SIZE=64",
        "MODEL.VIT.SQUARE_PAD=64",
    ],
    DMT: ["model.arch.width=24", "model.arch.depth=1", "model.arch.heads=2", "train_dataloader.batch_size=4"],
    UPERNET: ["model.backbone.arch.width=24", "model.backbone.arch.heads=2", "model.neck.embed_dim=24"]
    + ["model.decode_head.in_channels=[24,24,24,24]", "model.auxiliary_head.in_channels=24"],
}


def need(config: str) -> None:
    pytest.importorskip("detectron2" if config.startswith("detectron2") else "mmengine")
    if "upernet" in config:
        pytest.importorskip("mmseg")


def arm_of(config: str, *overrides: str, gpus: int | None = None) -> Any:
    need(config)
    return cost.open_config(config, overrides, gpus)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cost.py", *map(str, arguments)])
    cost.main()


# --- counts


@pytest.mark.parametrize("config", [MASK_JEPA, LAZY, DMT, IJEPA, UPERNET, MASK_RCNN])
def test_counts_are_those_of_a_real_model(config: str) -> None:
    arm = arm_of(config)
    got = cost.parameters_of(arm)
    model = arm.build("cpu")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    targets = sum(n for name, n in sizes.items() if name.startswith("target_"))
    assert got["parameters"] == sum(sizes.values()) == sum(got["parts"].values())
    assert got["parameters_trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert got["parameters_without_targets"] == got["parameters"] - targets
    assert got["parts"].get("targets", 0) == targets and "other" not in got["parts"]
    assert (targets > 0) == ("jepa.py" in config or "mask_jepa" in config)


def test_parts_of_mask_jepa() -> None:
    """With the class layer and position queries that pre-training leaves alone; see SPEC of the published model."""
    need(MASK_JEPA)
    one, pre = (
        cost.parameters_of(arm_of(f"detectron2/{name}.yaml"))["parts"]
        for name in ("mask2former/ade20k/semantic_R50", "mask_jepa/R50_in1k")
    )
    assert sum(one.values()) == 43_988_247
    assert pre["backbone"] == one["backbone"]
    assert pre["pixel_decoder"] == one["pixel_decoder"] == pre["targets"]
    assert 0 < pre["pretraining_only"] < 3.1e6


# --- lengths and batches


@pytest.mark.parametrize(
    ("config", "steps", "batch", "devices", "images", "size"),
    [
        ("detectron2/mask_jepa/R50_in1k.yaml", 187500, 32, 8, 4, (512, 512)),
        ("detectron2/lazy/mask_jepa_R50_in1k.py", 187500, 32, 8, 4, (512, 512)),
        ("detectron2/mask2former/ade20k/semantic_R50.yaml", 160000, 16, 8, 2, (512, 512)),
        ("detectron2/mask2former/coco/panoptic_R50.yaml", 368750, 16, 8, 2, (1024, 1024)),
        ("detectron2/mask2former/cityscapes/semantic_R50.yaml", 90000, 16, 8, 2, (512, 1024)),
        ("detectron2/mask_rcnn/vitb_100ep.yaml", 184375, 64, 8, 8, (1024, 1024)),
        ("detectron2/lazy/mask_rcnn_vitb_100ep.py", 184375, 64, 8, 8, (1024, 1024)),
        (MASK_JEPA, 400, 8, 1, 8, (128, 128)),
        ("mmseg/dmt_jepa/vit_base16.py", 375600, 2048, 8, 256, (224, 224)),
        ("mmseg/ijepa/vit_base16.py", 375600, 2048, 8, 256, (224, 224)),
        ("mmseg/dmt_jepa/vit_huge14.py", 187800, 2048, 16, 128, (224, 224)),
        ("mmseg/dmt_jepa/vit_large16_416.py", 375600, 2048, 64, 32, (416, 416)),
        ("mmseg/upernet/vit_base16_ade20k_512x512_160k.py", 160000, 16, 8, 2, (512, 512)),
        (DMT, 600, 32, 1, 32, (80, 80)),
        (UPERNET, 300, 8, 1, 8, (96, 96)),
    ],
)
def test_length_and_batch(config, steps, batch, devices, images, size) -> None:
    arm = arm_of(config)
    got = arm.recipe
    assert (got.steps, got.batch, got.devices, got.images) == (steps, batch, devices, images)
    assert arm.size == size


def test_other_numbers_of_gpus_and_accumulation() -> None:
    got = arm_of("mmseg/dmt_jepa/vit_base16.py", "optim_wrapper.accumulative_counts=2", gpus=4).recipe
    assert (got.images, got.accumulation, got.devices, got.batch) == (256, 2, 4, 2048)
    got = arm_of("detectron2/mask_jepa/R50_in1k.yaml", "SOLVER.ACCUMULATION=4", gpus=2).recipe
    assert (got.images, got.accumulation, got.devices, got.batch) == (4, 4, 2, 32)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 32, which 3 devices"):
        arm_of("detectron2/mask_jepa/R50_in1k.yaml", gpus=3)


def test_what_a_configuration_does_not_say(tmp_path: Path) -> None:
    """Its model is counted all the same."""
    need(IJEPA)
    text = (cost.ROOT / "configs" / IJEPA).read_text().replace("./", f"{cost.ROOT}/configs/mmseg/quick/")
    (tmp_path / "epochs.py").write_text(f"{text}\ntrain_cfg = dict(steps=None, epochs=3)\n")
    arm = arm_of(str(tmp_path / "epochs.py"))
    assert arm.recipe.steps is None and cost.parameters_of(arm)["parameters"] > 0
    arm.size = None
    with pytest.raises(ValueError, match="neither model.img_size nor crop_size"):
        arm.stepper("cpu", 2)()


# --- steps


@pytest.mark.parametrize("config", [MASK_JEPA, SEMANTIC, MASK_RCNN, LAZY, DMT, UPERNET])
def test_a_step_trains(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights move, and targets once a step, however many forwards it accumulates."""
    more = {MASK_JEPA: ["SOLVER.ACCUMULATION=2"], DMT: ["optim_wrapper.accumulative_counts=2"]}
    arm = arm_of(config, *SMALL[config], *more.get(config, ()))
    assert arm.recipe.accumulation == (2 if config in more else 1)
    models: list[torch.nn.Module] = []
    build, forwards = arm.build, []

    def kept(device: str) -> torch.nn.Module:
        models.append(build(device))
        models[0].register_forward_hook(lambda *_: forwards.append(1))
        return models[0]

    monkeypatch.setattr(arm, "build", kept)
    torch.manual_seed(0)
    step = arm.stepper("cpu", 2)
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    for _ in range(2):
        step()
    assert len(forwards) == 2 * arm.recipe.accumulation
    moved = {name for name, p in models[0].named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
    assert len(moved & trained) > len(trained) / 2
    targets = {name for name in before if name.startswith("target_")}
    assert moved - trained <= targets and bool(moved & targets) == bool(targets)
    if targets:
        assert int(models[0].step) == 2


def test_arms_take_turns_and_the_first_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    now = [0.0]

    def action(name: str, took: float) -> Any:
        def step() -> None:
            calls.append(name)
            now[0] += took * (100 if len(calls) <= 2 * cost.WARM_UP else 1)

        return step

    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    times = cost.alternate([action("a", 2.0), action("b", 1.0)], 3)
    assert calls == ["a", "b"] * (3 + cost.WARM_UP)
    assert times == [[2.0] * 3, [1.0] * 3]
    assert cost.quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert cost.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


# --- the command


def test_a_measurement_beside_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(DMT)
    asked = []
    monkeypatch.setattr(
        cost, "peak_memory_apart", lambda config, args, images: asked.append((config, images)) or cost.GIB
    )
    overrides = SMALL[DMT][:3]
    out = tmp_path / "costs.json"
    run(monkeypatch, DMT, "--reference", IJEPA, "--batch", 8, "--steps", 3, "--out", out, *overrides)
    content = json.loads(out.read_text())
    assert content["schema"] == 1 and content["threads"] >= 1 and content["versions"]["torch"]
    assert content["hardware"]["cores"] >= 1 and content["commit"]
    one, reference = content["runs"]
    assert asked == [(DMT, 8), (IJEPA, 8)]
    assert (one["config"], reference["config"], one["reference"]) == (DMT, IJEPA, IJEPA)
    for entry in (one, reference):
        assert (entry["device"], entry["precision"], entry["scale"]) == (
            "cuda" if torch.cuda.is_available() else "cpu",
            "float32",
            "full",
        )
        assert (entry["measured_images"], entry["measured_steps"], entry["peak_memory_gib"]) == (8, 3, 1.0)
        seconds = entry["seconds_per_step"]
        assert 0 < entry["seconds_per_step_low"] <= seconds <= entry["seconds_per_step_high"]
        assert entry["images_per_second"] == pytest.approx(8 / seconds)
        hours = entry.get("gpu_hours", entry.get("cpu_hours"))
        assert entry["hours_scaled"] == 4  # 32 images in the recipe
        assert hours == pytest.approx(4 * seconds * 600 / 3600)
    assert one["ratio_low"] <= one["ratio_to_reference"] <= one["ratio_high"]
    assert one["parameters"] > reference["parameters"] and "ratio_to_reference" not in reference


def test_quick_measures_little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    need(MASK_JEPA)
    monkeypatch.setattr(cost, "peak_memory_apart", lambda *_: cost.GIB)
    out = tmp_path / "costs.json"
    run(monkeypatch, MASK_JEPA, "--scale", "quick", "--out", out, *SMALL[MASK_JEPA])
    (entry,) = json.loads(out.read_text())["runs"]
    assert (entry["scale"], entry["measured_images"], entry["measured_steps"]) == ("quick", 2, 2)
    assert entry["image_size"] == [64, 64]
    assert "2 images of 64 x 64, float32" in capsys.readouterr().out


def test_memory_is_of_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least weights, gradients and AdamW's two averages; hardly more than the activations of two small images."""
    need(DMT)
    if not Path("/proc/self/status").is_file():
        pytest.skip("resident memory is read from /proc")
    monkeypatch.setattr(sys, "argv", ["cost.py", DMT, "--device", "cpu"])
    got = cost.peak_memory_apart(DMT, cost.parsed(), 2)
    counts = cost.parameters_of(arm_of(DMT))
    assert 4 * (counts["parameters"] + 3 * counts["parameters_trained"]) < got < cost.GIB


def test_counting_goes_on_after_a_configuration_that_does_not_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    need(DMT)
    text = (cost.ROOT / "configs" / DMT).read_text().replace("./", f"{cost.ROOT}/configs/mmseg/quick/")
    (tmp_path / "wrong.py").write_text(f'{text}\nmodel = dict(arch="giant")\n')
    arguments = [tmp_path / "wrong.py", "nowhere.yaml", IJEPA, "--parameters-only"]
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments, "--keep-going", "--out", tmp_path / "costs.json")
    assert stopped.value.code == 1
    wrong, nowhere, fine = json.loads((tmp_path / "costs.json").read_text())["runs"]
    assert "model.arch is one of" in wrong["error"] and "No config 'nowhere.yaml'" in nowhere["error"]
    assert set(wrong) == {"config", "error"} and wrong["config"] == str(tmp_path / "wrong.py")
    assert fine["config"] == IJEPA and fine["parameters"] > 0 and "seconds_per_step" not in fine
    with pytest.raises(SystemExit, match="error: No config 'nowhere.yaml'"):
        run(monkeypatch, "nowhere.yaml")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--steps", 0, IJEPA)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "model.arch=base")
