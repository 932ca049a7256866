"""Labelled images outside any toolkit: semantic data sets that their name alone describes.

``folder_semantic@ROOT@SPLIT`` has images in ROOT/images/SPLIT, label images of the same names in
ROOT/annotations/SPLIT, and one class name a line, that of label 0 first, in ROOT/classes.txt. A relative ROOT is
relative to the working directory, or else to ``DETECTRON2_DATASETS`` (default "datasets").
"""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from jepa_plugins.core.images import list_image_files
from jepa_plugins.core.probes import spread_subset

logger = logging.getLogger(__name__)

IGNORE_LABEL = 255
FOLDER_SCHEME = "folder_semantic"


# --- where data lie


def data_root() -> Path:
    """The folder of all data sets: ``DETECTRON2_DATASETS``, or "datasets" in the working directory."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def resolve_path(path: str) -> str:
    """Find a path from the working directory or, if it is not there, below ``DETECTRON2_DATASETS``."""
    here = os.path.expanduser(path)
    if os.path.isabs(here) or os.path.exists(here):
        return here
    there = os.path.join(data_root(), here)
    return there if os.path.exists(there) else here


def require_path(path: Path, name: str, what: str, remedy: str) -> Path:
    """The path; raises FileNotFoundError, in one sentence, when it does not exist."""
    if not path.exists():
        raise FileNotFoundError(f"Data set '{name}': {what} '{path}' does not exist: {remedy}.")
    return path


def split_name(name: str) -> tuple[str, str, str]:
    """SCHEME@ROOT@SPLIT -> its parts, each empty where the name has another form."""
    scheme, _, place = name.partition("@")
    root, _, split = place.rpartition("@")
    return scheme, root, split


# --- a folder of images and a folder of label images


@dataclass(frozen=True)
class LabelledImages:
    """A semantic data set.

    Attributes:
        name: for messages. files: (image, label image) of each picture. classes: how many there are; a label
            image holds their numbers from 0 and `ignore_label`.
    """

    name: str
    files: tuple[tuple[str, str], ...]
    classes: int
    ignore_label: int = IGNORE_LABEL

    def fewer(self, most: int) -> LabelledImages:
        """At most `most` of the pictures (0: all), evenly spread."""
        if not most:
            return self
        chosen = spread_subset(len(self.files), most).tolist()
        return dataclasses.replace(self, files=tuple(self.files[i] for i in chosen))


@dataclass(frozen=True)
class SemanticFolder:
    """The two folders of a data set and its class names, that of label 0 first."""

    name: str
    images: Path
    labels: Path
    classes: tuple[str, ...]

    @classmethod
    def find(cls, name: str, root: Path, split: str) -> SemanticFolder:
        """Below `root`, as the module's first lines say.

        Raises:
            FileNotFoundError: a folder or the list of names is missing. ValueError: the list is empty.
        """
        layout = "expected ROOT/images/SPLIT, ROOT/annotations/SPLIT and ROOT/classes.txt"
        images = require_path(root / "images" / split, name, "the image folder", layout)
        labels = require_path(root / "annotations" / split, name, "the folder of label images", layout)
        remedy = "write one name a line, that of label 0 first"
        listing = require_path(root / "classes.txt", name, "the list of class names", remedy)
        lines = listing.read_text(encoding="utf-8").splitlines()
        classes = tuple(line.strip() for line in lines if line.strip())
        if not classes:
            raise ValueError(
                f"Data set '{name}': '{listing}' is empty: write one class name a line, label 0 first."
            )
        return cls(name, images, labels, classes)

    def pairs(self) -> list[tuple[str, str]]:
        """(image, label image) of every picture that has both, sorted by name.

        Raises:
            ValueError: two files differ in the suffix alone, or nothing belongs together.
        """
        images, labels = _files_by_stem(self.images, self.name), _files_by_stem(self.labels, self.name)
        stems = sorted(images.keys() & labels.keys())
        if not stems:
            raise ValueError(
                f"Data set '{self.name}': no image of '{self.images}' has a label image "
                f"of the same name in '{self.labels}'."
            )
        if len(stems) < max(len(images), len(labels)):
            logger.warning(
                "Data set '%s': %d images and %d label images, of which %d belong together and are used",
                self.name,
                len(images),
                len(labels),
                len(stems),
            )
        return [(images[stem], labels[stem]) for stem in stems]


def _files_by_stem(folder: Path, name: str) -> dict[str, str]:
    files: dict[str, str] = {}
    for path in list_image_files(folder):
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in files:
            raise ValueError(
                f"Data set '{name}': '{files[stem]}' and '{path}' differ in the suffix alone: remove one."
            )
        files[stem] = path
    return files


def labelled_images(name: str) -> LabelledImages:
    """The data set ``folder_semantic@ROOT@SPLIT``.

    Raises:
        ValueError: a name of another form, or wrong files. FileNotFoundError: files are missing.
    """
    scheme, root, split = split_name(name)
    if scheme != FOLDER_SCHEME or not root or not split:
        raise ValueError(
            f"data set '{name}' is not known here: give {FOLDER_SCHEME}@ROOT@SPLIT, with ROOT/images/SPLIT, "
            "ROOT/annotations/SPLIT and ROOT/classes.txt"
        )
    folder = SemanticFolder.find(name, Path(resolve_path(root)), split)
    return LabelledImages(name, tuple(folder.pairs()), len(folder.classes))
