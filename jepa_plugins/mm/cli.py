"""What the command-line tools share: the configuration of a pre-training and its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from jepa_plugins.config_files import find_config
from jepa_plugins.core.checkpoints import load_into, state_dict_of
from jepa_plugins.mm.checkpoints import load_from_local
from jepa_plugins.mm.model import DMTJEPA


def configuration(name: str, changes: Mapping[str, Any] | None = None) -> Config:
    """A configuration by path or by name, with the changes of ``--cfg-options``."""
    cfg = Config.fromfile(find_config(name))
    if changes is not None:
        cfg.merge_from_dict(dict(changes))
    return cfg


def image_format(cfg: Config) -> str:
    """Order of the channels that the model trains on."""
    return cfg.train_dataloader.dataset.get("image_format", "RGB")


def untrained_model(cfg: Config, seed: int | None = None) -> DMTJEPA:
    """The configuration's model in eval mode as a seed makes it; None: the configuration's own.

    Raises:
        ValueError: the configuration describes another model.
    """
    kind = cfg.get("model", {}).get("type")
    if kind != "DMTJEPA":
        raise ValueError(
            f"{cfg.filename} describes the model {kind}: give the configuration of a pre-training (DMTJEPA)"
        )
    torch.manual_seed((cfg.get("randomness", {}).get("seed") or 0) if seed is None else seed)
    return MODELS.build(cfg.model).eval()


def built_model(cfg: Config, weights: str | None) -> DMTJEPA:
    """The configuration's model in eval mode: untrained, or with the targets of a checkpoint.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: another model; no such file, or one that lacks targets.
    """
    model = untrained_model(cfg)
    if weights is not None:
        # Targets must come from the file; the predictor need not.
        required = ["target_encoder"] + ["target_head"] * (model.target_head is not None)
        load_into(model, state_dict_of(load_from_local(weights)), required=required, source=weights)
    return model
