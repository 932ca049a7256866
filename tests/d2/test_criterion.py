"""Matcher and criterion: against a plain reference, their invariances, and their refusals."""

import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("detectron2")

from detectron2.utils.events import EventStorage  # noqa: E402

from jepa_plugins.d2.mask2former.criterion import SetCriterion  # noqa: E402
from jepa_plugins.d2.mask2former.matcher import HungarianMatcher, pack_targets, pairwise_costs  # noqa: E402
from jepa_plugins.d2.mask2former.point_sampling import point_sample, sample_masks  # noqa: E402

REFERENCE = runpy.run_path(str(Path(__file__).with_name("criterion_reference.py")))
points = runpy.run_path(str(Path(__file__).parents[1] / "golden" / "fill.py"))["points"]
WEIGHTS = (2, 5, 5)


def draw(*shape, device=None):
    """Points that depend on the shape only: the same for the reference and for ours."""
    return torch.from_numpy(points(*shape))


def make_layer(generator, batch, queries, classes, size):
    logits = torch.randn(batch, queries, classes + 1, generator=generator)
    masks = 3 * torch.randn(batch, queries, *size, generator=generator)
    return {"pred_logits": logits.requires_grad_(), "pred_masks": masks.requires_grad_()}


def make_outputs(seed, layers=3, batch=2, queries=6, classes=4, size=(7, 9)):
    generator = torch.Generator().manual_seed(seed)
    first, *others = (make_layer(generator, batch, queries, classes, size) for _ in range(layers))
    return {**first, "aux_outputs": others}


def make_targets(seed, counts=(2, 3), sizes=((28, 36), (28, 36)), classes=4, dtype=torch.bool):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "labels": torch.randint(classes, (count,), generator=generator),
            "masks": (torch.rand(count, *size, generator=generator) > 0.6).to(dtype),
        }
        for count, size in zip(counts, sizes, strict=True)
    ]


def make_criterion(
    classes=4, eos=0.1, num_points=40, oversample=3.0, importance=0.75, losses=("labels", "masks")
):
    matcher = HungarianMatcher(*WEIGHTS, num_points)
    return SetCriterion(classes, matcher, {}, eos, losses, num_points, oversample, importance)


def layers_of(outputs):
    return [outputs, *outputs["aux_outputs"]]


def close(got, want, tolerance=2e-5):
    assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), (got - want).abs().max()


@st.composite
def problems(draw_value):
    integer = lambda low, high: draw_value(st.integers(low, high))  # noqa: E731
    batch = integer(1, 3)
    seed, classes = integer(0, 10**6), integer(1, 4)
    size = (integer(1, 9), integer(1, 9))
    outputs = make_outputs(seed, integer(1, 3), batch, integer(1, 6), classes, size)
    targets = make_targets(
        seed + 1,
        [integer(0, 5) for _ in range(batch)],
        [(integer(1, 20), integer(1, 20)) for _ in range(batch)],
        classes,
        draw_value(st.sampled_from([torch.bool, torch.uint8, torch.int64])),
    )
    points = integer(1, 30), draw_value(st.floats(1, 4)), draw_value(st.floats(0, 1))
    return outputs, targets, classes, points


@settings(max_examples=60, deadline=None)
@given(problems())
def test_costs_losses_and_gradients_equal_the_reference(problem):
    outputs, targets, classes, (count, oversample, importance) = problem
    criterion = make_criterion(classes, 0.1, count, oversample, importance)
    with mock.patch.object(torch, "rand", draw):
        losses = criterion(outputs, targets)
        sum(losses.values()).backward()
        costs = criterion.matcher.costs(layers_of(outputs), pack_targets(targets))
        for i, layer in enumerate(layers_of(outputs)):
            wanted = REFERENCE["layer_costs"](layer, targets, WEIGHTS, count, draw)
            pairs = criterion.matcher(layer, targets)
            for got, cost, best, (query, target) in zip(
                costs[i], wanted, REFERENCE["assign"](wanted), pairs, strict=True
            ):
                close(got[:, : cost.shape[1]], cost)
                # With equal costs several assignments are best: compare what they cost.
                assert len(query) == len(best[0]) == len(set(query.tolist())) == len(set(target.tolist()))
                close(cost[query, target].sum(), cost[best].sum(), 1e-4)
            copy = {
                name: layer[name].detach().clone().requires_grad_() for name in ("pred_logits", "pred_masks")
            }
            values = REFERENCE["layer_losses"](copy, targets, pairs, 0.1, count, oversample, importance, draw)
            sum(values).backward()
            suffix = f"_{i - 1}" if i else ""
            for name, value in zip(("loss_ce", "loss_mask", "loss_dice"), values, strict=True):
                close(losses.pop(name + suffix), value)
            for name, leaf in copy.items():
                close(layer[name].grad, leaf.grad)
    assert not losses


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_sampling_stored_masks_equals_grid_sample(seed, height, width, shared):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(3, height, width, generator=generator) > 0.5
    index = torch.tensor([2, 0, 0, 1])
    where = 1.6 * torch.rand(1 if shared else 4, 30, 2, generator=generator) - 0.3  # some outside
    want = point_sample(masks[index][:, None].float(), where)[:, 0]
    for dtype in (torch.bool, torch.uint8):
        got = sample_masks(masks.to(dtype), index, where)
        assert got.dtype == torch.float32
        close(got, want, 1e-6)


