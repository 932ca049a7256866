"""The quick configurations, shrunk until a training step takes a few hundredths of a second."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image

from jepa_plugins.d2 import get_config
from jepa_plugins.d2.engine import Trainer

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.RECIPE_IMS_PER_BATCH": 0,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.AMP.ENABLED": False,
    "INPUT.PRETRAIN_CROP_SIZE": (64, 64),
    "INPUT.CROP.SIZE": (64, 64),
    "INPUT.SIZE_DIVISIBILITY": 64,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.IMAGE_SIZE": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SEED": 5,
}
BACKBONE = {"MODEL.BACKBONE.NAME": "TimmBackbone", "MODEL.TIMM.NAME": "test_resnet"}
PRETRAIN = {
    "MODEL.MASK_JEPA.MASK.PATCH": 2,
    "MODEL.MASK_JEPA.SELF_ATTN.M": 1,
    "MODEL.MASK_JEPA.EMA.START": 0.996,
}


def options(*groups: dict) -> list:
    """Dicts of keys -> the overrides that `get_config` and the command line take; later ones win."""
    merged = {key: value for group in groups for key, value in group.items()}
    return [item for pair in merged.items() for item in pair]


def tiny_config(name: str = "mask_jepa", changes: dict | None = None, *, backbone: dict = BACKBONE):
    """A quick configuration, shrunk; `changes` by full key."""
    cfg = get_config(f"detectron2/quick/{name}.yaml", options(SMALL, backbone, PRETRAIN, changes or {}))
    if cfg.MODEL.META_ARCHITECTURE == "MaskJEPA" and not cfg.MODEL.MASK_JEPA.FREEZE_BACKBONE:
        cfg.MODEL.TIMM.FREEZE = False
    return cfg


def tiny_model(changes: dict | None = None, *, name: str = "mask_jepa", seed: int = 0):
    """A model whose random weights depend on `seed` alone; a copy, since building takes its time."""
    return copy.deepcopy(_model(name, tuple((changes or {}).items()), seed))


@functools.cache
def _model(name: str, changes: tuple, seed: int):
    torch.manual_seed(seed)
    return build_model(tiny_config(name, dict(changes)))


def pictures(*sizes: tuple[int, int], channels: int = 3, seed: int = 0) -> list[dict]:
    """Inputs with noise as images, numbered as our loader does."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randint(0, 256, (channels, *size), dtype=torch.uint8, generator=generator),
            "sample_index": i,
        }
        for i, size in enumerate(sizes)
    ]


def save_pictures(folder: Path, count: int = 5, size: tuple[int, int] = (80, 96), channels: int = 3) -> str:
    """Write smooth random pictures; returns the folder's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, channels), dtype=np.uint8).squeeze())
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return str(folder)


def save_segmentation(
    root: Path, splits=("training", "validation"), count: int = 3, classes: int = 12
) -> str:
    """Write pictures and labels in the layout of `folder_semantic@root@split`; returns the root."""
    rng = np.random.default_rng(1)
    for split in splits:
        save_pictures(root / "images" / split, count)
        (root / "annotations" / split).mkdir(parents=True)
        for i in range(count):
            labels = Image.fromarray(rng.integers(0, classes, (4, 4), dtype=np.uint8))
            labels.resize((96, 80), Image.Resampling.NEAREST).save(root / "annotations" / split / f"{i}.png")
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(classes)))
    return str(root)


def train(cfg, *, resume: bool = False, stop_after: int | None = None):
    """Run our trainer; returns it. `stop_after` interrupts the run behind that iteration's checkpoint."""
    torch.manual_seed(max(cfg.SEED, 0))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    if stop_after is not None:
        trainer.max_iter = stop_after
    trainer.train()
    return trainer


def losses_of(trainer) -> dict[int, float]:
    """Total loss by iteration."""
    return {step: value for value, step in trainer.storage.history("total_loss").values()}


def steps(model, optimizer, batches) -> list[float]:
    """A plain loop as other launchers run it, without our hooks; returns the losses."""
    totals = []
    model.train()
    with EventStorage():
        for batch in batches:
            optimizer.zero_grad()
            total = sum(model(batch).values())
            total.backward()
            optimizer.step()
            totals.append(float(total.detach()))
    return totals
