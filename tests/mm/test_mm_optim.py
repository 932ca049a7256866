"""Optimiser steps: schedules under accumulation, learning-rate scaling, precision, gradients that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.registry import OPTIM_WRAPPERS  # noqa: E402

from jepa_plugins.core.schedules import rising, warmup_cosine  # noqa: E402
from jepa_plugins.mm.optim import (  # noqa: E402
    PretrainOptimWrapper,
    PretrainOptimWrapperConstructor,
    RisingWeightDecay,
    WarmupCosineLR,
    accumulation_of,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.fixed = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def wrapped(**changes) -> tuple[Net, PretrainOptimWrapper]:
    model = Net()
    config = {
        "type": "PretrainOptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.04},
        **changes,
    }
    return model, PretrainOptimWrapperConstructor(config)(model)


def test_groups_and_wrapper() -> None:
    model, wrapper = wrapped()
    assert isinstance(wrapper, PretrainOptimWrapper)
    decayed, plain = wrapper.optimizer.param_groups
    assert [p is model.layer.weight for p in decayed["params"]] == [True]
    assert decayed["weight_decay"] == 0.04 and plain["weight_decay"] == 0.0 and len(plain["params"]) == 3
    with pytest.raises(ValueError, match="takes no paramwise_cfg"):
        PretrainOptimWrapperConstructor({"optimizer": {}}, {"bias_decay_mult": 0.0})


def test_accumulation_counts_optimiser_steps() -> None:
    _, wrapper = wrapped(accumulative_counts=3)
    lr = WarmupCosineLR(wrapper, start=1e-4, final=1e-6, warmup_steps=2, end=1, epoch_length=9)
    decay = RisingWeightDecay(wrapper, final=0.4)
    for schedule in (lr, decay):
        schedule.configure(total=5, accumulation=3, steps_per_epoch=2, batch=12)
    for iteration in range(15):
        step = iteration // 3 + 1
        group = wrapper.optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(warmup_cosine(step, 5, 2, 1e-4, 1e-3, 1e-6))
        assert group["weight_decay"] == pytest.approx(rising(step, 5, 0.04, 0.4))
        lr.step()
        decay.step()


def test_weight_decay_rises_from_zero_too() -> None:
    _, wrapper = wrapped(optimizer={"type": "AdamW", "lr": 1e-3, "weight_decay": 0.0})
    decay = RisingWeightDecay(wrapper, final=0.4)
    decay.configure(total=4, accumulation=1, steps_per_epoch=2, batch=12)
    for _ in range(3):
        decay.step()
    assert [group["weight_decay"] for group in wrapper.optimizer.param_groups] == [pytest.approx(0.4), 0.0]


def test_schedules_resume() -> None:
    _, wrapper = wrapped()
    lr = WarmupCosineLR(wrapper, start=1e-4, final=1e-6, warmup_steps=2)
    lr.configure(9, 1, 3, 8)
    values = []
    for _ in range(9):
        values.append(wrapper.optimizer.param_groups[0]["lr"])
        if len(values) == 4:
            state = lr.state_dict()
            state = {k: list(v) if isinstance(v, list) else v for k, v in state.items()}
        lr.step()
    _, other = wrapped()
    later = WarmupCosineLR(other, start=1e-4, final=1e-6, warmup_steps=2)
    later.load_state_dict(state)
    later.configure(9, 1, 3, 8)
    for value in values[3:]:
        assert other.optimizer.param_groups[0]["lr"] == value
        later.step()


def test_learning_rate_is_scaled_by_the_batch_and_says_so() -> None:
    _, wrapper = wrapped()
    lr = WarmupCosineLR(wrapper, start=2e-4, final=1e-6, warmup_epochs=2, ref_batch=2048)
    lr.configure(100, 1, 10, 512)
    assert lr.warmup == 20
    assert wrapper.optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * (2e-4 + 8e-4 / 20))
    assert "scaled by 0.25, of 2048" in lr.describe() and "5e-05 to 0.00025" in lr.describe()
    lr.ref_batch = None
    lr.configure(100, 1, 10, 512)
    assert lr.scale == 1.0 and "not scaled" in lr.describe()


def test_bad_wrappers() -> None:
    with pytest.raises(ValueError, match=r"optim_wrapper.clip_grad is dict\(max_norm=1.0\) or None"):
        wrapped(clip_grad=1.0)
    with pytest.raises(
        ValueError, match="optim_wrapper.accumulative_counts is a whole number from 1 on, got 0"
    ):
        accumulation_of({"accumulative_counts": 0})


def test_bad_schedules() -> None:
    _, wrapper = wrapped()
    with pytest.raises(ValueError, match="either warmup_epochs or warmup_steps"):
        WarmupCosineLR(wrapper, start=0.0, final=0.0)
    with pytest.raises(ValueError, match="linear or cosine, got 'step'"):
        RisingWeightDecay(wrapper, final=0.4, shape="step")
    lr = WarmupCosineLR(wrapper, start=0.0, final=0.0, warmup_steps=30)
    with pytest.raises(ValueError, match="warm-up of 30 steps is no shorter than the run of 20"):
        lr.configure(20, 1, 10, 8)
    unknown = RisingWeightDecay(wrapper, final=0.4)
    with pytest.raises(ValueError, match="length of RisingWeightDecay is not known: train with PretrainLoop"):
        unknown.step()


def test_bfloat16_autocast_works_on_the_cpu() -> None:
    model, wrapper = wrapped(dtype="bfloat16")
    with wrapper.optim_context(model):
        out = model.layer(torch.ones(1, 3))
    assert out.dtype == torch.bfloat16 and model.layer.weight.dtype == torch.float32
    model, wrapper = wrapped()
    with wrapper.optim_context(model):
        assert model.layer(torch.ones(1, 3)).dtype == torch.float32
    with pytest.raises(ValueError, match="got 'float16' .*AmpOptimWrapper"):
        wrapped(dtype="float16")


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.5}])
def test_the_norm_is_logged_before_clipping_which_is_off_by_default(clip: dict | None) -> None:
    model, wrapper = wrapped(clip_grad=clip)
    wrapper.update_params(3 * model.layer(torch.ones(1, 3)).sum())
    rows = torch.full((3, 3), 3.0).square().sum() + torch.full((3,), 3.0).square().sum()
    norm = wrapper.message_hub.get_scalar("train/grad_norm").current()
    assert norm == pytest.approx(float(rows.sqrt()))


def test_gradients_that_are_not_finite_move_nothing() -> None:
    model, wrapper = wrapped()
    before = model.layer.weight.clone()
    with pytest.raises(FloatingPointError, match="norm is nan: lower the learning rate"):
        wrapper.update_params((model.layer(torch.ones(1, 3)) * float("nan")).sum())
    assert torch.equal(model.layer.weight, before)


def test_registered_for_every_scope() -> None:
    assert OPTIM_WRAPPERS.get("PretrainOptimWrapper") is PretrainOptimWrapper
