"""tools/prepare_data.py ade20k, cityscapes, coco: files as published scripts make them, whole, once."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import prepare_data
import pytest
from PIL import Image
from preparing import ade20k, check, cityscapes, coco, running, stand_ins
from preparing.classes import categories
from preparing.expected import DATA_SETS

pytest.importorskip("pycocotools")
pytest.importorskip("cityscapesscripts")

ADE20K = "ADEChallengeData2016"
ANY = ("--any-count", "--workers", "1")


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Stand-ins, which these commands have prepared."""
    out = tmp_path_factory.mktemp("made") / "data"
    stand_ins.make_stand_ins(out, 3, 64, 1, ["ade20k", "cityscapes", "coco"], 1, False)
    return out


MADE = {
    "ade20k": (ADE20K, ("annotations_detectron2", "ade20k_panoptic_*", "ade20k_instance_*")),
    "cityscapes": ("cityscapes", ("gtFine/*/*/*.png", "gtFine/cityscapes_panoptic_*")),
    "coco": ("coco", ("panoptic_semseg_*",)),
}


@pytest.fixture()
def raw(made: Path, tmp_path: Path) -> Path:
    """The same trees as downloaded."""
    shutil.copytree(made, tmp_path / "data")
    for folder, patterns in MADE.values():
        for pattern in patterns:
            for path in (tmp_path / "data" / folder).glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tmp_path / "data"


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def run(name: str, root: Path, *options: str) -> int:
    return prepare_data.main([name, "--out", str(root / MADE[name][0]), *options])


@pytest.mark.parametrize("name", MADE)
def test_two_processes_make_the_same_files(name: str, made: Path, raw: Path) -> None:
    assert digests(raw / MADE[name][0]) != digests(made / MADE[name][0])
    assert run(name, raw, "--any-count", "--workers", "2") == 0
    assert digests(raw / MADE[name][0]) == digests(made / MADE[name][0])


@pytest.mark.parametrize("name", MADE)
def test_a_second_run_touches_nothing_and_counts_are_held_to_the_published_ones(
    name: str, made: Path, raw: Path, capsys
) -> None:
    assert run(name, raw, *ANY) == 0
    before = times(raw)
    assert run(name, raw, "--workers", "1") == 1
    assert times(raw) == before
    error = capsys.readouterr().err
    published = {"ade20k": "3 of 20,210", "cityscapes": "3 of 2,975", "coco": "3 of 118,287"}[name]
    assert published in error and "--any-count" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", MADE)
def test_published_counts_are_accepted(name: str, raw: Path, monkeypatch) -> None:
    small = [
        replace(item, parts=tuple(replace(part, count=min(part.count, 3)) for part in item.parts))
        for item in DATA_SETS
    ]
    monkeypatch.setattr(check, "DATA_SETS", small)
    assert run(name, raw, "--workers", "1") == 0


# What writes the files of an image; the third call is interrupted.
STEPS = {
    "ade20k": [(ade20k, "_shift"), (ade20k, "_panoptic"), (ade20k, "_instances")],
    "cityscapes": [(cityscapes, "draw_labels"), (cityscapes, "_panoptic")],
    "coco": [(coco, "_semantic")],
}


