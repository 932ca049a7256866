"""Data sets by name: registered when a configuration names them, and checked before anything runs.

A name that ends in ``@P%`` is a share of the data set before it, for training on few images:
``folder_semantic@ROOT@SPLIT@5%``, ``coco_2017_train@1%``. The share is that of `jepa_plugins.core.subsets`.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from . import builtin
from .schemes import register_by_scheme, remedy_for, require_path
from .shares import parse_share, register_share


def ensure_registered(names: str | Iterable[str]) -> None:
    """Register every name that `builtin` knows or that follows a scheme of `schemes`, unless it is registered.

    Raises:
        ValueError: a name is neither registered nor of the form SCHEME@ROOT@SPLIT or NAME@P%, or its files are wrong.
        FileNotFoundError: files are missing.
    """
    for name in [names] if isinstance(names, str) else names:
        if name in DatasetCatalog:
            continue
        share = builtin.SHARES.get(name) or parse_share(name)
        if share:
            ensure_registered(share.base)
            register_share(name, share)
        elif name in builtin.NAMES:
            builtin.register(name)
        else:
            register_by_scheme(name)


def num_classes(name: str) -> int:
    """Number of classes that a model needs for a registered data set."""
    metadata = MetadataCatalog.get(name)
    if not (metadata.get("stuff_classes") or metadata.get("thing_classes")):
        DatasetCatalog.get(name)  # detectron2's own COCO registrations learn their classes while loading
    if metadata.get("evaluator_type") in ("coco", "lvis", "cityscapes_instance"):
        return len(metadata.thing_classes)
    return len(metadata.get("stuff_classes") or metadata.thing_classes)


# Files that a registration names in its metadata and that its records cannot do without.
_NEEDED = {
    "image_root": "the image folder",
    "image_dir": "the image folder",
    "sem_seg_root": "the folder of label images",
    "gt_dir": "the label folder",
    "panoptic_root": "the folder of panoptic label images",
    "panoptic_json": "the annotation file",
}


def check_files(name: str) -> None:
    """Raise, in one sentence, unless the files and the packages that a registered data set needs are there.

    Raises:
        FileNotFoundError: a missing folder or file, by its path. ImportError: a missing package.
    """
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type")
    needed = dict(_NEEDED, json_file="the annotation file") if kind in ("coco", "lvis") else _NEEDED
    for key, what in needed.items():
        path = metadata.get(key)
        if path and "://" not in path:
            require_path(Path(path), name, what, remedy_for(name))
    if kind in ("cityscapes_sem_seg", "cityscapes_panoptic_seg"):
        labels = os.path.join(metadata.gt_dir, "*", "*_gtFine_labelTrainIds.png")
        if not glob.glob(labels):
            raise FileNotFoundError(
                f"Data set '{name}': there is no '{labels}': 'csCreateTrainIdLabelImgs' of cityscapesScripts "
                "makes them."
            )
    packages = {"cityscapesscripts": "cityscapesScripts"} if str(kind).startswith("cityscapes") else {}
    if kind == "cityscapes_instance":
        packages["shapely"] = "shapely"  # detectron2 reads Cityscapes's polygons with it
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"Data set '{name}' needs the package {package}: pip install {package}.")


def check_num_classes(cfg: CfgNode, name: str) -> None:
    """Raise unless a data set's files are there (`check_files`) and the model has as many classes (ValueError).

    They are ``MODEL.SEM_SEG_HEAD.NUM_CLASSES``, a detector's ``MODEL.ROI_HEADS.NUM_CLASSES``.
    """
    ensure_registered(name)
    check_files(name)
    head = "ROI_HEADS" if cfg.MODEL.get("META_ARCHITECTURE") == "JEPAMaskRCNN" else "SEM_SEG_HEAD"
    configured, present = cfg.MODEL[head].NUM_CLASSES, num_classes(name)
    if configured != present:
        raise ValueError(
            f"MODEL.{head}.NUM_CLASSES is {configured}, but data set '{name}' has {present} classes: "
            f"set it to {present}."
        )
