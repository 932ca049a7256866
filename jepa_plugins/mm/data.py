"""Unlabelled images in a stream that depends on the seed alone: not on processes, workers or interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.dist import get_rank, get_world_size, sync_random_seed
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from jepa_plugins.core.images import CHANNELS
from jepa_plugins.core.labelled import data_root
from jepa_plugins.core.sources import Sources, epoch_order, read_or_replace


class Place(NamedTuple):
    """Where a sample stands in a run.

    `position` is its number in the whole run, `step x batch size + place in the batch`; with `seed` it keys every
    draw. `image` is the image's number. The global batch of its optimiser step holds the positions `start` to
    `start + total - 1`; any other position fills a process that has no image of it, and counts in no loss.
    """

    seed: int
    position: int
    image: int
    start: int
    total: int


@dataclass(frozen=True)
class BatchPlace:
    """Where one process's batch stands: its `positions`, in the global batch of `Place`."""

    seed: int
    positions: tuple[int, ...]
    start: int
    total: int

    @property
    def counted(self) -> int:
        """How many of the images count: all, but those that fill a process."""
        return sum(self.start <= position < self.start + self.total for position in self.positions)


@DATASETS.register_module()
class UnlabelledImages(Dataset):
    """Unlabelled images, addressed by `Place`.

    An image that cannot be read is replaced by the next one that can, and both are told to the main process inside
    the sample; see `core.sources.UnreadableImages`.

    Args:
        source: one or several of: a folder, a list file (.txt), a COCO json file, a zip file, .tar shards, with
            ranges ("train-{000..146}.tar") or wildcards.
            A relative source is looked for in the working directory, then below ``DETECTRON2_DATASETS`` (default
            "datasets").
        root: folder that the paths in list and json files are relative to, looked for likewise.
        pipeline: transforms, each from a dict to a dict, that read "img" uint8 [H, W, C] and "place".
        image_format: "RGB", "BGR" or "L".
        keys: the configuration's entries for source and root, for messages.

    Raises:
        FileNotFoundError, ValueError: a source that is not there or holds no images.
    """

    metainfo: dict[str, Any] = {}

    def __init__(
        self,
        source: str | Sequence[str],
        pipeline: Sequence[dict | Callable],
        root: str = "",
        image_format: str = "RGB",
        keys: Sequence[str] = ("train_dataloader.dataset.source", "train_dataloader.dataset.root"),
    ) -> None:
        if image_format not in CHANNELS:
            raise ValueError(f"image_format is one of {', '.join(CHANNELS)}, got {image_format!r}")
        self.files = Sources(*keys, folders=(str(data_root()),)).list_all(
            [source] if isinstance(source, str) else list(source), root
        )
        self.image_format = image_format
        self.pipeline = Compose(pipeline)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: Place) -> dict[str, Any]:
        """Sample of one place.

        Returns:
            "img", what the transforms made of the image, uint8 [H, W, C]; "place"; "img_path"; "ori_shape";
            "file_index"; "unreadable". Without "img" and "file_index" when no readable file was found.
        """
        if not isinstance(place, Place):
            raise ValueError(
                "UnlabelledImages is read in the order of a run: set train_dataloader.sampler to "
                "dict(type='EpochSampler') and train_dataloader.batch_sampler to dict(type='RunBatchSampler')"
            )
        image, index, unreadable = read_or_replace(
            self.files, place.image, self.image_format, CHANNELS[self.image_format]
        )
        sample: dict[str, Any] = {"place": place, "unreadable": unreadable}
        if image is None:
            return sample
        return self.pipeline(
            {
                **sample,
                "img": image,
                "img_path": self.files[index],
                "ori_shape": image.shape[:2],
                "file_index": index,
            }
        )


