"""evaluation.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from jepa_plugins.core.evaluation_file import write_evaluation


def test_what_it_holds(tmp_path: Path) -> None:
    metrics = {"sem_seg/mIoU": np.float64(41.25), "sem_seg/IoU-cow": math.nan, "copypaste": "AP", "time": 1}
    path = write_evaluation(tmp_path / "new", metrics, checkpoint="a.pth", config="b.yaml", images=3)
    assert path == tmp_path / "new" / "evaluation.json"
    assert json.loads(path.read_text(), parse_constant=lambda name: 1 / 0) == {
        "metrics": {"sem_seg/mIoU": 41.25, "time": 1.0},
        "undefined": ["sem_seg/IoU-cow"],
        "checkpoint": "a.pth",
        "config": "b.yaml",
        "images": 3,
    }


def test_a_later_evaluation_takes_its_place(tmp_path: Path) -> None:
    write_evaluation(tmp_path, {"mIoU": 1.0}, checkpoint=None, config=None)
    path = write_evaluation(tmp_path, {"mIoU": 2.0}, checkpoint=None, config=None)
    content = json.loads(path.read_text())
    assert content["metrics"] == {"mIoU": 2.0} and content["images"] is None
    assert list(tmp_path.iterdir()) == [path]
