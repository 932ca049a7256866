"""Data sets that are registered by their name alone."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from PIL import Image

from jepa_plugins.d2.data.catalog import check_num_classes, ensure_registered, num_classes
from jepa_plugins.d2.data.schemes import panoptic_metadata

SHARED = Path(os.getenv("JEPA_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"
CATEGORIES = [
    {"id": 7, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
    {"id": 3, "name": "sky", "isthing": 0},
    {"id": 201, "name": "dog", "isthing": 1},
]


def _picture(path: Path, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 6)).save(path)


def _semantic(root: Path, stems=("a", "b"), classes="sky\nroad\n") -> str:
    for stem in stems:
        _picture(root / "images" / "val" / f"{stem}.jpg")
        _picture(root / "annotations" / "val" / f"{stem}.png", "L")
    (root / "classes.txt").write_text(classes)
    return f"folder_semantic@{root}@val"


def _panoptic(root: Path, instances: bool = False, segments=None) -> str:
    _picture(root / "val" / "x.png")
    _picture(root / "panoptic_val" / "x.png")
    segments = segments or [{"id": 5, "category_id": 201}, {"id": 6, "category_id": 3, "iscrowd": 0}]
    content = {
        "images": [{"id": 1, "file_name": "x.png", "height": 6, "width": 8}],
        "annotations": [{"image_id": 1, "file_name": "x.png", "segments_info": segments}],
        "categories": CATEGORIES,
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "panoptic_val.json").write_text(json.dumps(content))
    if instances:
        box = {"bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0, "segmentation": [[0, 0, 2, 0, 2, 2]]}
        content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 7, **box}]
        content["categories"] = [CATEGORIES[2], CATEGORIES[0]]
        (root / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return f"coco_panoptic@{root}@val"


def test_folder_semantic(tmp_path: Path) -> None:
    name = _semantic(tmp_path)
    ensure_registered([name])
    ensure_registered(name)  # again: nothing happens
    records = get_detection_dataset_dicts(name)
    assert [Path(record["file_name"]).name for record in records] == ["a.jpg", "b.jpg"]
    assert records[1]["sem_seg_file_name"].endswith("annotations/val/b.png")
    metadata = MetadataCatalog.get(name)
    assert metadata.stuff_classes == ["sky", "road"] and len(metadata.stuff_colors) == 2
    assert (metadata.evaluator_type, metadata.ignore_label) == ("sem_seg", 255)
    assert num_classes(name) == 2


def test_images_and_labels_pair_by_stem_whatever_their_suffix(tmp_path: Path, caplog) -> None:
    name = _semantic(tmp_path, stems=("city/a", "city/b"))
    (tmp_path / "images/val/city/a.jpg").rename(tmp_path / "images/val/city/a.PNG")
    (tmp_path / "annotations/val/city/b.png").unlink()
    ensure_registered(name)
    assert [Path(record["file_name"]).name for record in DatasetCatalog.get(name)] == ["a.PNG"]
    assert "2 images and 1 label images, of which 1 belong together" in caplog.text


def test_ambiguous_and_unmatched_names_are_refused(tmp_path: Path) -> None:
    name = _semantic(tmp_path / "one", stems=("a",))
    _picture(tmp_path / "one/images/val/a.png")
    ensure_registered(name)
    with pytest.raises(ValueError, match=r"a\.png' differ in the suffix alone"):
        DatasetCatalog.get(name)
    name = _semantic(tmp_path / "two", stems=("a",))
    (tmp_path / "two/images/val/a.jpg").rename(tmp_path / "two/images/val/c.jpg")
    ensure_registered(name)
    with pytest.raises(ValueError, match="label image of the same name"):
        DatasetCatalog.get(name)


def test_coco_instance_numbers_classes_by_their_ids(tmp_path: Path) -> None:
    _panoptic(tmp_path, instances=True)
    name = f"coco_instance@{tmp_path}@val"
    ensure_registered(name)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog"] and metadata.evaluator_type == "coco"
    record = DatasetCatalog.get(name)[0]  # detectron2's loader agrees, or it would refuse to overwrite
    assert record["annotations"][0]["category_id"] == 0 and num_classes(name) == 2


def test_coco_panoptic_shares_one_range_in_file_order(tmp_path: Path) -> None:
    name = _panoptic(tmp_path)
    ensure_registered(name)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 201: 2}
    assert metadata.stuff_dataset_id_to_contiguous_id == {7: 0, 3: 1, 201: 2}
    assert metadata.thing_classes == ["cat", "dog"] and metadata.stuff_classes == ["cat", "sky", "dog"]
    assert metadata.stuff_colors[0] == [1, 2, 3] and metadata.thing_colors[1] == metadata.stuff_colors[2]
    assert metadata.label_divisor == 1000 and metadata.get("json_file") is None
    record = DatasetCatalog.get(name)[0]
    assert record["file_name"].endswith("val/x.png") and record["image_id"] == 1
    segments = [(s["category_id"], s["isthing"], s["iscrowd"]) for s in record["segments_info"]]
    assert segments == [(2, True, 0), (1, False, 0)]
    assert num_classes(name) == 3


def test_panoptic_names_the_instances_file_when_it_is_there(tmp_path: Path) -> None:
    name = _panoptic(tmp_path, instances=True)
    ensure_registered(name)
    assert MetadataCatalog.get(name).json_file == str(tmp_path / "annotations/instances_val.json")


def test_metadata_agrees_with_detectron2_for_coco() -> None:
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    ours, theirs = panoptic_metadata(COCO_CATEGORIES), MetadataCatalog.get("coco_2017_val_panoptic")
    for key in ("stuff_classes", "stuff_colors", "thing_dataset_id_to_contiguous_id"):
        assert ours[key] == theirs.get(key)
    assert len(ours["thing_classes"]) == 80


def test_an_unlisted_category_is_named(tmp_path: Path) -> None:
    name = _panoptic(tmp_path, segments=[{"id": 1, "category_id": 99}])
    ensure_registered(name)
    with pytest.raises(ValueError, match=r"x\.png.*category 99"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize("scheme", ["folder_semantic", "coco_instance", "coco_panoptic"])
def test_missing_files_are_named_with_the_layout(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(FileNotFoundError, match="expected ROOT/") as caught:
        ensure_registered(f"{scheme}@{tmp_path}/gone@val")
    assert f"{tmp_path}/gone" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_empty_class_list(tmp_path: Path) -> None:
    name = _semantic(tmp_path, classes="\n")
    with pytest.raises(ValueError, match=r"classes\.txt' is empty"):
        ensure_registered(name)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes\.txt' does not exist: write one name a line"):
        ensure_registered(name)


def test_unknown_names_and_broken_json(tmp_path: Path) -> None:
    for name in ("no_such_set", "folder_semantic@only", "other@a@b"):
        with pytest.raises(ValueError, match="SCHEME@ROOT@SPLIT"):
            ensure_registered(name)
    name = _panoptic(tmp_path)
    (tmp_path / "annotations/panoptic_val.json").write_text("{")
    with pytest.raises(ValueError, match=r"panoptic_val\.json' is no valid json"):
        ensure_registered(name)


def test_detectron2s_own_names_stay_untouched() -> None:
    ensure_registered(["coco_2017_val", "ade20k_sem_seg_val"])
    assert num_classes("ade20k_sem_seg_val") == 150


def test_relative_root(tmp_path: Path, monkeypatch) -> None:
    _semantic(tmp_path / "work" / "here")
    _semantic(tmp_path / "store" / "there")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "store"))
    for name in ("folder_semantic@here@val", "folder_semantic@there@val"):
        ensure_registered(name)
        assert len(DatasetCatalog.get(name)) == 2
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_wrong_number_of_classes_gives_both_numbers(tmp_path: Path) -> None:
    name = _semantic(tmp_path)
    cfg = CfgNode({"MODEL": {"SEM_SEG_HEAD": {"NUM_CLASSES": 2}}})
    check_num_classes(cfg, name)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 54
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 54, but .* has 2 classes: set it to 2"):
        check_num_classes(cfg, name)


@pytest.mark.skipif(not (SHARED / "coco_tiny").is_dir(), reason="the coco_tiny sample is not here")
def test_coco_tiny() -> None:
    name = f"coco_panoptic@{SHARED / 'coco_tiny'}@val2017"
    ensure_registered(name)
    records = DatasetCatalog.get(name)
    assert len(records) == 50 and num_classes(name) == 81
    assert MetadataCatalog.get(name).stuff_dataset_id_to_contiguous_id[201] == 80
    assert all(
        os.path.isfile(record[key]) for record in records for key in ("file_name", "pan_seg_file_name")
    )


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="the camvid sample is not here")
def test_camvid() -> None:
    name = f"folder_semantic@{SHARED / 'camvid'}@validation"
    ensure_registered(name)
    assert len(DatasetCatalog.get(name)) == 101 and num_classes(name) == 11
    labels = np.asarray(Image.open(DatasetCatalog.get(name)[0]["sem_seg_file_name"]))
    assert set(np.unique(labels)) <= {*range(11), 255}
