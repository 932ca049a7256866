"""Loaders whose stream depends on the seed alone: not on processes, workers or interruptions.

The samples of a run are numbered: batch t of global size G holds positions t G ... (t + 1) G - 1, and each
process takes its own contiguous part of them. Position p shows the image at place p mod N of the permutation
of epoch p // N, and everything random about that sample is keyed by (seed, p).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from jepa_plugins.core.sources import epoch_order

from .catalog import ensure_registered
from .mappers import build_mapper
from .unlabelled import UnlabelledDataset, UnreadableImages

logger = logging.getLogger(__name__)

Sample = dict[str, Any]

MAPPER_STREAM = 2  # separates a mapper's draws from the others of a sample (core.augment)


class PositionSampler(Sampler):
    """Infinite stream of (position, index of the image).

    Args:
        size: number of images, at least 1; may be smaller than a batch.
        global_batch: samples of one iteration over all processes; `world` must divide it.
        rank: of this process.
        world: number of processes.
        start_position: where a resumed run goes on; a multiple of `global_batch`.
        seed: of the run.
        shuffle: a new permutation each epoch; otherwise file order.
    """

    def __init__(
        self,
        size: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        start_position: int = 0,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if size < 1:
            raise ValueError("The data set is empty: it needs at least one image.")
        if global_batch < 1 or global_batch % world:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {global_batch}, which {world} processes cannot share: "
                f"make it a multiple of {world}."
            )
        if start_position % global_batch:
            raise ValueError(
                f"start position {start_position} is no multiple of the batch size {global_batch}."
            )
        self.size = size
        self.global_batch = global_batch
        self.local_batch = global_batch // world
        self.rank = rank
        self.start_position = start_position
        self.seed = seed
        self.shuffle = shuffle

    def order(self, epoch: int) -> np.ndarray:
        """Images in the order of one epoch, int64 [size]."""
        if not self.shuffle:
            return np.arange(self.size)
        return epoch_order(self.seed, epoch, self.size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        batch_start = self.start_position
        while True:
            first = batch_start + self.rank * self.local_batch
            for position in range(first, first + self.local_batch):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = self.order(epoch)
                yield position, int(order[position % self.size])
            batch_start += self.global_batch


@contextmanager
def keyed_global_rng(seed: int, position: int) -> Iterator[None]:
    """Seed numpy's, Python's and torch's global CPU generators by (seed, position), and put them back after.

    detectron2's transforms draw from these. CUDA's generators are left alone.
    """
    numpy_seed, python_seed, torch_seed = np.random.SeedSequence(
        [seed, position, MAPPER_STREAM]
    ).generate_state(3)
    before = np.random.get_state(), random.getstate(), torch.get_rng_state()
    np.random.seed(numpy_seed)
    random.seed(int(python_seed))
    torch.default_generator.manual_seed(int(torch_seed))
    try:
        yield
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])
        torch.set_rng_state(before[2])


class LabelledDataset(Dataset):
    """Mapped records, addressed by (position, index); any mapper becomes reproducible.

    A mapper that returns None (detectron2's way to say "unusable") makes way for the next record.

    Args:
        records: list of dicts in detectron2's format.
        mapper: from a record to a sample; may draw from the global generators.
        seed: of the run.
    """

    def __init__(
        self, records: list[Sample], mapper: Callable[[Sample], Sample | None], seed: int = 0
    ) -> None:
        # Serialised once, so that workers share its pages instead of copying them one by one.
        self.records = DatasetFromList(records, copy=False)
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        position, index = place
        with keyed_global_rng(self.seed, position):
            for step in range(len(self)):
                sample = self.mapper(self.records[(index + step) % len(self)])
                if sample is not None:
                    return {**sample, "sample_index": position}
        raise ValueError("The mapper rejected every record of DATASETS.TRAIN: check its annotations.")


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples


def _build(dataset: Dataset, cfg: CfgNode, seed: int, start_position: int) -> DataLoader:
    sampler = PositionSampler(
        len(dataset),  # type: ignore[arg-type]
        cfg.SOLVER.IMS_PER_BATCH,
        comm.get_rank(),
        comm.get_world_size(),
        start_position,
        seed,
    )
    return DataLoader(
        dataset,
        batch_sampler=BatchSampler(sampler, sampler.local_batch, drop_last=True),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
        # Its own generator: the loader would otherwise take a number from the model's random stream.
        generator=torch.Generator().manual_seed(seed),
    )


class UnlabelledLoader:
    """Endless iterable of this process's batches, which keeps count of unreadable files (`unreadable`)."""

    def __init__(self, loader: DataLoader, unreadable: UnreadableImages) -> None:
        self.loader = loader
        self.dataset = loader.dataset
        self.unreadable = unreadable

    def __iter__(self) -> Iterator[list[Sample]]:
        for samples in self.loader:
            self.unreadable.update(samples)
            yield samples


def build_unlabelled_loader(
    cfg: CfgNode, *, start_iteration: int = 0, accumulation: int = 1
) -> UnlabelledLoader:
    """Batches of crops of ``DATASETS.UNLABELLED`` for pre-training.

    Args:
        cfg: config; ``SOLVER.IMS_PER_BATCH`` is the number of images of one forward over all processes.
        start_iteration: number of iterations already done, each of `accumulation` such batches.
        accumulation: batches per iteration; 1 when an iteration is one forward.

    Returns:
        Endless iterable of list[dict]; see `UnlabelledDataset` for a sample.
    """
    dataset = UnlabelledDataset.from_config(cfg)
    logger.info("%d unlabelled images", len(dataset))
    start = start_iteration * accumulation * cfg.SOLVER.IMS_PER_BATCH
    unreadable = UnreadableImages(
        dataset.files,
        cfg.OUTPUT_DIR,
        cfg.DATASETS.UNLABELLED_MAX_BAD,
        rank=comm.get_rank(),
        resume=start_iteration > 0,
    )
    return UnlabelledLoader(_build(dataset, cfg, dataset.seed, start), unreadable)


def build_labelled_loader(
    cfg: CfgNode, mapper: Callable[[Sample], Sample | None] | None = None, *, start_iteration: int = 0
) -> DataLoader:
    """Batches of ``DATASETS.TRAIN`` for supervised training.

    Batches are the stream's positions as they come: images are not regrouped by aspect ratio.

    Args:
        cfg: config; ``SOLVER.IMS_PER_BATCH`` images per iteration over all processes.
        mapper: from a record to a sample; by default the one that ``INPUT.DATASET_MAPPER_NAME`` names.
        start_iteration: number of iterations already done.

    Returns:
        Endless iterable of list[dict] with "sample_index" added.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: name at least one data set.")
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is '{cfg.DATALOADER.SAMPLER_TRAIN}': set it to TrainingSampler."
        )
    ensure_registered(cfg.DATASETS.TRAIN)
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    seed = max(cfg.SEED, 0)
    dataset = LabelledDataset(records, build_mapper(cfg, True) if mapper is None else mapper, seed)
    return _build(dataset, cfg, seed, start_iteration * cfg.SOLVER.IMS_PER_BATCH)
