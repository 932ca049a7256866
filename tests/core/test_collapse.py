"""Measures of collapse, against numpy and on cases with a known answer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core.collapse import MAX_VECTORS, CollapseWatch, HeldOutMeter, rank_me, rank_metrics


@given(st.integers(1, 12), st.integers(12, 20))
@settings(max_examples=20, deadline=None)
def test_rank_of_orthogonal_vectors_is_their_number(count, width) -> None:
    basis = torch.linalg.qr(torch.randn(width, width)).Q[:count] * 3
    assert rank_me(basis, centred=False) == pytest.approx(count, rel=1e-3)
    if count > 1:  # the mean takes one direction away
        assert rank_me(basis, centred=True) == pytest.approx(count - 1, rel=1e-3)


def test_rank_of_degenerate_vectors() -> None:
    line = torch.randn(50, 1) @ torch.randn(1, 8)
    assert rank_me(line, centred=False) == pytest.approx(1, abs=1e-3)
    assert rank_me(torch.zeros(5, 8), centred=False) == 1
    assert rank_me(torch.ones(5, 8), centred=True) == 1


def test_a_common_mean_rules_the_raw_rank_only() -> None:
    vectors = torch.randn(400, 16) + 100
    assert rank_me(vectors, centred=False) < 2.5
    assert rank_me(vectors, centred=True) > 15


def test_rank_uses_an_even_subset_of_many_vectors() -> None:
    vectors = torch.randn(3 * MAX_VECTORS, 4)
    step = np.linspace(0, len(vectors) - 1, MAX_VECTORS).astype(np.int64)
    assert rank_me(vectors, centred=True) == pytest.approx(rank_me(vectors[step], centred=True), rel=1e-4)


def test_rank_metrics_are_pooled_and_dense() -> None:
    target = torch.randn(6, 30, 8)
    metrics = rank_metrics(target)
    assert set(metrics) == {f"rankme_{a}_{b}" for a in ("pooled", "dense") for b in ("raw", "centred")}
    assert metrics["rankme_pooled_raw"] == rank_me(target.mean(1), centred=False)
    assert metrics["rankme_dense_centred"] == rank_me(target.reshape(-1, 8), centred=True)


def test_the_watch_warns_once_for_each_measure_that_falls() -> None:
    watch = CollapseWatch(variance_floor=0.25, rank_floor=0.35)
    assert watch.update(0, {"target_variance": 0.8, "rankme_dense_centred": 40.0}) == []
    assert watch.update(1, {"target_variance": 0.21, "rankme_dense_centred": 15.0}) == []
    assert watch.update(2, {}) == []
    (sentence,) = watch.update(3, {"target_variance": 0.19, "rankme_dense_centred": 15.0})
    assert watch.update(4, {"target_variance": 0.1}) == []
    (rank,) = watch.update(5, {"rankme_dense_centred": 13.0})
    assert "step 3" in sentence and "target_variance is 0.19" in sentence and "first value 0.8" in sentence
    assert "rankme_dense_centred" in rank


def test_the_watch_warns_again_after_a_recovery() -> None:
    watch = CollapseWatch(variance_floor=0.25)
    values = [1.0, 0.2, 0.3, 0.2, 0.6, 0.2]  # only 0.6 is a recovery
    said = [bool(watch.update(step, {"target_variance": value})) for step, value in enumerate(values)]
    assert said == [False, True, False, False, False, True]


def test_a_rank_of_what_is_not_finite_is_nan() -> None:
    vectors = torch.randn(8, 4)
    vectors[2, 1] = float("inf")
    assert math.isnan(rank_me(vectors, centred=True))


def test_the_watch_survives_a_resume() -> None:
    watch = CollapseWatch()
    watch.update(0, {"target_variance": 1.0, "rankme_dense_centred": 10.0})
    watch.update(1, {"target_variance": 0.1})
    resumed = CollapseWatch()
    resumed.load_state_dict(watch.state_dict())
    assert resumed.update(2, {"target_variance": 0.05}) == []  # already said
    assert (
        len(resumed.update(3, {"rankme_dense_centred": 1.0})) == 1
    )  # against the first value before the resume


def held_out(images: int, seed: int, cells: int = 12, width: int = 5, channels: int = 3):
    """(maps of a batch, what they were made of)."""
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(1, cells, width)) * 2
    target = place + rng.normal(size=(images, cells, width))
    hidden = np.tile(np.arange(cells) % 2 == 0, (images, 1))
    predicted = place + 0.3 * rng.normal(size=target.shape)
    errors = ((predicted - target) ** 2).sum(-1)[hidden].reshape(images, -1)
    noise = 0.4 * rng.normal(size=(images, channels, 4, 4))
    error = ((noise * 0.5 - noise) ** 2).sum()
    maps = {
        "target": torch.from_numpy(target).float(),
        "errors": torch.from_numpy(errors).float(),
        "hidden_count": torch.tensor(int(hidden.sum())),
        "denoise_error": torch.tensor(error),
        "denoise_count": torch.tensor(images * 16),
        "denoise_sum": torch.from_numpy(noise.sum((0, 2, 3))),
        "denoise_square": torch.from_numpy((noise**2).sum((0, 2, 3))),
    }
    return maps, target, predicted, hidden, noise


def test_held_out_numbers_against_numpy() -> None:
    batches = [held_out(n, seed=0) for n in (5, 5)] + [held_out(3, seed=1)]
    meters = [HeldOutMeter() for _ in range(2)]
    for i, (maps, *_) in enumerate(batches):
        meters[i % 2].update(maps)
    whole = HeldOutMeter()
    for meter in [*meters, HeldOutMeter()]:  # a process without images adds nothing
        whole.merge(meter)
    got = whole.result()
    target, predicted, hidden, noise = (np.concatenate([batch[i] for batch in batches]) for i in range(1, 5))
    overall = target.var(axis=(0, 1)).mean()
    at_cell = target.var(axis=0).mean()
    error = ((predicted - target) ** 2)[hidden].mean()
    variance = noise.transpose(0, 2, 3, 1).reshape(-1, 3).var(axis=0).mean()
    pooled = target.mean(1)
    shares = np.linalg.svd(pooled - pooled.mean(0), compute_uv=False)
    shares = shares / shares.sum()
    assert got == pytest.approx(
        {
            "target_variance": overall,
            "position_explained_variance": 1 - at_cell / overall,
            "explained_variance": 1 - error / overall,
            "explained_variance_beyond_position": 1 - error / at_cell,
            "rankme_pooled_centred": np.exp(-(shares * np.log(shares)).sum()),
            "denoise_r2": 1 - ((noise * 0.5) ** 2).mean() / variance,
        },
        rel=1e-4,
    )


def test_held_out_parts_are_optional() -> None:
    maps, *_ = held_out(4, seed=2)
    assert HeldOutMeter().result() == {}
    for prefix, others in (("denoise", {"denoise_r2"}), ("", None)):
        meter = HeldOutMeter()
        meter.update({name: m for name, m in maps.items() if name.startswith("denoise") == bool(prefix)})
        assert set(meter.result()) == others if others else "denoise_r2" not in meter.result()


def test_a_prediction_of_the_position_explains_what_the_position_explains() -> None:
    target = np.random.default_rng(3).normal(size=(1, 10, 4)) + np.zeros((40, 1, 1))
    target = target + 0.5 * np.random.default_rng(4).normal(size=target.shape)
    errors = ((target - target.mean(0)) ** 2).sum(-1)
    meter = HeldOutMeter()
    meter.update(
        {
            "target": torch.from_numpy(target),
            "errors": torch.from_numpy(errors),
            "hidden_count": torch.tensor(errors.size),
        }
    )
    result = meter.result()
    assert result["explained_variance"] == pytest.approx(result["position_explained_variance"], rel=1e-6)
    assert result["explained_variance_beyond_position"] == pytest.approx(0, abs=1e-6)
