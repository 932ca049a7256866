"""Data sets registered by their name alone: one line of config instead of a registration script.

==================================  =================================================================
name                                files below ROOT
==================================  =================================================================
``folder_semantic@ROOT@SPLIT``      images/SPLIT, annotations/SPLIT (label images), classes.txt
``coco_instance@ROOT@SPLIT``        SPLIT, annotations/instances_SPLIT.json
``coco_panoptic@ROOT@SPLIT``        SPLIT, panoptic_SPLIT, annotations/panoptic_SPLIT.json, and, for the
                                    instance AP of a panoptic model, annotations/instances_SPLIT.json
==================================  =================================================================

A relative ROOT is relative to the working directory, or else to ``DETECTRON2_DATASETS`` (default "datasets").
"""

from __future__ import annotations

import colorsys
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from jepa_plugins.core.images import list_image_files

logger = logging.getLogger(__name__)

IGNORE_LABEL = 255
LABEL_DIVISOR = 1000  # category * divisor + instance, where an evaluator wants one number


def resolve_path(path: str) -> str:
    """Find a path from the working directory or, if it is not there, below ``DETECTRON2_DATASETS``."""
    here = os.path.expanduser(path)
    if os.path.isabs(here) or os.path.exists(here):
        return here
    there = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), here)
    return there if os.path.exists(there) else here


def _require(path: Path, name: str, what: str, remedy: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"Data set '{name}': {what} '{path}' does not exist: {remedy}.")
    return path


def _colours(count: int) -> list[list[int]]:
    """Well separated colours: hues at steps of the golden ratio, in three brightnesses."""
    hues = ((0.618033988749895 * i) % 1.0 for i in range(count))
    values = ((1.0, 0.75, 0.5)[i % 3] for i in range(count))
    pairs = zip(hues, values, strict=True)
    return [[round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, value)] for hue, value in pairs]


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Data set '{name}': '{path}' is no valid json ({error}).") from error
    if not isinstance(content, dict) or not content.get("categories"):
        raise ValueError(f"Data set '{name}': '{path}' has no \"categories\": each needs an id and a name.")
    return content


# --- semantic: a folder of images and a folder of label images ---


def _files_by_stem(folder: Path, name: str) -> dict[str, str]:
    files: dict[str, str] = {}
    for path in list_image_files(folder):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in files:
            raise ValueError(
                f"Data set '{name}': '{files[stem]}' and '{path}' differ in the suffix alone: remove one."
            )
        files[stem] = path
    return files


def _load_semantic(name: str, image_root: Path, label_root: Path) -> list[dict[str, Any]]:
    images, labels = _files_by_stem(image_root, name), _files_by_stem(label_root, name)
    stems = sorted(images.keys() & labels.keys())
    if not stems:
        raise ValueError(
            f"Data set '{name}': no image of '{image_root}' has a label image "
            f"of the same name in '{label_root}'."
        )
    if len(stems) < max(len(images), len(labels)):
        logger.warning(
            "Data set '%s': %d images and %d label images, of which %d belong together and are used",
            name,
            len(images),
            len(labels),
            len(stems),
        )
    return [{"file_name": images[stem], "sem_seg_file_name": labels[stem]} for stem in stems]


def _register_folder_semantic(name: str, root: Path, split: str) -> None:
    layout = "expected ROOT/images/SPLIT, ROOT/annotations/SPLIT and ROOT/classes.txt"
    image_root = _require(root / "images" / split, name, "the image folder", layout)
    label_root = _require(root / "annotations" / split, name, "the folder of label images", layout)
    listing = _require(
        root / "classes.txt", name, "the list of class names", "write one name a line, that of label 0 first"
    )
    classes = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not classes:
        raise ValueError(
            f"Data set '{name}': '{listing}' is empty: write one class name a line, label 0 first."
        )
    DatasetCatalog.register(name, lambda: _load_semantic(name, image_root, label_root))
    MetadataCatalog.get(name).set(
        image_root=str(image_root),
        sem_seg_root=str(label_root),
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
        stuff_classes=classes,
        stuff_colors=_colours(len(classes)),
    )


# --- COCO instances ---


def _register_coco_instance(name: str, root: Path, split: str) -> None:
    layout = "expected ROOT/SPLIT and ROOT/annotations/instances_SPLIT.json"
    image_root = _require(root / split, name, "the image folder", layout)
    annotations = _require(
        root / "annotations" / f"instances_{split}.json", name, "the annotation file", layout
    )
    # In the order of their ids, which is detectron2's contiguous numbering.
    categories = sorted(_read_json(annotations, name)["categories"], key=lambda category: category["id"])
    DatasetCatalog.register(name, lambda: load_coco_json(str(annotations), str(image_root), name))
    MetadataCatalog.get(name).set(
        image_root=str(image_root),
        json_file=str(annotations),
        evaluator_type="coco",
        thing_classes=[category["name"] for category in categories],
        thing_colors=_colours(len(categories)),
        thing_dataset_id_to_contiguous_id={category["id"]: i for i, category in enumerate(categories)},
    )


# --- COCO panoptic ---


