"""The probes of `core.probing` on the patch features of a pre-training's encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_plugins.core.labelled import LabelledImages
from jepa_plugins.core.probing import Describe, Protocol, Rows, probe
from jepa_plugins.core.vit_weights import admitting_plain, load_encoder, recognise
from jepa_plugins.mm.checkpoints import load_from_local
from jepa_plugins.mm.model import DMTJEPA

ENCODERS = {"target": "target_encoder", "context": "encoder"}


def check_which(which: Sequence[str]) -> tuple[str, ...]:
    """Names of `ENCODERS`; ValueError for others, or for none."""
    if not which or not set(which) <= set(ENCODERS):
        raise ValueError(f"the encoders are {', '.join(ENCODERS)}, got {', '.join(which) or 'none'}")
    return tuple(which)


def image_size(model: DMTJEPA, size: Sequence[int] | None) -> tuple[int, int]:
    """(height, width) in pixels that images are probed at: as given, or that of the pre-training's crops.

    Raises:
        ValueError: the patch does not divide it.
    """
    patch = model.encoder.patch_size
    if size is None:
        rows, columns = model.encoder.grid
        return rows * patch, columns * patch
    if len(size) != 2 or min(size) < patch or any(side % patch for side in size):
        raise ValueError(
            f"the probe's image size is {tuple(size)}: give height and width, multiples of the patch's {patch} "
            "pixels"
        )
    return int(size[0]), int(size[1])


def describe_by(model: DMTJEPA, which: Sequence[str]) -> Describe:
    """Normed tokens of the last block as maps, by the names of `ENCODERS`."""

    def describe(inputs: list[dict]) -> dict[str, Tensor]:
        pixels = torch.stack([item["image"] for item in inputs])
        images = model.data_preprocessor({"inputs": pixels, "place": None})["inputs"]
        grid = model.encoder.grid_of(images.shape[-2], images.shape[-1])
        tokens = {name: getattr(model, ENCODERS[name])(images) for name in which}
        return {name: x.transpose(1, 2).unflatten(2, grid) for name, x in tokens.items()}

    return describe


def probe_vit(
    model: DMTJEPA,
    train: LabelledImages,
    val: LabelledImages,
    protocol: Protocol,
    which: Sequence[str] = ("target",),
) -> Rows:
    """Scores of the frozen features of a model's encoders, by the names of `ENCODERS`."""
    device = next(model.parameters()).device
    return probe(describe_by(model, which), train, val, protocol, device)


def load_encoders(model: DMTJEPA, file: str, which: Sequence[str] = ("target",)) -> int | None:
    """Load encoders of a checkpoint, ours or I-JEPA's, into a model; a file with one encoder is taken for its target.

    Returns:
        The optimiser steps that it was trained for, if it says so.

    Raises:
        FileNotFoundError, CheckpointError: no such file, no such encoder in it, or one of another architecture.
    """
    with admitting_plain():
        content = load_from_local(file)
    for name in which:
        found = recognise(
            content,
            source=file,
            which="context" if name == "context" else None,
            heads=model.encoder.heads,
            expected=model.encoder.grid,
        )
        load_encoder(getattr(model, ENCODERS[name]), found, file)
    return trained_steps(content)


def trained_steps(content: Mapping[str, Any]) -> int | None:
    """Of a checkpoint of this project: its count of optimiser steps."""
    step = content.get("state_dict", {}).get("step")
    return int(step) if isinstance(step, Tensor) and step.numel() == 1 else None
