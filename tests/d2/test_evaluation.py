"""PQ, AP and mIoU of predictions whose figures are known."""

import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jepa_plugins.d2.data.catalog import ensure_registered
from jepa_plugins.d2.evaluation import (
    InstanceEvaluator,
    SemanticEvaluator,
    build_evaluator,
    has_fast_coco_evaluation,
)

SHARED = Path(os.getenv("JEPA_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"
SIZE = (40, 120)
# Stuff first and ids out of order: the things' contiguous ids are 1 and 3, their sorted ids 7 and 30.
CATEGORIES = [
    {"id": 90, "name": "sky", "isthing": 0},
    {"id": 30, "name": "cat", "isthing": 1},
    {"id": 50, "name": "road", "isthing": 0},
    {"id": 7, "name": "dog", "isthing": 1},
]
# Per image: segment id, contiguous class, rows, columns. Areas: 400 (small), 1,600 (medium).
OBJECTS = [
    [(70_000, 1, slice(0, 20), slice(0, 20)), (300, 3, slice(0, 40), slice(40, 80))],
    [(9, 3, slice(10, 30), slice(100, 120))],
]
GROUND = 65_536


def _ids(number: int) -> np.ndarray:
    ids = np.full(SIZE, GROUND, dtype=np.int64)
    ids[:, 90:95] = 0  # void
    for segment, _, rows, columns in OBJECTS[number]:
        ids[rows, columns] = segment
    return ids


def _annotation(number: int) -> dict:
    ids = _ids(number)
    classes = {GROUND: 0, **{segment: label for segment, label, _, _ in OBJECTS[number]}}
    segments = [
        {
            "id": segment,
            "category_id": CATEGORIES[label]["id"],
            "iscrowd": 0,
            "area": int((ids == segment).sum()),
            "bbox": [0, 0, 1, 1],
        }
        for segment, label in classes.items()
    ]
    return {"image_id": number + 1, "file_name": f"{number}.png", "segments_info": segments}


def _instance_annotations() -> list[dict]:
    found = []
    for number, objects in enumerate(OBJECTS):
        for segment, label, rows, columns in objects:
            mask = np.asfortranarray((_ids(number) == segment).astype(np.uint8))
            lengths = mask_util.encode(mask)
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": number + 1,
                    "category_id": CATEGORIES[label]["id"],
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": [columns.start, rows.start, 20, 20],
                    "segmentation": {"size": list(SIZE), "counts": lengths["counts"].decode()},
                }
            )
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two images with panoptic, instance and semantic labels; the instances file has no "info"."""
    root = tmp_path_factory.mktemp("evaluation")
    for folder in ("val", "panoptic_val", "annotations/val", "images/val"):
        (root / folder).mkdir(parents=True)
    for number in range(2):
        ids = _ids(number)
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
        Image.fromarray(colours).save(root / "panoptic_val" / f"{number}.png")
        for folder in ("val", "images/val"):
            Image.new("RGB", SIZE[::-1]).save(root / folder / f"{number}.jpg")
        Image.fromarray(_labels(number)).save(root / "annotations/val" / f"{number}.png")
    images = [{"id": n + 1, "file_name": f"{n}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in range(2)]
    panoptic = {"images": images, "categories": CATEGORIES, "annotations": [_annotation(0), _annotation(1)]}
    things = [category for category in CATEGORIES if category["isthing"]]
    instances = {"images": images, "categories": things, "annotations": _instance_annotations()}
    (root / "annotations" / "panoptic_val.json").write_text(json.dumps(panoptic))
    (root / "annotations" / "instances_val.json").write_text(json.dumps(instances))
    (root / "classes.txt").write_text("sky\ncat\nroad\ndog\n")
    return root


def _labels(number: int) -> np.ndarray:
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[:, 90:95] = 255
    for _, label, rows, columns in OBJECTS[number]:
        labels[rows, columns] = label
    return labels


def _scores(labels: np.ndarray, count: int = 4) -> torch.Tensor:
    return (
        torch.nn.functional.one_hot(torch.from_numpy(labels.astype(np.int64)), count).permute(2, 0, 1).float()
    )


def _instances(classes: list[int], masks: list[np.ndarray]) -> Instances:
    instances = Instances(SIZE)
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    instances.scores = torch.linspace(0.9, 0.8, len(classes))
    instances.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, *SIZE))
    instances.pred_boxes = Boxes(torch.zeros(len(classes), 4))
    return instances


def _perfect(number: int) -> dict:
    """Output of a model that is right everywhere (and says something about void pixels, too)."""
    ids, objects = _ids(number), OBJECTS[number]
    panoptic = np.zeros(SIZE, dtype=np.int32)
    panoptic[ids == GROUND] = 1
    segments = [{"id": 1, "isthing": False, "category_id": 0}]
    for place, (segment, label, _, _) in enumerate(objects):
        panoptic[ids == segment] = place + 2
        segments.append({"id": place + 2, "isthing": True, "category_id": label})
    return {
        "sem_seg": _scores(np.where(_labels(number) == 255, 2, _labels(number))),
        "panoptic_seg": (torch.from_numpy(panoptic), segments),
        "instances": _instances([label for _, label, _, _ in objects], [ids == s for s, _, _, _ in objects]),
    }


def _config(output: Path, semantic: bool = True, instance: bool = True, panoptic: bool = True) -> CfgNode:
    test = {"SEMANTIC_ON": semantic, "INSTANCE_ON": instance, "PANOPTIC_ON": panoptic}
    return CfgNode({"MODEL": {"MASK_FORMER": {"TEST": test}}, "OUTPUT_DIR": str(output)})


def _run(evaluator, name: str, outputs: list[dict]) -> dict:
    evaluator.reset()
    for record, output in zip(DatasetCatalog.get(name), outputs, strict=True):
        number = int(Path(record["file_name"]).stem)
        entry = {"file_name": record["file_name"], "image_id": number + 1}
        evaluator.process([entry], [output])
    return evaluator.evaluate()


def test_a_perfect_panoptic_model_scores_100_everywhere(root: Path, tmp_path: Path) -> None:
    name = f"coco_panoptic@{root}@val"
    evaluator = build_evaluator(_config(tmp_path), name)
    results = _run(evaluator, name, [_perfect(0), _perfect(1)])
    assert results["panoptic_seg"]["PQ"] == results["panoptic_seg"]["PQ_th"] == 100
    segm = results["segm"]
    assert all(segm[key] == pytest.approx(100) for key in ("AP", "APs", "APm", "AP-dog", "AP-cat"))
    assert math.isnan(segm["APl"])  # there is no large object
    semantic = results["sem_seg"]
    assert semantic["mIoU"] == semantic["pACC"] == 100 and math.isnan(semantic["IoU-road"])
    assert "bbox" not in results
    assert (tmp_path / "inference").is_dir()


def test_mistakes_cost_what_they_should(root: Path, tmp_path: Path) -> None:
    """Image 1's dog is called a cat: 1 of 2 dogs is lost, and the cats get a false positive."""
    name = f"coco_panoptic@{root}@val"
    wrong = _perfect(1)
    wrong["panoptic_seg"][1][1]["category_id"] = 1
    wrong["instances"].pred_classes[:] = 1
    wrong["instances"].scores[:] = 0.99  # before the true cat, so that its precision suffers
    labels = np.where(_labels(1) == 3, 1, _labels(1))
    wrong["sem_seg"] = _scores(np.where(labels == 255, 0, labels))
    results = _run(build_evaluator(_config(tmp_path), name), name, [_perfect(0), wrong])
    # dog: 1 hit, 1 miss; cat: 1 hit, 1 false positive; sky: 2 hits. PQ = hits / (hits + errors / 2).
    assert results["panoptic_seg"]["PQ_th"] == pytest.approx(100 * (1 / 1.5 + 1 / 1.5) / 2)
    assert results["panoptic_seg"]["PQ_st"] == pytest.approx(100)
    recalled = np.linspace(0, 1, 101)
    assert results["segm"]["AP-dog"] == pytest.approx(100 * (recalled <= 0.5).mean())
    assert results["segm"]["AP-cat"] == pytest.approx(50)
    # IoU: cat 400 / (400 + 400), dog 1,600 / (1,600 + 400), sky 1.
    assert results["sem_seg"]["mIoU"] == pytest.approx(100 * (1 + 0.5 + 0.8) / 3)
    assert results["sem_seg"]["mACC"] == pytest.approx(100 * (1 + 1 + 0.8) / 3)


