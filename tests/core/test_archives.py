"""Zip files and tar shards: their index, its keeping, random access, and archives that cannot be used."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jepa_plugins.core import archives
from jepa_plugins.core.archives import (
    INDEX_SUFFIX,
    ArchiveError,
    ImageList,
    PackedStrings,
    archives_below,
    expand_ranges,
    open_archive,
)
from jepa_plugins.core.images import ImageError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(value: int, size: tuple[int, int] = (4, 5)) -> bytes:
    """A .png of noise."""
    pixels = np.random.default_rng(value).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def write(path: Path, members: dict[str, bytes]) -> Path:
    return (write_zip if path.suffix == ".zip" else write_tar)(path, members)


SOME = {"b/2.png": picture(2), "b/notes.txt": b"x", "a.PNG": picture(1), "b/10.png": picture(10)}


# --- reading


@pytest.mark.parametrize(
    ("name", "writer", "option"),
    [
        ("a.zip", write_zip, zipfile.ZIP_STORED),
        ("a.zip", write_zip, zipfile.ZIP_DEFLATED),
        ("a.tar", write_tar, tarfile.USTAR_FORMAT),
        ("a.tar", write_tar, tarfile.GNU_FORMAT),
        ("a.tar", write_tar, tarfile.PAX_FORMAT),
    ],
)
def test_members_are_sorted_and_read_in_any_order(tmp_path: Path, name, writer, option) -> None:
    long = "/".join(["a" * 60] * 2) + "/größe.png"  # beyond what a plain tar header holds
    archive = open_archive(writer(tmp_path / name, {**SOME, long: picture(3)}, option))
    path = tmp_path / name
    assert list(archive) == [f"{path}/{member}" for member in ("a.PNG", long, "b/10.png", "b/2.png")]
    for index, value in ((3, 2), (0, 1), (2, 10), (1, 3), (0, 1)):
        assert np.array_equal(archive.read(index, "RGB", None), pixels_of(picture(value)))


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@settings(max_examples=25, deadline=None)
@given(
    data=st.dictionaries(
        st.from_regex(r"([a-cé ]{1,3}/){0,2}[a-c0-2é .]{1,5}\.(png|npy|txt|JPG)", fullmatch=True),
        st.binary(min_size=0, max_size=1500),
        min_size=1,
        max_size=12,
    )
)
def test_any_archive_gives_the_bytes_of_its_visible_images(tmp_path_factory, suffix: str, data: dict) -> None:
    path = write(tmp_path_factory.mktemp("any") / f"x{suffix}", data)
    visible = [name for name in sorted(data) if not any(part.startswith(".") for part in name.split("/"))]
    expected = [name for name in visible if name.endswith((".png", ".JPG"))]
    expected = expected or [name for name in visible if name.endswith(".npy")]
    if not expected:
        with pytest.raises(ArchiveError, match="holds no images"):
            open_archive(path)
        return
    for archive in (open_archive(path), open_archive(path)):  # made, and kept
        assert list(archive.names) == expected
        assert [archive._content(i) for i in range(len(archive))] == [data[name] for name in expected]


def test_of_a_repeated_member_the_last_counts_and_hidden_ones_and_links_do_not(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, value in (("./x.png", 1), ("__MACOSX/._x.png", 2), (".x/y.png", 3), ("x.png", 4)):
            content = picture(value)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, "x.png"
        file.addfile(link)
    archive = open_archive(tmp_path / "a.tar")
    assert list(archive.names) == ["x.png"]
    assert np.array_equal(archive.read(0, "RGB", None), pixels_of(picture(4)))


def test_arrays_are_images_where_there_are_no_others(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (3, 4, 6), dtype=np.uint8)
    file = io.BytesIO()
    np.save(file, bands)
    archive = open_archive(write_tar(tmp_path / "a.tar", {"x.npy": file.getvalue()}))
    assert np.array_equal(archive.read(0, "BANDS", 6), bands)
    assert list(open_archive(write_tar(tmp_path / "b.tar", {**SOME, "x.npy": b""})).names)[0] == "a.PNG"


# --- lists


def test_a_list_numbers_files_and_archives_together(tmp_path: Path) -> None:
    (tmp_path / "f.png").write_bytes(picture(7))
    images = ImageList.joined(
        [
            ImageList.of_paths([str(tmp_path / "f.png")]),
            ImageList([open_archive(write(tmp_path / f"x{s}", SOME)) for s in (".zip", ".tar")]),
        ]
    )
    assert len(images) == 7 and len(list(images)) == 7
    assert images[0] == str(tmp_path / "f.png") and images[-1] == f"{tmp_path}/x.tar/b/2.png"
    assert images[1:3] == [f"{tmp_path}/x.zip/a.PNG", f"{tmp_path}/x.zip/b/10.png"]
    for index, value in enumerate((7, 1, 10, 2, 1, 10, 2)):
        assert np.array_equal(images.read(index, "BGR"), pixels_of(picture(value))[:, :, ::-1])
    with pytest.raises(IndexError):
        images[7]


@given(st.lists(st.text(max_size=8), max_size=8))
def test_packed_strings_are_a_list(strings: list[str]) -> None:
    strings = [os.fsdecode(text.encode("utf-8", "ignore")) for text in strings] + [os.fsdecode(b"\xff.png")]
    packed = PackedStrings.of(strings)
    assert list(packed) == strings and packed[-1] == strings[-1] and packed[1:] == strings[1:]


def test_a_pickled_list_is_small_and_reads(tmp_path: Path) -> None:
    members = {f"{i:06}.jpg": b"" for i in range(2000)} | {"x.png": picture(1)}
    images = ImageList([open_archive(write_tar(tmp_path / "a.tar", members))])
    pickled = pickle.dumps(images)
    assert len(pickled) < 2001 * 48  # the name and 29 bytes of numbers
    assert np.array_equal(pickle.loads(pickled).read(2000), pixels_of(picture(1)))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..010}.tar", ["a-008.tar", "a-009.tar", "a-010.tar"]),
        ("{0..1}/{1..2}.tar", ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]),
        ("a-{x}.tar", ["a-{x}.tar"]),
    ],
)
def test_ranges(pattern: str, expected: list[str]) -> None:
    assert expand_ranges(pattern) == expected


@pytest.mark.parametrize("pattern", ["a-{2..1}.tar", "a-{0..99999}-{0..99999}.tar"])
def test_an_impossible_range_is_one_sentence(pattern: str) -> None:
    with pytest.raises(ArchiveError) as caught:
        expand_ranges(pattern)
    assert pattern in str(caught.value)


def test_archives_below_a_folder_are_sorted(tmp_path: Path) -> None:
    for name in ("b/2.tar", "a/1.zip", "0.tar", ".hidden.tar", "0.tar.index.npz", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert archives_below(tmp_path) == [str(tmp_path / name) for name in ("0.tar", "a/1.zip", "b/2.tar")]


# --- the index


def _forbid_indexing(monkeypatch) -> None:
    def fail(path: str) -> None:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(archives, "_tar_members", fail)
    monkeypatch.setattr(archives, "_zip_members", fail)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_the_index_is_kept_beside_the_archive(tmp_path: Path, suffix: str, monkeypatch) -> None:
    path = write(tmp_path / f"x{suffix}", SOME)
    first = open_archive(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, path.name + INDEX_SUFFIX]
    _forbid_indexing(monkeypatch)
    again = open_archive(path)
    assert list(again) == list(first)
    assert np.array_equal(again.read(1, "RGB", None), pixels_of(picture(10)))


def test_the_index_goes_to_the_cache_where_the_place_is_not_writable(tmp_path: Path, monkeypatch) -> None:
    path = write_tar(tmp_path / "x.tar", SOME)
    (tmp_path / f"x.tar{INDEX_SUFFIX}").mkdir()  # nothing can be written under this name
    open_archive(path)
    kept = list((tmp_path / "cache" / "jepa_plugins" / "archives").iterdir())
    assert len(kept) == 1 and kept[0].name.endswith(INDEX_SUFFIX)
    _forbid_indexing(monkeypatch)
    assert len(open_archive(path)) == 3


def test_an_archive_whose_index_can_be_kept_nowhere_is_read(tmp_path: Path, monkeypatch) -> None:
    path = write_tar(tmp_path / "x.tar", SOME)
    (tmp_path / f"x.tar{INDEX_SUFFIX}").mkdir()
    (tmp_path / "cache").touch()
    assert len(open_archive(path)) == 3


@pytest.mark.parametrize("change", ["size", "time", "damage", "fields"])
def test_an_index_that_does_not_fit_is_made_anew(tmp_path: Path, change: str) -> None:
    path = write_tar(tmp_path / "x.tar", SOME)
    kept = Path(str(path) + INDEX_SUFFIX)
    open_archive(path)
    state = path.stat()
    if change == "size":
        write_tar(path, {**SOME, "d.png": picture(3, (90, 90))})  # beyond the padding of the end
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "time":
        write_tar(path, {("c" if name == "a.PNG" else name[:-4]) + ".png": SOME[name] for name in SOME})
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif change == "damage":
        kept.write_bytes(kept.read_bytes()[:-80])
    else:
        entries = dict(np.load(kept))
        np.savez(kept, **{**entries, "offsets": entries["offsets"][:1]})
    archive = open_archive(path)
    expected = {"size": "d.png", "time": "c.png"}.get(change, "b/2.png")
    assert list(archive.names)[-1] == expected
    assert list(open_archive(path).names) == list(archive.names)


def test_indexing_keeps_only_arrays(tmp_path: Path) -> None:
    archive = open_archive(write_tar(tmp_path / "x.tar", SOME))
    columns = [archive.offsets, archive.sizes, archive.methods, archive.checks]
    assert all(isinstance(column, np.ndarray) and column.shape == (3,) for column in columns)
    assert archive.names.data.nbytes == len("a.PNGb/10.pngb/2.png")


# --- what cannot be used


def _encrypt(path: Path) -> None:
    """Set the flag of encryption in the central directory's entries."""
    data = bytearray(path.read_bytes())
    start = 0
    while (start := data.find(b"PK\1\2", start)) >= 0:
        data[start + 8] |= 1
        start += 4
    path.write_bytes(data)