def test_pairwise_costs_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, generator=generator)
    x = 6 * torch.randn(2, 5, 11, generator=generator)
    t = torch.rand(2, 3, 11, generator=generator)
    labels = torch.tensor([[0, 2, 1], [1, 1, 0]])
    cost_class, cost_mask, cost_dice = pairwise_costs(logits, x, labels, t)
    for b, q, o in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(3)).tolist():
        close(cost_class[b, q, o], -logits[b, q].softmax(0)[labels[b, o]])
        close(cost_mask[b, q, o], F.binary_cross_entropy_with_logits(x[b, q], t[b, o]))
        s = x[b, q].sigmoid()
        close(cost_dice[b, q, o], 1 - (2 * (s * t[b, o]).sum() + 1) / (s.sum() + t[b, o].sum() + 1))


def test_another_image_does_not_change_an_images_matches():
    outputs, targets = make_outputs(0), make_targets(1)
    others, other_targets = make_outputs(2), make_targets(3, counts=(5, 6))
    mixed = {name: torch.stack([outputs[name][0], others[name][1]]) for name in ("pred_logits", "pred_masks")}
    matcher = HungarianMatcher(*WEIGHTS, 50)
    with mock.patch.object(torch, "rand", draw):
        alone = matcher(outputs, targets)
        beside = matcher(mixed, [targets[0], other_targets[1]])
    assert [row.tolist() for row in alone[0]] == [row.tolist() for row in beside[0]]
    assert len(beside[1][0]) == 6


def test_padding_a_mask_to_the_batch_changes_nothing_but_its_frame():
    small = make_targets(1, sizes=((20, 36), (28, 30)))
    full = [
        dict(t, masks=F.pad(t["masks"], (0, 36 - t["masks"].shape[2], 0, 28 - t["masks"].shape[1])))
        for t in small
    ]
    outputs, criterion = make_outputs(0), make_criterion()
    with mock.patch.object(torch, "rand", draw):
        losses, want = criterion(outputs, small), criterion(outputs, full)
    assert losses.keys() == want.keys()
    assert all(torch.equal(losses[name], want[name]) for name in want)


def test_masks_of_unmatched_queries_get_no_gradient():
    outputs, targets, criterion = make_outputs(0), make_targets(1), make_criterion(losses=["masks"])
    with mock.patch.object(torch, "rand", draw):
        losses = criterion(outputs, targets)
        pairs = criterion.matcher(outputs, targets)
    assert set(losses) == {f"loss_{kind}{i}" for kind in ("mask", "dice") for i in ("", "_0", "_1")}
    sum(losses.values()).backward()
    for i, (query, _) in enumerate(pairs):
        touched = outputs["pred_masks"].grad[i].flatten(1).abs().sum(1) > 0
        assert touched.nonzero()[:, 0].tolist() == query.tolist()


def test_points_are_drawn_once_and_costs_go_to_the_cpu_once():
    outputs, targets, criterion = make_outputs(0), make_targets(1), make_criterion()
    shapes, transfers = [], []
    to_cpu = torch.Tensor.cpu

    def counted_rand(*shape, device=None):
        shapes.append(shape)
        return draw(*shape)

    def counted_cpu(tensor):
        transfers.append(tuple(tensor.shape))
        return to_cpu(tensor)

    with mock.patch.object(torch, "rand", counted_rand), mock.patch.object(torch.Tensor, "cpu", counted_cpu):
        criterion(outputs, targets)
    assert shapes == [(1, 40, 2), (5, 120, 2), (5, 10, 2)]
    assert transfers == [(3, 2, 6, 3)]


