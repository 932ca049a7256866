"""Reading images and label maps of any common kind, and the box of a random resized crop.

Images with bands of their own number are read by the order "BANDS": files of one to four channels, TIFF files
with further bands on further pages, and ``.npy`` arrays [H, W] or [H, W, C] of type uint8 or uint16.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
ARRAY_SUFFIX = ".npy"
BANDS = "BANDS"
CHANNELS = {"RGB": 3, "BGR": 3, "L": 1, "RGBA": 4}  # of BANDS: as many as the file has
CHANNEL_ORDERS = (*CHANNELS, BANDS)
CROP_TRIES = 10  # attempts before the centre crop, as in torchvision

_EXIF_ORIENTATION = 0x0112
_SAMPLES_PER_PIXEL = 277  # TIFF tag
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


File = str | os.PathLike[str] | BinaryIO


def _check_exists(file: File) -> None:
    if isinstance(file, (str, os.PathLike)) and not os.path.isfile(file):
        raise ImageError(f"Image file '{os.fspath(file)}' does not exist.")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known image format"
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _open(file: File, name: str, apply_orientation: bool, all_pages: bool = False) -> list[Image.Image]:
    """Open and decode a file; Pillow's decoders raise nearly every exception type on a damaged one."""
    try:
        with Image.open(file) as image:
            image.load()
            pages: list[Image.Image] = [image]
            if all_pages and image.format == "TIFF":
                pages = []
                for page in ImageSequence.Iterator(image):
                    tags = page.tag_v2  # type: ignore[attr-defined]
                    samples = tags.get(_SAMPLES_PER_PIXEL, 1)
                    if samples > len(page.getbands()):
                        raise NotImplementedError(f"{samples} bands on a page")
                    pages.append(page.copy())
            return [_turn_upright(page) for page in pages] if apply_orientation else pages
    except Exception as error:
        unknown = all_pages and isinstance(error, (Image.UnidentifiedImageError, NotImplementedError))
        remedy = ": save each band on a page of its own, or all as a .npy array [H, W, C]" if unknown else ""
        raise ImageError(f"Image file '{name}' cannot be decoded ({_reason(error)}){remedy}.") from error


def _in_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Take the high byte of 16-bit values, which is what Pillow does with 16-bit colour images."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"Image file '{name}' holds values outside 0..65535 or fractions (mode {image.mode}): "
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


def _bands(pages: Sequence[Image.Image], name: str) -> NDArray[np.uint8]:
    """The channels of all pages as they are, [H, W, C]; two-level and palette images as grey and colours."""
    expanded = {"1": "L", "P": "RGB", "PA": "RGBA"}
    arrays = []
    for page in pages:
        page = _in_8_bits(page, name)
        page.info.pop("transparency", None)
        arrays.append(np.atleast_3d(np.array(page.convert(expanded.get(page.mode, page.mode)))))
    if len({array.shape[:2] for array in arrays}) > 1:
        raise ImageError(f"Image file '{name}' has pages of different sizes: keep one size.")
    return np.concatenate(arrays, axis=2)


def _with_alpha(image: Image.Image) -> Image.Image:
    """RGBA, without blending; an image without transparency is opaque."""
    return image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")


def _read_array(file: File, name: str) -> NDArray[np.uint8]:
    try:
        values = np.load(file, allow_pickle=False)
    except Exception as error:
        raise ImageError(f"Image file '{name}' cannot be read as an array ({_reason(error)}).") from error
    if not isinstance(values, np.ndarray) or values.ndim not in (2, 3) or 0 in values.shape:
        shape = list(getattr(values, "shape", ()))
        raise ImageError(f"Image file '{name}' holds an array of shape {shape}: save it as [H, W, C].")
    if values.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"Image file '{name}' holds {values.dtype} values: save them as uint8 or uint16.")
    values = values >> 8 if values.dtype == np.uint16 else values
    return np.array(np.atleast_3d(values), dtype=np.uint8, order="C")


