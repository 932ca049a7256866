"""The probes of `core.probes` on a labelled data set: for the probe command and for the hook of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor

from jepa_plugins.core import probing
from jepa_plugins.core.labelled import LabelledImages
from jepa_plugins.core.probes import PROBES, Cells, spread_subset
from jepa_plugins.core.probing import Describe, Protocol, Rows
from jepa_plugins.d2.data.catalog import ensure_registered, num_classes

FEATURES = {"stride8": 8, "stride4": 4}  # of MaskJEPA.features, and their strides in pixels
COPIES = ("online", "ema")
FLOORS = ("position", "colour_position")
FLOOR_STRIDE = 8


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

    @property
    def protocol(self) -> Protocol:
        """What `core.probing` needs of it."""
        return Protocol(self.size, self.image_format, self.kinds, self.cells)

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


def labelled_images(name: str, most: int = 0) -> LabelledImages:
    """A registered data set for the probes; see `labelled_records`."""
    files = tuple((r["file_name"], r["sem_seg_file_name"]) for r in labelled_records(name, most))
    return LabelledImages(name, files, num_classes(name), MetadataCatalog.get(name).get("ignore_label", 255))


def labelled_cells(describe: Describe, name: str, settings: ProbeSettings) -> dict[str, Cells]:
    """The labelled cells of a registered data set; see `core.probing.labelled_cells`."""
    return probing.labelled_cells(describe, labelled_images(name, settings.images), settings.protocol)


def sets_of(settings: ProbeSettings) -> tuple[LabelledImages, LabelledImages]:
    """What the probes are fitted and measured on."""
    return labelled_images(settings.train, settings.images), labelled_images(settings.val, settings.images)


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

    return probing.probe(describe, *sets_of(settings), settings.protocol, model.device)


def probe_floors(settings: ProbeSettings, device: torch.device | str = "cpu") -> Rows:
    """Scores without any network, on cells of stride 8: "position" and "colour_position" (see `floor_maps`)."""
    return probing.probe_floors(*sets_of(settings), settings.protocol, FLOOR_STRIDE, FLOORS, device)
