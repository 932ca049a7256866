"""Unlabelled images: their sources, the sample of one position, and the record of unreadable files."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from torch.utils.data import Dataset

from jepa_plugins.core.images import (
    CROP_TRIES,
    ImageError,
    crop_and_resize,
    list_image_files,
    read_image,
    resized_crop_box,
)

from .catalog import resolve_path

logger = logging.getLogger(__name__)

REPORT_NAME = "unreadable_images.json"
CROP_STREAM = 1  # separates the draws of the crop from other draws of the same sample
ENOUGH_SEEN = 1000  # below this many files, the allowance of unreadable ones is that of this many
_LOGGED_FILES = 20  # more unreadable files than these are named in the report only
_MAX_REPLACEMENTS = 100  # unreadable files in a row before a sample is given up


def _names_in_list(path: str) -> list[str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"DATASETS.UNLABELLED: list file '{path}' is empty: give one image path per line.")
    return names


def _names_in_json(path: str) -> list[str]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"DATASETS.UNLABELLED: '{path}' is no valid json ({error}).") from error
    images = content.get("images") if isinstance(content, dict) else None
    names = [image.get("file_name") for image in images or []]
    if not names or not all(names):
        raise ValueError(
            f"DATASETS.UNLABELLED: json file '{path}' lists no images: "
            'it needs COCO\'s "images", each with a file_name.'
        )
    return names


def _json_roots(path: str) -> list[Path]:
    """Places where the images of .../annotations/instances_SPLIT.json usually are: .../SPLIT and others."""
    parent = Path(path).resolve().parent
    split = Path(path).stem.rsplit("_", 1)[-1]
    above = parent.parent
    return [above / split, above / "images" / split, parent / split, above / "images", parent, above]


def _locate(names: Sequence[str], roots: Iterable[Path], source: str) -> list[str]:
    """Join names with the first root that holds one of a few of them (single files may be missing)."""
    probes = [names[i] for i in sorted({len(names) * k // 8 for k in range(8)})]
    for root in roots:
        if any((root / probe).is_file() for probe in probes):
            return [str(root / name) for name in names]
    raise FileNotFoundError(
        f"DATASETS.UNLABELLED: the images that '{source}' names, such as '{names[0]}', were not found: "
        "set DATASETS.UNLABELLED_ROOT to the folder that these paths are relative to."
    )


def list_source(source: str, root: str = "") -> list[str]:
    """Paths of the images of one source.

    Args:
        source: a folder (searched recursively, sorted), a list file (.txt) or a COCO json file (.json).
        root: folder that the paths inside list and json files are relative to; when it is empty, the list
            file's own folder, or the usual places around a json file.

    Returns:
        Image paths, at least one.

    Raises:
        FileNotFoundError: the source or the images that it names do not exist.
        ValueError: it holds no images, or is of another kind.
    """
    path = resolve_path(source)
    if os.path.isdir(path):
        files = list_image_files(path)
        if not files:
            raise ValueError(
                f"DATASETS.UNLABELLED: folder '{source}' holds no images: "
                "name a folder with .jpg, .png, .tif, .bmp or .webp files below it."
            )
        return files
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"DATASETS.UNLABELLED: '{source}' does not exist: "
            "give a folder of images, a list file (.txt) or a COCO json file (.json)."
        )
    suffix = Path(path).suffix.lower()
    if suffix not in (".txt", ".json"):
        raise ValueError(
            f"DATASETS.UNLABELLED: '{source}' is of an unknown kind: "
            "give a folder of images, a list file (.txt) or a COCO json file (.json)."
        )
    names = _names_in_list(path) if suffix == ".txt" else _names_in_json(path)
    if root:
        return _locate(names, [Path(resolve_path(root))], source)
    return _locate(names, [Path(path).parent] if suffix == ".txt" else _json_roots(path), source)


def list_unlabelled(cfg: CfgNode) -> list[str]:
    """Paths of all images of ``cfg.DATASETS.UNLABELLED``, source by source; raises as `list_source` does."""
    if not cfg.DATASETS.UNLABELLED:
        raise ValueError(
            "DATASETS.UNLABELLED is empty: "
            "name at least one folder of images, list file (.txt) or COCO json file (.json)."
        )
    files: list[str] = []
    for source in cfg.DATASETS.UNLABELLED:
        found = list_source(source, cfg.DATASETS.UNLABELLED_ROOT)
        logger.info("%d unlabelled images in '%s'", len(found), source)
        files.extend(found)
    return files


class UnlabelledDataset(Dataset):
    """Crops of unlabelled images, addressed by (position in the stream, index of the file).

    The crop depends on the seed and the position alone. A file that cannot be read is replaced by the next
    one that can, and both are told to the main process inside the sample (see `UnreadableImages`).

    Args:
        files: image paths.
        seed: of the run.
        crop_size: (height, width) of a crop in pixels.
        crop_scale: lowest and highest share of the image's area.
        crop_ratio: lowest and highest width / height of the box.
        flip: probability of mirroring.
        image_format: "RGB", "BGR" or "L".
    """

    def __init__(
        self,
        files: list[str],
        *,
        seed: int = 0,
        crop_size: Sequence[int] = (512, 512),
        crop_scale: Sequence[float] = (0.3, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        image_format: str = "RGB",
    ) -> None:
        # Serialised once, so that workers share the pages of a list of millions of paths.
        self.files = DatasetFromList(files, copy=False)
        self.seed = seed
        self.crop_size = tuple(crop_size)
        self.crop_scale = tuple(crop_scale)
        self.crop_ratio = tuple(crop_ratio)
        self.flip = flip
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> UnlabelledDataset:
        """Build from ``DATASETS.UNLABELLED*``, ``INPUT.PRETRAIN_*``, ``INPUT.FORMAT`` and ``SEED``."""
        size, scale, ratio = (
            cfg.INPUT.PRETRAIN_CROP_SIZE,
            cfg.INPUT.PRETRAIN_CROP_SCALE,
            cfg.INPUT.PRETRAIN_CROP_RATIO,
        )
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"INPUT.PRETRAIN_CROP_SIZE = {size}: give height and width in pixels.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"INPUT.PRETRAIN_CROP_SCALE = {scale}: give two shares, 0 < low <= high <= 1.")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"INPUT.PRETRAIN_CROP_RATIO = {ratio}: give two ratios, 0 < low <= high.")
        return cls(
            list_unlabelled(cfg),
            seed=max(cfg.SEED, 0),
            crop_size=size,
            crop_scale=scale,
            crop_ratio=ratio,
            flip=cfg.INPUT.PRETRAIN_FLIP,
            image_format=cfg.INPUT.FORMAT,
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """Sample at (position, index).

        Returns:
            "image" uint8 [C, crop height, crop width]; "file_name"; "height" and "width" of the whole image;
            "sample_index", the position; "file_index"; "unreadable", a list of (index, reason) of the files
            that this one stands in for. Without "image" when no readable file was found.
        """
        position, index = place
        sample: dict[str, Any] = {"sample_index": position, "unreadable": []}
        for step in range(min(len(self), _MAX_REPLACEMENTS)):
            file_index = (index + step) % len(self)
            file_name = self.files[file_index]
            try:
                image = read_image(file_name, self.image_format)
            except ImageError as error:
                sample["unreadable"].append((file_index, str(error)))
                continue
            sample.update(
                image=torch.from_numpy(self._crop(image, position)).permute(2, 0, 1).contiguous(),
                file_name=file_name,
                file_index=file_index,
                height=image.shape[0],
                width=image.shape[1],
            )
            break
        return sample

    def _crop(self, image: np.ndarray, position: int) -> np.ndarray:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, position, CROP_STREAM]))
        flip = rng.random() < self.flip
        uniforms = rng.random((CROP_TRIES, 4))
        box = resized_crop_box(image.shape[0], image.shape[1], uniforms, self.crop_scale, self.crop_ratio)
        return crop_and_resize(image, box, self.crop_size, flip=flip)


class UnreadableImages:
    """Counts unreadable files in the main process, names them in a report, and stops the run on too many.

    Workers tell what they could not read inside their samples, so nothing is shared between processes. Each
    training process writes its own report: ``unreadable_images.json``, and ``unreadable_images.rankN.json``.

    The run stops when more files were unreadable than `max_share` of the distinct files seen so far, counting
    at least `ENOUGH_SEEN` (or all files of a smaller data set): one bad file among ten proves nothing yet.

    Args:
        files: all image paths, by index.
        output_dir: folder of the report; empty or None writes none.
        max_share: largest tolerated share of unreadable files.
        rank: of this process.
        resume: go on from the report that an earlier part of this run left behind.
    """

    def __init__(
        self,
        files: Sequence[str] | DatasetFromList,
        output_dir: str | None = None,
        max_share: float = 0.01,
        *,
        rank: int = 0,
        resume: bool = False,
    ) -> None:
        self.files = files
        self.max_share = max_share
        name = REPORT_NAME if rank == 0 else REPORT_NAME.replace(".json", f".rank{rank}.json")
        self.path = os.path.join(output_dir, name) if output_dir else None
        self._seen = np.zeros(len(files), dtype=bool)
        self._seen_before = 0
        self._reasons: dict[int, str] = {}
        if self.path and os.path.isfile(self.path):
            if resume:
                self._restore(self.path)
            else:
                os.remove(self.path)  # of another run in the same folder

    def _restore(self, path: str) -> None:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        if report["files"] != len(self.files):
            return  # another data set: its indices mean nothing here
        self._seen_before = report["seen"]
        for entry in report["unreadable"]:
            self._reasons[entry["index"]] = entry["reason"]
            self._seen[entry["index"]] = True

    @property
    def seen(self) -> int:
        """Number of distinct files tried so far."""
        return max(self._seen_before, int(self._seen.sum()))

    @property
    def unreadable(self) -> list[str]:
        """Paths of the unreadable files, in the order in which they were met."""
        return [self.files[index] for index in self._reasons]

    def update(self, samples: list[dict[str, Any]]) -> None:
        """Take the "unreadable" entry out of each sample and count it.

        Raises:
            ImageError: too large a share is unreadable, or no readable file was found for a sample.
        """
        new = False
        for sample in samples:
            for index, reason in sample.pop("unreadable"):
                self._seen[index] = True
                if index not in self._reasons:
                    new = True
                    self._reasons[index] = reason
                    if len(self._reasons) <= _LOGGED_FILES:
                        logger.warning("Skipped an unreadable file: %s", reason)
            if "file_index" in sample:
                self._seen[sample["file_index"]] = True
        given_up = any("image" not in sample for sample in samples)
        if new:
            self.write()
        if new or given_up:
            self._check(given_up)

    def _check(self, given_up: bool) -> None:
        bad, seen = len(self._reasons), self.seen
        allowed = self.max_share * max(seen, min(len(self.files), ENOUGH_SEEN))
        if bad <= allowed and not given_up:
            return
        examples = ", ".join(f"'{name}'" for name in self.unreadable[:3])
        report = f" (all are named in '{self.path}')" if self.path else ""
        raise ImageError(
            f"{bad} of the {seen} unlabelled images seen so far ({bad / seen:.1%}) cannot be read, "
            f"such as {examples}{report}: "
            f"repair or remove them, or raise DATASETS.UNLABELLED_MAX_BAD (now {self.max_share:g})."
        )

    def write(self) -> None:
        """Write the report at once or not at all: a reader never sees half of it."""
        if not self.path:
            return
        entries = [
            {"index": index, "file_name": self.files[index], "reason": reason}
            for index, reason in self._reasons.items()
        ]
        report = {
            "files": len(self.files),
            "seen": self.seen,
            "unreadable_count": len(entries),
            "max_share": self.max_share,
            "unreadable": entries,
        }
        folder = os.path.dirname(self.path) or "."
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=REPORT_NAME, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
        os.replace(temporary, self.path)
