"""The probes: they find what is planted, nothing in noise, and agree with plain references."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core import probes
from jepa_plugins.core.probes import (
    Cells,
    assign_clusters,
    at_cell_centres,
    confusion_matrix,
    fit_kmeans,
    fit_linear,
    floor_maps,
    knn_predict,
    probe_scores,
    scores,
    spread_subset,
    wave_code,
)
from jepa_plugins.core.probing import Protocol, mean_of, table, undisturbed


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


# --- k nearest neighbours


def plain_knn(train: Cells, features: torch.Tensor, classes: int, k: int, temperature: float) -> list[int]:
    answers = []
    for x in features.double():
        known = train.features.double()
        similarity = (known @ x) / (known.norm(dim=1) * x.norm())
        nearest = sorted(range(len(known)), key=lambda i: -float(similarity[i]))[:k]
        votes = [0.0] * classes
        for i in nearest:
            votes[int(train.labels[i])] += float((similarity[i] / temperature).exp())
        answers.append(max(range(classes), key=votes.__getitem__))
    return answers


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.sampled_from([0.03, 0.07, 1.0]))
def test_knn_agrees_with_a_plain_vote(seed, k, temperature):
    features, labels = blobs(seed, 5, 4.0)
    train = Cells(features[:60], labels[:60])
    got = knn_predict(train, features[60:90], 5, k=k, temperature=temperature)
    assert got.tolist() == plain_knn(train, features[60:90], 5, k, temperature)


def test_knn_weighs_near_neighbours_more_than_their_number():
    train = Cells(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 1]))
    query = torch.tensor([[1.0, 0.1]])
    assert knn_predict(train, query, 2, k=3).tolist() == [0]
    assert knn_predict(train, query, 2, k=3, temperature=100.0).tolist() == [1]


def test_knn_looks_at_directions_alone():
    features, labels = blobs(4, 4, 2.0)
    train = Cells(features[:200], labels[:200])
    longer = Cells(train.features * torch.linspace(0.1, 9, 200)[:, None], train.labels)
    assert torch.equal(knn_predict(train, features[200:], 4), knn_predict(longer, features[200:] * 7, 4))


def test_few_neighbours_all_vote_and_no_query_gives_nothing():
    train = Cells(torch.eye(3), torch.arange(3))
    assert knn_predict(train, torch.eye(3), 3, k=20).tolist() == [0, 1, 2]
    assert knn_predict(train, torch.empty(0, 3), 3).shape == (0,)


def test_no_more_similarities_than_allowed_are_held(monkeypatch):
    """The results do not depend on the size of the parts, and no part is larger than it may be."""
    features, labels = blobs(5, 3, 3.0)
    train = Cells(features[:100], labels[:100])
    whole, clusters = knn_predict(train, features, 3), fit_kmeans(features, 3)
    nearest = clusters.predict(features)
    largest = []
    for name in ("topk", "min"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda x, *a, f=plain, **kw: largest.append(x.numel()) or f(x, *a, **kw)
        )
    monkeypatch.setattr(probes, "SCORES_AT_ONCE", 700)
    assert torch.equal(knn_predict(train, features, 3), whole)
    assert torch.equal(clusters.predict(features), nearest)
    assert largest and max(largest) <= 700


# --- k-means


def test_kmeans_finds_planted_clusters_whatever_their_offset():
    features, labels = blobs(0, 4, 0.2)
    for offset in (0.0, 1000.0):
        predicted = fit_kmeans(features + offset, 4).predict(features + offset)
        counts = confusion_matrix(predicted, labels, 4)
        assert ((counts > 0).sum(0) == 1).all() and ((counts > 0).sum(1) == 1).all()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7))
def test_kmeans_is_at_rest_and_repeats_itself(seed, k):
    features, _ = blobs(seed, 4, 2.0)
    found, again = fit_kmeans(features, k), fit_kmeans(features, k)
    assert torch.equal(found.centres, again.centres) and found.inertia == again.inertia
    nearest = torch.cdist(features, found.centres).argmin(1)
    assert (found.predict(features) == nearest).float().mean() > 0.995
    for i in nearest.unique().tolist():
        torch.testing.assert_close(features[nearest == i].mean(0), found.centres[i], atol=0.05, rtol=0.05)
    distance = (features - found.centres[nearest]).square().sum(1).mean()
    assert found.inertia == pytest.approx(float(distance), rel=1e-3)


def test_more_starts_are_never_worse_and_the_seed_matters():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 2))).float()
    inertia = [fit_kmeans(features, 9, restarts=n).inertia for n in (1, 2, 8)]
    assert inertia[0] >= inertia[1] >= inertia[2]
    assert not torch.equal(fit_kmeans(features, 9, seed=1).centres, fit_kmeans(features, 9, seed=2).centres)


def test_kmeans_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    fit_kmeans(torch.eye(8), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_kmeans_of_copies_and_of_too_few_vectors():
    copies = fit_kmeans(torch.ones(6, 2), 3)
    assert copies.inertia == 0 and bool(torch.isfinite(copies.centres).all())
    with pytest.raises(ValueError, match="3 clusters needs as many vectors, got 2"):
        fit_kmeans(torch.eye(2), 3)


# --- all together


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([2, 50, 10**6]))
def test_clusters_get_the_names_that_agree_most(seed, size, largest):
    counts = np.random.default_rng(seed).integers(0, largest, (size, size))
    found = assign_clusters(counts)
    assert sorted(found) == list(range(size))
    best = max(counts[np.arange(size), list(order)].sum() for order in itertools.permutations(range(size)))
    assert counts[np.arange(size), found].sum() == best


def test_a_greedy_choice_of_names_would_be_worse():
    counts = np.array([[9, 8, 0], [8, 0, 0], [0, 0, 1]])  # greedy takes 9 and leaves 0 for the second
    assert assign_clusters(counts).tolist() == [1, 0, 2]


def test_every_probe_reads_planted_classes_and_none_reads_noise():
    features, labels = blobs(0, 4, 0.3)
    clear = probe_scores(Cells(features[:200], labels[:200]), Cells(features[200:], labels[200:]), 4)
    assert set(clear) == {f"{p}_{s}" for p in ("linear", "knn", "kmeans") for s in ("mIoU", "accuracy")}
    assert min(clear.values()) == pytest.approx(100)
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 4, 400))
    noise = probe_scores(Cells(features[:200], labels[:200]), Cells(features[200:], labels[200:]), 4)
    assert max(noise[f"{p}_accuracy"] for p in ("linear", "knn", "kmeans")) < 45


def test_a_channel_that_is_constant_in_training_does_no_harm():
    features, labels = blobs(0, 3, 0.1)
    features[:, 0] = 7.0
    features[200:, 0] = 7.01
    result = probe_scores(Cells(features[:200], labels[:200]), Cells(features[200:], labels[200:]), 3)
    assert min(result.values()) == pytest.approx(100)


def test_probes_work_without_gradients_and_only_the_chosen_ones_run():
    features, labels = blobs(0, 3, 0.1)
    with torch.no_grad():
        result = probe_scores(Cells(features, labels), Cells(features, labels), 3, ["linear"])
    assert result == {"linear_mIoU": pytest.approx(100), "linear_accuracy": pytest.approx(100)}


# --- in a training loop


def test_undisturbed_restores_modes_and_generators():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).train()
    model[1].eval()  # a mode that train() would not give
    torch.manual_seed(1)
    states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), undisturbed(model):
        assert not model.training and not torch.is_grad_enabled()
        np.random.rand(), random.random(), torch.rand(3)
        raise RuntimeError("stop")
    assert [m.training for m in model.modules()] == [True, True, False] and torch.is_grad_enabled()
    assert (np.random.get_state()[1] == states[0]).all() and random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_rows_as_text_and_their_mean():
    rows = {"a": {"linear_mIoU": 12.345, "x": 100.0}, "longer name": {"linear_mIoU": 2.0, "x": 0.0}}
    assert mean_of(rows.values()) == {"linear_mIoU": pytest.approx(7.1725), "x": 50}
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].split() == ["a", "12.35", "100.00"]


@pytest.mark.parametrize(
    ("changes", "sentence"), [({"cells": 0}, "at least one cell"), ({"kinds": ()}, "got none")]
)
def test_protocols_that_make_no_sense(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Protocol((32, 32), **changes)


# --- cells and floors


def test_labels_are_taken_under_the_cell_centres():
    labels = np.arange(8)[:, None] * 10 + np.arange(8)
    assert at_cell_centres(labels, 2, 4).tolist() == [[21, 23, 25, 27], [61, 63, 65, 67]]
    assert (at_cell_centres(labels, 8, 8) == labels).all()


def test_wave_code_of_known_values():
    code = wave_code(torch.tensor([[0.5, 0.0]]), octaves=2)
    assert code.flatten().tolist() == pytest.approx([1, 0, 0, -1, 0, 0, 1, 1], abs=1e-6)


def test_floors_know_position_mean_colour_and_pixels_and_nothing_else():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 16, 24), dtype=np.uint8))
    floors = floor_maps(images, 8)
    assert floors["position"].shape == (2, 16, 2, 3) and floors["colour_position"].shape == (2, 40, 2, 3)
    assert torch.equal(floors["position"][0], floors["position"][1])
    assert len(floors["position"][0].flatten(1).T.unique(dim=0)) == 6  # each place has its own code
    cell = images[1, :, 8:16, 16:24].float().mean((1, 2)) / 255
    place = torch.tensor([0.75, 2.5 / 3])
    expected = wave_code(torch.cat((place, cell)))
    torch.testing.assert_close(floors["colour_position"][1, :, 1, 2], expected, atol=1e-5, rtol=0)
    pixels = floors["pixels_position"]
    assert pixels.shape == (2, 16 + 192, 2, 3) and torch.equal(pixels[:, :16], floors["position"])
    patch = images[1, :, 8:16, 16:24].flatten().float() / 255
    torch.testing.assert_close(pixels[1, 16:, 1, 2], patch)
    shuffled = images.clone()
    shuffled[..., :8, :8] = images[..., :8, :8].flip(-1)  # another cell with the same mean
    other = floor_maps(shuffled, 8)
    torch.testing.assert_close(other["colour_position"], floors["colour_position"])
    assert not torch.equal(other["pixels_position"], pixels)