def panoptic_metadata(categories: list[dict[str, Any]]) -> dict[str, Any]:
    """Class names, colours and id maps of a panoptic data set, as Mask2Former's registrations have them.

    Things and stuff share one contiguous range, in the order of `categories`. The "stuff" entries cover all
    classes (semantic segmentation knows no difference), the "thing" entries the things alone.
    """
    things = [(i, category) for i, category in enumerate(categories) if category.get("isthing", 1)]
    fallback = _colours(len(categories))
    colours = [list(category.get("color", fallback[i])) for i, category in enumerate(categories)]
    return {
        "thing_classes": [category["name"] for _, category in things],
        "thing_colors": [colours[i] for i, _ in things],
        "stuff_classes": [category["name"] for category in categories],
        "stuff_colors": colours,
        "thing_dataset_id_to_contiguous_id": {category["id"]: i for i, category in things},
        "stuff_dataset_id_to_contiguous_id": {category["id"]: i for i, category in enumerate(categories)},
    }


def _panoptic_segments(annotation: dict[str, Any], metadata: dict[str, Any], name: str) -> list[dict]:
    contiguous = metadata["stuff_dataset_id_to_contiguous_id"]
    things = metadata["thing_dataset_id_to_contiguous_id"]
    segments = []
    for segment in annotation["segments_info"]:
        category = segment["category_id"]
        if category not in contiguous:
            raise ValueError(
                f"Data set '{name}': a segment of '{annotation['file_name']}' has category {category}, "
                'which "categories" of the panoptic json does not list.'
            )
        segments.append(
            {
                **segment,
                "iscrowd": segment.get("iscrowd", 0),
                "category_id": contiguous[category],
                "isthing": category in things,
            }
        )
    return segments


def _load_panoptic(
    name: str, image_root: Path, label_root: Path, annotations: Path, metadata: dict[str, Any]
) -> list[dict[str, Any]]:
    content = _read_json(annotations, name)
    images = {image["id"]: image["file_name"] for image in content.get("images", [])}
    records = []
    for annotation in content["annotations"]:
        image_name = images.get(annotation["image_id"], f"{Path(annotation['file_name']).stem}.jpg")
        records.append(
            {
                "file_name": str(image_root / image_name),
                "image_id": annotation["image_id"],
                "pan_seg_file_name": str(label_root / annotation["file_name"]),
                "segments_info": _panoptic_segments(annotation, metadata, name),
            }
        )
    if not records:
        raise ValueError(f"Data set '{name}': '{annotations}' has no annotations.")
    for key in ("file_name", "pan_seg_file_name"):
        _require(
            Path(records[0][key]), name, "the file", f"'{annotations}' and the folders beside it do not match"
        )
    return records


def _register_coco_panoptic(name: str, root: Path, split: str) -> None:
    layout = "expected ROOT/SPLIT, ROOT/panoptic_SPLIT and ROOT/annotations/panoptic_SPLIT.json"
    image_root = _require(root / split, name, "the image folder", layout)
    label_root = _require(root / f"panoptic_{split}", name, "the folder of panoptic label images", layout)
    annotations = _require(
        root / "annotations" / f"panoptic_{split}.json", name, "the annotation file", layout
    )
    metadata = panoptic_metadata(_read_json(annotations, name)["categories"])
    DatasetCatalog.register(name, lambda: _load_panoptic(name, image_root, label_root, annotations, metadata))
    MetadataCatalog.get(name).set(
        image_root=str(image_root),
        panoptic_root=str(label_root),
        panoptic_json=str(annotations),
        evaluator_type="coco_panoptic_seg",
        ignore_label=IGNORE_LABEL,
        label_divisor=LABEL_DIVISOR,
        **metadata,
    )
    instances = root / "annotations" / f"instances_{split}.json"
    if instances.is_file():
        MetadataCatalog.get(name).set(json_file=str(instances))


SCHEMES: dict[str, Callable[[str, Path, str], None]] = {
    "folder_semantic": _register_folder_semantic,
    "coco_instance": _register_coco_instance,
    "coco_panoptic": _register_coco_panoptic,
}


# Names that the published Mask2Former registers and detectron2 does not; ours derives the semantic truth.
ALIASES = {
    f"coco_2017_{split}_panoptic_with_sem_seg": f"coco_panoptic@coco@{split}2017"
    for split in ("train", "val")
}


def ensure_registered(names: str | Iterable[str]) -> None:
    """Register every name that follows a scheme of this module and is not registered yet.

    Raises:
        ValueError: a name is neither registered nor of the form SCHEME@ROOT@SPLIT, or its files are wrong.
        FileNotFoundError: files are missing.
    """
    for name in [names] if isinstance(names, str) else names:
        if name in DatasetCatalog:
            continue
        scheme, _, place = ALIASES.get(name, name).partition("@")
        root, _, split = place.rpartition("@")
        if scheme not in SCHEMES or not root or not split:
            raise ValueError(
                f"Data set '{name}' is not registered: register it, or use a name of the form "
                f"SCHEME@ROOT@SPLIT with SCHEME one of {', '.join(SCHEMES)}."
            )
        SCHEMES[scheme](name, Path(resolve_path(root)), split)


def num_classes(name: str) -> int:
    """Number of classes that a model needs for a registered data set."""
    metadata = MetadataCatalog.get(name)
    if not (metadata.get("stuff_classes") or metadata.get("thing_classes")):
        DatasetCatalog.get(name)  # detectron2's own COCO registrations learn their classes while loading
    if metadata.get("evaluator_type") in ("coco", "lvis", "cityscapes_instance"):
        return len(metadata.thing_classes)
    return len(metadata.get("stuff_classes") or metadata.thing_classes)


def check_num_classes(cfg: CfgNode, name: str) -> None:
    """Raise ValueError unless ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` is the data set's number of classes."""
    ensure_registered(name)
    configured, present = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, num_classes(name)
    if configured != present:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {configured}, but data set '{name}' has {present} classes: "
            f"set it to {present}."
        )
