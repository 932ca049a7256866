"""The same samples from a folder, from its zip file and from its tar shards; resume, workers, bad members."""

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402

from jepa_plugins.core.images import ImageError  # noqa: E402
from jepa_plugins.d2.data import add_data_config  # noqa: E402
from jepa_plugins.d2.data import loader as loader_module  # noqa: E402
from jepa_plugins.d2.data.loader import build_unlabelled_loader  # noqa: E402
from jepa_plugins.d2.data.unlabelled import REPORT_NAME, list_source  # noqa: E402
from jepa_plugins.d2.held_out import HeldOutImages  # noqa: E402

SHARDS = 3


def _config(source: str, output: Path):
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.DATASETS.UNLABELLED = (source,)
    cfg.DATASETS.UNLABELLED_MAX_BAD = 0.5
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.PRETRAIN_CROP_SIZE = (12, 10)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 3
    cfg.OUTPUT_DIR = str(output)
    return cfg


def pack(folder: Path, target: Path) -> dict[str, str]:
    """Sources with the files of `folder`: itself, its zip, and its tar shards in each spelling."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    files.sort(key=names.__getitem__)
    shards = target / "shards"
    shards.mkdir(parents=True)
    with zipfile.ZipFile(target / "images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in reversed(files):
            file.write(path, names[path])
    for shard, part in enumerate(np.array_split(np.arange(len(files)), SHARDS)):
        with tarfile.open(shards / f"train-{shard:06}.tar", "w") as file:
            for index in reversed(part):
                file.add(files[index], names[files[index]])
    return {
        "folder": str(folder),
        "zip": str(target / "images.zip"),
        "range": f"{shards}/train-{{000000..{SHARDS - 1:06}}}.tar",
        "wildcard": f"{shards}/*.tar",
        "shards": str(shards),
    }


def make_images(folder: Path, sizes: list[tuple[int, int]], damaged: frozenset[int] = frozenset()) -> Path:
    rng = np.random.default_rng(len(sizes))
    for i, size in enumerate(sizes):
        path = folder / "ba"[i % 2] / f"{i * 7 % 100:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        if i in damaged:
            path.write_bytes(path.read_bytes()[:50])
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sources")
    return pack(make_images(root / "folder", [(14, 20)] * 9, frozenset({4})), root / "packed")


PACKED = ["zip", "range", "wildcard", "shards"]


def _samples(cfg, batches: int = 5, **start) -> list[dict]:
    return [
        sample for batch in islice(iter(build_unlabelled_loader(cfg, **start)), batches) for sample in batch
    ]


def _equal(first: list[dict], second: list[dict]) -> bool:
    keys = ("sample_index", "file_index", "height", "width")
    pairs = list(zip(first, second, strict=True))
    return all(all(a[k] == b[k] for k in keys) and torch.equal(a["image"], b["image"]) for a, b in pairs)


@pytest.mark.parametrize("kind", PACKED)
def test_the_samples_are_those_of_the_folder(sources, tmp_path: Path, kind: str) -> None:
    samples = _samples(_config(sources["folder"], tmp_path / "a"))
    packed = _samples(_config(sources[kind], tmp_path / "b"))
    assert _equal(samples, packed)
    inside = [sample["file_name"].removeprefix(sources["folder"]) for sample in samples]
    assert all(
        packed[i]["file_name"].endswith((".zip" if kind == "zip" else ".tar") + inside[i]) for i in range(20)
    )


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=SHARDS, max_size=10),
    damaged=st.frozensets(st.integers(0, 9), max_size=2),
    seed=st.integers(0, 99),
)
def test_any_folder_gives_the_same_packed(tmp_path_factory, sizes, damaged, seed) -> None:
    root = tmp_path_factory.mktemp("any")
    kinds = pack(make_images(root / "folder", sizes, damaged), root / "packed")
    streams = []
    for kind in ("folder", "zip", "range"):
        cfg = _config(kinds[kind], root / kind)
        cfg.SEED, cfg.DATASETS.UNLABELLED_MAX_BAD = seed, 1.0
        streams.append(_samples(cfg, 3))
    assert _equal(streams[0], streams[1]) and _equal(streams[0], streams[2])
    shutil.rmtree(root)


@pytest.mark.parametrize("kind", ["zip", "range"])
def test_a_resumed_run_goes_on_where_it_stopped(sources, tmp_path: Path, kind: str) -> None:
    cfg = _config(sources[kind], tmp_path)
    assert _equal(_samples(cfg, 5)[12:], _samples(cfg, 2, start_iteration=3))


@pytest.mark.parametrize("kind", ["zip", "range"])
def test_the_stream_is_the_same_in_workers(sources, tmp_path: Path, kind: str) -> None:
    cfg = _config(sources[kind], tmp_path)
    expected = _samples(cfg)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert _equal(expected, _samples(cfg))
    dataset = build_unlabelled_loader(cfg).dataset
    copied = pickle.loads(pickle.dumps(dataset))  # as a spawned worker gets it
    assert _equal([dataset[(p, p % 9)] for p in range(12)], [copied[(p, p % 9)] for p in range(12)])


def test_the_stream_is_the_same_in_several_processes(sources, tmp_path: Path, monkeypatch) -> None:
    cfg = _config(sources["range"], tmp_path)
    whole, parts = _samples(cfg, 3), []
    for rank in range(2):
        monkeypatch.setattr(loader_module.comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(loader_module.comm, "get_world_size", lambda: 2)
        parts.append(_samples(cfg, 3))
    merged = [sample for t in range(3) for part in parts for sample in part[2 * t : 2 * t + 2]]
    assert _equal(whole, merged)


@pytest.mark.parametrize("kind", PACKED)
def test_a_damaged_member_is_skipped_counted_and_named(sources, tmp_path: Path, kind: str) -> None:
    cfg = _config(sources[kind], tmp_path)
    assert all("image" in sample for sample in _samples(cfg))
    report = json.loads((tmp_path / REPORT_NAME).read_text())
    assert report["files"] == 9 and report["unreadable_count"] == 1
    (entry,) = report["unreadable"]
    archive = "images.zip" if kind == "zip" else r"train-000002.tar"
    assert entry["file_name"].endswith(f"{archive}/b/28.png") and entry["file_name"] in entry["reason"]


def test_too_many_damaged_members_stop_the_run_with_the_reason(tmp_path: Path) -> None:
    root = tmp_path / "x"
    kinds = pack(make_images(root / "folder", [(9, 9)] * 4, frozenset(range(4))), root / "packed")
    with pytest.raises(ImageError, match=r"images\.zip/.*image file '.*' cannot be decoded") as caught:
        _samples(_config(kinds["zip"], tmp_path / "out"), 1)
    assert "\n" not in str(caught.value)


def test_held_out_images_are_read_from_archives(sources, tmp_path: Path) -> None:
    cfg = _config("", tmp_path)
    cfg.DATASETS.UNLABELLED_TEST = (sources["range"],)
    cfg.DATASETS.UNLABELLED_ROOT = ""
    packed = HeldOutImages(cfg)
    cfg.DATASETS.UNLABELLED_TEST = (sources["folder"],)
    plain = HeldOutImages(cfg)
    assert len(packed) == len(plain) == 9
    assert all(torch.equal(packed[i]["image"], plain[i]["image"]) for i in (0, 3, 8))


def test_archives_below_the_datasets_folder_are_found(sources, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(Path(sources["shards"]).parent))
    monkeypatch.chdir(tmp_path)
    for source in ("images.zip", "shards/train-{000000..000002}.tar", "shards/*.tar", "shards"):
        assert len(list_source(source)) == 9


def _bad(tmp_path: Path, kind: str) -> str:
    path = tmp_path / kind
    if kind == "text.tar":
        path.write_text("no archive")
    elif kind == "empty.zip":
        zipfile.ZipFile(path, "w").close()
    elif kind == "x.tar.gz":
        with tarfile.open(path, "w:gz") as file:
            file.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    elif kind == "mixed-{0..2}.tar":
        with tarfile.open(tmp_path / "mixed-0.tar", "w") as file:
            file.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    return str(path)


@pytest.mark.parametrize(
    ("kind", "named", "remedy"),
    [
        ("text.tar", "text.tar", "copy or download it again"),
        ("empty.zip", "empty.zip", "holds no images"),
        ("x.tar.gz", "x.tar.gz", "uncompress it"),
        ("mixed-{0..2}.tar", "mixed-1.tar", "give a folder of images"),
        ("none-*.tar", "none-*.tar", "give a folder of images"),
        ("back-{3..1}.tar", "back-{3..1}.tar", "runs backwards"),
    ],
)
def test_a_bad_archive_gives_one_sentence_with_the_remedy(tmp_path: Path, kind, named, remedy) -> None:
    source = _bad(tmp_path, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=remedy) as caught:
        list_source(source)
    message = str(caught.value)
    assert message.startswith("DATASETS.UNLABELLED: ") and named in message and "\n" not in message
