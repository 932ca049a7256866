"""Transforms of the pre-training recipes; what they draw is keyed by the sample's place in the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from jepa_plugins.core.augment import keyed_colour_jitter, keyed_crop, keyed_greyscale
from jepa_plugins.core.vit import as_pair


@TRANSFORMS.register_module()
class KeyedResizedCrop(BaseTransform):
    """Random resized crop, mirrored with a probability (bilinear, antialiased).

    Args:
        size: of the result in pixels, one side or (height, width). scale: lowest and highest share of the image's
            area. ratio: lowest and highest width / height. flip: probability of mirroring.

    Raises:
        ValueError: one sentence for a value that makes no sense.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.2, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ) -> None:
        self.size, self.scale, self.ratio, self.flip = as_pair(size), tuple(scale), tuple(ratio), flip
        if min(self.size) < 1:
            raise ValueError(f"KeyedResizedCrop: size is given in pixels, got {size}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"KeyedResizedCrop: scale is two shares, 0 < low <= high <= 1, got {scale}")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"KeyedResizedCrop: ratio is two ratios, 0 < low <= high, got {ratio}")
        _check_probability("KeyedResizedCrop: flip", flip)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Replace "img"."""
        place = results["place"]
        results["img"] = keyed_crop(
            results["img"], place.seed, place.position, self.size, self.scale, self.ratio, self.flip
        )
        results["img_shape"] = self.size
        return results


@TRANSFORMS.register_module()
class KeyedColorJitter(BaseTransform):
    """Brightness, contrast, saturation and hue of an RGB image change, in random order.

    Args:
        brightness, contrast, saturation: strength s of factors in [1 - s, 1 + s]. hue: largest turn, at most .5
            of the circle. prob: of any change.

    Raises:
        ValueError: one sentence for a value that makes no sense.
    """

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        prob: float = 0.8,
    ) -> None:
        self.strength, self.prob = (brightness, contrast, saturation, hue), prob
        if min(self.strength) < 0 or hue > 0.5:
            raise ValueError(
                f"KeyedColorJitter: strengths are not negative, hue at most .5, got {self.strength}"
            )
        _check_probability("KeyedColorJitter: prob", prob)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Replace "img"."""
        place = results["place"]
        results["img"] = keyed_colour_jitter(
            results["img"], place.seed, place.position, self.strength, self.prob
        )
        return results


@TRANSFORMS.register_module()
class KeyedGrayscale(BaseTransform):
    """Colours become their luma with a probability.

    Raises:
        ValueError: for no probability.
    """

    def __init__(self, prob: float = 0.2) -> None:
        self.prob = prob
        _check_probability("KeyedGrayscale: prob", prob)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Replace "img"."""
        place = results["place"]
        results["img"] = keyed_greyscale(results["img"], place.seed, place.position, self.prob)
        return results


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability between 0 and 1, got {value}")
