"""The figures tool, from pieces to whole commands."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2")
sys.path.append(str(Path(__file__).parents[1] / "d2"))

import figures  # noqa: E402
from tiny import BACKBONE, PRETRAIN, SMALL, options, save_pictures, save_segmentation, tiny_model  # noqa: E402

from jepa_plugins.core.checkpoints import save_atomic  # noqa: E402


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["figures.py", *arguments])
    figures.main()


def overrides(*groups: dict) -> list[str]:
    return [str(item) for item in options(SMALL, BACKBONE, *groups)]


def test_save_grid_writes_a_picture(tmp_path) -> None:
    path = tmp_path / "grid.png"
    figures.save_grid([[np.zeros((4, 4, 3), np.uint8)] * 2] * 3, ["a", "b"], str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_kmeans_before_and_after_pre_training(monkeypatch, tmp_path, capsys) -> None:
    images, weights, out = save_pictures(tmp_path / "images", 3), tmp_path / "a.pth", tmp_path / "kmeans.png"
    save_atomic({"model": tiny_model(seed=7).state_dict()}, str(weights))
    grids = []
    plain = figures.save_grid
    monkeypatch.setattr(figures, "save_grid", lambda rows, *rest: grids.append(rows) or plain(rows, *rest))
    files = ["--weights", str(weights), "--images", images, "--count", "2", "--out", str(out)]
    config = ["--config-file", "detectron2/quick/mask_jepa.yaml"]
    run(monkeypatch, "kmeans", *config, *files, "--opts", *overrides(PRETRAIN))
    assert capsys.readouterr().out.strip().endswith(str(out)) and Image.open(out).size[0] > 100
    (rows,) = grids
    assert len(rows) == 2 and all(p.shape == (64, 64, 3) for row in rows for p in row)
    assert not (rows[0][1] == rows[0][2]).all()  # other weights, other clusters


def test_predictions_stand_beside_the_truth(monkeypatch, tmp_path) -> None:
    root, weights, out = (
        save_segmentation(tmp_path / "data"),
        tmp_path / "a.pth",
        tmp_path / "predictions.png",
    )
    save_atomic({"model": tiny_model(name="semantic").state_dict()}, str(weights))
    data = {"DATASETS.TEST": (f"folder_semantic@{root}@validation",)}
    config = ["--config-file", "detectron2/quick/semantic.yaml", "--out", str(out)]
    run(monkeypatch, "predictions", *config, "--weights", f"a={weights}", "--opts", *overrides(data))
    assert Image.open(out).size[0] > 100
