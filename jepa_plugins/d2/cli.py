"""What the command-line tools share: errors of one sentence, the device, a model with its weights."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.images import ImageError
from jepa_plugins.d2.checkpoint import Checkpointer
from jepa_plugins.d2.config import get_config
from jepa_plugins.d2.engine import Trainer

logger = logging.getLogger(__name__)
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    KeyError,
    ImportError,
    FloatingPointError,
    CheckpointError,
    ImageError,
)


def sentence_of(error: BaseException) -> str:
    """The message of an error; of one that a data loader's worker raised, without that worker's traceback."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]
    return text


def one_sentence(function: Callable[..., Any]) -> Callable[..., Any]:
    """End the program with the one sentence of the package's own errors; JEPA_TRACEBACK=1 shows the rest."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except USER_ERRORS as error:
            if os.environ.get("JEPA_TRACEBACK"):
                raise
            sys.exit(f"error: {sentence_of(error)}")

    return guarded


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
