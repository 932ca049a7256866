"""What the command-line tools share: the configuration and its device, a model with its weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

from jepa_plugins.d2.checkpoint import Checkpointer
from jepa_plugins.d2.config import get_config
from jepa_plugins.d2.engine import Trainer

logger = logging.getLogger(__name__)


def configuration(config_file: str, opts: Sequence[str]) -> CfgNode:
    """A configuration; without a GPU it moves to the CPU."""
    cfg = get_config(config_file, opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.info("no GPU is available: running on the CPU")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def built_model(cfg: CfgNode, weights: str | None) -> torch.nn.Module:
    """The model in eval mode: with a checkpoint's weights, or else random ones of the configuration's seed."""
    seed_all_rng(max(cfg.SEED, 0))
    model = Trainer.build_model(cfg)
    if weights:
        Checkpointer(model, required=[""]).load(weights)
    return model.eval()
