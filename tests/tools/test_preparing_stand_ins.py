"""tools/prepare_data.py stand-ins: published layouts, from which every registered name trains and evaluates."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepare_data
import pytest
from PIL import Image
from preparing import check, stand_ins

pytest.importorskip("pycocotools")
pytest.importorskip("cityscapesscripts")

ROOT = Path(__file__).parents[2]


def make(out: Path, *options: str) -> int:
    return prepare_data.main(["stand-ins", "--out", str(out), "--images", "2", "--size", "64", *options])


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stand_ins") / "datasets"
    assert make(out) == 0
    return out


def test_every_part_of_every_data_set_is_there(data: Path) -> None:
    for item in check.DATA_SETS:
        for part in item.parts:
            assert check.examine(data / item.folder, part).count > 0, (item.name, part.pattern)
    assert not [path for path in data.rglob(".*")]


def test_the_seed_decides_and_a_smaller_set_lies_in_a_larger_one(data: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "same") == make(tmp_path / "other", "--seed", "1") == 0
    assert digests(tmp_path / "same") == digests(data)
    images = {n: d for n, d in digests(data).items() if n.endswith((".jpg", ".JPEG"))}
    other = digests(tmp_path / "other")
    assert images.keys() <= other.keys() and not set(images.values()) & set(other.values())
    assert make(tmp_path / "more", "--images", "3", "--sets", "ade20k", "coco") == 0
    more = digests(tmp_path / "more")
    shared = {
        n: d for n, d in digests(data).items() if n.endswith((".jpg", ".png")) and n[:4] in ("ADEC", "coco")
    }
    assert shared and shared.items() <= more.items()
    assert sorted(path.name for path in (tmp_path / "more").iterdir() if path.is_dir()) == [
        "ADEChallengeData2016",
        "coco",
    ]


def test_real_data_are_never_replaced(data: Path, tmp_path: Path, capsys) -> None:
    before = digests(data)
    assert make(data) == 0 and "already there" in capsys.readouterr().out
    assert make(data, "--images", "3") == 1
    assert "--overwrite" in capsys.readouterr().err and digests(data) == before
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "photo.jpg").write_bytes(b"mine")
    assert make(tmp_path, "--overwrite") == 1
    assert "not generated data" in capsys.readouterr().err and (tmp_path / "coco" / "photo.jpg").exists()


@pytest.mark.parametrize("option", [("--images", "0"), ("--size", "20"), ("--seed", "-1")])
def test_impossible_numbers_are_one_sentence(tmp_path: Path, option: tuple[str, str], capsys) -> None:
    assert make(tmp_path / "x", *option) == 1
    error = capsys.readouterr().err
    assert option[0] in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


def test_outlines_enclose_what_they_outline() -> None:
    mask = np.zeros((12, 12), dtype=bool)
    mask[3:6, 2:9] = mask[7, 5] = True
    hull = stand_ins._hull(mask, corners=True)
    assert [2, 3] in hull and [9, 3] in hull and [2, 6] in hull and [6, 8] in hull
    x, y = np.array(hull, dtype=float).T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert mask.sum() <= area < 40


def test_crowds_are_run_length_codes_as_coco_has_them(data: Path) -> None:
    from pycocotools.coco import COCO

    content = [COCO(data / f"coco/annotations/instances_{split}2017.json") for split in ("train", "val")]
    annotations = [(c, a) for c in content for a in c.dataset["annotations"]]
    assert {a["iscrowd"] for _, a in annotations} == {0, 1}
    for api, annotation in annotations:
        mask = api.annToMask(annotation)
        if annotation["iscrowd"]:
            assert mask.sum() == annotation["area"] and isinstance(annotation["segmentation"], dict)
        else:
            assert mask.sum() >= 0.9 * annotation["area"] and isinstance(annotation["segmentation"], list)


def test_some_pixels_are_of_no_class(data: Path) -> None:
    for pattern, void in (
        ("ADEChallengeData2016/annotations_detectron2/validation/*.png", 255),
        ("cityscapes/gtFine/val/*/*labelTrainIds.png", 255),
        ("coco/panoptic_semseg_val2017/*.png", 255),
    ):
        for path in data.glob(pattern):
            labels = np.asarray(Image.open(path))
            assert (labels == void).any() and len(np.unique(labels)) > 2, path


EVALUATE = """
import contextlib, io, json, multiprocessing, sys
multiprocessing.cpu_count = lambda: 2  # detectron2 reads Cityscapes in as many processes
root, out = sys.argv[1:]
sys.path[:0] = [root, root + "/tests/d2"]
from tiny import BACKBONE, SMALL, options, train
from detectron2.data import DatasetCatalog
from jepa_plugins.d2 import get_config
from jepa_plugins.d2.data.builtin import SHARES

