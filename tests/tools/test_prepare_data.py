"""tools/prepare_data.py synthetic: both layouts agree with each other, and detectron2's loaders read them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from jepa_plugins.core import scenes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import prepare_data  # noqa: E402
from preparing import synthetic  # noqa: E402

SMALL = ("--train", "12", "--val", "4", "--unlabelled", "3", "--size", "64", "--seed", "5")
COCO_TO_ADE20K = {"train2017": "training", "val2017": "validation"}


def generate(out: Path, *options: str) -> int:
    return prepare_data.main(["synthetic", "--out", str(out), *SMALL, "--workers", "1", *options])


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generated") / "synthetic"
    assert generate(out) == 0
    return out


def panoptic_of(data: Path, split: str) -> dict:
    return json.loads((data / "annotations" / f"panoptic_{split}.json").read_text())


def read_ids(path: Path) -> np.ndarray:
    rgb = np.asarray(Image.open(path)).astype(np.int64)
    assert rgb.ndim == 3
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def test_command_with_two_processes_writes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "synthetic", "--out", "two", *SMALL]
    result = subprocess.run([*command, "--workers", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert digests(tmp_path / "two") == digests(data)


def test_more_pictures_leave_the_first_ones_as_they_are(data: Path, tmp_path: Path) -> None:
    assert generate(tmp_path / "more", "--train", "15", "--val", "5", "--unlabelled", "4") == 0
    few, more = digests(data), digests(tmp_path / "more")
    shared = {name for name in few if name.endswith((".jpg", ".png"))}
    assert {name: few[name] for name in shared} == {name: more[name] for name in shared}
    # Per labelled picture: two links, two label maps; per unlabelled picture: itself.
    assert len(more) - len(few) == (3 + 1) * 4 + 1


@pytest.mark.parametrize("split", COCO_TO_ADE20K)
def test_panoptic_json_describes_its_png(data: Path, split: str) -> None:
    content = panoptic_of(data, split)
    isthing = {category["id"]: category["isthing"] for category in content["categories"]}
    for annotation in content["annotations"]:
        ids = read_ids(data / f"panoptic_{split}" / annotation["file_name"])
        assert set(np.unique(ids)) == {segment["id"] for segment in annotation["segments_info"]}
        for segment in annotation["segments_info"]:
            y, x = np.nonzero(ids == segment["id"])
            box = [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            assert segment["area"] == len(y) and segment["bbox"] == box
            assert segment["iscrowd"] == 0 and segment["category_id"] in isthing


@pytest.mark.parametrize("split", COCO_TO_ADE20K)
def test_instances_are_the_panoptic_things(data: Path, split: str) -> None:
    coco = COCO(data / "annotations" / f"instances_{split}.json")
    content = panoptic_of(data, split)
    things = {category["id"] for category in content["categories"] if category["isthing"]}
    assert set(coco.getCatIds()) == things
    for annotation in content["annotations"]:
        ids = read_ids(data / f"panoptic_{split}" / annotation["file_name"])
        expected = [s for s in annotation["segments_info"] if s["category_id"] in things]
        found = coco.loadAnns(coco.getAnnIds(imgIds=[annotation["image_id"]]))
        assert len(found) == len(expected)
        for segment, instance in zip(expected, found, strict=True):
            np.testing.assert_array_equal(coco.annToMask(instance), ids == segment["id"])
            for key in ("area", "bbox", "category_id", "iscrowd"):
                assert instance[key] == segment[key]
            assert coco_mask.area(coco.annToRLE(instance)) == instance["area"]


@pytest.mark.parametrize(("split", "ade20k"), COCO_TO_ADE20K.items())
def test_semantic_png_is_the_class_of_the_panoptic_segment(data: Path, split: str, ade20k: str) -> None:
    content = panoptic_of(data, split)
    contiguous = {category["id"]: k for k, category in enumerate(content["categories"])}
    assert list(contiguous) == sorted(contiguous) and len(contiguous) == len(scenes.CLASSES)
    assert max(contiguous) > len(contiguous)
    names = (data / "classes.txt").read_text().splitlines()
    assert names == [category["name"] for category in content["categories"]] == list(scenes.CLASSES)
    for annotation in content["annotations"]:
        label = Image.open(data / "annotations" / ade20k / annotation["file_name"])
        assert label.mode == "L"
        ids = read_ids(data / f"panoptic_{split}" / annotation["file_name"])
        expected = np.full(ids.shape, 255)
        for segment in annotation["segments_info"]:
            expected[ids == segment["id"]] = contiguous[segment["category_id"]]
        np.testing.assert_array_equal(np.asarray(label), expected)
        assert expected.max() < len(names)


@pytest.mark.parametrize(
    ("split", "ade20k", "first"), [("train2017", "training", 1), ("val2017", "validation", 400_001)]
)
def test_files_are_the_scenes(data: Path, split: str, ade20k: str, first: int) -> None:
    images = panoptic_of(data, split)["images"]
    assert [image["id"] for image in images] == list(range(first, first + len(images)))
    for image in images:
        scene = scenes.make_scene(5, image["id"], 64)
        file = data / split / image["file_name"]
        assert (image["height"], image["width"]) == scene.image.shape[:2]
        difference = np.abs(np.asarray(Image.open(file)).astype(int) - scene.image)
        assert difference.mean() < 4
        label = np.asarray(Image.open(data / "annotations" / ade20k / f"{file.stem}.png"))
        np.testing.assert_array_equal(label, scene.semantic())
        assert os.path.samefile(file, data / "images" / ade20k / file.name)


def test_unlabelled_pictures_are_others(data: Path) -> None:
    names = sorted(path.name for path in (data / "unlabelled").iterdir())
    assert names == ["500001.jpg", "500002.jpg", "500003.jpg"]
    digest = digests(data)
    labelled = {value for name, value in digest.items() if name.startswith(("train2017", "val2017"))}
    assert not labelled & {value for name, value in digest.items() if name.startswith("unlabelled")}


@given(image_id=st.integers(1, 999_999), count=st.integers(1, synthetic.SEGMENTS_PER_IMAGE - 1))
def test_segment_ids_are_distinct_24_bit_numbers(image_id: int, count: int) -> None:
    ids = synthetic.panoptic_ids(image_id, count)
    assert ids[0] == 0 and len(set(ids.tolist())) == count + 1
    assert ids.min() == 0 and ids.max() < 1 << 24
    rgb = synthetic.encode_panoptic(ids[None]).astype(np.int64)
    np.testing.assert_array_equal(rgb @ [1, 256, 65536], ids[None])


def test_segment_ids_use_all_three_bytes(data: Path) -> None:
    parts = [a["segments_info"] for a in panoptic_of(data, "train2017")["annotations"]]
    ids = np.array([segment["id"] for part in parts for segment in part])
    for shift in (0, 8, 16):
        assert len(set((ids >> shift & 255).tolist())) > len(ids) // 4


def test_detectron2_reads_the_instances(data: Path) -> None:
    datasets = pytest.importorskip("detectron2.data.datasets")
    records = datasets.load_coco_json(
        str(data / "annotations" / "instances_train2017.json"), str(data / "train2017"), "generated_instances"
    )
    from detectron2.data import MetadataCatalog, detection_utils

    assert MetadataCatalog.get("generated_instances").thing_classes == list(scenes.THING_CLASSES)
    assert len(records) == 12
    for record in records:
        image = detection_utils.read_image(record["file_name"], "RGB")
        instances = detection_utils.annotations_to_instances(
            record["annotations"], image.shape[:2], mask_format="bitmask"
        )
        scene = scenes.make_scene(5, record["image_id"], 64)
        assert instances.gt_classes.tolist() == [i.class_id for i in scene.infos if i.isthing]
        for mask, info in zip(instances.gt_masks.tensor.numpy(), scene.infos, strict=False):
            np.testing.assert_array_equal(mask, scene.segments == info.id)


def test_detectron2_reads_the_semantic_labels(data: Path) -> None:
    datasets = pytest.importorskip("detectron2.data.datasets")
    for split, count in (("training", 12), ("validation", 4)):
        records = datasets.load_sem_seg(str(data / "annotations" / split), str(data / "images" / split))
        assert len(records) == count
        for record in records:
            assert Path(record["file_name"]).stem == Path(record["sem_seg_file_name"]).stem


def test_detectron2_reads_the_panoptic_labels(data: Path) -> None:
    panoptic = pytest.importorskip("detectron2.data.datasets.coco_panoptic")
    categories = panoptic_of(data, "val2017")["categories"]
    contiguous = {c["id"]: k for k, c in enumerate(categories)}
    things = {c["id"]: contiguous[c["id"]] for c in categories if c["isthing"]}
    meta = {
        "thing_dataset_id_to_contiguous_id": things,
        "stuff_dataset_id_to_contiguous_id": contiguous,
    }
    records = panoptic.load_coco_panoptic_json(
        str(data / "annotations" / "panoptic_val2017.json"),
        str(data / "val2017"),
        str(data / "panoptic_val2017"),
        meta,
    )
    assert len(records) == 4
    for record in records:
        scene = scenes.make_scene(5, record["image_id"], 64)
        assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [
            (info.class_id, info.isthing) for info in scene.infos
        ]


def test_complete_output_is_left_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert generate(data) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_other_settings_need_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    assert generate(out) == 0
    before = digests(out)
    assert generate(out, "--seed", "6") == 1
    error = capsys.readouterr().err
    assert "--overwrite" in error and "seed 5 instead of 6" in error and error.count("\n") == 1
    assert digests(out) == before
    assert generate(out, "--seed", "6", "--overwrite") == 0
    after = digests(out)
    assert json.loads((out / "meta.json").read_text())["seed"] == 6
    assert all(after[name] != before[name] for name in before if name.endswith(".jpg"))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_foreign_files_are_never_replaced(
    tmp_path: Path, overwrite: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    assert generate(tmp_path, *overwrite) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_interrupted_run_leaves_no_output_and_starts_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = scenes.make_scene

    def stop_at_seven(seed: int, index: int, size: int) -> scenes.Scene:
        if index == 7:
            raise KeyboardInterrupt
        return draw(seed, index, size)

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "make_scene", stop_at_seven)
        assert generate(tmp_path / "set") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
    assert generate(tmp_path / "set") == 0
    assert digests(tmp_path / "set") == digests(data)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("refused", [("link",), ("link", "symlink")])
def test_pictures_are_shared_where_hard_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not supported here")

    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    assert generate(tmp_path / "before") == 0
    (tmp_path / "before").rename(tmp_path / "set")  # Links are relative: the folder may move.
    file = tmp_path / "set" / "images" / "training" / "000001.jpg"
    assert file.is_symlink() == (refused == ("link",))
    assert file.read_bytes() == (tmp_path / "set" / "train2017" / "000001.jpg").read_bytes()


@pytest.mark.parametrize(
    "option", [("--train", "0"), ("--val", "-1"), ("--size", "31"), ("--seed", "-2"), ("--workers", "0")]
)
def test_impossible_numbers_are_refused(
    tmp_path: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tmp_path / "set", *option) == 1
    error = capsys.readouterr().err
    assert option[0] in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_output_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert generate(tmp_path / "file" / "set") == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.count("\n") == 1


def test_progress_without_rich(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert generate(tmp_path / "set") == 0
    assert "19/19" in capsys.readouterr().out


def test_ade20k_labels_are_shifted_as_detectron2_reads_them(tmp_path, capsys):
    for split in ("training", "validation"):
        (tmp_path / "annotations" / split).mkdir(parents=True)
        labels = np.arange(151, dtype=np.uint8).reshape(1, -1).repeat(2, axis=0)
        Image.fromarray(labels).save(tmp_path / "annotations" / split / "a.png")
    command = ["ade20k", "--out", str(tmp_path), "--tasks", "semantic", "--any-count"]
    assert prepare_data.main(command) == prepare_data.main(command) == 0  # again: nothing to do
    shifted = np.asarray(Image.open(tmp_path / "annotations_detectron2/training/a.png"))
    assert shifted[0].tolist() == [255, *range(150)]


def test_ade20k_without_labels_is_one_sentence(tmp_path, capsys):
    assert prepare_data.main(["ade20k", "--out", str(tmp_path)]) == 1
    assert "holds no label images" in capsys.readouterr().err
