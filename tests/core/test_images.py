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


def test_alpha_is_kept_on_request_and_bands_are_left_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[:, :, :3]).save(tmp_path / "rgb.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.ascontiguousarray(pixels[:, :, 2:])).save(tmp_path / "la.png")
    for order in ("RGBA", "BANDS"):
        assert np.array_equal(read_image(tmp_path / "rgba.png", order), pixels)
    opaque = read_image(tmp_path / "rgb.png", "RGBA")
    assert np.array_equal(opaque[:, :, :3], pixels[:, :, :3]) and (opaque[:, :, 3] == 255).all()
    grey = read_image(tmp_path / "grey.png", "RGBA")
    assert (grey[:, :, :3] == pixels[:, :, :1]).all() and (grey[:, :, 3] == 255).all()
    for name, channels in (("rgb", 3), ("grey", 1), ("la", 2)):
        first = 2 if name == "la" else 0
        assert np.array_equal(
            read_image(tmp_path / f"{name}.png", "BANDS", channels=channels),
            pixels[:, :, first : first + channels],
        )
    with pytest.raises(ImageError, match=r"rgb\.png' has 3 channels, and 4 are expected"):
        read_image(tmp_path / "rgb.png", "BANDS", channels=4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("order", ["RGB", "BGR", "L", "RGBA", "BANDS"])
def test_every_mode_in_every_order(tmp_path: Path, mode: str, order: str) -> None:
    Image.new(mode, (4, 3)).save(tmp_path / "x.tif")
    image = read_image(tmp_path / "x.tif", order)
    channels = {"RGBA": 4, "CMYK": 4, "LA": 2, "RGB": 3, "P": 3}.get(mode, 1) if order == "BANDS" else None
    assert image.shape == (3, 4, channels or {"L": 1, "RGBA": 4}.get(order, 3))
    assert image.dtype == np.uint8 and image.flags.writeable and image.flags.c_contiguous


def test_pages_of_a_tiff_are_further_bands(tmp_path: Path) -> None:
    bands = np.random.default_rng(2).integers(0, 256, (5, 7, 8), dtype=np.uint8)
    deep = Image.fromarray(bands[:, :, 3].astype(np.uint16) * 256 + 99)
    pages = [Image.fromarray(bands[:, :, :3]), deep, Image.fromarray(bands[:, :, 4:])]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_image(tmp_path / "x.tif", "BANDS", channels=8), bands)
    assert np.array_equal(read_image(tmp_path / "x.tif"), bands[:, :, :3])
    pages[0].save(tmp_path / "y.tif", save_all=True, append_images=[deep.resize((3, 3))])
    with pytest.raises(ImageError, match=r"y\.tif' has pages of different sizes"):
        read_image(tmp_path / "y.tif", "BANDS")


def test_bands_that_pillow_would_drop_are_refused_with_the_remedy(tmp_path: Path) -> None:
    pixels = np.zeros((3, 4, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.tif", tiffinfo={338: 0})  # the fourth band is no alpha
    data = bytearray((tmp_path / "x.tif").read_bytes())
    place = data.find((338).to_bytes(2, "little"))
    data[place + 8] = 0
    (tmp_path / "x.tif").write_bytes(data)
    assert read_image(tmp_path / "x.tif").shape == (3, 4, 3)
    with pytest.raises(ImageError, match=r"x\.tif.*4 bands on a page.*\.npy array \[H, W, C\]"):
        read_image(tmp_path / "x.tif", "BANDS")


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    channels=st.integers(1, 9),
    deep=st.booleans(),
    fortran=st.booleans(),
)
def test_arrays_are_images(tmp_path_factory, height, width, channels, deep, fortran) -> None:
    path = tmp_path_factory.mktemp("array") / "x.npy"
    values = np.random.default_rng(channels).integers(0, 256, (height, width, channels), dtype=np.uint8)
    stored = values.astype(np.uint16) * 256 + 7 if deep else values
    np.save(path, np.asfortranarray(stored) if fortran else stored)
    image = read_image(path, "BANDS", channels=channels)
    assert np.array_equal(image, values) and image.flags.writeable and image.flags.c_contiguous
    for order, count in (("RGB", 3), ("L", 1), ("RGBA", 4)):
        if channels == count:
            assert np.array_equal(read_image(path, order), values)
        else:
            with pytest.raises(ImageError, match=f"has {channels} channels, and {count} are expected"):
                read_image(path, order)
    if channels == 3:
        assert np.array_equal(read_image(path, "BGR"), values[:, :, ::-1])
    if channels == 1:
        np.save(path, stored[:, :, 0])
        assert np.array_equal(read_image(path, "L"), values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((2, 3), dtype=np.float32), "float32 values: save them as uint8 or uint16"),
        (np.zeros((2, 3, 4, 5), dtype=np.uint8), r"shape \[2, 3, 4, 5\]: save it as \[H, W, C\]"),
        (np.zeros((0, 3), dtype=np.uint8), r"shape \[0, 3\]"),
        (np.array([{}], dtype=object), "cannot be read as an array"),
        (None, "cannot be read as an array"),
    ],
)
def test_other_arrays_are_refused_with_the_remedy(tmp_path: Path, values, reason: str) -> None:
    (tmp_path / "x.npy").write_text("text") if values is None else np.save(tmp_path / "x.npy", values)
    with pytest.raises(ImageError, match=r"x\.npy.*" + reason) as caught:
        read_image(tmp_path / "x.npy", "BANDS")
    assert "\n" not in str(caught.value)


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


def test_arrays_are_listed_where_there_are_no_other_images(tmp_path: Path) -> None:
    for name in ("a/1.npy", "0.npy", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_image_files(tmp_path) == [str(tmp_path / "0.npy"), str(tmp_path / "a/1.npy")]
    (tmp_path / "2.png").touch()
    assert list_image_files(tmp_path) == [str(tmp_path / "2.png")]


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


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_channels_are_resized_each_by_itself(channels: int) -> None:
    image = np.random.default_rng(channels).integers(0, 256, (9, 8, channels), dtype=np.uint8)
    image[:, :4, -1] = 0  # no alpha that hides the others
    whole = crop_and_resize(image, (1, 0, 8, 7), (5, 6), flip=True)
    for i in range(channels):
        alone = crop_and_resize(np.repeat(image[:, :, i : i + 1], 3, axis=2), (1, 0, 8, 7), (5, 6), flip=True)
        assert np.array_equal(whole[:, :, i], alone[:, :, 0])


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = crop_and_resize(stripes, (0, 0, 64, 64), (8, 8))
    assert math.isclose(small.mean(), 127.5, abs_tol=3) and small.std() < 10
