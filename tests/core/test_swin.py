"""The Swin transformer against numbers of the published one and against attention written out densely."""

import copy
import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from golden_tools import assert_close, fill_module, load, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core import attention as attention_module
from jepa_plugins.core.attention import attention
from jepa_plugins.core.checkpoints import CheckpointError, load_into
from jepa_plugins.core.swin import (
    FEATURES,
    SwinBlock,
    SwinSettings,
    SwinTransformer,
    relative_position_index,
    shifted_window_mask,
    swin_shape,
)

TINY = SwinSettings(embed_dim=8, depths=(2, 1, 2, 1), heads=(1, 2, 2, 4), window=3, drop_path_rate=0.0)


def tiny(seed: int = 0, **changes) -> SwinTransformer:
    torch.manual_seed(seed)
    net = SwinTransformer(dataclasses.replace(TINY, **changes))
    for parameter in net.parameters():  # also biases and the scales of norms
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return net.eval()


# --- numbers


@pytest.fixture(scope="module")
def golden():
    meta, want = load("swin_backbone")
    return meta, want, fill_module(SwinTransformer(), meta).eval()


@pytest.mark.parametrize(("image", "size"), [(0, (64, 96)), (1, (70, 93))])
def test_features_golden(golden, image, size) -> None:
    meta, want, net = golden
    with torch.no_grad():
        features = net(tensor(1100 + image, [1, 3, *size], -2, 2))
    assert list(features) == list(FEATURES)
    for level, feature in features.items():
        name = f"{level}_{image}_every_8th_channel"
        assert feature.is_contiguous()
        assert_close(feature[:, ::8], want[name], meta["images"][image]["noise"][name])


def dense_attention(block: SwinBlock, x: torch.Tensor) -> torch.Tensor:
    """What a block adds by attention, from all pairs of tokens of the padded map at once."""
    window, shift, attn = block.window, block.shift, block.attn
    batch, height, width, channels = x.shape
    rows, columns = -(-height // window) * window, -(-width // window) * window
    x = F.pad(block.norm1(x), (0, 0, 0, columns - width, 0, rows - height))
    row, column = (
        grid.flatten() for grid in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    )
    # Places after the shift, and on which side of the cut they come to lie.
    moved = [((row - shift) % rows, row < shift), ((column - shift) % columns, column < shift)]
    together = torch.ones(len(row), len(row), dtype=torch.bool)
    near, offsets = together.clone(), []
    for place, wrapped in moved:
        inside = place // window
        together &= inside[:, None] == inside[None]
        near &= wrapped[:, None] == wrapped[None]
        offsets.append(place[:, None] - place[None] + window - 1)
    index = (offsets[0] * (2 * window - 1) + offsets[1]).clamp(0, (2 * window - 1) ** 2 - 1)
    query, key, value = (
        part.view(batch, len(row), attn.heads, -1).transpose(1, 2)
        for part in attn.qkv(x.flatten(1, 2)).chunk(3, -1)
    )
    scores = query @ key.transpose(-2, -1) * attn.scale + attn.relative_position_bias_table[index].permute(
        2, 0, 1
    )
    scores = torch.where(near, scores, scores - 100).masked_fill(~together, -torch.inf)
    out = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, rows, columns, channels)
    return attn.proj(out)[:, :height, :width]


