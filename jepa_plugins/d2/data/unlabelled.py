"""Unlabelled images of detectron2's configurations, and the sample of one position."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch.utils.data import Dataset

from jepa_plugins.core.archives import ImageList
from jepa_plugins.core.augment import keyed_crop
from jepa_plugins.core.sources import REPORT_NAME, Sources, UnreadableImages, read_or_replace

__all__ = ["REPORT_NAME", "UnlabelledDataset", "UnreadableImages", "list_source", "list_unlabelled"]


def _sources() -> Sources:
    folder = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return Sources("DATASETS.UNLABELLED", "DATASETS.UNLABELLED_ROOT", (folder,))


def list_source(source: str, root: str = "") -> ImageList:
    """The images of one source, also below ``DETECTRON2_DATASETS``; see `core.sources.Sources.list`."""
    return _sources().list(source, root)


def list_unlabelled(cfg: CfgNode) -> ImageList:
    """All images of ``cfg.DATASETS.UNLABELLED``, source by source; raises as `list_source` does."""
    return _sources().list_all(cfg.DATASETS.UNLABELLED, cfg.DATASETS.UNLABELLED_ROOT)


class UnlabelledDataset(Dataset):
    """Crops of unlabelled images, addressed by (position in the stream, index of the file).

    The crop depends on the seed and the position alone. A file that cannot be read is replaced by the next
    one that can, and both are told to the main process inside the sample (see `UnreadableImages`).

    Args:
        files: image paths, or an `ImageList`.
        seed: of the run.
        crop_size: (height, width) of a crop in pixels.
        crop_scale: lowest and highest share of the image's area.
        crop_ratio: lowest and highest width / height of the box.
        flip: probability of mirroring.
        image_format: as `read_image` knows them, "RGB", "BGR", "L", "RGBA" or "BANDS".
        channels: that an image read as "BANDS" must have; None takes any.
    """

    def __init__(
        self,
        files: Sequence[str] | ImageList,
        *,
        seed: int = 0,
        crop_size: Sequence[int] = (512, 512),
        crop_scale: Sequence[float] = (0.3, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        image_format: str = "RGB",
        channels: int | None = None,
    ) -> None:
        self.files = files if isinstance(files, ImageList) else ImageList.of_paths(files)
        self.seed = seed
        self.crop_size = tuple(crop_size)
        self.crop_scale = tuple(crop_scale)
        self.crop_ratio = tuple(crop_ratio)
        self.flip = flip
        self.image_format = image_format
        self.channels = channels

    @classmethod
    def from_config(cls, cfg: CfgNode) -> UnlabelledDataset:
        """Build from ``DATASETS.UNLABELLED*``, ``INPUT.PRETRAIN_*``, ``INPUT.FORMAT``, ``SEED`` and the length of
        ``MODEL.PIXEL_MEAN``."""
        size, scale, ratio = (
            cfg.INPUT.PRETRAIN_CROP_SIZE,
            cfg.INPUT.PRETRAIN_CROP_SCALE,
            cfg.INPUT.PRETRAIN_CROP_RATIO,
        )
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"INPUT.PRETRAIN_CROP_SIZE = {size}: give height and width in pixels.")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"INPUT.PRETRAIN_CROP_SCALE = {scale}: give two shares, 0 < low <= high <= 1.")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"INPUT.PRETRAIN_CROP_RATIO = {ratio}: give two ratios, 0 < low <= high.")
        return cls(
            list_unlabelled(cfg),
            seed=max(cfg.SEED, 0),
            crop_size=size,
            crop_scale=scale,
            crop_ratio=ratio,
            flip=cfg.INPUT.PRETRAIN_FLIP,
            image_format=cfg.INPUT.FORMAT,
            channels=len(cfg.MODEL.PIXEL_MEAN),
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """Sample at (position, index).

        Returns:
            "image" uint8 [C, crop height, crop width]; "file_name"; "height" and "width" of the whole image;
            "sample_index", the position; "file_index"; "unreadable", a list of (index, reason) of the files
            that this one stands in for. Without "image" and "file_index" when no readable file was found.
        """
        position, index = place
        image, file_index, unreadable = read_or_replace(self.files, index, self.image_format, self.channels)
        sample: dict[str, Any] = {"sample_index": position, "unreadable": unreadable}
        if image is None:
            return sample
        crop = keyed_crop(
            image, self.seed, position, self.crop_size, self.crop_scale, self.crop_ratio, self.flip
        )
        return {
            **sample,
            "image": torch.from_numpy(crop).permute(2, 0, 1).contiguous(),
            "file_name": self.files[file_index],
            "file_index": file_index,
            "height": image.shape[0],
            "width": image.shape[1],
        }
