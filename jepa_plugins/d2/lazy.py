"""Calls for LazyConfigs: data, evaluators and the optimiser with explicit arguments instead of configuration keys.

Models are made of their own classes, which take explicit arguments. detectron2's own
`tools/lazyconfig_train_net.py` runs such a configuration as it is (see configs/detectron2/lazy). Lists may be
omegaconf's. The loaders start where the loop around them stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from omegaconf import OmegaConf

from jepa_plugins.core.optim import ClippedAdamW
from jepa_plugins.d2 import solver
from jepa_plugins.d2.config import add_jepa_config
from jepa_plugins.d2.data.catalog import ensure_registered, num_classes
from jepa_plugins.d2.data.loader import build_labelled_loader, build_unlabelled_loader
from jepa_plugins.d2.data.mappers import TrainMapper, build_mapper
from jepa_plugins.d2.engine import Trainer
from jepa_plugins.d2.evaluation import build_evaluator
from jepa_plugins.d2.held_out import build_held_out_loader
from jepa_plugins.d2.launchers import Stream


def _plain(value: Any) -> Any:
    value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return tuple(value) if isinstance(value, list) else value


def _config(values: Mapping[str, Any]) -> CfgNode:
    """The default configuration with some values, by full key: what our data classes read."""
    cfg = get_cfg()
    add_jepa_config(cfg)
    for key, value in values.items():
        *parts, last = key.split(".")
        node = cfg
        for part in parts:
            node = node[part]
        node[last] = _plain(value)
    return cfg


# --- models


def pyramid(**channels: int) -> dict[str, ShapeSpec]:
    """Shapes of a backbone's features by name, from stride 4 on, each half as large as the one before."""
    return {
        name: ShapeSpec(channels=width, stride=4 * 2**i) for i, (name, width) in enumerate(channels.items())
    }


# --- optimiser


def adamw(
    params: Mapping[str, Any],
    *,
    lr: float,
    weight_decay: float,
    max_norm: float | None = None,
    accumulation: int = 1,
) -> ClippedAdamW:
    """Mask2Former's optimiser, and ViTDet's: parameter groups, full-model clipping, accumulation.

    Args:
        params: "model", which detectron2's launcher adds, and optionally "weight_decay_norm",
            "weight_decay_embed", "backbone_multiplier" and "layer_decay" (see `solver.group_parameters`).
        accumulation: iterations an optimiser step. The loop's iterations, schedule and periods count batches, not
            steps; MaskJEPA's targets move once a step.
    """
    others = dict(params)
    model = others.pop("model")
    groups = solver.group_parameters(model, base_lr=lr, weight_decay=weight_decay, **others)
    optimizer = ClippedAdamW(groups, lr=lr, max_norm=max_norm, accumulation=accumulation)
    solver.announce_steps(optimizer, model)
    return optimizer


def optimiser_steps(iterations: int, accumulation: int = 1) -> int:
    """Steps of a run: what MaskJEPA's momentum schedule counts."""
    return iterations // accumulation


# --- data


def metadata(dataset: str, classes: int) -> Any:
    """Metadata of a data set, which is registered if its name says how.

    Raises:
        ValueError: it has another number of classes than the model.
    """
    ensure_registered(dataset)
    if num_classes(dataset) != classes:
        raise ValueError(
            f"model.sem_seg_head.num_classes is {classes}, but data set '{dataset}' has "
            f"{num_classes(dataset)} classes: set it to {num_classes(dataset)}"
        )
    return MetadataCatalog.get(dataset)


def unlabelled_loader(
    *,
    sources: Sequence[str],
    total_batch_size: int,
    root: str = "",
    max_bad: float = 0.01,
    crop_size: Sequence[int] = (512, 512),
    crop_scale: Sequence[float] = (0.3, 1.0),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    image_format: str = "RGB",
    channels: int = 3,
    num_workers: int = 4,
    seed: int = 0,
    output_dir: str = "",
) -> Stream:
    """Crops of unlabelled images for pre-training.

    Args:
        sources: folders, list files (.txt), COCO json files, zip files or tar shards; `root`: what paths inside
            them are relative to.
        total_batch_size: images of one iteration over all processes.
        max_bad: share of unreadable files above which the run stops; they are named in `output_dir`.
        crop_size: (height, width) in pixels; crop_scale, crop_ratio: ranges of the share of the image's area and
            of width / height; flip: probability of mirroring.
        channels: of images read as "BANDS"; other formats say it themselves.
    """
    cfg = _config(
        {
            "DATASETS.UNLABELLED": sources,
            "DATASETS.UNLABELLED_ROOT": root,
            "DATASETS.UNLABELLED_MAX_BAD": max_bad,
            "MODEL.PIXEL_MEAN": (0.0,) * channels,  # the loader reads its length
            "INPUT.PRETRAIN_CROP_SIZE": crop_size,
            "INPUT.PRETRAIN_CROP_SCALE": crop_scale,
            "INPUT.PRETRAIN_CROP_RATIO": crop_ratio,
            "INPUT.PRETRAIN_FLIP": flip,
            "INPUT.FORMAT": image_format,
            "SOLVER.IMS_PER_BATCH": total_batch_size,
            "DATALOADER.NUM_WORKERS": num_workers,
            "SEED": seed,
            "OUTPUT_DIR": output_dir,
        }
    )
    return Stream(lambda start: build_unlabelled_loader(cfg, start_iteration=start), max(seed, 0))


