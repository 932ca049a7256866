"""COCO's semantic label images of its panoptic ones, as Mask2Former reads them.

From annotations/panoptic_{train,val}2017.json and panoptic_{train,val}2017 become panoptic_semseg_{train,val}2017:
the 133 classes from 0 in the order of their ids, 255 where there is no segment.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import DataError
from .running import is_whole, read_json, work_off, write_png

SPLITS = ("train", "val")
IGNORED = 255


def prepare(out: Path, workers: int) -> None:
    """Make the label images that are not there yet.

    Args:
        out: the folder coco.

    Raises:
        DataError: the panoptic annotations are missing or damaged.
    """
    present = [s for s in SPLITS if (out / "annotations" / f"panoptic_{s}2017.json").exists()]
    if not present:
        raise DataError(
            f"{out / 'annotations'} holds no panoptic_train2017.json and no panoptic_val2017.json; unpack "
            "panoptic_annotations_trainval2017.zip and the two zip files that it holds in the folder coco."
        )
    for split in present:
        make_semantic(out, split, workers)


def make_semantic(out: Path, split: str, workers: int) -> None:
    """Write panoptic_semseg_{split}2017.

    Raises:
        DataError: the json or a panoptic label image is missing or damaged.
    """
    path = out / "annotations" / f"panoptic_{split}2017.json"
    content = read_json(path, "unpack panoptic_annotations_trainval2017.zip again")
    ordered = sorted(category["id"] for category in content["categories"])
    contiguous = {category: i for i, category in enumerate(ordered)}
    target = out / f"panoptic_semseg_{split}2017"
    target.mkdir(exist_ok=True)
    missing = [entry for entry in content["annotations"] if not is_whole(target / entry["file_name"])]
    source = out / f"panoptic_{split}2017"
    work_off(f"labels of {split}2017", partial(_semantic, source, target, contiguous), missing, workers)
    print(f"{target}: {len(content['annotations'])} label images")


def _semantic(source: Path, target: Path, contiguous: dict[int, int], entry: dict[str, Any]) -> None:
    path = source / entry["file_name"]
    try:
        colours = np.asarray(Image.open(path).convert("RGB")).astype(np.int64)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read ({error}); unpack {source.name}.zip again.") from error
    ids = colours @ [1, 256, 65536]
    labels = np.full(ids.shape, IGNORED, dtype=np.uint8)
    for segment in entry["segments_info"]:
        labels[ids == segment["id"]] = contiguous[segment["category_id"]]
    write_png(target / entry["file_name"], labels)
