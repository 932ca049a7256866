"""Images in files, zip files and tar shards (webdataset), by number and in any order.

An archive is read once to note where each image lies, and from then on like a file that holds many. The notes
are kept beside it in ``<archive>.index.npz``, or, where that cannot be written, below
``$XDG_CACHE_HOME/jepa_plugins`` (``~/.cache``), and made anew when the archive's size or time has changed.
No file stays open, so that worker processes, forked or spawned, have nothing to share or to lose.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import os
import re
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from jepa_plugins.core.checkpoints import CheckpointError, atomic_write
from jepa_plugins.core.images import ImageError, decode_image, images_or_arrays, may_be_image, read_image

logger = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".zip", ".tar")
INDEX_SUFFIX = ".index.npz"
MOST_SHARDS = 1_000_000  # of one pattern
_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_VERSION = 1  # of the index's format
_FIELDS = {"offsets": np.int64, "sizes": np.int64, "methods": np.uint8, "checks": np.uint32}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LOCAL_HEADER = 30  # bytes, before the name and the extra field


class ArchiveError(ValueError):
    """An archive that cannot be used; the message is one sentence that names it and the remedy."""


class _Strings(Sequence[str]):
    """Strings kept in two arrays, which processes share instead of copying them one by one."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        chosen = range(len(self))[index]
        return self._at(chosen) if isinstance(chosen, int) else [self._at(i) for i in chosen]

    @abstractmethod
    def _at(self, index: int) -> str:
        """The string at a place."""


