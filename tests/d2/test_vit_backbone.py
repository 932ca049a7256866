"""The ViT backbone in detectron2: its builder, the published names, padding, and the learning rate by layer."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

import convert_weights  # noqa: E402
from detectron2.config import LazyCall as L  # noqa: E402
from detectron2.config import instantiate  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone  # noqa: E402
from detectron2.modeling.backbone.fpn import LastLevelMaxPool  # noqa: E402
from golden_tools import assert_close, fill_module, load, tensor  # noqa: E402
from tiny import options  # noqa: E402
from vit_tiny import YAML  # noqa: E402

from jepa_plugins.core.vit import VisionTransformer  # noqa: E402
from jepa_plugins.d2 import get_config, lazy  # noqa: E402
from jepa_plugins.d2.checkpoint import Checkpointer  # noqa: E402
from jepa_plugins.d2.registration import build_model  # noqa: E402
from jepa_plugins.d2.solver import build_optimizer, group_parameters, layer_decay_rate, vit_depth  # noqa: E402
from jepa_plugins.d2.vit import JEPASimpleFeaturePyramid, JEPAViT  # noqa: E402

META, ARRAYS = load("vitdet_pyramid")


def tiny_rcnn(changes: dict | None = None):
    cfg = get_config("detectron2/quick/mask_rcnn.yaml", options(YAML, changes or {}))
    torch.manual_seed(0)
    return cfg, build_model(cfg)


@pytest.mark.parametrize("kind", ["plain", "rel_pos"])
def test_golden_features_of_the_lazy_classes(kind) -> None:
    c = META["config"]
    names = (
        "img_size",
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "window_size",
        "mlp_ratio",
        "qkv_bias",
    )
    config = L(JEPASimpleFeaturePyramid)(
        net=L(JEPAViT)(
            **{name: c[name] for name in names},
            window_block_indexes=c["window_block_indexes"],
            pretrain_img_size=c["pretrain_img_size"],
            pretrain_use_cls_token=c["pretrain_use_cls_token"],
            use_rel_pos=kind == "rel_pos",
        ),
        in_feature="last_feat",
        out_channels=c["out_channels"],
        scale_factors=c["scale_factors"],
        top_block=L(LastLevelMaxPool)(),
        norm=c["norm"],
    )
    model = fill_module(instantiate(config).eval(), META)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == META[kind]["shapes"]
    with torch.no_grad():
        image = tensor(800, [1, 3, 96, 144], -2, 2)
        found = {**model(image), **model.net(image)}
    assert set(found) == set(META[kind]["noise"])
    for name, noise in META[kind]["noise"].items():
        assert_close(found[name], ARRAYS[f"{kind}_{name}"], noise)
    assert {name: shape.stride for name, shape in model.output_shape().items()} == META["strides"]


def test_names_of_the_published_model(golden_dir) -> None:
    """Weights of a ViTDet Mask R-CNN ViT-B load strictly."""
    want = json.loads((golden_dir / "state_dicts" / "vitdet_mask_rcnn_b.json").read_text())
    changes = ["MODEL.DEVICE", "meta", "MODEL.VIT.PRETRAIN_USE_CLS_TOKEN", True]
    with torch.device("meta"):
        model = build_model(get_config("detectron2/mask_rcnn/vitb_100ep.yaml", changes))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == want["keys"]
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == want["parameters"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == want["trainable_parameters"]


def test_registered_names_are_ours_alone() -> None:
    """Current detectron2 has classes ViT and SimpleFeaturePyramid, and may register such names one day."""
    ours = {
        name
        for registry in (BACKBONE_REGISTRY, META_ARCH_REGISTRY)
        for name, entry in registry
        if entry.__module__ in ("jepa_plugins.d2.vit", "jepa_plugins.d2.mask_rcnn")
    }
    assert ours == {"build_jepa_vit_sfp_backbone", "JEPAMaskRCNN"}


def test_the_builder_follows_the_configuration() -> None:
    cfg, model = tiny_rcnn({"MODEL.VIT.USE_CHECKPOINT": True, "MODEL.VIT.DROP_PATH_RATE": 0.2})
    backbone = model.backbone
    assert isinstance(backbone, Backbone) and isinstance(backbone.net, Backbone)
    shapes = backbone.output_shape()
    assert list(shapes) == ["p2", "p3", "p4", "p5", "p6"] and shapes["p2"].channels == 16
    out = backbone.eval()(torch.zeros(1, 3, 64, 96))
    for name, shape in shapes.items():
        assert tuple(out[name].shape[-2:]) == (64 // shape.stride, -(-96 // shape.stride))
    assert backbone.net.use_act_checkpoint and backbone.net.blocks[1].drop_path.drop_prob == 0.2
    assert [block.window for block in backbone.net.blocks] == [3, 0]
    assert backbone.padding_constraints == {"size_divisibility": 32, "square_size": 64}
    grey = BACKBONE_REGISTRY.get("build_jepa_vit_sfp_backbone")(cfg, ShapeSpec(channels=1))
    assert grey.net.patch_embed.proj.in_channels == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"MODEL.VIT.SQUARE_PAD": 48}, "square_pad is 48, no multiple of the last level's stride 32"),
        ({"MODEL.VIT.SCALE_FACTORS": [4.0, 2.0, 1.0]}, "top_block reads p5, but the pyramid has"),
        ({"MODEL.VIT.NUM_HEADS": 5}, "5 attention heads do not divide a width of 48"),
        ({"MODEL.FPN.NORM": "GN"}, "norms 'LN' and '', got 'GN'"),
    ],
)
def test_backbones_that_cannot_be(changes, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny_rcnn(changes)


def test_published_lazy_arguments_are_understood() -> None:
    net = JEPAViT(
        img_size=64,
        embed_dim=12,
        depth=1,
        num_heads=1,
        norm_layer=partial(nn.LayerNorm, eps=1e-3),
        residual_block_indexes=[],
        pretrain_img_size=32,
    )
    assert net.blocks[0].norm1.eps == net.blocks[0].norm2.eps == 1e-3
    with pytest.raises(
        ValueError, match=r"residual_block_indexes names \[1\], but this ViT has no convolutional"
    ):
        JEPAViT(residual_block_indexes=[1])


# --- files of tools/convert_weights.py


class Detector(nn.Module):
    """What the checkpointer looks for: a ViT at `backbone.net`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.net = net


