"""The pretext task: noise, tiles, read-outs and losses, against references and by their properties."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from published_like import HEADS, WIDTH, Decoder
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_plugins.core.distributed import mean_count
from jepa_plugins.core.mask_jepa import (
    MaskJEPAHead,
    MaskJEPASettings,
    Queries,
    channel_variance,
    choose_queries,
    draw_noise,
    draw_tile_mask,
    expand_noise,
    normalised_target,
    valid_cells,
)
from jepa_plugins.core.random import sample_keys


def keys(count: int, stream: str = "tiles", seed: int = 0):
    return sample_keys(seed, torch.arange(count), stream)


def make_head(features: int = WIDTH, mask_dim: int = 8, channels: int = 3, **options) -> MaskJEPAHead:
    torch.manual_seed(1)
    head = MaskJEPAHead(
        MaskJEPASettings(**options),
        feature_dim=features,
        mask_dim=mask_dim,
        hidden_dim=WIDTH,
        heads=HEADS,
        feedforward=24,
        image_channels=channels,
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def full(batch: int, height: int, width: int):
    return torch.ones(batch, height, width, dtype=torch.bool)


# --- options


def test_defaults_are_the_papers() -> None:
    settings_ = MaskJEPASettings()
    assert (settings_.noise_sigma, settings_.mask_ratio, settings_.mask_patch) == (0.4, 0.5, 8)
    assert (settings_.recon_stride, settings_.self_attention_blocks) == (8, 2)
    assert (settings_.readout, settings_.denoise_target) == ("spatial_queries", "noise")
    assert (settings_.recon_weight, settings_.denoise_weight) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise_sigma": -0.1}, "sigma must not be negative, got -0.1"),
        ({"mask_ratio": 0.0}, "between 0 and 1, got 0.0"),
        ({"mask_ratio": 1.0}, "between 0 and 1, got 1.0"),
        ({"mask_patch": 0}, "at least one cell, got 0"),
        ({"recon_stride": 4}, "8, 16 or 32, got 4"),
        ({"self_attention_blocks": -1}, "M must not be negative, got -1"),
        ({"readout": "queries"}, "spatial_queries.*got 'queries'"),
        ({"denoise_target": "pixels"}, "noise.*image"),
        ({"recon_weight": -1.0}, "must not be negative"),
        ({"recon_weight": 0.0, "denoise_weight": 0.0}, "nothing to train"),
        ({"noise_sigma": 0.0}, "no sense with sigma 0"),
    ],
)
def test_settings_that_make_no_sense(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        MaskJEPASettings(**options)


def test_settings_that_make_sense_without_noise() -> None:
    assert MaskJEPASettings(noise_sigma=0.0, denoise_target="image").noise_sigma == 0
    assert MaskJEPASettings(noise_sigma=0.0, denoise_weight=0.0).recon_weight == 1
    assert [MaskJEPASettings(recon_stride=stride).level for stride in (32, 16, 8)] == [0, 1, 2]


def test_a_weight_of_zero_makes_no_parameters() -> None:
    names = {name.split(".")[0] for name, _ in make_head().named_parameters()}
    assert names == {"mask_token", "query", "self_attention_blocks", "prediction", "denoise"}
    assert {n.split(".")[0] for n, _ in make_head(recon_weight=0.0).named_parameters()} == {"denoise"}
    without = {n.split(".")[0] for n, _ in make_head(denoise_weight=0.0).named_parameters()}
    assert without == names - {"denoise"}
    assert not list(make_head(self_attention_blocks=0).self_attention_blocks.parameters())


# --- noise


def test_noise_has_its_deviation_at_a_quarter_of_the_resolution() -> None:
    noise = draw_noise(keys(4, "noise"), 3, (512, 512), 0.4)
    assert noise.shape == (4, 3, 128, 128)
    assert float(noise.std()) == pytest.approx(0.4, rel=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.005)
    between = torch.corrcoef(noise.flatten(2).flatten(0, 1).double())
    assert float((between - torch.eye(12)).abs().max()) < 5 / 128


def test_noise_fills_cells_and_never_tiles() -> None:
    noise = torch.arange(2 * 3 * 2 * 3, dtype=torch.float32).view(2, 3, 2, 3)
    wide = expand_noise(noise)
    assert wide.shape == (2, 3, 8, 12)
    rows, columns = torch.arange(8) // 4, torch.arange(12) // 4
    assert torch.equal(wide, noise[:, :, rows][:, :, :, columns])
    assert torch.equal(F.avg_pool2d(wide, 4), noise)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_noise_does_not_depend_on_padding_or_batch_mates(height, width, below, beside) -> None:
    alone = draw_noise(keys(3, "noise")[1:2], 3, (4 * height, 4 * width), 0.4)
    padded = draw_noise(keys(3, "noise"), 3, (4 * (height + below), 4 * (width + beside)), 0.4)
    assert torch.equal(padded[1:2, :, :height, :width], alone)


def test_noise_needs_sides_of_whole_cells() -> None:
    with pytest.raises(ValueError, match=r"multiples of 4, got \(32, 30\)"):
        draw_noise(keys(1), 3, (32, 30), 0.4)


# --- cells and tiles


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([4, 8, 16, 32]))
@settings(max_examples=40, deadline=None)
def test_valid_cells_are_those_that_hold_a_pixel(height, width, stride) -> None:
    grid = (-(-96 // stride), -(-96 // stride))
    got = valid_cells([(height, width), (96, 96)], grid, stride)
    pixels = torch.zeros(2, 1, 96, 96)
    pixels[0, 0, :height, :width] = 1
    pixels[1] = 1
    assert torch.equal(got, F.max_pool2d(pixels, stride)[:, 0] > 0)


@st.composite
def tile_cases(draw):
    """Images of different sizes in one grid, whose tiles may be partial at every border."""
    patch = draw(st.integers(1, 6))
    sides = st.integers(2 * patch, 5 * patch)
    sizes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=4))
    ratio = draw(st.sampled_from([0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75]))
    return patch, sizes, ratio, draw(st.integers(0, 1000))


@given(tile_cases())
@settings(max_examples=80, deadline=None)
def test_exactly_the_share_of_whole_tiles_is_hidden_inside_the_image(case) -> None:
    patch, sizes, ratio, seed = case
    grid = (max(h for h, _ in sizes) + 1, max(w for _, w in sizes) + 2)
    valid = valid_cells(sizes, grid, 1)
    mask = draw_tile_mask(keys(len(sizes), seed=seed), valid, patch, ratio)
    assert mask.shape == valid.shape and mask.dtype == torch.bool
    assert not bool((mask & ~valid).any())
    for (height, width), hidden in zip(sizes, mask, strict=True):
        tiles = [
            hidden[top : min(top + patch, height), left : min(left + patch, width)]
            for top in range(0, height, patch)
            for left in range(0, width, patch)
        ]
        assert all(bool(tile.all()) or not bool(tile.any()) for tile in tiles)
        assert sum(bool(tile.any()) for tile in tiles) == math.floor(ratio * len(tiles) + 0.5)


@given(tile_cases())
@settings(max_examples=25, deadline=None)
def test_tiles_do_not_depend_on_padding_or_batch_mates(case) -> None:
    patch, sizes, ratio, seed = case
    grid = (max(h for h, _ in sizes) + patch, max(w for _, w in sizes) + 1)
    every = keys(len(sizes), seed=seed)
    together = draw_tile_mask(every, valid_cells(sizes, grid, 1), patch, ratio)
    for i, (height, width) in enumerate(sizes):
        alone = draw_tile_mask(every[i : i + 1], full(1, height, width), patch, ratio)
        assert torch.equal(together[i, :height, :width], alone[0])


@pytest.mark.parametrize(("patch", "tiles"), [(8, 64), (4, 256), (16, 16)])
def test_the_papers_sizes(patch, tiles) -> None:
    mask = draw_tile_mask(keys(6), full(6, 64, 64), patch, 0.5)
    assert mask.flatten(1).sum(1).tolist() == [2048] * 6
    per_tile = F.avg_pool2d(mask[:, None].float(), patch).flatten(1)
    assert set(per_tile.unique().tolist()) == {0.0, 1.0}
    assert per_tile.sum(1).tolist() == [tiles / 2] * 6


def test_every_tile_is_hidden_equally_often() -> None:
    mask = draw_tile_mask(keys(4000), full(4000, 4, 4), 1, 0.5).flatten(1).double()
    assert float((mask.mean(0) - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(4000)
    # without replacement: two tiles are hidden together in 8/16 * 7/15 of the images
    together = (mask.T @ mask / 4000)[~torch.eye(16, dtype=torch.bool)]
    assert float((together - 8 / 16 * 7 / 15).abs().max()) < 5.5 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize(
    ("sizes", "patch", "ratio"), [([(16, 16), (16, 7)], 4, 0.5), ([(15, 16)], 8, 0.5), ([(8, 8)], 4, 0.05)]
)
def test_maps_with_too_few_tiles_are_refused(sizes, patch, ratio) -> None:
    with pytest.raises(ValueError, match="make the mask patch smaller or the images larger"):
        draw_tile_mask(keys(len(sizes)), valid_cells(sizes, (16, 16), 1), patch, ratio)


# --- queries


def test_one_query_for_each_hidden_cell_or_each_cell() -> None:
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    hidden = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]], dtype=torch.bool)
    masked = choose_queries(hidden, valid, "masked_queries")
    assert masked.index[0].tolist() == [1, 2, 5] and masked.index[1, :2].tolist() == [0, 3]
    assert masked.valid.tolist() == [[True, True, True], [True, True, False]]
    spatial = choose_queries(hidden, valid, "spatial_queries")
    assert spatial.index[0].tolist() == [0, 1, 2, 3, 4, 5] and spatial.index[1, :4].tolist() == [0, 1, 2, 3]
    assert spatial.valid[1].tolist() == [True] * 4 + [False] * 2
    assert choose_queries(hidden[:1], valid[:1], "masked_queries").valid is None


# --- the predictor


class Case:
    """Two images in one grid of 6x8 cells; the second covers 6x5 of them."""

    def __init__(
        self, readout="masked_queries", uneven=True, pre_norm=False, features=WIDTH, blocks=1
    ) -> None:
        self.head = make_head(features, readout=readout, mask_patch=2, self_attention_blocks=blocks)
        self.decoder = Decoder(pre_norm=pre_norm, features=features)
        self.feature = torch.randn(2, features, 6, 8)
        self.valid = valid_cells([(6, 8), (6, 5 if uneven else 8)], (6, 8), 1)
        self.hidden = draw_tile_mask(keys(2), self.valid, 2, 0.5)

    def queries(self, rows=slice(None)) -> Queries:
        hidden, valid = self.hidden.flatten(1)[rows], self.valid.flatten(1)[rows]
        return choose_queries(hidden, valid, self.head.settings.readout)

    def predict(self, rows=slice(None), feature=None):
        """[B, N, C] for the images `rows`."""
        feature = self.feature if feature is None else feature
        hidden, valid = self.hidden.flatten(1)[rows], self.valid.flatten(1)[rows]
        return self.head.predict(self.decoder, feature[rows], hidden, valid, self.queries(rows))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("readout", ["masked_queries", "spatial_queries"])
@pytest.mark.parametrize(
    ("uneven", "features", "blocks"), [(False, WIDTH, 2), (True, WIDTH, 0), (True, 12, 1)]
)
def test_the_predictor_runs_the_published_layers(pre_norm, readout, uneven, features, blocks) -> None:
    case = Case(readout, uneven, pre_norm, features, blocks)
    queries = case.queries()
    valid = case.valid.flatten(1) if uneven else None
    want = case.decoder.predict(
        case.head, case.feature, case.hidden.flatten(1), queries.index, valid, queries.valid
    )
    got = case.predict()
    if queries.valid is not None:
        got, want = got[queries.valid], want[queries.valid]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("readout", ["masked_queries", "spatial_queries"])
def test_an_image_is_predicted_as_it_is_alone(readout) -> None:
    case = Case(readout)
    together, queries = case.predict(), case.queries()
    for i in range(2):
        alone, own = case.predict(slice(i, i + 1)), case.queries(slice(i, i + 1))
        assert own.valid is None
        real = slice(None) if queries.valid is None else queries.valid[i]
        assert torch.equal(queries.index[i, real], own.index[0])
        assert torch.allclose(together[i, real], alone[0], atol=1e-5)


@pytest.mark.parametrize("readout", ["masked_queries", "spatial_queries"])
def test_what_is_hidden_or_outside_has_no_influence(readout) -> None:
    case = Case(readout)
    changed = case.feature.clone()
    secret = (case.hidden | ~case.valid)[:, None].expand_as(changed)
    changed[secret] = 100 * torch.randn(int(secret.sum()))
    queries = case.queries()
    real = slice(None) if queries.valid is None else queries.valid
    assert torch.allclose(case.predict()[real], case.predict(feature=changed)[real], atol=1e-5)
    visible = case.feature.clone()
    visible[(case.valid & ~case.hidden)[:, None].expand_as(visible)] += 1
    assert not torch.allclose(case.predict()[real], case.predict(feature=visible)[real], atol=1e-2)


@pytest.mark.parametrize("readout", ["masked_queries", "spatial_queries"])
def test_the_gradient_reaches_visible_cells_only(readout) -> None:
    case = Case(readout)
    feature, target = case.feature.requires_grad_(), torch.randn(2, WIDTH, 6, 8).requires_grad_()
    out = case.head.reconstruct(case.decoder, feature, target, case.hidden, case.valid)
    out.losses["loss_recon"].backward()
    reached = feature.grad.abs().sum(1) > 0
    assert torch.equal(reached, case.valid & ~case.hidden)
    assert target.grad is None
    for name, parameter in [*case.head.named_parameters(), *case.decoder.named_parameters()]:
        if not name.startswith("denoise"):
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
    rows = case.decoder.level_embed.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [False, False, True]


@pytest.mark.parametrize("readout", ["masked_queries", "spatial_queries"])
@pytest.mark.parametrize("uneven", [False, True])
def test_reconstruction_loss_by_hand(readout, uneven) -> None:
    case = Case(readout, uneven)
    target = torch.randn(2, WIDTH, 6, 8) * 3 + 1
    out = case.head.reconstruct(case.decoder, case.feature, target, case.hidden, case.valid)
    queries, predicted = case.queries(), case.predict().detach().numpy()
    cells = target.numpy().reshape(2, WIDTH, 48).transpose(0, 2, 1).astype(np.float64)
    mean, variance = cells.mean(-1, keepdims=True), cells.var(-1, keepdims=True)
    normed = (cells - mean) / np.sqrt(variance + 1e-5)
    errors = []
    for i in range(2):
        for n, cell in enumerate(queries.index[i].tolist()):
            if case.hidden[i].flatten()[cell]:
                errors.append((predicted[i, n] - normed[i, cell]) ** 2)
    assert len(errors) == int(case.hidden.sum())
    loss = float(np.mean(errors))
    assert float(out.losses["loss_recon"].detach()) == pytest.approx(loss, rel=1e-4)
    spread = normed[case.valid.flatten(1).numpy()].var(axis=0).mean()
    assert float(out.metrics["target_variance"]) == pytest.approx(spread, rel=1e-4)
    assert float(out.metrics["explained_variance"]) == pytest.approx(1 - loss / spread, rel=1e-4, abs=1e-4)


def test_both_readouts_are_judged_on_the_same_cells() -> None:
    """Their predictions differ (other queries take part in self-attention), the cells that count do not."""
    counted = []
    for readout in ("masked_queries", "spatial_queries"):
        case = Case(readout)
        queries = case.queries()
        support = torch.zeros(2, 48, dtype=torch.bool)
        counts = case.hidden.flatten(1).gather(1, queries.index)
        support.scatter_(1, queries.index, counts)
        counted.append(support)
        assert int(counts.sum()) == int(case.hidden.sum())
    assert torch.equal(*counted) and torch.equal(counted[0], case.hidden.flatten(1))


def test_the_target_is_a_layer_norm_without_parameters() -> None:
    target = (torch.randn(2, 16, 3, 4, dtype=torch.float64) * 2e-2 + 5).requires_grad_()
    got = normalised_target(target)
    assert got.shape == (2, 12, 16) and got.dtype == torch.float32 and not got.requires_grad
    cells = target.detach().permute(0, 2, 3, 1).reshape(2, 12, 16)
    want = (cells - cells.mean(-1, keepdim=True)) / (
        cells.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    assert torch.allclose(got.double(), want, atol=1e-3)


def test_channel_variance_is_per_channel_over_cells_and_images() -> None:
    vectors = torch.randn(50, 4) * torch.tensor([1.0, 2, 3, 4]) + torch.tensor([100.0, 0, 0, 0])
    assert float(channel_variance(vectors)) == pytest.approx(vectors.numpy().var(axis=0).mean(), rel=1e-4)


# --- denoising


@pytest.mark.parametrize("aim", ["noise", "image"])
def test_denoising_loss_by_hand(aim) -> None:
    head = make_head(denoise_target=aim)
    features, noise = torch.randn(2, 8, 6, 8), 0.4 * torch.randn(2, 3, 6, 8)
    image = torch.randn(2, 3, 24, 32)
    valid = valid_cells([(24, 32), (24, 18)], (6, 8), 4)
    out = head.denoise_loss(features, noise, image, valid)
    weight, bias = head.denoise.weight.detach().numpy()[:, :, 0, 0], head.denoise.bias.detach().numpy()
    predicted = np.einsum("oc,bchw->bohw", weight, features.numpy()) + bias[:, None, None]
    want = noise.numpy() if aim == "noise" else image.numpy().reshape(2, 3, 6, 4, 8, 4).mean(axis=(3, 5))
    inside = np.broadcast_to(valid.numpy()[:, None], want.shape)
    loss = ((predicted - want) ** 2)[inside].mean()
    spread = want.transpose(0, 2, 3, 1)[valid.numpy()].var(axis=0).mean()
    assert float(out.losses["loss_denoise"].detach()) == pytest.approx(loss, rel=1e-5)
    assert float(out.metrics["denoise_r2"]) == pytest.approx(1 - loss / spread, rel=1e-4)


def test_a_count_is_at_least_one() -> None:
    """Without processes the mean is the count itself; nothing to count must not divide by zero."""
    assert [float(mean_count(count, torch.device("cpu"))) for count in (0, 1, 640)] == [1, 1, 640]


# --- the whole step


def step_inputs(size=(64, 64), count=2) -> dict:
    grid = (size[0] // 8, size[1] // 8)
    return {
        "feature": torch.randn(count, WIDTH, *grid),
        "target": torch.randn(count, WIDTH, *grid),
        "mask_features": torch.randn(count, 8, size[0] // 4, size[1] // 4),
        "noise": draw_noise(keys(count, "noise"), 3, size, 0.4),
        "image": torch.randn(count, 3, *size),
        "tile_keys": keys(count),
        "image_sizes": [size] * count,
    }


def test_losses_are_weighted_and_metrics_are_not() -> None:
    inputs, decoder = step_inputs(), Decoder()
    plain = make_head(mask_patch=2)(decoder, **inputs)
    weighted = make_head(mask_patch=2, recon_weight=2.0, denoise_weight=0.5)(decoder, **inputs)
    assert plain.losses.keys() == weighted.losses.keys() == {"loss_recon", "loss_denoise"}
    assert torch.allclose(weighted.losses["loss_recon"], 2 * plain.losses["loss_recon"])
    assert torch.allclose(weighted.losses["loss_denoise"], 0.5 * plain.losses["loss_denoise"])
    assert plain.metrics.keys() == {"target_variance", "explained_variance", "denoise_r2"}
    assert not any("loss" in name for name in plain.metrics)  # toolkits sum what is called a loss
    for name, value in plain.metrics.items():
        assert torch.allclose(value, weighted.metrics[name]), name


@pytest.mark.parametrize(
    ("off", "left"), [("recon_weight", "loss_denoise"), ("denoise_weight", "loss_recon")]
)
def test_one_loss_alone(off, left) -> None:
    inputs = step_inputs()
    if off == "recon_weight":
        inputs["target"] = None
    assert make_head(mask_patch=2, **{off: 0.0})(Decoder(), **inputs).losses.keys() == {left}


def test_padding_and_what_it_holds_reach_no_loss() -> None:
    inputs, decoder, head = step_inputs(), Decoder(), make_head(mask_patch=2)
    inputs["image_sizes"] = [(64, 64), (40, 57)]
    before = head(decoder, **inputs)
    for name, stride in (("feature", 8), ("target", 8), ("mask_features", 4), ("noise", 4)):
        grid = inputs[name].shape[-2:]
        outside = ~valid_cells(inputs["image_sizes"], tuple(grid), stride)
        inputs[name] = inputs[name].masked_fill(outside[:, None], 7.0)
    after = head(decoder, **inputs)
    for name in before.losses:
        assert torch.allclose(before.losses[name], after.losses[name], rtol=1e-5), name
    for name in before.metrics:
        assert torch.allclose(before.metrics[name], after.metrics[name], rtol=1e-4), name


@pytest.mark.parametrize("stride", [16, 32])
def test_other_levels_read_their_own_embedding_and_projection(stride) -> None:
    head, decoder = make_head(12, recon_stride=stride, mask_patch=2), Decoder(features=12)
    inputs = step_inputs((128, 128))
    for name in ("feature", "target"):
        inputs[name] = torch.randn(2, 12, 128 // stride, 128 // stride)
    sum(head(decoder, **inputs).losses.values()).backward()
    level = {32: 0, 16: 1}[stride]
    assert [bool(row.any()) for row in decoder.level_embed.weight.grad] == [i == level for i in range(3)]
    assert [p.weight.grad is not None for p in decoder.input_proj] == [i == level for i in range(3)]


class LargestOutput(TorchDispatchMode):
    """Remembers the most elements that any operation's output had."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def test_no_attention_weights_are_materialised_at_the_papers_size() -> None:
    """4,096 queries on 4,096 keys: the weights of one layer would be 4 x 4,096 x 4,096 numbers."""
    head, decoder = make_head(self_attention_blocks=1), Decoder(layers=1)
    valid = full(1, 64, 64)
    hidden = draw_tile_mask(keys(1), valid, 8, 0.5)
    watch = LargestOutput()
    with torch.no_grad(), watch:
        out = head.reconstruct(
            decoder, torch.randn(1, WIDTH, 64, 64), torch.randn(1, WIDTH, 64, 64), hidden, valid
        )
    assert bool(out.losses["loss_recon"].isfinite())
    assert 4096 * WIDTH <= watch.largest <= 4096 * 3 * WIDTH * 2
