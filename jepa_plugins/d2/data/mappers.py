"""From a data set record to a training sample, for the mapper names of Mask2Former's configs and ViTDet's.

==========================  =============================================  ======================
INPUT.DATASET_MAPPER_NAME   augmentation                                   targets from
==========================  =============================================  ======================
mask_former_semantic        short side, constrained crop, colour, flip     sem_seg_file_name, or else
                                                                           pan_seg_file_name
mask_former_panoptic        the same                                       pan_seg_file_name
mask_former_instance        short side, crop, colour, flip                 annotations
coco_panoptic_lsj           flip, large-scale jitter, fixed crop           pan_seg_file_name
coco_instance_lsj           the same                                       annotations
coco_detection_lsj          the same, without padding (ViTDet)             annotations
panoptic_deeplab            that of detectron2's project Panoptic-DeepLab  pan_seg_file_name
==========================  =============================================  ======================

Two habits of the published mappers are kept because the published results rest on them: label maps are
resized as floats (torch's nearest neighbour, not Pillow's), and objects that the crop cuts away stay as empty
masks, except in coco_instance_lsj and coco_detection_lsj.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from jepa_plugins.core.images import CHANNEL_ORDERS, read_image, read_label_map

from .catalog import ensure_registered
from .schemes import IGNORE_LABEL

PAD_PIXEL = 128  # grey level of padding, also that of detectron2's FixedSizeCrop
PANOPTIC_DEEPLAB = "panoptic_deeplab"
VOID = 0  # panoptic id of pixels without a segment


# --- panoptic label images ---


def panoptic_ids(colours: np.ndarray) -> np.ndarray:
    """Segment ids R + 256 G + 65536 B of a panoptic label image: uint8 [H, W, 3] -> int32 [H, W]."""
    red, green, blue = np.moveaxis(colours, 2, 0).astype(np.int32)
    return red + (green << 8) + (blue << 16)


def semantic_from_panoptic(
    ids: np.ndarray, segments: list[dict[str, Any]], ignore_label: int = IGNORE_LABEL
) -> np.ndarray:
    """Class of each pixel; pixels without a listed segment get `ignore_label`, crowds count as their class.

    Args:
        ids: segment ids, int [H, W].
        segments: "segments_info" with contiguous "category_id".

    Returns:
        int64 [H, W].
    """
    known = np.array([segment["id"] for segment in segments], dtype=np.int64)
    classes = np.array([segment["category_id"] for segment in segments], dtype=np.int64)
    if not known.size:
        return np.full(ids.shape, ignore_label, dtype=np.int64)
    order = known.argsort()
    place = np.searchsorted(known, ids, sorter=order).clip(max=known.size - 1)
    found = order[place]
    return np.where(known[found] == ids, classes[found], ignore_label)


# --- augmentation ---


def _flip(cfg: CfgNode) -> list[T.Augmentation]:
    if cfg.INPUT.RANDOM_FLIP == "none":
        return []
    return [
        T.RandomFlip(
            horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal", vertical=cfg.INPUT.RANDOM_FLIP == "vertical"
        )
    ]


def _colour_jitter(cfg: CfgNode) -> list[T.Transform]:
    if not cfg.INPUT.COLOR_AUG_SSD:
        return []
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ValueError(
            f"INPUT.COLOR_AUG_SSD changes colours, and INPUT.FORMAT {cfg.INPUT.FORMAT} has others than red, green "
            "and blue: set INPUT.COLOR_AUG_SSD to False."
        )
    try:
        from detectron2.projects.point_rend import ColorAugSSDTransform
    except ImportError as error:
        raise ImportError(
            f"INPUT.COLOR_AUG_SSD needs OpenCV ({error}): "
            "pip install opencv-python-headless, or set it to False."
        ) from error
    return [ColorAugSSDTransform(img_format=cfg.INPUT.FORMAT)]


def _short_side(cfg: CfgNode) -> T.ResizeShortestEdge:
    return T.ResizeShortestEdge(
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    )


def _constrained_crop_augmentations(cfg: CfgNode) -> list:
    crop = cfg.INPUT.CROP
    crops = (
        [
            T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
            )
        ]
        if crop.ENABLED
        else []
    )
    return [_short_side(cfg), *crops, *_colour_jitter(cfg), T.RandomFlip()]


def _crop_augmentations(cfg: CfgNode) -> list:
    crops = [T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)] if cfg.INPUT.CROP.ENABLED else []
    return [_short_side(cfg), *crops, *_colour_jitter(cfg), T.RandomFlip()]


def _jitter_augmentations(cfg: CfgNode) -> list:
    size = cfg.INPUT.IMAGE_SIZE
    # Newer detectron2 pads label maps with 255 unless told otherwise, which would add pixels to every mask.
    padding = (
        {"seg_pad_value": VOID} if "seg_pad_value" in inspect.signature(T.FixedSizeCrop).parameters else {}
    )
    return [
        *_flip(cfg),
        T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, target_height=size, target_width=size),
        T.FixedSizeCrop(crop_size=(size, size), **padding),
    ]


def _unpadded_jitter_augmentations(cfg: CfgNode) -> list:
    """The same, for a model that pads after normalisation: images smaller than the crop stay smaller."""
    size = cfg.INPUT.IMAGE_SIZE
    *others, _ = _jitter_augmentations(cfg)
    return [*others, T.FixedSizeCrop(crop_size=(size, size), pad=False)]


class BandInput(T.AugInput):
    """`AugInput` for images of any number of channels, uint8 [H, W, C].

    detectron2 resizes by Pillow, which takes at most four channels and weighs by the last of two or four, as
    by an alpha: transforms get the channels by threes, and what is left one by one.
    """

    def transform(self, tfm: T.Transform) -> None:
        """Apply a transform, which must not draw at random itself, to the image and the label map."""
        channels = self.image.shape[2]
        whole = channels // 3 * 3
        cuts = [*range(3, whole, 3), *range(max(whole, 1), channels)]
        first, *others = np.split(self.image, cuts, axis=2)
        self.image = np.ascontiguousarray(first)
        super().transform(tfm)
        moved = [tfm.apply_image(np.ascontiguousarray(part)) for part in others]
        self.image = np.concatenate([self.image, *moved], axis=2)


def _aug_input(image: np.ndarray, sem_seg: np.ndarray | None = None) -> T.AugInput:
    kind = T.AugInput if image.shape[2] == 3 else BandInput
    return kind(image, sem_seg=sem_seg)


# --- targets: read before, built after the augmentation ---


@dataclass
class Targets:
    """Classes int64 [N] and masks bool [N, H, W] of one image, and its label map int64 [H, W], if any."""

    classes: Tensor
    masks: Tensor
    sem_seg: Tensor | None = None


def _take(record: dict[str, Any], key: str, mapper: str) -> Any:
    if key not in record:
        raise ValueError(
            f"INPUT.DATASET_MAPPER_NAME = {mapper} needs '{key}', which the data set of "
            f"'{record['file_name']}' does not have: choose the mapper that fits DATASETS.TRAIN."
        )
    return record.pop(key)


def _check_size(file_name: str, size: tuple[int, ...], image_size: tuple[int, ...]) -> None:
    if size != image_size:
        raise ValueError(
            f"The labels of '{file_name}' have height and width {size}, the image {image_size}: "
            "give labels of the image's size."
        )


class _SemanticTargets:
    """One mask per class that is present; in a record without a label map, panoptic labels say the classes."""

    def __init__(self, record: dict[str, Any], mapper: TrainMapper, size: tuple[int, int]) -> None:
        self.mapper = mapper
        if "sem_seg_file_name" not in record and "pan_seg_file_name" in record:
            self.path = record.pop("pan_seg_file_name")
            ids = panoptic_ids(read_image(self.path, "RGB", apply_orientation=False))
            labels = semantic_from_panoptic(ids, record["segments_info"], mapper.ignore_label)
        else:
            self.path = _take(record, "sem_seg_file_name", mapper.name)
            labels = read_label_map(self.path)
        self.sem_seg = labels.astype(np.float64)
        _check_size(record["file_name"], self.sem_seg.shape, size)

    def build(self, transforms: T.TransformList, sem_seg: np.ndarray, size: tuple[int, int]) -> Targets:
        labels = torch.from_numpy(np.ascontiguousarray(sem_seg)).to(torch.int64)
        classes = labels.flatten().bincount().nonzero()[:, 0]  # sorted, and faster than a sort
        classes = classes[classes != self.mapper.ignore_label]
        if len(classes) and int(classes[-1]) >= self.mapper.num_classes:
            raise ValueError(
                f"Label image '{self.path}' holds class {int(classes[-1])}, but "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {self.mapper.num_classes} "
                f"(ignored: {self.mapper.ignore_label}): correct one of them."
            )
        return Targets(classes, labels == classes[:, None, None], labels)


class _PanopticTargets:
    """One mask per segment that is no crowd; a label map when the record has one or the crop asks for it."""

    def __init__(self, record: dict[str, Any], mapper: TrainMapper, size: tuple[int, int]) -> None:
        self.colours = read_image(
            _take(record, "pan_seg_file_name", mapper.name), "RGB", apply_orientation=False
        )
        _check_size(record["file_name"], self.colours.shape[:2], size)
        self.segments = record["segments_info"]
        self.sem_seg = None
        if "sem_seg_file_name" in record:
            self.sem_seg = read_label_map(record.pop("sem_seg_file_name")).astype(np.float64)
            _check_size(record["file_name"], self.sem_seg.shape, size)
        elif mapper.constrains_crop:
            ids = panoptic_ids(self.colours)
            self.sem_seg = semantic_from_panoptic(ids, self.segments, mapper.ignore_label).astype(np.float64)

    def build(
        self, transforms: T.TransformList, sem_seg: np.ndarray | None, size: tuple[int, int]
    ) -> Targets:
        ids = torch.from_numpy(panoptic_ids(transforms.apply_segmentation(self.colours)))
        kept = [segment for segment in self.segments if not segment["iscrowd"]]
        wanted = torch.tensor([segment["id"] for segment in kept], dtype=torch.int32)
        labels = None if sem_seg is None else torch.from_numpy(np.ascontiguousarray(sem_seg)).to(torch.int64)
        classes = torch.tensor([segment["category_id"] for segment in kept], dtype=torch.int64)
        return Targets(classes, ids == wanted[:, None, None], labels)


class _InstanceTargets:
    """One mask per annotation that is no crowd."""

    sem_seg = None

    def __init__(self, record: dict[str, Any], mapper: TrainMapper, size: tuple[int, int]) -> None:
        annotations = _take(record, "annotations", mapper.name)
        self.kept = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
        self.file_name = record["file_name"]
        self.drop_empty = mapper.drop_empty
        self.image_size = size

    def _mask(self, segmentation: Any, transforms: T.TransformList, size: tuple[int, int]) -> np.ndarray:
        if isinstance(segmentation, list):
            # Rasterising clips to the image, so the polygons need no geometric clipping before it.
            corners = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
            moved = [transforms.apply_coords(polygon).reshape(-1).tolist() for polygon in corners]
            return mask_util.decode(mask_util.merge(mask_util.frPyObjects(moved, *size)))
        if isinstance(segmentation, dict):
            segmentation = mask_util.decode(segmentation)
        if not isinstance(segmentation, np.ndarray) or segmentation.ndim != 2:
            raise ValueError(
                f"An annotation of '{self.file_name}' has no usable segmentation: "
                "give polygons, run lengths or a mask [H, W]."
            )
        _check_size(self.file_name, segmentation.shape, self.image_size)
        return transforms.apply_segmentation((segmentation != 0).astype(np.uint8))

    def build(self, transforms: T.TransformList, sem_seg: None, size: tuple[int, int]) -> Targets:
        masks = np.zeros((len(self.kept), *size), dtype=bool)
        for mask, annotation in zip(masks, self.kept, strict=True):
            mask[:] = self._mask(annotation.get("segmentation"), transforms, size)
        classes = torch.tensor([annotation["category_id"] for annotation in self.kept], dtype=torch.int64)
        targets = Targets(classes, torch.from_numpy(masks))
        if self.drop_empty:
            visible = targets.masks.flatten(1).any(dim=1)
            targets = Targets(classes[visible], targets.masks[visible])
        return targets


# --- the mappers ---


@dataclass(frozen=True)
class _Recipe:
    augmentations: Callable[[CfgNode], list]
    targets: type
    large_scale_jitter: bool = False
    drop_empty: bool = False


RECIPES = {
    "mask_former_semantic": _Recipe(_constrained_crop_augmentations, _SemanticTargets),
    "mask_former_panoptic": _Recipe(_constrained_crop_augmentations, _PanopticTargets),
    "mask_former_instance": _Recipe(_crop_augmentations, _InstanceTargets),
    "coco_panoptic_lsj": _Recipe(_jitter_augmentations, _PanopticTargets, large_scale_jitter=True),
    "coco_instance_lsj": _Recipe(
        _jitter_augmentations, _InstanceTargets, large_scale_jitter=True, drop_empty=True
    ),
    "coco_detection_lsj": _Recipe(
        _unpadded_jitter_augmentations, _InstanceTargets, large_scale_jitter=True, drop_empty=True
    ),
}


def _tight_boxes(masks: Tensor) -> Boxes:
    """Boxes around masks bool [N, H, W], x2 and y2 exclusive; zeros for an empty mask."""
    edges = []
    for line in (masks.any(dim=1), masks.any(dim=2)):  # columns, rows that a mask touches
        length = line.shape[1]
        steps = torch.arange(length)
        first = torch.where(line, steps, length).amin(dim=1) if length else steps.new_zeros(len(line))
        last = torch.where(line, steps + 1, 0).amax(dim=1) if length else steps.new_zeros(len(line))
        edges.append((first.minimum(last), last))
    (left, right), (top, bottom) = edges
    return Boxes(torch.stack([left, top, right, bottom], dim=1).to(torch.float32))


def _padding(height: int, width: int, divisor: int) -> list[int]:
    return [0, -width % divisor, 0, -height % divisor]


class TrainMapper:
    """Turns one record in detectron2's format into a training sample.

    The result has "image" uint8 [C, H, W], "instances" with gt_classes int64 [N] and gt_masks bool [N, H, W],
    and, where there is a label map, "sem_seg" int64 [H, W]; with large-scale jitter also gt_boxes, and for
    coco_instance_lsj "padding_mask" bool [H, W], True outside the image.

    Args:
        cfg: config with the keys of `jepa_plugins.d2.data.add_data_config`.
        name: a key of `RECIPES`.
    """

    def __init__(self, cfg: CfgNode, name: str) -> None:
        recipe = RECIPES[name]
        self.name = name
        self.augmentations = T.AugmentationList(recipe.augmentations(cfg))
        self.image_format = cfg.INPUT.FORMAT
        self.num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.divisor = -1 if recipe.large_scale_jitter else cfg.INPUT.SIZE_DIVISIBILITY
        self.constrains_crop = (
            not recipe.large_scale_jitter
            and cfg.INPUT.CROP.ENABLED
            and cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA < 1
        )
        self.drop_empty = recipe.drop_empty
        self.with_boxes = recipe.large_scale_jitter
        self.with_padding_mask = name == "coco_instance_lsj"
        self.ignore_label = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        if cfg.DATASETS.TRAIN:
            ensure_registered(cfg.DATASETS.TRAIN)
            metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
            self.ignore_label = metadata.get("ignore_label", self.ignore_label)
        self._targets = recipe.targets

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        source = self._targets(record, self, image.shape[:2])
        augmented = _aug_input(image, source.sem_seg)
        transforms = self.augmentations(augmented)
        size = augmented.image.shape[:2]
        targets = source.build(transforms, augmented.sem_seg, size)
        pixels = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if self.with_padding_mask:
            inside = transforms.apply_segmentation(np.ones(image.shape[:2]))
            record["padding_mask"] = torch.from_numpy(np.ascontiguousarray(inside == 0))
        self._finish(record, pixels, targets)
        return record

    def _finish(self, record: dict[str, Any], pixels: Tensor, targets: Targets) -> None:
        """Pad on the right and below, and put the tensors into the record."""
        if self.divisor > 0:
            padding = _padding(pixels.shape[1], pixels.shape[2], self.divisor)
            pixels = F.pad(pixels, padding, value=PAD_PIXEL)
            targets.masks = F.pad(targets.masks, padding, value=False)
            if targets.sem_seg is not None:
                targets.sem_seg = F.pad(targets.sem_seg, padding, value=self.ignore_label)
        record["image"] = pixels.contiguous()
        if targets.sem_seg is not None:
            record["sem_seg"] = targets.sem_seg.contiguous()
        instances = Instances((pixels.shape[1], pixels.shape[2]))
        instances.gt_classes = targets.classes
        instances.gt_masks = targets.masks.contiguous()
        if self.with_boxes:
            instances.gt_boxes = _tight_boxes(targets.masks)
        record["instances"] = instances


class InferenceMapper:
    """Image alone, resized by ``INPUT.{MIN,MAX}_SIZE_TEST``; "height" and "width" are those of the file.

    It differs from detectron2's own in how it reads the file: 16-bit images are scaled, not clipped.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.augmentation = T.AugmentationList(utils.build_augmentation(cfg, is_train=False))
        self.image_format = cfg.INPUT.FORMAT

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        dropped = ("annotations", "segments_info", "sem_seg_file_name", "pan_seg_file_name")
        record = {key: value for key, value in dataset_dict.items() if key not in dropped}
        image = read_image(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        augmented = _aug_input(image)
        self.augmentation(augmented)
        record["image"] = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        return record


class PanopticDeepLabMapper:
    """detectron2's mapper of its project Panoptic-DeepLab, built for the first record: it asks for the data set."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self._mapper: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Add "image", "sem_seg", "center", "offset" and their weights, as the project's model takes them."""
        if self._mapper is None:
            from detectron2.projects.panoptic_deeplab import PanopticDeeplabDatasetMapper

            self._mapper = PanopticDeeplabDatasetMapper(self.cfg)
        return self._mapper(record)


def build_mapper(cfg: CfgNode, is_train: bool) -> TrainMapper | InferenceMapper | PanopticDeepLabMapper:
    """The mapper that ``INPUT.DATASET_MAPPER_NAME`` names, or the one for inference.

    Raises:
        ValueError: unknown mapper name or ``INPUT.FORMAT``.
    """
    if cfg.INPUT.FORMAT not in CHANNEL_ORDERS:
        raise ValueError(f"INPUT.FORMAT is '{cfg.INPUT.FORMAT}': use one of {', '.join(CHANNEL_ORDERS)}.")
    if not is_train:
        return InferenceMapper(cfg)
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name == PANOPTIC_DEEPLAB:
        return PanopticDeepLabMapper(cfg)
    if name not in RECIPES:
        known = ", ".join((*RECIPES, PANOPTIC_DEEPLAB))
        raise ValueError(f"INPUT.DATASET_MAPPER_NAME is '{name}': use one of {known}.")
    return TrainMapper(cfg, name)
