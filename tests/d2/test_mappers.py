"""Training samples of the five mapper names, and the image alone for inference."""

import random
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jepa_plugins.core.images import ImageError
from jepa_plugins.d2.data import add_data_config
from jepa_plugins.d2.data import mappers as mappers_module
from jepa_plugins.d2.data.mappers import RECIPES, build_mapper, panoptic_ids, semantic_from_panoptic

SEGMENTS = [
    {"id": 70000, "category_id": 2, "iscrowd": 0},
    {"id": 300, "category_id": 0, "iscrowd": 0},
    {"id": 9, "category_id": 1, "iscrowd": 1},
]
HEIGHT, WIDTH = 40, 60


def _ids() -> np.ndarray:
    """Void ground, a segment on the left, one on the right, a crowd at the bottom."""
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    ids[:30, :20], ids[:30, 30:], ids[35:] = 70000, 300, 9
    return ids


def _colours(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)


@pytest.fixture()
def record(tmp_path: Path) -> dict:
    """A record with every kind of label; tests take away what they do not want."""
    rng, ids = np.random.default_rng(0), _ids()
    Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(_colours(ids)).save(tmp_path / "panoptic.png")
    labels = semantic_from_panoptic(ids, SEGMENTS).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    box = {"bbox": [0, 0, 20, 30], "bbox_mode": BoxMode.XYWH_ABS}
    run_lengths = mask_util.encode(np.asfortranarray((ids == 300).astype(np.uint8)))
    return {
        "file_name": str(tmp_path / "image.png"),
        "image_id": 4,
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "pan_seg_file_name": str(tmp_path / "panoptic.png"),
        "segments_info": SEGMENTS,
        "annotations": [
            {"category_id": 2, "iscrowd": 0, "segmentation": [[0, 0, 20, 0, 20, 30, 0, 30]], **box},
            {"category_id": 0, "iscrowd": 0, "segmentation": run_lengths, **box},
            {"category_id": 1, "iscrowd": 1, "segmentation": run_lengths, **box},
        ],
    }


def _config(name: str, **keys):
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (HEIGHT,)
    cfg.INPUT.IMAGE_SIZE = 64
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    for key, value in keys.items():
        node = cfg.INPUT.CROP if hasattr(cfg.INPUT.CROP, key) else cfg.INPUT
        setattr(node, key, value)
    return cfg


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)


def _map(record: dict, name: str, seed: int = 0, **keys) -> dict:
    mapper = build_mapper(_config(name, **keys), is_train=True)
    _seed(seed)
    return mapper(record)


def _without_flip(monkeypatch) -> None:
    monkeypatch.setattr(T.RandomFlip, "get_transform", lambda self, image: T.NoOpTransform())


