"""Evaluators of semantic, instance and panoptic segmentation, on the CPU or a GPU, for any detectron2.

Figures come from panopticapi (PQ), pycocotools (AP), a confusion matrix (mIoU) and, for Cityscapes, from
cityscapesScripts. detectron2's own mIoU
counts a class that is predicted but absent from the ground truth as 0 in its tag 0.6 and not at all in later
versions; ours counts it as 0 everywhere, so the figure does not depend on the version. With every class
present all agree.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
)
from detectron2.utils import comm

from jepa_plugins.core.images import read_image, read_label_map

from .data.catalog import ensure_registered
from .data.mappers import panoptic_ids, semantic_from_panoptic

logger = logging.getLogger(__name__)


def has_fast_coco_evaluation() -> bool:
    """Whether detectron2's compiled COCO evaluation is there; its Python half imports without it."""
    try:
        operators = importlib.import_module("detectron2._C")
    except ImportError:
        return False
    return hasattr(operators, "COCOevalEvaluateImages") and hasattr(operators, "COCOevalAccumulate")


class SemanticEvaluator(DatasetEvaluator):
    """mIoU and accuracies of "sem_seg" outputs (scores [K, H, W] in the image's size).

    The ground truth is the record's label image or, where there is none, its panoptic label image, in which
    crowds count as their class. Pixels with the data set's ignored label count nowhere.

    Args:
        dataset_name: a registered data set.
        distributed: add up the matrices of all processes.
    """

    def __init__(self, dataset_name: str, distributed: bool = True) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self.class_names = list(metadata.stuff_classes)
        self.ignore_label = metadata.ignore_label
        self.distributed = distributed
        keys = ("sem_seg_file_name", "pan_seg_file_name", "segments_info")
        self._truth = {
            record["file_name"]: {key: record[key] for key in keys if key in record}
            for record in DatasetCatalog.get(dataset_name)
        }
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        count = len(self.class_names)
        self._matrix = np.zeros((count, count), dtype=np.int64)

    def labels(self, file_name: str) -> np.ndarray:
        truth = self._truth[file_name]
        if "sem_seg_file_name" in truth:
            return read_label_map(truth["sem_seg_file_name"])
        colours = read_image(truth["pan_seg_file_name"], "RGB", apply_orientation=False)
        return semantic_from_panoptic(panoptic_ids(colours), truth["segments_info"], self.ignore_label)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add images: inputs name their "file_name", outputs hold "sem_seg" [K, H, W]."""
        count = len(self.class_names)
        for entry, output in zip(inputs, outputs, strict=True):
            truth = self.labels(entry["file_name"])
            scores = output["sem_seg"]
            if tuple(scores.shape) != (count, *truth.shape):
                raise ValueError(
                    f"The scores for '{entry['file_name']}' have shape {tuple(scores.shape)}, but there are "
                    f"{count} classes and labels of {truth.shape}: check MODEL.SEM_SEG_HEAD.NUM_CLASSES."
                )
            counted = truth != self.ignore_label
            truth = truth[counted]
            if truth.size and not 0 <= truth.min() <= truth.max() < count:
                raise ValueError(
                    f"The labels of '{entry['file_name']}' hold class {truth.max()}, but there are {count} "
                    f"classes (ignored: {self.ignore_label}): correct the label image or the class names."
                )
            predicted = scores.argmax(dim=0).cpu().numpy()[counted]
            pairs = np.bincount(truth * count + predicted, minlength=count * count)
            self._matrix += pairs.reshape(count, count)

    def evaluate(self) -> OrderedDict | None:
        """Figures in percent under "sem_seg", as detectron2 names them; None but in the main process.

        mIoU is the mean over the classes that occur in the ground truth or in the predictions.
        """
        matrix = self._matrix
        if self.distributed:
            comm.synchronize()
            matrix = np.sum(comm.all_gather(matrix), axis=0)
            if not comm.is_main_process():
                return None
        hits = matrix.diagonal().astype(np.float64)
        truth, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = 100 * hits / (truth + predicted - hits)  # NaN where a class occurs nowhere
            accuracy = 100 * hits / truth
            figures = {
                "mIoU": np.nanmean(iou) if truth.sum() else np.nan,
                "fwIoU": np.nansum(iou * truth) / truth.sum(),
                **{f"IoU-{name}": value for name, value in zip(self.class_names, iou, strict=True)},
                "mACC": np.nanmean(accuracy) if truth.sum() else np.nan,
                "pACC": 100 * hits.sum() / truth.sum(),
                **{f"ACC-{name}": value for name, value in zip(self.class_names, accuracy, strict=True)},
            }
        figures = {name: float(value) for name, value in figures.items()}
        logger.info("mIoU %.3f, pixel accuracy %.3f", figures["mIoU"], figures["pACC"])
        return OrderedDict(sem_seg=figures)


class InstanceEvaluator(COCOEvaluator):
    """Mask AP by the COCO protocol (AP, AP50, AP75, APs, APm, APl), also of a panoptic model's instances; box AP of a
    detector.

    A panoptic model numbers things and stuff together, so the thing ids need not be 0 ... n - 1, which
    detectron2's evaluator insists on: predictions are renumbered to the categories of the ground-truth file
    before they go there, and those that are no thing are left out. Box AP is computed where there are boxes:
    Mask2Former predicts none.

    Args:
        dataset_name: a registered data set with ``json_file`` in its metadata.
        distributed: gather the predictions of all processes.
        output_dir: folder for the predictions; None writes none.
    """

    def __init__(self, dataset_name: str, distributed: bool = True, output_dir: str | None = None) -> None:
        super().__init__(
            dataset_name,
            distributed=distributed,
            output_dir=output_dir,
            use_fast_impl=has_fast_coco_evaluation(),
        )
        self._coco_api.dataset.setdefault("info", {})  # pycocotools copies it without asking for it
        model_ids = self._metadata.thing_dataset_id_to_contiguous_id
        category_ids = sorted(self._coco_api.getCatIds())
        missing = sorted(set(model_ids) - set(category_ids))
        if missing:
            logger.warning(
                "%s lists no category %s: these things are left out of the AP",
                self._metadata.json_file,
                missing,
            )
        self._renumbered = torch.full((max(model_ids.values()) + 1,), -1, dtype=torch.int64)
        for place, category in enumerate(category_ids):
            if category in model_ids:
                self._renumbered[model_ids[category]] = place
        names = {category["id"]: category["name"] for category in self._coco_api.dataset["categories"]}
        self._metadata = type(self._metadata)(
            name=f"{dataset_name} renumbered",
            json_file=self._metadata.json_file,
            thing_classes=[names[category] for category in category_ids],
            thing_dataset_id_to_contiguous_id={category: i for i, category in enumerate(category_ids)},
        )

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> list[str]:
        boxes = not predictions or any(prediction["bbox"][2] > 0 for prediction in predictions)
        return ["bbox", "segm"] if boxes else ["segm"]

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add images: outputs hold "instances" with scores, pred_classes, pred_masks and pred_boxes."""
        renumbered = []
        for output in outputs:
            if "instances" not in output:
                renumbered.append(output)
                continue
            instances = output["instances"].to("cpu")  # a new object, so the model's own stays as it is
            classes = instances.pred_classes
            known = classes < len(self._renumbered)
            places = torch.where(known, self._renumbered[classes.clamp(max=len(self._renumbered) - 1)], -1)
            instances.pred_classes = places
            renumbered.append({**output, "instances": instances[places >= 0]})
        super().process(inputs, renumbered)