found = {}
for name in ("ade20k/semantic", "ade20k/panoptic", "ade20k/instance", "coco/panoptic", "coco/instance",
             "cityscapes/semantic", "cityscapes/panoptic", "cityscapes/instance"):
    own = {"SOLVER.MAX_ITER": 1, "SOLVER.IMS_PER_BATCH": 1, "OUTPUT_DIR": out}
    config = get_config(f"detectron2/mask2former/{name}_R50.yaml", options(SMALL, BACKBONE, own))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = train(config)
        results = trainer.test(config, trainer.model)
    wanted = ("PQ", "AP", "mIoU", "IoU")
    found[name] = sorted(kind + "/" + figure for kind in results for figure in results[kind] if figure in wanted)
found["shares"] = {name: len(DatasetCatalog.get(name)) for name in SHARES}
print("found", json.dumps(found))
"""


def test_every_name_of_the_configurations_trains_and_evaluates(data: Path, tmp_path: Path) -> None:
    """In a process of its own: detectron2 looks for its data sets when it is imported."""
    pytest.importorskip("detectron2")
    environment = {**os.environ, "DETECTRON2_DATASETS": str(data), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EVALUATE, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1].removeprefix("found "))
    assert set(found.pop("shares").values()) == {1}
    panoptic = ["panoptic_seg/PQ", "segm/AP", "sem_seg/mIoU"]
    assert found == {
        "ade20k/semantic": ["sem_seg/mIoU"],
        "ade20k/panoptic": panoptic,
        "ade20k/instance": ["segm/AP"],
        "coco/panoptic": panoptic,
        "coco/instance": ["segm/AP"],
        "cityscapes/semantic": ["sem_seg/IoU"],
        "cityscapes/panoptic": ["panoptic_seg/PQ", "segm/AP", "sem_seg/IoU"],
        "cityscapes/instance": ["segm/AP"],
    }


def test_mmsegmentation_reads_ade20k_and_a_list(data: Path) -> None:
    datasets = pytest.importorskip("mmseg.datasets")
    root = data / "ADEChallengeData2016"
    prefix = {"img_path": "images/training", "seg_map_path": "annotations/training"}
    whole = datasets.ADE20KDataset(data_root=str(root), data_prefix=prefix, pipeline=[])
    share = datasets.ADE20KDataset(
        data_root=str(root), data_prefix=prefix, pipeline=[], ann_file="low_data/train_10pct.txt"
    )
    assert len(whole) == 2 and len(share) == 1
    (name,) = (root / "low_data/train_10pct.txt").read_text().split()
    assert Path(share[0]["img_path"]).stem == Path(share[0]["seg_map_path"]).stem == name
    from mmseg.datasets.transforms import LoadAnnotations

    labels = LoadAnnotations(reduce_zero_label=True)({**share[0], "seg_fields": []})["gt_seg_map"]
    expected = np.asarray(Image.open(root / f"annotations_detectron2/training/{name}.png"))
    np.testing.assert_array_equal(labels, expected)


def test_pre_training_reads_imagenet(data: Path) -> None:
    from jepa_plugins.core.sources import Sources

    images = Sources("SOURCE", "ROOT", (str(data),)).list("imagenet/train")
    assert len(images) == 6 and images.read(0).shape == (64, 85, 3)
