"""Our fine-tuning configurations against the merged values of the published ones."""

import json

import pytest
from golden_tools import GOLDEN

pytest.importorskip("detectron2")

from detectron2.config import CfgNode  # noqa: E402

from jepa_plugins.config_files import list_configs  # noqa: E402
from jepa_plugins.d2 import get_config  # noqa: E402

PUBLISHED = json.loads((GOLDEN / "configs" / "mask2former.json").read_text())
FOLDER = "detectron2/mask2former/"
SCHEDULES = {"ade20k": "bs16_160k", "cityscapes": "bs16_90k", "coco": "bs16_50ep"}
PAIRS = {
    f"{data}/{task}_{ours}.yaml": f"{data}/{task}-segmentation/{theirs}_{schedule}.yaml"
    for data, schedule in SCHEDULES.items()
    for task in ("semantic", "panoptic", "instance")
    for ours, theirs in (("R50", "maskformer2_R50"), ("swin_tiny", "swin/maskformer2_swin_tiny"))
    if (data, task) != ("coco", "semantic")
}
NEVER_PUBLISHED = {f"ade20k/{task}_swin_tiny.yaml" for task in ("panoptic", "instance")}


def value_of(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg


def flat(node: CfgNode, prefix: str = "") -> dict:
    out = {}
    for key, value in node.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
    return out


def differences(name: str, base: str) -> dict:
    """Keys whose values in `name` are not those in `base`, with the values in `name`."""
    old = flat(get_config(FOLDER + base))
    return {key: value for key, value in flat(get_config(FOLDER + name)).items() if old[key] != value}


def test_every_published_configuration_is_there() -> None:
    families = {name for name in PUBLISHED["configs"] if name.split("/")[0] in SCHEDULES}
    assert {PAIRS[name] for name in PAIRS.keys() - NEVER_PUBLISHED} == families


@pytest.mark.parametrize("ours", sorted(PAIRS.keys() - NEVER_PUBLISHED))
def test_merged_values_golden(ours):
    cfg = get_config(FOLDER + ours)
    want = PUBLISHED["configs"][PAIRS[ours]]
    assert {key: value_of(cfg, key) for key in want} == want


@pytest.mark.parametrize("ours", sorted(NEVER_PUBLISHED))
def test_what_was_never_published_follows_the_published_step_to_swin(ours):
    semantic = differences("ade20k/semantic_swin_tiny.yaml", "ade20k/semantic_R50.yaml")
    assert differences(ours, ours.replace("swin_tiny", "R50")) == semantic
    assert set(semantic) == {"MODEL.BACKBONE.NAME", "MODEL.WEIGHTS"}  # the rest are the published defaults


def test_the_arms_after_mask_jepa_have_other_weights_and_the_papers_learning_rate():
    found = {name[len(FOLDER) :] for name in list_configs() if name.startswith(FOLDER)}
    found = {name for name in found if "/low_data/" not in name}  # these stand on those: see test_low_data
    arms = {name for name in found if name.endswith("_mask_jepa.yaml")}
    # what the paper fine-tunes: all but Swin-T on COCO, and from scratch on ADE20K
    bases = {name for name in PAIRS if not name.startswith("coco/") or "R50" in name}
    bases |= {f"ade20k/{task}_R50_scratch.yaml" for task in ("semantic", "panoptic", "instance")}
    assert arms == {name.replace(".yaml", "_mask_jepa.yaml") for name in bases}
    for name in bases:
        backbone = name.split("_", 1)[1].removesuffix(".yaml")
        assert differences(name.replace(".yaml", "_mask_jepa.yaml"), name) == {
            "MODEL.WEIGHTS": f"mask_jepa_{backbone}.pth",
            "SOLVER.BASE_LR": 0.0002,
        }


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_from_scratch_changes_weights_norm_and_the_backbones_learning_rate(task):
    assert differences(f"ade20k/{task}_R50_scratch.yaml", f"ade20k/{task}_R50.yaml") == {
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.NORM": "SyncBN",
        "SOLVER.BACKBONE_MULTIPLIER": 1.0,
    }


def test_pre_training_swin_differs_from_r50_by_the_backbone_alone():
    old, new = (flat(get_config(f"detectron2/mask_jepa/{name}_in1k.yaml")) for name in ("R50", "swin_tiny"))
    assert {key: value for key, value in new.items() if old[key] != value} == {
        "MODEL.BACKBONE.NAME": "D2SwinTransformer",
        "MODEL.WEIGHTS": "swin_tiny_patch4_window7_224.pkl",
    }


def test_published_keys_and_defaults_golden():
    from detectron2.config import get_cfg

    from jepa_plugins.d2 import add_jepa_config

    cfg = get_cfg()
    add_jepa_config(cfg)
    want = PUBLISHED["keys_added"]
    assert {key: value_of(cfg, key) for key in want} == want
