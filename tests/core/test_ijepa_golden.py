"""Encoder, predictor, loss, masks and schedules against the official I-JEPA code (golden files)."""

import json

import numpy as np
import pytest
import timm
import torch
from golden_tools import GOLDEN, assert_close, fill_module, load, tensor

from jepa_plugins.core.dmt_jepa import IJEPA, DMTJEPAModel
from jepa_plugins.core.ema import momentum_at
from jepa_plugins.core.multiblock import Masks, MultiBlock, draw_masks
from jepa_plugins.core.schedules import rising, warmup_cosine
from jepa_plugins.core.vit import SIZES, Predictor, VisionTransformer, sincos_positions


def build(size: str, pixels: int, predictor: dict) -> DMTJEPAModel:
    width, depth, heads = SIZES[size]
    encoder = VisionTransformer(pixels, 16, width=width, depth=depth, heads=heads)
    return DMTJEPAModel(encoder, Predictor(encoder.grid, width, heads=heads, **predictor), IJEPA)


@pytest.fixture(scope="module")
def case():
    meta, arrays = load("ijepa_model")
    model = build("tiny", 96, {"width": 96, "depth": 3})
    for name in ("encoder", "target_encoder", "predictor"):
        fill_module(getattr(model, name), meta, f"{name}.")
    masks = Masks(
        torch.from_numpy(arrays["mask_context_0"]),
        torch.stack([torch.from_numpy(arrays[f"mask_target_{i}"]) for i in range(4)], dim=1),
    )
    images = tensor(600, [2, 3, 96, 96], -2, 2)
    return meta, arrays, model, masks, images


def test_positions(case) -> None:
    _, arrays, model, _, _ = case
    assert np.abs(model.encoder.pos_embed[0].numpy() - arrays["pos_embed"]).max() < 1e-6
    assert np.abs(model.predictor.predictor_pos_embed[0].numpy() - arrays["predictor_pos_embed"]).max() < 1e-6


def test_encoder_predictor_targets(case) -> None:
    meta, arrays, model, masks, images = case
    noise = meta["noise"]
    assert_close(model.target_encoder(images), arrays["target_encoder_full"], noise["target_encoder_full"])
    assert_close(model.encoder(images, masks.context), arrays["encoder_masked"], noise["encoder_masked"])
    assert_close(
        model.predict(images, masks)[..., ::2],
        arrays["predictions_every_2nd_feature"],
        noise["predictions_every_2nd_feature"],
    )
    every, _ = model.targets(images)
    wanted = masks.targets.transpose(0, 1).flatten(0, 1)
    aim = every.repeat(4, 1, 1).gather(1, wanted[..., None].expand(-1, -1, 192))
    assert_close(aim[..., ::4], arrays["targets_every_4th_feature"], noise["targets_every_4th_feature"])


def test_loss_and_gradients(case) -> None:
    meta, arrays, model, masks, images = case
    model.zero_grad()
    loss = model(images, masks).losses["loss"]
    assert_close(loss.detach()[None], arrays["loss"], meta["noise"]["loss"])
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, want in meta["gradient_norms"].items():
        assert float(parameters[name].grad.norm()) == pytest.approx(want, rel=1e-4), name


def test_state_dict_is_the_published_one() -> None:
    listed = json.loads((GOLDEN / "state_dicts" / "ijepa_vit_base.json").read_text())["checkpoint"]
    with torch.device("meta"):
        model = build("base", 224, {"width": 384, "depth": 6})
    for part in ("encoder", "predictor", "target_encoder"):
        ours = {f"module.{k}": list(v.shape) for k, v in getattr(model, part).state_dict().items()}
        assert ours == listed[part]


def test_equal_to_timm() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", class_token=False, global_pool="", num_classes=0, img_size=64, depth=3
    ).eval()
    ours = VisionTransformer(64, 16, width=192, depth=3, heads=3).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_block_sizes_are_exactly_the_published_ones() -> None:
    meta, arrays = load("ijepa_masks")
    settings, grid = MultiBlock(), tuple(meta["grid"])
    for call, want in enumerate(arrays["block_sizes"].tolist()):
        draws = torch.rand(2, generator=torch.Generator().manual_seed(call)).tolist()
        got = [
            *settings.block_size(draws[0], grid, settings.target_scale, settings.target_aspect),
            *settings.block_size(draws[1], grid, settings.context_scale, (1.0, 1.0)),
        ]
        assert got == want


def test_distribution_of_the_masks_is_the_published_one() -> None:
    meta, arrays = load("ijepa_masks")
    want = meta["one_image_per_call"]
    context, target = torch.zeros(196), torch.zeros(196)
    counts, calls = [], 500
    for call in range(calls):
        masks = draw_masks(MultiBlock(), (14, 14), 3, torch.tensor([call]), call)
        counts.append(masks.context.shape[1])
        context[masks.context[0]] += 1 / calls
        target += torch.bincount(masks.targets.flatten(), minlength=196) / (4 * calls)
    error = want["context_patches"]["std"] * (2 / calls) ** 0.5  # of the difference of two means of 500
    assert abs(np.mean(counts) - want["context_patches"]["mean"]) < 4 * error
    assert abs(np.std(counts) / want["context_patches"]["std"] - 1) < 0.2
    for got, name, n in ((context, "context", calls), (target, "target", 4 * calls)):
        frequency = torch.from_numpy(arrays[f"{name}_patch_frequency"]).flatten()
        # places within an image's four targets share a block size, so the samples are not quite independent
        bound = 5 * (2 * 0.25 / n) ** 0.5
        assert float((got - frequency).abs().max()) < bound
        assert torch.equal(got == 0, frequency == 0)  # the last row and column are never used


def test_distribution_of_a_batch_is_the_published_one() -> None:
    want = load("ijepa_masks")[0]["batches"]["context_patches"]
    counts = [
        draw_masks(MultiBlock(), (14, 14), 5, torch.arange(16 * call, 16 * call + 16), call).context.shape[1]
        for call in range(100)
    ]
    assert abs(np.mean(counts) - want["mean"]) < 4 * want["std"] * (2 / 100) ** 0.5


def test_schedules() -> None:
    meta, arrays = load("ijepa_schedules")
    total, per_epoch = meta["epochs"] * meta["iterations_per_epoch"], meta["iterations_per_epoch"]
    for iteration, lr, decay, momentum in arrays["rows64"].tolist():
        step = int(iteration) + 1
        got = warmup_cosine(
            step, total, meta["warmup_epochs"] * per_epoch, meta["start_lr"], meta["lr"], meta["final_lr"]
        )
        assert got == pytest.approx(lr, rel=1e-9)
        got = rising(step, total, meta["weight_decay"], meta["final_weight_decay"], "cosine")
        assert got == pytest.approx(decay, rel=1e-9)
        assert momentum_at(int(iteration), total, *meta["ema"]) == pytest.approx(momentum, rel=1e-12)


def test_odd_widths_have_no_positions() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_positions(6, (2, 2))
