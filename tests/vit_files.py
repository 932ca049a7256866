"""Files of ViT methods in miniature: published layouts with random weights, and the model that computes them."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from jepa_plugins.core.vit import VisionTransformer

WIDTH, DEPTH, HEADS, PATCH, SIZE = 128, 2, 2, 8, 32


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter away from its initial value, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = name.endswith("gamma") or "gamma_" in name or (parameter.dim() == 1 and "norm" in name)
            parameter.copy_(0.5 + 0.2 * noise if one else 0.1 * noise)
    return model.eval()


def vit(seed: int = 0, **options: Any) -> TimmViT:
    """timm's plain ViT without head."""
    values = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return randomise(TimmViT(**{**values, **options}, num_classes=0, global_pool=""), seed)


def beit(seed: int = 0, shared: bool = False) -> Beit:
    """BEiT without head: relative positions of its own in every block, or shared (pre-training)."""
    values = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    model = Beit(
        **values,
        num_classes=0,
        global_pool="",
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=not shared,
        use_shared_rel_pos_bias=shared,
    )
    return randomise(model, seed)


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return OrderedDict((prefix + name, value) for name, value in weights.items())


def some(*shape: int) -> Tensor:
    return torch.ones(shape) * 0.01


def files() -> dict[str, tuple[dict[str, Any], nn.Module, str]]:
    """{layout: (content of the file, model of its encoder, origin)}."""
    plain, other = vit(1, class_token=False), vit(2, class_token=False)
    cls, cls_other = vit(3), vit(4)
    a, b, c, d = (model.state_dict() for model in (plain, other, cls, cls_other))
    decoder = {"mask_token": some(1, 1, 8), "decoder_embed.weight": some(8, WIDTH)}
    decoder |= {"decoder_blocks.0.norm1.weight": some(8), "decoder_pred.bias": some(4)}
    head = {"head.mlp.0.weight": some(4, WIDTH), "head.last_layer.weight_g": some(4, 1)}
    args = argparse.Namespace(arch="vit_small")
    found: dict[str, tuple[dict[str, Any], nn.Module, str]] = {
        "ours": (
            {
                "state_dict": {**under("encoder.", b), **under("target_encoder.", a), "predictor.w": some(2)},
                "meta": {"cfg": f"model = dict(arch=dict(depth={DEPTH}, heads={HEADS}, width={WIDTH}))"},
            },
            plain,
            "DMT-JEPA or I-JEPA pre-training of this project",
        ),
        "ijepa": (
            {
                "encoder": under("module.", b),
                "predictor": {"module.mask_token": some(1, 1, 8)},
                "target_encoder": under("module.", a),
                "epoch": 3,
            },
            plain,
            "I-JEPA",
        ),
        "mae": ({"model": {**c, **decoder}, "args": args, "epoch": 1}, cls, "MAE"),
        "mae_encoder": ({"model": dict(c)}, cls, "MAE"),
        "dino": (
            {
                "student": under("module.", {**under("backbone.", d), **head}),
                "teacher": {**under("backbone.", c), **head},
                "args": args,
            },
            cls,
            "DINO",
        ),
        "dino_backbone": (dict(c), cls, "DINO"),
        "ibot": (
            {
                "student": under("module.backbone.", {**d, "masked_embed": some(1, WIDTH)}),
                "teacher": under("backbone.", c),
            },
            cls,
            "iBOT",
        ),
        "ibot_teacher": ({"state_dict": dict(c)}, cls, "iBOT"),
        "mocov3": (
            {
                "state_dict": {
                    **under("module.base_encoder.", {**c, "head.0.weight": some(4, WIDTH)}),
                    **under("module.momentum_encoder.", d),
                    "module.predictor.0.weight": some(4, 4),
                },
                "arch": "vit_small",
            },
            cls,
            "MoCo v3",
        ),
        "deit": ({"model": {**c, "head.weight": some(10, WIDTH), "head.bias": some(10)}}, cls, "DeiT"),
        "timm": ({**c, "head.weight": some(10, WIDTH), "head.bias": some(10)}, cls, "timm"),
    }
    return {**found, **scaled_files(), **relative_files()}


