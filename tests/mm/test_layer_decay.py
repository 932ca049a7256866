"""Layer-wise learning rates by our parameter names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS  # noqa: E402

from jepa_plugins.mm.backbone import JEPAViT  # noqa: E402
from jepa_plugins.mm.layer_decay import layer_of  # noqa: E402

ARCH = {"width": 24, "depth": 4, "heads": 2}


class Segmentor(nn.Module):
    """A backbone and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        values = {"class_token": True, "train_positions": True, "final_norm": True, **options}
        self.backbone = JEPAViT(ARCH, 32, 8, (0, 3), **values)
        self.decode_head = nn.Conv2d(24, 3, 1)


def optimiser(model: nn.Module, paramwise: dict | None, **changes: Any) -> torch.optim.Optimizer:
    config = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 3e-4, "weight_decay": 0.05},
        **changes,
    }
    build = OPTIM_WRAPPER_CONSTRUCTORS.build
    constructor = build(
        {"type": "ViTLayerDecayConstructor", "optim_wrapper_cfg": config, "paramwise_cfg": paramwise}
    )
    return constructor(model).optimizer


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """{name: (learning rate, weight decay)}."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_rates_fall_from_block_to_block() -> None:
    model = Segmentor()
    got = rates(model, optimiser(model, {"decay_rate": 0.65}))
    assert got.keys() == dict(model.named_parameters()).keys()
    expected = {
        "backbone.patch_embed.proj.weight": (0.65**5, 0.05),
        "backbone.pos_embed": (0.65**5, 0.0),
        "backbone.cls_token": (0.65**5, 0.0),
        "backbone.blocks.0.attn.qkv.weight": (0.65**4, 0.05),
        "backbone.blocks.0.attn.qkv.bias": (0.65**4, 0.0),
        "backbone.blocks.3.mlp.fc1.weight": (0.65, 0.05),
        "backbone.blocks.3.norm1.weight": (0.65, 0.0),
        "backbone.norm.weight": (1.0, 0.0),
        "decode_head.weight": (1.0, 0.05),
        "decode_head.bias": (1.0, 0.0),
    }
    for name, (scale, decay) in expected.items():
        assert got[name] == (pytest.approx(3e-4 * scale), decay), name


def test_the_rule_is_mmsegmentations() -> None:
    theirs = pytest.importorskip("mmseg.engine.optimizers.layer_decay_optimizer_constructor")
    names = [name for name, _ in Segmentor().backbone.named_parameters()]
    assert len(names) > 50
    for name in names:
        as_theirs = "backbone." + name.replace("blocks.", "layers.")
        assert layer_of(name, 4) == theirs.get_layer_id_for_vit(as_theirs, 4 + 2), name


def test_what_does_not_train_is_left_out() -> None:
    model = Segmentor(frozen_stages=2)
    got = rates(model, optimiser(model, {"decay_rate": 0.65}))
    assert not any(
        name.startswith(("backbone.blocks.0", "backbone.blocks.1.", "backbone.patch")) for name in got
    )
    assert got["backbone.blocks.2.mlp.fc1.weight"][0] == pytest.approx(3e-4 * 0.65**2)


def test_groups_know_their_factor_and_other_wrappers_work() -> None:
    groups = optimiser(Segmentor(), {"decay_rate": 0.5, "num_layers": 6}).param_groups
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in (0, 3, 4, 5, 6, 7)}
    wrapped = Segmentor()
    wrapped.module = Segmentor()  # as a wrapper for several processes holds it
    assert (
        len(rates(wrapped.module, optimiser(wrapped, {"decay_rate": 0.5}, clip_grad={"max_norm": 1.0}))) > 50
    )


@pytest.mark.parametrize(
    ("model", "paramwise", "message"),
    [
        (Segmentor, None, "needs paramwise_cfg=dict"),
        (Segmentor, {"decay_rate": 1.5}, "above 0 and up to 1"),
        (Segmentor, {"decay_rate": 0.65, "layer_decay_rate": 1}, "knows decay_rate, num_layers, backbone"),
        (Segmentor, {"decay_rate": 0.65, "num_layers": 2}, "num_layers is 2, but the backbone has 4 blocks"),
        (lambda: nn.Linear(2, 2), {"decay_rate": 0.65}, "finds no 'backbone.blocks'"),
    ],
)
def test_bad_options(model: Any, paramwise: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimiser(model(), paramwise)
