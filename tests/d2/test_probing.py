"""Probes of a data set: which cells, which scores, and a training that does not notice them."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from PIL import Image  # noqa: E402
from tiny import save_pictures, save_segmentation, tiny_config, tiny_model, train  # noqa: E402

from jepa_plugins.core.probing import table, undisturbed  # noqa: E402
from jepa_plugins.d2.engine import Trainer  # noqa: E402
from jepa_plugins.d2.hooks import ProbeHook  # noqa: E402
from jepa_plugins.d2.probing import (  # noqa: E402
    ProbeSettings,
    labelled_cells,
    labelled_records,
    probe_floors,
    probe_model,
)

CLASSES = 3


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    """Pictures whose label is written in their colour, with a border that is ignored."""
    root = Path(tmp_path_factory.mktemp("labelled"))
    rng = np.random.default_rng(3)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(6):
            labels = rng.integers(0, CLASSES, (4, 6)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
            colours = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250]], np.uint8)[labels]
            Image.fromarray(colours).save(root / "images" / split / f"{i}.png")
            labels[:16] = 255
            Image.fromarray(labels).save(root / "annotations" / split / f"{i}.png")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return str(root)


def settings_for(root: str, **changes) -> ProbeSettings:
    values = {
        "train": f"folder_semantic@{root}@training",
        "val": f"folder_semantic@{root}@validation",
        "size": (64, 96),
        **changes,
    }
    return ProbeSettings(**values)


# --- cells and scores


def test_cells_carry_the_labels_of_their_places(labelled) -> None:
    settings = settings_for(labelled)
    means = lambda inputs: {  # noqa: E731
        "colour": torch.nn.functional.avg_pool2d(torch.stack([i["image"] for i in inputs]).float(), 8)
    }
    cells = labelled_cells(means, settings.train, settings)["colour"]
    assert cells.features.shape == (6 * 6 * 12, 3) and cells.labels.shape == (6 * 6 * 12,)
    assert torch.equal(cells.features.argmax(1), cells.labels)


def test_fewer_cells_and_images_are_spread_evenly(labelled) -> None:
    seen = []

    def describe(inputs):
        seen.extend(item["file_name"] for item in inputs)
        place = torch.arange(float(len(inputs)))[:, None, None, None].expand(-1, 1, 8, 12)
        return {"image": place}

    settings = settings_for(labelled, cells=9, images=3)
    cells = labelled_cells(describe, settings.train, settings)["image"]
    assert [Path(name).stem for name in seen] == ["0", "2", "5"]
    assert len(cells.labels) == 9
    assert torch.bincount(cells.features.flatten().long()).tolist() == [3, 3, 3]


def test_the_channels_come_in_the_models_order(labelled) -> None:
    settings = settings_for(labelled, image_format="BGR")
    first = lambda inputs: {"x": torch.stack([i["image"] for i in inputs])[:, :, ::8, ::8].float()}  # noqa: E731
    cells = labelled_cells(first, settings.val, settings)["x"]
    assert torch.equal(2 - cells.features.argmax(1), cells.labels)


def test_floors_tell_colour_from_position(labelled) -> None:
    floors = probe_floors(settings_for(labelled))
    assert set(floors) == {"position", "colour_position"}
    assert floors["colour_position"]["linear_mIoU"] > 95
    assert floors["position"]["linear_accuracy"] < 60


def test_a_models_rows_have_the_names_of_its_maps_and_copies(labelled) -> None:
    model = tiny_model().eval()
    with torch.no_grad():  # nothing can be read from the EMA copy
        for parameter in model.target_pixel_decoder.parameters():
            parameter.zero_()
    settings = settings_for(
        labelled, features=("stride8", "stride4"), copies=("online", "ema"), kinds=("knn",)
    )
    rows = probe_model(model, settings)
    assert list(rows) == ["stride8", "stride4", "stride8_ema", "stride4_ema"]
    assert all(set(values) == {"knn_mIoU", "knn_accuracy"} for values in rows.values())
    assert rows["stride8"]["knn_mIoU"] > 90 and rows["stride8_ema"]["knn_mIoU"] < 40
    assert rows == probe_model(model, settings)  # nothing is random
    lines = table(rows).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train": ""}, "name a semantic data set to fit it on .TEST.PROBE.TRAIN."),
        ({"size": (64, 100)}, "give two multiples of 32"),
        ({"size": (64,)}, "give two multiples of 32"),
        ({"cells": 0}, "at least one cell"),
        ({"features": ("stride2",)}, "TEST.PROBE.FEATURES is .*give some of stride8, stride4"),
        ({"copies": ()}, "TEST.PROBE.WHICH is .*give some of online, ema"),
        ({"kinds": ("svm",)}, "TEST.PROBE.KINDS is .*give some of linear, knn, kmeans"),
    ],
)
def test_settings_that_make_no_sense(labelled, changes, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        settings_for(labelled, **changes)


def test_data_that_cannot_be_probed(labelled, tmp_path) -> None:
    other = save_segmentation(tmp_path / "other", classes=5)
    with pytest.raises(ValueError, match="has 3 classes and .* 5: probe on two sets of the same classes"):
        probe_floors(settings_for(labelled, val=f"folder_semantic@{other}@validation"))
    (tmp_path / "other" / "classes.txt").write_text("a\nb\nc\n")
    wrong = settings_for(labelled, val=f"folder_semantic@{tmp_path}/./other@validation")
    with pytest.raises(ValueError, match="hold the value 4, but it has 3 classes and ignores 255"):
        probe_floors(wrong)
    with pytest.raises(ValueError, match="no label image for each of its pictures"):
        from detectron2.data import DatasetCatalog

        DatasetCatalog.register("unlabelled_probe", lambda: [{"file_name": "a.png"}])
        labelled_records("unlabelled_probe")


def test_a_model_that_pads_is_refused(labelled) -> None:
    model = tiny_model().eval()
    model.size_divisibility = 64
    with pytest.raises(ValueError, match="multiples of 64: give such multiples"):
        probe_model(model, settings_for(labelled))


# --- while it trains


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture()
def config(images, labelled, tmp_path):
    def make(folder: str, **probe):
        (tmp_path / folder).mkdir(exist_ok=True)
        changes = {"DATASETS.UNLABELLED": (images,), "OUTPUT_DIR": str(tmp_path / folder)}
        if probe:
            changes |= {
                "TEST.PROBE.TRAIN": f"folder_semantic@{labelled}@training",
                "TEST.PROBE.VAL": f"folder_semantic@{labelled}@validation",
                "TEST.PROBE.SIZE": (64, 96),
                "TEST.PROBE.CELLS": 60,
                "VIS_PERIOD": 2,
                **{f"TEST.PROBE.{key}": value for key, value in probe.items()},
            }
        return tiny_config("mask_jepa", changes)

    return make


def scores_at(trainer, name: str) -> dict[int, float]:
    return {step: value for value, step in trainer.storage.history(name).values()}


def assert_equal_runs(one, other) -> None:
    theirs = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    losses = [{s: v for v, s in run.storage.history("total_loss").values()} for run in (one, other)]
    assert losses[0] == losses[1]


def test_training_does_not_notice_probes_and_pictures(config, caplog) -> None:
    plain = train(config("plain"))
    with caplog.at_level(logging.INFO):
        probed = train(config("probed", PERIOD=2, WHICH=("online", "ema")))
    assert_equal_runs(probed, plain)
    assert [m.training for m in probed.model.modules()] == [m.training for m in plain.model.modules()]

    names = {n for n in probed.storage.histories() if n.startswith("probe/")}
    rows = ("", "_stride4", "_stride8_ema", "_stride4_ema", "_position", "_colour_position")
    rows += ("_stride8_initial", "_stride4_initial")
    kinds = [f"{kind}_{score}" for kind in ("linear", "knn", "kmeans") for score in ("mIoU", "accuracy")]
    assert names == {f"probe/{kind}{row}" for kind in kinds for row in rows}
    scores = scores_at(probed, "probe/linear_mIoU")
    assert list(scores) == [0, 1, 3, 5]  # before the first step, and after steps 2, 4 and 6
    assert scores[0] == scores_at(probed, "probe/linear_mIoU_stride8_initial")[5]
    assert scores_at(probed, "probe/linear_mIoU_colour_position")[5] > 90
    assert "probes at iteration 5" in caplog.text and "colour_position" in caplog.text


def test_a_resumed_run_keeps_its_floors_and_its_course(config) -> None:
    plain = train(config("plain"))
    cfg = config("probed", PERIOD=2, KINDS=("knn",))
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    stopped = train(cfg, stop_after=3)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 3
    theirs = plain.model.state_dict()
    assert all(torch.equal(v, theirs[n]) for n, v in resumed.model.state_dict().items())
    first = scores_at(stopped, "probe/knn_mIoU")[0]
    assert set(scores_at(resumed, "probe/knn_mIoU_stride8_initial").values()) == {first}
    assert list(scores_at(resumed, "probe/knn_mIoU")) == [3, 5]  # after steps 4 and 6


def test_a_run_that_began_without_probes_says_that_its_start_is_unknown(config, caplog) -> None:
    train(config("run"), stop_after=3)
    cfg = config("run")
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    train(cfg, stop_after=3)
    with caplog.at_level(logging.WARNING):
        resumed = train(config("run", PERIOD=3, KINDS=("knn",)), resume=True)
    assert "scores of its initial model are not known" in caplog.text
    names = set(resumed.storage.histories())
    assert "probe/knn_mIoU_position" in names and "probe/knn_mIoU_stride8_initial" not in names


def test_undisturbed_restores_modes_and_generators() -> None:
    model = tiny_model().train()
    model.sem_seg_head.pixel_decoder.eval()  # a mode that train() would not give
    modes = [m.training for m in model.modules()]
    states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), undisturbed(model):
        assert not model.training and not torch.is_grad_enabled()
        np.random.rand(), random.random(), torch.rand(3)
        raise RuntimeError("stop")
    assert [m.training for m in model.modules()] == modes
    assert (np.random.get_state()[1] == states[0]).all() and random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2]) and torch.is_grad_enabled()


def test_probes_are_off_by_default_and_refused_where_they_cannot_be(config, labelled) -> None:
    assert not any(isinstance(hook, ProbeHook) for hook in Trainer(config("plain"))._hooks)
    with pytest.raises(ValueError, match="TEST.PROBE.TRAIN"):
        Trainer(config("other", PERIOD=5, TRAIN=""))
    with pytest.raises(FileNotFoundError, match="the image folder"):
        Trainer(config("other", PERIOD=5, VAL=f"folder_semantic@{labelled}@test"))
