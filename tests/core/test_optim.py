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


# --- accumulation


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(6, 4, generator=generator) for _ in range(count)]


def foreign_loop(model: nn.Module, optimizer, inputs, scaler=None) -> None:
    """Clears the gradients before every backward and steps after it."""
    for x in inputs:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def assert_close(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().max()) <= tolerance


@pytest.mark.parametrize("make", [ClippedAdamW, ClippedSGD])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_accumulated_batches_equal_one_large_batch(make, parts, scaled) -> None:
    ours, theirs, inputs = fresh(), fresh(), batches(6)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    foreign_loop(ours, make(ours.parameters(), lr=0.01, max_norm=0.1, accumulation=parts), inputs, scaler)
    large = [torch.cat(inputs[i : i + parts]) for i in range(0, 6, parts)]
    foreign_loop(theirs, make(theirs.parameters(), lr=0.01, max_norm=0.1), large)
    assert_close(ours, theirs, 1e-6)


def test_it_says_when_it_has_moved_the_weights() -> None:
    model, said = fresh(), []
    optimizer = ClippedAdamW(model.parameters(), lr=0.01, accumulation=3)
    optimizer.on_step = lambda: said.append(model[0].weight.detach().clone())
    before = model[0].weight.detach().clone()
    for count, x in enumerate(batches(7), 1):
        foreign_loop(model, optimizer, [x])
        assert len(said) == count // 3
        assert torch.equal(model[0].weight, said[-1] if said else before)
    assert optimizer.grad_norm is not None


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_state_between_two_steps_survives(stop) -> None:
    straight, stopped, inputs = fresh(), fresh(), batches(6)
    foreign_loop(straight, ClippedAdamW(straight.parameters(), lr=0.01, accumulation=2), inputs)
    first = ClippedAdamW(stopped.parameters(), lr=0.01, accumulation=2)
    foreign_loop(stopped, first, inputs[:stop])
    state = copy.deepcopy(first.state_dict())
    assert ("accumulated" in state) == (stop % 2 == 1)
    resumed = ClippedAdamW(stopped.parameters(), lr=0.01, accumulation=2)
    resumed.load_state_dict(state)
    foreign_loop(stopped, resumed, inputs[stop:])
    assert_close(straight, stopped)
    assert "accumulated" not in resumed.state_dict()


def test_a_batch_whose_gradient_overflowed_is_not_counted() -> None:
    """The scaler does not call the optimiser then; the step waits for another batch."""
    ours, theirs, inputs = fresh(), fresh(), batches(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = ClippedAdamW(ours.parameters(), lr=0.01, accumulation=2)
    foreign_loop(ours, optimizer, [inputs[0], torch.full((6, 4), 1e38), inputs[1]], scaler)
    assert all(torch.isfinite(p).all() for p in ours.parameters())
    foreign_loop(theirs, ClippedAdamW(theirs.parameters(), lr=0.01), [torch.cat(inputs[:2])])
    assert_close(ours, theirs, 1e-6)


def test_a_closure_computes_the_gradients_that_are_clipped() -> None:
    ours, theirs, (x,) = fresh(), fresh(), batches(1)
    optimizer = ClippedSGD(ours.parameters(), lr=0.1, max_norm=0.01)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ours(x).square().mean()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == float(theirs(x).detach().square().mean())
    foreign_loop(theirs, ClippedSGD(theirs.parameters(), lr=0.1, max_norm=0.01), [x])
    assert_close(ours, theirs)


def test_no_accumulation_below_one() -> None:
    with pytest.raises(ValueError, match="accumulation is 0; it counts the calls of a step, at least 1"):
        ClippedAdamW(fresh().parameters(), lr=0.1, accumulation=0)