def test_switches_choose_the_figures(root: Path, tmp_path: Path) -> None:
    name = f"coco_panoptic@{root}@val"
    assert isinstance(build_evaluator(_config(tmp_path, False, False, True), name), COCOPanopticEvaluator)
    assert isinstance(build_evaluator(_config(tmp_path, True, False, False), name), SemanticEvaluator)
    assert isinstance(build_evaluator(_config(tmp_path, False, True, False), name), InstanceEvaluator)
    assert isinstance(build_evaluator(_config(tmp_path), name), DatasetEvaluators)
    with pytest.raises(ValueError, match="switch one of"):
        build_evaluator(_config(tmp_path, False, False, False), name)


def test_without_an_instances_file_the_ap_is_left_out(root: Path, tmp_path: Path, caplog) -> None:
    for entry in ("val", "panoptic_val"):
        (tmp_path / entry).symlink_to(root / entry)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/panoptic_val.json").symlink_to(root / "annotations/panoptic_val.json")
    evaluator = build_evaluator(_config(tmp_path, panoptic=False), f"coco_panoptic@{tmp_path}@val")
    assert isinstance(evaluator, SemanticEvaluator) and "its AP is not measured" in caplog.text


def test_instances_of_stuff_or_unknown_classes_are_left_out(root: Path, tmp_path: Path) -> None:
    name = f"coco_panoptic@{root}@val"
    output = _perfect(0)
    ids, mine = _ids(0), output["instances"]
    extra = _instances([0, 17], [ids == GROUND, ids == 0])
    output["instances"] = Instances.cat([mine, extra])
    results = _run(InstanceEvaluator(name, output_dir=str(tmp_path)), name, [output, _perfect(1)])
    assert results["segm"]["AP"] == pytest.approx(100)
    assert output["instances"].pred_classes.tolist() == [1, 3, 0, 17]


