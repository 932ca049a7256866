"""Every yaml configuration of ours is plain and builds its model."""

import functools

import pytest

pytest.importorskip("detectron2")

import torch  # noqa: E402
import yaml  # noqa: E402
from tiny import losses_of, save_pictures, save_segmentation, tiny_config, train  # noqa: E402

from jepa_plugins.config_files import config_root, list_configs  # noqa: E402
from jepa_plugins.d2 import get_config  # noqa: E402
from jepa_plugins.d2.data.mappers import build_mapper  # noqa: E402
from jepa_plugins.d2.registration import build_model  # noqa: E402
from jepa_plugins.d2.solver import build_lr_scheduler, build_optimizer  # noqa: E402

NAMES = [name for name in list_configs() if name.endswith(".yaml")]
DETECTRON2 = [name for name in NAMES if name.startswith("detectron2/")]


configuration = functools.cache(get_config)


@functools.cache
def parameters_of(model_values: str, input_format: str) -> tuple[int, int]:
    """Number of parameters and of trained ones of a model of these MODEL values, built without memory."""
    cfg = configuration(DETECTRON2[0]).clone()
    cfg.MODEL = type(cfg.MODEL).load_cfg(model_values)
    cfg.INPUT.FORMAT = input_format
    with torch.device("meta"):
        model = build_model(cfg)
    parameters = list(model.parameters())
    assert all(parameter.device.type == "meta" for parameter in parameters)
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def size_of(name: str) -> tuple[int, int]:
    cfg = configuration(name).clone()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "meta", ""
    return parameters_of(cfg.MODEL.dump(), cfg.INPUT.FORMAT)


@pytest.mark.parametrize("name", NAMES)
def test_plain_yaml(name):
    content = yaml.safe_load((config_root() / name).read_text())  # refuses any tag
    assert isinstance(content, dict)
    assert "_BASE_" in content or name.startswith("detectron2/base/")


@pytest.mark.parametrize("name", DETECTRON2)
def test_it_builds_its_model_and_its_data(name):
    total, trained = size_of(name)
    assert 0 < trained <= total
    cfg = configuration(name).clone()
    cfg.DATASETS.TRAIN = ()  # whose files are not here
    build_mapper(cfg, True)
    blocks = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
    optimizer = build_optimizer(cfg, torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "backbone": blocks}))
    build_lr_scheduler(cfg, optimizer)
    assert optimizer.param_groups[0]["initial_lr"] == cfg.SOLVER.BASE_LR


def test_the_sizes_are_those_of_the_published_models():
    """Counts of the published state dicts' parameters with 150 classes."""
    assert size_of("detectron2/mask2former/ade20k/semantic_R50.yaml")[0] == 43_988_247
    assert size_of("detectron2/mask2former/ade20k/semantic_swin_tiny.yaml")[0] == 47_439_633


def test_pre_training_leaves_the_backbone_alone():
    for backbone, name in (("R50", "R50_in1k"), ("swin_tiny", "swin_tiny_in1k")):
        fine, pre = (
            size_of(f"detectron2/{name}.yaml")
            for name in (f"mask2former/ade20k/semantic_{backbone}", f"mask_jepa/{name}")
        )
        assert pre[1] < fine[1]


def test_the_quick_swin_trains(tmp_path):
    root = save_segmentation(tmp_path / "set")
    names = {f"DATASETS.{part}": (f"folder_semantic@{root}@training",) for part in ("TRAIN", "TEST")}
    cfg = tiny_config("semantic_swin", {**names, "OUTPUT_DIR": str(tmp_path)}, backbone={})
    assert cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer"
    assert len(losses_of(train(cfg))) == cfg.SOLVER.MAX_ITER


def test_the_quick_swin_pre_trains(tmp_path):
    images = save_pictures(tmp_path / "pictures")
    changes = {"DATASETS.UNLABELLED": (images,), "OUTPUT_DIR": str(tmp_path), "SOLVER.MAX_ITER": 2}
    trainer = train(tiny_config("mask_jepa_swin", changes, backbone={}))
    names = trainer.model.state_dict()
    assert "target_backbone.patch_embed.proj.weight" in names
