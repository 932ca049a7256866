"""Files of every known ViT method: recognised, loaded into our ViT, converted, proved."""

from __future__ import annotations

import copy
import json
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from golden_tools import assert_close, fill, gain_of, load, points, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vit_files import (
    DEPTH,
    HEADS,
    PATCH,
    RECTANGLES,
    SIZE,
    WIDTH,
    beit,
    files,
    rectangular,
    some,
    tokens_of,
    under,
    vit,
)

from jepa_plugins.core import vit_convert, vit_proof
from jepa_plugins.core.checkpoints import CheckpointError, save_atomic
from jepa_plugins.core.vit import VisionTransformer, relative_index, resample_positions
from jepa_plugins.core.vit_convert import Wishes, convert, file_content, target_weights
from jepa_plugins.core.vit_proof import plain_model, prove
from jepa_plugins.core.vit_weights import (
    IMAGENET,
    LICENCES,
    NON_COMMERCIAL,
    UNKNOWN_LICENCE,
    Encoder,
    load_encoder,
    read_vit,
    recognise,
)

FILES = files()
IMAGE = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
OF_TWO = ("ours", "ijepa", "dino", "ibot")


def found(layout: str, **options) -> Encoder:
    return recognise(FILES[layout][0], source=layout, **options)


@pytest.mark.parametrize("layout", FILES)
def test_recognised_and_computes_what_its_own_model_does(layout: str) -> None:
    content, model, origin = FILES[layout]
    encoder = recognise(content, source=layout)
    shape = encoder.shape
    assert encoder.origin == origin
    assert (shape.width, shape.depth, shape.heads, shape.patch_size, shape.grid) == (
        *(WIDTH, DEPTH, HEADS, PATCH),
        (SIZE // PATCH,) * 2,
    )
    prefix = int(shape.class_token) + shape.registers
    want = tokens_of(model, IMAGE, prefix)
    # the reference that proofs compare with is right ...
    torch.testing.assert_close(tokens_of(vit_proof.reference(encoder), IMAGE, prefix), want)
    # ... and so is our own model, which has no registers
    if not shape.registers:
        with torch.no_grad():
            got = plain_model(shape, encoder.weights)(IMAGE)[:, prefix:]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", vit_convert.TARGETS)
@pytest.mark.parametrize("layout", FILES)
def test_conversion_is_proved(layout: str, target: str) -> None:
    encoder = found(layout)
    proof = prove(encoder, convert(encoder, target), target)
    shape = encoder.shape
    lost = shape.registers and target != "timm"
    lost = lost or (target == "detectron2" and (shape.class_token or shape.rel_pos_bias))
    assert proof.exact != bool(lost)
    assert bool(proof.by_design) == bool(lost) and proof.right
    assert proof.cosine > (0.5 if lost else 1 - 1e-6)
    assert str(proof).startswith("changed by design" if lost else "exact")


@pytest.mark.parametrize("layout", OF_TWO)
def test_the_target_encoder_unless_asked(layout: str) -> None:
    target, context = found(layout), found(layout, which="context")
    assert any("target encoder" in note for note in target.notes)
    assert not torch.equal(
        target.weights["blocks.0.attn.qkv.weight"], context.weights["blocks.0.attn.qkv.weight"]
    )
    assert torch.equal(target.weights["norm.weight"], found(layout, which="target").weights["norm.weight"])


def test_mocov3_gives_the_base_encoder_unless_asked() -> None:
    online, momentum = "the online encoder ('base_encoder')", "the momentum encoder ('momentum_encoder')"
    assert found("mocov3").notes == [f"{online} was taken, not {momentum}"]
    assert found("mocov3", which="target").notes == [f"{momentum} was taken, not {online}"]


def test_a_proof_sees_a_wrong_weight() -> None:
    encoder = found("dinov2")
    converted = convert(encoder, "detectron2", Wishes(class_token=False))
    good = prove(encoder, converted, "detectron2")
    assert good.right and not good.exact and good.cosine < 1 - 1e-5
    converted.encoder.weights["blocks.1.mlp.fc2.weight"].neg_()
    bad = prove(encoder, converted, "detectron2")
    assert bad.cosine < good.cosine - 0.05 and not bad.right and "the rest WRONG" in str(bad)
    kept = convert(encoder, "mmseg", Wishes(layer_scale=False))
    assert prove(encoder, kept, "mmseg").exact
    kept.encoder.weights["blocks.0.attn.proj.bias"][0] += 0.1
    wrong = prove(encoder, kept, "mmseg")
    assert not wrong.exact and str(wrong).startswith("WRONG")


BY_DESIGN = {
    "class token": ("mae", Wishes(class_token=False)),
    "its row of offsets": ("beit_tuned", Wishes(class_token=False)),
    "bias": ("beit", Wishes(rel_pos_bias=False)),
    "registers": ("dinov2_registers", Wishes(layer_scale=False)),
    "patches": ("ours", Wishes(patch_size=16, bgr=True)),
    "grid": ("beit_tuned", Wishes(img_size=(40, 24))),
}


@pytest.mark.parametrize("case", BY_DESIGN)
def test_a_proof_sees_a_wrong_name_beside_a_change_by_design(case: str) -> None:
    layout, wishes = BY_DESIGN[case]
    encoder = found(layout)
    converted = convert(encoder, "mmseg", wishes)
    good = prove(encoder, converted, "mmseg")
    assert good.right and good.by_design and "; the rest exact: " in str(good)
    weights = converted.encoder.weights
    one, other = "blocks.1.norm1.weight", "blocks.1.norm2.weight"
    weights[one], weights[other] = weights[other], weights[one]
    bad = prove(encoder, converted, "mmseg")
    assert not bad.right and bad.cosine > 0.5  # the similarity alone would not tell


def test_a_proof_sees_wrongly_read_names_beside_a_change_by_design() -> None:
    encoder = found("beit")
    name = "blocks.0.attn.qkv.bias"
    encoder.weights[name] = encoder.weights[name].roll(WIDTH)  # the values' bias among the queries'
    assert not prove(encoder, convert(encoder, "detectron2"), "detectron2").right


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("layout", ["dinov2_registers", "deit_distilled", "no class token"])
def test_registers_stay_in_timms_own_model(layout: str, keep: bool) -> None:
    own = vit(11, class_token=False, reg_tokens=3, no_embed_class=True)
    content, model = FILES[layout][:2] if layout in FILES else (own.state_dict(), own)
    encoder = recognise(content)
    kept = keep and encoder.shape.class_token
    converted = convert(encoder, "timm", Wishes(class_token=None if keep else False))
    line = vit_convert.usage(converted.encoder, "timm")
    loaded = eval(line, {"timm": timm}).eval()
    loaded.load_state_dict(target_weights(converted.encoder, "timm"))
    assert loaded.num_reg_tokens == encoder.shape.registers and loaded.has_class_token == kept
    assert prove(encoder, converted, "timm").right
    if kept == encoder.shape.class_token:
        assert prove(encoder, converted, "timm").exact
        torch.testing.assert_close(tokens_of(loaded, IMAGE, 0), tokens_of(model, IMAGE, 0))
        again = recognise(target_weights(converted.encoder, "timm"))
        assert again.shape == encoder.shape and prove(again, convert(again, "timm"), "timm").exact


def test_a_proof_sees_a_wrong_register() -> None:
    encoder = found("dinov2_registers")
    converted = convert(encoder, "timm")
    for name, other in (("reg_token", 1), ("pos_embed", 1)):
        wrong = copy.deepcopy(converted)
        wrong.encoder.weights[name] = wrong.encoder.weights[name].roll(other, 2)
        assert not prove(encoder, wrong, "timm").right


def test_folded_layer_scale_is_exact_and_gone() -> None:
    encoder = found("dinov2")
    converted = convert(encoder, "timm", Wishes(layer_scale=False))
    assert not any("ls1" in name or "ls2" in name for name in converted.encoder.weights)
    assert converted.exactly == ["folded LayerScale into the layers before it"]
    assert prove(encoder, converted, "timm").exact


@pytest.mark.parametrize("target", vit_convert.TARGETS)
def test_channels_reversed_are_exact_and_reverse_back(target: str) -> None:
    encoder = found("ours")
    bgr = convert(encoder, target, Wishes(bgr=True))
    assert prove(encoder, bgr, target).exact
    name = "patch_embed.proj.weight"
    assert torch.equal(bgr.encoder.weights[name].flip(1), encoder.weights[name])
    if target == "timm":
        return  # its file tells no more than weights
    again = recognise(file_content(bgr, target), heads=HEADS)
    assert again.bgr and prove(again, convert(again, target), target).exact


def test_patches_and_positions_are_resampled_by_design() -> None:
    encoder = found("ours")
    converted = convert(encoder, "mmseg", Wishes(patch_size=16, img_size=(96, 64)))
    assert converted.encoder.shape.grid == (6, 4)
    assert converted.by_design == [
        "patches resampled from 8 to 16 pixels",
        "positions resampled from 4x4 to 6x4",
    ]
    proof = prove(encoder, converted, "mmseg")
    assert proof.right and not proof.exact and -1 <= proof.cosine <= 1


def test_patches_from_14_to_16_keep_a_smooth_network_close() -> None:
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    torch.manual_seed(0)
    model = TimmViT(img_size=56, patch_size=14, embed_dim=64, depth=1, num_heads=1, num_classes=0)
    encoder = recognise(model.state_dict())
    converted = convert(encoder, "mmseg", Wishes(patch_size=16))
    assert converted.encoder.weights["patch_embed.proj.weight"].shape[-2:] == (16, 16)
    assert converted.encoder.shape.img_size == (64, 64)
    assert prove(encoder, converted, "mmseg").cosine > 0.9


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6), prefix=st.integers(0, 1))
def test_relative_index_is_symmetric_about_its_centre(height: int, width: int, prefix: int) -> None:
    index = relative_index((height, width), prefix)[prefix:, prefix:]
    assert len(index) == height * width
    rows = (2 * height - 1) * (2 * width - 1)
    assert torch.equal(index + index.T, torch.full_like(index, rows - 1))
    assert int(index.max()) < rows and index.unique().numel() == rows


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 4), width=st.integers(1, 4))
def test_rectangular_grids_come_back(height: int, width: int) -> None:
    encoder = found("beit_tuned")
    size = (height * PATCH, width * PATCH)
    converted = convert(encoder, "mmseg", Wishes(img_size=size))
    again = recognise(file_content(converted, "mmseg"))
    assert again.shape == converted.encoder.shape and again.shape.grid == (height, width)
    assert prove(again, convert(again, "mmseg"), "mmseg").exact


