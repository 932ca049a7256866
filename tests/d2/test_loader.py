"""The stream of samples depends on the seed alone: not on processes, workers or interruptions."""

import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jepa_plugins.d2.data import add_data_config
from jepa_plugins.d2.data import loader as loader_module
from jepa_plugins.d2.data.loader import (
    LabelledDataset,
    PositionSampler,
    build_labelled_loader,
    build_unlabelled_loader,
    keyed_global_rng,
)


@pytest.fixture()
def data(tmp_path: Path):
    """A config over seven small images with labels."""
    rng = np.random.default_rng(0)
    for i in range(7):
        for folder, size in (("images", (40, 50, 3)), ("annotations", (40, 50))):
            path = tmp_path / folder / "train" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 3, size, dtype=np.uint8)).save(path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.SEED = 3
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DATASETS.UNLABELLED = (str(tmp_path / "images"),)
    cfg.DATASETS.TRAIN = (f"folder_semantic@{tmp_path}@train",)
    cfg.INPUT.PRETRAIN_CROP_SIZE = (12, 16)
    cfg.INPUT.MIN_SIZE_TRAIN = (24, 32, 48)
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = (24, 24)
    cfg.INPUT.SIZE_DIVISIBILITY = 24
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


BUILDERS = [build_unlabelled_loader, build_labelled_loader]


def _first(loader, count: int) -> list[tuple[int, str, torch.Tensor]]:
    batches = islice(iter(loader), count)
    return [(s["sample_index"], s["file_name"], s["image"]) for batch in batches for s in batch]


def _equal(first: list, second: list) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


# --- the sampler ---


def test_an_epoch_shows_every_image_once_and_epochs_differ() -> None:
    stream = list(islice(PositionSampler(10, 4, seed=1), 20))
    assert [position for position, _ in stream] == list(range(20))
    first, second = [i for _, i in stream[:10]], [i for _, i in stream[10:]]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert first != [i for _, i in islice(PositionSampler(10, 4, seed=2), 10)]
    assert [i for _, i in islice(PositionSampler(3, 1, shuffle=False), 5)] == [0, 1, 2, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    local=st.integers(1, 5),
    world=st.integers(1, 4),
    start=st.integers(0, 12),
    seed=st.integers(0, 9),
)
def test_ranks_together_give_the_stream_of_one_process(size, local, world, start, seed) -> None:
    total, batches = local * world, 6
    whole = list(islice(PositionSampler(size, total, seed=seed), (start + batches) * total))[start * total :]
    parts = [
        list(islice(PositionSampler(size, total, rank, world, start * total, seed), batches * local))
        for rank in range(world)
    ]
    merged = [
        place
        for batch in range(batches)
        for part in parts
        for place in part[batch * local : (batch + 1) * local]
    ]
    assert merged == whole


def test_wrong_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 5, which 2 processes"):
        PositionSampler(10, 5, world=2)
    with pytest.raises(ValueError, match="at least one image"):
        PositionSampler(0, 4)
    with pytest.raises(ValueError, match="no multiple of the batch size"):
        PositionSampler(10, 4, start_position=3)


# --- the loaders ---


@pytest.mark.parametrize("build", BUILDERS)
def test_the_stream_is_the_same_for_any_number_of_workers(data, build) -> None:
    streams = []
    for workers in (0, 1, 2):
        data.DATALOADER.NUM_WORKERS = workers
        np.random.seed(workers)  # the state of the global generators must not matter
        torch.manual_seed(workers)
        random.seed(workers)
        streams.append(_first(build(data), 5))
    assert [index for index, _, _ in streams[0]] == list(range(20))
    assert _equal(streams[0], streams[1]) and _equal(streams[0], streams[2])


@pytest.mark.parametrize("build", BUILDERS)
def test_a_resumed_run_goes_on_where_it_stopped(data, build) -> None:
    assert _equal(_first(build(data, start_iteration=3), 2), _first(build(data), 5)[12:])


def test_accumulation_counts_batches(data) -> None:
    resumed = build_unlabelled_loader(data, start_iteration=2, accumulation=3)
    assert _first(resumed, 1)[0][0] == 2 * 3 * 4


@pytest.mark.parametrize("build", BUILDERS)
def test_the_stream_is_the_same_for_any_number_of_processes(data, build, monkeypatch) -> None:
    whole = _first(build(data), 3)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(loader_module.comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(loader_module.comm, "get_world_size", lambda: 2)
        parts.append(_first(build(data), 3))
    merged = [sample for t in range(3) for part in parts for sample in part[2 * t : 2 * t + 2]]
    assert _equal(whole, merged)


@pytest.mark.parametrize("build", BUILDERS)
def test_fewer_images_than_a_batch_wrap_around(data, build) -> None:
    data.SOLVER.IMS_PER_BATCH = 16
    samples = _first(build(data), 1)
    assert len(samples) == 16 and len({name for _, name, _ in samples}) == 7
    same = [image for index, name, image in samples if name == samples[0][1]]
    assert len(same) >= 2 and not torch.equal(same[0], same[1])


@pytest.mark.parametrize("build", BUILDERS)
def test_the_seed_matters_and_a_negative_one_means_zero(data, build) -> None:
    third = _first(build(data), 2)
    data.SEED = 0
    zero = _first(build(data), 2)
    data.SEED = -1
    assert _equal(zero, _first(build(data), 2)) and not _equal(zero, third)


@pytest.mark.parametrize("build", BUILDERS)
def test_loading_leaves_the_models_random_stream_alone(data, build) -> None:
    def draws() -> tuple:
        return np.random.rand(), random.random(), torch.rand(1).item()

    def seed() -> None:
        np.random.seed(0), random.seed(0), torch.manual_seed(0)

    seed()
    expected = draws()
    seed()
    _first(build(data), 2)
    assert draws() == expected


def test_generators_are_keyed_inside_and_put_back_even_after_an_error() -> None:
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()

    def draw(seed: int, position: int) -> tuple:
        with keyed_global_rng(seed, position):
            return np.random.rand(), random.random(), torch.rand(1).item()

    assert draw(0, 1) == draw(0, 1)
    different = {draw(0, 1), draw(0, 2), draw(1, 1)}
    assert len({value for draws in different for value in draws}) == 9
    with pytest.raises(RuntimeError), keyed_global_rng(0, 0):
        raise RuntimeError
    assert (np.random.get_state()[1] == before[0]).all() and random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_rejected_record_makes_way_for_the_next() -> None:
    records = [{"id": i} for i in range(4)]
    dataset = LabelledDataset(records, lambda record: record if record["id"] == 1 else None)
    assert dataset[(9, 2)] == {"id": 1, "sample_index": 9}
    with pytest.raises(ValueError, match="rejected every record"):
        LabelledDataset(records, lambda record: None)[(0, 0)]


def test_any_mapper_is_keyed_and_given_records_may_be_changed(data) -> None:
    def mapper(record: dict) -> dict:
        name = record.pop("file_name")
        return {"image": torch.rand(2) + random.random() + np.random.rand(), "file_name": name}

    assert _equal(
        _first(build_labelled_loader(data, mapper), 4), _first(build_labelled_loader(data, mapper), 4)
    )


def test_empty_keys_and_other_samplers_are_named(data) -> None:
    data.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with pytest.raises(ValueError, match="DATALOADER.SAMPLER_TRAIN"):
        build_labelled_loader(data)
    data.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        build_labelled_loader(data)


def test_several_data_sets_are_joined(data, tmp_path: Path) -> None:
    DatasetCatalog.register(f"{tmp_path} extra", lambda: [{"file_name": "extra"}])
    data.DATASETS.TRAIN = (*data.DATASETS.TRAIN, f"{tmp_path} extra")
    loader = build_labelled_loader(data, lambda record: {"image": torch.zeros(1), **record})
    assert len({name for _, name, _ in _first(loader, 2)}) == 8
