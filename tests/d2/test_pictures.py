"""Pictures of errors and clusters: what each pixel shows, and that they reach the event storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from tiny import pictures, save_pictures, tiny_config, tiny_model, train  # noqa: E402

from jepa_plugins.d2.pictures import (  # noqa: E402
    GAP,
    GREY,
    PALETTE,
    Painter,
    beside,
    cluster_picture,
    clusters,
    coloured,
    enlarged,
    fixed_images,
    heat,
    rgb,
)

SIZES = ((64, 96), (64, 64))  # the second is padded in the batch


def panels(picture: torch.Tensor, width: int) -> list[np.ndarray]:
    """The panels of `beside`, each [H, width, 3]."""
    array = picture.permute(1, 2, 0).numpy()
    return [array[:, start : start + width] for start in range(0, array.shape[1], width + GAP)]


def drawn(changes: dict | None = None, image_format: str = "RGB", sizes=SIZES):
    model = tiny_model(changes).eval()
    inputs = pictures(*sizes, channels=len(model.pixel_mean))
    return model, inputs, Painter(model, image_format).draw(inputs)


# --- pieces


def test_clusters_find_planted_regions_and_order_them_by_size() -> None:
    planted = np.repeat([4, 3, 2, 1, 0], [2, 4, 6, 8, 12])[None].repeat(4, 0)  # columns of five regions
    centres = np.random.default_rng(0).normal(size=(5, 16)) * 10
    feature = centres[planted].transpose(2, 0, 1) + np.random.default_rng(1).normal(size=(16, 4, 32)) * 0.01
    feature = torch.from_numpy(feature)
    assert (clusters(feature) == planted).all()
    shown = cluster_picture(feature, (14, 126))  # of an image whose last cells are partial
    assert shown.shape == (14, 126, 3)
    assert shown[0, 0].tolist() == list(PALETTE[4]) and shown[-1, -1].tolist() == list(PALETTE[0])


def test_padding_takes_no_cluster() -> None:
    feature = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    feature[:, 4:] = 1000.0
    shown = cluster_picture(feature, (16, 32))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 5


def test_coloured_gives_black_where_there_is_no_colour() -> None:
    picture = coloured(np.array([[0, 1, 255]]), [[1, 2, 3], [4, 5, 6]])
    assert picture.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]


def test_heat_grows_brighter_and_shows_what_is_missing() -> None:
    values = torch.tensor([[0.0, 2 / 3, 1.0, 4 / 3, 2.0, 9.0, float("nan")]])
    assert heat(values, 2.0).tolist()[0] == [
        [0, 0, 0],
        [255, 0, 0],
        [255, 128, 0],
        [255, 255, 0],
        [255, 255, 255],
        [255, 255, 255],
        [GREY, GREY, GREY],
    ]


def test_channels_become_red_green_and_blue() -> None:
    pixels = torch.tensor([10.4, 20.0, 300.0, 40.0])[:, None, None]
    assert rgb(pixels[:3], "RGB").tolist() == [[[10, 20, 255]]]
    assert rgb(pixels[:3], "BGR").tolist() == [[[255, 20, 10]]]
    assert rgb(pixels, "RGB").tolist() == [[[10, 20, 255]]]
    assert rgb(pixels[:1], "L").tolist() == [[[10, 10, 10]]]


def test_cells_are_enlarged_and_cut() -> None:
    large = enlarged(torch.tensor([[1, 2], [3, 4]]), (3, 4), 2)
    assert large.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]]


def test_panels_stand_in_a_row() -> None:
    one, two = np.zeros((3, 4, 3), np.uint8), np.full((3, 5, 3), 7, np.uint8)
    picture = beside([one, two])
    assert picture.shape == (3, 3, 9 + GAP) and picture.dtype == torch.uint8
    assert (picture[:, :, 4 : 4 + GAP] == 255).all() and (picture[:, :, 4 + GAP :] == 7).all()


# --- of a model


@pytest.mark.parametrize("readout", ["masked_queries", "spatial_queries"])
def test_reconstruction_shows_tiles_and_the_error_of_each_cell(readout) -> None:
    model, inputs, kinds = drawn({"MODEL.MASK_JEPA.READOUT": readout})
    with torch.no_grad():
        maps = model.run_step(inputs).maps
    for i, (height, width) in enumerate(SIZES):
        image, shown, errors = panels(kinds["reconstruction"][i], width)
        truth = inputs[i]["image"].permute(1, 2, 0).numpy()
        assert (image == truth).all()
        hidden = maps["hidden"][i].repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width].numpy()
        assert 0 < hidden.sum() < hidden.size
        assert (shown[hidden] == GREY).all() and (shown[~hidden] == truth[~hidden]).all()
        inner = maps["cell_errors"][i, : height // 8, : width // 8]
        assert (errors[4::8, 4::8] == heat(inner, 2.0)).all()
        nothing = (errors == GREY).all(-1)
        assert (nothing == ~hidden).all() if readout == "masked_queries" else not nothing.any()


def test_denoising_shows_the_noisy_image_the_noise_and_the_prediction() -> None:
    model, inputs, kinds = drawn()
    with torch.no_grad():
        maps = model.run_step(inputs).maps
    for i, (height, width) in enumerate(SIZES):
        noisy, aim, predicted, error = panels(kinds["denoising"][i], width)
        assert noisy.shape == predicted.shape == error.shape == (height, width, 3)
        noise = maps["noise"][i, :, : height // 4, : width // 4].permute(1, 2, 0).numpy()
        expected = np.clip(127.5 + 127.5 * noise / (3 * 0.4), 0, 255)
        assert np.abs(aim[::4, ::4].astype(float) - expected).max() <= 0.51
        # noise in units of ImageNet's standard deviation, on top of the image
        change = noisy.astype(float) - inputs[i]["image"].permute(1, 2, 0).numpy()
        inside = (noisy > 0) & (noisy < 255)
        wanted = (noise * np.array([58.395, 57.12, 57.375])).repeat(4, 0).repeat(4, 1)
        assert np.abs(change - wanted)[inside].max() < 1
        # an untrained head predicts next to nothing
        assert np.abs(predicted.astype(float) - 127.5).mean() < np.abs(aim.astype(float) - 127.5).mean()
        square = ((maps["denoised"] - maps["noise"])[i] / 0.4).square().mean(0)
        assert (error[::4, ::4] == heat(square[: height // 4, : width // 4], 2.0)).all()


def test_a_predicted_image_is_shown_as_an_image() -> None:
    model, inputs, kinds = drawn({"MODEL.MASK_JEPA.DENOISE.TARGET": "image"})
    with torch.no_grad():
        model.jepa.denoise.weight.zero_()
        model.jepa.denoise.bias.zero_()
    width = SIZES[0][1]
    _, aim, predicted, _ = panels(Painter(model, "RGB").draw(inputs)["denoising"][0], width)
    small = torch.nn.functional.avg_pool2d(inputs[0]["image"].float(), 4).permute(1, 2, 0).numpy()
    assert np.abs(aim[::4, ::4] - small).max() <= 0.51
    assert (predicted == 127).all()  # zero is the mean pixel of this backbone


def test_a_loss_that_is_off_is_not_drawn() -> None:
    assert set(drawn()[2]) == {"reconstruction", "denoising", "kmeans"}
    assert set(drawn({"MODEL.MASK_JEPA.LOSS.DENOISE_WEIGHT": 0.0})[2]) == {"reconstruction", "kmeans"}
    assert set(drawn({"MODEL.MASK_JEPA.LOSS.RECON_WEIGHT": 0.0})[2]) == {"denoising", "kmeans"}


def test_kmeans_stands_beside_the_image_in_its_colours() -> None:
    _, inputs, kinds = drawn(image_format="BGR", sizes=((64, 64),))
    image, shown = panels(kinds["kmeans"][0], 64)
    assert (image == inputs[0]["image"].flip(0).permute(1, 2, 0).numpy()).all()
    assert {tuple(c) for c in shown.reshape(-1, 3).tolist()} == set(PALETTE)


# --- while it trains


def test_the_first_held_out_or_else_unlabelled_images_are_drawn(tmp_path) -> None:
    many, few = save_pictures(tmp_path / "many", 6), save_pictures(tmp_path / "few", 2)
    cfg = tiny_config("mask_jepa", {"DATASETS.UNLABELLED": (many,)})
    names = [item["file_name"] for item in fixed_images(cfg)]
    assert names == [f"{many}/{i}.png" for i in range(4)]
    assert all(item["image"].shape == (3, 64, 64) for item in fixed_images(cfg))
    cfg.DATASETS.UNLABELLED_TEST = (few,)
    assert [item["file_name"] for item in fixed_images(cfg)] == [f"{few}/{i}.png" for i in range(2)]


def test_pictures_reach_tensorboard(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images, out = save_pictures(tmp_path / "images", 2), tmp_path / "run"
    out.mkdir()
    changes = {
        "DATASETS.UNLABELLED": (images,),
        "OUTPUT_DIR": str(out),
        "VIS_PERIOD": 2,
        "SOLVER.MAX_ITER": 3,
    }
    train(tiny_config("mask_jepa", changes))
    found = EventAccumulator(str(out), size_guidance={"images": 0}).Reload()
    tags = {f"{kind}/{i}" for kind in ("reconstruction", "denoising", "kmeans") for i in range(2)}
    assert set(found.Tags()["images"]) == tags
    # before the first step, after the second and after the last
    assert [event.step for event in found.Images("reconstruction/0")] == [0, 1, 2]
    assert found.Images("denoising/1")[0].width == 4 * 64 + 3 * GAP
