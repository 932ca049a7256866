"""Tiny generated trees in the published layouts of ADE20K, Cityscapes, COCO and ImageNet.

They stand in for the data sets wherever a run needs files of their names, classes and formats, and nothing is to be
learned. Below the output folder lie ADEChallengeData2016, cityscapes, coco and imagenet as downloaded, of generated
scenes (``jepa_plugins.core.scenes``), and what the commands of this tool make of them. A few pixels of each label
image are of no class. The scenes' eight shapes and four textures are eight things and four kinds of stuff of each
data set, always the same.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jepa_plugins.core import scenes

from . import DataError, ade20k, cityscapes, coco, imagenet, low_data
from .classes import categories, ids_of
from .running import already_there, replace_folder
from .synthetic import encode_panoptic, panoptic_ids

SETS = ("ade20k", "cityscapes", "coco", "imagenet")
SPLITS = ("train", "val")
MARGIN = 2  # pixels of no class at the left edge
THINGS = len(scenes.THING_CLASSES)
MOST = 9_999  # images of a split

# Classes of the scenes' shapes, then of their textures.
ADE20K = [ids_of("ade20k", 1)[12 * k + 7] for k in range(THINGS)] + [
    ids_of("ade20k", 0)[12 * k] for k in range(4)
]
COCO = [ids_of("coco", 1)[9 * k] for k in range(THINGS)] + [ids_of("coco", 0)[13 * k] for k in range(4)]
CITYSCAPES = [
    *("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
    *("road", "building", "vegetation", "sky"),
]
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau")}
IMAGENET = ("n01440764", "n02102040", "n02979186")


def make_stand_ins(
    out: Path, images: int, size: int, seed: int, sets: Sequence[str], workers: int, overwrite: bool
) -> bool:
    """Write the trees; False if they were already there.

    Args:
        out: absent, empty, or what this wrote before.
        images: of each split. size: shorter side of an image in pixels. sets: of `SETS`.

    Raises:
        DataError: impossible numbers, an ``out`` that holds something else, or a package that is missing.
    """
    limits = {
        "--images": (images, 1, MOST),
        "--size": (size, scenes.MIN_SIZE, 4096),
        "--seed": (seed, 0, 2**63 - 1),
    }
    for option, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise DataError(f"{option} is {value}: give a number from {low} to {high}.")
    meta = {"generator": "stand-ins", "version": 1, "scenes": scenes.VERSION, "seed": seed}
    meta |= {"images": images, "size": size, "sets": sorted(sets)}
    out = out.resolve()
    if already_there(out, meta, overwrite):
        return False
    partial_folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)  # Left by a run that was interrupted.
    partial_folder.mkdir(parents=True)
    makers: dict[str, Callable[[Path, Pictures, int], None]] = {
        "ade20k": _ade20k,
        "cityscapes": _cityscapes,
        "coco": _coco,
        "imagenet": _imagenet,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it is done before the commands' lines can be read
        for number, name in enumerate(SETS):
            if name in sets:
                makers[name](partial_folder, Pictures(seed, number, images, size), workers)
    (partial_folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    replace_folder(partial_folder, out)
    return True


class Pictures:
    """The scenes of one data set, which do not depend on the other sets or on the number of images."""

    def __init__(self, seed: int, number: int, count: int, size: int) -> None:
        self.seed, self.first, self.count, self.size = seed, number * 10 * (MOST + 1), count, size

    def scene(self, split: str, k: int, wide: tuple[int, int] = (4, 3)) -> scenes.Scene:
        """Scene ``k`` of a split, ``wide`` (width to height), with void pixels (segment 0) at its left edge."""
        index = self.first + SPLITS.index(split) * 4 * (MOST + 1) + k  # room for three classes
        scene = scenes.make_scene(self.seed, index, (self.size, self.size * wide[0] // wide[1]))
        scene.segments[:, :MARGIN] = 0
        seen = set(np.unique(scene.segments).tolist())
        return scenes.Scene(scene.image, scene.segments, [info for info in scene.infos if info.id in seen])


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(image).save(path, **options)


def _lookup(scene: scenes.Scene, values: Sequence[int]) -> np.ndarray:
    """A map from segments to a value each, 0 for void: int64 [H, W]."""
    table = np.zeros(max((info.id for info in scene.infos), default=0) + 1, dtype=np.int64)
    table[[info.id for info in scene.infos]] = values
    return table[scene.segments]


# --- ADE20K ---


def _ade20k(root: Path, pictures: Pictures, workers: int) -> None:
    root = root / "ADEChallengeData2016"
    for split, folder in ade20k.SPLITS.items():
        for k in range(pictures.count):
            scene, name = pictures.scene(split, k), f"ADE_{split}_{k + 1:08d}"
            _save(scene.image, root / "images" / folder / f"{name}.jpg")
            labels = _lookup(scene, [ADE20K[info.class_id] + 1 for info in scene.infos])
            _save(labels.astype(np.uint8), root / "annotations" / folder / f"{name}.png")
            objects = [info for info in scene.infos if info.isthing]
            numbers = {info.id: number for number, info in enumerate(objects, start=1)}
            label = {info.id: ade20k.things().index(ADE20K[info.class_id]) + 1 for info in objects}
            pixels = [
                _lookup(scene, [part.get(info.id, 0) for info in scene.infos]) for part in (label, numbers)
            ]
            pixels.append(np.zeros_like(pixels[0]))
            _save(
                np.stack(pixels, 2).astype(np.uint8), root / "annotations_instance" / folder / f"{name}.png"
            )
    ade20k.prepare(root, ade20k.TASKS, workers)
    low_data.write_lists(root)


# --- outlines ---


def _hull(mask: np.ndarray, corners: bool) -> list[list[int]]:
    """The convex polygon round a mask: (x, y) of pixels, or of their corners."""
    rows = np.flatnonzero(mask.any(axis=1))
    left, right = mask[rows].argmax(axis=1), mask.shape[1] - 1 - mask[rows, ::-1].argmax(axis=1)
    points = {(int(x), int(y)) for ends in (left, right) for x, y in zip(ends, rows, strict=True)}
    if corners:
        points = {(x + i, y + j) for x, y in points for i in (0, 1) for j in (0, 1)}
    ordered = sorted(points)
    lower, upper = _chain(ordered), _chain(ordered[::-1])
    return [list(point) for point in lower[:-1] + upper[:-1]]


def _chain(points: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """One side of a convex hull (Andrew's monotone chain)."""
    kept: list[tuple[int, int]] = []
    for x, y in points:
        while len(kept) > 1:
            (a, b), (c, d) = kept[-2:]
            if (c - a) * (y - b) - (d - b) * (x - a) > 0:
                break
            kept.pop()
        kept.append((x, y))
    return kept


# --- Cityscapes ---


def _cityscapes(root: Path, pictures: Pictures, workers: int) -> None:
    root = root / "cityscapes"
    for split in SPLITS:
        for k in range(pictures.count):
            city = CITIES[split][k % 2]
            scene, stem = pictures.scene(split, k, (2, 1)), f"{city}_{k:06d}_000019"
            _save(scene.image, root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
            height, width = scene.segments.shape
            frame = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
            stuff = [info for info in scene.infos if not info.isthing]
            objects = [{"label": CITYSCAPES[stuff[0].class_id], "polygon": frame}] if stuff else []
            # Things cover the stuff, and the nearest, which come last, cover the others.
            for info in (*stuff[1:], *(info for info in scene.infos if info.isthing)):
                outline = _hull(scene.segments == info.id, corners=False)
                objects.append({"label": CITYSCAPES[info.class_id], "polygon": outline})
            edge = [[0, 0], [MARGIN - 1, 0], [MARGIN - 1, height - 1], [0, height - 1]]
            objects.append({"label": "static", "polygon": edge})
            path = root / "gtFine" / split / city / f"{stem}_gtFine_polygons.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"imgHeight": height, "imgWidth": width, "objects": objects}))
    cityscapes.prepare(root, workers)


# --- COCO ---


def _coco(root: Path, pictures: Pictures, workers: int) -> None:
    root = root / "coco"
    (root / "annotations").mkdir(parents=True)
    kinds = [{k: c[k] for k in ("id", "name", "isthing", "color")} for c in categories("coco")]
    things = [{k: c[k] for k in ("id", "name")} for c in kinds if c["isthing"]]
    for split in SPLITS:
        images, panoptic, instances = [], [], []
        for k in range(pictures.count):
            scene, number = pictures.scene(split, k), SPLITS.index(split) * (MOST + 1) + k + 1
            name = f"{number:012d}"
            _save(scene.image, root / f"{split}2017" / f"{name}.jpg")
            ids = panoptic_ids(number, len(scene.infos))[1:].tolist()
            pixels = encode_panoptic(_lookup(scene, ids))
            _save(pixels, root / f"panoptic_{split}2017" / f"{name}.png")
            segments, objects = _coco_annotations(scene, number, ids)
            height, width = scene.segments.shape
            images.append({"id": number, "file_name": f"{name}.jpg", "height": height, "width": width})
            panoptic.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
            instances.extend(objects)
        common = {"info": {"description": "generated scenes"}, "licenses": [], "images": images}
        for kind, entries, classes in (("panoptic", panoptic, kinds), ("instances", instances, things)):
            content = {**common, "annotations": entries, "categories": classes}
            (root / "annotations" / f"{kind}_{split}2017.json").write_text(json.dumps(content))
    coco.prepare(root, workers)


def _coco_annotations(scene: scenes.Scene, number: int, ids: Sequence[int]) -> tuple[list[dict], list[dict]]:
    """Segments and objects; the last of at least three things is a crowd, outlined by a run-length code."""
    segments, objects = [], []
    things = [info.id for info in scene.infos if info.isthing]
    crowd = things[-1] if len(things) > 2 else 0
    for segment, info in zip(ids, scene.infos, strict=True):
        mask = scene.segments == info.id
        common: dict[str, Any] = {"category_id": COCO[info.class_id], **ade20k.extent(mask)}
        common["iscrowd"] = int(info.id == crowd)
        segments.append({"id": segment, **common})
        if info.isthing:
            outline = [[float(v) for point in _hull(mask, corners=True) for v in point]]
            code = {"size": list(mask.shape), "counts": _runs(mask)} if common["iscrowd"] else outline
            objects.append({"id": number * 100 + info.id, "image_id": number, "segmentation": code, **common})
    return segments, objects


def _runs(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run-length code: lengths of 0, 1, 0 ... down the columns."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()


# --- ImageNet ---


def _imagenet(root: Path, pictures: Pictures, workers: int) -> None:
    """Folders of three classes, through archives as they are published."""
    raw = root / ".imagenet"
    raw.mkdir()
    classes = IMAGENET

    def images_of(c: int) -> Iterator[tuple[str, bytes]]:
        for k in range(pictures.count):
            yield f"{classes[c]}_{k}.JPEG", _jpeg(pictures.scene("train", k * len(classes) + c))

    train = [(f"{name}.tar", _tar(images_of(c))) for c, name in enumerate(classes)]
    count = max(pictures.count, len(classes))
    val = [(f"ILSVRC2012_val_{k + 1:08d}.JPEG", _jpeg(pictures.scene("val", k))) for k in range(count)]
    (raw / "train.tar").write_bytes(_tar(train))
    (raw / "val.tar").write_bytes(_tar(val))
    (raw / "labels.txt").write_text("".join(f"{classes[k % len(classes)]}\n" for k in range(count)))
    wanted = imagenet.requests(raw / "train.tar", raw / "val.tar", raw / "labels.txt")
    imagenet.prepare(root / "imagenet", wanted, None, workers)
    shutil.rmtree(raw)


def _jpeg(scene: scenes.Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, format="JPEG", quality=95)
    return file.getvalue()


def _tar(files: Iterable[tuple[str, bytes]]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()
