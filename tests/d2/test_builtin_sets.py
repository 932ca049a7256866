"""The data sets of Mask2Former under their published names, on small trees in their layouts."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest

pytest.importorskip("detectron2")

import torch  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import BACKBONE, SMALL, options, train  # noqa: E402

from jepa_plugins.d2.data import builtin, catalog  # noqa: E402
from jepa_plugins.d2.data.builtin import NAMES, ade20k_categories, register_builtin  # noqa: E402
from jepa_plugins.d2.data.catalog import check_num_classes, ensure_registered, num_classes  # noqa: E402
from jepa_plugins.d2.data.mappers import build_mapper  # noqa: E402
from jepa_plugins.d2.evaluation import build_evaluator  # noqa: E402

SIZE = (40, 120)
# segment id, ADE20K's class, rows, columns; bed and lamp are things, the ground is a wall
OBJECTS = [(70_000, 7, slice(0, 20), slice(0, 20)), (300, 36, slice(0, 40), slice(40, 80))]
GROUND = 65_536


@pytest.fixture()
def fresh(monkeypatch, tmp_path: Path):
    """Our names free again, and DETECTRON2_DATASETS an empty folder; afterwards as before."""
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield tmp_path
    for name in NAMES:
        for known in (DatasetCatalog, MetadataCatalog):
            if name in known.list():
                known.remove(name)
    monkeypatch.undo()
    register_builtin()


def _ids() -> np.ndarray:
    ids = np.full(SIZE, GROUND, dtype=np.int64)
    for segment, _, rows, columns in OBJECTS:
        ids[rows, columns] = segment
    return ids


def _ade20k(root: Path, split: str = "val", folder: str = "validation") -> Path:
    """One image in the layout that Mask2Former's scripts leave; image ids are words."""
    root, stem, ids = root / "ADEChallengeData2016", f"ADE_{split}_00000001", _ids()
    for place in (f"images/{folder}", f"annotations_detectron2/{folder}", f"ade20k_panoptic_{split}"):
        (root / place).mkdir(parents=True)
    Image.new("RGB", SIZE[::-1]).save(root / f"images/{folder}/{stem}.jpg")
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    Image.fromarray(colours).save(root / f"ade20k_panoptic_{split}/{stem}.png")
    labels = np.zeros(SIZE, dtype=np.uint8)
    classes = {GROUND: 0, **{segment: label for segment, label, _, _ in OBJECTS}}
    segments, instances = [], []
    for segment, label in classes.items():
        mask = ids == segment
        labels[mask] = label
        common = {"category_id": label, "area": int(mask.sum()), "bbox": [0, 0, 20, 20], "iscrowd": 0}
        segments.append({"id": segment, **common})
        if segment != GROUND:
            code = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            outline = {"size": list(SIZE), "counts": code["counts"].decode()}
            instances.append({"id": segment, "image_id": stem, "segmentation": outline, **common})
    Image.fromarray(labels).save(root / f"annotations_detectron2/{folder}/{stem}.png")
    images = [{"id": stem, "file_name": f"{stem}.jpg", "height": SIZE[0], "width": SIZE[1]}]
    categories = [{"id": c["id"], "name": c["name"]} for c in ade20k_categories() if c["isthing"]]
    panoptic = {
        "images": images,
        "categories": ade20k_categories(),
        "annotations": [{"image_id": stem, "file_name": f"{stem}.png", "segments_info": segments}],
    }
    (root / f"ade20k_panoptic_{split}.json").write_text(json.dumps(panoptic))
    content = {"images": images, "categories": categories, "annotations": instances}
    (root / f"ade20k_instance_{split}.json").write_text(json.dumps(content))
    return root


def _config(output: Path, **test) -> CfgNode:
    switches = {"SEMANTIC_ON": True, "INSTANCE_ON": True, "PANOPTIC_ON": True, **test}
    return CfgNode({"MODEL": {"MASK_FORMER": {"TEST": switches}}, "OUTPUT_DIR": str(output)})


def _instances(classes: list[int]) -> Instances:
    found = Instances(SIZE)
    found.pred_classes = torch.tensor(classes)
    found.scores = torch.full((len(classes),), 0.9)
    found.pred_masks = torch.from_numpy(np.array([_ids() == segment for segment, _, _, _ in OBJECTS]))
    found.pred_boxes = Boxes(torch.zeros(len(classes), 4))
    return found


# --- names and classes ---