@pytest.mark.parametrize(("name", "step"), [(n, k) for n, steps in STEPS.items() for k in range(len(steps))])
def test_an_interrupted_run_goes_on(name: str, step: int, made: Path, raw: Path, monkeypatch, capsys) -> None:
    module, function = STEPS[name][step]
    work, calls = getattr(module, function), []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(*arguments)

    monkeypatch.setattr(module, function, counted)
    assert run(name, raw, *ANY) == 130
    assert "again to go on" in capsys.readouterr().err
    assert run(name, raw, *ANY) == 0
    assert len(calls) == 3 + 6 - 2  # six images: the first two are not done again
    assert digests(raw / MADE[name][0]) == digests(made / MADE[name][0])


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("ade20k", f"{ADE20K}/ade20k_panoptic_train/ADE_train_00000002.png"),
        ("ade20k", f"{ADE20K}/ade20k_panoptic_val.json"),
        ("ade20k", f"{ADE20K}/ade20k_instance_val.json"),
        ("ade20k", f"{ADE20K}/annotations_detectron2/training/ADE_train_00000001.png"),
        ("cityscapes", "cityscapes/gtFine/cityscapes_panoptic_val.json"),
        ("cityscapes", "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png"),
        (
            "cityscapes",
            "cityscapes/gtFine/cityscapes_panoptic_train/aachen_000002_000019_gtFine_panoptic.png",
        ),
        ("coco", "coco/panoptic_semseg_val2017/000000010001.png"),
    ],
)
@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_what_is_lost_is_made_again(name: str, lost: str, how: str, made: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(made, root)
    before = times(root)
    path = root / lost
    path.unlink() if how == "removed" else path.write_bytes(b"")
    assert run(name, root, *ANY) == 0
    assert digests(root) == digests(made)
    after = times(root)
    changed = {str(file.relative_to(root)) for file in before if after[file] != before[file]}
    also = lost.removesuffix(".json")  # a json that is lost takes its label images with it: they must agree
    assert lost in changed and all(f.endswith(".json") or f.startswith(also) for f in changed)


def test_a_journal_that_was_cut_short_serves(tmp_path: Path) -> None:
    journal = running.Journal(tmp_path / "x.json")
    journal.collect({}, ["a", "b"], [1, [2]])
    journal.path.write_text(journal.path.read_text() + '["c", {"half": ')
    assert journal.read() == {"a": 1, "b": [2]}
    known = journal.read()
    journal.collect(known, ["c"], ["whole"])
    assert journal.read() == known == {"a": 1, "b": [2], "c": "whole"}


# --- ADE20K ---

SIZE = (6, 8)


def _tiny(root: Path, semantic: np.ndarray, objects: np.ndarray) -> Path:
    """One training and one validation image with these labels and objects [H, W, 2]: class, number."""
    pixels = np.concatenate([objects, np.zeros((*SIZE, 1), dtype=int)], axis=2)
    for split, folder in (("train", "training"), ("val", "validation")):
        name = f"ADE_{split}_00000001"
        for place, content, suffix in (
            ("images", np.zeros((*SIZE, 3)), "jpg"),
            ("annotations", semantic, "png"),
            ("annotations_instance", pixels, "png"),
        ):
            path = root / place / folder / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content.astype(np.uint8)).save(path)
    return root


def _example() -> tuple[np.ndarray, np.ndarray]:
    """Sky above sea (2, 26 among the 150), a bed (7), two flags (149); a flag covers sky and nothing of the sea."""
    semantic = np.full(SIZE, 3)
    semantic[3:] = 27
    semantic[0, 0] = 0  # other objects
    objects = np.zeros((*SIZE, 2), dtype=int)
    objects[1:3, 1:4] = (100, 1)
    objects[0:2, 6:8] = (100, 2)
    objects[3:5, 2:4] = (1, 7)
    semantic[3:5, 2:4] = 8
    return semantic, objects


def _ids(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int64) @ [1, 256, 65536]


def test_ade20k_by_hand(tmp_path: Path) -> None:
    root = _tiny(tmp_path, *_example())
    assert prepare_data.main(["ade20k", "--out", str(root), *ANY]) == 0
    content = json.loads((root / "ade20k_panoptic_val.json").read_text())
    assert content["categories"] == categories("ade20k")
    assert content["images"] == [
        {"id": "ADE_val_00000001", "file_name": "ADE_val_00000001.jpg", "width": 8, "height": 6}
    ]
    (annotation,) = content["annotations"]
    found = {(s["category_id"], s["area"], tuple(s["bbox"])) for s in annotation["segments_info"]}
    assert found == {
        (2, 23, (0, 0, 8, 3)),  # also where the flags are
        (26, 20, (0, 3, 8, 3)),
        (7, 4, (2, 3, 2, 2)),
        (149, 6, (1, 1, 3, 2)),
        (149, 4, (6, 0, 2, 2)),
    }
    ids = _ids(root / "ade20k_panoptic_val" / annotation["file_name"])
    pixels = {s["id"]: int((ids == s["id"]).sum()) for s in annotation["segments_info"]}
    assert sorted(pixels.values()) == [4, 4, 6, 13, 20] and ids[0, 0] == 0
    instances = json.loads((root / "ade20k_instance_val.json").read_text())
    assert [a["id"] for a in instances["annotations"]] == [1, 2, 3]
    assert [a["category_id"] for a in instances["annotations"]] == [149, 149, 7]
    assert len(instances["categories"]) == 100 and instances["categories"][-1] == {"id": 149, "name": "flag"}
    shifted = np.asarray(Image.open(root / "annotations_detectron2/validation/ADE_val_00000001.png"))
    assert shifted[0, 0] == 255 and shifted[5, 0] == 26