def _unusable(tmp_path: Path, kind: str) -> Path:
    tar, zipped = tmp_path / "x.tar", tmp_path / "x.zip"
    if kind == "truncated tar":
        tar.write_bytes(write_tar(tar, SOME).read_bytes()[:1200])
    elif kind == "tar cut between members":
        data = write_tar(tar, {"a.png": b"x" * 512, "b.png": b"x" * 512}).read_bytes()
        tar.write_bytes(data[:1024])
    elif kind == "tar with a damaged header":
        data = bytearray(write_tar(tar, {"a.png": b"x" * 512, "b.png": b"x" * 512}).read_bytes())
        data[1024 + 148] ^= 7  # of the second member's check sum
        tar.write_bytes(data)
    elif kind == "text as tar":
        tar.write_bytes(b"no archive" * 100)
    elif kind == "empty tar file":
        tar.touch()
    elif kind == "truncated zip":
        zipped.write_bytes(write_zip(zipped, SOME).read_bytes()[:-30])
    elif kind == "encrypted zip":
        _encrypt(write_zip(zipped, SOME))
    elif kind == "other method":
        write_zip(zipped, SOME, zipfile.ZIP_BZIP2)
    elif kind in ("x.tar", "x.zip"):
        write(tmp_path / kind, {"notes.txt": b"x"})
    elif kind in ("x.tar.gz", "x.tgz", "gzip as x.tar"):
        write_tar(tar, SOME)
        packed = tmp_path / kind.removeprefix("gzip as ")
        packed.write_bytes(gzip.compress(tar.read_bytes()))
        return packed
    return zipped if zipped.exists() else tar


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("truncated tar", "truncated or damaged"),
        ("tar cut between members", "truncated or damaged"),
        ("tar with a damaged header", "truncated or damaged"),
        ("text as tar", "truncated or damaged"),
        ("empty tar file", "truncated or damaged"),
        ("truncated zip", "truncated or damaged"),
        ("encrypted zip", "encrypted: zip its images without a password"),
        ("other method", "compressed by method 12: zip its images without compression, or with deflate"),
        ("x.tar", "holds no images"),
        ("x.zip", "holds no images"),
        ("x.tar.gz", "compressed as a whole.*uncompress it"),
        ("x.tgz", "compressed as a whole.*uncompress it"),
        ("gzip as x.tar", "compressed as a whole.*uncompress it"),
    ],
)
def test_an_unusable_archive_gives_one_sentence(tmp_path: Path, kind: str, sentence: str) -> None:
    path = _unusable(tmp_path, kind)
    with pytest.raises(ArchiveError, match=sentence) as caught:
        open_archive(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.count(". ") == 0
    assert not list(tmp_path.glob(f"*{INDEX_SUFFIX}"))


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        open_archive(tmp_path / "none.tar")


def _damage_member(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    start = data.find(SOME["b/10.png"]) if kind != "deflated" else data.rfind(b"b/10.png", 0, -200) + 8
    if kind == "header":
        data[data.rfind(b"PK\3\4", 0, start)] = 0
    elif kind == "cut":  # the index is older than the cut
        data = data[: start + 20]
    else:
        data[start + 20 : start + 60] = bytes(40)
    state = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize(
    ("suffix", "kind", "reason"),
    [
        (".tar", "pixels", "cannot be decoded"),
        (".tar", "cut", "the archive ends before it"),
        (".zip", "pixels", "wrong check sum"),
        (".zip", "header", "no zip member begins"),
        (".zip", "deflated", "cannot be read"),
    ],
)
def test_a_damaged_member_is_named_and_the_others_are_read(tmp_path: Path, suffix, kind, reason) -> None:
    path = tmp_path / f"x{suffix}"
    write_zip(path, SOME, zipfile.ZIP_DEFLATED) if kind == "deflated" else write(path, SOME)
    archive = open_archive(path)
    _damage_member(path, kind)
    with pytest.raises(ImageError, match=reason) as caught:
        archive.read(1, "RGB", None)
    assert f"'{path}/b/10.png'" in str(caught.value) and "\n" not in str(caught.value)
    assert np.array_equal(archive.read(0, "RGB", None), pixels_of(picture(1)))


def test_members_of_a_zip_behind_other_bytes(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", SOME)
    path.write_bytes(struct.pack("<I", 7) * 25 + path.read_bytes())  # as a self-extracting archive
    assert np.array_equal(open_archive(path).read(2, "RGB", None), pixels_of(picture(2)))