def converted(tmp_path, capsys, *options, patch=16, grid=(4, 4), **shape) -> tuple:
    """(the source's ViT, the written file, what was printed)."""
    size = (grid[0] * patch, grid[1] * patch)
    vit = VisionTransformer(size, patch, width=64, heads=1, **{"depth": 2} | shape).eval()
    weights = {f"target_encoder.{name}": value for name, value in vit.state_dict().items()}
    torch.save({"state_dict": weights | {"predictor.a": torch.ones(1)}}, tmp_path / "in.pth")
    arguments = [tmp_path / "in.pth", tmp_path / "out.pth", "--to", "detectron2", *options]
    convert_weights.main([str(argument) for argument in (*arguments, "--grid", *grid)])
    return vit, tmp_path / "out.pth", capsys.readouterr().out


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_order_of_channels_of_a_converted_file_stays(order, tmp_path, capsys) -> None:
    vit, path, text = converted(tmp_path, capsys, "--channels", order)
    model = Detector(JEPAViT(img_size=64, embed_dim=64, depth=2, num_heads=1, pretrain_img_size=64))
    Checkpointer(model).load(str(path))
    kernel = model.backbone.net.patch_embed.proj.weight
    file = torch.load(path, weights_only=True)["model"]["backbone.net.patch_embed.proj.weight"]
    rgb = vit.patch_embed.proj.weight
    assert torch.equal(kernel, file) and torch.equal(file, rgb.flip(1) if order == "bgr" else rgb)
    assert ('INPUT.FORMAT BGR MODEL.PIXEL_MEAN "[103.53, 116.28, 123.675]"' in text) == (order == "bgr")


PRINTED = [(16, (4, 4), 2), (16, (2, 6), 2), (8, (3, 5), 5), (14, (3, 4), 2), (32, (2, 2), 1)]