def test_importing_the_adapter_registers_the_names() -> None:
    import jepa_plugins.d2  # noqa: F401

    assert set(NAMES) <= set(DatasetCatalog.list())
    assert NAMES.keys() == {
        f"{name}_{split}" for name in ("ade20k_panoptic", "ade20k_instance") for split in ("train", "val")
    } | {f"coco_2017_{split}_panoptic_with_sem_seg" for split in ("train", "val")}
    register_builtin()  # again: nothing happens


def test_ade20ks_classes_are_those_of_detectron2s_registration() -> None:
    categories = ade20k_categories()
    theirs = MetadataCatalog.get("ade20k_sem_seg_val")
    assert [c["name"] for c in categories] == [name.strip() for name in theirs.stuff_classes]
    assert [c["id"] for c in categories] == list(range(150))
    assert sum(c["isthing"] for c in categories) == 100
    assert theirs.stuff_colors == [c["color"] for c in categories]
    # road and skyscraper share their colour
    assert len({tuple(c["color"]) for c in categories}) == 149


@pytest.mark.parametrize(
    ("name", "classes", "things"),
    [
        ("ade20k_panoptic_train", 150, {7: 7, 149: 149}),
        ("ade20k_instance_train", 100, {7: 0, 149: 99}),
        ("coco_2017_train_panoptic_with_sem_seg", 133, {1: 0, 90: 79}),
    ],
)
def test_metadata_is_there_without_files(fresh, name: str, classes: int, things: dict) -> None:
    ensure_registered(name)
    contiguous = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    assert num_classes(name) == classes and things.items() <= contiguous.items()
    assert MetadataCatalog.get(name).image_root.startswith(str(fresh))
    with pytest.raises(FileNotFoundError, match=r"prepare_data\.py check") as caught:
        DatasetCatalog.get(name)
    assert "\n" not in str(caught.value)


def test_where_the_published_package_is_installed_names_wait_until_they_are_asked_for(
    fresh, monkeypatch
) -> None:
    monkeypatch.setattr(builtin, "published_packages", lambda: ("mask2former",))
    register_builtin()
    assert not set(NAMES) & set(DatasetCatalog.list())
    DatasetCatalog.register("ade20k_panoptic_val", lambda: ["theirs"])
    ensure_registered(["ade20k_panoptic_val", "ade20k_instance_val"])
    assert DatasetCatalog.get("ade20k_panoptic_val") == ["theirs"]
    assert num_classes("ade20k_instance_val") == 100


def test_a_name_that_somebody_registered_stays_theirs(fresh) -> None:
    DatasetCatalog.register("ade20k_instance_train", lambda: ["theirs"])
    register_builtin()
    assert DatasetCatalog.get("ade20k_instance_train") == ["theirs"]
    assert "ade20k_instance_val" in DatasetCatalog


# --- ADE20K ---


def test_ade20k_panoptic_records_and_a_perfect_model(fresh, tmp_path: Path) -> None:
    _ade20k(fresh)
    name = "ade20k_panoptic_val"
    ensure_registered(name)
    record = DatasetCatalog.get(name)[0]
    assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [
        (0, False),
        (7, True),
        (36, True),
    ]
    assert record["sem_seg_file_name"].endswith("annotations_detectron2/validation/ADE_val_00000001.png")
    numbers, labels = np.ones(SIZE, dtype=np.int32), np.zeros(SIZE, dtype=np.int64)
    segments = [{"id": 1, "isthing": False, "category_id": 0}]
    for place, (_, label, rows, columns) in enumerate(OBJECTS, start=2):
        numbers[rows, columns], labels[rows, columns] = place, label
        segments.append({"id": place, "isthing": True, "category_id": label})
    scores = torch.nn.functional.one_hot(torch.from_numpy(labels), 150).permute(2, 0, 1).float()
    output = {
        "panoptic_seg": (torch.from_numpy(numbers), segments),
        "instances": _instances([7, 36]),  # in the numbering of all 150 classes
        "sem_seg": scores,
    }
    evaluator = build_evaluator(_config(tmp_path), name)
    evaluator.reset()
    evaluator.process([record], [output])
    results = evaluator.evaluate()
    assert results["panoptic_seg"]["PQ"] == 100
    assert results["segm"]["AP"] == pytest.approx(100) and results["segm"]["AP-bed"] == pytest.approx(100)
    assert {"APs", "APm", "APl"} <= results["segm"].keys()
    assert results["sem_seg"]["mIoU"] == 100


def test_without_instance_and_semantic_files_the_panoptic_ones_serve(fresh, tmp_path: Path, caplog) -> None:
    root = _ade20k(fresh)
    (root / "ade20k_instance_val.json").unlink()
    (root / "annotations_detectron2").rename(root / "elsewhere")
    ensure_registered("ade20k_panoptic_val")
    assert "sem_seg_file_name" not in DatasetCatalog.get("ade20k_panoptic_val")[0]
    build_evaluator(_config(tmp_path), "ade20k_panoptic_val")
    assert "its AP is not measured" in caplog.text


