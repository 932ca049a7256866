"""From detectron2's list of dicts to one normalised batch."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import Tensor

from jepa_plugins.core.images import BANDS, CHANNELS


def check_channels(cfg: CfgNode) -> int:
    """Number of channels of the input: the length of MODEL.PIXEL_MEAN.

    Raises:
        ValueError: MODEL.PIXEL_STD or INPUT.FORMAT has another number.
    """
    mean, std, order = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT
    if std != mean:
        raise ValueError(f"MODEL.PIXEL_STD has {std} values, MODEL.PIXEL_MEAN {mean}: give as many to both")
    if CHANNELS.get(order, mean) != mean:
        fitting = [name for name, channels in CHANNELS.items() if channels == mean]
        raise ValueError(
            f"INPUT.FORMAT {order} has {CHANNELS[order]} channels, MODEL.PIXEL_MEAN {mean}: give as many values "
            f"to MODEL.PIXEL_MEAN and PIXEL_STD, or set INPUT.FORMAT to {' or '.join([*fitting, BANDS])}"
        )
    return mean


def normalised_batch(
    batched_inputs: Sequence[dict], mean: Tensor, std: Tensor, divisibility: int, key: str = "image"
) -> ImageList:
    """Normalise the uint8 images [c, H_i, W_i] and pad them with zeros to a common size [B, c, H, W].

    Raises:
        ValueError: when an image has another number of channels than MODEL.PIXEL_MEAN.
    """
    channels = len(mean)
    for item in batched_inputs:
        if item[key].shape[0] != channels:
            raise ValueError(
                f"{item.get('file_name', 'an image')} has {item[key].shape[0]} channels, MODEL.PIXEL_MEAN "
                f"{channels}; "
                "make MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT agree with the images"
            )
    images = [(item[key].to(mean.device).float() - mean) / std for item in batched_inputs]
    return ImageList.from_tensors(images, divisibility)