@pytest.mark.parametrize(("patch", "grid", "depth"), PRINTED)
def test_the_printed_lines_build_models_that_load_the_file(patch, grid, depth, tmp_path, capsys) -> None:
    vit, path, text = converted(tmp_path, capsys, patch=patch, grid=grid, depth=depth)
    line, lazy_line = (re.search(rf"^{start}(.*)$", text, re.M)[1] for start in ("use:", "or: "))
    words = shlex.split(line.replace(" FILE ", f" {path} "))
    assert words.pop(0) == "--config-file"
    cfg = get_config(words[0], [*words[1:], "MODEL.DEVICE", "cpu", "MODEL.VIT.USE_REL_POS", False])
    built = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, ShapeSpec(channels=3))
    assert [shape.stride for shape in built.output_shape().values()] == [4, 8, 16, 32, 64]
    call = re.search(r"JEPAViT\(.*\)", lazy_line.split(" (patches")[0])[0]
    lazy_net = eval(call.replace("use_rel_pos=True", "use_rel_pos=False"), {"JEPAViT": JEPAViT})
    nets = (built.net, lazy_net)
    for net in nets:
        loader = Checkpointer(Detector(net), required=["backbone"])
        loader.load(cfg.MODEL.WEIGHTS)
        resampled = patch not in (8, 16)
        assert loader.report.resized == (["backbone.net.patch_embed.proj.weight"] if resampled else [])
        assert torch.equal(net.pos_embed, vit.pos_embed) and net.grid == grid
    with torch.no_grad():
        assert ("patches are resampled" in text) == resampled
        for block in (block for net in nets for block in net.blocks):
            block.window = 0
        image = torch.randn(1, 3, *(side * nets[0].patch_size for side in grid))
        vit.norm = nn.Identity()
        for net in nets:
            if not resampled:
                want = vit(image).transpose(1, 2).unflatten(2, grid)
                torch.testing.assert_close(net.eval().features(image), want, rtol=1e-4, atol=1e-5)


# --- the optimiser


def test_rates_by_layer() -> None:
    """ViTDet's rule: the last block one step below the heads, patches and positions one below the first block."""
    rate = {
        name: layer_decay_rate(name, decay=0.7, depth=12)
        for name in (
            "backbone.net.pos_embed",
            "backbone.net.patch_embed.proj.bias",
            "backbone.net.blocks.0.attn.rel_pos_h",
            "backbone.net.blocks.11.mlp.fc2.weight",
            "backbone.simfp_2.0.weight",
            "proposal_generator.rpn_head.conv.conv0.weight",
            "roi_heads.mask_head.blocks.3.weight",
        )
    }
    want = [0.7**13, 0.7**13, 0.7**12, 0.7, 1.0, 1.0, 1.0]
    assert list(rate.values()) == pytest.approx(want)


def test_blocks_of_other_backbones_are_not_a_vits() -> None:
    assert vit_depth(["backbone.layers.0.blocks.1.norm1.weight", "sem_seg_head.blocks.3.weight"]) == 0
    assert vit_depth(["backbone.net.blocks.0.norm1.weight", "backbone.net.blocks.2.norm1.weight"]) == 3


def test_groups_of_the_detector() -> None:
    cfg, model = tiny_rcnn({"SOLVER.BASE_LR": 0.1})
    names = {id(p): name for name, p in model.named_parameters()}
    got = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    assert set(got) == set(names.values())
    modules = dict(model.named_modules())
    for name, (rate, decay) in got.items():
        norm = isinstance(modules[name.rpartition(".")[0]], (nn.LayerNorm, nn.GroupNorm))
        assert decay == (0.0 if norm or name.endswith("pos_embed") else 0.1), name
        assert rate == pytest.approx(0.1 * layer_decay_rate(name, decay=0.7, depth=2)), name
    assert got["backbone.net.blocks.0.attn.rel_pos_h"][1] == 0.1  # decays, as published
    assert got["backbone.net.pos_embed"] == (pytest.approx(0.1 * 0.7**3), 0.0)
    assert got["roi_heads.box_head.conv1.norm.weight"] == (pytest.approx(0.1), 0.0)


def test_the_lazy_optimiser_takes_the_same_groups() -> None:
    cfg, model = tiny_rcnn()
    params = {"model": model, "weight_decay_norm": 0.0, "layer_decay": 0.7}
    one = lazy.adamw(params, lr=cfg.SOLVER.BASE_LR, weight_decay=0.1)
    other = build_optimizer(cfg, model)
    assert len(one.param_groups) == len(other.param_groups) > 6 and one.max_norm is None is other.max_norm
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        assert all(p is q for p, q in zip(a.pop("params"), b.pop("params"), strict=True)) and a == b


@pytest.mark.parametrize("decay", [0.0, 1.5, 0.7])
def test_a_decay_that_means_nothing_is_one_sentence(decay) -> None:
    with pytest.raises(ValueError, match=rf"SOLVER.LAYER_DECAY\) is {decay}: it is a number above 0"):
        group_parameters(nn.Linear(2, 2), base_lr=0.1, weight_decay=0.1, layer_decay=decay)