@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    window=st.integers(1, 5),
    shifted=st.booleans(),
    qk_scale=st.sampled_from([None, 0.4]),
    qkv_bias=st.booleans(),
    fused=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_block_is_dense_attention_inside_shifted_windows(
    size, window, shifted, qk_scale, qkv_bias, fused, seed
) -> None:
    torch.manual_seed(seed)
    settings_ = SwinSettings(window=window, qk_scale=qk_scale, qkv_bias=qkv_bias)
    block = SwinBlock(8, 2, settings_, shifted=shifted, drop_path=0.0).double()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    kept = attention_module.EXPLICIT_UP_TO
    attention_module.EXPLICIT_UP_TO = {("cpu", torch.float64): 0 if fused else 10**9}
    try:
        got = block(x)
    finally:
        attention_module.EXPLICIT_UP_TO = kept
    want = x + dense_attention(block, x)
    want = want + block.mlp(block.norm2(want))
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(224, 224), (224, 448)])
def test_stages_are_timms_on_whole_windows(size) -> None:
    """timm pads after the shift, so only sizes without padding agree."""
    names = {"embed_dim": 8, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 4)}
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=size, drop_path_rate=0, **names
    ).eval()
    ours = SwinTransformer(
        SwinSettings(embed_dim=8, depths=names["depths"], heads=names["num_heads"], drop_path_rate=0)
    ).eval()
    state = {
        k.replace("layers_", "layers.").replace(f"{i + 1}.down", f"{i}.down"): v
        for i in range(3)
        for k, v in theirs.state_dict().items()
        if "downsample" not in k or k.startswith(f"layers_{i + 1}.")
    }
    report = load_into(ours, state, source="timm")
    assert not report.unexpected and all(name.startswith("norm") for name in report.missing)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        for got, want in zip(ours(x).values(), theirs(x), strict=True):
            assert torch.allclose(got, F.layer_norm(want, want.shape[-1:]).permute(0, 3, 1, 2), atol=2e-4)


