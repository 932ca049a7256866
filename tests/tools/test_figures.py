"""Pieces of the figures and of the probe command."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")
TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # probe.py imports its neighbour, as when it is run


def tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures, probe = tool("figures"), tool("probe")


def test_clusters_find_planted_regions_and_order_them_by_size():
    planted = np.repeat([4, 3, 2, 1, 0], [2, 4, 6, 8, 12])[None].repeat(4, 0)  # columns of five regions
    centres = np.random.default_rng(0).normal(size=(5, 16)) * 10
    feature = centres[planted].transpose(2, 0, 1) + np.random.default_rng(1).normal(size=(16, 4, 32)) * 0.01
    assert (figures.clusters(feature) == planted).all()


def test_coloured_gives_black_where_there_is_no_colour():
    picture = figures.coloured(np.array([[0, 1, 255]]), [[1, 2, 3], [4, 5, 6]])
    assert picture.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]


def test_save_grid_writes_a_picture(tmp_path):
    path = tmp_path / "grid.png"
    figures.save_grid([[np.zeros((4, 4, 3), np.uint8)] * 2] * 3, ["a", "b"], str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_labels_are_taken_under_the_cell_centres():
    labels = np.arange(8)[:, None] * 10 + np.arange(8)
    assert probe.at_cell_centres(labels, 2, 4).tolist() == [[21, 23, 25, 27], [61, 63, 65, 67]]
    assert (probe.at_cell_centres(labels, 8, 8) == labels).all()
