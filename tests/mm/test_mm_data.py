"""The stream of a run: what is seen when, whatever the processes, workers and interruptions."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_tiny import write_images
from PIL import Image
from torch.utils.data import DataLoader

from jepa_plugins.core.images import ImageError
from jepa_plugins.core.sources import UnreadableImages
from jepa_plugins.mm.data import (
    EpochSampler,
    Place,
    RunBatchSampler,
    UnlabelledImages,
    collate_images,
)

CROP = [{"type": "KeyedResizedCrop", "size": 32}]


def batches(
    size: int, batch: int, rank: int = 0, world: int = 1, accumulation: int = 1, **kwargs
) -> RunBatchSampler:
    sampler = RunBatchSampler(EpochSampler(range(size), seed=5), batch, **kwargs)
    sampler.rank, sampler.world, sampler.accumulation = rank, world, accumulation
    return sampler


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_an_epoch_holds_each_image_once_and_processes_share_a_step(
    size: int, batch: int, world: int, accumulation: int, epoch: int
) -> None:
    parts = [batches(size, batch, rank, world, accumulation) for rank in range(world)]
    one, whole = parts[0], batches(size, batch * world * accumulation)
    seen: list[int] = []
    for step in range(epoch * one.steps_per_epoch, (epoch + 1) * one.steps_per_epoch):
        local = [
            place
            for part in range(accumulation)
            for sampler in parts
            for place in sampler.places(step * accumulation + part)
        ]
        # the others keep a process busy that has no image of the step
        local = [place for place in local if place.position < place.start + place.total]
        assert local == whole.places(step)
        assert [p.position for p in local] == list(range(local[0].start, local[0].start + local[0].total))
        assert local[0].start == step * one.global_batch
        counts = [len(s.places(step * accumulation + a)) for s in parts for a in range(accumulation)]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1
        seen += [place.image for place in local]
    assert seen == parts[0].sampler.order(epoch).tolist()


def test_imagenet_has_626_steps_an_epoch_or_625() -> None:
    assert batches(1_281_167, 256, world=8).steps_per_epoch == 626
    assert len(batches(1_281_167, 256, world=8, accumulation=2)) == 2 * 313
    dropped = batches(1_281_167, 256, world=8, drop_last=True)
    assert dropped.steps_per_epoch == 625
    last = batches(10, 4, drop_last=True)
    assert [len(last.places(i)) for i in range(4)] == [4, 4, 4, 4]
    assert last.places(2)[0].image == last.sampler.order(1)[0]


def test_a_later_start_is_the_rest_of_the_stream() -> None:
    stream = iter(batches(10, 4))
    first = [next(stream) for _ in range(9)]
    later = batches(10, 4)
    later.start = 6
    stream = iter(later)
    assert [next(stream) for _ in range(3)] == first[6:]


def test_epochs_are_shuffled_differently_and_without_shuffling_in_file_order() -> None:
    sampler = EpochSampler(range(50), seed=1)
    assert sampler.order(0).tolist() != sampler.order(1).tolist()
    assert EpochSampler(range(50), seed=2).order(0).tolist() != sampler.order(0).tolist()
    assert EpochSampler(range(5), seed=1, shuffle=False).order(3).tolist() == [0, 1, 2, 3, 4]


def test_too_few_images_to_drop_some() -> None:
    with pytest.raises(ValueError, match="3 images make no batch of 4: set .*drop_last=False"):
        _ = batches(3, 4, drop_last=True).steps_per_epoch
    with pytest.raises(ValueError, match="needs train_dataloader.sampler"):
        RunBatchSampler(range(4), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train_dataloader.batch_size is a whole number from 1 on, got 0"):
        batches(10, 0)


def test_relative_sources_lie_below_the_folder_of_all_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "all" / "imagenet" / "train", 3)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "all"))
    assert len(UnlabelledImages("imagenet/train", CROP)) == 3
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all").rename("datasets")
    assert len(UnlabelledImages("imagenet/train", CROP)) == 3


def test_samples_depend_on_the_place_alone(tmp_path: Path) -> None:
    dataset = UnlabelledImages(str(write_images(tmp_path, 6)), CROP)
    whole = batches(6, 6)
    whole.start = 1
    loaders = {
        workers: iter(
            DataLoader(dataset, batch_sampler=batches(6, 6), num_workers=workers, collate_fn=collate_images)
        )
        for workers in (0, 2)
    }
    for _ in range(2):
        first, second = next(loaders[0]), next(loaders[2])
        assert torch.equal(first["inputs"], second["inputs"]) and first["place"] == second["place"]
    again = collate_images([dataset[place] for place in whole.places(1)])
    assert torch.equal(again["inputs"], first["inputs"])
    assert first["inputs"].dtype == torch.uint8 and first["inputs"].shape == (6, 3, 32, 32)
    moved = dataset[whole.places(1)[0]._replace(position=999)]["img"]
    assert not np.array_equal(moved, dataset[whole.places(1)[0]]["img"])


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((36, 36, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["folder", "list", "zip", "shards", "two"])
def test_kinds_of_source(tmp_path: Path, kind: str) -> None:
    contents = {f"{i}.png": png(40 * i) for i in range(4)}
    (tmp_path / "images").mkdir()
    for name, content in contents.items():
        (tmp_path / "images" / name).write_bytes(content)
    (tmp_path / "list.txt").write_text("\n".join(contents))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as tar:
            for name in list(contents)[2 * shard : 2 * shard + 2]:
                info = tarfile.TarInfo(name)
                info.size = len(contents[name])
                tar.addfile(info, io.BytesIO(contents[name]))
    source: str | list[str] = {
        "folder": str(tmp_path / "images"),
        "list": str(tmp_path / "list.txt"),
        "zip": str(tmp_path / "all.zip"),
        "shards": str(tmp_path / "s-{0..1}.tar"),
        "two": [str(tmp_path / "all.zip"), str(tmp_path / "images")],
    }[kind]
    root = str(tmp_path / "images") if kind == "list" else ""
    dataset = UnlabelledImages(source, CROP, root=root)
    count = 8 if kind == "two" else 4
    values = [int(dataset[Place(0, i, i, 0, count)]["img"].mean()) for i in range(len(dataset))]
    assert values == [0, 40, 80, 120] * (count // 4)


@pytest.mark.parametrize(
    ("source", "error", "sentence"),
    [
        ("nowhere", FileNotFoundError, "train_dataloader.dataset.source: 'nowhere' does not exist: give"),
        ([], ValueError, "train_dataloader.dataset.source is empty: name"),
        ("list.txt", FileNotFoundError, "set train_dataloader.dataset.root to the folder"),
        ("empty", ValueError, "folder '.*empty' holds no images"),
    ],
)
def test_bad_sources(tmp_path: Path, source: str | list[str], error: type, sentence: str) -> None:
    (tmp_path / "list.txt").write_text("missing.png\n")
    (tmp_path / "empty").mkdir()
    if source in ("list.txt", "empty"):
        source = str(tmp_path / source)
    with pytest.raises(error, match=sentence):
        UnlabelledImages(source, CROP)


def test_unreadable_images_are_replaced_and_reported(tmp_path: Path) -> None:
    folder = write_images(tmp_path, 5)
    (folder / "002.png").write_bytes(b"no image")
    dataset = UnlabelledImages(str(folder), CROP)
    sample = dataset[Place(0, 2, 2, 0, 5)]
    assert sample["file_index"] == 3 and sample["unreadable"][0][0] == 2
    batch = collate_images([sample, dataset[Place(0, 3, 3, 0, 5)]])
    counter = UnreadableImages(dataset.files, max_share=0.1, limit_key="train_cfg.max_bad")
    with pytest.raises(ImageError, match="1 of the 2 .* or raise train_cfg.max_bad"):
        counter.update(batch["reports"])


def test_no_readable_image_at_all(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    dataset = UnlabelledImages(str(tmp_path), CROP)
    batch = collate_images([dataset[Place(0, 0, 0, 0, 1)]])
    assert batch["inputs"] is None
    with pytest.raises(ImageError, match="2 of the 2"):
        UnreadableImages(dataset.files, max_share=1.0).update(batch["reports"])


def test_stock_samplers_and_uneven_pipelines_are_refused(tmp_path: Path) -> None:
    dataset = UnlabelledImages(str(write_images(tmp_path, 2)), CROP)
    with pytest.raises(ValueError, match="set train_dataloader.sampler"):
        dataset[0]  # type: ignore[index]
    write_images(tmp_path / "wide", 1, (30, 60))
    uncropped = UnlabelledImages(str(tmp_path), [])
    samples = [uncropped[Place(0, i, i, 0, 3)] for i in range(3)]
    with pytest.raises(ValueError, match="different sizes"):
        collate_images(samples)
    with pytest.raises(ValueError, match="image_format is one of"):
        UnlabelledImages(str(tmp_path), CROP, image_format="HSV")