def test_an_instance_model_counts_its_own_ids(root: Path, tmp_path: Path) -> None:
    name = f"coco_instance@{root}@val"  # dog is 0 and cat is 1 here
    outputs = [_perfect(0), _perfect(1)]
    for output in outputs:
        output["instances"].pred_classes = (output["instances"].pred_classes == 1).long()
    results = _run(build_evaluator(_config(tmp_path), name), name, outputs)
    assert results["segm"]["AP"] == pytest.approx(100) and "AP-dog" in results["segm"]


def test_a_model_that_finds_nothing_is_no_error(root: Path, tmp_path: Path) -> None:
    name = f"coco_instance@{root}@val"
    outputs = [{"instances": _instances([], [])}, {"instances": _instances([], [])}]
    results = _run(build_evaluator(_config(tmp_path), name), name, outputs)
    assert math.isnan(results["segm"]["AP"])


def test_semantic_folder_and_panoptic_labels_agree(root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    outputs = [{"sem_seg": torch.from_numpy(rng.random((4, *SIZE)))} for _ in range(2)]
    results = []
    for name in (f"folder_semantic@{root}@val", f"coco_panoptic@{root}@val"):
        ensure_registered(name)
        results.append(_run(SemanticEvaluator(name), name, outputs)["sem_seg"])
    assert results[0].keys() == results[1].keys()
    np.testing.assert_equal(list(results[0].values()), list(results[1].values()))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_semantic_figures_agree_with_detectron2s(tmp_path_factory, seed: int) -> None:
    folder, rng = tmp_path_factory.mktemp("agree"), np.random.default_rng(seed)
    labels = rng.integers(0, 4, (9, 11)).astype(np.uint8)
    labels[0, :4], labels[1, :3] = range(4), 255  # every class is there, and so is the ignored label
    Image.fromarray(labels).save(folder / "0.png")
    name, record = str(folder), {"file_name": "0.jpg", "sem_seg_file_name": str(folder / "0.png")}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(stuff_classes=list("abcd"), ignore_label=255)
    outputs = [{"sem_seg": torch.from_numpy(rng.random((4, 9, 11)))}]
    ours = _run(SemanticEvaluator(name), name, outputs)["sem_seg"]
    theirs = _run(SemSegEvaluator(name), name, outputs)["sem_seg"]
    for key, value in ours.items():
        assert value == pytest.approx(theirs[key]), key


def test_a_class_that_is_only_predicted_counts_as_zero(root: Path) -> None:
    name = f"folder_semantic@{root}@val"
    ensure_registered(name)
    outputs = [{"sem_seg": _scores(np.where(_labels(n) == 255, 0, _labels(n)))} for n in range(2)]
    outputs[1]["sem_seg"] = _scores(np.where(_labels(1) == 0, 2, np.minimum(_labels(1), 3)))
    figures = _run(SemanticEvaluator(name), name, outputs)["sem_seg"]
    sky = [(_labels(n) == 0).sum() for n in range(2)]
    assert figures["IoU-road"] == 0
    assert figures["mIoU"] == pytest.approx(100 * (sky[0] / sum(sky) + 1 + 0 + 1) / 4)


def test_wrong_shapes_and_labels_are_named(root: Path, tmp_path: Path) -> None:
    name = f"folder_semantic@{root}@val"
    ensure_registered(name)
    with pytest.raises(ValueError, match=r"0\.jpg' have shape \(54, 40, 120\), but there are 4 classes"):
        _run(SemanticEvaluator(name), name, [{"sem_seg": torch.zeros(54, *SIZE)}] * 2)
    other = f"{tmp_path} with a wrong label"
    Image.new("L", (3, 2), 9).save(tmp_path / "0.png")
    record = {"file_name": "0.jpg", "sem_seg_file_name": str(tmp_path / "0.png")}
    DatasetCatalog.register(other, lambda: [record])
    MetadataCatalog.get(other).set(stuff_classes=["a"], ignore_label=255)
    with pytest.raises(ValueError, match=r"0\.jpg' hold class 9, but there are 1 classes"):
        _run(SemanticEvaluator(other), other, [{"sem_seg": torch.zeros(1, 2, 3)}])


def test_matrices_of_all_processes_are_added(root: Path, monkeypatch) -> None:
    name = f"folder_semantic@{root}@val"
    ensure_registered(name)
    parts = []
    for number in range(2):
        part = SemanticEvaluator(name)
        file_name = DatasetCatalog.get(name)[number]["file_name"]
        part.process([{"file_name": file_name}], [{"sem_seg": _scores(np.full(SIZE, 0))}])
        parts.append(part)
    whole = _run(SemanticEvaluator(name), name, [{"sem_seg": _scores(np.full(SIZE, 0))}] * 2)
    from jepa_plugins.d2 import evaluation

    monkeypatch.setattr(evaluation.comm, "all_gather", lambda matrix: [part._matrix for part in parts])
    np.testing.assert_equal(parts[0].evaluate()["sem_seg"], whole["sem_seg"])
    monkeypatch.setattr(evaluation.comm, "is_main_process", lambda: False)
    assert parts[1].evaluate() is None


def test_an_unknown_kind_of_data_set_is_named(tmp_path: Path) -> None:
    name = f"{tmp_path} odd"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(evaluator_type="odd")
    with pytest.raises(ValueError, match="evaluator_type 'odd': set sem_seg, coco"):
        build_evaluator(_config(tmp_path), name)


def test_cityscapes_needs_no_gpu(tmp_path: Path) -> None:
    pytest.importorskip("cityscapesscripts")
    for name, kind in (
        ("cityscapes_fine_sem_seg_val", "CityscapesSemantic"),
        ("cityscapes_fine_instance_seg_val", "CityscapesInstances"),
    ):
        assert type(build_evaluator(_config(tmp_path), name)).__name__ == kind


def test_fast_coco_evaluation_is_asked_for_by_its_operators(monkeypatch) -> None:
    without = types.ModuleType("detectron2._C")
    monkeypatch.setitem(sys.modules, "detectron2._C", without)
    assert not has_fast_coco_evaluation()
    without.COCOevalEvaluateImages = without.COCOevalAccumulate = print
    assert has_fast_coco_evaluation()
    monkeypatch.setitem(sys.modules, "detectron2._C", None)
    assert not has_fast_coco_evaluation()


@pytest.mark.skipif(not (SHARED / "coco_tiny").is_dir(), reason="the coco_tiny sample is not here")
def test_ground_truth_as_prediction_on_real_labels(tmp_path: Path) -> None:
    from jepa_plugins.core.images import read_image
    from jepa_plugins.d2.data.mappers import panoptic_ids, semantic_from_panoptic

    name = f"coco_panoptic@{SHARED / 'coco_tiny'}@val2017"
    panoptic = build_evaluator(_config(tmp_path, False, False), name)
    semantic = build_evaluator(_config(tmp_path, True, False, False), name)
    panoptic.reset()
    for number, record in enumerate(DatasetCatalog.get(name)):
        ids = panoptic_ids(read_image(record["pan_seg_file_name"], apply_orientation=False))
        numbers = np.zeros(ids.shape, dtype=np.int32)
        segments = []
        for place, segment in enumerate(record["segments_info"], start=1):
            numbers[ids == segment["id"]] = place
            segments.append(
                {"id": place, "isthing": segment["isthing"], "category_id": segment["category_id"]}
            )
        entry = {"file_name": record["file_name"], "image_id": record["image_id"]}
        panoptic.process([entry], [{"panoptic_seg": (torch.from_numpy(numbers), segments)}])
        if number < 8:
            labels = semantic_from_panoptic(ids, record["segments_info"])
            semantic.process([entry], [{"sem_seg": _scores(labels, 81)}])
    assert semantic.evaluate()["sem_seg"]["mIoU"] == 100
    assert panoptic.evaluate()["panoptic_seg"]["PQ"] == pytest.approx(100)
