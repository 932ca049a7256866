"""ViT with windows under the simple feature pyramid, against the published implementation's results."""

import numpy as np
import pytest
import torch
from golden_tools import assert_close, fill_module, load, tensor

from jepa_plugins.core.vitdet import DetectionViT, SimpleFeaturePyramid

META, ARRAYS = load("vitdet_pyramid")
ARCHITECTURE = (
    "img_size",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "window_size",
    "window_block_indexes",
    "pretrain_img_size",
    "pretrain_use_cls_token",
)


def models(kind: str) -> tuple[DetectionViT, SimpleFeaturePyramid]:
    config = META["config"]
    options = {key: config[key] for key in ARCHITECTURE}
    net = DetectionViT(**options, use_rel_pos=kind == "rel_pos").eval()
    pyramid = SimpleFeaturePyramid(
        config["embed_dim"],
        config["patch_size"],
        config["out_channels"],
        config["scale_factors"],
        config["norm"],
    )
    return fill_module(net, META, "net."), fill_module(pyramid.eval(), META)


@pytest.mark.parametrize("kind", ["plain", "rel_pos"])
def test_names_and_shapes(kind):
    net, pyramid = models(kind)
    names = {f"net.{name}": value for name, value in net.state_dict().items()} | pyramid.state_dict()
    assert {name: list(value.shape) for name, value in names.items()} == META[kind]["shapes"]


@pytest.mark.parametrize("kind", ["plain", "rel_pos"])
def test_golden_features(kind):
    net, pyramid = models(kind)
    noise = META[kind]["noise"]
    with torch.no_grad():
        features = net.features(tensor(800, [1, 3, 96, 144], -2, 2))
        levels = pyramid.levels(features)
    levels.append(levels[-1][:, :, ::2, ::2])  # the last level's max pool of 1, stride 2
    assert_close(features, ARRAYS[f"{kind}_last_feat"], noise["last_feat"])
    for name, got in zip(("p2", "p3", "p4", "p5", "p6"), levels, strict=True):
        assert_close(got, ARRAYS[f"{kind}_{name}"], noise[name])


def test_golden_sees_relative_positions_and_norms():
    """The tolerance is far below what an omission would change."""
    difference = np.abs(ARRAYS["plain_last_feat"] - ARRAYS["rel_pos_last_feat"]).max()
    assert difference > 1e4 * META["rel_pos"]["noise"]["last_feat"]
