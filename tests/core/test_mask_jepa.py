"""The pretext task: noise, tiles, read-outs and losses, against references and by their properties."""

import dataclasses

import numpy as np
import pytest
import torch
from published_like import HEADS, QUERIES, WIDTH, Decoder
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_plugins.core.distributed import mean_count
from jepa_plugins.core.mask_jepa import MaskJEPAHead, normalised_target, reduced
from jepa_plugins.core.masking import draw_noise, valid_cells
from jepa_plugins.core.predictor import Level, Queries, choose_queries
from jepa_plugins.core.random import sample_keys
from jepa_plugins.core.settings import CHOICES, MaskJEPASettings
from jepa_plugins.core.step import channel_variance

READOUTS = CHOICES["readout"]


def keys(count: int, stream: str = "tiles", seed: int = 0):
    return sample_keys(seed, torch.arange(count), stream)


def make_head(features: int = WIDTH, mask_dim: int = 8, channels: int = 3, **options) -> MaskJEPAHead:
    side = (128 if "levels" in options else 64) // options.get("recon_stride", 8)
    torch.manual_seed(1)
    head = MaskJEPAHead(
        MaskJEPASettings(**options),
        feature_dim=features,
        mask_dim=mask_dim,
        hidden_dim=WIDTH,
        heads=HEADS,
        feedforward=24,
        image_channels=channels,
        num_queries=QUERIES,
        grid=(side, side),
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def test_a_weight_of_zero_makes_no_parameters() -> None:
    names = {name.split(".")[0] for name, _ in make_head().named_parameters()}
    assert names == {"mask_token", "query", "self_attention_blocks", "prediction", "denoise"}
    assert {n.split(".")[0] for n, _ in make_head(recon_weight=0.0).named_parameters()} == {"denoise"}
    without = {n.split(".")[0] for n, _ in make_head(denoise_weight=0.0).named_parameters()}
    assert without == names - {"denoise"}
    assert not list(make_head(self_attention_blocks=0).self_attention_blocks.parameters())


# --- queries


def test_one_query_for_each_hidden_cell_or_each_cell() -> None:
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    hidden = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]], dtype=torch.bool)
    masked = choose_queries(hidden, valid, True)
    assert masked.index[0].tolist() == [1, 2, 5] and masked.index[1, :2].tolist() == [0, 3]
    assert masked.valid.tolist() == [[True, True, True], [True, True, False]]
    spatial = choose_queries(hidden, valid, False)
    assert spatial.index[0].tolist() == [0, 1, 2, 3, 4, 5] and spatial.index[1, :4].tolist() == [0, 1, 2, 3]
    assert spatial.valid[1].tolist() == [True] * 4 + [False] * 2
    assert choose_queries(hidden[:1], valid[:1], True).valid is None


# --- the predictor


