"""Cityscapes's own figures on the CPU, on a generated tree: polygons, and what cityscapesScripts makes of them."""

import contextlib
import io
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")
pytest.importorskip("cityscapesscripts")
pytest.importorskip("shapely")

import torch  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets.cityscapes import (  # noqa: E402
    load_cityscapes_instances,
    load_cityscapes_semantic,
)
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import SMALL, options, train  # noqa: E402

from jepa_plugins.core.images import read_image, read_label_map  # noqa: E402
from jepa_plugins.d2 import get_config  # noqa: E402
from jepa_plugins.d2.data.catalog import check_num_classes  # noqa: E402
from jepa_plugins.d2.data.mappers import build_mapper, panoptic_ids, semantic_from_panoptic  # noqa: E402
from jepa_plugins.d2.evaluation import build_evaluator  # noqa: E402

SIZE = (64, 128)
THINGS = {"person": 11, "rider": 12, "car": 13, "bicycle": 18}
CITIES = ("aachen", "bochum")


def _box(label: str, left: int, top: int, right: int, bottom: int) -> dict:
    return {"label": label, "polygon": [[left, top], [right, top], [right, bottom], [left, bottom]]}


def _polygons(number: int) -> dict:
    """Road below sky, a tree, two cars of which one hides a part of the other, a person, an unlabelled strip."""
    cars = [_box("car", 10 + number, 30, 40, 55), _box("car", 30, 35, 60, 60)]
    others = [
        _box("person", 80, 20, 95, 60),
        _box("vegetation", 100, 5, 125, 30),
        _box("static", 0, 0, 5, 63),
    ]
    ground = [_box("sky", 0, 0, 127, 31), _box("road", 0, 32, 127, 63)]
    return {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": [*ground, *cars, *others]}


def _make(root: Path) -> None:
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    for split in ("train", "val"):
        for number, city in enumerate(CITIES):
            images, labels = (root / part / split / city for part in ("leftImg8bit", "gtFine"))
            images.mkdir(parents=True)
            labels.mkdir(parents=True)
            stem = f"{city}_000000_00001{number}"
            noise = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(images / f"{stem}_leftImg8bit.png")
            polygons = str(labels / f"{stem}_gtFine_polygons.json")
            Path(polygons).write_text(json.dumps(_polygons(number)))
            json2labelImg(polygons, polygons.replace("polygons.json", "labelIds.png"), "ids")
            json2labelImg(polygons, polygons.replace("polygons.json", "labelTrainIds.png"), "trainIds")
            annotation = Annotation()
            annotation.fromJsonFile(polygons)
            numbers = np.asarray(createInstanceImage(annotation, "ids")).astype(np.uint16)
            Image.fromarray(numbers).save(polygons.replace("polygons.json", "instanceIds.png"))
    gt = str(root / "gtFine")
    with contextlib.redirect_stdout(io.StringIO()):
        convert2panoptic(cityscapesPath=gt, outputFolder=gt, useTrainId=False, setNames=["train", "val"])


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, str]:
    """detectron2's registrations of the val split again, over a tree in a temporary folder: task -> name."""
    root = tmp_path_factory.mktemp("cityscapes")
    _make(root)
    images, labels = str(root / "leftImg8bit/val"), str(root / "gtFine/val")
    panoptic = str(root / "gtFine/cityscapes_panoptic_val")
    meta = MetadataCatalog.get("cityscapes_fine_panoptic_val")
    loaders = {
        "sem_seg": lambda: load_cityscapes_semantic(images, labels),
        "instance_seg": lambda: load_cityscapes_instances(images, labels, from_json=True, to_polygons=True),
        "panoptic": lambda: load_cityscapes_panoptic(images, panoptic, f"{panoptic}.json", meta.as_dict()),
    }
    places = {"gt_dir": labels, "panoptic_root": panoptic, "panoptic_json": f"{panoptic}.json"}
    places["image_root"] = places["image_dir"] = images
    names = {}
    for task, load in loaders.items():
        names[task] = f"{task}_val in {root}"
        DatasetCatalog.register(names[task], load)
        theirs = MetadataCatalog.get(f"cityscapes_fine_{task}_val").as_dict()
        own = {key: places.get(key, value) for key, value in theirs.items() if key != "name"}
        MetadataCatalog.get(names[task]).set(**own)
    return names


def _config(output: Path) -> CfgNode:
    test = {"SEMANTIC_ON": True, "INSTANCE_ON": True, "PANOPTIC_ON": True}
    return CfgNode({"MODEL": {"MASK_FORMER": {"TEST": test}}, "OUTPUT_DIR": str(output)})