KEYS = {
    "semantic": "sem_seg_file_name",
    "panoptic": "pan_seg_file_name",
    "instance": "annotations",
    "detection": "annotations",
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("seed", range(3))
def test_every_mapper_gives_a_consistent_sample(record, name: str, seed: int) -> None:
    before = repr(record)
    sample = _map(record, name, seed, ENABLED=True, TYPE="absolute", SIZE=(32, 32), SIZE_DIVISIBILITY=32)
    side = 64 if name.endswith("lsj") else 32
    instances = sample["instances"]
    channels, *size = sample["image"].shape
    assert channels == 3 and sample["image"].dtype == torch.uint8
    # a detector pads the images itself
    assert max(size) <= side if name == "coco_detection_lsj" else size == [side, side]
    assert sample["image"].is_contiguous() and instances.image_size == tuple(size)
    assert instances.gt_masks.dtype == torch.bool and instances.gt_classes.dtype == torch.int64
    assert instances.gt_masks.shape == (len(instances.gt_classes), *size)
    if "semantic" not in name:  # segments and objects exclude the crowd
        assert 1 not in instances.gt_classes
    assert (sample["height"], sample["width"], sample["image_id"]) == (HEIGHT, WIDTH, 4)
    assert repr(record) == before, "the data set's record was changed"
    assert not any(key in sample for key in ("annotations",) if "instance" in name)


def test_semantic_masks_are_the_classes_present_without_the_ignored_one(record, monkeypatch) -> None:
    _without_flip(monkeypatch)
    sample = _map(record, "mask_former_semantic")
    labels = torch.from_numpy(semantic_from_panoptic(_ids(), SEGMENTS))
    assert torch.equal(sample["sem_seg"], labels)
    assert sample["instances"].gt_classes.tolist() == [0, 1, 2]
    masks = sample["instances"].gt_masks
    assert all(torch.equal(masks[k], labels == k) for k in range(3))


def test_panoptic_masks_are_the_segments_without_crowds(record, monkeypatch) -> None:
    _without_flip(monkeypatch)
    sample = _map(record, "mask_former_panoptic")
    assert sample["instances"].gt_classes.tolist() == [2, 0]
    for mask, number in zip(sample["instances"].gt_masks, (70000, 300), strict=True):
        assert np.array_equal(mask.numpy(), _ids() == number)


def test_instance_masks_from_polygons_run_lengths_and_arrays(record, monkeypatch) -> None:
    _without_flip(monkeypatch)
    record["annotations"][2] = {**record["annotations"][1], "segmentation": _ids() == 9, "iscrowd": 0}
    sample = _map(record, "mask_former_instance")
    for mask, number in zip(sample["instances"].gt_masks, (70000, 300, 9), strict=True):
        assert np.array_equal(mask.numpy(), _ids() == number)


@pytest.mark.parametrize("name", ["mask_former_instance", "coco_instance_lsj"])
@pytest.mark.parametrize("seed", range(4))
def test_polygons_and_masks_go_through_the_same_geometry(record, name: str, seed: int) -> None:
    """A polygon cut by the crop covers what the mask of the same object covers, but for a rim of a pixel."""
    polygon, array = record["annotations"][0], {**record["annotations"][0], "segmentation": _ids() == 70000}
    record["annotations"] = [polygon]
    keys = {"ENABLED": True, "TYPE": "absolute", "SIZE": (24, 24), "MIN_SCALE": 0.8, "MAX_SCALE": 2.0}
    keys["MIN_SIZE_TRAIN"] = (50,)
    first = _map(record, name, seed, **keys)["instances"].gt_masks
    second = _map({**record, "annotations": [array]}, name, seed, **keys)["instances"].gt_masks
    assert len(first) == len(second)
    side = first.shape[-1]
    assert (first ^ second).sum() <= 3 * side


def test_objects_out_of_the_crop_stay_as_empty_masks_but_for_instance_lsj(record) -> None:
    far = [{**record["annotations"][0], "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}]
    record["annotations"] = far + record["annotations"][1:]
    crop = {"ENABLED": True, "TYPE": "absolute", "SIZE": (8, 8)}
    counts = [len(_map(record, "mask_former_instance", seed, **crop)["instances"]) for seed in range(5)]
    assert counts == [2] * 5
    jitter = {"MIN_SCALE": 4.0, "MAX_SCALE": 4.0}
    masks = [_map(record, "coco_instance_lsj", seed, **jitter)["instances"].gt_masks for seed in range(5)]
    assert all(mask.any() for image in masks for mask in image) and min(len(image) for image in masks) < 2
    kept = [_map(record, "coco_panoptic_lsj", seed, **jitter)["instances"] for seed in range(5)]
    assert all(len(instances) == 2 for instances in kept)


def test_padding_is_grey_ignored_and_in_no_mask(record, monkeypatch) -> None:
    _without_flip(monkeypatch)
    sample = _map(record, "mask_former_semantic", SIZE_DIVISIBILITY=64)
    assert sample["image"].shape == (3, 64, 64)
    assert (sample["image"][:, HEIGHT:] == 128).all() and (sample["image"][:, :, WIDTH:] == 128).all()
    assert (sample["sem_seg"][HEIGHT:] == 255).all() and not sample["instances"].gt_masks[:, HEIGHT:].any()
    assert _map(record, "mask_former_instance", SIZE_DIVISIBILITY=16)["image"].shape == (3, 48, 64)


@pytest.mark.parametrize("name", ["coco_panoptic_lsj", "coco_instance_lsj"])
def test_large_scale_jitter_pads_without_adding_to_masks(record, name: str) -> None:
    sample = _map(record, name, MIN_SCALE=0.5, MAX_SCALE=0.5)
    masks, boxes = sample["instances"].gt_masks, sample["instances"].gt_boxes.tensor
    assert (sample["image"][:, 24:] == 128).all() and not masks[:, 22:].any() and not masks[:, :, 32:].any()
    for mask, box in zip(masks, boxes.long().tolist(), strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    if "instance" in name:
        assert sample["padding_mask"][22:].all() and not sample["padding_mask"][:20, :30].any()


def test_newer_detectron2s_label_padding_is_switched_off(monkeypatch) -> None:
    seen = {}

    class NewerFixedSizeCrop(T.Augmentation):
        def __init__(self, crop_size, pad=True, pad_value=128.0, seg_pad_value=255):
            seen["value"] = seg_pad_value

    monkeypatch.setattr(mappers_module.T, "FixedSizeCrop", NewerFixedSizeCrop)
    build_mapper(_config("coco_panoptic_lsj"), True)
    assert seen == {"value": 0}


def test_boxes_of_empty_masks_are_zero() -> None:
    masks = torch.zeros(2, 5, 6, dtype=torch.bool)
    masks[1, 2:4, 1:6] = True
    assert mappers_module._tight_boxes(masks).tensor.tolist() == [[0, 0, 0, 0], [1, 2, 6, 4]]
    assert mappers_module._tight_boxes(masks[:0]).tensor.shape == (0, 4)


def test_an_image_without_objects_gives_empty_boolean_masks(record) -> None:
    empty = {**record, "annotations": [], "segments_info": []}
    Image.new("L", (WIDTH, HEIGHT), 255).save(record["sem_seg_file_name"])
    for name in RECIPES:
        masks = _map(empty, name)["instances"].gt_masks
        assert masks.dtype == torch.bool and masks.shape[0] == 0 and masks.shape[1] > 0


def test_the_constrained_crop_works_from_panoptic_labels_alone(record) -> None:
    keys = {"ENABLED": True, "TYPE": "absolute", "SIZE": (30, 16), "SINGLE_CATEGORY_MAX_AREA": 0.9}
    with_labels = [_map(record, "mask_former_panoptic", seed, **keys)["sem_seg"] for seed in range(8)]
    del record["sem_seg_file_name"]
    without = [_map(record, "mask_former_panoptic", seed, **keys)["sem_seg"] for seed in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(with_labels, without, strict=True))
    assert "sem_seg" not in _map(record, "mask_former_panoptic")
    varied = 0
    for labels in without:
        counts = labels[labels != 255].unique(return_counts=True)[1]
        varied += len(counts) > 1 and bool(counts.max() < 0.9 * counts.sum())
    assert varied >= 6  # a crop at random is that varied in about half of the draws


def test_channel_order(record, monkeypatch) -> None:
    _without_flip(monkeypatch)
    cfg = _config("mask_former_semantic")
    rgb = build_mapper(cfg, True)(record)["image"]
    cfg.INPUT.FORMAT = "BGR"
    assert torch.equal(build_mapper(cfg, True)(record)["image"], rgb.flip(0))


def test_colour_jitter_changes_colours_and_no_label(record, monkeypatch) -> None:
    pytest.importorskip("cv2")
    _without_flip(monkeypatch)
    plain = _map(record, "mask_former_semantic")
    jittered = [_map(record, "mask_former_semantic", seed, COLOR_AUG_SSD=True) for seed in range(4)]
    assert any(not torch.equal(plain["image"], sample["image"]) for sample in jittered)
    assert all(torch.equal(plain["sem_seg"], sample["sem_seg"]) for sample in jittered)


def test_colour_jitter_without_opencv_names_the_remedy(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "detectron2.projects.point_rend", None)
    with pytest.raises(ImportError, match="INPUT.COLOR_AUG_SSD.*pip install opencv-python-headless"):
        build_mapper(_config("mask_former_semantic", COLOR_AUG_SSD=True), True)


def test_flip_of_jitter_follows_the_key(record) -> None:
    keys = {"MIN_SCALE": 1.0, "MAX_SCALE": 1.0}
    images = [_map(record, "coco_panoptic_lsj", s, RANDOM_FLIP="none", **keys)["image"] for s in range(6)]
    assert all(torch.equal(images[0], image) for image in images)
    flipped = [
        _map(record, "coco_panoptic_lsj", s, RANDOM_FLIP="vertical", **keys)["image"] for s in range(6)
    ]
    assert len({image.sum((0, 2)).argmax().item() for image in flipped}) >= 2


def test_semantic_targets_from_panoptic_labels_alone(record) -> None:
    """Crowds count as their class, pixels without a segment not at all."""
    want = _map(record, "mask_former_semantic", 3)
    del record["sem_seg_file_name"]
    got = _map(record, "mask_former_semantic", 3)
    assert torch.equal(got["sem_seg"], want["sem_seg"]) and "pan_seg_file_name" not in got
    assert got["instances"].gt_classes.tolist() == [0, 1, 2]
    assert torch.equal(got["instances"].gt_masks, want["instances"].gt_masks)


# --- bad input ---


@pytest.mark.parametrize("name", RECIPES)
def test_a_record_of_another_task_is_named_with_the_key(record, name: str) -> None:
    key = next(value for kind, value in KEYS.items() if kind in name)
    for label in {key, "pan_seg_file_name"} if "semantic" in name else {key}:
        del record[label]
    with pytest.raises(ValueError, match=rf"{name} needs '{key}'.*image\.png"):
        _map(record, name)


def test_a_class_beyond_the_models_is_named(record) -> None:
    Image.new("L", (WIDTH, HEIGHT), 3).save(record["sem_seg_file_name"])
    with pytest.raises(ValueError, match=r"labels\.png' holds class 3, but .*NUM_CLASSES is 3"):
        _map(record, "mask_former_semantic")


@pytest.mark.parametrize(
    ("name", "key"),
    [("mask_former_semantic", "sem_seg_file_name"), ("coco_panoptic_lsj", "pan_seg_file_name")],
)
def test_labels_of_another_size_are_refused(record, name: str, key: str) -> None:
    Image.new("L", (WIDTH + 1, HEIGHT)).save(record[key])
    with pytest.raises(ValueError, match=r"image\.png' have height and width \(40, 61\)"):
        _map(record, name)


def test_a_missing_segmentation_and_a_corrupt_image(record) -> None:
    del record["annotations"][1]["segmentation"]
    with pytest.raises(ValueError, match="no usable segmentation"):
        _map(record, "mask_former_instance")
    Path(record["file_name"]).write_bytes(b"x")
    with pytest.raises(ImageError, match=r"image\.png"):
        _map(record, "mask_former_semantic")


def test_unknown_names_are_listed() -> None:
    cfg = _config("mask_former")
    with pytest.raises(
        ValueError, match="INPUT.DATASET_MAPPER_NAME is 'mask_former': use one of mask_former_sem"
    ):
        build_mapper(cfg, True)
    cfg.INPUT.FORMAT = "HSV"
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'HSV'"):
        build_mapper(cfg, False)


def test_the_ignored_label_is_the_data_sets(record) -> None:
    name = f"{record['file_name']} ignores 2"
    MetadataCatalog.get(name).set(ignore_label=2)
    from detectron2.data import DatasetCatalog

    DatasetCatalog.register(name, lambda: [record])
    cfg = _config("mask_former_semantic")
    cfg.DATASETS.TRAIN = (name,)
    Image.new("L", (WIDTH, HEIGHT), 2).save(record["sem_seg_file_name"])
    assert len(build_mapper(cfg, True)(record)["instances"]) == 0


# --- inference and label images ---


def test_inference_mapper_resizes_the_image_alone(record) -> None:
    cfg = _config("mask_former_semantic")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 20, 100
    sample = build_mapper(cfg, False)(record)
    assert sample["image"].shape == (3, 20, 30) and (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
    assert not {"annotations", "sem_seg_file_name", "segments_info", "instances"} & sample.keys()


def test_inference_mapper_agrees_with_detectron2s_on_ordinary_images(record) -> None:
    from detectron2.data import DatasetMapper

    cfg = _config("mask_former_semantic")
    cfg.INPUT.MIN_SIZE_TEST = 33
    ours, theirs = build_mapper(cfg, False)(record), DatasetMapper(cfg, False)(dict(record))
    assert torch.equal(ours["image"], theirs["image"])


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(1, 2**24 - 1), max_size=6, unique=True), seed=st.integers(0, 99))
def test_semantic_labels_from_panoptic_ones(numbers: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, *numbers], size=(5, 7))
    segments = [{"id": number, "category_id": i % 3} for i, number in enumerate(numbers)]
    read = panoptic_ids(_colours(ids))
    assert np.array_equal(read, ids)
    expected = np.full(ids.shape, 255)
    for segment in segments:
        expected[ids == segment["id"]] = segment["category_id"]
    assert np.array_equal(semantic_from_panoptic(read, segments), expected)
