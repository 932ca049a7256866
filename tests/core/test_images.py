"""Reading images of every common kind, and the distribution of the random resized crop."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jepa_plugins.core.images import (
    ImageError,
    crop_and_resize,
    list_image_files,
    read_image,
    read_label_map,
    resized_crop_box,
)


def _colours(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_colour_image_in_each_order(tmp_path: Path) -> None:
    pixels = _colours()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rgb, bgr, grey = (read_image(tmp_path / "a.png", order) for order in ("RGB", "BGR", "L"))
    assert rgb.dtype == np.uint8 and rgb.flags.writeable and bgr.flags.c_contiguous
    assert np.array_equal(rgb, pixels)
    assert np.array_equal(bgr, pixels[:, :, ::-1])
    assert np.array_equal(grey[:, :, 0], np.asarray(Image.fromarray(pixels).convert("L")))


def test_unknown_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="YUV"):
        read_image(tmp_path / "a.png", "YUV")


def test_grey_and_two_level_images_become_three_equal_channels(tmp_path: Path) -> None:
    grey = _colours()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, axis=2))
    Image.fromarray(grey > 127).save(tmp_path / "two.png")
    assert set(np.unique(read_image(tmp_path / "two.png"))) <= {0, 255}


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_image_keeps_its_high_byte(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    image = read_image(tmp_path / f"deep.{suffix}")
    assert image.shape == (2, 3, 3)
    assert image[:, :, 1].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_palette_with_transparency_keeps_its_colours_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90] + [0] * 759)
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / "p.png")
    assert pixels[0].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    pixels = _colours()
    alpha = np.full((*pixels.shape[:2], 1), 7, dtype=np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png"), pixels)
    Image.fromarray(np.concatenate([pixels[:, :, :1], alpha], axis=2)).save(tmp_path / "la.png")
    assert np.array_equal(read_image(tmp_path / "la.png")[:, :, 2], pixels[:, :, 0])


def test_cmyk_image(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    red = read_image(tmp_path / "ink.jpg")
    assert red.shape == (8, 8, 3)
    assert red[0, 0, 0] > 250 and red[0, 0, 1:].max() < 5


def test_exif_orientation_is_an_option(tmp_path: Path) -> None:
    pixels = _colours(4, 6)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # stored lying; a quarter turn clockwise shows it upright
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))
    assert np.array_equal(read_image(tmp_path / "turned.png", apply_orientation=False), pixels)


def test_float_image_is_refused_with_the_remedy(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5, 1.5]], dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ImageError, match=r"f\.tif.*convert it to 8 or 16 bits"):
        read_image(tmp_path / "f.tif")


def _damage(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.jpg"
    if kind == "text":
        path.write_text("this is no image")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        Image.fromarray(_colours(64, 64)).save(path, quality=95)
        path.write_bytes(path.read_bytes()[:-400])
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "folder", "missing"])
def test_a_bad_file_gives_one_sentence_that_names_it(tmp_path: Path, kind: str) -> None:
    path = _damage(tmp_path, kind)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.count(". ") == 0


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 700), place=st.integers(0, 699), value=st.integers(0, 255))
def test_any_damage_is_an_image_error_or_an_image(tmp_path_factory, cut: int, place: int, value: int) -> None:
    folder = tmp_path_factory.mktemp("damage")
    Image.fromarray(_colours(14, 14)).save(folder / "a.png")
    data = bytearray((folder / "a.png").read_bytes())
    data[place % len(data)] = value
    (folder / "a.png").write_bytes(bytes(data[: max(0, len(data) - cut)]))
    try:
        assert read_image(folder / "a.png").shape[2] == 3
    except ImageError as error:
        assert "a.png" in str(error)


def test_label_maps_keep_their_numbers(tmp_path: Path) -> None:
    labels = np.array([[0, 255], [3, 7]], dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "l.png")
    Image.fromarray(labels.astype(np.uint16) * 100).save(tmp_path / "deep.png")
    palette = Image.fromarray(labels).convert("P")
    palette.putdata(labels.reshape(-1).tolist())
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_label_map(tmp_path / "l.png"), labels)
    assert np.array_equal(read_label_map(tmp_path / "deep.png"), labels.astype(int) * 100)
    assert np.array_equal(read_label_map(tmp_path / "p.png"), labels)
    Image.fromarray(_colours()).save(tmp_path / "rgb.png")
    with pytest.raises(ImageError, match="3 channels"):
        read_label_map(tmp_path / "rgb.png")


def test_listing_is_recursive_sorted_and_survives_a_circular_link(tmp_path: Path) -> None:
    for name in ("b/2.JPEG", "a/1.png", "c.jpg", ".hidden/x.png", "a/._1.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    names = [Path(path).relative_to(tmp_path).as_posix() for path in list_image_files(tmp_path)]
    assert names == ["a/1.png", "b/2.JPEG", "c.jpg"]


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), seed=st.integers(0, 1000))
def test_box_lies_inside_any_image(height: int, width: int, seed: int) -> None:
    uniforms = np.random.default_rng(seed).random((10, 4))
    top, left, box_height, box_width = resized_crop_box(height, width, uniforms)
    assert 0 <= top and 0 <= left and box_height >= 1 and box_width >= 1
    assert top + box_height <= height and left + box_width <= width


@pytest.mark.parametrize(("height", "width"), [(100, 100), (120, 90), (60, 240)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    rng, image, count = np.random.default_rng(0), torch.empty(3, height, width), 3000
    ours = np.array([resized_crop_box(height, width, rng.random((10, 4))) for _ in range(count)])
    get = transforms.RandomResizedCrop.get_params
    theirs = np.array([get(image, (0.3, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / count) + 1e-9
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * spread).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.1, atol=0.2)


def test_no_fitting_try_gives_the_centred_box_of_an_allowed_ratio() -> None:
    uniforms = np.full((10, 4), 0.999)
    assert resized_crop_box(10, 100, uniforms) == (0, 43, 10, 13)
    assert resized_crop_box(100, 10, uniforms) == (43, 0, 13, 10)
    assert resized_crop_box(1, 1000, uniforms)[2:] == (1, 1)


def test_crop_resize_and_flip() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[2:6, 4:8] = 200
    image[2:6, 6:8, 1] = 50
    cut = crop_and_resize(image, (2, 4, 4, 4), (16, 12))
    assert cut.shape == (16, 12, 3) and (cut[:, :, 0] == 200).all()
    assert np.array_equal(crop_and_resize(image, (2, 4, 4, 4), (16, 12), flip=True), cut[:, ::-1])
    assert crop_and_resize(image[:, :, :1], (0, 0, 8, 8), (4, 4)).shape == (4, 4, 1)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = crop_and_resize(stripes, (0, 0, 64, 64), (8, 8))
    assert math.isclose(small.mean(), 127.5, abs_tol=3) and small.std() < 10
