"""Unlabelled images: sources, crops keyed by position, and files that cannot be read."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

from jepa_plugins.core.images import ImageError
from jepa_plugins.d2.data import add_data_config
from jepa_plugins.d2.data.loader import build_unlabelled_loader
from jepa_plugins.d2.data.unlabelled import (
    REPORT_NAME,
    UnlabelledDataset,
    UnreadableImages,
    list_source,
    list_unlabelled,
)


def _images(folder: Path, count: int, size: tuple[int, int] = (24, 20)) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    paths = [folder / f"{i:03}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def _config(*sources: str, output: Path):
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.DATASETS.UNLABELLED = sources
    cfg.INPUT.PRETRAIN_CROP_SIZE = (16, 12)
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(output)
    return cfg


# --- sources ---


def test_a_folder_is_searched_recursively_and_sorted(tmp_path: Path) -> None:
    _images(tmp_path / "b", 2)
    _images(tmp_path / "a" / "deep", 1)
    found = [Path(path).relative_to(tmp_path).as_posix() for path in list_source(str(tmp_path))]
    assert found == ["a/deep/000.png", "b/000.png", "b/001.png"]


def test_a_list_file_is_relative_to_itself_or_to_the_root(tmp_path: Path) -> None:
    paths = _images(tmp_path / "images", 2)
    here, elsewhere = tmp_path / "here.txt", tmp_path / "lists" / "elsewhere.txt"
    here.write_text("images/001.png\n\nimages/000.png\n")
    elsewhere.parent.mkdir()
    elsewhere.write_text("001.png\n000.png")
    assert list(list_source(str(here))) == paths[::-1]
    assert list(list_source(str(elsewhere), root=str(tmp_path / "images"))) == paths[::-1]
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.txt.*UNLABELLED_ROOT"):
        list_source(str(elsewhere))


@pytest.mark.parametrize(
    "place", ["train2017", "images/train2017", "annotations/train2017", "annotations", "."]
)
def test_a_coco_json_finds_its_images(tmp_path: Path, place: str) -> None:
    paths = _images(tmp_path / place, 3)
    listing = tmp_path / "annotations" / "instances_train2017.json"
    listing.parent.mkdir(exist_ok=True)
    names = [{"id": i, "file_name": Path(path).name} for i, path in enumerate(paths)]
    listing.write_text(json.dumps({"images": names}))
    assert [Path(path).resolve() for path in list_source(str(listing))] == [Path(p).resolve() for p in paths]


def test_one_missing_file_of_a_list_does_not_hide_the_others(tmp_path: Path) -> None:
    _images(tmp_path, 9)
    (tmp_path / "all.txt").write_text("\n".join(["gone.png", *(f"{i:03}.png" for i in range(9))]))
    assert len(list_source(str(tmp_path / "all.txt"))) == 10


def _bad_source(tmp_path: Path, kind: str) -> Path:
    texts = {
        "list.txt": "",
        "json.json": '{"images": []}',
        "nameless.json": '{"images": [{"id": 1}]}',
        "broken.json": "{",
        "kind.csv": "",
    }
    path = tmp_path / kind
    if kind in texts:
        path.write_text(texts[kind])
    elif kind == "empty folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("missing", "give a folder of images"),
        ("empty folder", "name a folder with"),
        ("list.txt", "give one image path per line"),
        ("json.json", "each with a file_name"),
        ("nameless.json", "each with a file_name"),
        ("broken.json", "no valid json"),
        ("kind.csv", "give a folder of images"),
    ],
)
def test_a_bad_source_gives_one_sentence_with_the_remedy(tmp_path: Path, kind: str, remedy: str) -> None:
    path = _bad_source(tmp_path, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=remedy) as caught:
        list_source(str(path))
    assert "DATASETS.UNLABELLED" in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_sources_are_joined_and_none_is_refused(tmp_path: Path) -> None:
    first, second = _images(tmp_path / "b", 2), _images(tmp_path / "a", 1)
    cfg = _config(str(tmp_path / "b"), str(tmp_path / "a"), output=tmp_path)
    assert list(list_unlabelled(cfg)) == first + second
    cfg.DATASETS.UNLABELLED = ()
    with pytest.raises(ValueError, match="DATASETS.UNLABELLED is empty"):
        list_unlabelled(cfg)


def test_a_relative_source_is_also_found_below_the_datasets_folder(tmp_path: Path, monkeypatch) -> None:
    paths = _images(tmp_path / "store" / "set", 1)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    assert list(list_source("set")) == paths


# --- samples ---


def test_a_sample_is_keyed_by_seed_and_position_alone(tmp_path: Path) -> None:
    files = _images(tmp_path, 3)
    dataset = UnlabelledDataset(files, seed=5, crop_size=(16, 12))
    sample = dataset[(7, 1)]
    assert sample["image"].shape == (3, 16, 12) and sample["image"].dtype == torch.uint8
    assert (sample["file_name"], sample["sample_index"]) == (files[1], 7)
    assert (sample["height"], sample["width"]) == (24, 20)
    np.random.seed(0)
    torch.manual_seed(0)
    again = UnlabelledDataset(files, seed=5, crop_size=(16, 12))[(7, 1)]["image"]
    assert torch.equal(sample["image"], again)
    assert not torch.equal(sample["image"], dataset[(8, 1)]["image"])
    other = UnlabelledDataset(files, seed=6, crop_size=(16, 12))[(7, 1)]["image"]
    assert not torch.equal(sample["image"], other)


def test_channel_order_follows_the_format(tmp_path: Path) -> None:
    files = _images(tmp_path, 1)
    rgb, bgr, grey = (
        UnlabelledDataset(files, crop_size=(16, 12), image_format=name)[(0, 0)]["image"]
        for name in ("RGB", "BGR", "L")
    )
    assert torch.equal(rgb, bgr.flip(0)) and grey.shape == (1, 16, 12)


def test_the_flip_share_is_the_configured_one(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for share, low, high in ((0.0, 0, 0), (1.0, 1, 1), (0.5, 0.35, 0.65)):
        dataset = UnlabelledDataset([str(tmp_path / "ramp.png")], crop_size=(8, 8), flip=share)
        images = torch.stack([dataset[(i, 0)]["image"] for i in range(150)]).float()
        mirrored = (images[..., 0].mean((1, 2)) > images[..., -1].mean((1, 2))).float().mean()
        assert low <= mirrored <= high


def test_an_image_smaller_than_the_crop_is_enlarged(tmp_path: Path) -> None:
    files = _images(tmp_path, 1, size=(5, 3)) + _images(tmp_path / "one", 1, size=(1, 1))
    dataset = UnlabelledDataset(files, crop_size=(64, 48))
    assert dataset[(0, 0)]["image"].shape == (3, 64, 48)
    pixel = dataset[(0, 1)]["image"]
    assert (pixel == pixel[:, :1, :1]).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PRETRAIN_CROP_SIZE", (0, 8)),
        ("PRETRAIN_CROP_SCALE", (0.5, 1.5)),
        ("PRETRAIN_CROP_RATIO", (2.0, 1.0)),
    ],
)
def test_a_wrong_crop_key_is_named(tmp_path: Path, key: str, value: tuple) -> None:
    _images(tmp_path / "images", 1)
    cfg = _config(str(tmp_path / "images"), output=tmp_path)
    setattr(cfg.INPUT, key, value)
    with pytest.raises(ValueError, match=f"INPUT.{key}"):
        UnlabelledDataset.from_config(cfg)


# --- unreadable files ---


def _break(*paths: str) -> None:
    for path in paths:
        Path(path).write_bytes(Path(path).read_bytes()[:60])


def test_an_unreadable_file_is_replaced_by_the_next_readable_one(tmp_path: Path) -> None:
    files = _images(tmp_path, 4)
    _break(files[3], files[0])
    dataset = UnlabelledDataset(files, crop_size=(8, 8))
    sample, plain = dataset[(2, 3)], dataset[(2, 1)]
    assert sample["file_name"] == files[1] and torch.equal(sample["image"], plain["image"])
    assert [index for index, _ in sample["unreadable"]] == [3, 0]
    assert files[3] in sample["unreadable"][0][1]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_skipped_counted_and_named(tmp_path: Path, workers: int, caplog) -> None:
    files = _images(tmp_path / "images", 10)
    _break(files[2], files[7])
    cfg = _config(str(tmp_path / "images"), output=tmp_path / "out")
    cfg.DATASETS.UNLABELLED_MAX_BAD = 0.2
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = build_unlabelled_loader(cfg)
    with caplog.at_level(logging.WARNING):
        batches = [batch for batch, _ in zip(loader, range(8), strict=False)]
    assert all("image" in sample and "unreadable" not in sample for batch in batches for sample in batch)
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert {entry["file_name"] for entry in report["unreadable"]} == {files[2], files[7]}
    assert report["files"] == 10 and report["unreadable_count"] == 2
    assert loader.unreadable.seen == 10
    assert sum("Skipped an unreadable file" in record.message for record in caplog.records) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == [REPORT_NAME]


def test_too_large_a_share_stops_the_run_with_one_sentence(tmp_path: Path) -> None:
    files = _images(tmp_path / "images", 20)
    _break(*files[5:8])
    cfg = _config(str(tmp_path / "images"), output=tmp_path / "out")
    cfg.DATASETS.UNLABELLED_MAX_BAD = 0.1
    with pytest.raises(ImageError) as caught:
        for _ in zip(build_unlabelled_loader(cfg), range(10), strict=False):
            pass
    message = str(caught.value)
    for part in ("3 of the ", "DATASETS.UNLABELLED_MAX_BAD (now 0.1)", REPORT_NAME, "images/00"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_without_any_readable_image_stops_at_once(tmp_path: Path, workers: int) -> None:
    _break(*_images(tmp_path / "images", 3))
    cfg = _config(str(tmp_path / "images"), output=tmp_path)
    cfg.DATASETS.UNLABELLED_MAX_BAD = 1.0
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(ImageError, match="3 of the 3 unlabelled images"):
        next(iter(build_unlabelled_loader(cfg)))


def test_the_allowance_starts_with_a_thousand_files() -> None:
    files = [f"{i}.jpg" for i in range(100_000)]
    counter = UnreadableImages(files, max_share=0.01)
    bad = [{"image": 0, "unreadable": [(i, "r")], "file_index": 50_000} for i in range(11)]
    counter.update(bad[:10])  # ten of eleven seen, but only a hundredth of a thousand
    with pytest.raises(ImageError, match="11 of the 12"):
        counter.update(bad[10:])


def test_a_file_met_again_counts_once() -> None:
    counter = UnreadableImages(["a", "b"], max_share=0.5)
    for _ in range(3):
        counter.update([{"image": 0, "unreadable": [(0, "r")], "file_index": 1}])
    assert counter.unreadable == ["a"] and counter.seen == 2


def test_a_resumed_run_keeps_the_report_and_a_new_run_does_not(tmp_path: Path) -> None:
    files = [f"{i}.jpg" for i in range(10)]
    first = UnreadableImages(files, str(tmp_path), max_share=0.5)
    first.update([{"image": 0, "unreadable": [(3, "r")], "file_index": 4}])
    resumed = UnreadableImages(files, str(tmp_path), max_share=0.5, resume=True)
    assert resumed.unreadable == ["3.jpg"] and resumed.seen == 2
    assert UnreadableImages(files[:5], str(tmp_path), resume=True).unreadable == []
    assert UnreadableImages(files, str(tmp_path)).unreadable == []
    assert not (tmp_path / REPORT_NAME).exists()


def test_each_training_process_writes_its_own_report(tmp_path: Path) -> None:
    for rank in range(2):
        counter = UnreadableImages(["a", "b"], str(tmp_path), max_share=1.0, rank=rank)
        counter.update([{"image": 0, "unreadable": [(rank, "r")], "file_index": 1}])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["unreadable_images.json", "unreadable_images.rank1.json"]
