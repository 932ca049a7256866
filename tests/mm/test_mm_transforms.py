"""Transforms of the recipes: what they do, and that a sample's place alone decides it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmcv")

from mmengine.dataset import Compose  # noqa: E402

from jepa_plugins.mm.data import Place  # noqa: E402
from jepa_plugins.mm.transforms import KeyedColorJitter, KeyedGrayscale, KeyedResizedCrop  # noqa: E402

PAPER = [
    {"type": "KeyedResizedCrop", "size": 24, "scale": (0.2, 1.0), "flip": 0.5},
    {"type": "KeyedColorJitter"},
    {"type": "KeyedGrayscale"},
]


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def apply(transform: Any, position: int, seed: int = 3, pixels: np.ndarray | None = None) -> np.ndarray:
    pixels = image() if pixels is None else pixels
    return transform({"img": pixels.copy(), "place": Place(seed, position, 0, 0, 1)})["img"]


def test_the_pipeline_depends_on_seed_and_position_alone() -> None:
    pipeline = Compose(PAPER)
    first = [apply(pipeline, position) for position in range(8)]
    np.random.seed(1)
    again = [apply(Compose(PAPER), position) for position in reversed(range(8))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({a.tobytes() for a in first}) == 8
    assert not np.array_equal(apply(pipeline, 0, seed=4), first[0])
    assert first[0].shape == (24, 24, 3) and first[0].dtype == np.uint8


def test_rates_of_flip_jitter_and_grey() -> None:
    gradient = np.broadcast_to(np.arange(50, dtype=np.uint8)[None, :, None] * 5, (40, 50, 3)).copy()
    crop = KeyedResizedCrop(24, scale=(0.2, 1.0), flip=0.5)
    rows = [apply(crop, i, pixels=gradient)[0, :, 0] for i in range(400)]
    assert abs(np.mean([row[0] > row[-1] for row in rows]) - 0.5) < 0.1
    changed = [not np.array_equal(apply(KeyedColorJitter(), i), image()) for i in range(200)]
    assert abs(np.mean(changed) - 0.8) < 0.12
    grey = [(np.ptp(apply(KeyedGrayscale(), i), axis=2) == 0).all() for i in range(300)]
    assert abs(np.mean(grey) - 0.2) < 0.1


def test_grey_is_the_luma() -> None:
    out = apply(KeyedGrayscale(prob=1.0), 0)
    assert np.array_equal(out[..., 0], np.array(Image.fromarray(image()).convert("L")))


@pytest.mark.parametrize("which", range(4))
def test_each_jitter_stays_within_its_strength(which: int) -> None:
    """Measured on pictures where the factor can be read off."""
    names = ("brightness", "contrast", "saturation", "hue")
    strength = 0.1 if names[which] == "hue" else 0.4
    jitter = KeyedColorJitter(**{**dict.fromkeys(names, 0.0), names[which]: strength}, prob=1.0)
    factors = []
    for position in range(100):
        if names[which] == "brightness":
            factors.append(apply(jitter, position, pixels=np.full((4, 4, 3), 100, np.uint8)).mean() / 100)
        elif names[which] == "contrast":
            halves = np.repeat(np.array([[80], [120]], np.uint8), 4, 0)[..., None].repeat(4, 1).repeat(3, 2)
            out = apply(jitter, position, pixels=halves).astype(float)
            factors.append((out[-1].mean() - out[0].mean()) / 40)
        elif names[which] == "saturation":
            red = np.broadcast_to(np.array([140, 100, 100], np.uint8), (4, 4, 3)).copy()
            out = apply(jitter, position, pixels=red).astype(float)[0, 0]
            factors.append((out[0] - out[1]) / 40)
        else:
            red = np.broadcast_to(np.array([200, 0, 0], np.uint8), (4, 4, 3)).copy()
            hue = np.array(Image.fromarray(apply(jitter, position, pixels=red)).convert("HSV"))[0, 0, 0]
            factors.append(1 + ((int(hue) + 128) % 256 - 128) / 256)
    assert 1 - strength - 0.04 <= min(factors) < 1 - strength / 2
    assert 1 + strength / 2 < max(factors) <= 1 + strength + 0.04


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: KeyedResizedCrop(0), "size is given in pixels, got 0"),
        (lambda: KeyedResizedCrop(8, scale=(0.0, 1.0)), "scale is two shares"),
        (lambda: KeyedResizedCrop(8, ratio=(2.0, 1.0)), "ratio is two ratios"),
        (lambda: KeyedResizedCrop(8, flip=2.0), "flip is a probability"),
        (lambda: KeyedColorJitter(hue=0.6), "hue at most .5"),
        (lambda: KeyedGrayscale(prob=-1.0), "prob is a probability"),
    ],
)
def test_bad_values(build: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()
