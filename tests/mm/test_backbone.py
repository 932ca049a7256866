"""JEPAViT: maps of images of any size, what is frozen, and loading by `init_cfg` with a report."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_tiny import tiny_config, train, write_images

pytest.importorskip("mmengine")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from vit_files import RECTANGLES, rectangular  # noqa: E402

from jepa_plugins.core.checkpoints import CheckpointError  # noqa: E402
from jepa_plugins.core.vit import VisionTransformer, resample_positions  # noqa: E402
from jepa_plugins.core.vit_convert import convert, file_content  # noqa: E402
from jepa_plugins.core.vit_weights import read_vit  # noqa: E402
from jepa_plugins.mm.backbone import FeatureBatchNorm, JEPAViT  # noqa: E402

ARCH = {"width": 24, "depth": 3, "heads": 2}


def build(**options: Any) -> JEPAViT:
    values = {"arch": ARCH, "img_size": 32, "patch_size": 4, "out_indices": (0, 2), **options}
    return MODELS.build({"type": "JEPAViT", **values})


@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_any_size_gives_maps_of_whole_patches(height: int, width: int) -> None:
    maps = build()(torch.randn(1, 3, height, width))
    assert [tuple(x.shape) for x in maps] == [(1, 24, -(-height // 4), -(-width // 4))] * 2
    assert all(torch.isfinite(x).all() for x in maps)


def test_maps_are_the_encoders_tokens() -> None:
    model = build(final_norm=True, out_indices=(-1,)).eval()
    same = VisionTransformer(32, 4, **ARCH).eval()
    same.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 24)
    (got,) = model(images)
    torch.testing.assert_close(got, same(images).transpose(1, 2).unflatten(2, (8, 6)))


def test_the_padding_is_of_zeros_below_and_right() -> None:
    model, images = build().eval(), torch.randn(1, 3, 30, 27)
    padded = torch.zeros(1, 3, 32, 28)
    padded[..., :30, :27] = images
    for got, want in zip(model(images), model(padded), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", [{"class_token": True}, {"layer_scale": 0.1}, {"rel_pos_bias": True}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_of_other_methods_train(options: dict[str, Any], checkpointing: bool) -> None:
    model = build(**options, checkpointing=checkpointing, drop_path=0.0).train()
    sum(x.square().mean() for x in model(torch.randn(2, 3, 32, 20))).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_blocks_after_the_last_map_are_not_built() -> None:
    model = build(out_indices=(0, 1))
    assert len(model.blocks) == 2 and not any(
        name.startswith(("norm", "blocks.2")) for name in model.state_dict()
    )


@pytest.mark.parametrize("stages", [-1, 0, 2, 3])
def test_frozen_stages(stages: int) -> None:
    model = build(frozen_stages=stages, drop_path=0.5, class_token=True, train_positions=True).train()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    first = {"pos_embed", "cls_token", "patch_embed.proj.weight"}
    assert first.isdisjoint(trains) == (stages >= 0)
    for i, block in enumerate(model.blocks):
        assert block.training == (i >= stages)
        assert (f"blocks.{i}.mlp.fc1.weight" in trains) == (i >= stages)


def test_frozen_never_trains_nor_drops() -> None:
    model = build(frozen=True, drop_path=0.9).train()
    assert not any(p.requires_grad for p in model.parameters())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images)[1], model(images)[1]) and not model.training


def test_positions_train_on_request() -> None:
    assert not build().pos_embed.requires_grad
    assert build(train_positions=True).pos_embed.requires_grad


# --- loading ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that DMT-JEPA's pre-training wrote."""
    folder = tmp_path_factory.mktemp("pretrained")
    source = write_images(folder / "images", 4)
    arch = {"model__arch": ARCH, "train_cfg__steps": 2}
    schedule = [{"type": "WarmupCosineLR", "start": 1e-4, "final": 1e-6, "warmup_steps": 1}]
    train(tiny_config(source, folder, **arch, param_scheduler=schedule))
    return folder / "iter_2.pth"


def loaded(path: Path, caplog: pytest.LogCaptureFixture | None = None, **options: Any) -> JEPAViT:
    model = build(
        init_cfg={"type": "Pretrained", "checkpoint": str(path), **options.pop("init", {})}, **options
    )
    model.init_weights()
    return model


