"""Windows, relative positions, the pyramid and the loading of a detector's ViT."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vit_files import RECTANGLES, rectangular

from jepa_plugins.core.checkpoints import CheckpointError, load_into
from jepa_plugins.core.vit import Predictor, VisionTransformer, resample_positions
from jepa_plugins.core.vit_convert import Wishes, convert, file_content
from jepa_plugins.core.vit_weights import recognise
from jepa_plugins.core.vitdet import (
    ChannelNorm,
    DetectionBlock,
    DetectionViT,
    SimpleFeaturePyramid,
    attend_with_positions,
    relative_rows,
)
from jepa_plugins.core.vitdet_weights import backbone_weights, holds_detector

SMALL = dict(
    img_size=32,
    patch_size=4,
    embed_dim=24,
    depth=3,
    num_heads=2,
    window_size=3,
    window_block_indexes=[0, 2],
    pretrain_img_size=16,
    use_rel_pos=True,
    rel_pos_zero_init=False,
)


def small(**changes) -> DetectionViT:
    torch.manual_seed(0)
    return DetectionViT(**{**SMALL, **changes}).eval()


# --- attention


def written_out(query, key, value, rows, columns):
    """Scores with a bias for each pair of places."""
    height, width = len(rows), len(columns)
    down = torch.arange(height).repeat_interleave(width)
    right = torch.arange(width).repeat(height)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    scores = scores + torch.einsum("bnqd,qkd->bnqk", query, rows[down[:, None], down])
    scores = scores + torch.einsum("bnqd,qkd->bnqk", query, columns[right[:, None], right])
    return scores.softmax(-1) @ value


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 9), st.integers(0, 99))
def test_extended_queries_give_the_bias(height, width, heads, depth, seed):
    torch.manual_seed(seed)
    query, key, value = torch.randn(3, 2, heads, height * width, depth, dtype=torch.float64)
    rows = torch.randn(height, height, depth, dtype=torch.float64)
    columns = torch.randn(width, width, depth, dtype=torch.float64)
    got = attend_with_positions(query, key, value, rows, columns)
    torch.testing.assert_close(got, written_out(query, key, value, rows, columns))


def test_gradients_reach_all_inputs():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3)]
    inputs += [torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(3, 3, 4, dtype=torch.float64)]
    for tensor in inputs:
        tensor.requires_grad_()
    weight = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    grads = [
        torch.autograd.grad((function(*inputs) * weight).sum(), inputs)
        for function in (attend_with_positions, written_out)
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_nothing_of_queries_times_keys_is_kept():
    """At 1024 pixels a bias for every pair would take 0.8 GB an image and block."""
    side = 40
    query, key, value = (torch.randn(1, 1, side * side, 8, requires_grad=True) for _ in range(3))
    rows, columns = (torch.randn(side, side, 8, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend_with_positions(query, key, value, rows, columns).sum().backward()
    assert kept and max(kept) < side**4 / 4


def test_rows_of_the_table():
    table = torch.arange(5.0)[:, None]
    assert relative_rows(table, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    longer = relative_rows(table, 5)
    want = F.interpolate(table.T[None], size=9, mode="linear")[0, 0]
    assert torch.equal(longer[:, 0, 0], want[4:]) and torch.equal(longer[0, :, 0], want[:5].flip(0))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_windows_of_any_map(height, width, window):
    """Each window attends by itself, filled with zeros after the norm, which take part as keys."""
    torch.manual_seed(0)
    block = DetectionBlock(
        8, 2, window=window, drop_path=0.0, mlp_ratio=4.0, size=(window, window), zero_init=False
    )
    x = torch.randn(2, height, width, 8)
    got = block.attend(x)
    padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    want = torch.empty_like(padded)
    for top in range(0, padded.shape[1], window):
        for left in range(0, padded.shape[2], window):
            part = (slice(None), slice(top, top + window), slice(left, left + window))
            want[part] = block.attn(padded[part])
    torch.testing.assert_close(got, want[:, :height, :width])


def test_whole_map_attention_is_that_of_our_vit():
    """Without windows and relative positions: the pre-training encoder before its final norm."""
    net = small(use_rel_pos=False, window_block_indexes=[], pretrain_img_size=(32, 16))
    vit = VisionTransformer((32, 16), 4, width=24, depth=3, heads=2).eval()
    vit.norm = torch.nn.Identity()
    net.load_state_dict(vit.state_dict())
    image = torch.randn(2, 3, 32, 16)
    torch.testing.assert_close(net.features(image), vit(image).transpose(1, 2).unflatten(2, (8, 4)))


# --- the transformer


def test_recomputed_activations_change_nothing():
    nets = [small(use_act_checkpoint=flag).train() for flag in (False, True)]
    image = torch.randn(1, 3, 20, 32)
    for net in nets:
        net.features(image).square().sum().backward()
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert one.grad is not None and torch.equal(one.grad, other.grad), name


def test_drop_path_grows_and_acts_in_training_only():
    net = small(drop_path_rate=0.8)
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in net.blocks] == [0.0, 0.4, 0.8]
    image = torch.randn(4, 3, 16, 16)
    assert torch.equal(net.features(image), net.features(image))
    net.train()
    assert not torch.equal(net.features(image), net.features(image))


def test_positions_start_as_nothing_where_so_configured():
    net = small(rel_pos_zero_init=True)
    assert not net.blocks[0].attn.rel_pos_h.any() and small().blocks[0].attn.rel_pos_w.any()
    assert net.blocks[0].attn.rel_pos_h.shape == (5, 12) and net.blocks[1].attn.rel_pos_h.shape == (15, 12)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_heads": 5}, "5 attention heads do not divide a width of 24"),
        ({"window_block_indexes": [3]}, "names block 3, but a transformer of depth 3 has blocks 0 to 2"),
        ({"window_size": 0}, "window_size is 0"),
        ({"pretrain_img_size": 18}, "18x18 pixels is no whole number of 4x4 patches"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**changes)


def test_an_image_that_the_patch_does_not_divide():
    with pytest.raises(ValueError, match="30x32 pixels is no whole number of 4x4 patches: resize or pad it"):
        small().features(torch.zeros(1, 3, 30, 32))


# --- the pyramid


def test_levels_of_other_patches_and_norms():
    features = torch.randn(2, 16, 8, 12)
    for norm in ("LN", "", torch.nn.BatchNorm2d):
        pyramid = SimpleFeaturePyramid(16, 8, 6, (4.0, 2.0, 1.0, 0.5, 0.25), norm)
        assert pyramid.strides == [2, 4, 8, 16, 32]
        shapes = [tuple(level.shape) for level in pyramid.levels(features)]
        assert shapes == [(2, 6, round(8 * s), round(12 * s)) for s in (4, 2, 1, 0.5, 0.25)]
        assert (pyramid.simfp_3[0].bias is None) == (norm != "")


def test_the_channel_norm_is_layer_norm_over_channels():
    x = torch.randn(2, 5, 3, 4)
    want = F.layer_norm(x.permute(0, 2, 3, 1), (5,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(ChannelNorm(5)(x), want)


@pytest.mark.parametrize(
    ("stride", "scales", "norm", "sentence"),
    [
        (14, (2.0, 1.0), "LN", "a patch of 14 pixels .* give levels of strides"),
        (16, (4.0, 1.0), "LN", "must be a power of 2 and double"),
        (16, (8.0, 4.0), "LN", "scale_factors are 4, 2, 1, 0.5"),
        (16, (1.0,), "GN", "norms 'LN' and '', got 'GN'"),
    ],
)
def test_pyramids_that_cannot_be(stride, scales, norm, sentence):
    with pytest.raises(ValueError, match=sentence):
        SimpleFeaturePyramid(16, stride, 4, scales, norm)


# --- loading


def pretraining(img_size=16, patch_size=4, depth=3, width=24, class_token=False, **names) -> dict:
    """What our pre-training saves: both encoders and the predictor."""
    weights = {}
    for i, part in enumerate(("encoder", "target_encoder")):
        torch.manual_seed(10 + i)
        vit = VisionTransformer(
            img_size, patch_size, width=width, depth=depth, heads=2, class_token=class_token
        )
        weights |= {f"{part}.{name}": value for name, value in vit.state_dict().items()}
    predictor = Predictor((4, 4), width, width=16, depth=1, heads=2)
    weights |= {f"predictor.{name}": value for name, value in predictor.state_dict().items()}
    return {"state_dict": weights, "meta": {"epoch": 3}}


def part_of(content: dict, part: str) -> dict:
    return {
        name[len(part) + 1 :]: value
        for name, value in content["state_dict"].items()
        if name.startswith(f"{part}.")
    }


def test_the_target_encoder_is_taken():
    net, content = small(use_rel_pos=False), pretraining()
    found = backbone_weights(net, content, "run.pth")
    assert any("the target encoder" in note for note in found.notes) and not found.resized
    target = part_of(content, "target_encoder")
    assert set(found.weights) == {f"backbone.net.{name}" for name in net.state_dict()}
    for name, value in found.weights.items():
        assert torch.equal(value, target[name.removeprefix("backbone.net.")]), name
    assert "encoder.pos_embed" in found.left_out and "predictor.mask_token" in found.left_out
    vit = VisionTransformer(16, 4, width=24, depth=3, heads=2).eval()
    vit.load_state_dict(target)
    vit.norm = torch.nn.Identity()
    net = small(use_rel_pos=False, window_block_indexes=[])
    net.load_state_dict({name.removeprefix("backbone.net."): v for name, v in found.weights.items()})
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(net.features(image), vit(image).transpose(1, 2).unflatten(2, (4, 4)))


def test_positions_and_patches_of_another_size_are_resampled():
    found = backbone_weights(small(pretrain_img_size=24), pretraining(), "run.pth")
    assert found.resized == ["backbone.net.pos_embed"]
    assert found.weights["backbone.net.pos_embed"].shape == (1, 36, 24)
    found = backbone_weights(small(), pretraining(img_size=32, patch_size=8), "run.pth")
    assert found.resized == ["backbone.net.patch_embed.proj.weight"]
    assert found.weights["backbone.net.patch_embed.proj.weight"].shape == (24, 3, 4, 4)
    assert any("patches resampled from 8 to 4" in note for note in found.notes)


def test_a_rectangular_grid_that_the_configuration_names():
    content = pretraining(img_size=(8, 24))
    found = backbone_weights(small(pretrain_img_size=(8, 24)), content, "run.pth")
    assert torch.equal(
        found.weights["backbone.net.pos_embed"], part_of(content, "target_encoder")["pos_embed"]
    )
    with pytest.raises(CheckpointError, match="run.pth holds 12 positions"):
        backbone_weights(small(), content, "run.pth")


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("grid", RECTANGLES)
def test_a_rectangular_grid_of_our_own(grid, told):
    """By the file's configuration, else by that of the detector."""
    content, table = rectangular(grid, told)
    size = (grid[0] * 4, grid[1] * 4)
    net = small(embed_dim=16, depth=1, window_block_indexes=[], pretrain_img_size=size, use_rel_pos=False)
    found = backbone_weights(net, content, "run.pth")
    assert torch.equal(found.weights["backbone.net.pos_embed"], table) and not found.resized
    if told:
        net = small(embed_dim=16, depth=1, window_block_indexes=[], pretrain_img_size=64)
        found = backbone_weights(net, content, "run.pth")
        want = resample_positions(table, grid, (16, 16))
        assert torch.equal(found.weights["backbone.net.pos_embed"], want)
        assert found.resized == ["backbone.net.pos_embed"]


