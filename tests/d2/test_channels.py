"""Images of 1, 4 and more channels: from the file to the loss, and colour weights in such a model."""

import logging
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

pytest.importorskip("detectron2")

from detectron2.data import transforms as T  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model  # noqa: E402
from tiny import losses_of, save_pictures, save_segmentation, tiny_config, train  # noqa: E402

from jepa_plugins.core.checkpoints import CheckpointError, save_atomic  # noqa: E402
from jepa_plugins.core.images import ImageError, crop_and_resize, read_image  # noqa: E402
from jepa_plugins.d2.backbones import build_backbone  # noqa: E402
from jepa_plugins.d2.checkpoint import Checkpointer  # noqa: E402
from jepa_plugins.d2.data.loader import build_labelled_loader, build_unlabelled_loader  # noqa: E402
from jepa_plugins.d2.data.mappers import BandInput, build_mapper  # noqa: E402
from jepa_plugins.d2.engine import Trainer  # noqa: E402

RESNET = {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.RESNETS.DEPTH": 18}
RESNET |= {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.RESNETS.STEM_OUT_CHANNELS": 64}
RESNET |= {"MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
SWIN = {"MODEL.BACKBONE.NAME": "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM": 8}
SWIN |= {"MODEL.SWIN.DEPTHS": [1, 1, 1, 1], "MODEL.SWIN.NUM_HEADS": [1, 1, 2, 2], "MODEL.SWIN.WINDOW_SIZE": 3}
TIMM = {"MODEL.BACKBONE.NAME": "TimmBackbone", "MODEL.TIMM.NAME": "test_resnet", "MODEL.TIMM.FREEZE": False}
BACKBONES = {"timm": TIMM, "resnet": RESNET, "swin": SWIN}


def channel_keys(channels: int, order: str) -> dict:
    return {
        "MODEL.PIXEL_MEAN": [120.0] * channels,
        "MODEL.PIXEL_STD": [60.0] * channels,
        "INPUT.FORMAT": order,
    }


def with_channels(folder: Path, channels: int) -> str:
    """Turn the pictures of a folder into ones of `channels` channels; more than four become arrays."""
    for path in sorted(folder.rglob("*.png")):
        rgb = np.asarray(Image.open(path).convert("RGB"))
        pixels = np.concatenate([rgb, 255 - rgb, rgb // 2], axis=2)[:, :, :channels]
        path.unlink()
        if channels > 4:
            np.save(path.with_suffix(".npy"), pixels)
        else:
            Image.fromarray(pixels.squeeze()).save(path)
    return str(folder)


KINDS = [(1, "L"), (4, "RGBA"), (4, "BANDS"), (2, "BANDS"), (6, "BANDS")]


# --- training


@pytest.mark.parametrize(("channels", "order"), KINDS)
def test_pre_training_from_files(tmp_path: Path, channels: int, order: str) -> None:
    save_pictures(tmp_path / "images")
    changes = {
        "DATASETS.UNLABELLED": (with_channels(tmp_path / "images", channels),),
        "OUTPUT_DIR": str(tmp_path / "out"),
        "SOLVER.MAX_ITER": 2,
        "MODEL.MASK_JEPA.FREEZE_BACKBONE": False,
        **channel_keys(channels, order),
    }
    trainer = train(tiny_config("mask_jepa", changes))
    assert all(math.isfinite(loss) for loss in losses_of(trainer).values()) and len(losses_of(trainer)) == 2
    model = trainer.model
    assert next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)).in_channels == channels
    assert model.jepa.denoise.weight.shape[0] == channels
    batch = next(iter(build_unlabelled_loader(trainer.cfg)))
    assert all(sample["image"].shape == (channels, 64, 64) for sample in batch)


@pytest.mark.parametrize(("channels", "order"), [(1, "L"), (4, "BANDS"), (6, "BANDS")])
def test_fine_tuning_and_evaluation_from_files(tmp_path: Path, channels: int, order: str) -> None:
    root = save_segmentation(tmp_path / "data")
    with_channels(tmp_path / "data" / "images", channels)
    changes = {
        "DATASETS.TRAIN": (f"folder_semantic@{root}@training",),
        "DATASETS.TEST": (f"folder_semantic@{root}@validation",),
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 12,
        "INPUT.COLOR_AUG_SSD": False,
        "OUTPUT_DIR": str(tmp_path / "out"),
        "SOLVER.MAX_ITER": 1,
        "TEST.EVAL_PERIOD": 0,
        **channel_keys(channels, order),
    }
    trainer = train(tiny_config("semantic", changes))
    sample = next(iter(build_labelled_loader(trainer.cfg)))[0]
    assert sample["image"].shape == (channels, 64, 64) and sample["image"].dtype == torch.uint8
    results = Trainer.test(trainer.cfg, trainer.model)
    assert 0 <= results["sem_seg"]["mIoU"] <= 100


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 6, 7])
def test_transforms_move_each_channel_as_they_would_alone(channels: int) -> None:
    image = np.random.default_rng(channels).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    image[:, :10, -1] = 0  # would blot out the others, were it taken for an alpha
    labels = np.arange(600, dtype=np.float64).reshape(20, 30)
    moves = [T.ResizeTransform(20, 30, 11, 17), T.HFlipTransform(17), T.CropTransform(2, 1, 9, 8)]
    given = BandInput(image.copy(), sem_seg=labels)
    T.AugmentationList(moves)(given)
    for i in range(channels):
        alone = T.AugInput(image[:, :, i : i + 1], sem_seg=labels)
        T.AugmentationList(moves)(alone)
        assert np.array_equal(given.image[:, :, i], alone.image[:, :, 0])
    assert np.array_equal(given.sem_seg, alone.sem_seg)


def test_an_alpha_of_zero_hides_nothing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    pixels[:, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for order in ("RGBA", "BANDS"):
        assert np.array_equal(read_image(tmp_path / "x.png", order), pixels)
        cfg = tiny_config("semantic", {**channel_keys(4, order), "INPUT.MIN_SIZE_TEST": 24})
        image = build_mapper(cfg, False)({"file_name": str(tmp_path / "x.png")})["image"]
        colours = crop_and_resize(pixels[:, :, :3], (0, 0, 12, 16), (24, 32))
        assert np.array_equal(image[:3].permute(1, 2, 0).numpy(), colours)


# --- colour weights


def _model(channels: int, backbone: str, name: str = "semantic", **changes):
    order = {1: "L", 3: "RGB"}.get(channels, "BANDS")
    cfg = tiny_config(name, {**channel_keys(channels, order), **changes}, backbone=BACKBONES[backbone])
    torch.manual_seed(channels)
    return build_model(cfg).eval()


def _first_convolution(backbone: nn.Module) -> nn.Conv2d:
    return next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))