class Case:
    """Two images in one grid of 8x8 cells (stride 8); the second covers 8x5 of them."""

    def __init__(
        self, readout="masked_queries", uneven=True, pre_norm=False, features=WIDTH, blocks=1, **more
    ) -> None:
        more = {"readout": readout, "mask_patch": 2, "self_attention_blocks": blocks, **more}
        self.head = make_head(features, **more)
        self.decoder = Decoder(pre_norm=pre_norm, features=features, layers=3 if "levels" in more else 2)
        side = 128 if "levels" in more else 64  # a tile must be as wide as a stride-32 cell there
        self.sizes = [(side, side), (side, side * 5 // 8 if uneven else side)]
        maps = [torch.randn(2, features, side // stride, side // stride) for stride in (32, 16, 8)]
        self.maps = [m.requires_grad_() for m in maps]
        self.levels = self.head.masked_levels(
            self.maps, len(self.decoder.transformer_ffn_layers), keys(2), self.sizes
        )
        self.level = self.levels[self.head.settings.level]
        self.feature, self.hidden, self.valid = self.level.feature, self.level.hidden, self.level.valid

    def queries(self, rows=slice(None)) -> Queries:
        hidden, valid = self.hidden.flatten(1)[rows], self.valid.flatten(1)[rows]
        return choose_queries(hidden, valid, self.head.settings.readout == "masked_queries")

    def changed(self, feature) -> dict:
        """The levels with another reconstructed map."""
        return {**self.levels, self.head.settings.level: dataclasses.replace(self.level, feature=feature)}

    def predict(self, rows=slice(None), levels=None):
        """[B, N, C] for the images `rows`."""
        picked = {
            i: Level(given.feature[rows], given.hidden[rows], given.valid[rows])
            for i, given in (levels or self.levels).items()
        }
        return self.head.predict(self.decoder, picked, self.queries(rows))


OPTIONS = [
    {},
    {"levels": "round_robin", "mask_patch": 4},
    {"pos_on_value": True},
    {"placement": "pre"},
    {"placement": "image"},
    {"placement": "image", "levels": "round_robin", "mask_patch": 4},
    {"readout_norm": False},
    {"recon_stride": 16, "mask_patch": 1},
]


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize(
    ("uneven", "features", "blocks"), [(False, WIDTH, 2), (True, WIDTH, 0), (True, 12, 1)]
)
def test_the_predictor_runs_the_published_layers(pre_norm, readout, uneven, features, blocks) -> None:
    if readout == "query_mix":
        features = WIDTH
    check_against_reference(Case(readout, uneven, pre_norm, features, blocks))


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_of_the_predictor(readout, options) -> None:
    plain, case = Case(readout), Case(readout, **options)
    check_against_reference(case)
    with torch.no_grad():
        if options and plain.hidden.shape == case.hidden.shape and "levels" not in options:
            case.decoder.load_state_dict(plain.decoder.state_dict())
            case.head.load_state_dict(plain.head.state_dict())
            case.levels = plain.levels
            assert not torch.allclose(case.predict(), plain.predict(), atol=1e-3)


def check_against_reference(case) -> None:
    queries = case.queries()
    want = case.decoder.predict(case.head, case.levels, queries.index, queries.valid)
    got = case.predict()
    if queries.valid is not None:
        got, want = got[queries.valid], want[queries.valid]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("readout", READOUTS)
def test_an_image_is_predicted_as_it_is_alone(readout) -> None:
    case = Case(readout)
    together, queries = case.predict(), case.queries()
    for i in range(2):
        alone, own = case.predict(slice(i, i + 1)), case.queries(slice(i, i + 1))
        assert own.valid is None
        real = slice(None) if queries.valid is None else queries.valid[i]
        assert torch.equal(queries.index[i, real], own.index[0])
        assert torch.allclose(together[i, real], alone[0], atol=1e-5)


@pytest.mark.parametrize("readout", READOUTS)
def test_what_is_hidden_or_outside_has_no_influence(readout) -> None:
    case = Case(readout)
    changed = case.feature.detach().clone()
    secret = (case.hidden | ~case.valid)[:, None].expand_as(changed)
    changed[secret] = 100 * torch.randn(int(secret.sum()))
    queries = case.queries()
    real = slice(None) if queries.valid is None else queries.valid
    assert torch.allclose(case.predict()[real], case.predict(levels=case.changed(changed))[real], atol=1e-5)
    visible = case.feature.detach().clone()
    visible[(case.valid & ~case.hidden)[:, None].expand_as(visible)] += 1
    assert not torch.allclose(
        case.predict()[real], case.predict(levels=case.changed(visible))[real], atol=1e-2
    )


@pytest.mark.parametrize("readout", READOUTS)
def test_the_gradient_reaches_visible_cells_only(readout) -> None:
    case = Case(readout)
    feature, target = case.feature, torch.randn_like(case.feature).requires_grad_()
    out = case.head.reconstruct(case.decoder, case.levels, target)
    out.losses["loss_recon"].backward()
    reached = feature.grad.abs().sum(1) > 0
    assert torch.equal(reached, case.valid & ~case.hidden)
    assert target.grad is None
    trained = {n.split(".")[0] for n, _ in case.head.named_parameters()} - {"denoise"}
    trained |= set(case.head.settings.predictor_parts())
    for name, parameter in [*case.head.named_parameters(), *case.decoder.named_parameters()]:
        if name.split(".")[0] in trained:
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
        else:
            assert parameter.grad is None, name
    rows = case.decoder.level_embed.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [False, False, True]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("uneven", [False, True])
def test_reconstruction_loss_by_hand(readout, uneven) -> None:
    case = Case(readout, uneven)
    target = torch.randn(2, WIDTH, 8, 8) * 3 + 1
    out = case.head.reconstruct(case.decoder, case.levels, target)
    queries, predicted = case.queries(), case.predict().detach().numpy()
    cells = target.numpy().reshape(2, WIDTH, 64).transpose(0, 2, 1).astype(np.float64)
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
        support = torch.zeros(2, 64, dtype=torch.bool)
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


@pytest.mark.parametrize(
    ("reduction", "want"),
    [("mean", (9 + 16 + 25) / (2 * 4)), ("sum", (9 + 16 + 25) / 2), ("norm", (5 + 5) / 2)],
)
def test_reductions_by_hand(reduction, want) -> None:
    errors = torch.tensor([[9.0 + 16.0, 0.0], [25.0, 0.0]], requires_grad=True)
    loss = reduced(errors, torch.tensor(2.0), 4, reduction)
    assert float(loss.detach()) == pytest.approx(want)
    loss.backward()
    assert bool(errors.grad.isfinite().all()) and float(errors.grad[0, 0]) > 0


def test_reductions_do_not_change_the_metrics() -> None:
    cases = [Case(recon_reduction=reduction) for reduction in CHOICES["recon_reduction"]]
    target = torch.randn(2, WIDTH, 8, 8)
    for case in cases[1:]:
        case.head.load_state_dict(cases[0].head.state_dict())
        case.decoder.load_state_dict(cases[0].decoder.state_dict())
        case.levels = cases[0].levels
    mean, total, norm = (case.head.reconstruct(case.decoder, case.levels, target) for case in cases)
    assert torch.allclose(total.losses["loss_recon"], WIDTH * mean.losses["loss_recon"])
    assert float(norm.losses["loss_recon"].detach()) ** 2 < float(total.losses["loss_recon"].detach())
    for out in (total, norm):
        assert torch.allclose(out.metrics["explained_variance"], mean.metrics["explained_variance"])


@pytest.mark.parametrize("readout", READOUTS)
def test_error_maps_for_pictures_in_evaluation_only(readout) -> None:
    case = Case(readout)
    target = torch.randn(2, WIDTH, 8, 8)
    assert "cell_errors" not in case.head.train().reconstruct(case.decoder, case.levels, target).maps
    out = case.head.eval().reconstruct(case.decoder, case.levels, target)
    errors, hidden = out.maps["cell_errors"], out.maps["hidden"]
    assert torch.equal(hidden, case.hidden) and errors.shape == hidden.shape
    predicted = hidden if readout == "masked_queries" else case.valid
    assert torch.equal(errors.isfinite(), predicted)
    assert float(errors[hidden].mean()) == pytest.approx(float(out.losses["loss_recon"].detach()), rel=1e-5)


def test_query_mix_is_bound_to_one_grid_width_and_decoder() -> None:
    case = Case("query_mix", uneven=False)
    case.head.grid = (16, 16)
    with pytest.raises(ValueError, match="bound to maps of 16x16 cells, got 8x8.*PRETRAIN_CROP_SIZE"):
        case.predict()
    with pytest.raises(ValueError, match="width 16 into cells of 12 channels.*HIDDEN_DIM"):
        make_head(12, readout="query_mix")
    other = Case("query_mix", uneven=False)
    del other.decoder.query_feat
    with pytest.raises(ValueError, match="query_feat and query_embed, which Decoder lacks"):
        other.predict()
    with pytest.raises(ValueError, match="needs the number of queries and the grid"):
        MaskJEPAHead(
            MaskJEPASettings(readout="query_mix"),
            feature_dim=8,
            mask_dim=8,
            hidden_dim=8,
            heads=2,
            feedforward=8,
        )


# --- denoising


def pooled(image, how):
    """[B, c, H, W] at a quarter of the size, in NumPy."""
    cells = image.reshape(*image.shape[:2], image.shape[2] // 4, 4, image.shape[3] // 4, 4)
    if how == "area":
        return cells.mean(axis=(3, 5))
    if how == "bilinear":  # at a scale of 4 its sample point lies between the two middle pixels
        return cells[:, :, :, 1:3, :, 1:3].mean(axis=(3, 5))
    return cells[:, :, :, 0, :, 0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"denoise_noise_scale": "unit"},
        {"denoise_target": "image"},
        {"denoise_target": "image", "denoise_downsample": "bilinear"},
        {"denoise_target": "image", "denoise_downsample": "nearest"},
    ],
)
def test_denoising_loss_by_hand(options) -> None:
    head = make_head(**options)
    features, noise = torch.randn(2, 8, 6, 8), 0.4 * torch.randn(2, 3, 6, 8)
    image = torch.randn(2, 3, 24, 32)
    valid = valid_cells([(24, 32), (24, 18)], (6, 8), 4)
    out = head.denoise_loss(features, noise, image, valid)
    weight, bias = head.denoise.weight.detach().numpy()[:, :, 0, 0], head.denoise.bias.detach().numpy()
    predicted = np.einsum("oc,bchw->bohw", weight, features.numpy()) + bias[:, None, None]
    if "denoise_target" in options:
        want = pooled(image.numpy(), options.get("denoise_downsample", "area"))
    else:
        want = noise.numpy() / (0.4 if options else 1)
    inside = np.broadcast_to(valid.numpy()[:, None], want.shape)
    loss = ((predicted - want) ** 2)[inside].mean()
    spread = want.transpose(0, 2, 3, 1)[valid.numpy()].var(axis=0).mean()
    assert float(out.losses["loss_denoise"].detach()) == pytest.approx(loss, rel=1e-5)
    assert float(out.metrics["denoise_r2"]) == pytest.approx(1 - loss / spread, rel=1e-4)
    assert "denoised" not in out.maps
    maps = head.eval().denoise_loss(features, noise, image, valid).maps
    assert np.allclose(maps["denoised"].numpy(), predicted, atol=1e-5)


def test_the_denoised_map_may_be_the_one_before_the_last_convolution() -> None:
    assert make_head(denoise_feature="mask_features", mask_dim=8).denoise.in_channels == 8
    assert make_head(denoise_feature="stride4", mask_dim=8).denoise.in_channels == WIDTH


def test_a_count_is_at_least_one() -> None:
    """Without processes the mean is the count itself; nothing to count must not divide by zero."""
    assert [float(mean_count(count, torch.device("cpu"))) for count in (0, 1, 640)] == [1, 1, 640]


# --- the whole step


def step_inputs(size=(64, 64), count=2) -> dict:
    maps = [torch.randn(count, WIDTH, size[0] // stride, size[1] // stride) for stride in (32, 16, 8)]
    return {
        "levels": maps,
        "target": torch.randn_like(maps[-1]),
        "denoise_feature": torch.randn(count, 8, size[0] // 4, size[1] // 4),
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

    def outside(tensor, stride):
        padding = ~valid_cells(inputs["image_sizes"], tuple(tensor.shape[-2:]), stride)
        return tensor.masked_fill(padding[:, None], 7.0)

    inputs["levels"] = [outside(m, stride) for m, stride in zip(inputs["levels"], (32, 16, 8), strict=True)]
    for name, stride in (("target", 8), ("denoise_feature", 4), ("noise", 4)):
        inputs[name] = outside(inputs[name], stride)
    after = head(decoder, **inputs)
    for name in before.losses:
        assert torch.allclose(before.losses[name], after.losses[name], rtol=1e-5), name
    for name in before.metrics:
        assert torch.allclose(before.metrics[name], after.metrics[name], rtol=1e-4), name


@pytest.mark.parametrize("stride", [16, 32])
def test_other_levels_read_their_own_embedding_and_projection(stride) -> None:
    head, decoder = make_head(12, recon_stride=stride, mask_patch=2), Decoder(features=12)
    inputs = step_inputs((128, 128))
    inputs["levels"] = [torch.randn(2, 12, 128 // other, 128 // other) for other in (32, 16, 8)]
    inputs["target"] = torch.randn(2, 12, 128 // stride, 128 // stride)
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
    maps, watch = (
        [torch.randn(1, WIDTH, 512 // stride, 512 // stride) for stride in (32, 16, 8)],
        LargestOutput(),
    )
    levels = head.masked_levels(maps, 1, keys(1), [(512, 512)])
    with torch.no_grad(), watch:
        out = head.reconstruct(decoder, levels, torch.randn(1, WIDTH, 64, 64))
    assert bool(out.losses["loss_recon"].isfinite())
    assert 4096 * WIDTH <= watch.largest <= 4096 * 3 * WIDTH * 2