class PackedStrings(_Strings):
    """A list of strings as one array of bytes, uint8 [n], and the end of each string in it, int64 [N]."""

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedStrings:
        """Pack; file names that are no UTF-8 survive."""
        data, ends = bytearray(), array("q")
        for string in strings:
            data += string.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        return cls(np.array(data, dtype=np.uint8), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def _at(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


class Files(_Strings):
    """Image files; an item is the path."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = PackedStrings.of(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def _at(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int, order: str, channels: int | None) -> NDArray[np.uint8]:
        return read_image(self.paths[index], order, channels=channels)


@dataclass(frozen=True, eq=False)
class Archive(_Strings):
    """The images of one archive, sorted by name; an item is `<path of the archive>/<name>`.

    path: of the archive. names: of the images in it. offsets: int64 [N], of a tar member's first byte or of a
    zip member's local header. sizes: int64 [N], stored bytes. methods, checks: compression method and CRC-32 of
    a zip's members, uint8 and uint32 [N]; zeros for a tar.
    """

    path: str
    names: PackedStrings
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    methods: NDArray[np.uint8]
    checks: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.names)

    def _at(self, index: int) -> str:
        return f"{self.path}/{self.names[index]}"

    def read(self, index: int, order: str, channels: int | None) -> NDArray[np.uint8]:
        name = self[index]
        try:
            content = self._content(index)
        except (OSError, ValueError, zlib.error) as error:
            raise ImageError(f"Image file '{name}' cannot be read ({error}).") from error
        return decode_image(io.BytesIO(content), name, order, channels=channels)

    def _content(self, index: int) -> bytes:
        zipped, size = _is_zip(self.path), int(self.sizes[index])
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            if zipped:
                header = file.read(_LOCAL_HEADER)
                if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\3\4"):
                    raise ValueError("no zip member begins where the index says")
                name, extra = header[26:28], header[28:30]
                file.seek(int.from_bytes(name, "little") + int.from_bytes(extra, "little"), os.SEEK_CUR)
            data = file.read(size)
        if len(data) < size:
            raise ValueError("the archive ends before it")
        if not zipped:
            return data
        data = zlib.decompress(data, -zlib.MAX_WBITS) if self.methods[index] else data
        if zlib.crc32(data) != self.checks[index]:
            raise ValueError("wrong check sum")
        return data


class ImageList(_Strings):
    """Images of any number of files and archives under one numbering; an item is the image's name.

    The name is the path, or `<path of the archive>/<name in it>`.
    """

    def __init__(self, parts: Iterable[Files | Archive]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    @classmethod
    def of_paths(cls, paths: Iterable[str]) -> ImageList:
        """Image files by path."""
        return cls([Files(paths)])

    @classmethod
    def joined(cls, lists: Iterable[ImageList]) -> ImageList:
        """One list after the other."""
        return cls(part for images in lists for part in images.parts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, index: int) -> tuple[Files | Archive, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def _at(self, index: int) -> str:
        part, inside = self._place(index)
        return part[inside]

    def read(self, index: int, order: str = "RGB", *, channels: int | None = None) -> NDArray[np.uint8]:
        """The image of this number (0 to len - 1), uint8 [H, W, C], as `images.read_image` gives it.

        Raises:
            ImageError: it cannot be read; the message names it.
        """
        part, inside = self._place(index)
        return part.read(inside, order, channels)


# --- finding archives ---------------------------------------------------------------------------------


def is_archive(path: str) -> bool:
    """Whether a file is an archive by its name, also one of a kind that `open_archive` refuses."""
    return path.lower().endswith(ARCHIVE_SUFFIXES) or bool(_COMPRESSED_TAR.search(path))


def expand_ranges(pattern: str) -> list[str]:
    """Paths of a pattern with ranges of numbers, as webdataset has them: "a-{008..010}" gives a-008, a-009, a-010.

    Raises:
        ArchiveError: a range that runs backwards, or more than a million paths.
    """
    parts = _RANGE.split(pattern)  # text, first, last, text, first, last, text
    ranges = [(first, int(first), int(last)) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
    if any(last < start for _, start, last in ranges):
        raise ArchiveError(f"'{pattern}' has a range that runs backwards: give {{first..last}}.")
    if np.prod([last - start + 1.0 for _, start, last in ranges]) > MOST_SHARDS:
        raise ArchiveError(f"'{pattern}' stands for more than {MOST_SHARDS} files: check its ranges.")
    numbers = [[str(n).zfill(len(text)) for n in range(start, last + 1)] for text, start, last in ranges]
    return [
        "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::3], chosen, fillvalue="")))
        for chosen in itertools.product(*numbers)
    ]


def archives_below(folder: str | os.PathLike[str]) -> list[str]:
    """Zip and tar files below a folder, sorted by path; hidden ones are left out."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if name.lower().endswith(ARCHIVE_SUFFIXES)]
    return sorted(path for path in found if not os.path.basename(path).startswith("."))


# --- the index of one archive -------------------------------------------------------------------------

Member = tuple[str, int, int, int, int]  # name, offset, size, method, check


def open_archive(path: str | os.PathLike[str]) -> Archive:
    """The images of a zip or tar file, from its index if that is there and as new as the archive.

    Raises:
        FileNotFoundError: there is no such file.
        ArchiveError: it is damaged or truncated, holds no images, is a tar compressed as a whole, an encrypted
            zip, or a zip compressed by another method than deflate.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Archive '{path}' does not exist: check its name.")
    _check_kind(path)
    state = os.stat(path)
    key = np.array([_VERSION, state.st_size, state.st_mtime_ns])
    places = _index_places(path)
    for place in places:
        if (archive := _read_index(place, path, key)) is not None:
            return archive
    members = _chosen(_zip_members(path) if _is_zip(path) else _tar_members(path))
    if not members:
        raise ArchiveError(
            f"Archive '{path}' holds no images: give one with .jpg, .png, .tif, .bmp, .webp or .npy members."
        )
    columns = [
        np.array(column, dtype=kind) for column, kind in zip(_columns(members), _FIELDS.values(), strict=True)
    ]
    archive = Archive(path, PackedStrings.of(member[0] for member in members), *columns)
    logger.info("Archive '%s': indexed %d images", path, len(archive))
    _write_index(places, archive, key)
    return archive


def _columns(members: Sequence[Member]) -> Iterator[Sequence[int]]:
    return itertools.islice(zip(*members, strict=True), 1, None)


def _is_zip(path: str) -> bool:
    return path.lower().endswith(".zip")


def _check_kind(path: str) -> None:
    with open(path, "rb") as file:
        start = file.read(8)
    if _COMPRESSED_TAR.search(path) or (not _is_zip(path) and start.startswith(_COMPRESSED_STARTS)):
        raise ArchiveError(
            f"Archive '{path}' is compressed as a whole, so that no image in it can be read without all before "
            "it: uncompress it to a plain .tar."
        )


def _chosen(members: Iterable[Member]) -> list[Member]:
    """Images, sorted by name; of members of the same name the last, as unpacking would leave it."""
    last = {}
    for member in members:
        name = member[0].removeprefix("./")
        if may_be_image(name):
            last[name] = member
    return [(name, *last[name][1:]) for name in images_or_arrays(sorted(last))]


def _tar_members(path: str) -> Iterator[Member]:
    """Regular files of a tar; links are left out."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size, 0, 0
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from error
    if not complete:
        raise _damaged(path, f"no end mark and no member at byte {end}")


def _zip_members(path: str) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as file:
            infos = [info for info in file.infolist() if may_be_image(info.filename.removeprefix("./"))]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    for info in infos:
        if info.flag_bits & 1:
            raise ArchiveError(f"Archive '{path}' is encrypted: zip its images without a password.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(
                f"Archive '{path}' is compressed by method {info.compress_type}: "
                "zip its images without compression, or with deflate."
            )
        yield info.filename, info.header_offset, info.compress_size, info.compress_type, info.CRC


def _damaged(path: str, reason: object) -> ArchiveError:
    return ArchiveError(
        f"Archive '{path}' is truncated or damaged ({str(reason).rstrip('.')}): copy or download it again."
    )


# --- keeping the index --------------------------------------------------------------------------------


def _index_places(path: str) -> list[str]:
    """Where the index of an archive may be: beside it, or in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32] + INDEX_SUFFIX
    return [path + INDEX_SUFFIX, os.path.join(cache, "jepa_plugins", "archives", name)]


def _read_index(place: str, path: str, key: NDArray[np.int64]) -> Archive | None:
    """The kept index, or None if there is none that fits; a damaged one is made anew like an old one."""
    try:
        with np.load(place, allow_pickle=False) as kept:
            if not np.array_equal(kept["key"], key):
                return None
            names = PackedStrings(kept["names"], kept["ends"])
            columns = {field: kept[field] for field in _FIELDS}
    except Exception:
        return None
    whole = len(names) > 0 and names.data.dtype == np.uint8 and names.ends[-1] == len(names.data)
    fits = all(
        columns[field].shape == (len(names),) and columns[field].dtype == kind
        for field, kind in _FIELDS.items()
    )
    return Archive(path, names, **columns) if whole and fits else None


def _write_index(places: Iterable[str], archive: Archive, key: NDArray[np.int64]) -> None:
    columns: dict[str, Any] = {field: getattr(archive, field) for field in _FIELDS}

    def write(file: BinaryIO) -> None:
        np.savez(file, key=key, names=archive.names.data, ends=archive.names.ends, **columns)

    for place in places:
        try:
            return atomic_write(place, write)
        except CheckpointError:
            continue
    logger.info("The index of '%s' could be kept nowhere: each start reads the archive once", archive.path)