@contextlib.contextmanager
def _numpy_of_cityscapesscripts() -> Iterator[None]:
    """cityscapesScripts calls `numpy.in1d`, which numpy 2.4 no longer has: lend it `isin`, its successor."""
    lend = not hasattr(np, "in1d")
    if lend:
        np.in1d = np.isin  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if lend:
            del np.in1d  # type: ignore[attr-defined]


class CityscapesInstances(CityscapesInstanceEvaluator):
    """Cityscapes's own AP and AP50 of instance masks, in percent under "segm", also of a panoptic model's.

    Args:
        dataset_name: a registered data set with ``gt_dir`` and ``thing_classes`` in its metadata.
    """

    def evaluate(self) -> OrderedDict | None:
        """The figures; None but in the main process."""
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as protocol

        # It leaves a matches.json, which nobody reads, in the working directory, and fails to write numpy's numbers.
        write, protocol.writeDict2JSON = protocol.writeDict2JSON, lambda content, file_name: None
        try:
            with _numpy_of_cityscapesscripts():
                return super().evaluate()
        finally:
            protocol.writeDict2JSON = write


class CityscapesSemantic(CityscapesSemSegEvaluator):
    """Cityscapes's own IoU and iIoU of classes and categories ("_sup"), in percent under "sem_seg".

    Args:
        dataset_name: a registered data set with ``gt_dir`` in its metadata.
    """

    def evaluate(self) -> OrderedDict | None:
        """The figures; None but in the main process."""
        with _numpy_of_cityscapesscripts():
            return super().evaluate()


