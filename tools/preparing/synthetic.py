"""Generated scenes with exact labels.

Scenes are drawn (``jepa_plugins.core.scenes``) and written with exact labels in two layouts over the same
pictures. Under the output folder:

COCO layout
    train2017/*.jpg, val2017/*.jpg
    annotations/instances_{train,val}2017.json: things; ``segmentation`` is compressed RLE, so set
        detectron2's ``INPUT.MASK_FORMAT`` to "bitmask"; ``bbox`` is x, y, width, height in pixels;
        category ids have gaps
    annotations/panoptic_{train,val}2017.json and panoptic_{train,val}2017/*.png: a segment's id is
        R + 256 G + 65536 B of its pixels; every pixel has a segment
ADE20K layout
    images/{training,validation}/*.jpg: the same files, linked
    annotations/{training,validation}/*.png: 8-bit class index 0 to 11, 255 for unlabelled (does not occur).
        This is the reduced form that detectron2 reads: 0 is a class, not "other" as in ADE20K's own files
    classes.txt: line k (from 0) names class k; things first, then stuff, in the order of COCO's category ids
Both
    unlabelled/*.jpg: more pictures, without labels
    meta.json: what the folder was made from

A picture's number is its image id and, with the seed, decides everything in it, however many others there are
and whichever process draws it: the first 100 training pictures of 200 are those of 2,000.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jepa_plugins.core import scenes

from . import DataError
from .running import already_there, mapper, progress, replace_folder


@dataclass(frozen=True)
class Split:
    """A part of the data set: where its files go, the number of its first picture, how many fit."""

    coco: str
    ade20k: str
    first: int
    room: int


# Fixed first numbers: the pictures of one split do not depend on the size of another.
SPLITS = {
    "train": Split("train2017", "training", 1, 400_000),
    "val": Split("val2017", "validation", 400_001, 100_000),
}
UNLABELLED = Split("unlabelled", "", 500_001, 499_999)

# Gaps as in COCO, so that code that takes category ids for class indices shows itself.
CATEGORY_IDS = (1, 2, 3, 5, 8, 13, 21, 34, 92, 95, 100, 112)

# More than the segments of any picture; ids of annotations are image id * this + segment.
SEGMENTS_PER_IMAGE = 64


Drawn = dict[str, list[dict[str, Any]]]


# --- one picture -------------------------------------------------------------------------------------------


def panoptic_ids(image_id: int, count: int) -> np.ndarray:
    """Distinct, non-zero 24-bit ids of an image's ``count`` segments, int64 [count + 1]; entry 0 is void (0).

    An odd factor permutes the numbers modulo 2^24, which spreads consecutive ones over all three bytes.
    """
    number = image_id * SEGMENTS_PER_IMAGE + np.arange(count + 1, dtype=np.int64)
    ids = number * 0x9E3779B1 % (1 << 24)
    ids[0] = 0
    return ids


def encode_panoptic(ids: np.ndarray) -> np.ndarray:
    """24-bit ids [H, W] as RGB uint8 [H, W, 3]."""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).astype(np.uint8)


def draw_labelled(root: Path, split: Split, seed: int, size: int, image_id: int) -> Drawn:
    """Write one picture and its label maps; return its ``segments_info`` and its instance annotations."""
    scene = scenes.make_scene(seed, image_id, size)
    name = f"{image_id:06d}"
    _save_jpeg(scene.image, root / split.coco / f"{name}.jpg")
    _link(root / split.coco / f"{name}.jpg", root / "images" / split.ade20k / f"{name}.jpg")
    Image.fromarray(scene.semantic()).save(root / "annotations" / split.ade20k / f"{name}.png")
    ids = panoptic_ids(image_id, len(scene.infos))
    panoptic = Image.fromarray(encode_panoptic(ids[scene.segments]))
    panoptic.save(root / f"panoptic_{split.coco}" / f"{name}.png")
    return _annotations(scene, image_id, ids)


def draw_unlabelled(root: Path, split: Split, seed: int, size: int, image_id: int) -> Drawn:
    """Write one picture; there is nothing to return."""
    _save_jpeg(scenes.make_scene(seed, image_id, size).image, root / split.coco / f"{image_id:06d}.jpg")
    return {}


def _annotations(scene: scenes.Scene, image_id: int, ids: np.ndarray) -> Drawn:
    from pycocotools import mask as coco_mask

    present = np.array([info.id for info in scene.infos])
    masks = scene.segments[..., None] == present  # [H, W, segments]
    encoded = coco_mask.encode(np.asfortranarray(masks.astype(np.uint8)))
    areas, boxes = coco_mask.area(encoded).tolist(), coco_mask.toBbox(encoded).tolist()
    segments, instances = [], []
    for info, code, area, box in zip(scene.infos, encoded, areas, boxes, strict=True):
        common = {"category_id": CATEGORY_IDS[info.class_id], "area": area, "bbox": box, "iscrowd": 0}
        segments.append({"id": int(ids[info.id]), **common})
        if info.isthing:
            outline = {"size": code["size"], "counts": code["counts"].decode("ascii")}
            number = image_id * SEGMENTS_PER_IMAGE + info.id
            instances.append({"id": number, "image_id": image_id, "segmentation": outline, **common})
    return {"segments": segments, "instances": instances}


def _save_jpeg(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same file: hard link, else relative symbolic link, else copy."""
    relative = os.path.relpath(source, target.parent)
    for make in (partial(os.link, source), partial(os.symlink, relative), partial(shutil.copyfile, source)):
        try:
            make(target)
            return
        except OSError as error:
            reason = error
    raise reason


