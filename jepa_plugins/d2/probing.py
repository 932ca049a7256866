"""The probes of `core.probes` on a labelled data set: for the probe command and for the hook of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from jepa_plugins.core.images import crop_and_resize, read_image, read_label_map
from jepa_plugins.core.probes import (
    FLOORS,
    PROBES,
    Cells,
    at_cell_centres,
    floor_maps,
    probe_scores,
    spread_subset,
)
from jepa_plugins.d2.data.catalog import ensure_registered, num_classes

FEATURES = {"stride8": 8, "stride4": 4}  # of MaskJEPA.features, and their strides in pixels
COPIES = ("online", "ema")
FLOOR_STRIDE = 8
BATCH = 8  # images of one forward

Rows = dict[str, dict[str, float]]  # scores by what they were measured on
Describe = Callable[[list[dict]], dict[str, Tensor]]  # images -> maps [B, C, h, w] by name


@dataclass(frozen=True)
class ProbeSettings:
    """What is probed, and on which images.

    Args:
        train, val: semantic data sets, by name.
        size: (height, width) in pixels that whole images are resized to, multiples of 32.
        image_format: order of the channels, as INPUT.FORMAT.
        features: some of `FEATURES`; copies: some of `COPIES`; kinds: some of core's `PROBES`.
        cells: of each set at most so many, evenly spread; images: likewise, 0 takes all.

    Raises:
        ValueError: one sentence for a value that makes no sense.
    """

    train: str
    val: str
    size: tuple[int, int]
    image_format: str = "RGB"
    features: tuple[str, ...] = ("stride8",)
    copies: tuple[str, ...] = ("online",)
    kinds: tuple[str, ...] = PROBES
    cells: int = 10000
    images: int = 0

    def __post_init__(self) -> None:
        if not (self.train and self.val):
            raise ValueError(
                "a probe needs labelled images: name a semantic data set to fit it on (TEST.PROBE.TRAIN) and one "
                "to score it on (TEST.PROBE.VAL)"
            )
        if len(self.size) != 2 or min(self.size) < 32 or any(side % 32 for side in self.size):
            raise ValueError(
                f"the probe's image size is {self.size}: give two multiples of 32 (TEST.PROBE.SIZE)"
            )
        if self.cells < 1 or self.images < 0:
            raise ValueError(
                f"the probe takes at least one cell and no negative number of images, got {self.cells} and "
                f"{self.images} (TEST.PROBE.CELLS, TEST.PROBE.IMAGES)"
            )
        for name, chosen, known in (
            ("FEATURES", self.features, FEATURES),
            ("WHICH", self.copies, COPIES),
            ("KINDS", self.kinds, PROBES),
        ):
            if not chosen or not set(chosen) <= set(known):
                raise ValueError(f"TEST.PROBE.{name} is {chosen}: give some of {', '.join(known)}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> ProbeSettings:
        """From `TEST.PROBE`."""
        node = cfg.TEST.PROBE
        return cls(
            train=node.TRAIN,
            val=node.VAL,
            size=tuple(node.SIZE or cfg.INPUT.PRETRAIN_CROP_SIZE),
            image_format=cfg.INPUT.FORMAT,
            features=tuple(node.FEATURES),
            copies=tuple(node.WHICH),
            kinds=tuple(node.KINDS),
            cells=node.CELLS,
            images=node.IMAGES,
        )


def labelled_records(name: str, most: int = 0) -> list[dict]:
    """Records with a label image of a data set, at most `most` (0: all), evenly spread.

    Raises:
        ValueError: the data set has no label images, or nothing that says how many classes there are.
    """
    ensure_registered(name)
    records = DatasetCatalog.get(name)
    if not records or any("sem_seg_file_name" not in record for record in records):
        raise ValueError(
            f"data set '{name}' has no label image for each of its pictures: probe a semantic one, such as "
            "folder_semantic@ROOT@SPLIT"
        )
    if not most:
        return records
    return [records[i] for i in spread_subset(len(records), most).tolist()]


def _batches(
    records: Sequence[dict], size: tuple[int, int], image_format: str
) -> Iterator[tuple[list[dict], list[np.ndarray]]]:
    """Whole images at one size as the model takes them, and their label maps at their own size."""
    for start in range(0, len(records), BATCH):
        inputs, labels = [], []
        for record in records[start : start + BATCH]:
            image = read_image(record["file_name"], image_format)
            pixels = crop_and_resize(image, (0, 0, *image.shape[:2]), size)
            inputs.append(
                {
                    "image": torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
                    "file_name": record["file_name"],
                }
            )
            labels.append(read_label_map(record["sem_seg_file_name"]))
        yield inputs, labels


@torch.no_grad()
def labelled_cells(describe: Describe, name: str, settings: ProbeSettings) -> dict[str, Cells]:
    """The labelled cells of a data set as `describe` sees them, on the CPU: at most `settings.cells` of each map,
    evenly spread over the images.

    Raises:
        ValueError: a label that is no class, or no labelled cell at all.
    """
    records = labelled_records(name, settings.images)
    classes, ignore = num_classes(name), MetadataCatalog.get(name).get("ignore_label", 255)
    features: dict[str, list[Tensor]] = {}
    labels: dict[str, list[Tensor]] = {}
    for inputs, truths in _batches(records, settings.size, settings.image_format):
        most = -(-settings.cells * len(inputs) // len(records))
        for key, maps in describe(inputs).items():
            truth = np.stack([at_cell_centres(t, *maps.shape[-2:]) for t in truths])
            y = torch.from_numpy(truth).flatten()
            place = (y != ignore).nonzero().flatten()
            place = place[spread_subset(len(place), most)]
            x = maps.float().permute(0, 2, 3, 1).flatten(0, 2)
            features.setdefault(key, []).append(x[place.to(x.device)].cpu())
            labels.setdefault(key, []).append(y[place])
    cells = {key: Cells(torch.cat(features[key]), torch.cat(labels[key])) for key in features}
    for found in cells.values():
        if not len(found.labels):
            raise ValueError(
                f"data set '{name}' has no labelled pixel under any cell: check its label images"
            )
        if int(found.labels.max()) >= classes:
            raise ValueError(
                f"the label images of data set '{name}' hold the value {int(found.labels.max())}, but it has "
                f"{classes} classes and ignores {ignore}: check its label images and class names"
            )
    return cells


def assign_clusters(counts: np.ndarray) -> np.ndarray:
    """The one-to-one names of clusters that agree with the most labels (Hungarian method): counts int64
    [clusters, classes] -> class of each cluster int64 [clusters]."""
    return linear_sum_assignment(counts, maximize=True)[1].astype(np.int64)


def probe(describe: Describe, settings: ProbeSettings, device: torch.device | str) -> Rows:
    """Scores of every map that `describe` gives, fitted on `settings.train`, measured on `settings.val`."""
    train = labelled_cells(describe, settings.train, settings)
    val = labelled_cells(describe, settings.val, settings)
    classes = num_classes(settings.train)
    if num_classes(settings.val) != classes:
        raise ValueError(
            f"data set '{settings.train}' has {classes} classes and '{settings.val}' "
            f"{num_classes(settings.val)}: probe on two sets of the same classes"
        )
    return {
        key: probe_scores(cells.to(device), val[key].to(device), classes, assign_clusters, settings.kinds)
        for key, cells in train.items()
    }


def probe_model(model: Any, settings: ProbeSettings) -> Rows:
    """Scores of a MaskJEPA's features: "stride8", "stride4" of the online copy, "stride8_ema", ... of the EMA one.

    Raises:
        ValueError: the model pads images of this size, so that cells and labels would not meet.
    """
    if any(side % model.size_divisibility for side in settings.size):
        raise ValueError(
            f"the probe's image size is {settings.size}, and the model pads images to multiples of "
            f"{model.size_divisibility}: give such multiples (TEST.PROBE.SIZE)"
        )

    def describe(inputs: list[dict]) -> dict[str, Tensor]:
        found = {}
        for which in settings.copies:
            maps = model.features(inputs, which=which)
            suffix = "" if which == "online" else f"_{which}"
            found.update({name + suffix: maps[name] for name in settings.features})
        return found

    return probe(describe, settings, model.device)


def probe_floors(settings: ProbeSettings, device: torch.device | str = "cpu") -> Rows:
    """Scores without any network, on cells of stride 8: "position" and "colour_position" (see `floor_maps`)."""

    def describe(inputs: list[dict]) -> dict[str, Tensor]:
        maps = floor_maps(torch.stack([item["image"] for item in inputs]), FLOOR_STRIDE)
        return {name: maps[name] for name in FLOORS}

    return probe(describe, settings, device)


def table(rows: Rows) -> str:
    """Rows of scores as aligned text, one column a score."""
    columns = list(next(iter(rows.values())))
    head = max(len("features"), *map(len, rows))
    lines = ["  ".join(["features".ljust(head), *columns])]
    for name, values in rows.items():
        cells = [f"{values[column]:.2f}".rjust(len(column)) for column in columns]
        lines.append("  ".join([name.ljust(head), *cells]))
    return "\n".join(lines)