def _outputs(record: dict, things: list[str]) -> dict:
    """What a model that is right says; instances are numbered as in `things`."""
    folder, stem = Path(record["file_name"]).parents[3], Path(record["file_name"]).stem
    city = stem.split("_")[0]
    labels = folder / "gtFine" / "val" / city / stem.replace("leftImg8bit", "gtFine")
    numbers = np.asarray(Image.open(f"{labels}_instanceIds.png")).astype(np.int64)
    semantic = read_label_map(f"{labels}_labelTrainIds.png")
    known = torch.from_numpy(np.where(semantic == 255, 0, semantic).astype(np.int64))
    instances = Instances(SIZE)
    present = [number for number in np.unique(numbers) if number >= 1000]
    names = {24: "person", 25: "rider", 26: "car", 33: "bicycle"}
    instances.pred_classes = torch.tensor([things.index(names[n // 1000]) for n in present])
    instances.scores = torch.full((len(present),), 0.9)
    instances.pred_masks = torch.from_numpy(np.array([numbers == n for n in present]))
    instances.pred_boxes = Boxes(torch.zeros(len(present), 4))
    scores = torch.nn.functional.one_hot(known, 19).permute(2, 0, 1).float()
    return {"instances": instances, "sem_seg": scores}


def _panoptic_output(record: dict) -> tuple[torch.Tensor, list[dict]]:
    ids = panoptic_ids(read_image(record["pan_seg_file_name"], apply_orientation=False))
    places, segments = np.zeros(SIZE, dtype=np.int32), []
    for place, segment in enumerate(record["segments_info"], start=1):
        places[ids == segment["id"]] = place
        label = segment["category_id"]
        segments.append({"id": place, "isthing": label in THINGS.values(), "category_id": label})
    return torch.from_numpy(places), segments


def _evaluate(name: str, output: Path, perfect) -> dict:
    evaluator = build_evaluator(_config(output), name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [perfect(record)])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


def test_a_perfect_instance_model_scores_100(sets, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    things = MetadataCatalog.get(sets["instance_seg"]).thing_classes
    results = _evaluate(sets["instance_seg"], tmp_path, lambda record: _outputs(record, things))
    assert results["segm"] == {"AP": pytest.approx(100), "AP50": pytest.approx(100)}
    assert not list(tmp_path.glob("*.json"))  # cityscapesScripts would leave one


def test_a_lost_instance_costs_what_it_should(sets, tmp_path: Path) -> None:
    """Of the four cars the second of each image is lost: their AP is that of recall 1/2; persons stay at 100."""
    things = MetadataCatalog.get(sets["instance_seg"]).thing_classes

    def lossy(record: dict) -> dict:
        output = _outputs(record, things)
        kept = torch.ones(len(output["instances"]), dtype=torch.bool)
        kept[torch.where(output["instances"].pred_classes == things.index("car"))[0][-1]] = False
        output["instances"] = output["instances"][kept]
        return output

    results = _evaluate(sets["instance_seg"], tmp_path, lossy)
    assert 70 < results["segm"]["AP50"] < 80  # the mean of 100 and about 50


def test_a_perfect_panoptic_model_scores_100_in_all_three(sets, tmp_path: Path) -> None:
    things = MetadataCatalog.get(
        sets["panoptic"]
    ).thing_classes  # all 19: it numbers things and stuff together

    def perfect(record: dict) -> dict:
        return {**_outputs(record, things), "panoptic_seg": _panoptic_output(record)}

    results = _evaluate(sets["panoptic"], tmp_path, perfect)
    assert results["panoptic_seg"]["PQ"] == results["panoptic_seg"]["PQ_th"] == 100
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["sem_seg"]["IoU"] == pytest.approx(100)


def test_semantic_figures_and_a_mistake(sets, tmp_path: Path) -> None:
    name = sets["sem_seg"]
    right = _evaluate(name, tmp_path, lambda record: _outputs(record, list(THINGS)))
    assert right["sem_seg"]["IoU"] == pytest.approx(100)

    def blind(record: dict) -> dict:
        """Sky (10) is called road (0)."""
        scores = _outputs(record, list(THINGS))["sem_seg"]
        scores[0] += 2 * scores[10]
        return {"sem_seg": scores}

    wrong = _evaluate(name, tmp_path, blind)["sem_seg"]["IoU"]
    assert 40 < wrong < 80  # of five classes sky has IoU 0, and road less than half


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_records_go_through_the_published_mappers(sets, task: str, monkeypatch) -> None:
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 2)
    name = sets[{"semantic": "sem_seg", "instance": "instance_seg"}.get(task, task)]
    opts = ["DATASETS.TRAIN", (name,), "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.CROP.SIZE", (64, 128)]
    cfg = get_config(f"detectron2/mask2former/cityscapes/{task}_R50.yaml", opts)
    check_num_classes(cfg, name)
    record = DatasetCatalog.get(name)[0]
    sample = build_mapper(cfg, True)(record)
    classes = sample["instances"].gt_classes.tolist()
    assert sample["image"].shape == (3, *SIZE)
    want = {"semantic": [0, 8, 10, 11, 13], "panoptic": [0, 8, 10, 11, 13, 13], "instance": [0, 2, 2]}
    assert sorted(classes) == want[task]
    if task == "panoptic":
        ids = panoptic_ids(read_image(record["pan_seg_file_name"], apply_orientation=False))
        labels = read_label_map(record["sem_seg_file_name"])
        np.testing.assert_array_equal(semantic_from_panoptic(ids, record["segments_info"]), labels)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_the_configurations_train_and_evaluate_shrunk(sets, task: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 2)
    name = sets[{"semantic": "sem_seg", "instance": "instance_seg"}.get(task, task)]
    data = {"DATASETS.TRAIN": (name,), "DATASETS.TEST": (name,), "INPUT.CROP.SIZE": (64, 64)}
    own = {"SOLVER.MAX_ITER": 1, "OUTPUT_DIR": str(tmp_path), "MODEL.RESNETS.DEPTH": 18}
    config = f"detectron2/mask2former/cityscapes/{task}_R50.yaml"
    opts = options(SMALL, data, own, {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64})  # its norms synchronise: SyncBN
    trainer = train(get_config(config, opts))
    with contextlib.redirect_stdout(io.StringIO()):
        results = trainer.test(trainer.cfg, trainer.model)
    figures = {"panoptic": {"panoptic_seg", "segm", "sem_seg"}, "instance": {"segm"}, "semantic": {"sem_seg"}}
    assert set(results) == figures[task]
    assert {"AP", "AP50"} <= results.get("segm", {"AP": 0, "AP50": 0}).keys()
