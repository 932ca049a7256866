"""From detectron2's list of dicts to one normalised batch."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.structures import ImageList
from torch import Tensor


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
