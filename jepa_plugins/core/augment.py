"""Augmentations whose draws are keyed by (seed, position of the sample in the run)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torchvision.transforms.functional as VF
from numpy.typing import NDArray
from PIL import Image

from jepa_plugins.core.images import CROP_TRIES, crop_and_resize, resized_crop_box

CROP_STREAM, COLOUR_STREAM, GREY_STREAM = 1, 3, 4  # 0 is the order of an epoch, 2 detectron2's mappers


def keyed_rng(seed: int, position: int, stream: int) -> np.random.Generator:
    """Generator of one sample and one kind of draw."""
    return np.random.default_rng(np.random.SeedSequence([seed, position, stream]))


def keyed_crop(
    image: NDArray[np.uint8],
    seed: int,
    position: int,
    size: Sequence[int],
    scale: Sequence[float],
    ratio: Sequence[float],
    flip: float,
) -> NDArray[np.uint8]:
    """Random resized crop, mirrored with probability `flip`: uint8 [H, W, C] -> [size[0], size[1], C].

    Args:
        scale: lowest and highest share of the image's area. ratio: lowest and highest width / height.
    """
    rng = keyed_rng(seed, position, CROP_STREAM)
    mirrored = rng.random() < flip
    box = resized_crop_box(image.shape[0], image.shape[1], rng.random((CROP_TRIES, 4)), scale, ratio)
    return crop_and_resize(image, box, size, flip=mirrored)


def keyed_colour_jitter(
    image: NDArray[np.uint8],
    seed: int,
    position: int,
    strength: Sequence[float],
    probability: float,
) -> NDArray[np.uint8]:
    """With this probability brightness, contrast, saturation and hue change, in random order.

    Args:
        image: uint8 [H, W, 3]. strength: of the four; the first three are factors in [1 - s, 1 + s] (not below 0),
            the hue turns by up to s, at most .5, of the circle.
    """
    rng = keyed_rng(seed, position, COLOUR_STREAM)
    applied, draws, order = rng.random() < probability, rng.random(4), rng.random(4).argsort(kind="stable")
    if not applied:
        return image
    picture = Image.fromarray(image)
    change = (VF.adjust_brightness, VF.adjust_contrast, VF.adjust_saturation, VF.adjust_hue)
    for which in order:
        if strength[which] == 0:
            continue
        centre = 0.0 if which == 3 else 1.0
        low = centre - strength[which] if which == 3 else max(centre - strength[which], 0.0)
        factor = low + draws[which] * (centre + strength[which] - low)
        picture = change[which](picture, float(factor))
    return np.array(picture)


def keyed_greyscale(
    image: NDArray[np.uint8], seed: int, position: int, probability: float
) -> NDArray[np.uint8]:
    """With this probability the three channels become their luma: uint8 [H, W, 3] -> [H, W, 3]."""
    if keyed_rng(seed, position, GREY_STREAM).random() >= probability:
        return image
    return np.repeat(np.array(Image.fromarray(image).convert("L"))[:, :, None], 3, axis=2)