# --- the whole set -----------------------------------------------------------------------------------------


def make_synthetic(
    out: Path, train: int, val: int, unlabelled: int, size: int, seed: int, workers: int, overwrite: bool
) -> bool:
    """Write the generated data set to ``out``; False if it was already there.

    The files are written to a folder beside ``out`` that takes its name when it is complete, so that ``out``
    is whole or absent. Raises DataError for impossible numbers and for an ``out`` that holds something else.
    """
    _check_counts(train, val, unlabelled, size, seed, workers)
    meta = {
        "generator": "jepa_plugins.core.scenes",
        "version": scenes.VERSION,
        "seed": seed,
        "size": size,
        "train": train,
        "val": val,
        "unlabelled": unlabelled,
    }
    out = out.resolve()
    if already_there(out, meta, overwrite):
        return False
    partial_folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)  # Left by a run that was interrupted.
    _write_all(partial_folder, meta, workers)
    replace_folder(partial_folder, out)
    return True


def _check_counts(train: int, val: int, unlabelled: int, size: int, seed: int, workers: int) -> None:
    limits = {
        "--train": (train, 1, SPLITS["train"].room),
        "--val": (val, 1, SPLITS["val"].room),
        "--unlabelled": (unlabelled, 0, UNLABELLED.room),
        "--size": (size, scenes.MIN_SIZE, 8192),
        "--seed": (seed, 0, 2**63 - 1),
        "--workers": (workers, 1, 1024),
    }
    for option, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise DataError(f"{option} is {value}: give a number from {low} to {high}.")


def _write_all(root: Path, meta: dict[str, Any], workers: int) -> None:
    for split in SPLITS.values():
        coco = (split.coco, f"panoptic_{split.coco}")
        for folder in (*coco, f"images/{split.ade20k}", f"annotations/{split.ade20k}"):
            (root / folder).mkdir(parents=True)
    (root / UNLABELLED.coco).mkdir()
    total = meta["train"] + meta["val"] + meta["unlabelled"]
    with progress("drawing scenes", total) as advance, mapper(workers) as run:
        for name, split in SPLITS.items():
            image_ids = range(split.first, split.first + meta[name])
            results = run(partial(draw_labelled, root, split, meta["seed"], meta["size"]), image_ids)
            _write_json(root, split, meta["size"], dict(zip(image_ids, advance(results), strict=True)))
        draw = partial(draw_unlabelled, root, UNLABELLED, meta["seed"], meta["size"])
        image_ids = range(UNLABELLED.first, UNLABELLED.first + meta["unlabelled"])
        for _ in advance(run(draw, image_ids)):
            pass
    (root / "classes.txt").write_text("\n".join(scenes.CLASSES) + "\n")
    (root / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write_json(root: Path, split: Split, size: int, drawn: dict[int, Drawn]) -> None:
    things = len(scenes.THING_CLASSES)
    categories: list[dict[str, Any]] = [
        {"id": CATEGORY_IDS[k], "name": name, "supercategory": "thing" if k < things else "stuff"}
        for k, name in enumerate(scenes.CLASSES)
    ]
    extended = [
        {**category, "isthing": int(k < things), "color": list(scenes.COLORS[k])}
        for k, category in enumerate(categories)
    ]
    images = [{"id": k, "file_name": f"{k:06d}.jpg", "height": size, "width": size} for k in drawn]
    common = {"info": {"description": "generated scenes"}, "licenses": [], "images": images}
    instances = {
        "categories": categories[:things],
        "annotations": [annotation for parts in drawn.values() for annotation in parts["instances"]],
    }
    panoptic = {
        "categories": extended,
        "annotations": [
            {"image_id": k, "file_name": f"{k:06d}.png", "segments_info": parts["segments"]}
            for k, parts in drawn.items()
        ],
    }
    for kind, content in (("instances", instances), ("panoptic", panoptic)):
        (root / "annotations" / f"{kind}_{split.coco}.json").write_text(json.dumps(common | content))