def decode_image(
    file: File, name: str, order: str = "RGB", *, apply_orientation: bool = True, channels: int | None = None
) -> NDArray[np.uint8]:
    """`read_image` from a path or an open file; `name` tells the kind and stands in messages."""
    if order not in CHANNEL_ORDERS:
        raise ValueError(f"Channel order '{order}' is unknown: use one of {', '.join(CHANNEL_ORDERS)}.")
    _check_exists(file)
    is_array = os.path.splitext(name)[1].lower() == ARRAY_SUFFIX
    if is_array or order == BANDS:
        wanted = CHANNELS.get(order, channels)
        pixels = (
            _read_array(file, name) if is_array else _bands(_open(file, name, apply_orientation, True), name)
        )
        if wanted not in (None, pixels.shape[2]):
            raise ImageError(
                f"Image file '{name}' has {pixels.shape[2]} channels, and {wanted} are expected."
            )
        return np.ascontiguousarray(pixels[:, :, ::-1]) if order == "BGR" else pixels
    image = _in_8_bits(_open(file, name, apply_orientation)[0], name)
    try:
        if order == "RGBA":
            return np.array(_with_alpha(image))
        pixels = np.array(_without_alpha(image).convert("L" if order == "L" else "RGB"))
    except ValueError as error:
        raise ImageError(
            f"Image file '{name}' has mode {image.mode}, which has no RGB form: convert it to RGB."
        ) from error
    if order == "L":
        return pixels[:, :, None]
    return np.ascontiguousarray(pixels[:, :, ::-1]) if order == "BGR" else pixels


def read_image(
    path: str | os.PathLike[str],
    order: str = "RGB",
    *,
    apply_orientation: bool = True,
    channels: int | None = None,
) -> NDArray[np.uint8]:
    """Read a colour, grey, palette, 16-bit, CMYK, transparent or multi-band image.

    Args:
        path: image file, or a ``.npy`` array [H, W] or [H, W, C] that has the channels of `order`.
        order: channels of the result: "RGB", "BGR", "L" (one channel of luma), "RGBA" (255 where the image
            has no alpha), or "BANDS" (those of the file, of all pages of a TIFF, none converted or blended).
        apply_orientation: turn the image as its EXIF block says, as detectron2 does.
        channels: that an image read as "BANDS" must have; None takes any.

    Returns:
        Contiguous, writable uint8 array [H, W, C] in 0..255. 16-bit values keep their high byte; "RGB", "BGR"
        and "L" drop alpha.

    Raises:
        ImageError: the file is missing, truncated, corrupt, of a kind that has no 8-bit colours, or has
            another number of channels than `channels`.
        ValueError: unknown `order`.
    """
    return decode_image(path, os.fspath(path), order, apply_orientation=apply_orientation, channels=channels)


def read_label_map(path: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Read a one-channel label image (8 or 16 bits, or palette indices): int64 [H, W].

    Raises:
        ImageError: missing or damaged file, or one with several channels.
    """
    _check_exists(path)
    labels = np.array(_open(path, os.fspath(path), apply_orientation=False)[0])
    if labels.ndim == 2 and labels.min() < 0:
        raise ImageError(f"Label image '{os.fspath(path)}' holds negative values: save it with 8 or 16 bits.")
    if labels.ndim != 2:
        raise ImageError(
            f"Label image '{os.fspath(path)}' has {labels.shape[-1]} channels: "
            "save the labels as a one-channel image."
        )
    return labels.astype(np.int64)


def may_be_image(name: str) -> bool:
    """Whether a file of this name counts as an image: a known suffix, and no hidden file or folder."""
    suffix = os.path.splitext(name)[1].lower()
    return (suffix in IMAGE_SUFFIXES or suffix == ARRAY_SUFFIX) and not any(
        part.startswith(".") for part in name.split("/")
    )


def images_or_arrays(names: Sequence[str]) -> list[str]:
    """Without the ``.npy`` arrays, which often are labels or features, unless there is nothing else."""
    return [name for name in names if not name.lower().endswith(ARRAY_SUFFIX)] or list(names)


def list_image_files(folder: str | os.PathLike[str]) -> list[str]:
    """All image files below a folder, sorted by their path relative to it; hidden files are left out.

    ``.npy`` arrays count where there are no other images. Links to folders are followed, each real folder once.
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
            if may_be_image(name):
                path = os.path.join(parent, name)
                found.append((Path(os.path.relpath(path, folder)).as_posix(), path))
    return images_or_arrays([path for _, path in sorted(found)])


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
        image: uint8 [H, W, C], of any number of channels.
        box: (top, left, height, width) in pixels.
        size: (height, width) of the result.
        flip: mirror left to right.

    Returns:
        Contiguous uint8 [size[0], size[1], C].
    """
    top, left, height, width = box
    cut = np.ascontiguousarray(image[top : top + height, left : left + width])
    # Pillow would weigh the first channels of two or four by the last, as by an alpha.
    parts = [cut] if cut.shape[2] == 3 else [cut[:, :, i] for i in range(cut.shape[2])]
    resized = np.dstack(
        [
            np.array(Image.fromarray(part).resize((size[1], size[0]), Image.Resampling.BILINEAR))
            for part in parts
        ]
    )
    return np.ascontiguousarray(resized[:, ::-1] if flip else resized)
