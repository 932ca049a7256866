"""Any timm model as a detectron2 backbone, and building a configured backbone without CUDA."""

import pytest
import timm
import torch
from torch import nn

pytest.importorskip("detectron2")

from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import build_backbone, build_model  # noqa: E402
from tiny import pictures, tiny_config  # noqa: E402

from jepa_plugins.core.checkpoints import CheckpointError  # noqa: E402
from jepa_plugins.d2.backbones import build_backbone as build_configured  # noqa: E402
from jepa_plugins.d2.backbones import create_features, without_sync_batch_norm  # noqa: E402

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


# --- synchronised batch norm without CUDA


def resnet_config(norm: str, device: str = "cpu"):
    resnet = {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.RESNETS.NORM": norm}
    small = {
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.MASK_JEPA.FREEZE_BACKBONE": False,
        "MODEL.DEVICE": device,
    }
    return tiny_config("mask_jepa", small, backbone=resnet)


def test_sync_bn_trains_as_plain_batch_norm_without_cuda(caplog) -> None:
    backbones = []
    for norm in ("SyncBN", "BN"):
        torch.manual_seed(0)
        with caplog.at_level("INFO", logger="jepa_plugins.d2.backbones"):
            backbones.append(build_configured(resnet_config(norm)))
    sync, plain = backbones
    assert caplog.text.count("SyncBN needs CUDA: 20 layers of the backbone are BatchNorm2d instead") == 1
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in sync.modules())
    assert list(sync.state_dict()) == list(plain.state_dict())
    assert all(parameter.requires_grad for parameter in sync.parameters())
    x = torch.randn(2, 3, 64, 64)
    for backbone in backbones:
        sum(feature.square().sum() for feature in backbone.train()(x).values()).backward()
    for one, other in zip(sync.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(sync.state_dict()[name], value), name  # running statistics too


def test_sync_bn_stays_on_cuda() -> None:
    backbone = build_configured(resnet_config("SyncBN", device="cuda"))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules()) == 20


@pytest.mark.parametrize("norm", ["BN", "GN", "SyncBN"])
def test_a_mask_jepa_from_scratch_trains_its_norms(norm) -> None:
    torch.manual_seed(0)
    model = build_model(resnet_config(norm))
    batch = pictures((64, 64), (64, 64))
    sum(model.train()(batch).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    norms = [name for name, parameter in model.backbone.named_parameters() if ".norm." in name]
    assert len(norms) == 40 and all(model.backbone.get_parameter(name).requires_grad for name in norms)


def synchronised(rank: int, store: str) -> None:
    """One of two processes: its half of a batch is normalised by the statistics of the whole."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = torch.arange(24.0).view(4, 3, 2, 1).sin()
    mine = slice(2 * rank, 2 * rank + 2)
    whole = nn.BatchNorm2d(3)(x)[mine]
    part = without_sync_batch_norm(nn.Sequential(nn.SyncBatchNorm(3)))(x[mine])
    torch.distributed.destroy_process_group()
    assert torch.allclose(part, whole, atol=1e-6)


def test_several_processes_without_cuda_still_share_their_statistics(tmp_path) -> None:
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(
        synchronised, args=(str(tmp_path / "store"),), nprocs=2, start_method=method
    )


def test_an_unknown_backbone_is_named() -> None:
    cfg = tiny_config("mask_jepa", {"MODEL.BACKBONE.NAME": "D2SwinTransfomer"})
    with pytest.raises(
        KeyError, match="no 'D2SwinTransfomer' in the registry BACKBONE; it holds: .*D2SwinTransformer"
    ):
        build_configured(cfg)
