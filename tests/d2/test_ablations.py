"""The paper's ablations: each changes what its name says and nothing else, and runs."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from tiny import pictures, tiny_model  # noqa: E402

from jepa_plugins.config_files import list_configs  # noqa: E402
from jepa_plugins.d2 import get_config  # noqa: E402

FOLDER = "detectron2/mask_jepa/ablations/"
METHOD = "MODEL.MASK_JEPA."
BASE = "detectron2/mask_jepa/R50_in1k.yaml"
# table of the paper -> configurations and the keys that they change
WANT = {
    "no_recon": {METHOD + "LOSS.RECON_WEIGHT": 0.0},
    "no_denoise": {METHOD + "LOSS.DENOISE_WEIGHT": 0.0},
    "stride16": {METHOD + "RECON_STRIDE": 16},
    "stride32": {METHOD + "RECON_STRIDE": 32},
    "m0": {METHOD + "SELF_ATTN.M": 0},
    "m1": {METHOD + "SELF_ATTN.M": 1},
    "m3": {METHOD + "SELF_ATTN.M": 3},
    "sigma_0.2": {METHOD + "NOISE.SIGMA": 0.2},
    "sigma_0.3": {METHOD + "NOISE.SIGMA": 0.3},
    "sigma_0.5": {METHOD + "NOISE.SIGMA": 0.5},
    "ratio_0.25": {METHOD + "MASK.RATIO": 0.25},
    "ratio_0.75": {METHOD + "MASK.RATIO": 0.75},
    "patch_4": {METHOD + "MASK.PATCH": 4},
    "patch_16": {METHOD + "MASK.PATCH": 16},
    "denoise_image": {METHOD + "DENOISE.TARGET": "image"},
    "epochs_10": {"SOLVER.MAX_ITER": 375000},
    "epochs_15": {"SOLVER.MAX_ITER": 562500},
    "epochs_20": {"SOLVER.MAX_ITER": 750000},
    "masked_queries": {METHOD + "READOUT": "masked_queries"},
    "query_mix": {METHOD + "READOUT": "query_mix"},
    "round_robin": {METHOD + "LEVELS": "round_robin"},
}


def flat(node: CfgNode, prefix: str = "") -> dict:
    out = {}
    for key, value in node.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
    return out


def test_there_is_one_file_for_each() -> None:
    found = {name[len(FOLDER) : -5] for name in list_configs() if name.startswith(FOLDER)}
    assert found == WANT.keys()


@pytest.mark.parametrize("name", WANT)
def test_an_ablation_changes_what_it_says_and_runs_shrunk(name) -> None:
    base, cfg = flat(get_config(BASE)), flat(get_config(f"{FOLDER}{name}.yaml"))
    assert {key: value for key, value in cfg.items() if base[key] != value} == WANT[name]
    # half of the image's side, so half of the patch's
    changes = {key: value for key, value in WANT[name].items() if key.startswith(METHOD)}
    changes[METHOD + "MASK.PATCH"] = cfg[METHOD + "MASK.PATCH"] // 2
    changes.setdefault(METHOD + "READOUT", "masked_queries")
    model = tiny_model({**changes, "INPUT.PRETRAIN_CROP_SIZE": (256, 256)})
    losses = model.train()(pictures((256, 256)))
    sum(losses.values()).backward()
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert len(losses) == (1 if name.startswith("no_") else 2)


# millions of parameters without the target copies, frozen backbone included; the paper's table 8 says 47.0 and 50.4
COUNTS = {
    ("R50_in1k", "spatial_queries"): 46.66,
    ("R50_in1k", "masked_queries"): 46.66,
    ("R50_in1k", "query_mix"): 47.01,
    ("swin_tiny_in1k", "spatial_queries"): 50.11,
    ("swin_tiny_in1k", "masked_queries"): 50.11,
    ("swin_tiny_in1k", "query_mix"): 50.46,
}


@pytest.mark.parametrize(("name", "readout"), COUNTS)
def test_parameter_counts(name, readout) -> None:
    options = ["MODEL.DEVICE", "meta", METHOD + "READOUT", readout]
    with torch.device("meta"):
        model = build_model(get_config(f"detectron2/mask_jepa/{name}.yaml", options))
    count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("target_"))
    assert count / 1e6 == pytest.approx(COUNTS[name, readout], abs=0.005)
    assert count / 1e6 == pytest.approx(47.0 if name.startswith("R50") else 50.4, rel=0.01)
