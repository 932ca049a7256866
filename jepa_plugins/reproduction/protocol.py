"""What decides a number besides the weights: read from the configuration that a run has left in its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


def protocol_of(folder: Path, toolkit: str) -> dict[str, Any]:
    """Crop, test size, interpolation, layers, pooling and scales of a run.

    Args:
        folder: of the run, with the configuration that its launcher wrote there.
        toolkit: detectron2 or mmengine.

    Returns:
        Plain values for JSON; empty when the folder holds no configuration.
    """
    return _detectron2(folder) if toolkit == "detectron2" else _mmengine(folder)


def _detectron2(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    cfg = yaml.safe_load(path.read_text(encoding="utf-8"))
    given, model = cfg["INPUT"], cfg["MODEL"]
    crop = given["CROP"]
    found = {
        "train sets": list(cfg["DATASETS"]["TRAIN"]),
        "test sets": list(cfg["DATASETS"]["TEST"]),
        "mapper": given.get("DATASET_MAPPER_NAME", ""),
        "crop": list(crop["SIZE"]) if crop["ENABLED"] else given.get("IMAGE_SIZE"),
        "test short side": given["MIN_SIZE_TEST"],
        "test longest side": given["MAX_SIZE_TEST"],
        "interpolation": "bilinear",
        "scales": "several" if cfg["TEST"]["AUG"]["ENABLED"] else "single",
        "flip in test": bool(cfg["TEST"]["AUG"]["ENABLED"] and cfg["TEST"]["AUG"]["FLIP"]),
        "detections per image": cfg["TEST"]["DETECTIONS_PER_IMAGE"],
    }
    if model["META_ARCHITECTURE"].endswith("MaskFormer"):
        test = model["MASK_FORMER"]["TEST"]
        found["queries"] = model["MASK_FORMER"]["NUM_OBJECT_QUERIES"]
        found["thresholds"] = {
            "overlap": test["OVERLAP_THRESHOLD"],
            "object mask": test["OBJECT_MASK_THRESHOLD"],
        }
    solver = cfg["SOLVER"]
    length = {"iterations": solver["MAX_ITER"], "images an iteration": solver["IMS_PER_BATCH"]}
    return {**found, **length, "learning rate": solver["BASE_LR"]}


def _mmengine(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.py"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {}
    from mmengine.config import Config  # the toolkit that has just run

    cfg = Config.fromfile(files[-1])
    model, loader = cfg.model, cfg.test_dataloader
    steps = {step["type"]: step for step in loader.dataset.pipeline}
    train = {step["type"]: step for step in cfg.train_dataloader.dataset.pipeline}
    test = dict(model.get("test_cfg") or {})
    backbone = model.get("backbone", {})
    found = {
        "data": f"{loader.dataset.type} {loader.dataset.get('data_root', '')}",
        "crop": _plain(train.get("RandomCrop", {}).get("crop_size")),
        "test size": _plain(steps.get("Resize", {}).get("scale", "as stored")),
        "inference": _plain(test),
        "interpolation": "bilinear",
        "scales": "single",
        "layers": _plain(backbone.get("out_indices")),
        "pooling": "none, patch tokens",
        "frozen backbone": bool(backbone.get("frozen", False)),
    }
    length = {
        "iterations": cfg.train_cfg.get("max_iters"),
        "images of a process and iteration": cfg.train_dataloader.get("batch_size"),
    }
    return {**found, **length, "learning rate": cfg.optim_wrapper.optimizer.lr}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value