def test_other_sizes_use_a_resampled_bias() -> None:
    encoder = found("beit_tuned")
    model = plain_model(encoder.shape, encoder.weights)
    image = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        out = model(image)
        wider = convert(encoder, "mmseg", Wishes(img_size=(40, 24))).encoder
        want = plain_model(wider.shape, wider.weights)(image)
    torch.testing.assert_close(out, want)


def test_dropping_the_class_token_drops_its_rows() -> None:
    encoder = found("beit_tuned")
    after = convert(encoder, "mmseg", Wishes(class_token=False)).encoder
    assert after.weights["pos_embed"].shape[1] == 16 and "cls_token" not in after.weights
    assert after.weights["blocks.0.attn.relative_position_bias_table"].shape[0] == 49
    assert not after.shape.class_token


def test_converted_files_tell_their_shape(tmp_path: Path) -> None:
    encoder = found("beit")
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"file{suffix}"
        save_atomic(file_content(convert(encoder, "mmseg"), "mmseg"), path)
        again = read_vit(path)
        assert again.origin == "BEiT" and again.shape == encoder.shape
        assert tuple(again.pixels[0]) == (0.5, 0.5, 0.5)


def test_names_of_the_targets(golden_dir: Path) -> None:
    encoder = found("ours")
    d2 = set(target_weights(convert(encoder, "detectron2").encoder, "detectron2"))
    listed = json.loads((golden_dir / "state_dicts" / "vitdet_mask_rcnn_b.json").read_text())["keys"]
    published = {name for name in listed if name.startswith("backbone.net.") and "rel_pos" not in name}
    assert d2 == {
        name
        for name in published
        if not name.startswith(tuple(f"backbone.net.blocks.{i}." for i in range(2, 12)))
    }
    assert set(target_weights(encoder, "timm")) == set(vit(class_token=False).state_dict())
    assert set(target_weights(found("beit_tuned"), "timm")) - {"pos_embed"} == set(beit().state_dict())