@pytest.mark.parametrize("size", [(33, 50), (64, 64), (7, 90)])
def test_any_size_has_features_rounded_up(size) -> None:
    features = tiny()(torch.randn(2, 3, *size))
    for i, feature in enumerate(features.values()):
        stride = 4 * 2**i
        assert feature.shape == (2, 8 * 2**i, *(-(-side // stride) for side in size))


def test_absolute_positions_are_resized_and_patches_may_go_without_a_norm() -> None:
    net = tiny(absolute_position=True, patch_norm=False, pretrain_size=32, image_channels=1)
    assert net.absolute_pos_embed.shape == (1, 8, 8, 8)
    assert not any("patch_embed.norm" in name for name in net.state_dict())
    first = []
    net.layers[0].register_forward_pre_hook(lambda module, inputs: first.append(inputs[0]))
    image = torch.randn(1, 1, 40, 24)
    net(image)
    place = F.interpolate(net.absolute_pos_embed, size=(10, 6), mode="bicubic")
    assert torch.allclose(first[0], (net.patch_embed.proj(image) + place).permute(0, 2, 3, 1), atol=1e-6)


def test_low_precision_stays_near(golden) -> None:
    net = golden[2]
    image = tensor(1100, [1, 3, 64, 96], -2, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(image)
    with torch.no_grad():
        full = net(image)
    for name, feature in full.items():
        assert (low[name].float() - feature).abs().mean() < 0.05, name


# --- attention with a bias


@pytest.mark.parametrize("limit", [0, 10**9])
def test_attention_takes_a_bias_a_scale_and_dropout(monkeypatch, limit) -> None:
    monkeypatch.setattr(attention_module, "EXPLICIT_UP_TO", {("cpu", torch.float32): limit})
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind(0)
    bias = torch.randn(4, 5, 5, requires_grad=True)
    weights = (query @ key.transpose(-2, -1) * 0.3 + bias).softmax(-1)
    got = attention(query, key, value, bias, scale=0.3)
    assert torch.allclose(got, weights @ value, atol=1e-6)
    assert torch.autograd.grad(got.sum(), bias)[0].shape == bias.shape
    dropped = torch.stack(
        [attention(query, key, torch.ones_like(value), bias, scale=0.3, dropout=0.5) for _ in range(200)]
    )
    assert dropped.std(0).min() > 0.05
    assert torch.allclose(dropped.mean(), torch.tensor(1.0), atol=0.05)


# --- the mask of shifted windows


def test_the_mask_is_made_once_for_a_size() -> None:
    shifted_window_mask.cache_clear()
    net = tiny(depths=(4, 1, 1, 1))
    with torch.inference_mode():
        net(torch.randn(1, 3, 56, 40))
    made = shifted_window_mask.cache_info().misses
    net.train()(torch.randn(2, 3, 56, 40))["res5"].sum().backward()  # a mask of inference mode serves too
    assert made == 1 and shifted_window_mask.cache_info().misses == made
    net(torch.randn(1, 3, 64, 64))
    assert shifted_window_mask.cache_info().misses == made + 1


def test_the_mask_parts_what_the_shift_brought_together() -> None:
    mask = shifted_window_mask(6, 6, 3, torch.device("cpu"))
    assert mask.shape == (4, 9, 9) and set(mask.unique().tolist()) == {-100.0, 0.0}
    assert not mask[0].any()  # the first window has no seam
    parted = [(mask[i, 0] != 0).sum().item() for i in range(4)]
    assert parted == [0, 3, 3, 5]  # columns, rows, both: 2 x 2 of 3 x 3 stay together


def test_the_index_counts_offsets() -> None:
    index = relative_position_index(2)
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


# --- training


def test_checkpointing_changes_memory_and_not_gradients() -> None:
    plain, x = tiny().train(), torch.randn(1, 3, 40, 40)
    saving = SwinTransformer(dataclasses.replace(TINY, checkpointing=True)).train()
    saving.load_state_dict(plain.state_dict())
    calls = []
    saving.layers[0].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for net in (plain, saving):
        sum(feature.square().sum() for feature in net(x).values()).backward()
    assert len(calls) == 2  # the backward pass ran the block again
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    with torch.no_grad():
        saving(x)
    assert len(calls) == 3


def test_drop_path_rises_with_depth_and_rests_in_eval_mode() -> None:
    net, x = tiny(drop_path_rate=0.5), torch.randn(8, 3, 32, 32)
    blocks = [block for stage in net.layers for block in stage.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert torch.equal(net(x)["res5"], net(x)["res5"])
    net.train()
    assert not torch.equal(net(x)["res5"], net(x)["res5"])


def test_dropouts_act_in_training_only() -> None:
    x = torch.randn(1, 3, 32, 32)
    for key in ("drop_rate", "attn_drop_rate"):
        net, plain = tiny(**{key: 0.3}), tiny()
        assert torch.equal(net(x)["res2"], plain(x)["res2"])
        net.train()
        assert not torch.equal(net(x)["res2"], net(x)["res2"])


def test_every_parameter_takes_a_gradient() -> None:
    net = tiny(absolute_position=True).train()
    sum(
        (feature * torch.randn_like(feature)).sum() for feature in net(torch.randn(1, 3, 64, 64)).values()
    ).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_what_no_wanted_feature_needs_takes_none() -> None:
    whole, x = tiny(), torch.randn(1, 3, 40, 40)
    some = SwinTransformer(dataclasses.replace(TINY, out_features=("res2", "res4"))).eval()
    some.load_state_dict(whole.state_dict())  # the names stay
    features = some(x)
    assert list(features) == ["res2", "res4"]
    assert all(torch.equal(feature, whole(x)[name]) for name, feature in features.items())
    sum(feature.square().sum() for feature in features.values()).backward()
    for name, parameter in some.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        unused = name.startswith(("layers.3", "layers.2.downsample", "norm1", "norm3"))
        assert parameter.requires_grad != unused, name


def test_new_weights_are_the_papers() -> None:
    torch.manual_seed(0)
    net = SwinTransformer(dataclasses.replace(TINY, embed_dim=32, heads=(2, 4, 8, 16)))
    weights = net.layers[3].blocks[0].mlp.fc1.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert not net.layers[3].blocks[0].mlp.fc1.bias.any()
    assert net.norm3.weight.eq(1).all() and not net.norm3.bias.any()


# --- loading


def test_the_index_may_be_absent() -> None:
    source, net = tiny(1), tiny(2)
    state = {k: v for k, v in source.state_dict().items() if "relative_position_index" not in k}
    report = load_into(net, state, required=[""])
    assert len(report.loaded) == len(state) and not report.missing
    net.load_state_dict(state)  # strict
    for name, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


OTHERS = {
    "depths": ((2, 1, 4, 1), "DEPTHS [2, 1, 4, 1] (it is [2, 1, 2, 1])"),
    "heads": ((1, 2, 4, 4), "NUM_HEADS [1, 2, 4, 4] (it is [1, 2, 2, 4])"),
    "window": (5, "WINDOW_SIZE 5 (it is 3)"),
    "embed_dim": (16, "EMBED_DIM 16 (it is 8)"),
    "patch_size": (2, "PATCH_SIZE 2 (it is 4)"),
}


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("whole", [True, False])
def test_another_swin_is_one_sentence(key, whole) -> None:
    other, words = OTHERS[key]
    state = tiny(**{key: other}).state_dict()
    holder = torch.nn.ModuleDict({"backbone": tiny()})
    if whole:
        state = {f"backbone.{k}": v for k, v in state.items()}
    with pytest.raises(CheckpointError) as error:
        load_into(holder if whole else holder["backbone"], state)
    assert f"set MODEL.SWIN.{words}, or give" in str(error.value) and "\n" not in str(error.value)
    assert ("'backbone.layers'" in str(error.value)) == whole


def test_fewer_blocks_than_the_model_are_refused_too() -> None:
    with pytest.raises(CheckpointError, match=r"DEPTHS \[2, 1, 1, 1\]"):
        tiny().load_state_dict(tiny(depths=(2, 1, 1, 1)).state_dict(), strict=False)


def test_tables_that_a_loader_left_out_are_missed() -> None:
    state = {k: v for k, v in tiny().state_dict().items() if "relative_position" not in k}
    with pytest.raises(
        CheckpointError, match=r"no 'layers.0.blocks.0.attn.*windows of 3 and 1 heads: set MODEL"
    ):
        tiny().load_state_dict(state, strict=False)


def test_timms_names_name_the_converter() -> None:
    state = tiny().state_dict()
    theirs = {
        k.replace(f"{i}.down", f"{i + 1}.down"): v
        for i in range(3)
        for k, v in state.items()
        if f"{i}.down" in k
    }
    theirs.update({k: v for k, v in state.items() if "downsample" not in k})
    with pytest.raises(
        CheckpointError, match="timm's names: convert the file by tools/convert_backbone.py swin"
    ):
        load_into(tiny(), theirs)


def test_weights_of_other_parts_do_not_concern_it() -> None:
    holder = torch.nn.ModuleDict({"backbone": tiny(), "head": torch.nn.Linear(2, 2)})
    before = copy.deepcopy(holder["backbone"].state_dict())
    holder.load_state_dict({"head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}, strict=False)
    for name, value in holder["backbone"].state_dict().items():
        assert torch.equal(value, before[name])


def test_a_files_architecture_is_read_from_its_tensors() -> None:
    shape = swin_shape({f"a.{k}": v for k, v in tiny().state_dict().items()}, "a.")
    assert (shape.embed_dim, shape.depths, shape.heads, shape.window, shape.patch_size) == (
        TINY.embed_dim,
        TINY.depths,
        TINY.heads,
        TINY.window,
        TINY.patch_size,
    )
    assert swin_shape({"other": torch.zeros(1)}).depths == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depths": (2, 2, 6)}, "MODEL.SWIN.DEPTHS.*4 numbers each"),
        ({"depths": (2, 0, 6, 2)}, "at least one block"),
        ({"heads": (3, 2, 2, 4)}, "8 channels cannot be divided among 3 heads: MODEL.SWIN.EMBED_DIM"),
        ({"out_features": ("res2", "res6")}, "MODEL.SWIN.OUT_FEATURES.*res2, res3, res4, res5"),
        ({"out_features": ()}, "MODEL.SWIN.OUT_FEATURES"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(changes, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(TINY, **changes)