@pytest.mark.parametrize("counts", [(0, 3), (0, 0)])
def test_images_without_objects(counts):
    outputs, criterion = make_outputs(0), make_criterion()
    losses = criterion(outputs, make_targets(1, counts=counts))
    sum(losses.values()).backward()
    for layer in layers_of(outputs):
        assert layer["pred_masks"].grad.isfinite().all()
        assert not layer["pred_masks"].grad[0].any()
        assert layer["pred_logits"].grad[0].any()
    zero = all(float(losses[name].detach()) == 0 for name in losses if "ce" not in name)
    assert zero == (counts == (0, 0))


def test_no_object_weight_zero_without_objects_is_no_nan():
    losses = make_criterion(eos=0)(make_outputs(0), make_targets(1, counts=(0, 0)))
    assert all(float(value.detach()) == 0 for value in losses.values())


def test_losses_are_float32_under_autocast():
    outputs, targets, criterion = make_outputs(0), make_targets(1), make_criterion()
    halves = {
        name: outputs[name].detach().bfloat16().requires_grad_() for name in ("pred_logits", "pred_masks")
    }
    floats = {name: value.detach().float() for name, value in halves.items()}
    with mock.patch.object(torch, "rand", draw):
        want = criterion(floats, targets)
        with torch.autocast("cpu", torch.bfloat16):
            got = criterion(halves, targets)
    for name, value in got.items():
        assert value.dtype == torch.float32 and torch.equal(value, want[name])
    sum(got.values()).backward()
    assert halves["pred_masks"].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["pred_logits", "pred_masks"])
@pytest.mark.parametrize("layer, name", [(0, "final"), (2, "aux 1")])
def test_a_cost_that_is_not_finite_names_layer_and_iteration(layer, name, field, value):
    outputs, targets, criterion = make_outputs(0), make_targets(1), make_criterion()
    with torch.no_grad():
        layers_of(outputs)[layer][field][1] = value
    with pytest.raises(FloatingPointError, match=rf"'{name}' .* outside training \(image 1 .*SOLVER.BASE_LR"):
        criterion(outputs, targets)
    with EventStorage(123), pytest.raises(FloatingPointError, match=rf"'{name}' .* at iteration 123 "):
        criterion(outputs, targets)


@pytest.mark.parametrize("label", [-1, 4, 255])
def test_a_label_outside_the_classes_is_refused(label):
    targets = make_targets(1)
    targets[1]["labels"][0] = label
    with pytest.raises(ValueError, match=f"label {label}, .*0 to 3.*NUM_CLASSES"):
        make_criterion()(make_outputs(0), targets)


def test_bad_input_is_refused():
    outputs, targets = make_outputs(0), make_targets(1)
    with pytest.raises(ValueError, match="4 classes, the criterion 7"):
        make_criterion(classes=7)(outputs, targets)
    with pytest.raises(ValueError, match="2 images but targets of 1"):
        make_criterion()(outputs, targets[:1])
    with pytest.raises(TypeError, match=r"targets\[0\].*float32"):
        pack_targets([dict(targets[0], masks=targets[0]["masks"].float())])
    with pytest.raises(ValueError, match=r"targets\[1\].*one mask"):
        pack_targets([targets[0], dict(targets[1], masks=targets[1]["masks"][:1])])
    with pytest.raises(ValueError, match="boxes"):
        make_criterion(losses=["labels", "boxes"])
    with pytest.raises(ValueError, match="oversample_ratio=0.5"):
        make_criterion(oversample=0.5)
    with pytest.raises(ValueError, match="all three"):
        HungarianMatcher(0, 0, 0)


def test_number_of_masks_is_averaged_over_processes(tmp_path, monkeypatch):
    outputs, targets, criterion = make_outputs(0), make_targets(1), make_criterion()
    nothing = make_targets(1, counts=(0, 0))
    monkeypatch.setattr(torch, "rand", draw)
    want = criterion(outputs, targets)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        alone = criterion(outputs, targets)
        assert all(torch.equal(alone[name], want[name]) for name in want)
        reduce = dist.all_reduce

        def with_a_second_process(tensor):
            """As if another process had 11 objects."""
            reduce(tensor)
            tensor += 11

        monkeypatch.setattr(dist, "all_reduce", with_a_second_process)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        both = criterion(outputs, targets)
        close(both["loss_mask_0"], want["loss_mask_0"] * 5 / 8)
        close(both["loss_dice"], want["loss_dice"] * 5 / 8)
        assert torch.equal(both["loss_ce"], want["loss_ce"])
        monkeypatch.undo()
        assert float(criterion(outputs, nothing)["loss_mask"].detach()) == 0
    finally:
        dist.destroy_process_group()


def test_state_has_the_published_buffer():
    state = make_criterion().state_dict()
    assert list(state) == ["empty_weight"]
    close(state["empty_weight"], torch.tensor([1, 1, 1, 1, 0.1]))
