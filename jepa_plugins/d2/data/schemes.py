"""Data sets registered by their name alone: one line of config instead of a registration script.

==================================  =================================================================
name                                files below ROOT
==================================  =================================================================
``folder_semantic@ROOT@SPLIT``      images/SPLIT, annotations/SPLIT (label images), classes.txt
``coco_instance@ROOT@SPLIT``        SPLIT, annotations/instances_SPLIT.json
``coco_panoptic@ROOT@SPLIT``        SPLIT, panoptic_SPLIT, annotations/panoptic_SPLIT.json, and, for the
                                    instance AP of a panoptic model, annotations/instances_SPLIT.json
==================================  =================================================================

`coco_panoptic` serves semantic segmentation, too: its panoptic labels say the class of each pixel. The data sets of
the published Mask2Former keep their published names, see `builtin`. A relative ROOT is relative to the working
directory, or else to ``DETECTRON2_DATASETS`` (default "datasets").
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from jepa_plugins.core.labelled import (
    FOLDER_SCHEME,
    IGNORE_LABEL,
    SemanticFolder,
    require_path,
    resolve_path,
    split_name,
)
from jepa_plugins.core.labelled import data_root as data_root  # of the other modules here

LABEL_DIVISOR = 1000  # category * divisor + instance, where an evaluator wants one number


def remedy_for(name: str) -> str:
    """What to do when files of a data set are missing."""
    if "@" in name:
        return "correct ROOT or SPLIT in its name"
    return (
        "'python tools/prepare_data.py check' lists what the known data sets need; set DETECTRON2_DATASETS to the "
        "folder that holds them"
    )


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


def _register_folder_semantic(name: str, root: Path, split: str) -> None:
    folder = SemanticFolder.find(name, root, split)

    def records() -> list[dict[str, Any]]:
        return [{"file_name": image, "sem_seg_file_name": label} for image, label in folder.pairs()]

    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).set(
        image_root=str(folder.images),
        sem_seg_root=str(folder.labels),
        evaluator_type="sem_seg",
        ignore_label=IGNORE_LABEL,
        stuff_classes=list(folder.classes),
        stuff_colors=_colours(len(folder.classes)),
    )


# --- COCO instances ---


def _register_coco_instance(name: str, root: Path, split: str) -> None:
    layout = "expected ROOT/SPLIT and ROOT/annotations/instances_SPLIT.json"
    image_root = require_path(root / split, name, "the image folder", layout)
    annotations = require_path(
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


@dataclass(frozen=True)
class PanopticFiles:
    """Where a panoptic data set lies.

    Attributes:
        images: folder of images.
        labels: folder of panoptic label images.
        annotations: COCO's panoptic json.
        instances: COCO's instances json, for the AP of a panoptic model, if there is one.
        semantic: folder of label images, if there is one; else the panoptic labels say the class of a pixel.
    """

    images: Path
    labels: Path
    annotations: Path
    instances: Path | None = None
    semantic: Path | None = None


def _load_panoptic(name: str, files: PanopticFiles, metadata: dict[str, Any]) -> list[dict[str, Any]]:
    content = _read_json(require_path(files.annotations, name, "the annotation file", remedy_for(name)), name)
    images = {image["id"]: image["file_name"] for image in content.get("images", [])}
    semantic = files.semantic if files.semantic and files.semantic.is_dir() else None
    records = []
    for annotation in content["annotations"]:
        label_name = annotation["file_name"]
        image_name = images.get(annotation["image_id"], f"{Path(label_name).stem}.jpg")
        record = {
            "file_name": str(files.images / image_name),
            "image_id": annotation["image_id"],
            "pan_seg_file_name": str(files.labels / label_name),
            "segments_info": _panoptic_segments(annotation, metadata, name),
        }
        if semantic:
            record["sem_seg_file_name"] = str(semantic / label_name)
        records.append(record)
    if not records:
        raise ValueError(f"Data set '{name}': '{files.annotations}' has no annotations.")
    for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name"):
        if key in records[0]:
            remedy = f"'{files.annotations}' and the folders beside it do not match"
            require_path(Path(records[0][key]), name, "the file", remedy)
    return records


def register_panoptic(
    name: str, files: PanopticFiles, metadata: dict[str, Any], evaluator_type: str = "coco_panoptic_seg"
) -> None:
    """Register a panoptic data set in COCO's format; its files are read when its records are asked for.

    Args:
        name: not registered yet.
        metadata: from `panoptic_metadata`.
        evaluator_type: which evaluators `build_evaluator` gives it.
    """
    DatasetCatalog.register(name, lambda: _load_panoptic(name, files, metadata))
    MetadataCatalog.get(name).set(
        image_root=str(files.images),
        panoptic_root=str(files.labels),
        panoptic_json=str(files.annotations),
        evaluator_type=evaluator_type,
        ignore_label=IGNORE_LABEL,
        label_divisor=LABEL_DIVISOR,
        **({"json_file": str(files.instances)} if files.instances else {}),
        **metadata,
    )


def _register_coco_panoptic(name: str, root: Path, split: str) -> None:
    layout = "expected ROOT/SPLIT, ROOT/panoptic_SPLIT and ROOT/annotations/panoptic_SPLIT.json"
    annotations = root / "annotations" / f"panoptic_{split}.json"
    instances = root / "annotations" / f"instances_{split}.json"
    files = PanopticFiles(
        require_path(root / split, name, "the image folder", layout),
        require_path(root / f"panoptic_{split}", name, "the folder of panoptic label images", layout),
        require_path(annotations, name, "the annotation file", layout),
        instances if instances.is_file() else None,
    )
    register_panoptic(name, files, panoptic_metadata(_read_json(annotations, name)["categories"]))


SCHEMES: dict[str, Callable[[str, Path, str], None]] = {
    FOLDER_SCHEME: _register_folder_semantic,
    "coco_instance": _register_coco_instance,
    "coco_panoptic": _register_coco_panoptic,
}


def register_by_scheme(name: str) -> None:
    """Register a name SCHEME@ROOT@SPLIT.

    Raises:
        ValueError: a name of another form, or wrong files. FileNotFoundError: files are missing.
    """
    scheme, root, split = split_name(name)
    if scheme not in SCHEMES or not root or not split:
        raise ValueError(
            f"Data set '{name}' is not registered: register it, or use a name of the form "
            f"SCHEME@ROOT@SPLIT with SCHEME one of {', '.join(SCHEMES)}."
        )
    SCHEMES[scheme](name, Path(resolve_path(root)), split)
