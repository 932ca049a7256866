"""Mask-JEPA on held-out images: does the prediction explain more than the position does?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from jepa_plugins.core.archives import ImageList
from jepa_plugins.core.collapse import HeldOutMeter
from jepa_plugins.core.images import crop_and_resize
from jepa_plugins.d2.data.unlabelled import list_source


def centred_box(height: int, width: int, crop: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels of the largest centred box with the aspect of `crop` (height,
    width)."""
    scale = min(height / crop[0], width / crop[1])
    box_height, box_width = max(round(crop[0] * scale), 1), max(round(crop[1] * scale), 1)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


class HeldOutImages(Dataset):
    """Centred crops, always the same; an unreadable file is an error here."""

    def __init__(self, cfg: CfgNode) -> None:
        self.files = ImageList.joined(
            list_source(source, cfg.DATASETS.UNLABELLED_ROOT) for source in cfg.DATASETS.UNLABELLED_TEST
        )
        self.crop = tuple(cfg.INPUT.PRETRAIN_CROP_SIZE)
        self.format, self.channels = cfg.INPUT.FORMAT, len(cfg.MODEL.PIXEL_MEAN)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        image = self.files.read(index, self.format, channels=self.channels)
        crop = crop_and_resize(image, centred_box(*image.shape[:2], self.crop), self.crop)
        pixels = torch.from_numpy(crop).permute(2, 0, 1).contiguous()
        return {"image": pixels, "file_name": self.files[index], "sample_index": index}


def _as_list(samples: list[dict]) -> list[dict]:
    return samples


def build_held_out_loader(cfg: CfgNode) -> DataLoader:
    """Batches of this process's share of DATASETS.UNLABELLED_TEST, in order."""
    images = HeldOutImages(cfg)
    mine = range(comm.get_rank(), len(images), comm.get_world_size())
    batch = max(cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.ACCUMULATION * comm.get_world_size()), 1)
    return DataLoader(
        torch.utils.data.Subset(images, list(mine)),
        batch_size=batch,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
    )


class HeldOutEvaluator(DatasetEvaluator):
    """Explained variance and R2 of denoising, over all processes; see `HeldOutMeter`."""

    def reset(self) -> None:
        """Forget what was seen."""
        self.meter = HeldOutMeter()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take a batch's maps, as MaskJEPA returns them in eval mode."""
        for maps in outputs:
            self.meter.update(maps)

    def evaluate(self) -> dict:
        """{"held_out": metrics} on the main process."""
        meters = comm.gather(self.meter)
        if not comm.is_main_process():
            return {}
        whole = HeldOutMeter()
        for meter in meters:
            whole.merge(meter)
        return {"held_out": whole.result()}
