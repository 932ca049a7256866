"""The data sets that Mask2Former's users know by name and detectron2 does not register, below DETECTRON2_DATASETS.

=============================================  ===========================================================
name                                           files
=============================================  ===========================================================
ade20k_panoptic_{train,val}                    ADEChallengeData2016/images/{training,validation},
                                               ade20k_panoptic_{train,val}{,.json} and, where they are there,
                                               annotations_detectron2 and ade20k_instance_{train,val}.json
ade20k_instance_{train,val}                    ADEChallengeData2016/images/{training,validation} and
                                               ade20k_instance_{train,val}.json
coco_2017_{train,val}_panoptic_with_sem_seg    coco/{train,val}2017, panoptic_{train,val}2017,
                                               annotations/{panoptic,instances}_{train,val}2017.json and, where it
                                               is there, panoptic_semseg_{train,val}2017
ade20k_{sem_seg,panoptic,instance}_train_Kpct  the same K % (1, 2, 5 or 10) of the training images for all three
=============================================  ===========================================================

A name that somebody else has registered stays theirs. Where the published package is installed it registers the
names itself and refuses any that exist, so ours wait until a configuration asks for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from jepa_plugins.core.subsets import LOW_DATA_PERCENT
from jepa_plugins.d2.registration import published_packages

from .schemes import PanopticFiles, data_root, panoptic_metadata, register_panoptic, remedy_for, require_path
from .shares import Share, register_share

ADE20K_SPLITS = {"train": "training", "val": "validation"}


@cache
def ade20k_categories() -> list[dict[str, Any]]:
    """ADE20K's 150 classes as a panoptic json has them: id (from 0), name, isthing, color; 100 are things."""
    return json.loads((Path(__file__).parent / "classes" / "ade20k.json").read_text(encoding="utf-8"))


def _ade20k_files(split: str) -> PanopticFiles:
    root = data_root() / "ADEChallengeData2016"
    return PanopticFiles(
        images=root / "images" / ADE20K_SPLITS[split],
        labels=root / f"ade20k_panoptic_{split}",
        annotations=root / f"ade20k_panoptic_{split}.json",
        instances=root / f"ade20k_instance_{split}.json",
        semantic=root / "annotations_detectron2" / ADE20K_SPLITS[split],
    )


def _coco_files(split: str) -> PanopticFiles:
    root = data_root() / "coco"
    return PanopticFiles(
        images=root / f"{split}2017",
        labels=root / f"panoptic_{split}2017",
        annotations=root / "annotations" / f"panoptic_{split}2017.json",
        instances=root / "annotations" / f"instances_{split}2017.json",
        semantic=root / f"panoptic_semseg_{split}2017",
    )


def _load_instances(name: str, files: PanopticFiles, contiguous: dict[int, int]) -> list[dict[str, Any]]:
    """detectron2's records of a COCO json; `contiguous` numbers the classes, whatever the json calls them."""
    annotations = require_path(files.instances, name, "the annotation file", remedy_for(name))
    records = load_coco_json(str(annotations), str(files.images))
    for record in records:
        for annotation in record["annotations"]:
            category = annotation["category_id"]
            if category not in contiguous:
                raise ValueError(
                    f"Data set '{name}': '{annotations}' has an object of category {category}, which is none of "
                    f"its {len(contiguous)} things: convert the data set again."
                )
            annotation["category_id"] = contiguous[category]
    return records


def _register_ade20k_panoptic(name: str, split: str) -> None:
    register_panoptic(
        name, _ade20k_files(split), panoptic_metadata(ade20k_categories()), "ade20k_panoptic_seg"
    )


def _register_ade20k_instance(name: str, split: str) -> None:
    files = _ade20k_files(split)
    things = [category for category in ade20k_categories() if category["isthing"]]
    contiguous = {category["id"]: i for i, category in enumerate(things)}
    DatasetCatalog.register(name, lambda: _load_instances(name, files, contiguous))
    MetadataCatalog.get(name).set(
        image_root=str(files.images),
        json_file=str(files.instances),
        evaluator_type="coco",
        thing_classes=[category["name"] for category in things],
        thing_colors=[category["color"] for category in things],
        thing_dataset_id_to_contiguous_id=contiguous,
    )


def _register_coco_panoptic(name: str, split: str) -> None:
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    register_panoptic(name, _coco_files(split), panoptic_metadata(COCO_CATEGORIES))


_PATTERNS: dict[str, Callable[[str, str], None]] = {
    "ade20k_panoptic_{}": _register_ade20k_panoptic,
    "ade20k_instance_{}": _register_ade20k_instance,
    "coco_2017_{}_panoptic_with_sem_seg": _register_coco_panoptic,
}
# name -> what registers it, and its split
NAMES = {
    pattern.format(split): (function, split)
    for pattern, function in _PATTERNS.items()
    for split in ADE20K_SPLITS
}
# name -> what it is a share of: the paper's low-data runs (Mask-JEPA, section 4.3)
SHARES = {
    f"{base}_{percent}pct": Share(base, str(percent))
    for base in ("ade20k_sem_seg_train", "ade20k_panoptic_train", "ade20k_instance_train")
    for percent in LOW_DATA_PERCENT
}


def register(name: str) -> None:
    """Register one of `NAMES` that is not registered yet."""
    function, split = NAMES[name]
    function(name, split)


def register_builtin() -> None:
    """Register every name that is free, unless the published package is installed; twice changes nothing."""
    if published_packages():
        return
    for name in NAMES:
        if name not in DatasetCatalog:
            register(name)
    colours = [category["color"] for category in ade20k_categories()]
    for split in ADE20K_SPLITS:  # detectron2 registers them without colours
        metadata = MetadataCatalog.get(f"ade20k_sem_seg_{split}")
        if not metadata.get("stuff_colors"):
            metadata.stuff_colors = colours
    for name, share in SHARES.items():
        if name not in DatasetCatalog and share.base in DatasetCatalog:
            register_share(name, share)