def test_a_pretraining_checkpoint_loads_directly(pretrained: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = torch.load(pretrained, weights_only=True)["state_dict"]
    with caplog.at_level(logging.INFO):
        model = loaded(pretrained, final_norm=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f"target_encoder.{name}"])
    other = loaded(pretrained, final_norm=True, init={"encoder": "context"})
    assert torch.equal(other.norm.weight, weights["encoder.norm.weight"])
    assert not torch.equal(model.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_the_report(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("jepa_plugins.mm.backbone.print_log", lambda text, **_: said.append(text))
    loaded(pretrained, img_size=(32, 48), out_indices=(0, 1))
    (text,) = said
    for part in (
        "the target encoder ('target_encoder') was taken",
        "tensors loaded",
        "resized: pos_embed",
        "left out: blocks.2",
        "encoder.* (",
        "norm.weight",
    ):
        assert part in text


def test_a_converted_file_loads(pretrained: Path, tmp_path: Path) -> None:
    encoder = read_vit(pretrained)
    assert encoder.shape.heads == 2  # by the configuration that the checkpoint keeps
    for target in ("mmseg", "timm", "detectron2"):
        path = tmp_path / f"{target}.pth"
        torch.save(file_content(convert(encoder, target), target), path)
        model = loaded(path)
        assert torch.equal(model.blocks[1].attn.qkv.weight, encoder.weights["blocks.1.attn.qkv.weight"])
    with pytest.raises(CheckpointError, match="lacks 2 of the .* tensors"):
        loaded(tmp_path / "detectron2.pth", final_norm=True)


@pytest.mark.parametrize("part", ["pretraining", "segmentor"])
@pytest.mark.parametrize("grid", RECTANGLES)
def test_a_rectangular_grid_of_our_own(grid: tuple[int, int], part: str, tmp_path: Path) -> None:
    """By the file's configuration, else by the model's size."""
    arch = {"arch": {"width": 16, "depth": 1, "heads": 2}, "out_indices": (0,)}
    size = (grid[0] * 4, grid[1] * 4)
    for told in (True, False):
        content, table = rectangular(grid, told, part)
        torch.save(content, tmp_path / "own.pth")
        assert torch.equal(loaded(tmp_path / "own.pth", img_size=size, **arch).pos_embed, table)
        if told:
            other = loaded(tmp_path / "own.pth", img_size=64, **arch)
            assert torch.equal(other.pos_embed, resample_positions(table, grid, (16, 16)))


def test_weights_load_once_and_before_a_whole_models(pretrained: Path) -> None:
    model = loaded(pretrained)
    with torch.no_grad():
        model.pos_embed.zero_()
    model.init_weights()
    assert not model.pos_embed.any()


BAD = {
    "arch": ({"arch": "giant"}, "backbone.arch is one of tiny"),
    "arch keys": ({"arch": {"width": 24}}, "backbone.arch needs width, depth and heads"),
    "heads": ({"arch": {**ARCH, "heads": 5}}, "5 heads do not divide the width 24"),
    "indices": ({"out_indices": (2, 0)}, "ascending numbers of blocks from 0 to 2"),
    "far index": ({"out_indices": (3,)}, "ascending numbers of blocks"),
    "frozen": ({"frozen_stages": 4}, "frozen_stages is -1 to 3"),
    "init": ({"init_cfg": {"type": "Xavier"}}, "backbone.init_cfg of JEPAViT is None or"),
    "size": ({"img_size": 30}, "is no whole number of 4x4 patches"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_sentence(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_bad_checkpoints(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        loaded(tmp_path / "missing.pth")
    content = torch.load(pretrained, weights_only=True)
    kept = {k: v for k, v in content["state_dict"].items() if not k.startswith("target_encoder")}
    torch.save({"state_dict": kept}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match="half.pth holds no 'target_encoder'"):
        loaded(tmp_path / "half.pth")
    assert loaded(tmp_path / "half.pth", init={"encoder": "context"}).is_init
    with pytest.raises(CheckpointError, match="patches of 4 pixels and the model of 8: set patch_size=4"):
        loaded(pretrained, patch_size=8)
    with pytest.raises(CheckpointError, match="has not a class token, which the model has"):
        loaded(pretrained, class_token=True)


def test_feature_batch_norm() -> None:
    neck = MODELS.build({"type": "FeatureBatchNorm", "channels": 6, "maps": 2})
    assert isinstance(neck, FeatureBatchNorm)
    plain = [torch.nn.BatchNorm2d(6) for _ in range(2)]
    maps = (torch.randn(2, 6, 3, 4) * 5, torch.randn(2, 6, 2, 2) + 3)
    neck.eval()
    for got, norm, x in zip(neck(maps), plain, maps, strict=True):
        torch.testing.assert_close(got, norm.eval()(x))
    with pytest.raises(ValueError, match="zip"):
        neck(maps[:1])
