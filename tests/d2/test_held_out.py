"""Held-out images: always the same crops, shared between processes, measured as numpy measures them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.utils import comm  # noqa: E402
from tiny import save_pictures, tiny_config, tiny_model  # noqa: E402

from jepa_plugins.core.images import ImageError  # noqa: E402
from jepa_plugins.d2 import held_out as held_out_module  # noqa: E402
from jepa_plugins.d2.engine import Trainer  # noqa: E402
from jepa_plugins.d2.held_out import (  # noqa: E402
    HeldOutEvaluator,
    HeldOutImages,
    build_held_out_loader,
    centred_box,
)


@pytest.fixture()
def cfg(tmp_path):
    return tiny_config("mask_jepa", {"DATASETS.UNLABELLED_TEST": (save_pictures(tmp_path / "held_out", 7),)})


@given(*[st.integers(1, 500)] * 2, *[st.integers(32, 256)] * 2)
def test_the_box_is_centred_inside_and_as_large_as_its_shape_allows(
    height, width, crop_height, crop_width
) -> None:
    top, left, box_height, box_width = centred_box(height, width, (crop_height, crop_width))
    assert 0 <= top and top + box_height <= height and 0 <= left and left + box_width <= width
    assert abs((height - box_height) - 2 * top) <= 1 and abs((width - box_width) - 2 * left) <= 1
    assert box_height == height or box_width == width
    scale = min(height / crop_height, width / crop_width)
    assert abs(box_height - crop_height * scale) <= 1 and abs(box_width - crop_width * scale) <= 1


def test_crops_are_always_the_same(cfg) -> None:
    images = HeldOutImages(cfg)
    assert len(images) == 7
    for i in range(7):
        one, other = images[i], images[i]
        assert torch.equal(one["image"], other["image"]) and one["sample_index"] == i
        assert one["image"].shape == (3, 64, 64) and one["image"].dtype == torch.uint8
    # an 80 x 96 picture and a square crop: 80 x 80 from column 8
    pixels = np.asarray(
        Image.open(images.files[0]).crop((8, 0, 88, 80)).resize((64, 64), Image.Resampling.BICUBIC)
    )
    difference = np.abs(pixels.astype(int) - images[0]["image"].permute(1, 2, 0).numpy().astype(int))
    assert difference.mean() < 3


def test_an_unreadable_file_is_an_error(cfg, tmp_path) -> None:
    (tmp_path / "held_out" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="0.png"):
        HeldOutImages(cfg)[0]


def test_processes_share_the_images(cfg, monkeypatch) -> None:
    seen = []
    for rank in range(2):
        monkeypatch.setattr(held_out_module.comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(held_out_module.comm, "get_world_size", lambda: 2)
        batches = list(build_held_out_loader(cfg))
        assert all(len(batch) == 1 for batch in batches)  # a batch of 2 over two processes
        seen.append([item["sample_index"] for batch in batches for item in batch])
    assert seen == [[0, 2, 4, 6], [1, 3, 5]]


def test_numbers_of_a_model_against_numpy(cfg) -> None:
    model = tiny_model().eval()
    got = Trainer.test(cfg, model)["held_out"]
    with torch.no_grad():
        maps = [model(batch)[0] for batch in build_held_out_loader(cfg)]
    target = np.concatenate([m["target"].numpy().astype(np.float64) for m in maps])
    assert target.shape == (7, 64, 32)
    errors = sum(float(m["errors"].double().sum()) for m in maps)
    error = errors / (sum(int(m["hidden_count"]) for m in maps) * 32)
    overall, at_cell = target.var(axis=(0, 1)).mean(), target.var(axis=0).mean()
    assert got["target_variance"] == pytest.approx(overall, rel=1e-4)
    assert got["explained_variance"] == pytest.approx(1 - error / overall, rel=1e-4)
    assert got["explained_variance_beyond_position"] == pytest.approx(1 - error / at_cell, rel=1e-4)
    assert got["position_explained_variance"] == pytest.approx(1 - at_cell / overall, rel=1e-3)
    assert got["denoise_r2"] < 1
    assert Trainer.test(cfg, model)["held_out"] == got  # nothing random, nothing learnt


@pytest.mark.parametrize(("off", "left"), [("RECON", "denoise_r2"), ("DENOISE", "explained_variance")])
def test_one_loss_alone_is_measured_alone(cfg, off, left) -> None:
    model = tiny_model({f"MODEL.MASK_JEPA.LOSS.{off}_WEIGHT": 0.0}).eval()
    result = Trainer.test(cfg, model)["held_out"]
    assert left in result and ("denoise_r2" in result) == (off == "RECON")


def test_processes_add_up(cfg, monkeypatch) -> None:
    model, batches = tiny_model().eval(), list(build_held_out_loader(cfg))
    evaluators = [HeldOutEvaluator() for _ in range(3)]
    for evaluator in evaluators:
        evaluator.reset()
    with torch.no_grad():
        for i, batch in enumerate(batches):
            outputs = model(batch)
            evaluators[0].process(batch, outputs)
            evaluators[1 + i % 2].process(batch, outputs)
    whole = evaluators[0].evaluate()["held_out"]
    monkeypatch.setattr(comm, "gather", lambda meter: [evaluators[1].meter, evaluators[2].meter])
    assert evaluators[1].evaluate()["held_out"] == pytest.approx(whole, rel=1e-5)
