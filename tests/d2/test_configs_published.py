"""Yaml files as Mask2Former publishes them, evaluated sizes and all, are read and run unchanged.

The files are written here, in the published layout, from the merged values of the published ones: a base for each
task, the R50 file over it, and the Swin-T file over that, with tuples as strings and one size list as Python.
"""

import json
import logging
from pathlib import Path

import pytest
import yaml
from golden_tools import GOLDEN

pytest.importorskip("detectron2")

import torch  # noqa: E402
from test_configs_golden import value_of  # noqa: E402
from tiny import SMALL, options, save_segmentation  # noqa: E402

from jepa_plugins.d2 import get_config  # noqa: E402

PUBLISHED = json.loads((GOLDEN / "configs" / "mask2former.json").read_text())
ADDED = PUBLISHED["keys_added"]
NAMES = [name for name in PUBLISHED["configs"] if not name.startswith("mapillary")]
SIZES = "INPUT.MIN_SIZE_TRAIN"
PATTERN = '!!python/object/apply:eval ["[int(x * 0.1 * {}) for x in range(5, 21)]"]'
TUPLES = ("DATASETS.TRAIN", "DATASETS.TEST", "INPUT.CROP.SIZE", "SOLVER.STEPS")


def _nested(values: dict) -> dict:
    tree: dict = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        place = tree
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = str(tuple(value)) if key in TUPLES else value
    return tree


def _write(path: Path, values: dict, base: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = values.get(SIZES)
    text = yaml.safe_dump(_nested({**values, **({SIZES: "@"} if sizes else {})}), sort_keys=False)
    if sizes:
        text = text.replace("MIN_SIZE_TRAIN: '@'", f"MIN_SIZE_TRAIN: {PATTERN.format(sizes[5])}")
        assert PATTERN[:20] in text
    path.write_text((f"_BASE_: {base}\n" if base else "") + text)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """configs/ of a checkout of the published repository."""
    root = tmp_path_factory.mktemp("published") / "configs"
    for name in NAMES:
        values = {k: v for k, v in PUBLISHED["configs"][name].items() if ADDED.get(k, object()) != v}
        path = root / name
        if path.parent.name == "swin":
            r50 = name.replace("swin/", "").replace("swin_tiny", "R50")
            old = PUBLISHED["configs"][r50]
            changed = {k: v for k, v in values.items() if old.get(k, object()) != v}
            swin = {k: v for k, v in PUBLISHED["configs"][name].items() if k.startswith("MODEL.SWIN.")}
            _write(path, {**changed, **swin}, f"../{Path(r50).name}")
            continue
        head = {k: v for k, v in values.items() if k.startswith(("MODEL.MASK_FORMER", "MODEL.SEM_SEG_HEAD"))}
        base = f"Base-{path.parent.name}.yaml"
        _write(path.parent / base, {k: v for k, v in values.items() if k not in head})
        _write(path, head, base)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_merged_values_are_the_published_ones(tree, name):
    cfg = get_config(str(tree / name))
    want = PUBLISHED["configs"][name]
    assert {key: value_of(cfg, key) for key in want} == want


def test_the_pattern_is_in_the_files(tree):
    """All but COCO's large-scale jitter have it: otherwise the test above shows nothing about it."""
    bases = sorted(path.parent.relative_to(tree).parts[0] for path in tree.rglob("Base-*.yaml"))
    with_pattern = [
        path.parent.relative_to(tree).parts[0]
        for path in tree.rglob("Base-*.yaml")
        if "python/object" in path.read_text()
    ]
    assert bases == ["ade20k"] * 3 + ["cityscapes"] * 3 + ["coco"] * 2
    assert sorted(with_pattern) == ["ade20k"] * 3 + ["cityscapes"] * 3


@pytest.mark.parametrize(
    "name",
    [
        "ade20k/semantic-segmentation/swin/maskformer2_swin_tiny_bs16_160k.yaml",
        "cityscapes/semantic-segmentation/maskformer2_R50_bs16_90k.yaml",
    ],
)
def test_a_published_file_runs_through_our_training_tool(tree, name, tmp_path, monkeypatch):
    import train_net

    data = save_segmentation(tmp_path / "set")
    sets = {
        f"DATASETS.{part}": (f"folder_semantic@{data}@{split}",)
        for part, split in (("TRAIN", "training"), ("TEST", "validation"))
    }
    swin = {"MODEL.SWIN.EMBED_DIM": 12, "MODEL.SWIN.DEPTHS": [1, 1, 1, 1], "MODEL.SWIN.WINDOW_SIZE": 4}
    resnet = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
    backbone = swin if "swin" in name else resnet
    own = {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 12, "SOLVER.MAX_ITER": 3, "OUTPUT_DIR": str(tmp_path / "out")}
    changes = options(SMALL, backbone, sets, own)
    monkeypatch.delenv("JEPA_TRACEBACK", raising=False)
    arguments = ["--config-file", str(tree / name), *map(str, changes)]
    try:
        train_net.main(train_net.build_parser().parse_args(arguments))
    finally:
        for logger in map(logging.getLogger, ("detectron2", "fvcore", "jepa_plugins")):
            logger.handlers.clear()
            logger.propagate = True
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 2
    assert ("backbone.patch_embed.proj.weight" in saved["model"]) == ("swin" in name)
    assert "mIoU" in (tmp_path / "out" / "log.txt").read_text()
