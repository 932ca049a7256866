"""The Swin transformer as backbone of Mask2Former and MaskJEPA."""

import json
import subprocess
import sys

import pytest
import torch
from golden_tools import GOLDEN, assert_close, fill_module, load, tensor

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import Instances  # noqa: E402
from tiny import pictures, steps, tiny_config  # noqa: E402

from jepa_plugins.core.checkpoints import CheckpointError  # noqa: E402
from jepa_plugins.core.swin import SwinBlock  # noqa: E402
from jepa_plugins.d2 import add_jepa_config  # noqa: E402
from jepa_plugins.d2.backbones import build_backbone  # noqa: E402
from jepa_plugins.d2.checkpoint import Checkpointer  # noqa: E402
from jepa_plugins.d2.mask2former import D2SwinTransformer  # noqa: E402
from jepa_plugins.d2.solver import build_optimizer  # noqa: E402

SIZES = {  # the published configurations of the four sizes: width, depths, heads, window
    "T": (96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "S": (96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
    "B": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
    "L": (192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
}
# of the published classifiers, window 7, with 1000 classes
CLASSIFIERS = {"T": 28_288_354, "S": 49_606_258, "B": 87_768_224, "L": 196_532_476}
TINY = {
    "MODEL.BACKBONE.NAME": "D2SwinTransformer",
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": [1, 1, 2, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 2, 2, 4],
    "MODEL.SWIN.WINDOW_SIZE": 3,
}


def backbone_of(changes: dict, channels: int = 3):
    cfg = get_cfg()
    add_jepa_config(cfg)
    cfg.merge_from_list([item for pair in changes.items() for item in pair])
    return D2SwinTransformer(cfg, ShapeSpec(channels=channels))


def published_swin_config():
    """The merged published Swin-T configuration."""
    name = "coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml"
    values = json.loads((GOLDEN / "configs" / "mask2former.json").read_text())["configs"][name]
    cfg = get_cfg()
    add_jepa_config(cfg)
    cfg.merge_from_list([item for pair in values.items() for item in pair])
    cfg.MODEL.WEIGHTS = ""
    return cfg


def test_mask2former_with_swin_has_the_published_names() -> None:
    cfg = published_swin_config()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    want = json.loads((GOLDEN / "state_dicts" / "mask2former_swin_t.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == want["keys"]
    assert sum(p.numel() for p in model.parameters()) == want["parameters"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want["trainable_parameters"]


def test_features_golden() -> None:
    meta, want = load("swin_backbone")
    backbone = build_backbone(published_swin_config())
    with torch.no_grad():
        features = fill_module(backbone, meta).eval()(tensor(1101, [1, 3, 70, 93], -2, 2))
    for level, feature in features.items():
        name = f"{level}_1_every_8th_channel"
        assert_close(feature[:, ::8], want[name], meta["images"][1]["noise"][name])


@pytest.mark.parametrize("size", SIZES)
def test_the_four_sizes(size) -> None:
    width, depths, heads, window = SIZES[size]
    keys = ("EMBED_DIM", "DEPTHS", "NUM_HEADS", "WINDOW_SIZE")
    with torch.device("meta"):
        values = zip(keys, (width, depths, heads, window), strict=True)
        backbone = backbone_of({f"MODEL.SWIN.{k}": v for k, v in values})
    for i, (name, spec) in enumerate(backbone.output_shape().items()):
        assert (name, spec.channels, spec.stride) == (f"res{i + 2}", width * 2**i, 4 * 2**i)
    assert backbone.size_divisibility == 32
    last = 8 * width
    parameters = CLASSIFIERS[size] - (last * 1000 + 1000) - 2 * last  # without classifier and last norm
    parameters += 2 * 15 * width  # a norm for each feature
    blocks = sum(depth * count for depth, count in zip(depths, heads, strict=True))
    parameters += ((2 * window - 1) ** 2 - 13**2) * blocks
    assert sum(p.numel() for p in backbone.parameters()) == parameters


def test_keys_reach_the_network() -> None:
    changes = {
        "MODEL.SWIN.APE": True,
        "MODEL.SWIN.PRETRAIN_IMG_SIZE": 64,
        "MODEL.SWIN.PATCH_NORM": False,
        "MODEL.SWIN.QKV_BIAS": False,
        "MODEL.SWIN.QK_SCALE": 0.25,
        "MODEL.SWIN.MLP_RATIO": 2.0,
        "MODEL.SWIN.DROP_RATE": 0.1,
        "MODEL.SWIN.ATTN_DROP_RATE": 0.2,
        "MODEL.SWIN.DROP_PATH_RATE": 0.4,
        "MODEL.SWIN.OUT_FEATURES": ["res3", "res5"],
        "MODEL.SWIN.USE_CHECKPOINT": True,
    }
    backbone = backbone_of({**TINY, **changes}, channels=1)
    block = backbone.layers[3].blocks[0]
    assert backbone.absolute_pos_embed.shape == (1, 8, 16, 16) and backbone.patch_embed.norm is None
    assert block.attn.qkv.bias is None and block.attn.scale == 0.25 and block.attn.dropout == 0.2
    assert block.mlp.fc1.out_features == 128 and block.attn.proj_drop.p == backbone.pos_drop.p == 0.1
    assert block.drop_path.drop_prob == 0.4 and backbone.layers[0].checkpointing
    assert list(backbone.output_shape()) == list(backbone(torch.randn(1, 1, 32, 32))) == ["res3", "res5"]


def labelled(count: int = 2) -> list[dict]:
    batch = pictures(*[(64, 64)] * count)
    for item in batch:
        item["instances"] = Instances((64, 64))
        item["instances"].gt_classes = torch.tensor([0, 1])
        item["instances"].gt_masks = torch.zeros(2, 64, 64, dtype=torch.bool)
        item["instances"].gt_masks[0, :32] = item["instances"].gt_masks[1, 32:] = True
    return batch


def test_mask2former_with_swin_trains_and_predicts() -> None:
    torch.manual_seed(0)
    cfg = tiny_config("semantic", backbone=TINY)
    model = build_model(cfg)
    before = {name: value.clone() for name, value in model.backbone.named_parameters()}
    losses = steps(model, build_optimizer(cfg, model), [labelled()] * 3)
    assert losses[-1] < losses[0]
    for name, value in model.backbone.named_parameters():
        assert not torch.equal(value, before[name]), name
    with torch.no_grad():
        result = model.eval()([pictures((50, 70))[0]])[0]
    assert result["sem_seg"].shape[-2:] == (50, 70) and result["sem_seg"].isfinite().all()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("denoise", [1.0, 0.0])
def test_mask_jepa_with_swin(frozen, denoise) -> None:
    changes = {
        "MODEL.MASK_JEPA.FREEZE_BACKBONE": frozen,
        "MODEL.MASK_JEPA.LOSS.DENOISE_WEIGHT": denoise,
        "MODEL.SWIN.DROP_PATH_RATE": 0.0,  # a dropped block has no gradient
    }
    torch.manual_seed(0)
    cfg = tiny_config("mask_jepa", changes, backbone=TINY)
    model = build_model(cfg)
    model.train()
    for name in ["backbone"] if frozen else ["backbone", "target_backbone"]:
        part = getattr(model, name)
        assert part.training == (name == "backbone" and not frozen)  # drop path rests in the others
        assert all(
            block.training == part.training for block in part.modules() if isinstance(block, SwinBlock)
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("backbone.") for name in trained) != frozen
    sum(model(pictures((64, 64), (64, 64))).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        if name in trained and name.startswith("backbone."):
            assert parameter.grad.abs().sum() > 0, name
    moved = steps(model, build_optimizer(cfg, model), [pictures((64, 64), (64, 64))] * 2)
    assert all(torch.isfinite(torch.tensor(moved)))


def test_the_relative_positions_take_no_weight_decay() -> None:
    cfg = tiny_config("semantic", {"MODEL.SWIN.APE": True}, backbone=TINY)
    model = build_model(cfg)
    decay = {
        id(parameter): group["weight_decay"]
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.backbone.named_parameters():
        none = "relative_position_bias_table" in name or "absolute_pos_embed" in name or "norm" in name
        assert decay[id(parameter)] == (0.0 if none else cfg.SOLVER.WEIGHT_DECAY), name


def test_weights_of_another_size_stop_the_checkpointer(tmp_path) -> None:
    other = {**TINY, "MODEL.SWIN.WINDOW_SIZE": 4}
    Checkpointer(build_model(tiny_config("semantic", backbone=other)), str(tmp_path)).save("other")
    model = build_model(tiny_config("semantic", backbone=TINY))
    with pytest.raises(CheckpointError, match=r"set MODEL.SWIN.WINDOW_SIZE 4 \(it is 3\)"):
        Checkpointer(model).load(str(tmp_path / "other.pth"))


BESIDE_THE_PUBLISHED = """
import importlib.machinery, importlib.util
real = importlib.util.find_spec
spec = importlib.machinery.ModuleSpec("mask2former", None)
importlib.util.find_spec = lambda name, *rest: spec if name == "mask2former" else real(name, *rest)
import torch
from detectron2.modeling import BACKBONE_REGISTRY
from jepa_plugins.d2 import get_config
from jepa_plugins.d2.backbones import build_backbone
options = ["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.DEVICE", "meta"]
cfg = get_config("detectron2/quick/semantic.yaml", options)
with torch.device("meta"):
    print(type(build_backbone(cfg)).__name__, "JEPAD2SwinTransformer" in BACKBONE_REGISTRY)
    BACKBONE_REGISTRY.register(type("D2SwinTransformer", (BACKBONE_REGISTRY.get("JEPAD2SwinTransformer"),), {}))
    print(type(build_backbone(cfg)).__name__)
"""


def test_beside_the_published_package_ours_is_found_under_its_other_name() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BESIDE_THE_PUBLISHED], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["JEPAD2SwinTransformer", "True", "D2SwinTransformer"]
