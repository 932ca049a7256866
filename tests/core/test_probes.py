"""The linear probe: it finds what is linear, and its scores are those of a hand-made matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core.probes import confusion_matrix, fit_linear, scores, spread_subset


def blobs(seed: int, classes: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, 8)) * 3
    labels = rng.integers(0, classes, 400)
    points = centres[labels] + rng.normal(size=(400, 8)) * spread
    return torch.from_numpy(points).float(), torch.from_numpy(labels)


def test_separable_classes_are_found():
    features, labels = blobs(0, 4, 0.1)
    probe = fit_linear(features[:300], labels[:300], 4)
    assert torch.equal(probe.predict(features[300:]), labels[300:])


def test_noise_is_not_found():
    features, _ = blobs(0, 4, 0.1)
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 4, 400))
    probe = fit_linear(features[:200], labels[:200], 4)
    assert (probe.predict(features[200:]) == labels[200:]).float().mean() < 0.4


@settings(max_examples=5, deadline=None)
@given(st.floats(0.1, 50), st.floats(-20, 20))
def test_scale_and_offset_of_a_feature_do_not_matter(scale, offset):
    features, labels = blobs(2, 3, 2.0)
    plain = fit_linear(features, labels, 3).predict(features)
    changed = fit_linear(features * scale + offset, labels, 3).predict(features * scale + offset)
    assert (plain == changed).float().mean() > 0.98


def test_a_constant_feature_does_no_harm():
    features, labels = blobs(0, 3, 0.1)
    features[:, 0] = 7.0
    assert (fit_linear(features, labels, 3).predict(features) == labels).all()


def test_the_loss_is_at_its_minimum():
    features, labels = blobs(3, 3, 3.0)
    probe = fit_linear(features, labels, 3, l2=1e-2)
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    x = (features - probe.mean) / probe.scale
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels) + 0.5e-2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(float(g.abs().max()) for g in gradients) < 1e-4


def test_scores_of_a_known_matrix():
    truth, predicted = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    matrix = confusion_matrix(truth, predicted, 3)
    assert matrix.tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 0]]
    got = scores(matrix)
    assert got["accuracy"] == pytest.approx(80.0)
    assert got["mIoU"] == pytest.approx(
        100 * (2 / 3 + 2 / 3) / 2
    )  # the class that never occurs does not count


@given(st.integers(1, 5000), st.integers(1, 600))
def test_spread_subset_is_even_and_unique(count, most):
    chosen = spread_subset(count, most)
    assert len(chosen) == min(count, most)
    assert len(chosen.unique()) == len(chosen)
    assert 0 <= int(chosen.min()) and int(chosen.max()) < count
