"""Our fine-tuning configurations against the merged values of the published ones."""

import json

import pytest
from golden_tools import GOLDEN

pytest.importorskip("detectron2")

from jepa_plugins.d2 import get_config  # noqa: E402

PUBLISHED = json.loads((GOLDEN / "configs" / "mask2former.json").read_text())
PAIRS = {
    "ade20k/semantic_R50.yaml": "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml",
    "coco/panoptic_R50.yaml": "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "coco/instance_R50.yaml": "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",
}


def value_of(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg


@pytest.mark.parametrize("ours, theirs", PAIRS.items())
def test_merged_values_golden(ours, theirs):
    cfg = get_config(f"detectron2/mask2former/{ours}")
    want = PUBLISHED["configs"][theirs]
    assert {key: value_of(cfg, key) for key in want} == want


def test_published_keys_and_defaults_golden():
    from detectron2.config import get_cfg

    from jepa_plugins.d2 import add_jepa_config

    cfg = get_cfg()
    add_jepa_config(cfg)
    want = PUBLISHED["keys_added"]
    assert {key: value_of(cfg, key) for key in want} == want
