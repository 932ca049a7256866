"""ImageNet-1K from its archives: folders of classes, or tar shards that pre-training reads as they are.

Below the folder imagenet:

train/CLASS/NAME.JPEG, val/CLASS/NAME.JPEG                         without --shards
shards/train-000000.tar ... and shards/val-000000.tar ...          with --shards; members CLASS/NAME.JPEG

A shard holds whole classes in the order of their names, so that it depends on the archive and on the number of
shards alone. The classes of validation images come from the devkit (ILSVRC2012_devkit_t12.tar.gz) or from a text
file: a line each, "CLASS" in the order of the images' names, or "NAME CLASS".
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from . import DataError
from .running import is_whole, work_off, write_json, write_whole

SHARD_BYTES = 10**9  # without a number of shards
IMAGE = ".JPEG"


@dataclass(frozen=True)
class Member:
    """A file in an archive: its plain name, its first byte, its bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Class:
    """A class's images: in a tar file inside the archive (train), or one by one (val)."""

    name: str
    inner: Member | None = None
    images: tuple[Member, ...] = ()

    @property
    def size(self) -> int:
        return self.inner.size if self.inner else sum(image.size for image in self.images)

    def members(self, archive: BinaryIO, path: Path) -> Iterator[Member]:
        """The images, in the order of the archive."""
        if self.inner is None:
            return iter(self.images)
        return read_members(archive, path, self.inner)


def read_members(archive: BinaryIO, path: Path, inside: Member | None = None) -> Iterator[Member]:
    """The files of a tar archive, or of one inside it.

    Raises:
        DataError: it is damaged, or a member is no plain file of a plain name: nothing may be written elsewhere.
    """
    name = f"{path}/{inside.name}" if inside else str(path)
    end = inside.offset + inside.size if inside else None
    archive.seek(inside.offset if inside else 0)
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if end is not None and member.offset_data + member.size > end:
                    raise DataError(f"{name} is cut short; download {path.name} again.")
                if not member.isreg() or not _is_plain(member.name):
                    raise DataError(
                        f"{name} holds '{member.name}', which is no plain file name; download {path.name} again."
                    )
                yield Member(member.name.removeprefix("./"), member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{name} is damaged ({error}); download {path.name} again.") from error


def _is_plain(name: str) -> bool:
    name = name.removeprefix("./")
    return bool(name) and not name.startswith(".") and not any(sign in name for sign in "/\\:\0")


def _content(archive: BinaryIO, path: Path, member: Member) -> bytes:
    archive.seek(member.offset)
    content = archive.read(member.size)
    if len(content) < member.size:
        raise DataError(f"{path} is cut short at {member.name}; download it again.")
    return content


# --- what is in the archives ---


def train_classes(path: Path) -> list[Class]:
    """The classes of ILSVRC2012_img_train.tar, a tar of tars CLASS.tar, by name.

    Raises:
        DataError: it is missing, damaged, or something else.
    """
    with _opened(path) as archive:
        members = list(read_members(archive, path))
    if not members or not all(member.name.endswith(".tar") for member in members):
        raise DataError(
            f"{path} holds no tar file of each class; give ILSVRC2012_img_train.tar as --train-archive."
        )
    return sorted((Class(m.name.removesuffix(".tar"), m) for m in members), key=lambda item: item.name)


def val_classes(path: Path, labels: Path) -> list[Class]:
    """The classes of ILSVRC2012_img_val.tar, by name; see the module on ``labels``.

    Raises:
        DataError: a file is missing, damaged or something else, or they do not belong together.
    """
    with _opened(path) as archive:
        images = sorted(read_members(archive, path), key=lambda member: member.name)
    if not images or not all(image.name.endswith(IMAGE) for image in images):
        raise DataError(f"{path} holds no images *{IMAGE}; give ILSVRC2012_img_val.tar as --val-archive.")
    found = read_labels(labels, [image.name for image in images])
    classes: dict[str, list[Member]] = {}
    for image, label in zip(images, found, strict=True):
        if not _is_plain(label):
            raise DataError(f"{labels} names a class '{label}'; give a devkit or a list of classes.")
        classes.setdefault(label, []).append(image)
    return [Class(name, images=tuple(classes[name])) for name in sorted(classes)]


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise DataError(f"{path} does not exist; name the archive that you have downloaded.")
    return path.open("rb")


def read_labels(path: Path, images: Sequence[str]) -> list[str]:
    """The class of each image, whose names are sorted.

    Raises:
        DataError: the file is missing or damaged, or has other images.
    """
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; give ILSVRC2012_devkit_t12.tar.gz or a list as --val-labels."
        )
    if path.suffix in (".gz", ".tgz", ".tar"):
        found = _labels_of_devkit(path)
    else:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if all(len(line) == 2 for line in lines):
            named = {name.removesuffix(IMAGE) + IMAGE: label for name, label in lines}
            unknown = next((name for name in images if name not in named), None)
            if unknown:
                raise DataError(f"{path} has no line on {unknown}; give the list of the same images.")
            return [named[name] for name in images]
        found = [line[0] for line in lines]
    if len(found) != len(images):
        raise DataError(
            f"{path} has {len(found):,} classes for {len(images):,} images; give the list of the same ones."
        )
    return found