def _panoptic_evaluators(cfg: CfgNode, name: str, output_dir: str) -> list[DatasetEvaluator]:
    """PQ, AP and mIoU, as far as ``MODEL.MASK_FORMER.TEST`` switches the outputs on."""
    test = cfg.MODEL.MASK_FORMER.TEST
    found: list[DatasetEvaluator] = []
    if test.PANOPTIC_ON:
        found.append(COCOPanopticEvaluator(name, output_dir))
    if test.INSTANCE_ON:
        if os.path.isfile(MetadataCatalog.get(name).get("json_file") or ""):
            found.append(InstanceEvaluator(name, output_dir=output_dir))
        else:
            logger.warning("Data set '%s' has no instances json: its AP is not measured", name)
    if test.SEMANTIC_ON:
        found.append(SemanticEvaluator(name))
    return found


def _cityscapes_evaluators(cfg: CfgNode, name: str, kind: str, output_dir: str) -> list[DatasetEvaluator]:
    """Cityscapes's own figures; of a panoptic data set also PQ, as far as the switches ask for them."""
    test = cfg.MODEL.MASK_FORMER.TEST
    panoptic = kind == "cityscapes_panoptic_seg"
    found: list[DatasetEvaluator] = []
    if panoptic and test.PANOPTIC_ON:
        found.append(COCOPanopticEvaluator(name, output_dir))
    if kind == "cityscapes_sem_seg" or (panoptic and test.SEMANTIC_ON):
        found.append(CityscapesSemantic(name))
    if kind == "cityscapes_instance" or (panoptic and test.INSTANCE_ON):
        found.append(CityscapesInstances(name))
    return found


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator that the data set's ``evaluator_type`` asks for.

    Args:
        cfg: config; ``MODEL.MASK_FORMER.TEST.{SEMANTIC,INSTANCE,PANOPTIC}_ON`` choose among the figures of a
            panoptic data set.
        dataset_name: a registered data set, or a name that `ensure_registered` understands.
        output_dir: folder for predictions; by default ``OUTPUT_DIR/inference``.

    Raises:
        ValueError: unknown ``evaluator_type``, or every figure is switched off.
    """
    ensure_registered(dataset_name)
    output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    whole = MetadataCatalog.get(dataset_name).get("share_of")
    if whole and kind != "sem_seg":
        raise ValueError(
            f"Data set '{dataset_name}' is a share for training, and its annotation file is that of the whole: "
            f"evaluate on '{whole}'."
        )
    if kind == "sem_seg":
        found: list[DatasetEvaluator] = [SemanticEvaluator(dataset_name)]
    elif kind == "coco":
        found = [InstanceEvaluator(dataset_name, output_dir=output_dir)]
    elif kind in ("coco_panoptic_seg", "ade20k_panoptic_seg"):
        found = _panoptic_evaluators(cfg, dataset_name, output_dir)
    elif kind in ("cityscapes_sem_seg", "cityscapes_instance", "cityscapes_panoptic_seg"):
        found = _cityscapes_evaluators(cfg, dataset_name, kind, output_dir)
    else:
        raise ValueError(
            f"Data set '{dataset_name}' has evaluator_type '{kind}': "
            "set sem_seg, coco or coco_panoptic_seg in its metadata."
        )
    if not found:
        raise ValueError(
            f"Nothing of data set '{dataset_name}' would be evaluated: switch one of "
            "MODEL.MASK_FORMER.TEST.{SEMANTIC,INSTANCE,PANOPTIC}_ON on."
        )
    return found[0] if len(found) == 1 else DatasetEvaluators(found)
