"""Panoptic-DeepLab, a model of others, through our tools: the published values, and a shrunk run on stand-ins."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("detectron2")
pytest.importorskip("panopticapi")
pytest.importorskip("cityscapesscripts")

import detectron2.projects  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import train_net  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets.cityscapes_panoptic import register_all_cityscapes_panoptic  # noqa: E402
from preparing import stand_ins  # noqa: E402
from tiny import options  # noqa: E402

from jepa_plugins.d2 import get_config  # noqa: E402
from jepa_plugins.d2.data.mappers import PanopticDeepLabMapper, build_mapper  # noqa: E402
from jepa_plugins.d2.data.schemes import data_root  # noqa: E402
from jepa_plugins.d2.registration import build_model  # noqa: E402

CONFIG = "detectron2/panoptic_deeplab/R52_dsconv_cityscapes.yaml"
# Norms without synchronisation, a shallow backbone, and heads of a few channels.
SHRUNK = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.SEM_SEG_HEAD.NORM": "BN",
    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": 8,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8,
    "MODEL.SEM_SEG_HEAD.HEAD_CHANNELS": 8,
    "MODEL.INS_EMBED_HEAD.NORM": "BN",
    "MODEL.INS_EMBED_HEAD.ASPP_CHANNELS": 8,
    "MODEL.INS_EMBED_HEAD.CONVS_DIM": 8,
    "MODEL.INS_EMBED_HEAD.HEAD_CHANNELS": 8,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.CROP.SIZE": (64, 128),
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.RECIPE_IMS_PER_BATCH": 0,
    "SOLVER.MAX_ITER": 2,
    "DATALOADER.NUM_WORKERS": 0,
    "SEED": 1,
}


NAMES = ("cityscapes_fine_panoptic_train", "cityscapes_fine_panoptic_val")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Stand-ins for Cityscapes, to which detectron2's names belong meanwhile."""
    folder = tmp_path_factory.mktemp("panoptic_deeplab")
    stand_ins.make_stand_ins(folder / "data", 2, 64, 0, ["cityscapes"], 1, False)

    def register(root: Path) -> None:
        for name in NAMES:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        register_all_cityscapes_panoptic(str(root))

    register(folder / "data")
    yield folder
    register(data_root())


def run(*arguments: str, **changes: object) -> dict:
    """tools/train_net.py's main function with the shrunk configuration."""
    overrides = map(str, options(SHRUNK, {key.replace("__", "."): v for key, v in changes.items()}))
    parsed = train_net.build_parser().parse_args(["--config-file", CONFIG, *arguments, *overrides])
    with contextlib.redirect_stdout(io.StringIO()):  # cityscapesScripts's tables
        return train_net.main(parsed)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A run of two steps that ends with an evaluation."""
    run(OUTPUT_DIR=folder / "out")
    return folder / "out"


def metrics(folder: Path) -> dict:
    """The last value of each figure."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


FIGURES = (("panoptic_seg", "PQ"), ("segm", "AP"), ("sem_seg", "IoU"))


def test_two_steps_and_all_three_figures(trained: Path) -> None:
    last = metrics(trained)
    for name in ("loss_sem_seg", "loss_center", "loss_offset", "total_loss"):
        assert np.isfinite(last[name]) and last[name] > 0, name
    for kind, name in FIGURES:
        assert 0 <= last[f"{kind}/{name}"] <= 100, name


def test_eval_only_measures_what_training_measured(trained: Path, folder: Path) -> None:
    last = metrics(trained)
    results = run("--eval-only", OUTPUT_DIR=folder / "again", MODEL__WEIGHTS=trained / "model_final.pth")
    for kind, name in FIGURES:
        assert results[kind][name] == pytest.approx(last[f"{kind}/{name}"], abs=1e-4)


def test_a_model_as_detectron2_publishes_it_is_evaluated(trained: Path, folder: Path) -> None:
    """A pickle of numpy arrays."""
    state = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    content = {"model": {name: value.numpy() for name, value in state.items()}, "__author__": "somebody"}
    path = folder / "model_final.pkl"
    path.write_bytes(pickle.dumps(content))
    results = run("--eval-only", OUTPUT_DIR=folder / "published", MODEL__WEIGHTS=path)
    last = metrics(trained)
    assert results["panoptic_seg"]["PQ"] == pytest.approx(last["panoptic_seg/PQ"], abs=1e-4)
    assert results["sem_seg"]["IoU"] == pytest.approx(last["sem_seg/IoU"], abs=1e-4)


def test_without_panopticapi_one_sentence_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "detectron2.projects.panoptic_deeplab", None)
    monkeypatch.delattr(detectron2.projects, "panoptic_deeplab", raising=False)
    with pytest.raises(ImportError, match="needs detectron2's project and panopticapi") as caught:
        get_config(CONFIG)
    assert "\n" not in str(caught.value)


def test_other_configurations_do_not_know_its_keys() -> None:
    assert "INS_EMBED_HEAD" not in get_config("detectron2/mask2former/ade20k/semantic_R50.yaml").MODEL


def test_the_published_values() -> None:
    cfg = get_config(CONFIG)
    heads = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.INS_EMBED_HEAD
    assert [head.NORM for head in heads] == ["SyncBN", "SyncBN"]
    assert [head.CONVS_DIM for head in heads] == [256, 128]
    assert cfg.MODEL.RESNETS.RES5_DILATION == 2 and cfg.MODEL.RESNETS.RES5_MULTI_GRID == [1, 2, 4]
    assert cfg.SOLVER.MAX_ITER == 90000 and cfg.SOLVER.IMS_PER_BATCH == 32
    assert cfg.SOLVER.WEIGHT_DECAY == 0 and cfg.SOLVER.BACKBONE_MULTIPLIER == 1  # so AdamW is Adam
    assert tuple(cfg.INPUT.CROP.SIZE) == (512, 1024) and cfg.INPUT.MIN_SIZE_TEST == 1024
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert type(model).__name__ == "PanopticDeepLab"
    assert isinstance(build_mapper(cfg, True), PanopticDeepLabMapper)