def test_the_100_things_are_those_of_the_challenge() -> None:
    """Some lines of the published table of classes among the 100 (from 1) and among the 150 (from 1)."""
    table = {
        1: 8,
        5: 15,
        14: 31,
        26: 45,
        38: 66,
        50: 81,
        61: 94,
        72: 113,
        83: 128,
        94: 143,
        97: 147,
        100: 150,
    }
    assert {k: ade20k.things()[k - 1] + 1 for k in table} == table and len(ade20k.things()) == 100


def test_many_objects_of_a_class_have_different_ids() -> None:
    taken = {0}
    ids = [ade20k._free_id((0, 0, 0), taken) for _ in range(300)]
    assert len(set(ids)) == 300 and 0 not in ids and max(ids) < 1 << 24


def _break(kind: str, root: Path) -> None:
    picture = root / "annotations_instance/validation/ADE_val_00000001.png"
    pixels = np.array(Image.open(picture))
    if kind == "two classes":
        pixels[1, 1, 0] = 3
    elif kind == "class 101":
        pixels[..., 0][pixels[..., 1] == 7] = 101
    elif kind == "size":
        pixels = pixels[:-1]
    elif kind == "grey":
        pixels = pixels[..., 0]
    if kind == "cut short":
        picture.write_bytes(picture.read_bytes()[:60])
    elif kind == "missing":
        picture.unlink()
    else:
        Image.fromarray(pixels).save(picture)


@pytest.mark.parametrize("kind", ["two classes", "class 101", "size", "grey", "cut short", "missing"])
@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_damaged_objects_are_one_sentence(kind: str, task: str, tmp_path: Path, capsys) -> None:
    root = _tiny(tmp_path, *_example())
    _break(kind, root)
    assert prepare_data.main(["ade20k", "--out", str(root), "--tasks", task, *ANY]) == 1
    error = capsys.readouterr().err
    assert "annotations_instance/validation/ADE_val_00000001.png" in error and error.count("\n") == 1
    assert not (root / f"ade20k_{task}_val.json").exists()


def test_tasks_choose(raw: Path) -> None:
    shutil.rmtree(raw / ADE20K / "annotations_instance")
    assert run("ade20k", raw, "--tasks", "semantic", *ANY) == 0
    assert not list((raw / ADE20K).glob("ade20k_*"))
    assert run("ade20k", raw, *ANY) == 1


# --- COCO, Cityscapes ---


def test_coco_labels_are_the_classes_of_the_segments(made: Path) -> None:
    content = json.loads((made / "coco/annotations/panoptic_val2017.json").read_text())
    order = [category["id"] for category in categories("coco")]
    for annotation in content["annotations"]:
        ids = _ids(made / "coco/panoptic_val2017" / annotation["file_name"])
        labels = np.asarray(Image.open(made / "coco/panoptic_semseg_val2017" / annotation["file_name"]))
        assert (labels[ids == 0] == 255).all() and (ids == 0).any()
        for segment in annotation["segments_info"]:
            assert set(labels[ids == segment["id"]].tolist()) == {order.index(segment["category_id"])}


def test_cocos_classes_are_those_of_detectron2() -> None:
    meta = pytest.importorskip("detectron2.data.datasets.builtin_meta")
    keys = ("id", "name", "isthing", "color")
    assert categories("coco") == [{key: c[key] for key in keys} for c in meta.COCO_CATEGORIES]


@pytest.mark.parametrize("name", ["cityscapes", "coco"])
def test_an_empty_folder_is_one_sentence(name: str, tmp_path: Path, capsys) -> None:
    assert run(name, tmp_path, *ANY) == 1
    error = capsys.readouterr().err
    assert "unpack" in error and error.count("\n") == 1


def test_an_unknown_label_of_cityscapes_is_one_sentence(raw: Path, capsys) -> None:
    path = next((raw / "cityscapes").rglob("*polygons.json"))
    path.write_text(path.read_text().replace('"static"', '"spaceship"'))
    assert run("cityscapes", raw, *ANY) == 1
    error = capsys.readouterr().err
    assert path.name in error and error.count("\n") == 1


def test_a_damaged_label_image_of_coco_is_one_sentence(raw: Path, capsys) -> None:
    path = next((raw / "coco/panoptic_val2017").iterdir())
    path.write_bytes(path.read_bytes()[:40])
    assert run("coco", raw, *ANY) == 1
    error = capsys.readouterr().err
    assert path.name in error and "unpack panoptic_val2017.zip again" in error and error.count("\n") == 1


def test_no_workers_are_one_sentence(raw: Path, capsys) -> None:
    assert run("coco", raw, "--any-count", "--workers", "0") == 1
    assert "--workers is 0" in capsys.readouterr().err