@FUNCTIONS.register_module()
def collate_images(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples of `UnlabelledImages` -> a batch.

    Returns:
        "inputs" uint8 [B, C, H, W], or None when a sample has no image; "place", a `BatchPlace`; "reports", of
        each sample what `UnreadableImages.update` takes.
    """
    places = [sample["place"] for sample in samples]
    complete = all("img" in sample for sample in samples)
    return {
        "inputs": _stacked([sample["img"] for sample in samples]) if complete else None,
        "place": BatchPlace(
            places[0].seed, tuple(place.position for place in places), places[0].start, places[0].total
        ),
        "reports": [
            {key: sample[key] for key in ("unreadable", "file_index") if key in sample} for sample in samples
        ],
    }


def _stacked(images: Sequence[np.ndarray]) -> Tensor:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"the images of a batch have different sizes, such as {sorted(shapes)[:2]}: the pipeline must end "
            "in one size, as KeyedResizedCrop does"
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler):
    """The order of the images in each epoch: a permutation keyed by (seed, epoch).

    Args:
        dataset: of which the length counts. seed: of the run; None takes one that all processes share.
        shuffle: False keeps the order of the files.
    """

    def __init__(self, dataset: Any, seed: int | None = None, shuffle: bool = True) -> None:
        self.size = len(dataset)
        self.seed = sync_random_seed() if seed is None else seed
        self.shuffle = shuffle

    def order(self, epoch: int) -> np.ndarray:
        """int64 [size]."""
        return epoch_order(self.seed, epoch, self.size) if self.shuffle else np.arange(self.size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(0).tolist())

    def __len__(self) -> int:
        return self.size


@DATA_SAMPLERS.register_module()
class RunBatchSampler(Sampler):
    """Endless batches of one process, each a list of `Place`.

    An optimiser step takes one global batch, `batch_size x processes x accumulation` images of the epoch's order.
    It is divided evenly, in that order, over the accumulated iterations and then the processes. An epoch ends with
    a smaller batch, which `drop_last` leaves out. A process that gets none of its images takes one that counts
    nowhere: see `Place`.

    Args:
        sampler: an `EpochSampler`. batch_size: images of one process and iteration.

    Attributes:
        accumulation: iterations an optimiser step; start: iteration to begin at. Set before iterating.

    Raises:
        ValueError: another sampler, no batch size, or `drop_last` with fewer images than a batch.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, drop_last: bool = False) -> None:
        if not isinstance(sampler, EpochSampler):
            raise ValueError(
                "RunBatchSampler needs train_dataloader.sampler = dict(type='EpochSampler'), "
                f"got {type(sampler).__name__}"
            )
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"train_dataloader.batch_size is a whole number from 1 on, got {batch_size!r}")
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        self.rank, self.world = get_rank(), get_world_size()
        self.accumulation, self.start = 1, 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    @property
    def global_batch(self) -> int:
        """Images of one optimiser step, before the last one of an epoch."""
        return self.batch_size * self.world * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch.

        Raises:
            ValueError: none, because `drop_last` leaves all images out.
        """
        if not self.drop_last:
            return -(-self.sampler.size // self.global_batch)
        if self.sampler.size < self.global_batch:
            raise ValueError(
                f"{self.sampler.size} images make no batch of {self.global_batch}: set "
                "train_dataloader.batch_sampler.drop_last=False or a smaller batch"
            )
        return self.sampler.size // self.global_batch

    def places(self, iteration: int) -> list[Place]:
        """The batch of one iteration, counted from the start of the run."""
        step, part = divmod(iteration, self.accumulation)
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.sampler.order(epoch)
        parts = self.accumulation * self.world
        first = in_epoch * self.global_batch
        total = min(self.global_batch, self.sampler.size - first)
        share = part * self.world + self.rank
        mine = range(total * share // parts, total * (share + 1) // parts)
        start, seed = step * self.global_batch, self.sampler.seed
        if not mine:
            return [Place(seed, start + total, int(self._order[first]), start, total)]
        return [Place(seed, start + i, int(self._order[first + i]), start, total) for i in mine]

    def __iter__(self) -> Iterator[list[Place]]:
        iteration = self.start
        while True:
            yield self.places(iteration)
            iteration += 1

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation
