"""Probes of ViT encoders: the right tokens at the right places, and a training that does not notice them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mm_tiny import logged, tiny_config, train, weights, write_images, write_labelled
from mmengine.config import Config
from vit_files import RECTANGLES, rectangular

import jepa_plugins.mm  # noqa: F401
from jepa_plugins.core.checkpoints import CheckpointError, save_atomic
from jepa_plugins.core.labelled import labelled_images
from jepa_plugins.core.probing import Protocol, labelled_cells, probe_floors
from jepa_plugins.core.vit import resample_positions
from jepa_plugins.core.vit_weights import read_vit
from jepa_plugins.mm.cli import untrained_model
from jepa_plugins.mm.probing import describe_by, image_size, load_encoders, probe_vit

KINDS = ("linear", "knn", "kmeans")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"))


def names(root: Path) -> dict[str, str]:
    return {
        "train": f"folder_semantic@{root}@training",
        "val": f"folder_semantic@{root}@validation",
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 10)


@pytest.fixture(scope="module")
def config(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(source, tmp_path_factory.mktemp("unused"))


# --- data


def test_labelled_images_of_a_folder(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled_images(names(labelled)["train"])
    assert data.classes == 3 and len(data.files) == 4
    assert [Path(part).name for part in data.files[1]] == ["1.png", "1.png"]
    assert [Path(image).stem for image, _ in data.fewer(2).files] == ["0", "3"]
    assert data.fewer(0) == data and data.fewer(9) == data
    monkeypatch.setenv("DETECTRON2_DATASETS", str(labelled.parent))
    monkeypatch.chdir("/")
    assert labelled_images(f"folder_semantic@{labelled.name}@training").files == data.files


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("camvid", "'camvid' is not known here: give folder_semantic@ROOT@SPLIT"),
        ("coco_panoptic@a@b", "is not known here"),
        ("folder_semantic@only", "is not known here"),
        ("folder_semantic@absent@x", "the image folder 'absent/images/x' does not exist"),
    ],
)
def test_data_that_is_not_there(name: str, sentence: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        labelled_images(name)


# --- features


def test_maps_are_the_encoders_tokens_in_raster_order(config: Config) -> None:
    model = untrained_model(config)
    with torch.no_grad():
        model.encoder.norm.bias.add_(1.0)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 24, 40), dtype=np.uint8))
    with torch.no_grad():
        maps = describe_by(model, ("target", "context"))([{"image": image} for image in pixels])
        normal = (pixels.float() - model.data_preprocessor.mean) / model.data_preprocessor.std
        for name, encoder in (("target", model.target_encoder), ("context", model.encoder)):
            tokens = encoder(normal)
            assert maps[name].shape == (2, 24, 6, 10)  # patches of 4 pixels
            torch.testing.assert_close(maps[name][1, :, 2, 7], tokens[1, 27])
    assert not torch.equal(maps["target"], maps["context"])


def test_cells_carry_the_labels_under_their_patches(config: Config, labelled: Path) -> None:
    model = untrained_model(config)
    protocol = Protocol((32, 48))
    data = labelled_images(names(labelled)["train"])

    def describe(inputs: list[dict]) -> dict[str, torch.Tensor]:
        means = torch.nn.functional.avg_pool2d(torch.stack([i["image"] for i in inputs]).float(), 4)
        return {"colour": means, **describe_by(model, ("target",))(inputs)}

    cells = labelled_cells(describe, data, protocol)
    assert torch.equal(cells["colour"].features.argmax(1), cells["colour"].labels)
    assert torch.equal(cells["colour"].labels, cells["target"].labels)
    assert cells["target"].features.shape == (4 * 6 * 12, 24)  # without the ignored rows


def test_an_untrained_vit_reads_colours_and_a_blind_one_does_not(config: Config, labelled: Path) -> None:
    sets = [labelled_images(name) for name in names(labelled).values()]
    model = untrained_model(config, seed=1)
    with torch.no_grad():
        model.encoder.patch_embed.proj.weight.zero_()  # positions are all that is left
    rows = probe_vit(model, *sets, Protocol((32, 48), kinds=("linear",)), ("target", "context"))
    assert rows["target"]["linear_mIoU"] > 90 > 60 > rows["context"]["linear_mIoU"]
    floors = probe_floors(*sets, Protocol((32, 48), kinds=("linear",)), 4)
    assert list(floors) == ["position", "colour_position", "pixels_position"]
    assert floors["pixels_position"]["linear_mIoU"] > 90 > 60 > floors["position"]["linear_mIoU"]


def test_seeds_make_untrained_models(config: Config) -> None:
    first, again, other = (
        untrained_model(config, seed).target_encoder.blocks[0].mlp.fc1.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("size", [(30, 32), (32,), (0, 32)])
def test_sizes_that_the_patch_does_not_divide(config: Config, size: tuple[int, ...]) -> None:
    model = untrained_model(config)
    with pytest.raises(ValueError, match="multiples of the patch's 4 pixels"):
        image_size(model, size)
    assert image_size(model, None) == (32, 32) and image_size(model, [24, 40]) == (24, 40)


# --- checkpoints


def test_encoders_come_from_our_files_and_from_ijepas(config: Config, tmp_path: Path) -> None:
    trained = untrained_model(config, seed=5)
    with torch.no_grad():
        trained.encoder.norm.bias.add_(0.5)
    trained.step.fill_(70)
    save_atomic({"state_dict": trained.state_dict(), "meta": {"iter": 70}}, tmp_path / "ours.pth")
    published = {
        name: {f"module.{key}": value for key, value in getattr(trained, name).state_dict().items()}
        for name in ("encoder", "predictor", "target_encoder")
    }
    torch.save({**published, "epoch": 3}, tmp_path / "ijepa.pth")
    for file, step in (("ours.pth", 70), ("ijepa.pth", None)):
        model = untrained_model(config)
        assert load_encoders(model, str(tmp_path / file), ("target", "context")) == step
        for name in ("target_encoder", "encoder"):
            held = getattr(trained, name).state_dict()
            assert all(torch.equal(v, held[k]) for k, v in getattr(model, name).state_dict().items())


@pytest.mark.parametrize("grid", RECTANGLES)
def test_a_rectangular_grid_of_our_own(config: Config, grid: tuple[int, int], tmp_path: Path) -> None:
    """By the file's configuration, else by the model's size."""
    cfg = copy.deepcopy(config)
    for told in (True, False):
        content, table = rectangular(grid, told)
        torch.save(content, tmp_path / "own.pth")
        for size in [(grid[0] * 4, grid[1] * 4), (64, 64)][: 2 if told else 1]:
            cfg.merge_from_dict({"model.arch.width": 16, "model.img_size": size})
            model = untrained_model(cfg)
            assert load_encoders(model, str(tmp_path / "own.pth"), ("target", "context")) == 1
            want = resample_positions(table, grid, model.encoder.grid)
            assert torch.equal(model.target_encoder.pos_embed, want)
            assert torch.equal(model.encoder.pos_embed, want)


def test_a_checkpoint_of_a_run_tells_its_grid(source: Path, tmp_path: Path) -> None:
    """As mmengine writes the configuration into the file."""
    crop = [{"type": "KeyedResizedCrop", "size": (68, 104)}]
    changes = {"model__img_size": (68, 104), "train_dataloader__dataset__pipeline": crop}
    train(tiny_config(source, tmp_path, **changes, train_cfg__steps=4, train_dataloader__batch_size=2))
    encoder = read_vit(tmp_path / "iter_4.pth")
    assert encoder.shape.grid == (17, 26) and encoder.shape.heads == 2


def test_files_that_lack_the_encoder(config: Config, tmp_path: Path) -> None:
    model = untrained_model(config)
    held = {k: v for k, v in model.state_dict().items() if not k.startswith("target_encoder")}
    save_atomic({"state_dict": held}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match="half.pth holds no 'target_encoder'"):
        load_encoders(model, str(tmp_path / "half.pth"))
    assert load_encoders(model, str(tmp_path / "half.pth"), ("context",)) == 0
    wide = copy.deepcopy(config)
    wide.merge_from_dict({"model.arch.width": 32})
    with pytest.raises(CheckpointError, match="half.pth"):
        load_encoders(untrained_model(wide), str(tmp_path / "half.pth"), ("context",))


# --- while it trains


def with_probes(source: Path, folder: Path, labelled: Path, **options: Any) -> Config:
    cfg = tiny_config(source, folder, resume=options.pop("resume", False))
    cfg.log_level = "INFO"
    cfg.custom_hooks.append(
        {"type": "ViTProbeHook", **names(labelled), "interval": 2, "cells": 60, **options}
    )
    return cfg


def logged_probes(folder: Path) -> dict[int, dict[str, float]]:
    newest = sorted(folder.glob("*/vis_data/scalars.json"))[-1]
    lines = [json.loads(line) for line in newest.read_text().splitlines()]
    return {line["step"]: line for line in lines if "probe/knn_mIoU" in line}


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(tiny_config(source, folder))
    return folder


@pytest.fixture(scope="module")
def probed(source: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    runner = train(with_probes(source, folder, labelled, which=("target", "context"), interval=4))
    assert runner.model.training and not runner.model.target_encoder.training
    return folder


def test_training_does_not_notice_probes(finished: Path, probed: Path) -> None:
    for step in (2, 6):
        plain, other = (weights(folder / f"iter_{step}.pth") for folder in (finished, probed))
        assert plain.keys() == other.keys()
        assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_what_the_hook_logs(probed: Path, labelled: Path, source: Path) -> None:
    found = logged_probes(probed)
    assert list(found) == [0, 4, 6]
    rows = ("", "_context", "_position", "_colour_position", "_pixels_position", "_initial")
    every = {f"probe/{kind}_{score}{row}" for kind in KINDS for score in ("mIoU", "accuracy") for row in rows}
    assert all(set(line) == {"step", *every} for line in found.values())
    first, last = found[0], found[6]
    assert (
        first["probe/linear_mIoU"] == first["probe/linear_mIoU_context"] == last["probe/linear_mIoU_initial"]
    )
    # the very scores of the command
    model = untrained_model(tiny_config(source, probed))
    load_encoders(model, str(probed / "iter_6.pth"), ("target", "context"))
    sets = [labelled_images(name) for name in names(labelled).values()]
    scores = probe_vit(model, *sets, Protocol((32, 32), cells=60), ("target", "context"))
    assert {name: last[f"probe/{name}"] for name in scores["target"]} == scores["target"]
    assert {name: last[f"probe/{name}_context"] for name in scores["context"]} == scores["context"]


def test_a_resumed_run_keeps_its_floors_and_its_course(
    source: Path, finished: Path, probed: Path, labelled: Path, tmp_path: Path
) -> None:
    shutil.copy(probed / "iter_2.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    options = {"which": ("target", "context"), "interval": 4, "resume": True}
    train(with_probes(source, tmp_path, labelled, **options))
    assert logged_probes(tmp_path) == {step: logged_probes(probed)[step] for step in (4, 6)}
    plain, other = weights(finished / "iter_6.pth"), weights(tmp_path / "iter_6.pth")
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_run_that_began_without_probes_says_so(
    source: Path, finished: Path, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "last_checkpoint").write_text(str(finished / "iter_4.pth"))
    cfg = with_probes(source, tmp_path, labelled, kinds=("knn",), resume=True)
    train(cfg)
    (log,) = (path.read_text() for path in tmp_path.glob("*/*.log"))
    assert "initial model's scores are not known" in log
    assert "probes after iteration 6" in log and "pixels_position" in log
    (line,) = logged_probes(tmp_path).values()
    assert "probe/knn_mIoU_position" in line and "probe/knn_mIoU_initial" not in line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"interval": 0}, "interval of at least one step"),
        ({"which": ("ema",)}, "the encoders are target, context, got ema"),
        ({"kinds": ("svm",)}, "the probes are linear, knn, kmeans, got svm"),
        ({"cells": 0}, "at least one cell"),
        ({"size": (30, 32)}, "multiples of the patch's 4 pixels"),
        ({"val": "folder_semantic@absent@x"}, "the image folder 'absent/images/x' does not exist"),
    ],
)
def test_hooks_that_make_no_sense(
    source: Path, labelled: Path, tmp_path: Path, options: dict, sentence: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        train(with_probes(source, tmp_path, labelled, **options))


def test_sets_of_other_classes_are_refused(source: Path, labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled, tmp_path / "other")
    (tmp_path / "other" / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="has 3 classes and .* 2: probe on two sets of the same classes"):
        train(with_probes(source, tmp_path, labelled, val=f"folder_semantic@{tmp_path}/other@validation"))


# --- real images


@pytest.fixture
def camvid(shared: Path) -> Path:
    root = shared / "data" / "camvid"
    if not root.is_dir():
        pytest.skip(f"{root} does not exist")
    return root


def test_camvid_beats_its_position(camvid: Path, config: Config) -> None:
    """An untrained ViT and colours know more than the place alone."""
    sets = [labelled_images(name).fewer(16) for name in names(camvid).values()]
    assert sets[0].classes == 11
    protocol = Protocol((60, 80), kinds=("linear",), cells=2000)
    floors = probe_floors(*sets, protocol, 4)
    rows = {**floors, **probe_vit(untrained_model(config), *sets, protocol)}
    accuracy = {name: row["linear_accuracy"] for name, row in rows.items()}
    assert min(accuracy["target"], accuracy["colour_position"]) > accuracy["position"] > 40


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "lr", "collapses"), [(0.98, 1e-3, True), (0.996, 5e-4, False)])
def test_the_warning_catches_the_negative_control(
    camvid: Path,
    tmp_path: Path,
    momentum: float,
    lr: float,
    collapses: bool,
    capsys: pytest.CaptureFixture,
) -> None:
    """I-JEPA on CamVid whose target is fast and whose learning rate is high: the loss falls with the target."""
    cfg = tiny_config(
        camvid / "images" / "training",
        tmp_path,
        "ijepa",
        model__arch={"width": 48, "depth": 2, "heads": 3},
        model__ema=(momentum, 1.0),
        optim_wrapper__optimizer__lr=lr,
        train_dataloader__batch_size=16,
        train_cfg__steps=400,
        default_hooks__checkpoint__interval=1000,
        default_hooks__checkpoint__save_last=False,
    )
    cfg.param_scheduler[0].warmup_steps = 20
    cfg.custom_hooks.append({"type": "StopAt", "iteration": 200})
    train(cfg)
    loss = logged(tmp_path, "loss")
    assert loss[-1] < loss[0] / 3  # both look fine by it
    assert ("the target is collapsing: target_variance is" in capsys.readouterr().out) == collapses
