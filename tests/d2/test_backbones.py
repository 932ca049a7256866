"""Any timm model as a detectron2 backbone."""

import pytest
import timm
import torch

pytest.importorskip("detectron2")

from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import build_backbone  # noqa: E402
from tiny import tiny_config  # noqa: E402

from jepa_plugins.core.checkpoints import CheckpointError  # noqa: E402
from jepa_plugins.d2.backbones import create_features  # noqa: E402

MODELS = ["test_resnet", "test_efficientnet", "test_convnext", "tf_efficientnet_lite0", "resnet10t"]


def build(name: str, changes: dict | None = None, channels: int = 3):
    torch.manual_seed(0)
    cfg = tiny_config("mask_jepa", {"MODEL.TIMM.NAME": name, "MODEL.TIMM.FREEZE": False, **(changes or {})})
    return build_backbone(cfg, ShapeSpec(channels=channels))


@pytest.mark.parametrize("name", MODELS)
def test_features_have_the_promised_strides_and_channels(name) -> None:
    backbone = build(name).eval()
    features = backbone(torch.randn(2, 3, 64, 96))
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for i, (level, spec) in enumerate(backbone.output_shape().items()):
        assert spec.stride == 4 * 2**i
        assert features[level].shape == (2, spec.channels, 64 // spec.stride, 96 // spec.stride)
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_features_are_timms(name) -> None:
    backbone = build(name).eval()
    whole = timm.create_model(name, features_only=True, pretrained=False).eval()
    whole.load_state_dict(backbone.net.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    deepest = whole(x)[-4:]
    for got, want in zip(backbone(x).values(), deepest, strict=True):
        assert torch.equal(got, want)


def test_a_model_whose_channels_come_last() -> None:
    cfg = tiny_config("mask_jepa", {"MODEL.TIMM.NAME": "swin_tiny_patch4_window7_224"})
    for key, value in {
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
        "img_size": 64,
    }.items():
        cfg.MODEL.TIMM.KWARGS[key] = value
    backbone = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    x = torch.randn(2, 3, 64, 64)
    for level, feature, want in zip(range(4), backbone(x).values(), backbone.net(x), strict=True):
        assert feature.shape == (2, 16 * 2**level, 16 // 2**level, 16 // 2**level)
        assert torch.equal(feature, want.permute(0, 3, 1, 2))


def test_greyscale_and_further_arguments() -> None:
    assert build("test_resnet", channels=1)(torch.randn(2, 1, 64, 64))["res5"].shape[-1] == 2
    cfg = tiny_config("mask_jepa", {"MODEL.TIMM.NAME": "test_convnext"})
    cfg.MODEL.TIMM.KWARGS.drop_path_rate = 0.5
    rates = {
        m.drop_prob for m in build_backbone(cfg, ShapeSpec(channels=3)).modules() if hasattr(m, "drop_prob")
    }
    assert max(rates) == 0.5


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_means_no_gradient_and_eval_mode(frozen) -> None:
    backbone = build("test_resnet", {"MODEL.TIMM.FREEZE": frozen}).train()
    assert any(module.training for module in backbone.modules()) != frozen
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    features = backbone(torch.randn(4, 3, 64, 64))
    assert features["res5"].requires_grad != frozen
    assert all(parameter.requires_grad != frozen for parameter in backbone.parameters())
    unchanged = [torch.equal(value, before[name]) for name, value in backbone.named_buffers()]
    assert all(unchanged) == frozen


def test_weights_load_and_the_classifier_is_left_out(tmp_path) -> None:
    torch.manual_seed(1)
    source = timm.create_model("test_resnet", pretrained=False)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone = build("test_resnet", {"MODEL.TIMM.WEIGHTS": str(tmp_path / "weights.pth")})
    theirs = source.state_dict()
    for name, value in backbone.net.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_weights_of_another_model_are_refused(tmp_path) -> None:
    torch.save(timm.create_model("test_convnext", pretrained=False).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth"):
        build("test_resnet", {"MODEL.TIMM.WEIGHTS": str(tmp_path / "other.pth")})
    with pytest.raises((CheckpointError, FileNotFoundError), match="none.pth"):
        build("test_resnet", {"MODEL.TIMM.WEIGHTS": str(tmp_path / "none.pth")})


def test_an_unknown_model_is_named_with_close_ones() -> None:
    with pytest.raises(ValueError, match="MODEL.TIMM.NAME: timm has no model 'resnet19'; perhaps .*resnet"):
        create_features("resnet19", 3, {})


def test_a_model_without_a_hierarchy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"test_vit has feature strides .* lacks \[4, 8, 32\]"):
        create_features("test_vit", 3, {})
