"""ADE20K as detectron2 and Mask2Former read it, from the unpacked downloads.

Below the folder ADEChallengeData2016:

semantic    annotations_detectron2/{training,validation}: classes 0 to 149, 255 for "other objects"
panoptic    ade20k_panoptic_{train,val} and their .json: 150 classes, of which 100 are things
instance    ade20k_instance_{train,val}.json: the 100 things, with their numbers among the 150

The last two need annotations_instance of the challenge of 2017: 8-bit images [H, W, 3] with the class among the
100 things (from 1, in the order of the 150) in R and the object's number in G; 0 is no object. Category ids, areas
and boxes are those of Mask2Former's files: a stuff segment counts the pixels that a thing covers, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import DataError
from .classes import categories, ids_of
from .running import Journal, is_whole, read_json, run_all, work_off, write_json, write_png

TASKS = ("semantic", "panoptic", "instance")
SPLITS = {"train": "training", "val": "validation"}
UNPACK = "unpack ADEChallengeData2016.zip and name its folder"
UNPACK_INSTANCES = (
    "unpack annotations_instance.tar of the challenge of 2017 in it, or give --tasks semantic for the semantic "
    "labels alone"
)
# Modulo 2^24 an odd step visits every id; its bytes are small, so that objects of a class have similar colours.
COLOUR_STEP = 7 + 13 * 256 + 5 * 65536


def things() -> list[int]:
    """Of each of the 100 things, in the order of annotations_instance, its number among the 150 classes."""
    return ids_of("ade20k", 1)


def prepare(out: Path, tasks: Sequence[str], workers: int) -> None:
    """Make what is not there yet.

    Args:
        out: the unpacked folder ADEChallengeData2016. tasks: of `TASKS`.

    Raises:
        DataError: downloads are missing or damaged.
    """
    if "semantic" in tasks:
        shift_labels(out, workers)
    for split in SPLITS:
        if "panoptic" in tasks:
            make_panoptic(out, split, workers)
        if "instance" in tasks:
            make_instances(out, split, workers)


def _names(folder: Path, suffix: str, remedy: str) -> list[str]:
    """File names without suffix, sorted."""
    found = sorted(path.stem for path in folder.glob(f"*{suffix}"))
    if not found:
        kind = "label images" if suffix == ".png" else "images"
        raise DataError(f"{folder} holds no {kind}; {remedy}.")
    return found


def _labels(path: Path, channels: int, remedy: str) -> np.ndarray:
    """An 8-bit label image, uint8 [H, W] or [H, W, 3]."""
    try:
        labels = np.asarray(Image.open(path))
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}.") from error
    if labels.dtype != np.uint8 or (labels.shape[2] if labels.ndim == 3 else 1) != channels:
        raise DataError(f"{path} is no 8-bit label image of {channels} channel(s); {remedy}.")
    return labels


# --- semantic ---


def shift_labels(out: Path, workers: int) -> None:
    """Shift the labels so that classes are 0 to 149 and "other objects" (0) becomes 255, which is ignored.

    Args:
        out: the unpacked folder ADEChallengeData2016.

    Raises:
        DataError: there are no labels, or they are no 8-bit images.
    """
    for folder in SPLITS.values():
        source, target = out / "annotations" / folder, out / "annotations_detectron2" / folder
        names = _names(source, ".png", UNPACK)
        target.mkdir(parents=True, exist_ok=True)
        missing = [name for name in names if not is_whole(target / f"{name}.png")]
        work_off(f"labels of {folder}", partial(_shift, source, target), missing, workers)
        print(f"{target}: {len(names)} label images")


def _shift(source: Path, target: Path, name: str) -> None:
    labels = _labels(source / f"{name}.png", 1, "unpack ADEChallengeData2016.zip again")
    write_png(target / f"{name}.png", labels - np.uint8(1))  # 0 wraps to 255


# --- panoptic ---


def make_panoptic(out: Path, split: str, workers: int) -> None:
    """Write ade20k_panoptic_{split} and its .json; images whose label image and entry are there are left out.

    Raises:
        DataError: downloads are missing or damaged.
    """
    target, folder = out / f"ade20k_panoptic_{split}.json", out / f"ade20k_panoptic_{split}"
    names = _names(out / "images" / SPLITS[split], ".jpg", UNPACK)
    folder.mkdir(exist_ok=True)
    journal = Journal(target)
    known = {**_entries(target, "segments_info"), **journal.read()}
    missing = [name for name in names if name not in known or not is_whole(folder / f"{name}.png")]
    if missing or not is_whole(target):
        found = run_all(f"panoptic {split}", partial(_panoptic, out, split), missing, workers)
        journal.collect(known, missing, found)
        entries = {name: known[name] for name in names}
        annotations = [
            {"image_id": name, "file_name": f"{name}.png", "segments_info": segments}
            for name, (_, segments) in entries.items()
        ]
        images = [image for image, _ in entries.values()]
        write_json(target, {"images": images, "annotations": annotations, "categories": categories("ade20k")})
    journal.remove()
    print(f"{target}: {len(names)} images")


def _entries(path: Path, key: str) -> dict[str, Any]:
    """What a json file that is there says of each image: {name: (image, segments or objects)}."""
    if not is_whole(path):
        return {}
    content = read_json(path, "remove it and run the command again")
    found: dict[str, Any] = {image["id"]: (image, []) for image in content["images"]}
    for annotation in content["annotations"]:
        entry = found[annotation["image_id"]][1]
        if key == "segments_info":
            entry.extend(annotation[key])
        else:
            entry.append(annotation)
    return found


def _panoptic(out: Path, split: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the label image; the image's entry and its segments."""
    image, number, label = _objects(out, split, name)
    place = out / "annotations" / SPLITS[split] / f"{name}.png"
    semantic = _labels(place, 1, "unpack ADEChallengeData2016.zip again")
    _same_size(semantic, image, place)
    ids, taken, segments = np.zeros(semantic.shape, dtype=np.int64), {0}, []
    stuff = (int(value) - 1 for value in np.unique(semantic) if value)
    masks = [(k, semantic == k + 1) for k in stuff if k < 150 and not categories("ade20k")[k]["isthing"]]
    masks += [(label[k], number == k) for k in label]  # after the stuff, whose pixels they take
    for category, mask in masks:
        segment = _free_id(categories("ade20k")[category]["color"], taken)
        ids[mask] = segment
        segments.append({"id": segment, "category_id": category, **extent(mask), "iscrowd": 0})
    pixels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=2).astype(np.uint8)
    write_png(out / f"ade20k_panoptic_{split}" / f"{name}.png", pixels)
    return image, segments


