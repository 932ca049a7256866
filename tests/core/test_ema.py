"""The target copies: schedule, arithmetic, storage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jepa_plugins.core.ema import ema_update, momentum_at, target_copy


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))


def test_schedule_is_linear_from_start_to_end() -> None:
    total = 187_500
    assert momentum_at(0, total, 0.996, 1.0) == 0.996
    assert momentum_at(total // 2, total, 0.996, 1.0) == pytest.approx(0.998, abs=1e-12)
    assert momentum_at(total, total, 0.996, 1.0) == 1.0
    assert momentum_at(total + 5, total, 0.996, 1.0) == 1.0
    assert momentum_at(3, 0, 0.9, 0.95) == 0.95


@given(st.integers(0, 10_000), st.integers(1, 10_000))
def test_schedule_never_leaves_its_range_and_never_falls(step, total) -> None:
    now, after = (momentum_at(s, total, 0.996, 1.0) for s in (step, step + 1))
    assert 0.996 <= now <= after <= 1.0


def test_update_is_the_weighted_mean_and_buffers_are_copied() -> None:
    online = network()
    target = target_copy(online)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with torch.no_grad():
        for value in online.state_dict().values():
            value.copy_(torch.rand_like(value.float()) * 10)
    ema_update(target, online, 0.9)
    after, source = target.state_dict(), online.state_dict()
    parameters = dict(online.named_parameters())
    for name, value in after.items():
        if name in parameters:
            assert torch.allclose(value, 0.9 * before[name] + 0.1 * source[name], atol=1e-6), name
        else:
            assert torch.equal(value, source[name]), name
    assert "1.num_batches_tracked" in after


def test_momentum_one_keeps_and_zero_copies() -> None:
    online, target = network(), target_copy(network())
    kept = [p.clone() for p in target.parameters()]
    ema_update(target, online, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), kept, strict=True))
    ema_update(target, online, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), online.parameters(), strict=True))


def test_update_is_in_place_and_outside_the_graph() -> None:
    online = network()
    target = target_copy(online)
    places = [p.data_ptr() for p in [*target.parameters(), *target.buffers()]]
    ema_update(target, online, 0.5)
    assert places == [p.data_ptr() for p in [*target.parameters(), *target.buffers()]]
    assert all(p.grad_fn is None for p in target.parameters())


def test_copy_shares_nothing_takes_no_gradient_and_is_in_eval_mode() -> None:
    online = network().train()
    target = target_copy(online)
    assert not any(module.training for module in target.modules())
    assert all(module.training for module in online.modules())
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in online.parameters())
    ours = {t.data_ptr() for t in target.state_dict().values()}
    assert not ours & {t.data_ptr() for t in online.state_dict().values()}


def test_another_architecture_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        ema_update(network(), nn.Sequential(nn.Conv2d(3, 4, 1)), 0.5)
