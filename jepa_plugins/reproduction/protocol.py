"""What decides a number besides the weights: read from the configuration that a run has left in its folder.

What the configuration leaves to a transform is read from the transform; what neither says is left out.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


def protocol_of(folder: Path, toolkit: str) -> dict[str, Any]:
    """Crop, sizes, interpolation, layers, scales and precision of a run.

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
    model, solver = cfg["MODEL"], cfg["SOLVER"]
    found = {
        "train sets": list(cfg["DATASETS"]["TRAIN"]),
        "test sets": list(cfg["DATASETS"]["TEST"]),
        **_detectron2_images(cfg["INPUT"]),
        **_detectron2_test(cfg["TEST"]),
    }
    if model["META_ARCHITECTURE"].endswith("MaskFormer"):
        test = model["MASK_FORMER"]["TEST"]
        found["layers"] = list(model["SEM_SEG_HEAD"]["IN_FEATURES"])
        found["queries"] = model["MASK_FORMER"]["NUM_OBJECT_QUERIES"]
        found["thresholds"] = {
            "overlap": test["OVERLAP_THRESHOLD"],
            "object mask": test["OBJECT_MASK_THRESHOLD"],
        }
    elif model["META_ARCHITECTURE"].endswith("RCNN"):
        found["layers"] = list(model["ROI_HEADS"]["IN_FEATURES"])
        found["thresholds"] = {
            "score": model["ROI_HEADS"]["SCORE_THRESH_TEST"],
            "nms": model["ROI_HEADS"]["NMS_THRESH_TEST"],
        }
    return {
        **found,
        "mixed precision": solver["AMP"]["ENABLED"],
        "iterations": solver["MAX_ITER"],
        "images an iteration": solver["IMS_PER_BATCH"],
        "learning rate": solver["BASE_LR"],
    }


def _detectron2_images(given: Mapping[str, Any]) -> dict[str, Any]:
    """What becomes of an image, in training and in the test."""
    mapper = given.get("DATASET_MAPPER_NAME", "")
    found = {"mapper": mapper}
    if mapper.endswith("_lsj"):
        found["crop"] = given["IMAGE_SIZE"]
        found["train scales"] = [given["MIN_SCALE"], given["MAX_SCALE"]]
    else:
        crop = given["CROP"]
        found["crop"] = list(crop["SIZE"]) if crop["ENABLED"] else "none"
        sides = given["MIN_SIZE_TRAIN"]
        found["train short sides"] = list(sides) if isinstance(sides, (list, tuple)) else sides
        found["train longest side"] = given["MAX_SIZE_TRAIN"]
    found["test short side"] = given["MIN_SIZE_TEST"]
    found["test longest side"] = given["MAX_SIZE_TEST"]
    interpolation = _default("detectron2.data.transforms", "ResizeShortestEdge", "interp")
    return {**found, **_interpolation(interpolation)}


def _detectron2_test(test: Mapping[str, Any]) -> dict[str, Any]:
    found = {"detections per image": test["DETECTIONS_PER_IMAGE"]}
    if test["AUG"][
        "ENABLED"
    ]:  # an evaluation at several scales is another command's: this says nothing of it
        return found
    return {**found, "scales": "single", "flip in test": False}


def _mmengine(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.py"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {}
    from mmengine.config import Config  # the toolkit that has just run

    cfg = Config.fromfile(files[-1])
    loader = cfg.test_dataloader
    found = {
        "data": f"{loader.dataset.type} {loader.dataset.get('data_root', '')}".strip(),
        **_mmengine_images(cfg.train_dataloader.dataset.pipeline, loader.dataset.pipeline),
        "inference": _plain(cfg.model.get("test_cfg") or {}),
        **_mmengine_backbone(cfg.model.get("backbone") or {}),
        "mixed precision": cfg.optim_wrapper.get("type", "").endswith("AmpOptimWrapper"),
        "iterations": cfg.train_cfg.get("max_iters"),
        "images of a process and iteration": cfg.train_dataloader.get("batch_size"),
        "learning rate": cfg.optim_wrapper.optimizer.lr,
    }
    return {name: value for name, value in found.items() if value is not None}


def _mmengine_images(training: Iterable[Mapping], testing: Iterable[Mapping]) -> dict[str, Any]:
    """What becomes of an image, in training and in the test."""
    train, test = ({step["type"]: step for step in pipeline} for pipeline in (training, testing))
    found = {"crop": _plain(train["RandomCrop"].get("crop_size"))} if "RandomCrop" in train else {}
    if "RandomResize" in train:
        found["train size"] = _plain(train["RandomResize"].get("scale"))
        found["train scales"] = _plain(train["RandomResize"].get("ratio_range"))
    several = "TestTimeAug" in test
    found["scales"] = "as test-time augmentation says" if several else "single"
    if "Resize" not in test:
        return found if several else {**found, "test size": "as stored"}
    resize = test["Resize"]
    interpolation = resize.get("interpolation") or _default("mmcv.transforms", "Resize", "interpolation")
    return {**found, "test size": _plain(resize.get("scale")), **_interpolation(interpolation)}


def _mmengine_backbone(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Which of a ViT's maps the heads read, and how; what the configuration leaves out is the class's default."""

    def value(key: str) -> Any:
        given = backbone.get(key)
        known = backbone.get("type") == "JEPAViT"
        return _default("jepa_plugins.mm.backbone", "JEPAViT", key) if given is None and known else given

    found = {"layers": "out_indices", "final norm": "final_norm", "frozen backbone": "frozen"}
    return {name: _plain(value(key)) for name, key in found.items()}


def _default(module: str, name: str, argument: str) -> Any:
    """Of a transform's or model's argument; None where the toolkit is not installed or has no such argument."""
    try:
        signature = inspect.signature(getattr(importlib.import_module(module), name).__init__)
        value = signature.parameters[argument].default
    except (ImportError, AttributeError, KeyError):
        return None
    return None if value is inspect.Parameter.empty else value


def _interpolation(value: Any) -> dict[str, Any]:
    """By its name: detectron2 gives Pillow's number."""
    if isinstance(value, int):
        from PIL import Image

        value = Image.Resampling(value).name.lower()
    return {} if value is None else {"interpolation": str(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value
