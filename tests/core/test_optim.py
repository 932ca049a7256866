"""Full-model clipping inside the optimisers."""

import copy

import pytest
import torch
from torch import nn

from jepa_plugins.core.optim import ClippedAdamW, ClippedSGD


def with_gradients(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    (model(torch.randn(16, 4)).square().mean() * scale).backward()
    return model


def norm_of(model: nn.Module) -> float:
    return float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())


@pytest.mark.parametrize("make", [ClippedAdamW, ClippedSGD])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_a_step_equals_clipping_by_hand(make, max_norm) -> None:
    ours, theirs = with_gradients(), with_gradients()
    plain = make.__mro__[2]
    optimizer = make(ours.parameters(), lr=0.1, max_norm=max_norm)
    by_hand = plain(theirs.parameters(), lr=0.1)
    norm = norm_of(ours)
    for _ in range(2):
        optimizer.step()
        nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        by_hand.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    assert min(norm, max_norm) == pytest.approx(norm_of(ours), rel=1e-3)


@pytest.mark.parametrize("max_norm", [None, 0.0, 0.01])
def test_the_norm_before_clipping_is_kept(max_norm) -> None:
    model = with_gradients(7.0)
    want = norm_of(model)
    groups = [{"params": [p]} for p in model.parameters()]  # one norm over all groups
    optimizer = ClippedAdamW(groups, lr=0.1, max_norm=max_norm)
    assert optimizer.grad_norm is None
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(want, rel=1e-5)
    assert norm_of(model) == pytest.approx(max_norm or want, rel=1e-3)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = with_gradients()
    model[0].weight.grad = None
    before = copy.deepcopy(model.state_dict())
    ClippedAdamW(model.parameters(), lr=0.1, max_norm=0.01).step()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_a_state_survives() -> None:
    model = with_gradients()
    optimizer = ClippedAdamW(model.parameters(), lr=0.1, max_norm=0.01)
    optimizer.step()
    other = copy.deepcopy(model)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        ours.grad = theirs.grad.clone()
    resumed = ClippedAdamW(other.parameters(), lr=0.1, max_norm=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_gradient_scaler_hands_over_unscaled_gradients() -> None:
    ours, theirs = with_gradients(), with_gradients()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # the scaler takes its scale at first use
    for parameter in ours.parameters():
        parameter.grad *= 1024.0
    optimizer = ClippedAdamW(ours.parameters(), lr=0.1, max_norm=0.01)
    scaler.step(optimizer)
    ClippedAdamW(theirs.parameters(), lr=0.1, max_norm=0.01).step()
    assert float(optimizer.grad_norm) == pytest.approx(norm_of(with_gradients()), rel=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
