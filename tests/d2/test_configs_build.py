"""Every yaml configuration of ours is plain and builds its model."""

import functools
import json

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

NAMES = [name for name in list_configs() if name.endswith(".yaml") and name.startswith("detectron2/")]
DETECTRON2 = [name for name in NAMES if "deeplab" not in name]  # not ours: see test_panoptic_deeplab.py


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


@functools.cache
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


MASK2FORMER = {"R50": 43_988_247, "swin_tiny": 47_439_633}  # with 150 classes
CLASS = 256 + 1  # one more row of the class layer, with its bias
R50_NORMS = 2 * 26_560  # scales and shifts of R50's norms, which are constants in FrozenBN


@pytest.mark.parametrize("name", [name for name in DETECTRON2 if "/mask2former/" in name])
def test_sizes_of_the_whole_family(name):
    """Data set, task and where the weights come from change the class layer and the norms of a trained R50 alone."""
    backbone = next(kind for kind in MASK2FORMER if kind in name)
    model = configuration(name).MODEL
    # Norms train from scratch, and on Cityscapes as published.
    trained = backbone == "R50" and model.RESNETS.NORM != "FrozenBN"
    assert trained == (backbone == "R50" and ("scratch" in name or "cityscapes" in name))
    more = CLASS * (model.SEM_SEG_HEAD.NUM_CLASSES - 150) + R50_NORMS * trained
    assert size_of(name)[0] == MASK2FORMER[backbone] + more


def test_mask_rcnn_is_as_large_as_the_published_vitdet(golden_dir):
    published = json.loads((golden_dir / "state_dicts" / "vitdet_mask_rcnn_b.json").read_text())
    class_token = 768  # its row of the table of positions, which we do not have
    assert size_of("detectron2/mask_rcnn/vitb_100ep.yaml")[0] == published["parameters"] - class_token


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "whole"),
    [
        ("vitb_100ep", 768, 12, 12, (2, 5, 8, 11)),
        ("vitl_100ep", 1024, 24, 16, (5, 11, 17, 23)),
        ("vith_75ep", 1280, 32, 16, (7, 15, 23, 31)),
    ],
)
def test_sizes_of_the_detectors(name, width, depth, heads, whole):
    """ViT with relative positions, simple feature pyramid, RPN and heads, summed up layer by layer."""
    side, window, pyramid = 64, 14, 256
    grid = configuration(f"detectron2/mask_rcnn/{name}.yaml").MODEL.VIT.PRETRAIN_IMG_SIZE[0] // 16
    blocks = depth * (12 * width**2 + 13 * width)
    offsets = 2 * sum(2 * (side if i in whole else window) - 1 for i in range(depth))
    vit = blocks + offsets * (width // heads) + (3 * 16**2 + 1) * width + grid**2 * width
    halves = [width // 4, width // 2, width, width]  # channels that each map of the pyramid starts from
    ups = [(4 * width + 1) * width // 2 + width + (2 * width + 1) * width // 4, (4 * width + 1) * width // 2]
    sfp = sum(ups) + sum((c + 2) * pyramid + (9 * pyramid + 2) * pyramid for c in halves)
    convs = (9 * pyramid + 2) * pyramid  # each with a norm
    rpn = 2 * (9 * pyramid + 1) * pyramid + (pyramid + 1) * 3 * 5
    box = 4 * convs + (49 * pyramid + 1) * 1024 + 1025 * (81 + 320)
    mask = 4 * convs + (4 * pyramid + 1) * pyramid + (pyramid + 1) * 80
    assert size_of(f"detectron2/mask_rcnn/{name}.yaml")[0] == vit + sfp + rpn + box + mask


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