def test_a_square_of_another_method_for_a_rectangle_of_as_many_patches():
    target = part_of(pretraining(class_token=True), "target_encoder")
    content = {"model": {**target, "decoder_blocks.0.norm1.weight": torch.zeros(3)}}
    found = backbone_weights(small(pretrain_img_size=(8, 32)), content, "mae.pth")
    table = resample_positions(target["pos_embed"][:, 1:], (4, 4), (2, 8))
    assert torch.equal(found.weights["backbone.net.pos_embed"], table)
    assert found.resized == ["backbone.net.pos_embed"]
    assert any("taken for 4x4, not the model's 2x8" in note for note in found.notes)


def test_a_converted_files_order_of_channels_stays():
    encoder = recognise(pretraining(), heads=2)
    for bgr in (False, True):
        content = file_content(convert(encoder, "detectron2", Wishes(bgr=bgr)), "detectron2")
        kernel = encoder.weights["patch_embed.proj.weight"]
        found = backbone_weights(small(), content, "run.pth")
        got = found.weights["backbone.net.patch_embed.proj.weight"]
        assert torch.equal(got, kernel.flip(1) if bgr else kernel)
        assert ("it reads blue, green, red" in found.notes) == bgr


def test_a_square_table_for_a_rectangular_grid():
    found = backbone_weights(small(pretrain_img_size=(8, 24)), pretraining(), "run.pth")
    assert found.resized == ["backbone.net.pos_embed"]
    assert found.weights["backbone.net.pos_embed"].shape == (1, 12, 24)


