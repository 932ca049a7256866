"""DMTJEPA as an mmengine model: parts, names, masks, weights of uneven batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.registry import MODELS  # noqa: E402

from jepa_plugins.core.dmt_jepa import IJEPA, DMTJEPAModel, DMTJEPASettings  # noqa: E402
from jepa_plugins.core.multiblock import Masks, MultiBlock  # noqa: E402
from jepa_plugins.core.step import channel_variance  # noqa: E402
from jepa_plugins.mm.data import BatchPlace  # noqa: E402
from jepa_plugins.mm.model import DMTJEPA  # noqa: E402

ARCH = {"width": 24, "depth": 1, "heads": 2}
SMALL: dict[str, Any] = {
    "arch": ARCH,
    "img_size": 32,
    "patch_size": 4,
    "predictor": {"width": 16, "depth": 1},
}
DMT: dict[str, Any] = {**SMALL, "msn": {}, "lat": {}}


def build(**changes: Any) -> DMTJEPA:
    torch.manual_seed(0)
    model = MODELS.build({"type": "DMTJEPA", **DMT, **changes})
    model.ema_by_hook = True
    return model


def place(first: int = 0, count: int = 4, start: int = 0, total: int = 4) -> BatchPlace:
    return BatchPlace(7, tuple(range(first, first + count)), start, total)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_names_are_those_that_every_reader_expects() -> None:
    names = {name.split(".")[0] for name in build().state_dict()}
    parts = {"encoder", "target_encoder", "predictor", "context_head", "target_head"}
    assert names == parts | {"step", "ema_pending"}
    encoder = set(build().encoder.state_dict())
    assert {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "norm.bias"} <= encoder


@pytest.mark.parametrize(
    ("arch", "predictor"),
    [("tiny", (192, 6)), ("small", (384, 6)), ("base", (384, 6)), ("large", (384, 12)), ("huge", (384, 12))],
)
def test_named_sizes_bring_their_predictors(arch: str, predictor: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = DMTJEPA(arch, patch_size=14 if arch == "huge" else 16)
    blocks = model.predictor.predictor_blocks
    assert (model.predictor.mask_token.shape[-1], len(blocks)) == predictor
    assert blocks[0].attn.num_heads == model.encoder.heads


def test_the_defaults_are_the_papers() -> None:
    model = DMTJEPA(ARCH, 32, 4, {"width": 16, "depth": 1})
    assert model.settings == DMTJEPASettings() and model.mask == MultiBlock()


def test_without_neighbours_and_heads_it_is_ijepa() -> None:
    model = build(msn=None, lat=None, loss="smooth_l1")
    assert model.settings == IJEPA and model.context_head is None
    where = place()
    got = model(images(), where)
    masks = model.masks_of(where, (8, 8))
    want = DMTJEPAModel.forward(model, images(), masks)
    assert torch.equal(got["loss"], want.losses["loss"])


def test_metrics_are_no_losses() -> None:
    model = build(rank_period=2)
    out = model(images(), place())
    ranks = {f"rankme_{a}_{b}" for a in ("pooled", "dense") for b in ("raw", "centred")}
    assert {"target_variance", "explained_variance", "neighbours_by_position"} | ranks <= set(out)
    assert [name for name in out if "loss" in name] == ["loss"]  # mmengine sums keys with "loss"
    loss, logged = model.parse_losses(out)
    assert loss is out["loss"] and torch.equal(logged["loss"], loss.detach())
    model.step += 1
    assert not ranks & set(model(images(), place()))


def test_masks_follow_the_place_alone() -> None:
    model = build()
    first, again = model.masks_of(place(8), (8, 8)), build().masks_of(place(8), (8, 8))
    assert torch.equal(first.targets, again.targets) and torch.equal(first.context, again.context)
    assert not torch.equal(first.targets, model.masks_of(place(12), (8, 8)).targets)


def together(parts: list[Masks]) -> Masks:
    return Masks(torch.cat([p.context for p in parts]), torch.cat([p.targets for p in parts]))


def test_global_scope_cuts_for_the_whole_batch() -> None:
    model = build(mask={"scope": "global"})
    whole = model.masks_of(place(0, 8, 0, 8), (8, 8))
    parts = together([model.masks_of(place(0, 3, 0, 8), (8, 8)), model.masks_of(place(3, 5, 0, 8), (8, 8))])
    assert torch.equal(parts.context, whole.context) and torch.equal(parts.targets, whole.targets)
    own = build()  # each process by itself
    sizes = {own.masks_of(place(4 * i, 4, 0, 40), (8, 8)).targets.shape[2] for i in range(10)}
    assert len(sizes) > 1


def test_uneven_parts_weigh_by_their_images() -> None:
    model = build(mask={"scope": "global"})
    whole = model(images(8), place(0, 8, 0, 8))["loss"]
    model.accumulation = 2
    three = model(images(8)[:3], place(0, 3, 0, 8))["loss"]
    five = model(images(8)[3:], place(3, 5, 0, 8))["loss"]
    torch.testing.assert_close((three + five) / 2, whole)


def test_the_logged_variance_is_that_of_all_images() -> None:
    """However they are divided: the variance inside each part is smaller."""
    model = build(mask={"scope": "global"})
    model.accumulation = 2
    parts = [model(images(8)[:3], place(0, 3, 0, 8)), model(images(8)[3:], place(3, 5, 0, 8))]
    logged = [model.parse_losses(part)[1] for part in parts]
    want = channel_variance(model.targets(images(8))[0].flatten(0, 1))
    torch.testing.assert_close(logged[1]["target_variance"], want, rtol=1e-4, atol=1e-6)
    inside = [float(part["target_variance"]) for part in parts]
    assert logged[0]["target_variance"] == pytest.approx(inside[0], rel=1e-4)
    assert (3 * inside[0] + 5 * inside[1]) / 8 < 0.99 * float(want)
    model.update_target()
    again = model.parse_losses(model(images(8)[:3], place(8, 3, 8, 8)))[1]
    assert again["target_variance"] == pytest.approx(inside[0], rel=0.1)  # a step of its own


def test_preprocessor_normalises() -> None:
    model = build()
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    out = model.data_preprocessor({"inputs": raw, "place": place(), "more": 1})
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(out["inputs"], (raw - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert set(out) == {"inputs", "place"}


def test_tensor_mode_gives_target_features() -> None:
    model = build().eval()
    assert torch.equal(model(images(), mode="tensor"), model.target_encoder(images()))
    with pytest.raises(ValueError, match="has the modes loss"):
        model(images(), mode="predict")


def test_training_without_the_hook_says_so() -> None:
    model = build()
    model.ema_by_hook = False
    with pytest.raises(ValueError, match="add dict\\(type='TargetHook'\\) to custom_hooks"):
        model.train()(images(), place())
    assert "loss" in model.eval()(images(), place())


def test_every_trained_parameter_gets_a_gradient() -> None:
    """Under DistributedDataParallel none may be left out."""
    settings = [{}, {"lat": {"context_attn": "self"}}, {"lat": {"context": "token"}}]
    for changes in [*settings, {"msn": None}, {"msn": None, "lat": None}]:
        model = build(**changes)
        model(images(), place())["loss"].backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
        assert not any(p.requires_grad for p in model.target_encoder.parameters())


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        model = build(checkpointing=checkpointing).train()
        model(images(), place())["loss"].backward()
        grads.append(model.encoder.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arch": "giant"}, "model.arch is one of tiny, small"),
        ({"arch": {"width": 24, "depth": 1}}, "needs width, depth and heads"),
        ({"arch": {**ARCH, "heads": 5}}, "5 heads do not divide the width 24"),
        ({"predictor": {"width": 16}}, "model.predictor needs width and depth"),
        ({"predictor": {"width": 16, "depth": 1, "head": 2}}, "model.predictor has no head; it knows"),
        ({"predictor": {"width": 16, "depth": 1, "heads": 3}}, "3 heads do not divide the width 16"),
        ({"img_size": 30}, "no whole number of 4x4 patches"),
        ({"msn": {"windows": 3}}, "model.msn has no windows; it knows window"),
        ({"msn": {"window": 9}}, "grid of 8x8 patches is smaller than the 9x9 window"),
        ({"msn": {"k": 9}}, "k must lie between 1 and the 8 candidates"),
        ({"msn": {"window": "all", "k": 64}}, "k is 64, but a patch has 63 candidates"),
        ({"lat": None}, "model.msn chooses neighbours that model.lat aggregates"),
        ({"msn": {"k": "four"}}, "model.msn.k is a whole number, got 'four'"),
        ({"msn": {"k": 4.0}}, "model.msn.k is a whole number, got 4.0"),
        ({"msn": {"window": "5x5"}}, "model.msn.window is a whole number or 'all', got '5x5'"),
        ({"msn": {"window": "all", "k": 0}}, "model.msn: k, the number of neighbours, is at least 1, got 0"),
        ({"lat": "learned"}, "model.lat is dict\\(type=, depth=, .*\\), got 'learned'"),
        ({"lat": {"type": "linear"}}, "model.lat.type is one of learned, parameter_free"),
        ({"lat": {"target_attn": "foo"}}, "model.lat.target_attn is one of cross, self, average, max, none"),
        (
            {"lat": {"context_attn": "none"}},
            "model.lat.context_attn is one of cross, self, average, max, got",
        ),
        ({"lat": {"residual": "no"}}, "model.lat: residual is True, False or None"),
        (
            {"lat": {"target_attn": "none"}},
            "model.lat: neighbours are chosen for targets that aggregate nothing",
        ),
        ({"mask": {"target_scale": 0.15}}, "model.mask.target_scale is two numbers"),
        ({"mask": {"targets": 0}}, "model.mask: at least one target block"),
        ({"mask": {"target_aspect": (0.01, 0.02)}}, "have no row or column on 8x8 patches"),
        ({"ema": 0.99}, "model.ema is two momenta from 0 to 1"),
        ({"ema": (1.5, 1.0)}, "model.ema is two momenta from 0 to 1"),
        ({"drop_path": 1.5}, "drop_path is a rate from 0, below 1, got 1.5"),
        ({"patch_size": 0}, "patch_size and depth are at least 1, got 0"),
        ({"rank_period": -1}, "model.rank_period counts steps"),
        ({"in_chans": 1}, "model.in_chans is 1, but model.data_preprocessor.mean has 3"),
        (
            {"data_preprocessor": {"type": "ImagePreprocessor", "mean": (1, 2)}},
            "takes mean and std of as many values",
        ),
        ({"mask": {"scope": "local"}}, "model.mask.scope is one of process, global"),
        ({"mask": {"target": 4}}, "model.mask has no target; it knows"),
        ({"mask": {"min_keep": 64}}, "grid of 8x8 patches is too small"),
        ({"loss": "l1"}, "loss is one of mse, smooth_l1"),
    ],
)
def test_bad_values(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MODELS.build({"type": "DMTJEPA", **DMT, **changes})