def _labels_of_devkit(path: Path) -> list[str]:
    """The classes of the validation images in the devkit, by their ILSVRC2012 numbers."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError("the devkit's meta.mat needs the package scipy: pip install scipy.") from error
    try:
        with tarfile.open(path) as tar:
            files = {Path(member.name).name: member for member in tar if member.isreg()}
            meta = tar.extractfile(files["meta.mat"]).read()  # type: ignore[union-attr]
            numbers = tar.extractfile(files["ILSVRC2012_validation_ground_truth.txt"]).read()  # type: ignore[union-attr]
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # above the leaves come groups of classes, with numbers of their own
        by_number = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        return [by_number[int(number)] for number in numbers.split()]
    except (tarfile.TarError, KeyError, ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path} is no whole devkit ({error!r}); give ILSVRC2012_devkit_t12.tar.gz."
        ) from error


# --- folders ---


def unpack(archive: Path, classes: Sequence[Class], out: Path, workers: int) -> None:
    """Write each class's folder below ``out``: whole or not at all; those that are there are left out."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [item for item in classes if not (out / item.name).is_dir()]
    work_off(f"classes of {out.name}", partial(_unpack, archive, out), missing, workers, chunk=1)
    print(f"{out}: {len(classes)} classes")


def _unpack(path: Path, out: Path, item: Class) -> None:
    scratch = out / f".{item.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was interrupted
    scratch.mkdir()
    with path.open("rb") as archive:
        for member in item.members(archive, path):
            (scratch / member.name).write_bytes(_content(archive, path, member))
    scratch.rename(out / item.name)


# --- shards ---


def shard_classes(classes: Sequence[Class], count: int) -> list[list[Class]]:
    """Classes in order over ``count`` shards of about the same number of bytes, none empty; 0 for about 1 GB each.

    Raises:
        DataError: more shards than classes.
    """
    total = sum(item.size for item in classes)
    count = count or max(1, min(round(total / SHARD_BYTES), len(classes)))
    if not 1 <= count <= len(classes):
        raise DataError(f"--shards is {count}: give a number from 1 to the {len(classes)} classes.")
    shards: list[list[Class]] = [[] for _ in range(count)]
    done, k = 0, 0
    for place, item in enumerate(classes):
        full = shards[k] and (done + item.size / 2) * count >= total * (k + 1)
        if k + 1 < count and (full or (shards[k] and len(classes) - place == count - k - 1)):
            k += 1
        shards[k].append(item)
        done += item.size
    return shards


def write_shards(
    archive: Path, classes: Sequence[Class], out: Path, split: str, count: int, workers: int
) -> list[Path]:
    """Write shards/SPLIT-000000.tar ...: each whole or not at all; those that are there are left out.

    Returns:
        the shards.

    Raises:
        DataError: the folder holds shards of another archive or of another number.
    """
    shards = shard_classes(classes, count)
    folder = out / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{split}-{k:06d}.tar" for k in range(len(shards))]
    _check_plan(folder / f"{split}.json", archive, shards)
    jobs = [(path, shard) for path, shard in zip(paths, shards, strict=True) if not is_whole(path)]
    work_off(f"shards of {split}", partial(_write_shard, archive), jobs, workers, chunk=1)
    print(
        f"{folder}: {len(paths)} shards, to be read as {folder}/{split}-{{000000..{len(paths) - 1:06d}}}.tar"
    )
    return paths


def _check_plan(path: Path, archive: Path, shards: Sequence[Sequence[Class]]) -> None:
    """Keep what the shards are made of, or compare with what is kept."""
    plan: dict[str, Any] = {
        "bytes": archive.stat().st_size,
        "classes": [[item.name for item in shard] for shard in shards],
    }
    if is_whole(path) and json.loads(path.read_text()) != plan:
        raise DataError(
            f"{path.parent} holds shards of another archive, or in another number: remove {path.stem}* there, or "
            "give the same --shards again."
        )
    write_json(path, plan)


def _write_shard(path: Path, job: tuple[Path, Sequence[Class]]) -> None:
    target, classes = job

    def write(file: BinaryIO) -> None:
        with (
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
            path.open("rb") as archive,
        ):
            for item in classes:
                for member in item.members(archive, path):
                    info = tarfile.TarInfo(
                        f"{item.name}/{member.name}"
                    )  # time 0, no owner: the same bytes each time
                    info.size = member.size
                    tar.addfile(info, io.BytesIO(_content(archive, path, member)))

    write_whole(target, write)


# --- the command ---


@dataclass(frozen=True)
class Request:
    """What is to be made: `split` of `archive`."""

    split: str
    archive: Path
    classes: list[Class]


def requests(train_archive: Path | None, val_archive: Path | None, val_labels: Path | None) -> list[Request]:
    """The archives that were given, looked into.

    Raises:
        DataError: none was given, validation images without their classes, or an archive is damaged.
    """
    if not train_archive and not val_archive:
        raise DataError("nothing to unpack: give --train-archive or --val-archive.")
    if val_archive and not val_labels:
        raise DataError(
            "--val-archive needs --val-labels: ILSVRC2012_devkit_t12.tar.gz or a list of classes."
        )
    found = []
    if train_archive:
        found.append(Request("train", train_archive, train_classes(train_archive)))
    if val_archive and val_labels:
        found.append(Request("val", val_archive, val_classes(val_archive, val_labels)))
    return found


def prepare(out: Path, wanted: Sequence[Request], shards: int | None, workers: int) -> dict[str, int]:
    """Make what is not there yet, in folders or, if ``shards`` is a number (0: of about 1 GB each), in shards.

    Returns:
        the number of images of each split.

    Raises:
        DataError: an archive is damaged, or ``out`` holds other shards.
    """
    counts = {}
    for request in wanted:
        if shards is None:
            folder = out / request.split
            unpack(request.archive, request.classes, folder, workers)
            counts[request.split] = sum(
                len(list((folder / item.name).glob(f"*{IMAGE}"))) for item in request.classes
            )
        else:
            from jepa_plugins.core.archives import open_archive

            paths = write_shards(request.archive, request.classes, out, request.split, shards, workers)
            counts[request.split] = sum(len(open_archive(path)) for path in paths)
    return counts
