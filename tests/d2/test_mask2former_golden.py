"""Mask2Former's modules and whole model against numbers and names of the published implementation."""

import copy
import json

import numpy as np
import pytest
import torch
from golden_tools import GOLDEN, assert_close, fill_module, load, points, rectangles, tensor

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import Instances  # noqa: E402

from jepa_plugins.d2 import add_jepa_config  # noqa: E402
from jepa_plugins.d2.mask2former import (  # noqa: E402
    build_pixel_decoder,
    build_transformer_decoder,
)

CONFIG = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
R50 = {f"res{i}": ShapeSpec(channels=64 * 2**i, stride=2**i) for i in range(2, 6)}


def published_config():
    """The merged published configuration, on the CPU."""
    values = json.loads((GOLDEN / "configs" / "mask2former.json").read_text())["configs"][CONFIG]
    cfg = get_cfg()
    add_jepa_config(cfg)
    cfg.merge_from_list([item for pair in values.items() for item in pair])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg


@pytest.fixture(scope="module")
def model():
    cfg = published_config()
    cfg.DATASETS.TRAIN = ("golden_coco_panoptic",)
    things = {i: i for i in range(80)}
    MetadataCatalog.get("golden_coco_panoptic").set(thing_dataset_id_to_contiguous_id=things)
    return build_model(cfg)


@pytest.fixture(scope="module")
def filled(model):
    return fill_module(copy.deepcopy(model), load("mask2former_model")[0])


def test_pixel_decoder_golden():
    meta, want = load("msdeform_pixel_decoder")
    decoder = fill_module(build_pixel_decoder(published_config(), R50), meta).eval()
    sizes = {"res2": (24, 32), "res3": (12, 16), "res4": (6, 8), "res5": (3, 4)}
    features = {
        name: tensor(100 + i, [2, R50[name].channels, *size]) for i, (name, size) in enumerate(sizes.items())
    }
    with torch.no_grad():
        mask_features, coarsest, levels = decoder.forward_features(features)
    noise = meta["noise"]
    for name, got in {
        "mask_features_every_4th_channel": mask_features[:, ::4],
        "transformer_encoder_features": coarsest,
        "multi_scale_0": levels[0],
        "multi_scale_1": levels[1],
        "multi_scale_2_every_2nd_channel": levels[2][:, ::2],
    }.items():
        assert_close(got, want[name], noise[name])
    for short, full in zip(decoder.forward_levels(features), levels, strict=True):
        assert torch.equal(short, full)


def test_transformer_decoder_golden():
    meta, want = load("masked_transformer_decoder")
    decoder = fill_module(build_transformer_decoder(published_config(), 256), meta).eval()
    x = [tensor(330 + i, [2, 256, *size], -2, 2) for i, size in enumerate([(2, 3), (4, 6), (8, 12)])]
    with torch.no_grad():
        out = decoder(x, tensor(333, [2, 256, 16, 24], -0.4, 1.6))
    noise = meta["noise"]
    first, before_last = out["aux_outputs"][0], out["aux_outputs"][8]
    for name, got in {
        "pred_logits": out["pred_logits"],
        "pred_masks_every_2nd_query": out["pred_masks"][:, ::2],
        "aux0_pred_logits": first["pred_logits"],
        "aux0_pred_masks_every_4th_query": first["pred_masks"][:, ::4],
        "aux8_pred_logits": before_last["pred_logits"],
        "aux8_pred_masks_every_4th_query": before_last["pred_masks"][:, ::4],
    }.items():
        assert_close(got, want[name], noise[name])
    position = decoder.pe_layer(torch.zeros(1, 256, 5, 7))[0]
    assert_close(position, want["position_5x7"])


def test_state_dict_golden(model):
    want = json.loads((GOLDEN / "state_dicts" / "mask2former_r50.json").read_text())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == want["keys"]
    assert sum(p.numel() for p in model.parameters()) == want["parameters"]


def test_features_and_results_golden(filled):
    meta, want = load("mask2former_model")
    image = torch.from_numpy(want["image_eval"])
    height, width = meta["output_size"]
    filled.eval()
    with torch.no_grad():
        features = filled.backbone((image.float()[None] - filled.pixel_mean) / filled.pixel_std)
        raw = filled.sem_seg_head(features)
        result = filled([{"image": image, "height": height, "width": width}])[0]
    noise = meta["noise"]
    for i in range(2, 6):
        name = f"res{i}_every_16th_channel"
        assert_close(features[f"res{i}"][:, ::16], want[name], noise[name])
    assert_close(raw["pred_logits"], want["pred_logits"], noise["pred_logits"])
    assert_close(raw["pred_masks"], want["pred_masks"], noise["pred_masks"])
    assert_close(
        result["sem_seg"][:, ::4, ::4], want["sem_seg_every_4th_pixel"], noise["sem_seg_every_4th_pixel"]
    )
    panoptic, segments = result["panoptic_seg"]
    assert (panoptic.numpy() == want["panoptic_seg"]).all()
    assert segments == meta["segments_info"]
    instances = result["instances"]
    order = instances.scores.argsort(descending=True, stable=True)
    assert_close(instances.scores[order], want["instances_scores"])
    assert (instances.pred_classes[order].numpy() == want["instances_classes"]).all()
    assert (instances.pred_masks[order].flatten(1).sum(1).numpy() == want["instances_areas"]).all()


def training_batch(meta, want):
    batch = []
    for i, item in enumerate(meta["train"]):
        size = tuple(item["size"])
        instances = Instances(size)
        instances.gt_classes = torch.from_numpy(want[f"labels_train_{i}"])
        instances.gt_masks = torch.from_numpy(rectangles(3460 + i, len(instances.gt_classes), *size))
        batch.append({"image": torch.from_numpy(want[f"image_train_{i}"]), "instances": instances})
    return batch


def test_losses_and_gradients_golden(filled, monkeypatch):
    meta, want = load("mask2former_model")
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.from_numpy(points(*shape)))
    filled.train()
    losses = filled(training_batch(meta, want))
    expected = meta["losses_weighted_points"]
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = max(5 * meta["losses_noise"][name], 1e-5 * abs(value))
        assert abs(losses[name].item() - value) <= tolerance, name
    filled.zero_grad()
    sum(losses.values()).backward()
    parameters = dict(filled.named_parameters())
    norms = meta["gradient_norms_points"]
    got = np.array([float(parameters[name].grad.norm()) for name in norms])
    assert_close(got, np.array(list(norms.values())))
