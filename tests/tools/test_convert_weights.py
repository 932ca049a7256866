"""tools/convert_weights.py: what it prints, writes and refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from convert_weights import main
from PIL import Image
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer as TimmViT
from vit_files import DEPTH, HEADS, PATCH, RECTANGLES, SIZE, WIDTH, files, rectangular, tokens_of

from jepa_plugins.core.checkpoints import read_checkpoint

FILES = files()
TIMM = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
IMAGE = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def written(layout: str, folder: Path) -> Path:
    path = folder / f"{layout}.pth"
    torch.save(FILES[layout][0], path)
    return path


def run(source: Path, *options: object, to: str = "mmseg", suffix: str = ".pth") -> Path:
    out = source.with_name(f"out_{to}{suffix}")
    main([str(source), str(out), "--to", to, *map(str, options)])
    return out


@pytest.mark.parametrize(
    ("layout", "licence"),
    [
        ("ours", "yours"),
        ("ijepa", "CC BY-NC 4.0"),
        ("mae", "CC BY-NC 4.0"),
        ("mocov3", "CC BY-NC 4.0"),
        ("dino", "Apache 2.0"),
        ("ibot", "Apache 2.0"),
        ("dinov2", "Apache 2.0"),
        ("deit", "Apache 2.0"),
        ("beit", "MIT"),
        ("data2vec", "MIT for the code"),
    ],
)
def test_what_is_said(layout: str, licence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(written(layout, tmp_path))
    text = capsys.readouterr().out
    assert f"origin:   {FILES[layout][2]}\n" in text
    assert f"licence:  {licence}" in text
    assert "proof:    exact" in text and f"wrote:    {out}" in text
    assert 'use:      backbone=dict(type="JEPAViT"' in text
    chosen = layout in ("ours", "ijepa", "dino", "ibot")
    assert ("the target encoder" in text) == chosen
    assert ("0.5, 0.5, 0.5" in text) == (layout == "beit")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timms_own_models_load_the_file(suffix: str, tmp_path: Path) -> None:
    for layout, model in (
        ("ours", TimmViT(**TIMM, num_classes=0, global_pool="", class_token=False)),
        ("dinov2", TimmViT(**TIMM, num_classes=0, global_pool="", init_values=1.0)),
        (
            "dinov2_registers",
            TimmViT(
                **TIMM, num_classes=0, global_pool="", init_values=1.0, reg_tokens=2, no_embed_class=True
            ),
        ),
        ("beit", Beit(**TIMM, num_classes=0, global_pool="", init_values=1.0, use_rel_pos_bias=True)),
    ):
        content = read_checkpoint(run(written(layout, tmp_path), to="timm", suffix=suffix))
        model.load_state_dict(content.get("model", content))
        prefix = 0 if layout == "ours" else 1
        want = tokens_of(FILES[layout][1], IMAGE, prefix)
        torch.testing.assert_close(tokens_of(model.eval(), IMAGE, prefix), want, rtol=1e-4, atol=1e-5)


def test_detectron2_names_and_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written("beit", tmp_path)
    weights = read_checkpoint(run(source, to="detectron2"))["model"]
    text = capsys.readouterr().out
    assert (
        "changed by design: the class token dropped; the relative position bias, which detectron2's ViT"
        in text
    )
    assert (
        "cosine similarity 0." in text and "folded LayerScale" in text and "left out the final norm" in text
    )
    assert all(name.startswith("backbone.net.") for name in weights)
    assert not any(
        part in name for name in weights for part in ("cls_token", "gamma", "relative", "net.norm")
    )


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written("dino", tmp_path)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(picture)
    options = ("--class-token", "drop", "--patch-size", 16, "--img-size", 64, 96, "--channels", "bgr")
    out = run(source, *options, "--encoder", "context", "--image", picture, "--heads", 4)
    text = capsys.readouterr().out
    for part in (
        "the context encoder ('student') was taken",
        "4 heads",
        "reversed the channels",
        "the class token dropped; patches resampled from 8 to 16 pixels; positions resampled from 4x4 to 4x6",
        "pixels:   BGR",
        "img_size=(64, 96), patch_size=16",
    ):
        assert part in text
    content = read_checkpoint(out)
    assert content["model"]["pos_embed"].shape == (1, 24, WIDTH) and content["jepa_vit"]["grid"] == [4, 6]


def test_an_origin_that_names_do_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written("mae_encoder", tmp_path)
    run(source)
    text = capsys.readouterr().out
    assert "note:     by its names it may be MAE's, DINO's, iBOT's or timm's" in text
    assert "licence:  not known: see where the file came from\n" in text
    assert "pixels:   RGB in [0, 1], mean and std not known: see where the file came from\n" in text
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 50), (200, 100, 0)).save(picture)
    run(source, "--origin", "timm", "--image", picture)
    text = capsys.readouterr().out
    assert "by its names" not in text and "licence:  Apache 2.0 for the code" in text
    assert "mean and std not known" in text and "proof:    exact" in text
    run(source, "--origin", "MAE")
    assert "RGB in [0, 1], mean (0.485, 0.456, 0.406), std (0.229" in capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_refusals_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = written("ours", tmp_path), tmp_path / "out.pth"
    assert "OUT would replace IN" in refusal(capsys, source, source, "--to", "timm")
    assert "there is no checkpoint" in refusal(capsys, tmp_path / "none.pth", out, "--to", "timm")
    assert "no whole number of patches" in refusal(capsys, source, out, "--to", "timm", "--img-size", 30)
    assert "has no class token to keep" in refusal(
        capsys, source, out, "--to", "timm", "--class-token", "keep"
    )
    torch.save({"encoder.patch_embed.proj.weight": torch.ones(1), "predictor.a": torch.ones(1)}, source)
    assert "holds no 'target_encoder'" in refusal(capsys, source, out, "--to", "timm")
    assert not out.exists()


NUMBERS = {
    ("--patch-size", 0): "--patch-size is at least 1, got 0",
    ("--patch-size", -4): "--patch-size is at least 1, got -4",
    ("--img-size", 0): "--img-size is at least one patch a side, got 0",
    ("--img-size", -64, 64): "--img-size is at least one patch a side, got -64",
    ("--heads", 0): "--heads is at least 1, got 0",
    ("--heads", 7): "--heads 7 is no divisor of the width 128 of",
    ("--grid", -4, -4): "--grid is at least 1 row and 1 column, got -4 -4",
}


@pytest.mark.parametrize("options", NUMBERS)
def test_numbers_that_make_no_sense(
    options: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = written("ours", tmp_path), tmp_path / "out.pth"
    assert NUMBERS[options] in refusal(capsys, source, out, "--to", "mmseg", *options)


def test_heads_that_are_not_those_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = written("beit", tmp_path), tmp_path / "out.pth"
    message = refusal(capsys, source, out, "--to", "mmseg", "--heads", 4)
    assert (
        "--heads 4, but 'blocks.0.attn.relative_position_bias_table'" in message
        and "has 2 columns" in message
    )


def test_incomplete_files_and_pictures_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = written("dino_backbone", tmp_path), tmp_path / "out.pth"
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"no picture")
    assert "picture.png" in refusal(capsys, source, out, "--to", "timm", "--image", picture)
    weights = FILES["dino_backbone"][0]
    for part in ("blocks.1.mlp.fc1.bias", "blocks.0.", "attn.qkv.bias"):
        torch.save({k: v for k, v in weights.items() if part not in k}, source)
        message = refusal(capsys, source, out, "--to", "mmseg")
        assert f"{source} lacks" in message and f"'{part}" in message.replace("blocks.0.attn.qkv", "attn.qkv")
    assert not out.exists()


def test_a_wrong_result_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jepa_plugins.core import vit_convert

    fold = vit_convert.fold_layer_scale

    def wrong(weights):
        return {
            name: value * 1.01 if "fc2.weight" in name else value for name, value in fold(weights).items()
        }

    monkeypatch.setattr(vit_convert, "fold_layer_scale", wrong)
    source, out = written("dinov2", tmp_path), tmp_path / "out.pth"
    message = refusal(capsys, source, out, "--to", "mmseg", "--layer-scale", "fold")
    assert "the result does not compute what" in message and not out.exists()
    assert "proof:    WRONG" in capsys.readouterr().out


WRONG = {
    "one weight": lambda w: {k: -v if k == "blocks.1.attn.proj.bias" else v for k, v in w.items()},
    "two names": lambda w: {k.replace("norm1", "x").replace("norm2", "norm1").replace("x", "norm2"): v
                            for k, v in w.items()},
    "the token's position": lambda w: {k: v.roll(1, 1) if k == "pos_embed" else v for k, v in w.items()},
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_result_beside_a_change_by_design_is_not_written(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = written("mae", tmp_path), tmp_path / "out.pth"
    arguments = (source, out, "--to", "mmseg", "--class-token", "drop")
    with monkeypatch.context() as patch:
        patch.setattr("jepa_plugins.core.vit_convert.target_weights", lambda e, _: WRONG[what](e.weights))
        message = refusal(capsys, *arguments)
    assert "the result does not compute what" in message and "even with the same changes by design" in message
    assert "; the rest WRONG: " in capsys.readouterr().out and not out.exists()
    main([str(argument) for argument in arguments])
    text = capsys.readouterr().out
    assert "proof:    changed by design: the class token dropped; cosine similarity 0." in text
    assert "; the rest exact: " in text and out.exists()


@pytest.mark.parametrize("grid", RECTANGLES)
def test_a_rectangular_grid_of_our_own(grid: tuple[int, int], tmp_path: Path) -> None:
    content, table = rectangular(grid)
    torch.save(content, tmp_path / "own.pth")
    found = read_checkpoint(run(tmp_path / "own.pth"))
    assert found["jepa_vit"]["grid"] == list(grid) and torch.equal(found["model"]["pos_embed"], table)


def test_checkpoints_with_options_need_no_trust_but_others_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(written("mae", tmp_path))  # argparse's Namespace
    assert "proof:    exact" in capsys.readouterr().out
    source, out = tmp_path / "foreign.pth", tmp_path / "out.pth"
    torch.save({**FILES["mae"][0], "path": Path("x")}, source)
    assert f"--trust {source}" in refusal(capsys, source, out, "--to", "timm")
    main([str(source), str(out), "--to", "timm", "--trust", str(source)])
    assert out.exists()