def assert_adapted(backbone: nn.Module, colour: nn.Module, channels: int) -> None:
    """Equal features of a grey picture; in-turn weights otherwise; nothing else changed."""
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        theirs = colour.eval()(x.expand(-1, 3, -1, -1))
        ours = backbone.eval()(x.expand(-1, channels, -1, -1))
    for level, feature in ours.items() if channels == 1 or channels % 3 == 0 else []:
        assert torch.allclose(feature, theirs[level], rtol=1e-3, atol=1e-4)
    old, new = _first_convolution(colour).weight, _first_convolution(backbone).weight
    if channels > 1:
        assert torch.allclose(new, torch.cat([old] * channels, 1)[:, :channels] * 3 / channels)
    names = [k for k, v in backbone.state_dict().items() if v.shape == colour.state_dict()[k].shape]
    assert len(names) == len(backbone.state_dict()) - 1
    assert all(torch.equal(backbone.state_dict()[k], colour.state_dict()[k]) for k in names)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_model_weights_of_a_colour_model_are_adapted(
    tmp_path: Path, backbone: str, channels: int, caplog
) -> None:
    colour = _model(3, backbone)
    save_atomic({"model": colour.state_dict()}, tmp_path / "colour.pth")
    model = _model(channels, backbone)
    with caplog.at_level(logging.INFO):
        loader = Checkpointer(model, required=["backbone"])
        loader.load(str(tmp_path / "colour.pth"))
    assert_adapted(model.backbone, colour.backbone, channels)
    ((name, old, new),) = loader.report.adapted
    assert name.startswith("backbone.") and (old, new) == (3, channels)
    words = "3 channels summed" if channels == 1 else f"3 channels repeated and scaled by 3/{channels}"
    assert f"adapted to the images' channels: {name} ({words})" in caplog.text
    assert not loader.report.missing and not loader.report.mismatched


