"""Reading images and label maps of any common kind, and the box of a random resized crop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
CHANNEL_ORDERS = ("RGB", "BGR", "L")
CROP_TRIES = 10  # attempts before the centre crop, as in torchvision

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A file cannot be read as an image; the message is one sentence that names it."""


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels, which decoded
        return image
    return image if turn is None else image.transpose(turn)


def _open(path: str | os.PathLike[str], apply_orientation: bool) -> Image.Image:
    """Open and decode a file; Pillow's decoders raise nearly every exception type on a damaged one."""
    if not os.path.isfile(path):
        raise ImageError(f"Image file '{os.fspath(path)}' does not exist.")
    try:
        with Image.open(path) as image:
            image.load()
            return _turn_upright(image) if apply_orientation else image
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no known image format"
        raise ImageError(f"Image file '{os.fspath(path)}' cannot be decoded ({reason}).") from error


def _wide_to_8_bit(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    """Take the high byte of 16-bit values, which is what Pillow does with 16-bit colour images."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"Image file '{os.fspath(path)}' holds values outside 0..65535 or fractions (mode {image.mode}): "
            "convert it to 8 or 16 bits."
        )
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def _without_alpha(image: Image.Image) -> Image.Image:
    """Drop transparency without blending it into the colours."""
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "PA":
        image = image.convert("RGBA")
    image.info.pop("transparency", None)
    return image


def read_image(
    path: str | os.PathLike[str], order: str = "RGB", *, apply_orientation: bool = True
) -> NDArray[np.uint8]:
    """Read a colour, grey, palette, 16-bit, CMYK or transparent image.

    Args:
        path: image file.
        order: channels of the result: "RGB", "BGR" or "L" (one channel of luma).
        apply_orientation: turn the image as its EXIF block says, as detectron2 does.

    Returns:
        Contiguous, writable uint8 array [H, W, 3], or [H, W, 1] for "L", in 0..255. 16-bit values keep their
        high byte; alpha is dropped.

    Raises:
        ImageError: the file is missing, truncated, corrupt or of a kind that has no 8-bit colours.
        ValueError: unknown `order`.
    """
    if order not in CHANNEL_ORDERS:
        raise ValueError(f"Channel order '{order}' is unknown: use one of {', '.join(CHANNEL_ORDERS)}.")
    image = _open(path, apply_orientation)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = _wide_to_8_bit(image, path)
    try:
        pixels = np.array(_without_alpha(image).convert("L" if order == "L" else "RGB"))
    except ValueError as error:
        raise ImageError(
            f"Image file '{os.fspath(path)}' has mode {image.mode}, which has no RGB form: convert it to RGB."
        ) from error
    if order == "L":
        return pixels[:, :, None]
    return np.ascontiguousarray(pixels[:, :, ::-1]) if order == "BGR" else pixels


def read_label_map(path: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Read a one-channel label image (8 or 16 bits, or palette indices): int64 [H, W].

    Raises:
        ImageError: missing or damaged file, or one with several channels.
    """
    labels = np.array(_open(path, apply_orientation=False))
    if labels.ndim == 2 and labels.min() < 0:
        raise ImageError(f"Label image '{os.fspath(path)}' holds negative values: save it with 8 or 16 bits.")
    if labels.ndim != 2:
        raise ImageError(
            f"Label image '{os.fspath(path)}' has {labels.shape[-1]} channels: "
            "save the labels as a one-channel image."
        )
    return labels.astype(np.int64)


def list_image_files(folder: str | os.PathLike[str]) -> list[str]:
    """All image files below a folder, sorted by their path relative to it; hidden files are left out.

    Links to folders are followed, each real folder once.
    """
    found: list[tuple[str, str]] = []
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                path = os.path.join(parent, name)
                found.append((Path(os.path.relpath(path, folder)).as_posix(), path))
    return [path for _, path in sorted(found)]


def _centre_box(height: int, width: int, ratio: Sequence[float]) -> tuple[int, int, int, int]:
    box_height, box_width = height, width
    if width / height < min(ratio):
        box_height = max(1, round(width / min(ratio)))
    elif width / height > max(ratio):
        box_width = max(1, round(height * max(ratio)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resized_crop_box(
    height: int,
    width: int,
    uniforms: NDArray[np.floating],
    scale: Sequence[float] = (0.3, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Box of a random resized crop, distributed as torchvision's ``RandomResizedCrop``.

    The area is uniform in `scale` (shares of the image), the aspect ratio log-uniform in `ratio`; the first
    try that fits into the image counts, and when none does, the largest centred box of an allowed ratio.

    Args:
        height, width: of the image, in pixels.
        uniforms: values in [0, 1), [tries, 4]: area, ratio, row and column of each try.
        scale: lowest and highest share of the image's area.
        ratio: lowest and highest width / height.

    Returns:
        (top, left, height, width) in pixels, inside the image and not empty.
    """
    area, log_ratio, row, column = np.asarray(uniforms, dtype=np.float64).T
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * log_ratio)
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    if not fits.any():
        return _centre_box(height, width, ratio)
    first = int(fits.argmax())
    box_height, box_width = int(heights[first]), int(widths[first])
    top = int(row[first] * (height - box_height + 1))
    left = int(column[first] * (width - box_width + 1))
    return top, left, box_height, box_width


def crop_and_resize(
    image: NDArray[np.uint8], box: Sequence[int], size: Sequence[int], *, flip: bool = False
) -> NDArray[np.uint8]:
    """Cut `box` out, resize it (bilinear, antialiased when it shrinks) and mirror it left to right if asked.

    Args:
        image: uint8 [H, W, C], C = 1 or 3.
        box: (top, left, height, width) in pixels.
        size: (height, width) of the result.
        flip: mirror left to right.

    Returns:
        Contiguous uint8 [size[0], size[1], C].
    """
    top, left, height, width = box
    cut = image[top : top + height, left : left + width]
    grey = cut.shape[2] == 1
    pillow = Image.fromarray(np.ascontiguousarray(cut[:, :, 0] if grey else cut))
    resized = np.array(pillow.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    resized = resized[:, :, None] if grey else resized
    return np.ascontiguousarray(resized[:, ::-1]) if flip else resized