def test_a_class_token_is_dropped_and_its_row_with_it():
    content = pretraining(class_token=True)
    for keeps in (False, True):
        net = small(pretrain_use_cls_token=keeps, use_rel_pos=False)
        found = backbone_weights(net, content, "run.pth")
        assert any("class token" in note for note in found.notes)
        table = part_of(content, "target_encoder")["pos_embed"]
        assert torch.equal(found.weights["backbone.net.pos_embed"][:, int(keeps) :], table[:, 1:])
        net.load_state_dict({name.removeprefix("backbone.net."): v for name, v in found.weights.items()})


def test_published_ijepa_files():
    target = part_of(pretraining(), "target_encoder")
    nested = {f"module.{name}": value for name, value in target.items()}
    content = {"encoder": nested, "target_encoder": nested, "predictor": {}, "epoch": 1}
    found = backbone_weights(small(), content, "ijepa.pth")
    assert torch.equal(
        found.weights["backbone.net.blocks.2.mlp.fc1.weight"], target["blocks.2.mlp.fc1.weight"]
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: {k: v for k, v in w.items() if "target" not in k}, "run.pth .*target"),
        (lambda w: {k: v for k, v in w.items() if "target_encoder.blocks.1.attn.proj" not in k}, "run.pth"),
        (lambda w: {"layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3)}, "run.pth holds no plain ViT.*ResNet"),
    ],
)
def test_files_that_lack_what_is_needed(change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        backbone_weights(small(), {"state_dict": change(pretraining()["state_dict"])}, "run.pth")


def test_missing_tensors_are_counted():
    weights = pretraining()["state_dict"]
    del weights["target_encoder.blocks.1.norm2.bias"]
    with pytest.raises(CheckpointError, match="lacks 1 of the .* tensors .*'blocks.1.norm2.bias'"):
        backbone_weights(small(), {"state_dict": weights}, "run.pth")


def test_another_size_names_the_keys():
    with pytest.raises(CheckpointError, match=r"set MODEL.VIT.DEPTH 2 \(it is 3\), or in a LazyConfig"):
        backbone_weights(small(), pretraining(depth=2), "run.pth")


def test_a_detectors_own_file_is_told_apart():
    net = {f"backbone.net.{name}": value for name, value in small().state_dict().items()}
    assert holds_detector({"model": net}) and holds_detector({"state_dict": net}) and holds_detector(net)
    assert not holds_detector(pretraining()) and not holds_detector({"model": net, "jepa_vit": {}})


def test_a_detectors_tables_of_another_size_are_resampled():
    source = small(img_size=64, pretrain_img_size=24, pretrain_use_cls_token=True)
    net = small()
    report = load_into(net, source.state_dict(), required=[""])
    assert set(report.resized) == {"pos_embed", "blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"}
    table = source.pos_embed[:, 1:].reshape(1, 6, 6, 24).permute(0, 3, 1, 2)
    want = F.interpolate(table, (4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(net.pos_embed.data, want)
    want = F.interpolate(source.blocks[1].attn.rel_pos_h.T[None], 15, mode="linear")[0].T
    torch.testing.assert_close(net.blocks[1].attn.rel_pos_h.data, want)


def test_a_table_of_no_grid():
    weights = small().state_dict()
    weights["pos_embed"] = torch.zeros(1, 15, 24)
    with pytest.raises(CheckpointError, match="15 rows.*set MODEL.VIT.PRETRAIN_IMG_SIZE"):
        small().load_state_dict(weights)
