"""The files of the data sets that the configurations name, and what makes them.

Counts are those of the published data sets.
"""

from __future__ import annotations

from dataclasses import dataclass

from jepa_plugins.core.subsets import LOW_DATA_PERCENT


@dataclass(frozen=True)
class Part:
    """Files of one kind.

    Attributes:
        pattern: below the data set's folder; * stands for any name.
        count: how many there are.
        source: a key of `SOURCES`, what makes them.
        use: what else than training on the set asks for them; without it they are not optional.
    """

    pattern: str
    count: int
    source: str
    use: str = ""


@dataclass(frozen=True)
class DataSet:
    """A data set in a folder below DETECTRON2_DATASETS.

    Attributes:
        name: what the check calls it.
        registered: the names that configurations use.
        folder: its folder.
        parts: what is in it.
    """

    name: str
    registered: tuple[str, ...]
    folder: str
    parts: tuple[Part, ...]


ADE20K, CITYSCAPES, COCO = "ADEChallengeData2016", "cityscapes", "coco"
# What to do, where {root} is the folder of all data sets.
SOURCES = {
    "ade20k": "unpack http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip in {root}",
    "ade20k labels": "python tools/prepare_data.py ade20k --out {root}/ADEChallengeData2016",
    "ade20k objects": "unpack http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar in "
    "{root}/ADEChallengeData2016, then python tools/prepare_data.py ade20k --out {root}/ADEChallengeData2016",
    "cityscapes": "pip install cityscapesScripts; csDownload -d {root}/cityscapes leftImg8bit_trainvaltest.zip "
    "gtFine_trainvaltest.zip; unpack both in {root}/cityscapes",
    "cityscapes labels": "python tools/prepare_data.py cityscapes --out {root}/cityscapes",
    "coco train": "unpack http://images.cocodataset.org/zips/train2017.zip in {root}/coco",
    "coco val": "unpack http://images.cocodataset.org/zips/val2017.zip in {root}/coco",
    "coco instance": "unpack http://images.cocodataset.org/annotations/annotations_trainval2017.zip in {root}/coco",
    "coco panoptic": "unpack http://images.cocodataset.org/annotations/panoptic_annotations_trainval2017.zip in "
    "{root}/coco, then the two zip files that it holds in {root}/coco as well",
    "coco labels": "python tools/prepare_data.py coco --out {root}/coco",
    "imagenet": "python tools/prepare_data.py imagenet --out {root}/imagenet "
    "--train-archive ILSVRC2012_img_train.tar",
    "imagenet val": "python tools/prepare_data.py imagenet --out {root}/imagenet "
    "--val-archive ILSVRC2012_img_val.tar --val-labels ILSVRC2012_devkit_t12.tar.gz",
}


def _ade20k(task: str) -> tuple[Part, ...]:
    parts = []
    for split, folder, count in (("train", "training", 20210), ("val", "validation", 2000)):
        parts.append(Part(f"images/{folder}/*.jpg", count, "ade20k"))
        labels = f"annotations_detectron2/{folder}/*.png"
        instances = f"ade20k_instance_{split}.json"
        if task == "semantic":
            parts.append(Part(labels, count, "ade20k labels"))
        elif task == "instance":
            parts.append(Part(instances, 1, "ade20k objects"))
        else:
            parts.append(Part(f"ade20k_panoptic_{split}.json", 1, "ade20k objects"))
            parts.append(Part(f"ade20k_panoptic_{split}/*.png", count, "ade20k objects"))
            parts.append(Part(labels, count, "ade20k labels", "mIoU over ADE20K's own labels"))
            if split == "val":
                parts.append(Part(instances, 1, "ade20k objects", "AP"))
    return tuple(parts)


def _cityscapes(task: str) -> tuple[Part, ...]:
    kinds = {
        "semantic": ("polygons.json", "labelIds.png", "labelTrainIds.png"),
        "instance": ("polygons.json", "labelIds.png", "instanceIds.png"),
        "panoptic": ("labelIds.png", "instanceIds.png", "labelTrainIds.png"),
    }[task]
    parts = []
    for split, count in (("train", 2975), ("val", 500)):
        parts.append(Part(f"leftImg8bit/{split}/*/*_leftImg8bit.png", count, "cityscapes"))
        for kind in kinds:
            source = "cityscapes labels" if "TrainIds" in kind else "cityscapes"
            parts.append(Part(f"gtFine/{split}/*/*_gtFine_{kind}", count, source))
        if task == "panoptic":
            parts.append(Part(f"gtFine/cityscapes_panoptic_{split}.json", 1, "cityscapes labels"))
            parts.append(Part(f"gtFine/cityscapes_panoptic_{split}/*.png", count, "cityscapes labels"))
    return tuple(parts)


def _coco(task: str) -> tuple[Part, ...]:
    parts = []
    for split, count in (("train", 118287), ("val", 5000)):
        parts.append(Part(f"{split}2017/*.jpg", count, f"coco {split}"))
        instances = f"annotations/instances_{split}2017.json"
        if task == "instance":
            parts.append(Part(instances, 1, "coco instance"))
        elif task == "panoptic":
            parts.append(Part(f"annotations/panoptic_{split}2017.json", 1, "coco panoptic"))
            parts.append(Part(f"panoptic_{split}2017/*.png", count, "coco panoptic"))
            labels = f"panoptic_semseg_{split}2017/*.png"
            parts.append(
                Part(labels, count, "coco labels", "labels read faster, and the published Mask2Former")
            )
            if split == "val":
                parts.append(Part(instances, 1, "coco instance", "AP"))
    return tuple(parts)


def _both(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(split) for split in ("train", "val"))


def _shares(name: str) -> tuple[str, ...]:
    return tuple(f"{name}_train_{percent}pct" for percent in LOW_DATA_PERCENT)


DATA_SETS = (
    DataSet(
        "ade20k_semantic",
        (*_both("ade20k_sem_seg_{}"), *_shares("ade20k_sem_seg")),
        ADE20K,
        _ade20k("semantic"),
    ),
    DataSet(
        "ade20k_panoptic",
        (*_both("ade20k_panoptic_{}"), *_shares("ade20k_panoptic")),
        ADE20K,
        _ade20k("panoptic"),
    ),
    DataSet(
        "ade20k_instance",
        (*_both("ade20k_instance_{}"), *_shares("ade20k_instance")),
        ADE20K,
        _ade20k("instance"),
    ),
    DataSet("cityscapes_semantic", _both("cityscapes_fine_sem_seg_{}"), CITYSCAPES, _cityscapes("semantic")),
    DataSet("cityscapes_panoptic", _both("cityscapes_fine_panoptic_{}"), CITYSCAPES, _cityscapes("panoptic")),
    DataSet(
        "cityscapes_instance", _both("cityscapes_fine_instance_seg_{}"), CITYSCAPES, _cityscapes("instance")
    ),
    DataSet(
        "coco_panoptic",
        (*_both("coco_2017_{}_panoptic"), *_both("coco_2017_{}_panoptic_with_sem_seg")),
        COCO,
        _coco("panoptic"),
    ),
    DataSet("coco_instance", _both("coco_2017_{}"), COCO, _coco("instance")),
    DataSet("coco_unlabelled", ("coco/train2017",), COCO, _coco("unlabelled")[:1]),
    DataSet("imagenet", ("imagenet/train",), "imagenet", (Part("train/*/*.JPEG", 1281167, "imagenet"),)),
    DataSet("imagenet_val", ("imagenet/val",), "imagenet", (Part("val/*/*.JPEG", 50000, "imagenet val"),)),
)