@pytest.mark.parametrize("channels", [1, 4])
def test_timms_rule(tmp_path: Path, channels: int) -> None:
    colour = timm.create_model("test_resnet", features_only=True)
    torch.save(colour.state_dict(), tmp_path / "colour.pth")
    theirs = timm.models.adapt_input_conv(channels, colour.conv1[0].weight.detach())
    model = _model(channels, "timm", **{"MODEL.TIMM.WEIGHTS": str(tmp_path / "colour.pth")})
    assert torch.allclose(model.backbone.net.conv1[0].weight, theirs)


@pytest.mark.parametrize("channels", [1, 4])
def test_imagenet_files_that_are_matched_by_suffix_are_adapted(tmp_path: Path, channels: int, caplog) -> None:
    colour = _model(3, "resnet")
    arrays = {name: tensor.numpy() for name, tensor in colour.backbone.state_dict().items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content))
    model = _model(channels, "resnet", "mask_jepa", **{"MODEL.MASK_JEPA.FREEZE_BACKBONE": False})
    with caplog.at_level(logging.INFO):
        Checkpointer(model, required=["backbone"]).load(str(tmp_path / "R-18.pkl"))
    assert_adapted(model.backbone, colour.backbone, channels)
    assert "adapted to the images' channels: backbone.stem.conv1.weight" in caplog.text
    for name, tensor in model.target_backbone.state_dict().items():
        assert torch.equal(tensor, model.backbone.state_dict()[name])


def test_a_resume_or_an_evaluation_with_other_channels_is_refused(tmp_path: Path) -> None:
    Checkpointer(_model(3, "timm"), str(tmp_path)).save("model_0")
    for changes in ({"save_dir": str(tmp_path)}, {"required": [""]}):
        loader = Checkpointer(_model(4, "timm"), **changes)
        with pytest.raises(CheckpointError, match=r"is \[\d+, 3, 3, 3\] there and \[\d+, 4, 3, 3\] here"):
            loader.resume_or_load(str(tmp_path / "model_0.pth"), resume="save_dir" in changes)


# --- what does not agree


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (channel_keys(4, "RGB"), r"INPUT.FORMAT RGB has 3 channels, MODEL.PIXEL_MEAN 4: .* to RGBA or BANDS"),
        (channel_keys(1, "BGR"), r"INPUT.FORMAT BGR has 3 channels, MODEL.PIXEL_MEAN 1: .* to L or BANDS"),
        (channel_keys(5, "RGBA"), r"INPUT.FORMAT RGBA has 4 channels, MODEL.PIXEL_MEAN 5: .* to BANDS"),
        (
            {**channel_keys(1, "L"), "MODEL.PIXEL_STD": [1.0] * 3},
            r"MODEL.PIXEL_STD has 3 values, MODEL.PIXEL_MEAN 1",
        ),
    ],
)
def test_keys_that_disagree_are_named(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        build_backbone(tiny_config("mask_jepa", changes))
    assert "\n" not in str(caught.value)


def test_images_with_other_bands_than_the_mean_stop_the_run_with_the_reason(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path / "images")
    cfg = tiny_config("mask_jepa", {"DATASETS.UNLABELLED": (folder,), **channel_keys(4, "BANDS")})
    cfg.OUTPUT_DIR = ""
    with pytest.raises(
        ImageError, match=r"image file '.*\.png' has 3 channels, and 4 are expected"
    ) as caught:
        next(iter(build_unlabelled_loader(cfg)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("channels", "order"), [(1, "L"), (4, "RGBA"), (4, "BANDS")])
def test_colour_jitter_of_other_than_colours_is_refused(channels: int, order: str) -> None:
    cfg = tiny_config("semantic", {**channel_keys(channels, order), "INPUT.COLOR_AUG_SSD": True})
    with pytest.raises(ValueError, match="set INPUT.COLOR_AUG_SSD to False"):
        build_mapper(cfg, True)


def test_a_backbone_that_takes_colours_only_is_refused() -> None:
    class ColoursOnly(Backbone):
        def __init__(self, cfg, input_shape) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return {"res2": self.conv(x)}

    BACKBONE_REGISTRY.register(ColoursOnly)
    changes = {**channel_keys(4, "RGBA"), "MODEL.BACKBONE.NAME": "ColoursOnly"}
    with pytest.raises(ValueError, match="ColoursOnly takes images of 3 channels, MODEL.PIXEL_MEAN has 4"):
        build_backbone(tiny_config("mask_jepa", changes))
    build_backbone(tiny_config("mask_jepa", {"MODEL.BACKBONE.NAME": "ColoursOnly"}))