def test_ade20k_instances_are_numbered_over_the_100_things(fresh, tmp_path: Path) -> None:
    _ade20k(fresh)
    name = "ade20k_instance_val"
    ensure_registered(name)
    record = DatasetCatalog.get(name)[0]
    lamp = sum(c["isthing"] for c in ade20k_categories()[:36])
    assert [a["category_id"] for a in record["annotations"]] == [0, lamp]
    evaluator = build_evaluator(_config(tmp_path), name)
    evaluator.reset()
    evaluator.process([record], [{"instances": _instances([0, lamp])}])
    segm = evaluator.evaluate()["segm"]
    assert segm["AP"] == pytest.approx(100) and segm["AP-lamp"] == pytest.approx(100)
    assert segm["APs"] == segm["APm"] == pytest.approx(100) and np.isnan(segm["APl"])


def test_an_object_of_no_thing_is_named(fresh) -> None:
    path = _ade20k(fresh) / "ade20k_instance_val.json"
    path.write_text(path.read_text().replace('"category_id": 36', '"category_id": 0'))
    ensure_registered("ade20k_instance_val")
    with pytest.raises(ValueError, match=r"ade20k_instance_val\.json' has an object of category 0"):
        DatasetCatalog.get("ade20k_instance_val")


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_ade20k_goes_through_its_mapper(fresh, task: str) -> None:
    from jepa_plugins.d2 import get_config

    _ade20k(fresh, "train", "training")
    cfg = get_config(f"detectron2/mask2former/ade20k/{task}_R50.yaml", ["INPUT.CROP.SIZE", (64, 64)])
    sample = build_mapper(cfg, True)(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[0])
    assert sample["image"].shape[1:] == (640, 640)
    want = {"panoptic": {0, 7, 36}, "instance": {0, 18}}[task]
    assert set(sample["instances"].gt_classes.tolist()) == want


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_ade20ks_configurations_train_and_evaluate_shrunk(fresh, tmp_path: Path, task: str) -> None:
    from jepa_plugins.d2 import get_config

    _ade20k(fresh)
    _ade20k(fresh, "train", "training")
    own = {"SOLVER.MAX_ITER": 1, "SOLVER.IMS_PER_BATCH": 1, "OUTPUT_DIR": str(tmp_path / "out")}
    config = f"detectron2/mask2former/ade20k/{task}_R50.yaml"
    ensure_registered(NAMES)
    trainer = train(get_config(config, options(SMALL, BACKBONE, own)))
    results = trainer.test(trainer.cfg, trainer.model)
    figures = {"panoptic": {"panoptic_seg", "segm", "sem_seg"}, "instance": {"segm"}}[task]
    assert set(results) == figures and "AP" in results["segm"]


# --- what must be there ---


def test_check_names_the_missing_files_of_anybodys_registration(fresh, monkeypatch) -> None:
    cfg = CfgNode({"MODEL": {"SEM_SEG_HEAD": {"NUM_CLASSES": 150}}})
    ensure_registered(NAMES)
    with pytest.raises(FileNotFoundError, match=r"the image folder '.*images/validation' does not exist"):
        check_num_classes(cfg, "ade20k_panoptic_val")
    _ade20k(fresh)
    check_num_classes(cfg, "ade20k_panoptic_val")
    (fresh / "ADEChallengeData2016/ade20k_panoptic_val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation file '.*ade20k_panoptic_val\.json'"):
        check_num_classes(cfg, "ade20k_panoptic_val")
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 80
    with pytest.raises(FileNotFoundError, match="the image folder '.*train2017' does not exist"):
        check_num_classes(cfg, "coco_2017_train")  # detectron2's


def test_cityscapes_asks_for_its_packages_and_label_images(tmp_path: Path, monkeypatch) -> None:
    name = f"{tmp_path} city"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(evaluator_type="cityscapes_sem_seg", gt_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no '.*labelTrainIds\.png': 'csCreateTrainIdLabelImgs'"):
        catalog.check_files(name)
    name = f"{tmp_path} city instances"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(evaluator_type="cityscapes_instance", gt_dir=str(tmp_path))
    find = catalog.importlib.util.find_spec
    monkeypatch.setattr(
        catalog.importlib.util, "find_spec", lambda module: None if module == "shapely" else find(module)
    )
    with pytest.raises(ImportError, match="needs the package shapely: pip install shapely"):
        catalog.check_files(name)