def _free_id(colour: Sequence[int], taken: set[int]) -> int:
    """The id whose bytes are a class's colour, or the next one that is free; it is taken then."""
    segment = colour[0] + 256 * colour[1] + 65536 * colour[2]
    while segment in taken:
        segment = (segment + COLOUR_STEP) % (1 << 24)
    taken.add(segment)
    return segment


def extent(mask: np.ndarray) -> dict[str, Any]:
    """Number of pixels and box (x, y, width, height) of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]
    return {"area": int(mask.sum()), "bbox": box}


def _objects(out: Path, split: str, name: str) -> tuple[dict[str, Any], np.ndarray, dict[int, int]]:
    """An image's entry, the number of the object at each pixel [H, W], and the objects' classes by number."""
    picture = out / "images" / SPLITS[split] / f"{name}.jpg"
    try:
        with Image.open(picture) as opened:
            width, height = opened.size
    except OSError as error:
        raise DataError(
            f"{picture} cannot be read ({error}); unpack ADEChallengeData2016.zip again."
        ) from error
    image = {"id": name, "file_name": f"{name}.jpg", "width": width, "height": height}
    path = out / "annotations_instance" / SPLITS[split] / f"{name}.png"
    if not path.exists():
        raise DataError(f"{path} does not exist; {UNPACK_INSTANCES}.")
    pixels = _labels(path, 3, "unpack annotations_instance.tar again")
    _same_size(pixels, image, path)
    number, label = pixels[..., 1], {}
    for k in np.unique(number[number > 0]).tolist():
        present = np.unique(pixels[..., 0][number == k]).tolist()
        if len(present) > 1 or not 1 <= present[0] <= len(things()):
            raise DataError(f"{path}: object {k} has class {present}; unpack annotations_instance.tar again.")
        label[k] = things()[present[0] - 1]
    return image, number, label


def _same_size(labels: np.ndarray, image: dict[str, Any], path: Path) -> None:
    if labels.shape[:2] != (image["height"], image["width"]):
        raise DataError(f"{path} has another size than its image {image['file_name']}; unpack both again.")


# --- instance ---


def make_instances(out: Path, split: str, workers: int) -> None:
    """Write ade20k_instance_{split}.json; images that it or an interrupted run knows are left out.

    Raises:
        DataError: downloads or pycocotools are missing, or damaged.
    """
    target = out / f"ade20k_instance_{split}.json"
    names = _names(out / "images" / SPLITS[split], ".jpg", UNPACK)
    journal = Journal(target)
    known = {**_entries(target, "annotations"), **journal.read()}
    missing = [name for name in names if name not in known]
    if missing or not is_whole(target):
        found = run_all(f"instances {split}", partial(_instances, out, split), missing, workers)
        journal.collect(known, missing, found)
        entries = [known[name] for name in names]
        annotations = [annotation for _, annotations in entries for annotation in annotations]
        content = {
            "images": [image for image, _ in entries],
            "categories": [{k: categories("ade20k")[i][k] for k in ("id", "name")} for i in things()],
            "annotations": [{**annotation, "id": k} for k, annotation in enumerate(annotations, start=1)],
        }
        write_json(target, content)
    journal.remove()
    print(f"{target}: {len(names)} images")


def _instances(out: Path, split: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The image's entry and its objects."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise DataError("instances need the package pycocotools: pip install pycocotools.") from error
    image, number, label = _objects(out, split, name)
    annotations = []
    for k, category in label.items():
        mask = number == k
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        outline = {"size": code["size"], "counts": code["counts"].decode("ascii")}
        common = {"image_id": name, "category_id": category, "iscrowd": 0, "segmentation": outline}
        annotations.append({**common, **extent(mask)})
    return image, annotations
