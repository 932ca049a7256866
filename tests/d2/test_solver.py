"""Parameter groups, clipping and schedule of the published Mask2Former."""

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from tiny import BACKBONE, pictures, tiny_config, tiny_model  # noqa: E402

from jepa_plugins.core.optim import ClippedAdamW, ClippedSGD  # noqa: E402
from jepa_plugins.d2.solver import build_lr_scheduler, build_optimizer, parameter_groups  # noqa: E402

RATES = {
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.WEIGHT_DECAY": 0.05,
    "SOLVER.WEIGHT_DECAY_NORM": 0.01,
    "SOLVER.WEIGHT_DECAY_EMBED": 0.02,
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
    "MODEL.MASK_JEPA.FREEZE_BACKBONE": False,
}


def settings_of(cfg, model) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of each parameter by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(cfg, model)
        for parameter in group["params"]
    }


def test_groups_of_a_model() -> None:
    model = tiny_model(RATES)
    got = settings_of(tiny_config("mask_jepa", RATES), model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(got) == trained
    modules = dict(model.named_modules())
    for name, (rate, decay) in got.items():
        owner = modules[name.rpartition(".")[0]]
        assert rate == pytest.approx(0.0001 if name.startswith("backbone.") else 0.001), name
        if isinstance(owner, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
            want = 0.01
        elif isinstance(owner, nn.Embedding) or name in ("jepa.mask_token", "jepa.query"):
            want = 0.02
        else:
            want = 0.05
        assert decay == want, name
    assert got["sem_seg_head.predictor.level_embed.weight"] == (0.001, 0.02)
    assert got["sem_seg_head.pixel_decoder.transformer.level_embed"] == (0.001, 0.05)  # no nn.Embedding
    assert got["jepa.mask_token"] == (0.001, 0.02)


def test_each_parameter_is_in_one_group() -> None:
    model = tiny_model(RATES)
    groups = parameter_groups(tiny_config("mask_jepa", RATES), model)
    parameters = [id(p) for group in groups for p in group["params"]]
    assert len(parameters) == len(set(parameters))
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups)


def test_shared_and_position_tables() -> None:
    class Window(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relative_position_bias_table = nn.Parameter(torch.zeros(3))
            self.absolute_pos_embed = nn.Parameter(torch.zeros(3))
            self.weight = nn.Parameter(torch.zeros(3))
            self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)

    model = nn.ModuleDict({"backbone": Window()})
    model["again"] = model["backbone"]
    got = settings_of(tiny_config("mask_jepa", RATES), model)
    assert got == {
        "backbone.relative_position_bias_table": (pytest.approx(0.0001), 0.0),
        "backbone.absolute_pos_embed": (pytest.approx(0.0001), 0.0),
        "backbone.weight": (pytest.approx(0.0001), 0.05),
    }


def test_a_groups_table_moves_as_one_group_for_each_parameter_would() -> None:
    """The published code gives every parameter a group of its own."""
    cfg, models = tiny_config("mask_jepa", RATES), [tiny_model(RATES), tiny_model(RATES)]
    single = settings_of(cfg, models[1])
    by_name = dict(models[1].named_parameters())
    groups = [
        {"params": [by_name[name]], "lr": rate, "weight_decay": decay}
        for name, (rate, decay) in single.items()
    ]
    optimizers = [
        build_optimizer(cfg, models[0]),
        torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        sum(model.train()(pictures((64, 64), (64, 64))).values()).backward()
        if optimizer is optimizers[1]:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.01)
        optimizer.step()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7), name


@pytest.mark.parametrize(("name", "kind"), [("ADAMW", ClippedAdamW), ("SGD", ClippedSGD)])
@pytest.mark.parametrize("clipped", [True, False])
def test_optimisers(name, kind, clipped) -> None:
    cfg = tiny_config(
        "mask_jepa",
        {"SOLVER.OPTIMIZER": name, "SOLVER.CLIP_GRADIENTS.ENABLED": clipped, "SOLVER.MOMENTUM": 0.8},
    )
    model = tiny_model()
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, kind) and optimizer.max_norm == (0.01 if clipped else None)
    if name == "SGD":
        assert optimizer.defaults["momentum"] == 0.8
    sum(model.train()(pictures((64, 64))).values()).backward()
    optimizer.step()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert float(optimizer.grad_norm) > 0.01
    assert float(norm) == pytest.approx(0.01 if clipped else float(optimizer.grad_norm), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value"}, "CLIP_TYPE is 'value'; Mask2Former's is 'full_model'"),
        ({"SOLVER.OPTIMIZER": "LION"}, "SOLVER.OPTIMIZER is 'LION'; give ADAMW or SGD"),
    ],
)
def test_what_is_not_supported_is_one_sentence(changes, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_optimizer(tiny_config("mask_jepa", changes), tiny_model())


def test_schedules() -> None:
    cfg = tiny_config("mask_jepa", {**RATES, "SOLVER.MAX_ITER": 10})
    optimizer = build_optimizer(cfg, tiny_model(RATES))
    scheduler = build_lr_scheduler(cfg, optimizer)
    peaks = [group["initial_lr"] for group in optimizer.param_groups]
    assert sorted(set(peaks)) == pytest.approx([0.0001, 0.001])
    for step in range(10):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            assert group["lr"] == pytest.approx(peak * (1 - step / 10) ** 0.9)
        optimizer.step()
        scheduler.step()
    assert all(group["lr"] == 0 for group in optimizer.param_groups)
    cfg = tiny_config(
        "mask_jepa",
        {"SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR", "SOLVER.STEPS": (2,)},
        backbone=BACKBONE,
    )
    assert build_lr_scheduler(cfg, build_optimizer(cfg, tiny_model())) is not None