@pytest.mark.parametrize("name", ["ijepa_vit_base", "mae_vit_base", "timm_vit_base"])
def test_lists_of_published_names(golden_dir: Path, name: str) -> None:
    listed = json.loads((golden_dir / "state_dicts" / f"{name}.json").read_text())

    def small(shapes: dict) -> dict:
        kept = {
            k: v
            for k, v in shapes.items()
            if not k.split("blocks.")[-1].startswith(tuple("23456789") + ("10.", "11."))
        }
        return {k: torch.zeros(v) for k, v in kept.items()}

    if name == "ijepa_vit_base":
        content = {
            part: small(listed["checkpoint"][part]) for part in ("encoder", "predictor", "target_encoder")
        }
        want, rows = "I-JEPA", 196
    elif name == "mae_vit_base":
        content, want, rows = {"model": small(listed["keys"])}, "MAE", 197
    else:
        content, want, rows = small(listed["keys"]), "timm", 197
    encoder = recognise(content)
    assert encoder.origin == want and (encoder.licence == NON_COMMERCIAL) == (want != "timm")
    assert encoder.shape.depth == 2 and encoder.shape.heads == 12
    assert encoder.weights["pos_embed"].shape == (1, rows, 768)


def bare(seed: int = 3, head: bool = False, **options) -> dict:
    """timm's names."""
    weights = vit(seed, **options).state_dict()
    return {**weights, "head.weight": some(10, WIDTH), "head.bias": some(10)} if head else dict(weights)


