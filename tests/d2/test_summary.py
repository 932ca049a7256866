"""The start-up summary says what runs."""

from __future__ import annotations

import logging
import re

import pytest
import torch

pytest.importorskip("detectron2")

from tiny import save_pictures, save_segmentation, tiny_config, tiny_model, train  # noqa: E402

from jepa_plugins.core import deformable_attention  # noqa: E402
from jepa_plugins.d2.summary import attention_line, parameter_rows, summary  # noqa: E402


def lines_of(text: str) -> dict[str, str]:
    """The block's rows by name."""
    first, *rows = text.splitlines()
    assert first == "start-up summary"
    return dict(re.match(r"  (\S.*?)\s{2,}(\S.*)", row).groups() for row in rows)


def block(changes: dict | None = None, name: str = "mask_jepa", **given) -> dict[str, str]:
    cfg, model = tiny_config(name, changes), tiny_model(changes, name=name)
    return lines_of(summary(cfg, model, **{"images": 30, "dtype": None, "processes": 1, **given}))


def test_pre_training_is_described() -> None:
    rows = block({"SOLVER.MAX_ITER": 60, "SOLVER.IMS_PER_BATCH": 12, "SOLVER.ACCUMULATION": 3}, processes=2)
    assert rows["method"] == (
        "Mask-JEPA: 1 x reconstruction at stride 8 (masked_queries, 0.5 hidden in tiles of 2x2 cells, M 1) + "
        "1 x denoising (predicts the noise), noise of sigma 0.4"
    )
    assert rows["backbone"] == "timm test_resnet, frozen; initial weights: random"
    assert rows["data"] == "30 images, 2.5 steps an epoch; 60 steps are 24.00 epochs"
    assert rows["effective batch"] == "12 = 2 images x 2 processes x 3 accumulated"
    assert rows["precision"] == "float32" and rows["device"].startswith("2 x cpu")


def test_what_is_off_is_not_described_and_what_is_unknown_is_said() -> None:
    rows = block({"MODEL.MASK_JEPA.LOSS.RECON_WEIGHT": 0.0}, images=None, dtype=torch.bfloat16)
    assert rows["method"] == "Mask-JEPA: 1 x denoising (predicts the noise), noise of sigma 0.4"
    assert rows["data"] == "6 steps of 2 images; the number of images is not known"
    assert rows["precision"] == "mixed, bfloat16"


def test_fine_tuning_is_described() -> None:
    rows = block(name="panoptic")
    assert rows["method"].startswith("MaskFormer, supervised, 12 classes, predicts ")
    assert "panoptic" in rows["method"]
    assert not any("EMA" in name or "pre-training only" in name for name in rows)


@pytest.mark.parametrize("name", ["mask_jepa", "semantic"])
def test_the_parts_hold_every_parameter_once(name) -> None:
    model = tiny_model(name=name)
    *parts, total = parameter_rows(model)
    assert total == (
        "total",
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    assert sum(row[1] for row in parts) == total[1] and sum(row[2] for row in parts) == total[2]
    by_name = {part: (count, trained) for part, count, trained in parts}
    decoder = list(model.sem_seg_head.pixel_decoder.parameters())
    assert by_name["pixel decoder"] == (sum(p.numel() for p in decoder),) * 2
    assert by_name["backbone"][0] > by_name["backbone"][1] == 0
    if name == "mask_jepa":
        count = sum(p.numel() for p in model.jepa.parameters())
        assert by_name["pre-training only"] == (count, count)
        assert by_name["EMA copies"] == (by_name["pixel decoder"][0], 0)
        assert by_name["transformer decoder"][1] < by_name["transformer decoder"][0]  # no class head


def test_the_rest_of_another_model_goes_by_its_own_names() -> None:
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 3), "roi_heads": torch.nn.Linear(1, 1)})
    assert parameter_rows(model) == [("backbone", 9, 9), ("roi_heads", 2, 2), ("total", 11, 11)]


def test_kernels_are_named(monkeypatch) -> None:
    assert attention_line(torch.device("cpu"), None).startswith("explicit softmax up to 9,216 scores")
    assert attention_line(torch.device("cuda"), torch.float16) == "torch's fused kernel"
    for backend, words in (
        ("pytorch", "PyTorch version"),
        ("operator", "the operator of torch_ms_deform_attn"),
    ):
        monkeypatch.setattr(deformable_attention, "_backend", backend)
        assert block()["deformable attention"] == words


def test_a_run_begins_with_one_block(tmp_path, caplog) -> None:
    images, out = save_pictures(tmp_path / "images", 5), tmp_path / "run"
    out.mkdir()
    common = {"OUTPUT_DIR": str(out), "SOLVER.MAX_ITER": 1}
    with caplog.at_level(logging.INFO):
        train(tiny_config("mask_jepa", {**common, "DATASETS.UNLABELLED": (images,)}))
    texts = [record.getMessage() for record in caplog.records if "start-up summary" in record.getMessage()]
    assert len(texts) == 1 and lines_of(texts[0])["data"].startswith("5 images, 2.5 steps an epoch")
    order = [record.getMessage() for record in caplog.records]
    assert order.index(texts[0]) < next(i for i, m in enumerate(order) if "total_loss" in m)

    caplog.clear()
    root = save_segmentation(tmp_path / "data", count=4)
    labelled = {"DATASETS.TRAIN": (f"folder_semantic@{root}@training",), "DATASETS.TEST": ()}
    with caplog.at_level(logging.INFO):
        train(tiny_config("semantic", {**common, **labelled}))
    assert "4 images, 2.0 steps an epoch; 1 steps are 0.50 epochs" in caplog.text
