"""The probes of `core.probes` on labelled images, for commands and for hooks of a training loop."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa_plugins.core.images import crop_and_resize, read_image, read_label_map
from jepa_plugins.core.labelled import LabelledImages
from jepa_plugins.core.probes import (
    FLOORS,
    PROBES,
    Cells,
    at_cell_centres,
    fit_kmeans,
    fit_linear,
    floor_maps,
    knn_predict,
    probe_scores,
    spread_subset,
)

BATCH = 8  # images of one forward

Rows = dict[str, dict[str, float]]  # scores by what they were measured on
# Images of one size, each {"image": uint8 [C, H, W], "file_name": path} -> maps [B, D, h, w] by name.
Describe = Callable[[list[dict]], dict[str, Tensor]]


@dataclass(frozen=True)
class Protocol:
    """How features are scored.

    Whole images are resized to one size. The label of a cell of a feature map is the one under its centre, in
    training and in scoring; nothing is scored by the pixel.

    Args:
        size: (height, width) in pixels that images are resized to. image_format: order of their channels.
        kinds: some of `PROBES`. cells: of each set at most so many, always the same, evenly spread.

    Raises:
        ValueError: no cell, or a probe that is not known.
    """

    size: tuple[int, int]
    image_format: str = "RGB"
    kinds: tuple[str, ...] = PROBES
    cells: int = 10000

    def __post_init__(self) -> None:
        if self.cells < 1:
            raise ValueError(f"a probe takes at least one cell, got {self.cells}")
        if not self.kinds or not set(self.kinds) <= set(PROBES):
            raise ValueError(f"the probes are {', '.join(PROBES)}, got {', '.join(self.kinds) or 'none'}")


def _batches(
    files: Sequence[tuple[str, str]], size: tuple[int, int], image_format: str
) -> Iterator[tuple[list[dict], list[NDArray[np.int64]]]]:
    """Whole images at one size as `Describe` takes them, and their label maps at their own size."""
    for start in range(0, len(files), BATCH):
        inputs, labels = [], []
        for file, label_file in files[start : start + BATCH]:
            image = read_image(file, image_format)
            pixels = crop_and_resize(image, (0, 0, *image.shape[:2]), size)
            inputs.append(
                {"image": torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), "file_name": file}
            )
            labels.append(read_label_map(label_file))
        yield inputs, labels


@torch.no_grad()
def labelled_cells(describe: Describe, data: LabelledImages, protocol: Protocol) -> dict[str, Cells]:
    """The labelled cells of a data set as `describe` sees them, on the CPU: at most `protocol.cells` of each map,
    evenly spread over the images.

    Raises:
        ValueError: a label that is no class, or no labelled cell at all.
    """
    features: dict[str, list[Tensor]] = {}
    labels: dict[str, list[Tensor]] = {}
    for inputs, truths in _batches(data.files, protocol.size, protocol.image_format):
        most = -(-protocol.cells * len(inputs) // len(data.files))
        for key, maps in describe(inputs).items():
            truth = np.stack([at_cell_centres(t, *maps.shape[-2:]) for t in truths])
            y = torch.from_numpy(truth).flatten()
            place = (y != data.ignore_label).nonzero().flatten()
            place = place[spread_subset(len(place), most)]
            x = maps.float().permute(0, 2, 3, 1).flatten(0, 2)
            features.setdefault(key, []).append(x[place.to(x.device)].cpu())
            labels.setdefault(key, []).append(y[place])
    cells = {key: Cells(torch.cat(features[key]), torch.cat(labels[key])) for key in features}
    for found in cells.values():
        if not len(found.labels):
            raise ValueError(
                f"data set '{data.name}' has no labelled pixel under any cell: check its label images"
            )
        if int(found.labels.max()) >= data.classes:
            raise ValueError(
                f"the label images of data set '{data.name}' hold the value {int(found.labels.max())}, but it "
                f"has {data.classes} classes and ignores {data.ignore_label}: check its label images and class "
                "names"
            )
    return cells


def check_classes(train: LabelledImages, val: LabelledImages) -> None:
    """Raise ValueError unless two sets have as many classes."""
    if train.classes != val.classes:
        raise ValueError(
            f"data set '{train.name}' has {train.classes} classes and '{val.name}' {val.classes}: probe on two "
            "sets of the same classes"
        )


def probe(
    describe: Describe,
    train: LabelledImages,
    val: LabelledImages,
    protocol: Protocol,
    device: torch.device | str = "cpu",
) -> Rows:
    """Scores of every map that `describe` gives, fitted on `train`, measured on `val`; see `probe_scores`.

    Raises:
        ValueError: sets of different classes, or wrong labels; see `labelled_cells`.
    """
    check_classes(train, val)
    known = labelled_cells(describe, train, protocol)
    unseen = labelled_cells(describe, val, protocol)
    return {
        key: probe_scores(cells.to(device), unseen[key].to(device), train.classes, protocol.kinds)
        for key, cells in known.items()
    }


def probe_floors(
    train: LabelledImages,
    val: LabelledImages,
    protocol: Protocol,
    stride: int,
    names: Sequence[str] = FLOORS,
    device: torch.device | str = "cpu",
) -> Rows:
    """Scores without any network, on cells of `stride` pixels; `names`: some of `FLOORS`, see `floor_maps`."""

    def describe(inputs: list[dict]) -> dict[str, Tensor]:
        maps = floor_maps(torch.stack([item["image"] for item in inputs]), stride)
        return {name: maps[name] for name in names}

    return probe(describe, train, val, protocol, device)


def table(rows: Rows) -> str:
    """Rows of scores as aligned text, one column a score."""
    widths = {name: max(len(name), len("100.00")) for name in next(iter(rows.values()))}
    head = max(len("features"), *map(len, rows))
    lines = ["  ".join(["features".ljust(head), *(name.rjust(width) for name, width in widths.items())])]
    for name, values in rows.items():
        cells = [f"{values[column]:.2f}".rjust(width) for column, width in widths.items()]
        lines.append("  ".join([name.ljust(head), *cells]))
    return "\n".join(lines)


def describe_protocol(train: LabelledImages, val: LabelledImages, protocol: Protocol) -> dict[str, Any]:
    """What scores were measured on and how, as plain values for a file beside them."""

    def options(function: Callable[..., Any]) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    fitted: dict[str, Callable[..., Any]] = {"linear": fit_linear, "knn": knn_predict, "kmeans": fit_kmeans}
    return {
        "train": train.name,
        "train_images": len(train.files),
        "val": val.name,
        "val_images": len(val.files),
        "classes": train.classes,
        "size": list(protocol.size),
        "image_format": protocol.image_format,
        "cells": protocol.cells,
        "label": "under the centre of each patch, in training and in scoring",
        "features": "standardised by the training cells",
        "probes": {kind: options(fitted[kind]) for kind in protocol.kinds},
    }


def mean_of(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of rows of the same scores."""
    rows = list(rows)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards each module's mode and the random generators are as before."""
    modes = [(module, module.training) for module in model.modules()]
    states = np.random.get_state(), random.getstate()
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        np.random.set_state(states[0])
        random.setstate(states[1])