def pooled(weights: dict) -> dict:
    """With the norm after pooling that MAE's fine-tuning has in place of the final norm."""
    return {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: v
            for name, v in weights.items()}  # fmt: skip


V2 = {"img_size": 56, "patch_size": 14, "init_values": 0.1}
ORIGINS = {
    "MAE, fine-tuned": ({"model": pooled(bare(head=True))}, "MAE", NON_COMMERCIAL),
    "MoCo v3, linear": (
        {"arch": "vit_small", "state_dict": under("module.", bare(head=True))},
        "MoCo v3",
        None,
    ),
    "timm's training": ({"arch": "vit_small_patch16_224", "state_dict": bare(head=True)}, "timm", None),
    "timm's DINOv2": (bare(**V2), "DINOv2", None),
    "timm's DINOv2, registers": (bare(**V2, reg_tokens=4, no_embed_class=True), "DINOv2", None),
    "timm's DeiT III": (bare(init_values=0.1, no_embed_class=True, head=True), "timm", None),
    "bare": (bare(), "DINO", UNKNOWN_LICENCE),
    "bare, below model": ({"model": bare()}, "MAE", UNKNOWN_LICENCE),
    "bare, below state_dict": ({"state_dict": bare()}, "iBOT", UNKNOWN_LICENCE),
    "bare, no token": (bare(class_token=False), "an encoder without class token", UNKNOWN_LICENCE),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_origins_of_bare_encoders(case: str) -> None:
    content, origin, licence = ORIGINS[case]
    encoder = recognise(content)
    assert encoder.origin == origin and encoder.licence == (licence or LICENCES[origin])
    assert encoder.certain != any(note.startswith("by its names it may be") for note in encoder.notes)
    assert encoder.certain == (origin not in ("DINO", "iBOT") and case != "bare, below model")


@pytest.mark.parametrize("case", ORIGINS)
def test_pixels_are_told_only_where_they_are_known(case: str) -> None:
    encoder = recognise(ORIGINS[case][0])
    known = encoder.certain and encoder.origin in LICENCES and encoder.origin != "timm"
    assert encoder.pixels == (IMAGENET if known else None)
    again = recognise(file_content(convert(encoder, "mmseg"), "mmseg"))
    assert again.pixels == encoder.pixels
    assert recognise(ORIGINS[case][0], origin="timm").pixels is None
    assert recognise(ORIGINS[case][0], origin="MAE").pixels == IMAGENET


def test_pixels_of_other_channels_are_not_known() -> None:
    assert recognise(bare(in_chans=4), origin="MAE").pixels is None


def test_an_origin_stays_uncertain_in_a_converted_file() -> None:
    guessed = recognise({"model": bare()})
    again = recognise(file_content(convert(guessed, "mmseg"), "mmseg"))
    assert again.origin == "MAE" and not again.certain and again.licence == UNKNOWN_LICENCE
    given = recognise({"model": bare()}, origin="MAE")
    again = recognise(file_content(convert(given, "mmseg"), "mmseg"))
    assert again.certain and again.licence == NON_COMMERCIAL


def test_mocov3s_small_classifier_has_twelve_heads() -> None:
    options = {"img_size": 16, "patch_size": 8, "width": 384, "depth": 1, "class_token": True}
    weights = {**VisionTransformer(**options, heads=12).state_dict(), "head.weight": some(10, 384)}
    content = {"arch": "vit_small", "state_dict": under("module.", weights), "epoch": 1}
    assert recognise(content).shape.heads == 12
    assert recognise({"model": weights}).shape.heads == 6


# --- rectangular grids --------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", RECTANGLES)
@pytest.mark.parametrize("part", ["pretraining", "segmentor"])
def test_our_files_tell_their_grid(grid: tuple[int, int], part: str) -> None:
    content, table = rectangular(grid, part=part)
    encoder = recognise(content)
    assert encoder.shape.grid == grid and torch.equal(encoder.weights["pos_embed"], table)
    assert recognise(content, expected=(grid[1], grid[0])).shape.grid == grid


@pytest.mark.parametrize("grid", RECTANGLES)
def test_a_models_grid_stands_in_for_a_file_that_does_not_tell(grid: tuple[int, int]) -> None:
    content, table = rectangular(grid, told=False)
    encoder = recognise(content, heads=2, expected=grid)
    assert encoder.shape.grid == grid and torch.equal(encoder.weights["pos_embed"], table)
    assert recognise(content, heads=2, grid=grid).shape.grid == grid
    if grid != (8, 32):  # which may be 16x16
        with pytest.raises(
            CheckpointError, match=f"holds {grid[0] * grid[1]} positions, which are no square"
        ):
            recognise(content, heads=2, expected=(5, 5))


def test_a_grid_that_fits_without_the_tokens_row_is_second() -> None:
    """21x21 and a class token make as many rows as 17x26."""
    weights = VisionTransformer(84, 4, width=16, depth=1, heads=2, class_token=True).state_dict()
    assert recognise(weights, heads=2, expected=(17, 26)).shape.grid == (21, 21)
    del weights["cls_token"]  # detectron2 keeps the row
    encoder = recognise(under("backbone.net.", weights), heads=2)
    assert encoder.shape.grid == (21, 21) and encoder.weights["pos_embed"].shape[1] == 441


def resampled_square(encoder: Encoder, size: tuple[int, int]) -> None:
    """The encoder's 4x4 positions arrive in a model of `size` pixels as bicubic resampling gives them."""
    model = model_like(encoder, img_size=size)
    report = load_encoder(model, encoder, "file.pth")
    table = encoder.weights["pos_embed"][:, model.prefix :]
    want = bicubic(table, (4, 4), model.grid)
    torch.testing.assert_close(model.pos_embed.data[:, model.prefix :], want)
    assert "pos_embed" in report.resized


@pytest.mark.parametrize("layout", ["mae", "ijepa", "dino_backbone", "timm", "dinov2"])
def test_a_square_of_another_method_is_not_taken_for_the_models_rectangle(layout: str) -> None:
    encoder = found(layout, expected=(2, 8))
    assert encoder.shape.grid == (4, 4)
    assert "its 16 positions were taken for 4x4, not the model's 2x8; if that is wrong, give --grid" in str(
        encoder.notes
    )
    resampled_square(encoder, (2 * PATCH, 8 * PATCH))
    assert not any("--grid" in note for note in found(layout, expected=(4, 4)).notes)


def test_a_square_table_of_offsets_is_not_taken_for_the_models_rectangle() -> None:
    encoder = found("beit", expected=(1, 25))
    assert encoder.shape.grid == (4, 4)
    assert "its 49 relative positions were taken for 4x4, not the model's 1x25" in str(encoder.notes)


def test_a_grid_that_is_assumed_is_noted() -> None:
    content, _ = rectangular((8, 32), told=False)
    notes = str(recognise(content, heads=2, expected=(8, 32)).notes)
    assert (
        "its 256 positions were taken for 8x32, as the model has, not 16x16; if that is wrong, give" in notes
    )
    weights = VisionTransformer((24, 32), 8, width=64, depth=1, heads=1, class_token=True).state_dict()
    notes = str(recognise(weights, expected=(3, 4)).notes)
    assert "its 12 positions were taken for 3x4, as the model has; if that is wrong, give --grid" in notes


def token_rectangle(grid: tuple[int, int] = (3, 5), **options) -> dict:
    return dict(bare(img_size=(grid[0] * PATCH, grid[1] * PATCH), **options))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("expected", [None, (4, 4), (2, 8)])
def test_a_tokens_row_is_not_taken_for_a_patch(wrapped: bool, expected: tuple[int, int] | None) -> None:
    """3x5 patches and a class token make as many rows as 4x4."""
    weights = token_rectangle()
    content = {"model": weights} if wrapped else weights
    with pytest.raises(CheckpointError, match="holds 15 positions, which are no square: give --grid"):
        recognise(content, expected=expected)
    for options in ({"grid": (3, 5)}, {"expected": (3, 5)}):
        encoder = recognise(content, **options)
        assert encoder.shape.grid == (3, 5)
        assert torch.equal(encoder.weights["pos_embed"], weights["pos_embed"])


def test_a_table_without_the_tokens_row_is_noted_where_it_is_a_guess() -> None:
    guessed = recognise(token_rectangle(init_values=0.1, head=True))
    assert guessed.origin == "timm" and guessed.shape.grid == (4, 4)
    assert "taken for 4x4 patches without a row for its class token; if that is wrong, give --grid" in str(
        guessed.notes
    )
    told = recognise(token_rectangle(init_values=0.1, head=True), grid=(3, 5))
    assert told.shape.grid == (3, 5) and not any("--grid" in note for note in told.notes)
    headless = token_rectangle((4, 4), init_values=0.1, no_embed_class=True)
    assert recognise(headless).shape.grid == (4, 4)
    plain = token_rectangle((4, 4), no_embed_class=True)
    with pytest.raises(CheckpointError, match="holds 15 positions, which are no square"):
        recognise(plain)
    encoder = recognise(plain, grid=(4, 4))
    assert encoder.shape.grid == (4, 4) and not encoder.weights["pos_embed"][:, 0].any()
    assert found("deit3").shape.grid == (4, 4) and not any("--grid" in note for note in found("deit3").notes)


def test_a_row_without_a_token_is_detectron2s_alone() -> None:
    """2x5 patches are as many as 3x3 and a token."""
    weights = {k: v for k, v in token_rectangle((3, 3)).items() if k != "cls_token"}
    with pytest.raises(CheckpointError, match="holds 10 positions, which are no square: give --grid"):
        recognise(weights)
    encoder = recognise(under("backbone.net.", weights))
    assert encoder.shape.grid == (3, 3) and encoder.weights["pos_embed"].shape[1] == 9
    assert "taken for 3x3 patches after a row of no token; if that is wrong, give --grid" in str(
        encoder.notes
    )


def test_a_configuration_that_is_not_the_files() -> None:
    content, _ = rectangular((10, 12))
    content["meta"]["cfg"] = content["meta"]["cfg"].replace("(40, 48)", "(40, 44)")
    with pytest.raises(CheckpointError, match="file.pth holds 120 positions, not 10x11: give --grid"):
        recognise(content, source="file.pth")
    for text in (
        "model = dict(",
        "model = build()",
        "model = dict(backbone=3)",
        "model = dict(img_size='a')",
    ):
        content["meta"]["cfg"] = text
        assert recognise(content, heads=2, grid=(10, 12)).shape.grid == (10, 12)


@pytest.mark.parametrize("grid", RECTANGLES)
def test_rectangles_load_into_our_vit(grid: tuple[int, int]) -> None:
    content, table = rectangular(grid)
    model = VisionTransformer(64, 4, width=16, depth=1, heads=2)
    load_encoder(model, recognise(content), "file.pth")
    torch.testing.assert_close(model.pos_embed.data, bicubic(table, grid, (16, 16)))


def bicubic(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    image = table.transpose(1, 2).unflatten(2, old)
    return torch.nn.functional.interpolate(image, new, mode="bicubic").flatten(2).transpose(1, 2)


@pytest.mark.parametrize("prefix", [0, 1])
def test_grids_of_as_many_patches_are_resampled(prefix: int) -> None:
    table = torch.randn(1, prefix + 256, 8)
    got = resample_positions(table, (8, 32), (16, 16), prefix)
    torch.testing.assert_close(got[:, prefix:], bicubic(table[:, prefix:], (8, 32), (16, 16)))
    assert torch.equal(got[:, :prefix], table[:, :prefix])
    assert resample_positions(table, (8, 32), (8, 32), prefix) is table
    assert resample_positions(table.bfloat16(), (8, 32), (4, 4), prefix).dtype == torch.bfloat16


# --- MAE's golden features ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mae() -> tuple[dict, dict, Encoder]:
    meta, arrays = load("mae_features")
    config = meta["config"]
    width, depth = config["embed_dim"], config["depth"]
    shapes = VisionTransformer(64, 8, width=width, depth=depth, heads=config["num_heads"], class_token=True)
    weights = OrderedDict()
    for name, value in shapes.state_dict().items():
        if name == "pos_embed":
            weights[name] = torch.from_numpy(arrays["pos_embed"])[None]
        else:
            weights[name] = torch.from_numpy(fill(name, value.shape, gain_of(name, meta["gains"])))
    content = {
        "model": {**weights, "decoder_embed.weight": some(64, width), "decoder_blocks.0.norm1.bias": some(64)}
    }
    return meta, arrays, recognise(content, heads=config["num_heads"])


def test_mae_latent_golden(mae: tuple[dict, dict, Encoder]) -> None:
    meta, arrays, encoder = mae
    assert encoder.origin == "MAE"
    keep = torch.from_numpy(points(3, 64)).argsort(dim=1)[:, :16]
    with torch.no_grad():
        latent = plain_model(encoder.shape, encoder.weights)(tensor(900, [3, 3, 64, 64], -2, 2), keep)
    assert_close(latent, arrays["latent"], meta["noise"]["latent"])


def test_mae_probe_features_golden(mae: tuple[dict, dict, Encoder]) -> None:
    meta, arrays, encoder = mae
    larger = convert(encoder, "mmseg", Wishes(img_size=(96, 96))).encoder
    assert_close(larger.weights["pos_embed"][0], arrays["probe_pos_embed"])
    model = plain_model(larger.shape, larger.weights)
    images = tensor(901, [3, 3, 96, 96], -2, 2)
    with torch.no_grad():
        assert_close(model(images)[:, 0], arrays["probe_cls_features"], meta["noise"]["latent"])
        model.norm = torch.nn.Identity()
        pooled = model(images)[:, 1:].mean(1)
        norm = torch.nn.LayerNorm(96, eps=1e-6)
        for name, value in norm.named_parameters():
            value.copy_(torch.from_numpy(fill(f"fc_norm.{name}", value.shape, gain_of(name, meta["gains"]))))
        assert_close(norm(pooled), arrays["probe_global_pool_features"], meta["noise"]["latent"])


# --- loading into our model ---------------------------------------------------------------------------


def model_like(encoder: Encoder, **changes) -> VisionTransformer:
    shape = encoder.shape
    options = {
        "width": shape.width,
        "depth": shape.depth,
        "heads": shape.heads,
        "class_token": shape.class_token,
        "init_values": 0.1 if shape.layer_scale else None,
        "rel_pos_bias": shape.rel_pos_bias,
        **changes,
    }
    return VisionTransformer(options.pop("img_size", shape.img_size), options.pop("patch", PATCH), **options)


@pytest.mark.parametrize("layout", ["ours", "ijepa", "mae", "dinov2", "beit"])
def test_published_files_load_directly(layout: str) -> None:
    encoder = found(layout)
    model = model_like(encoder).eval()
    report = load_encoder(model, encoder, layout)
    assert not report.missing and not report.unexpected and not report.resized
    with torch.no_grad():
        got = model(IMAGE)[:, model.prefix :]
    torch.testing.assert_close(got, tokens_of(FILES[layout][1], IMAGE, model.prefix), rtol=1e-4, atol=1e-5)


def test_a_load_says_what_it_did() -> None:
    encoder = found("ours")
    report = str(load_encoder(model_like(encoder, img_size=64, depth=1), encoder, "file.pth"))
    assert "resized: pos_embed" in report
    assert "blocks.1" in report and "encoder.* (" in report and "predictor.* (1)" in report


BAD_LOADS = {
    "class token": (
        "mae",
        {"class_token": False},
        "has a class token and the model has not: set class_token, or",
    ),
    "no class token": ("ours", {"class_token": True}, "has not a class token, which the model has"),
    "scale": ("dinov2", {"init_values": None}, "has LayerScale and the model has not: set layer_scale"),
    "bias": ("beit", {"rel_pos_bias": False}, "has a relative position bias and the model has not"),
    "patch": ("ours", {"patch": 4}, "patches of 8 pixels and the model of 4: set patch_size=8, or convert"),
    "depth": ("ours", {"depth": 3}, "has 2 blocks and the model 3"),
    "width": ("ours", {"width": 64}, "holds weights of another architecture"),
}


@pytest.mark.parametrize("case", BAD_LOADS)
def test_what_does_not_fit_is_one_sentence(case: str) -> None:
    layout, changes, message = BAD_LOADS[case]
    encoder = found(layout)
    with pytest.raises(CheckpointError, match="file.pth") as error:
        load_encoder(model_like(encoder, **changes), encoder, "file.pth")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_registers_must_be_converted_first() -> None:
    encoder = found("dinov2_registers")
    with pytest.raises(CheckpointError, match="further tokens, which the model has not: convert the file"):
        load_encoder(model_like(encoder), encoder, "file.pth")


# --- bad files ----------------------------------------------------------------------------------------


def broken(name: str) -> tuple[dict, dict]:
    """(content, options) of a file that cannot be used."""
    plain = vit(1, class_token=False).state_dict()
    if name == "no target":
        return {"state_dict": {**under("encoder.", plain), "predictor.w": some(2)}}, {}
    if name == "no target, I-JEPA":
        return {"encoder": dict(plain), "predictor": {"a": some(1)}}, {}
    if name == "one encoder":
        return dict(plain), {"which": "context"}
    if name == "resnet":
        return {"layer1.0.conv1.weight": some(4, 4, 1, 1)}, {}
    if name == "norm before":
        return {**plain, "norm_pre.weight": some(WIDTH), "norm_pre.bias": some(WIDTH)}, {}
    if name == "swiglu":
        return {**plain, "blocks.0.mlp.w12.weight": some(4, 4)}, {}
    if name == "decomposed":
        return {"model": {**under("backbone.net.", {**plain, "blocks.0.attn.rel_pos_h": some(7, 64)})}}, {}
    if name == "rectangle":
        return {**plain, "pos_embed": some(1, 12, WIDTH)}, {}
    if name == "wrong grid":
        return dict(plain), {"grid": (3, 4)}
    if name == "nan":
        return {**plain, "norm.bias": torch.full((WIDTH,), float("nan"))}, {}
    if name in INCOMPLETE:
        return {k: v for k, v in plain.items() if not re.fullmatch(INCOMPLETE[name], k)}, {}
    if name == "half of BEiT's biases":
        weights = beit(9).state_dict()
        return {"model": {k: v for k, v in weights.items() if k != "blocks.1.attn.v_bias"}}, {}
    if name == "one table of offsets":
        weights = beit(9).state_dict()
        return {k: v for k, v in weights.items() if k != "blocks.1.attn.relative_position_bias_table"}, {}
    if name == "shape":
        return {**plain, "blocks.1.attn.proj.weight": some(WIDTH, 5)}, {}
    if name == "flat patches":
        return {**plain, "patch_embed.proj.weight": some(WIDTH, 192)}, {}
    if name == "wide MLP":
        wide = {
            "mlp.fc1.weight": some(300, WIDTH),
            "mlp.fc1.bias": some(300),
            "mlp.fc2.weight": some(WIDTH, 300),
        }
        return {**plain, **{f"blocks.{i}.{k}": v for i in range(DEPTH) for k, v in wide.items()}}, {}
    if name == "heads":
        odd = VisionTransformer(16, 8, width=48, depth=1, heads=2).state_dict()
        return dict(odd), {}
    assert name == "positions"
    return {k: v for k, v in plain.items() if k != "pos_embed"}, {}


INCOMPLETE = {
    "a bias": r"blocks\.1\.mlp\.fc1\.bias",
    "a block": r"blocks\.0\..*",
    "biases of attention": r"blocks\.\d\.attn\.qkv\.bias",
    "half a norm": r"norm\.bias",
    "all blocks": r"blocks\..*",
}
BROKEN = {
    "a bias": "lacks 1 of the 27 tensors of a plain ViT of 2 blocks, for instance 'blocks.1.mlp.fc1.bias'",
    "a block": "lacks 12 of the 27 tensors of a plain ViT of 2 blocks, for instance 'blocks.0.attn.proj.bias'",
    "biases of attention": "lacks 2 of the 27 tensors of a plain ViT of 2 blocks, for instance 'blocks.0.attn.qkv",
    "half a norm": "lacks 1 of the 27 tensors of a plain ViT of 2 blocks, for instance 'norm.bias'",
    "all blocks": "holds no blocks of a ViT",
    "half of BEiT's biases": "lacks 'blocks.1.attn.v_bias' beside 'blocks.1.attn.q_bias'",
    "one table of offsets": "for instance 'blocks.1.attn.relative_position_bias_table'",
    "shape": "'blocks.1.attn.proj.weight' has the shape (128, 5), not (128, 128)",
    "flat patches": "'patch_embed.proj.weight' has the shape (128, 192)",
    "wide MLP": "its MLP is not four times as wide as its tokens ('blocks.0.mlp.fc1.weight')",
    "no target": "holds no 'target_encoder': give a whole pre-training checkpoint, or take its other encoder",
    "no target, I-JEPA": "holds no 'target_encoder'",
    "one encoder": "holds one encoder only: leave --encoder context out",
    "resnet": "holds no plain ViT: it looks like a torchvision or timm ResNet",
    "norm before": "holds a norm before its blocks (CLIP's), which the plain ViT has not ('norm_pre.weight')",
    "swiglu": "a gated MLP",
    "decomposed": "relative positions of detectron2's kind",
    "rectangle": "holds 12 positions, which are no square: give --grid",
    "wrong grid": "holds 16 positions, not 3x4",
    "nan": "NaN or infinite",
    "heads": "are not known: give --heads",
    "positions": "holds no positions",
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_files_are_one_sentence(case: str) -> None:
    content, options = broken(case)
    with pytest.raises(CheckpointError, match="file.pth") as error:
        recognise(content, source="file.pth", **options)
    assert BROKEN[case] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wishes", "target", "message"),
    [
        (Wishes(class_token=True), "detectron2", "has no class token"),
        (Wishes(layer_scale=True), "detectron2", "has no LayerScale"),
        (Wishes(img_size=(30, 32)), "mmseg", "is no whole number of patches of 8"),
    ],
)
def test_wishes_that_cannot_be_met(wishes: Wishes, target: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(found("dinov2"), target, wishes)


@pytest.mark.parametrize("size", [0, -64])
def test_sizes_that_make_no_sense(size: int) -> None:
    with pytest.raises(ValueError, match=f"--patch-size is at least 1, got {size}"):
        Wishes(patch_size=size)
    with pytest.raises(ValueError, match=f"--img-size is at least one patch a side, got {size}"):
        Wishes(img_size=(32, size))


def test_converting_leaves_the_source_alone() -> None:
    encoder = found("beit")
    before = copy.deepcopy(encoder.weights)
    convert(encoder, "detectron2", Wishes(bgr=True, patch_size=16, img_size=(64, 64)))
    assert encoder.weights.keys() == before.keys()
    assert all(torch.equal(encoder.weights[k], before[k]) for k in before)
