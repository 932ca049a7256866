"""Unlabelled images: where they are listed, their order in a run, and the record of unreadable ones."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jepa_plugins.core.archives import (
    ArchiveError,
    ImageList,
    archives_below,
    expand_ranges,
    is_archive,
    open_archive,
)
from jepa_plugins.core.checkpoints import atomic_write
from jepa_plugins.core.images import ImageError, list_image_files

logger = logging.getLogger(__name__)

KINDS = "a folder of images, a list file (.txt), a COCO json file (.json), a zip file or .tar shards"
REPORT_NAME = "unreadable_images.json"
ENOUGH_SEEN = 1000  # below this many files, the allowance of unreadable ones is that of this many
ORDER_STREAM = 0  # separates the order of an epoch from the draws of samples
MAX_REPLACEMENTS = 100  # unreadable files in a row before a sample is given up
_LOGGED_FILES = 20  # more unreadable files than these are named in the report only


def epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Images in the order of one epoch: a permutation of 0 ... size - 1, keyed by (seed, epoch)."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch, ORDER_STREAM]))
    # A sort of uniform values: unlike Generator.permutation, these do not change with numpy's version.
    return rng.random(size).argsort(kind="stable")


@dataclass(frozen=True)
class Sources:
    """Lists the images of a source.

    Args:
        key, root_key: names of the configuration's entries for the source and for the folder that list files are
            relative to, for messages. folders: where a relative source is looked for, after the working directory.
    """

    key: str
    root_key: str
    folders: tuple[str, ...] = ()

    def resolve(self, path: str) -> str:
        """The path from the working directory or, if it is not there, below one of the folders."""
        here = os.path.expanduser(path)
        if os.path.isabs(here) or os.path.exists(here):
            return here
        there = (os.path.join(folder, here) for folder in self.folders)
        return next((path for path in there if os.path.exists(path)), here)

    def list(self, source: str, root: str = "") -> ImageList:
        """The images of one source.

        Args:
            source: a folder (searched recursively, sorted), a list file (.txt), a COCO json file (.json), a zip
                file, a .tar shard, a folder of such archives, or several sources of one kind by a range of
                numbers ("shards/train-{000000..000146}.tar") or wildcards ("shards/*.tar"). The images of an
                archive are sorted by name, archives by path.
            root: folder that the paths inside list and json files are relative to; when it is empty, the list
                file's own folder, or the usual places around a json file.

        Returns:
            Images, at least one.

        Raises:
            FileNotFoundError: the source or the images that it names do not exist.
            ValueError: it holds no images, is of another kind, or an archive that cannot be used.
        """
        try:
            found = []
            for path in self._paths(source):
                if not os.path.exists(path):
                    raise FileNotFoundError(f"{self.key}: '{path}' does not exist: give {KINDS}.")
                found.append(self._in_folder(path) if os.path.isdir(path) else self._in_file(path, root))
        except ArchiveError as error:
            raise ValueError(f"{self.key}: {error}") from error
        return ImageList.joined(found)

    def list_all(self, sources: Sequence[str], root: str = "") -> ImageList:
        """All images of several sources, one after the other; raises as `list` does, and ValueError for none."""
        if not sources:
            raise ValueError(f"{self.key} is empty: name {KINDS}.")
        lists = []
        for source in sources:
            found = self.list(source, root)
            logger.info("%d unlabelled images in '%s'", len(found), source)
            lists.append(found)
        return ImageList.joined(lists)

    def _paths(self, source: str) -> Sequence[str]:
        """What a source with ranges ("a-{000..146}.tar") or wildcards stands for; other sources as they are."""
        paths = [self.resolve(path) for path in expand_ranges(source)]
        if len(paths) > 1 or os.path.exists(paths[0]) or not glob.has_magic(source):
            return paths
        places = [source]
        if not os.path.isabs(source):
            places += [os.path.join(folder, source) for folder in self.folders]
        found = (sorted(glob.glob(os.path.expanduser(place), recursive=True)) for place in places)
        return next((paths for paths in found if paths), [source])

    def _in_folder(self, path: str) -> ImageList:
        """Images below a folder, or, if there are none, those of the archives below it."""
        if files := list_image_files(path):
            return ImageList.of_paths(files)
        if archives := archives_below(path):
            return ImageList(open_archive(archive) for archive in archives)
        raise ValueError(
            f"{self.key}: folder '{path}' holds no images: name a folder with .jpg, .png, .tif, .bmp or .webp "
            "files, zip files or .tar shards below it."
        )

    def _in_file(self, path: str, root: str) -> ImageList:
        if is_archive(path):
            return ImageList([open_archive(path)])
        suffix = Path(path).suffix.lower()
        if suffix not in (".txt", ".json"):
            raise ValueError(f"{self.key}: '{path}' is of an unknown kind: give {KINDS}.")
        names = self._names_in_list(path) if suffix == ".txt" else self._names_in_json(path)
        if root:
            return ImageList.of_paths(self._locate(names, [Path(self.resolve(root))], path))
        roots = [Path(path).parent] if suffix == ".txt" else _json_roots(path)
        return ImageList.of_paths(self._locate(names, roots, path))

    def _names_in_list(self, path: str) -> Sequence[str]:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            raise ValueError(f"{self.key}: list file '{path}' is empty: give one image path per line.")
        return names

    def _names_in_json(self, path: str) -> Sequence[str]:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.key}: '{path}' is no valid json ({error}).") from error
        images = content.get("images") if isinstance(content, dict) else None
        names = [image.get("file_name") for image in images or []]
        if not names or not all(names):
            raise ValueError(
                f"{self.key}: json file '{path}' lists no images: "
                'it needs COCO\'s "images", each with a file_name.'
            )
        return names

    def _locate(self, names: Sequence[str], roots: Iterable[Path], source: str) -> Sequence[str]:
        """Join names with the first root that holds one of a few of them (single files may be missing)."""
        probes = [names[i] for i in sorted({len(names) * k // 8 for k in range(8)})]
        for root in roots:
            if any((root / probe).is_file() for probe in probes):
                return [str(root / name) for name in names]
        raise FileNotFoundError(
            f"{self.key}: the images that '{source}' names, such as '{names[0]}', were not found: "
            f"set {self.root_key} to the folder that these paths are relative to."
        )


def _json_roots(path: str) -> list[Path]:
    """Places where the images of .../annotations/instances_SPLIT.json usually are: .../SPLIT and others."""
    parent = Path(path).resolve().parent
    split = Path(path).stem.rsplit("_", 1)[-1]
    above = parent.parent
    return [above / split, above / "images" / split, parent / split, above / "images", parent, above]


def read_or_replace(
    files: ImageList, index: int, order: str, channels: int | None
) -> tuple[NDArray[np.uint8] | None, int, list[tuple[int, str]]]:
    """The image of this number or, where it cannot be read, the next one that can.

    Returns:
        The image uint8 [H, W, C], or None when none was found; its number; (number, reason) of those that
        could not be read.
    """
    unreadable: list[tuple[int, str]] = []
    for step in range(min(len(files), MAX_REPLACEMENTS)):
        number = (index + step) % len(files)
        try:
            return files.read(number, order, channels=channels), number, unreadable
        except ImageError as error:
            unreadable.append((number, str(error)))
    return None, index, unreadable


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
        limit_key: name of the configuration's entry for `max_share`, for messages.
    """

    def __init__(
        self,
        files: Sequence[str],
        output_dir: str | None = None,
        max_share: float = 0.01,
        *,
        rank: int = 0,
        resume: bool = False,
        limit_key: str = "DATASETS.UNLABELLED_MAX_BAD",
    ) -> None:
        self.files = files
        self.max_share = max_share
        self.limit_key = limit_key
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
    def unreadable(self) -> Sequence[str]:
        """Paths of the unreadable files, in the order in which they were met."""
        return [self.files[index] for index in self._reasons]

    def update(self, samples: Sequence[dict[str, Any]]) -> None:
        """Take the "unreadable" entry out of each sample and count it.

        Args:
            samples: each with "unreadable", (index, reason) of what could not be read, and, unless no readable
                file was found, "file_index" of what was read.

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
        given_up = any("file_index" not in sample for sample in samples)
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
        first = next(iter(self._reasons.values())).rstrip(".")
        raise ImageError(
            f"{bad} of the {seen} unlabelled images seen so far ({bad / seen:.1%}) cannot be read, "
            f"such as {examples}{report}; {first[:1].lower()}{first[1:]}: "
            f"repair or remove them, or raise {self.limit_key} (now {self.max_share:g})."
        )

    def write(self) -> None:
        """Write the report at once or not at all: a reader never sees half of it."""
        if not self.path:
            return
        entries = [
            {"index": index, "file_name": self.files[index], "reason": reason}
            for index, reason in self._reasons.items()
        ]
        report: Mapping[str, Any] = {
            "files": len(self.files),
            "seen": self.seen,
            "unreadable_count": len(entries),
            "max_share": self.max_share,
            "unreadable": entries,
        }
        atomic_write(self.path, lambda file: file.write(json.dumps(report, indent=1).encode()))