def scaled_files() -> dict[str, tuple[dict[str, Any], nn.Module, str]]:
    """With LayerScale, registers, or a distillation token."""
    v2, registers = vit(5, init_values=0.1), vit(6, init_values=0.1, reg_tokens=2, no_embed_class=True)
    weights = v2.state_dict()
    # DINOv2 adds the class token's position to it before the registers come between
    tokens = dict(registers.state_dict())
    row = some(1, 1, WIDTH)
    tokens["register_tokens"] = tokens.pop("reg_token")
    tokens["pos_embed"] = torch.cat([row, tokens["pos_embed"]], dim=1)
    tokens["cls_token"] = tokens["cls_token"] - row
    chunked = {
        name.replace("blocks.", f"blocks.{int(name.split('.')[1])}.", 1)
        if name.startswith("blocks")
        else name: v
        for name, v in weights.items()
    }
    third = vit(7, init_values=0.1, no_embed_class=True)
    old_names = {
        name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): value
        for name, value in third.state_dict().items()
    }
    distilled = vit(8, reg_tokens=1, no_embed_class=True)
    two = dict(distilled.state_dict())
    two["dist_token"] = two.pop("reg_token") - 2 * row
    two["cls_token"] = two["cls_token"] - row
    two["pos_embed"] = torch.cat([row, 2 * row, two["pos_embed"]], dim=1)
    mask = {"mask_token": some(1, WIDTH)}
    return {
        "dinov2": ({**weights, **mask}, v2, "DINOv2"),
        "dinov2_registers": ({**tokens, **mask}, registers, "DINOv2"),
        "dinov2_training": (
            {"teacher": {**under("backbone.", chunked), "dino_head.last_layer.weight": some(2, 2)}},
            v2,
            "DINOv2",
        ),
        "deit3": ({"model": {**old_names, "head.weight": some(10, WIDTH)}}, third, "DeiT III"),
        "deit_distilled": (
            {"model": {**two, "head.weight": some(10, WIDTH), "head_dist.weight": some(10, WIDTH)}},
            distilled,
            "DeiT",
        ),
    }


def relative_files() -> dict[str, tuple[dict[str, Any], nn.Module, str]]:
    """With BEiT's relative positions."""
    own, shared = beit(9), beit(10, shared=True)
    index = {"blocks.0.attn.relative_position_index": torch.zeros(2, 2, dtype=torch.int64)}
    tuned = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: v
             for name, v in own.state_dict().items()}  # fmt: skip
    mask = {"mask_token": some(1, 1, WIDTH)}
    words, regression = {"lm_head.weight": some(500, WIDTH)}, {"lm_head.weight": some(WIDTH, WIDTH)}
    return {
        "beit": ({"model": {**shared.state_dict(), **mask, **words}}, shared, "BEiT"),
        "beit_tuned": ({"module": {**tuned, **index, "head.weight": some(10, WIDTH)}}, own, "BEiT"),
        "data2vec": ({"model": {**shared.state_dict(), **mask, **regression}}, shared, "data2vec"),
    }


def tokens_of(model: nn.Module, image: Tensor, prefix: int) -> Tensor:
    """The patches' features [B, N, D] of a model of `files`."""
    with torch.no_grad():
        return model.forward_features(image)[:, prefix:]


# --- rectangular grids of this project's files

RECTANGLES = [(17, 26), (8, 32), (10, 12)]  # of as many positions as a square and one, a square, neither


def rectangular(grid: tuple[int, int], told: bool = True, part: str = "pretraining") -> tuple[dict, Tensor]:
    """(a file of this project, its table of positions); `told`: with its configuration."""
    size = (grid[0] * 4, grid[1] * 4)
    weights = randomise(VisionTransformer(size, 4, width=16, depth=1, heads=2), 3).state_dict()
    options = f"arch=dict(depth=1, heads=2, width=16), img_size=({size[0]}, {size[1]}), patch_size=4"
    if part == "pretraining":
        text = f"work_dir = 'x'\nmodel = dict(\n    {options},\n    mask=dict(scope='process'))\n"
        held = {**under("encoder.", weights), **under("target_encoder.", weights), "step": torch.tensor(1)}
    else:
        text = f"crop = (4, 4)\nmodel = dict(backbone=dict({options}), decode_head=dict(img_size=8))\n"
        held = {**under("backbone.", weights), "decode_head.conv_seg.bias": some(2)}
    return {"state_dict": held, **({"meta": {"cfg": text}} if told else {})}, weights["pos_embed"]
