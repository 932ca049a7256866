"""MaskJEPA as a detectron2 model: gradients, targets, inputs, randomness."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detectron2.modeling import build_model  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from tiny import pictures, steps, tiny_config, tiny_model  # noqa: E402

from jepa_plugins.core.deformable_attention import MSDeformAttn  # noqa: E402
from jepa_plugins.core.masking import expand_noise  # noqa: E402
from jepa_plugins.d2.hooks import TargetHook  # noqa: E402
from jepa_plugins.d2.mask_jepa import IMAGENET_STD, decoded_levels, noise_scale  # noqa: E402
from jepa_plugins.d2.solver import build_optimizer  # noqa: E402

METHOD = "MODEL.MASK_JEPA."
TRAINED = {METHOD + "FREEZE_BACKBONE": False}
SPATIAL = {METHOD + "READOUT": "spatial_queries"}
# two layers read the maps of strides 32 and 16 only
ROUND_ROBIN = {METHOD + "LEVELS": "round_robin", METHOD + "MASK.PATCH": 4}
SQUARES = ((64, 64), (64, 64))
WEIGHTS = {"recon": METHOD + "LOSS.RECON_WEIGHT", "denoise": METHOD + "LOSS.DENOISE_WEIGHT"}


def batches(count: int, sizes=SQUARES) -> list[list[dict]]:
    """Consecutive batches of a stream, as our loader numbers them."""
    out = []
    for i in range(count):
        batch = pictures(*sizes, seed=i)
        for place, item in enumerate(batch):
            item["sample_index"] = i * len(sizes) + place
        out.append(batch)
    return out


def state_of(model: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith(prefix)}


def assert_equal_states(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- gradients


@pytest.mark.parametrize(
    ("changes", "untrained"),
    [
        ({}, {"backbone"}),
        (SPATIAL, {"backbone"}),
        (TRAINED, set()),
        ({**TRAINED, **SPATIAL}, set()),
        ({METHOD + "SELF_ATTN.M": 0}, {"backbone"}),
        ({WEIGHTS["denoise"]: 0.0}, {"backbone", "adapter_1", "layer_1", "mask_features"}),
        ({**TRAINED, WEIGHTS["denoise"]: 0.0}, {"adapter_1", "layer_1", "mask_features"}),
        ({WEIGHTS["recon"]: 0.0}, {"backbone", "predictor"}),
        ({METHOD + "DENOISE.TARGET": "image"}, {"backbone"}),
        # projections of the levels that are not read must not wait for a gradient
        ({"MODEL.MASK_FORMER.HIDDEN_DIM": 16}, {"backbone", "input_proj.0", "input_proj.1"}),
        ({"MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": True}, {"backbone", "input_proj.0", "input_proj.1"}),
        ({METHOD + "RECON_STRIDE": 16}, {"backbone"}),
        (ROUND_ROBIN, {"backbone"}),
        ({**ROUND_ROBIN, "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": True}, {"backbone", "input_proj.2"}),
        ({METHOD + "READOUT": "query_mix"}, {"backbone"}),
        ({**TRAINED, METHOD + "READOUT": "query_mix"}, set()),
        ({METHOD + "READOUT_NORM": False}, {"backbone", "decoder_norm"}),
        ({METHOD + "SELF_ATTN.PLACEMENT": "pre"}, {"backbone"}),
        ({METHOD + "SELF_ATTN.PLACEMENT": "image"}, {"backbone"}),
        ({METHOD + "POS_ON_VALUE": True}, {"backbone"}),
        ({METHOD + "DENOISE.FEATURE": "stride4"}, {"backbone", "mask_features"}),
        ({METHOD + "MASK.SAMPLING": "bernoulli"}, {"backbone"}),
        ({METHOD + "LOSS.REDUCTION": "norm"}, {"backbone"}),
    ],
)
def test_every_trainable_parameter_gets_a_gradient_and_no_other(changes, untrained) -> None:
    model = tiny_model(changes).train()
    for module in model.modules():
        # What starts at zero stops the gradient of whatever stands before it.
        if isinstance(module, MSDeformAttn):
            nn.init.normal_(module.sampling_offsets.weight, std=0.1)
            nn.init.normal_(module.attention_weights.weight, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    large = METHOD + "RECON_STRIDE" in changes or METHOD + "LEVELS" in changes
    sizes = ((128, 128), (128, 128)) if large else SQUARES
    losses = model(pictures(*sizes))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert math.isfinite(total := float(parameter.grad.abs().sum())) and total > 0, name
        else:
            assert parameter.grad is None, name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tables = set() if changes.get(METHOD + "READOUT") == "query_mix" else {"query_feat", "query_embed"}
    never = {
        "class_embed",
        "mask_embed",
        *tables,
        "target_pixel_decoder",
        "target_backbone",
    }
    for name, _ in model.named_parameters():
        parts = name.split(".")
        left_out = bool(set(parts) & (never | untrained))
        if parts[:3] == ["sem_seg_head", "predictor", "input_proj"]:
            left_out = ".".join(parts[2:4]) in untrained or "predictor" in untrained
        assert (name in trained) != left_out, name


def test_losses_fall_when_trained() -> None:
    model = tiny_model(TRAINED)
    optimizer = build_optimizer(tiny_config("mask_jepa", TRAINED), model)
    losses = steps(model, optimizer, batches(1) * 12)
    assert losses[-1] < 0.8 * losses[0]


# --- targets


@pytest.mark.parametrize("changes", [{}, TRAINED])
def test_targets_move_only_by_ema_and_after_the_step(changes) -> None:
    model = tiny_model(changes)
    pairs = [("target_pixel_decoder.", "sem_seg_head.pixel_decoder.")]
    if changes:
        pairs.append(("target_backbone.", "backbone."))
    online = [dict(model.state_dict())[theirs + name[len(ours) :]] for ours, theirs in pairs
              for name in model.state_dict() if name.startswith(ours)]  # fmt: skip
    target = [
        value for ours, _ in pairs for name, value in model.state_dict().items() if name.startswith(ours)
    ]
    assert all(torch.equal(a, b) for a, b in zip(target, online, strict=True))  # they start equal
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(target, online, strict=True))
    optimizer = build_optimizer(tiny_config("mask_jepa", changes), model)
    before = [value.clone() for value in target]
    steps(model, optimizer, batches(1))
    assert all(torch.equal(a, b) for a, b in zip(target, before, strict=True))
    assert int(model.step) == 0 and bool(model.ema_pending)
    assert model.update_target() == 0.996
    assert int(model.step) == 1 and not bool(model.ema_pending)
    moved = 0
    for now, old, new in zip(target, before, online, strict=True):
        if now.is_floating_point() and not torch.equal(now, new):
            assert torch.allclose(now, 0.996 * old + 0.004 * new, atol=1e-7)
            moved += int(not torch.equal(now, old))
    assert moved > 20
    assert model.update_target() == pytest.approx(0.996 + 0.004 / model.total_steps)


def test_a_target_is_whole_in_itself() -> None:
    """The pixel decoder keeps its FPN in plain lists: a copy's must hold the copy's modules."""
    target = tiny_model().target_pixel_decoder
    assert target.lateral_convs[0] is target.adapter_1 and target.output_convs[0] is target.layer_1


def run(model, optimizer, data, *, hook: bool) -> dict:
    """Train and give the final state, with the last update done."""
    if hook:
        by_hook = TargetHook(model)
        by_hook.trainer = SimpleNamespace(_trainer=SimpleNamespace(stepped=True))
        by_hook.before_train()
        model.train()
        with EventStorage():
            for batch in data:
                optimizer.zero_grad()
                sum(model(batch).values()).backward()
                optimizer.step()
                by_hook.after_step()
        by_hook.after_train()
        assert not bool(model.ema_pending)
    else:
        steps(model, optimizer, data)
        assert bool(model.ema_pending)
        model.update_target()
    return state_of(model)


@pytest.mark.parametrize("changes", [{}, TRAINED])
def test_hook_and_forward_give_the_same_weights(changes) -> None:
    cfg, data, states = tiny_config("mask_jepa", changes), batches(4), []
    for hook in (False, True):
        model = tiny_model(changes)
        states.append(run(model, build_optimizer(cfg, model), data, hook=hook))
    assert_equal_states(*states)
    assert int(states[0]["step"]) == 4


@pytest.mark.parametrize("hook_after", [False, True])
def test_a_pending_update_survives_a_checkpoint(hook_after) -> None:
    cfg, data = tiny_config(), batches(4)
    model = tiny_model()
    whole = run(model, build_optimizer(cfg, model), data, hook=False)
    first = tiny_model()
    optimizer = build_optimizer(cfg, first)
    steps(first, optimizer, data[:2])
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    assert bool(saved[0]["ema_pending"]) and int(saved[0]["step"]) == 1
    second = tiny_model(seed=1)
    second.load_state_dict(saved[0])
    resumed = build_optimizer(cfg, second)
    resumed.load_state_dict(saved[1])
    assert_equal_states(run(second, resumed, data[2:], hook=hook_after), whole)


def test_an_evaluation_moves_nothing() -> None:
    model = tiny_model(TRAINED)
    steps(model, build_optimizer(tiny_config("mask_jepa", TRAINED), model), batches(1))
    before = state_of(model)
    model.eval()
    with torch.no_grad():
        model(pictures(*SQUARES))
    assert_equal_states(state_of(model), before)


# The method freezes a backbone that would train by itself.
@pytest.mark.parametrize(("changes", "trains"), [({"MODEL.TIMM.FREEZE": False}, False), (TRAINED, True)])
def test_modes(changes, trains) -> None:
    model = tiny_model(changes).train()
    assert model.sem_seg_head.pixel_decoder.training and model.jepa.training
    assert any(module.training for module in model.backbone.modules()) == trains
    assert any(parameter.requires_grad for parameter in model.backbone.parameters()) == trains
    for target in (model.target_pixel_decoder, model.target_backbone):
        assert target is None or not any(module.training for module in target.modules())
    assert not any(module.training for module in model.eval().modules())


def test_checkpoint_names() -> None:
    frozen, trained = tiny_model().state_dict(), tiny_model(TRAINED).state_dict()
    tops = {name.split(".")[0] for name in frozen}
    assert tops == {"backbone", "sem_seg_head", "jepa", "target_pixel_decoder", "step", "ema_pending"}
    assert {name.split(".")[0] for name in trained} == tops | {"target_backbone"}
    assert frozen["step"].dtype == torch.int64 and frozen["ema_pending"].dtype == torch.bool
    former = tiny_model(name="semantic").state_dict()
    assert set(former) - set(frozen) == {"criterion.empty_weight"}
    assert all(former[name].shape == frozen[name].shape for name in set(former) & set(frozen))


# --- inputs and noise


def recorded(model, inputs) -> list[torch.Tensor]:
    """What the backbone is shown: noisy, then clean."""
    seen = []
    handle = model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model.train()
    model(inputs)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("std", "order"),
    [
        ((128.0,) * 3, "RGB"),
        (IMAGENET_STD, "RGB"),
        ((1.0, 1.0, 1.0), "BGR"),
        (IMAGENET_STD[::-1], "BGR"),
    ],
)
def test_noise_is_measured_in_imagenets_deviations(std, order) -> None:
    changes = {"MODEL.PIXEL_STD": std, "MODEL.PIXEL_MEAN": (120.0, 110.0, 100.0), "INPUT.FORMAT": order}
    inputs = pictures((256, 256), (256, 256))
    noisy, clean = recorded(tiny_model(changes), inputs)
    pixels = torch.stack([item["image"] for item in inputs]).float()
    mean, scale = torch.tensor([120.0, 110.0, 100.0]), torch.tensor(std)
    assert torch.allclose(clean, (pixels - mean[:, None, None]) / scale[:, None, None], atol=1e-5)
    noise = noisy - clean
    small = nn.functional.avg_pool2d(noise, 4)
    assert torch.allclose(noise, expand_noise(small), atol=1e-3 * float(noise.abs().max()))
    grey_levels = (small.permute(1, 0, 2, 3).flatten(1).std(1) * scale).tolist()
    unit = IMAGENET_STD if order == "RGB" else IMAGENET_STD[::-1]
    assert grey_levels == pytest.approx([0.4 * u for u in unit], rel=0.05)  # about 23 of 255


def test_noise_factors() -> None:
    assert noise_scale(IMAGENET_STD, "RGB") == [1.0, 1.0, 1.0]
    assert noise_scale((1.0, 1.0, 1.0), "BGR") == [57.375, 57.12, 58.395]
    assert noise_scale((40.0,), "L") == [1.0]


def test_without_noise_both_branches_see_the_same() -> None:
    noisy, clean = recorded(
        tiny_model({METHOD + "NOISE.SIGMA": 0.0, METHOD + "DENOISE.TARGET": "image"}), pictures(*SQUARES)
    )
    assert torch.equal(noisy, clean)


@pytest.mark.parametrize("changes", [{}, SPATIAL, TRAINED])
@pytest.mark.parametrize("sizes", [((64, 96), (64, 96)), ((96, 64), (70, 130))])
def test_any_size_and_mixed_sizes(changes, sizes) -> None:
    model = tiny_model(changes).train()
    losses = model(pictures(*sizes))
    assert set(losses) == {"loss_recon", "loss_denoise"}
    assert all(bool(loss.isfinite()) and float(loss.detach()) > 0 for loss in losses.values())


def test_padding_holds_no_noise() -> None:
    noisy, clean = recorded(tiny_model(), pictures((96, 64), (70, 130)))
    outside = torch.ones(2, 1, *clean.shape[-2:], dtype=torch.bool)
    for i, (height, width) in enumerate([(96, 64), (70, 130)]):
        outside[i, :, :height, :width] = False
    assert not bool(noisy[outside.expand_as(noisy)].any()) and not bool(clean[outside.expand_as(clean)].any())
    assert bool((noisy != clean)[~outside.expand_as(clean)].all())


def test_greyscale_images() -> None:
    changes = {"MODEL.PIXEL_MEAN": (120.0,), "MODEL.PIXEL_STD": (60.0,), "INPUT.FORMAT": "L"}
    model = tiny_model(changes).train()
    noisy, clean = recorded(model, pictures((256, 256), channels=1))
    assert clean.shape == (1, 1, 256, 256)
    assert float((noisy - clean).std()) == pytest.approx(0.4, rel=0.05)
    assert model.jepa.denoise.weight.shape[0] == 1


@pytest.mark.parametrize("channels", [1, 4])
def test_another_number_of_channels_is_one_sentence(channels) -> None:
    model = tiny_model().train()
    with pytest.raises(
        ValueError, match=f"has {channels} channels, MODEL.PIXEL_MEAN 3; make MODEL.PIXEL_MEAN"
    ):
        model(pictures((64, 64), channels=channels))


def test_images_that_are_too_small_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="make the mask patch smaller or the images larger"):
        tiny_model({METHOD + "MASK.PATCH": 8}).train()(pictures((64, 64)))


# --- one image, its draws and its batch


def maps_of(model, inputs) -> dict:
    with torch.no_grad():
        (maps,) = model.eval()(inputs)
    return maps


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    model, items = tiny_model(), pictures(*SQUARES, (64, 64))
    whole = maps_of(model, items)
    alone = maps_of(model, items[1:2])
    assert torch.allclose(whole["target"][1:2], alone["target"], atol=1e-5)
    assert torch.allclose(whole["errors"][1:2], alone["errors"], rtol=1e-4, atol=1e-4)
    other = pictures(*SQUARES, (64, 64))
    other[2]["image"] = 255 - other[2]["image"]
    changed = maps_of(model, other)
    assert torch.equal(whole["target"][:2], changed["target"][:2])
    assert torch.equal(whole["errors"][:2], changed["errors"][:2])
    assert not torch.equal(whole["target"][2], changed["target"][2])


def test_a_batch_is_the_mean_of_its_parts() -> None:
    model, items = tiny_model().train(), pictures(*SQUARES, *SQUARES)
    whole = model(items)
    parts = [model(items[:2]), model(items[2:])]
    for name, loss in whole.items():
        assert float(loss.detach()) == pytest.approx(
            sum(float(p[name].detach()) for p in parts) / 2, rel=1e-5
        )


def test_draws_belong_to_the_sample_and_the_seed() -> None:
    model, items = tiny_model().train(), pictures((64, 64))
    total = lambda: float(sum(model(items).values()).detach())  # noqa: E731
    first = total()
    torch.manual_seed(99)  # global generators play no part
    assert total() == first
    items[0]["sample_index"] += 1
    assert total() != first
    items[0]["sample_index"] -= 1
    model.seed += 1
    assert total() != first


def test_a_loader_without_numbers_gets_them_from_the_step() -> None:
    model = tiny_model()
    plain = [{"image": item["image"]} for item in pictures(*SQUARES)]
    assert model._sample_index(plain).tolist() == [0, 1]
    model.step += 7
    assert model._sample_index(plain).tolist() == [14, 15]
    assert model._sample_index(pictures(*SQUARES)).tolist() == [0, 1]


def test_measures_leave_out_padding() -> None:
    """Images of 40 x 60 pixels are padded to 64 x 64: 5 x 8 of the 8 x 8 cells hold a picture."""
    model = tiny_model()
    maps = maps_of(model, pictures((40, 60), (40, 60)))
    assert maps["target"].shape == (2, 40, 32)
    assert maps_of(model, pictures(*SQUARES))["target"].shape == (2, 64, 32)


# --- what is read and what is given


def test_levels_alone_equal_those_of_the_whole_pixel_decoder() -> None:
    class Foreign(nn.Module):
        """A published pixel decoder: without our shortcut, and with more items than three."""

        def __init__(self, inner) -> None:
            super().__init__()
            self.inner = inner

        def forward_features(self, features):
            return (*self.inner.forward_features(features), None, None)

    model = tiny_model().eval()
    decoder = model.sem_seg_head.pixel_decoder
    with torch.no_grad():
        features = model.backbone(torch.randn(2, 3, 64, 64))
        short, whole = decoded_levels(decoder, features), decoded_levels(Foreign(decoder), features)
    assert [level.shape[-1] for level in whole] == [2, 4, 8]
    assert all(torch.equal(a, b) for a, b in zip(short, whole, strict=True))
    before = model.train()(pictures(*SQUARES))
    model.sem_seg_head.pixel_decoder = Foreign(decoder)
    model.target_pixel_decoder = Foreign(model.target_pixel_decoder)
    after = model(pictures(*SQUARES))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_features_for_probes() -> None:
    model = tiny_model().eval()
    maps = model.features(pictures((64, 96), (64, 96)))
    assert maps["stride4"].shape == (2, 32, 16, 24) and maps["stride8"].shape == (2, 32, 8, 12)
    assert not maps["stride8"].requires_grad


def test_metrics_are_logged_beside_the_losses() -> None:
    model = tiny_model({METHOD + "RANK_PERIOD": 2}).train()
    with EventStorage() as storage:
        losses = model(pictures(*SQUARES))
        first = {name: value for name, (value, _) in storage.latest().items()}
    ranks = {f"rankme_{a}_{b}" for a in ("pooled", "dense") for b in ("raw", "centred")}
    assert set(first) == {"target_variance", "explained_variance", "denoise_r2", "ema_momentum"} | ranks
    assert set(losses) == {"loss_recon", "loss_denoise"}
    assert first["ema_momentum"] == 0.996
    assert 1 <= first["rankme_dense_centred"] <= 32 and all(math.isfinite(v) for v in first.values())
    recon = float(losses["loss_recon"].detach())
    assert first["explained_variance"] == pytest.approx(1 - recon / first["target_variance"], rel=1e-4)
    model.update_target()
    with EventStorage() as storage:
        model(pictures(*SQUARES))
        assert not ranks & set(storage.latest())


def test_reading_without_a_training_loop() -> None:
    assert tiny_model().train()(pictures(*SQUARES)).keys() == {"loss_recon", "loss_denoise"}


def test_mixed_precision_gives_finite_losses_close_to_float32() -> None:
    model = tiny_model().train()
    exact = model(pictures(*SQUARES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(pictures(*SQUARES))
    for name, loss in rough.items():
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(float(exact[name].detach()), rel=0.05)


def test_a_backbone_that_should_train_but_is_frozen_is_refused():
    cfg = tiny_config(changes={"MODEL.MASK_JEPA.FREEZE_BACKBONE": False})
    cfg.MODEL.TIMM.FREEZE = True
    with pytest.raises(ValueError, match="FREEZE_BACKBONE is False, but the backbone is frozen"):
        build_model(cfg)


def test_batches_of_one_step_draw_differently_under_a_foreign_loop() -> None:
    """Without sample numbers, two forwards between optimiser steps must not repeat noise and tiles."""
    model = tiny_model().train()
    model.ema_by_hook = True  # as our optimiser sets it, which then tells the model of real steps
    batch = [{"image": item["image"]} for item in pictures(*SQUARES)]
    first = model._sample_index(batch)
    model(batch)
    second = model._sample_index(batch)
    assert not set(first.tolist()) & set(second.tolist())
    model.update_target()
    third = model._sample_index(batch)
    assert third.tolist() == [2, 3] and first.tolist() == [0, 1]
