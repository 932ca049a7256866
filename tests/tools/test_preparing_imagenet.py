"""tools/prepare_data.py imagenet: folders or shards of the published archives, whole classes, nothing outside."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import prepare_data
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from preparing import check, imagenet
from preparing.imagenet import Class, Member, shard_classes

from jepa_plugins.core.sources import Sources

CLASSES = ("n01440764", "n01443537", "n01484850", "n01491361")
ANY = ("--any-count", "--workers", "1")


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(file, format="JPEG")
    return file.getvalue()


def tar(files: Iterable[tuple[str, bytes]]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def images_of(k: int, name: str) -> list[tuple[str, bytes]]:
    return [(f"{name}_{i}.JPEG", jpeg(20 * k + i)) for i in range(3 + k)]


@pytest.fixture()
def train(tmp_path: Path) -> Path:
    """A tar of tars, in no order."""
    path = tmp_path / "ILSVRC2012_img_train.tar"
    order = (2, 0, 3, 1)
    path.write_bytes(tar((f"{CLASSES[k]}.tar", tar(images_of(k, CLASSES[k]))) for k in order))
    return path


@pytest.fixture()
def val(tmp_path: Path) -> Path:
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar((f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(i)) for i in (5, 0, 3, 1, 4, 2)))
    return path


def labels(tmp_path: Path) -> Path:
    path = tmp_path / "synsets.txt"
    path.write_text("".join(f"{CLASSES[k]}\n" for k in (1, 0, 1, 3, 0, 1)))
    return path


def run(out: Path, *options: object) -> int:
    return prepare_data.main(["imagenet", "--out", str(out), *map(str, options)])


def content(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def expected(names: Iterable[str] = CLASSES) -> dict[str, str]:
    return {
        f"{name}/{file}": hashlib.sha256(data).hexdigest()
        for k, name in enumerate(CLASSES)
        for file, data in images_of(k, name)
        if name in names
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_train_folders(train: Path, tmp_path: Path, workers: int) -> None:
    assert run(tmp_path / "out", "--train-archive", train, "--any-count", "--workers", workers) == 0
    assert content(tmp_path / "out" / "train") == expected()


def test_counts_are_held_to_the_published_ones(train: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert run(tmp_path / "out", "--train-archive", train, "--workers", 1) == 1
    error = capsys.readouterr().err
    assert "18 of 1,281,167 train images" in error and error.count("\n") == 1
    monkeypatch.setattr(check, "published_count", lambda name: {"imagenet": 18}[name])
    assert run(tmp_path / "out", "--train-archive", train, "--workers", 1) == 0


def test_an_interrupted_run_leaves_whole_classes_and_goes_on(
    train: Path, tmp_path: Path, monkeypatch
) -> None:
    read, calls = imagenet._content, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 5:  # in the second class
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(imagenet, "_content", stop)
    assert run(tmp_path / "out", "--train-archive", train, *ANY) == 130
    visible = [path.name for path in (tmp_path / "out/train").iterdir() if not path.name.startswith(".")]
    assert visible == [CLASSES[0]]
    done = content(tmp_path / "out/train" / CLASSES[0])
    assert len(done) == 3
    monkeypatch.setattr(imagenet, "_content", read)
    assert run(tmp_path / "out", "--train-archive", train, *ANY) == 0
    assert content(tmp_path / "out/train") == expected()


def test_what_an_interrupted_run_left_is_not_counted(tmp_path: Path) -> None:
    part = check.select(["imagenet"])[0].parts[0]
    for name in ("n01", ".n02.partial"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "a.JPEG").touch()
    assert check.examine(tmp_path, part).count == 1


# --- validation images ---


def devkit(path: Path, numbers: Iterable[int]) -> Path:
    """The published layout: meta.mat, in which groups of classes follow the classes, and the numbers."""
    savemat = pytest.importorskip("scipy.io").savemat
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(k + 1, name, "a fish", 0) for k, name in enumerate(CLASSES)] + [(5, "n00001740", "entity", 4)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    root = "ILSVRC2012_devkit_t12/data"
    text = "".join(f"{number}\n" for number in numbers).encode()
    path.write_bytes(b"")
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (
            (f"{root}/meta.mat", meta.getvalue()),
            (f"{root}/ILSVRC2012_validation_ground_truth.txt", text),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["list", "pairs", "devkit"])
def test_validation_images_go_to_their_classes(val: Path, tmp_path: Path, kind: str) -> None:
    order = (1, 0, 1, 3, 0, 1)  # of the images by name
    path = labels(tmp_path)
    if kind == "pairs":
        lines = [f"ILSVRC2012_val_{i + 1:08d} {CLASSES[k]}\n" for i, k in enumerate(order)]
        path.write_text("".join(reversed(lines)))
    elif kind == "devkit":
        path = devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", [k + 1 for k in order])
    assert run(tmp_path / "out", "--val-archive", val, "--val-labels", path, *ANY) == 0
    assert content(tmp_path / "out" / "val") == {
        f"{CLASSES[k]}/ILSVRC2012_val_{i + 1:08d}.JPEG": hashlib.sha256(jpeg(i)).hexdigest()
        for i, k in enumerate(order)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764\n" * 5, "has 5 classes for 6 images"),
        ("ILSVRC2012_val_00000001 n01440764\n", "has no line on ILSVRC2012_val_00000002"),
        ("../x\n" * 6, "names a class '../x'"),
    ],
)
def test_wrong_lists_are_one_sentence(val: Path, tmp_path: Path, text: str, message: str, capsys) -> None:
    (tmp_path / "list.txt").write_text(text)
    assert run(tmp_path / "out", "--val-archive", val, "--val-labels", tmp_path / "list.txt", *ANY) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_wrong_devkit_is_one_sentence(val: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("scipy")
    (tmp_path / "kit.tar.gz").write_bytes(b"no tar")
    assert run(tmp_path / "out", "--val-archive", val, "--val-labels", tmp_path / "kit.tar.gz", *ANY) == 1
    assert "is no whole devkit" in capsys.readouterr().err
    path = devkit(tmp_path / "other.tar.gz", [1, 2, 3, 4, 5, 1])  # 5 is a group
    assert run(tmp_path / "out", "--val-archive", val, "--val-labels", path, *ANY) == 1
    assert "is no whole devkit" in capsys.readouterr().err


def test_what_belongs_together_is_asked_for(val: Path, tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "out", *ANY) == 1
    assert "give --train-archive or --val-archive" in capsys.readouterr().err
    assert run(tmp_path / "out", "--val-archive", val, *ANY) == 1
    assert "needs --val-labels" in capsys.readouterr().err
    assert run(tmp_path / "out", "--train-archive", tmp_path / "gone.tar", *ANY) == 1
    assert "gone.tar does not exist" in capsys.readouterr().err


# --- archives that are not to be trusted ---


@pytest.mark.parametrize(
    "name", ["../evil.JPEG", "/tmp/evil.JPEG", "a/b.JPEG", ".hidden.JPEG", "..", "a\\b.JPEG"]
)
@pytest.mark.parametrize("place", ["class", "image"])
def test_no_name_leads_out_of_its_folder(tmp_path: Path, place: str, name: str, capsys) -> None:
    inner = tar([(name if place == "image" else "a.JPEG", jpeg(1))])
    path = tmp_path / "train.tar"
    path.write_bytes(tar([(name.replace(".JPEG", "") + ".tar" if place == "class" else "n01.tar", inner)]))
    before = content(tmp_path)
    assert run(tmp_path / "deep" / "out", "--train-archive", path, *ANY) == 1
    error = capsys.readouterr().err
    assert "no plain file name" in error and error.count("\n") == 1
    assert content(tmp_path) == before and not Path("/tmp/evil.JPEG").exists()


def test_a_link_is_not_followed(tmp_path: Path, capsys) -> None:
    (tmp_path / "secret").write_text("x")
    info = tarfile.TarInfo("a.JPEG")
    info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        archive.addfile(info)
    path = tmp_path / "train.tar"
    path.write_bytes(tar([("n01.tar", inner.getvalue())]))
    assert run(tmp_path / "out", "--train-archive", path, *ANY) == 1
    assert "no plain file name" in capsys.readouterr().err
    assert not (tmp_path / "out/train/n01").exists()


def test_archives_cut_short_anywhere_are_one_sentence_or_are_missed_by_the_count(
    train: Path, tmp_path: Path, capsys
) -> None:
    whole = train.read_bytes()
    for k, share in enumerate((0.1, 0.35, 0.6, 0.85)):
        train.write_bytes(whole[: int(len(whole) * share)])
        assert run(tmp_path / f"out{k}", "--train-archive", train, "--workers", 1) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_an_inner_archive_without_its_end_does_not_run_into_the_next(tmp_path: Path, capsys) -> None:
    inner = tar([("a.JPEG", jpeg(1))])
    cut = inner[: 512 + -(-len(jpeg(1)) // 512) * 512]  # the member and no end mark
    path = tmp_path / "train.tar"
    path.write_bytes(tar([("n01.tar", cut), ("n02.tar", tar([("b.JPEG", jpeg(2))]))]))
    assert run(tmp_path / "out", "--train-archive", path, *ANY) == 1
    assert "n01.tar is cut short" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["train", "val"])
def test_the_wrong_archive_is_one_sentence(
    train: Path, val: Path, tmp_path: Path, which: str, capsys
) -> None:
    options = {
        "train": ["--train-archive", val],
        "val": ["--val-archive", train, "--val-labels", labels(tmp_path)],
    }[which]
    assert run(tmp_path / "out", *options, *ANY) == 1
    error = capsys.readouterr().err
    assert f"give ILSVRC2012_img_{which}.tar" in error and error.count("\n") == 1


# --- shards ---

sizes = st.lists(st.integers(1, 10**9), min_size=1, max_size=60)


@given(sizes, st.data())
def test_shards_hold_all_classes_in_order_and_none_is_empty(numbers: list[int], data) -> None:
    classes = [Class(f"n{k:08d}", Member("x", 0, size)) for k, size in enumerate(numbers)]
    count = data.draw(st.integers(1, len(classes)))
    shards = shard_classes(classes, count)
    assert len(shards) == count and all(shards)
    assert [item for shard in shards for item in shard] == classes


def test_shards_are_about_as_large_as_each_other() -> None:
    rng = np.random.default_rng(0)
    classes = [Class(f"n{k:08d}", Member("x", 0, int(s))) for k, s in enumerate(rng.normal(138e6, 2e7, 1000))]
    for count in (0, 10, 147):
        shards = shard_classes(classes, count)
        totals = [sum(item.size for item in shard) for shard in shards]
        assert len(shards) == (count or round(sum(item.size for item in classes) / 1e9))
        assert max(totals) < 1.35 * np.mean(totals) and min(totals) > 0.65 * np.mean(totals)


@pytest.mark.parametrize("workers", [1, 2])
def test_pre_training_reads_the_shards(train: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    options = ("--train-archive", train, "--shards", 2, "--any-count", "--workers", workers)
    assert run(out, *options) == 0
    assert not (out / "train").exists()
    found = Sources("SOURCE", "ROOT").list(f"{out}/shards/train-{{000000..000001}}.tar")
    names = {name.split(".tar/")[1]: k for k, name in enumerate(found)}
    assert names.keys() == expected().keys()
    image = found.read(names["n01484850/n01484850_1.JPEG"])
    assert image.shape == (8, 8, 3) and abs(int(image.mean()) - 41) <= 1
    with tarfile.open(out / "shards/train-000000.tar") as shard:
        assert {name.split("/")[0] for name in shard.getnames()} == set(CLASSES[:2])


def test_shards_have_the_same_bytes_each_time_and_are_not_written_again(train: Path, tmp_path: Path) -> None:
    options = ("--train-archive", train, "--shards", 3, *ANY)
    assert run(tmp_path / "one", *options) == run(tmp_path / "two", *options) == 0
    tars = {n: d for n, d in content(tmp_path / "one").items() if n.endswith(".tar")}
    assert (
        tars == {n: d for n, d in content(tmp_path / "two").items() if n.endswith(".tar")} and len(tars) == 3
    )
    kept = tmp_path / "one/shards/train-000002.tar"
    lost, before = tmp_path / "one/shards/train-000001.tar", kept.stat().st_mtime_ns
    lost.unlink()
    assert run(tmp_path / "one", *options) == 0
    assert kept.stat().st_mtime_ns == before
    assert hashlib.sha256(lost.read_bytes()).hexdigest() == tars["shards/train-000001.tar"]


def test_another_number_of_shards_is_refused(train: Path, tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "out", "--train-archive", train, "--shards", 2, *ANY) == 0
    before = content(tmp_path / "out")
    assert run(tmp_path / "out", "--train-archive", train, "--shards", 3, *ANY) == 1
    error = capsys.readouterr().err
    assert "shards of another archive, or in another number" in error and error.count("\n") == 1
    assert content(tmp_path / "out") == before
    assert run(tmp_path / "out", "--train-archive", train, "--shards", 5, *ANY) == 1
    assert "--shards is 5" in capsys.readouterr().err


def test_validation_shards(val: Path, tmp_path: Path) -> None:
    options = ("--val-archive", val, "--val-labels", labels(tmp_path), "--shards", *ANY)
    assert run(tmp_path / "out", *options) == 0
    with tarfile.open(tmp_path / "out/shards/val-000000.tar") as shard:
        names = shard.getnames()
    assert names == sorted(names) and len(names) == 6 and names[0] == "n01440764/ILSVRC2012_val_00000002.JPEG"