def held_out_loader(
    *,
    sources: Sequence[str],
    batch_size: int,
    root: str = "",
    crop_size: Sequence[int] = (512, 512),
    image_format: str = "RGB",
    channels: int = 3,
    num_workers: int = 4,
) -> Iterable[list[dict]]:
    """Centred crops of unlabelled images to evaluate MaskJEPA on, with `HeldOutEvaluator`."""
    cfg = _config(
        {
            "DATASETS.UNLABELLED_TEST": sources,
            "MODEL.PIXEL_MEAN": (0.0,) * channels,
            "DATASETS.UNLABELLED_ROOT": root,
            "INPUT.PRETRAIN_CROP_SIZE": crop_size,
            "INPUT.FORMAT": image_format,
            "SOLVER.IMS_PER_BATCH": batch_size,
            "DATALOADER.NUM_WORKERS": num_workers,
        }
    )
    return build_held_out_loader(cfg)


def labelled_loader(
    *,
    datasets: Sequence[str],
    mapper: Callable[[dict], dict | None],
    total_batch_size: int,
    filter_empty: bool = True,
    num_workers: int = 4,
    seed: int = 0,
) -> Stream:
    """Mapped records of labelled data sets, which are registered if their names say how.

    Args:
        mapper: from a record to a sample, such as `crop_mapper` and `jitter_mapper` give.
        total_batch_size: images of one iteration over all processes.
        filter_empty: leave out images without an annotation.
    """
    cfg = _config(
        {
            "DATASETS.TRAIN": datasets,
            "SOLVER.IMS_PER_BATCH": total_batch_size,
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS": filter_empty,
            "DATALOADER.NUM_WORKERS": num_workers,
            "SEED": seed,
        }
    )
    ensure_registered(cfg.DATASETS.TRAIN)
    return Stream(lambda start: build_labelled_loader(cfg, mapper, start_iteration=start), max(seed, 0))


def crop_mapper(
    kind: str,
    *,
    num_classes: int,
    min_size: Sequence[int],
    max_size: int,
    crop_size: Sequence[int],
    single_category_max_area: float = 1.0,
    colour_jitter: bool = True,
    size_divisibility: int = -1,
    image_format: str = "RGB",
    ignore_label: int = 255,
) -> TrainMapper:
    """Short side, crop, colour, flip.

    Args:
        kind: "semantic", "panoptic" or "instance".
        min_size: lengths in pixels to choose the short side from; max_size: of the long side.
        crop_size: (height, width); single_category_max_area: largest share of it that one class may fill.
        size_divisibility: the result is padded right and below to a multiple of it; -1 pads nothing.
    """
    values = {
        "INPUT.DATASET_MAPPER_NAME": f"mask_former_{kind}",
        "INPUT.MIN_SIZE_TRAIN": min_size,
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
        "INPUT.MAX_SIZE_TRAIN": max_size,
        "INPUT.CROP.ENABLED": True,
        "INPUT.CROP.TYPE": "absolute",
        "INPUT.CROP.SIZE": crop_size,
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": single_category_max_area,
        "INPUT.COLOR_AUG_SSD": colour_jitter,
        "INPUT.SIZE_DIVISIBILITY": size_divisibility,
    }
    return _train_mapper(values, num_classes, image_format, ignore_label)


def jitter_mapper(
    kind: str,
    *,
    num_classes: int,
    image_size: int,
    min_scale: float = 0.1,
    max_scale: float = 2.0,
    image_format: str = "RGB",
    ignore_label: int = 255,
) -> TrainMapper:
    """Flip, large-scale jitter, square crop.

    Args:
        kind: "panoptic", "instance", or "detection": without padding, for a model that pads (ViTDet).
        image_size: side of the crop in pixels; min_scale, max_scale: range of the image's size in units of it.
    """
    values = {
        "INPUT.DATASET_MAPPER_NAME": f"coco_{kind}_lsj",
        "INPUT.IMAGE_SIZE": image_size,
        "INPUT.MIN_SCALE": min_scale,
        "INPUT.MAX_SCALE": max_scale,
    }
    return _train_mapper(values, num_classes, image_format, ignore_label)


def _train_mapper(values: dict[str, Any], classes: int, image_format: str, ignore_label: int) -> TrainMapper:
    common = {
        "DATASETS.TRAIN": (),
        "INPUT.FORMAT": image_format,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": classes,
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": ignore_label,
    }
    return build_mapper(_config({**common, **values}), True)


# --- evaluation


def test_loader(
    *, dataset: str, min_size: int, max_size: int, image_format: str = "RGB", num_workers: int = 4
) -> torch.utils.data.DataLoader:
    """One image at a time, its short side resized to `min_size` pixels unless the long one exceeds `max_size`."""
    cfg = _config(
        {
            "INPUT.MIN_SIZE_TEST": min_size,
            "INPUT.MAX_SIZE_TEST": max_size,
            "INPUT.FORMAT": image_format,
            "DATALOADER.NUM_WORKERS": num_workers,
        }
    )
    return Trainer.build_test_loader(cfg, dataset)


def evaluator(
    *,
    dataset: str,
    semantic_on: bool = False,
    instance_on: bool = False,
    panoptic_on: bool = False,
    output_dir: str,
) -> Any:
    """The evaluator of the data set's kind; of a panoptic one, those of the results that the model gives."""
    cfg = _config(
        {
            "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": semantic_on,
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON": instance_on,
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": panoptic_on,
            "OUTPUT_DIR": output_dir,
        }
    )
    return build_evaluator(cfg, dataset)
