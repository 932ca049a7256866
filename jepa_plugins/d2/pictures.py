"""Pictures of what Mask-JEPA has learnt: errors of reconstruction and of denoising, and k-means of its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from numpy.typing import NDArray
from torch import Tensor

from jepa_plugins.core.masking import NOISE_CELL
from jepa_plugins.core.probes import fit_kmeans
from jepa_plugins.d2.held_out import HeldOutImages

CLUSTERS = 5  # of the paper's figure 5
PALETTE = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189))
COUNT = 4  # images drawn while training
GREY = 128  # where there is nothing to show
GAP = 2  # pixels between two panels

Picture = NDArray[np.uint8]  # [H, W, 3] in RGB


def coloured(labels: np.ndarray, colours: Sequence[Sequence[int]]) -> Picture:
    """[H, W] class ids -> uint8 [H, W, 3]; ids without a colour are black."""
    colours_by_id = np.zeros((256, 3), np.uint8)
    colours_by_id[: len(colours)] = np.asarray(colours, np.uint8)
    return colours_by_id[np.clip(labels, 0, 255)]


def clusters(feature: Tensor) -> NDArray[np.int64]:
    """k-means (k = 5) of one map [C, H, W] -> [H, W]; cluster 0 is the largest, so that pictures compare."""
    vectors = feature.float().flatten(1).T.contiguous()
    labels = fit_kmeans(vectors, CLUSTERS).predict(vectors).cpu().numpy()
    rank = np.argsort(np.argsort(-np.bincount(labels, minlength=CLUSTERS), kind="stable"), kind="stable")
    return rank[labels].reshape(tuple(feature.shape[1:]))


def cluster_picture(feature: Tensor, size: tuple[int, int]) -> Picture:
    """k-means of a stride-4 map [C, h, w], without its padding, at the size (H, W) in pixels of its image."""
    own = feature[:, : -(-size[0] // NOISE_CELL), : -(-size[1] // NOISE_CELL)]
    return coloured(enlarged(torch.from_numpy(clusters(own)), size, NOISE_CELL).numpy(), PALETTE)


def heat(values: Tensor, top: float) -> Picture:
    """[H, W] -> uint8 [H, W, 3]: 0 is black, then red, yellow, and white from `top` on; NaN is grey."""
    share = (values.float() / top).clamp(0, 1).cpu().numpy()
    steps = np.clip(3 * np.nan_to_num(share)[..., None] - np.arange(3), 0, 1)
    return np.where(np.isnan(share)[..., None], GREY, np.rint(255 * steps)).astype(np.uint8)


def enlarged(values: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """[..., h, w] -> [..., H, W]: each cell fills stride x stride pixels; what lies beyond `size` is cut off."""
    pixels = values.repeat_interleave(stride, dim=-2).repeat_interleave(stride, dim=-1)
    return pixels[..., : size[0], : size[1]]


def rgb(pixels: Tensor, image_format: str) -> Picture:
    """[c, H, W] in 0..255 -> uint8 [H, W, 3]: one channel becomes grey; of four or more the first three show."""
    shown = pixels[:3].flip(0) if image_format == "BGR" else pixels[:3]
    shown = shown if len(shown) == 3 else shown[:1].expand(3, -1, -1)
    return shown.float().round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).cpu().numpy()


def beside(panels: Sequence[Picture]) -> Tensor:
    """Panels of one height in a row, with gaps: uint8 [3, H, W], as detectron2's event storage takes them."""
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    row = [part for panel in panels for part in (panel, gap)][:-1]
    return torch.from_numpy(np.concatenate(row, axis=1)).permute(2, 0, 1).contiguous()


def fixed_images(cfg: CfgNode, count: int = COUNT) -> list[dict]:
    """The first held-out images, or the first unlabelled ones where none are held out; always the same crops.

    Raises:
        FileNotFoundError, ValueError: they do not exist.
    """
    first = cfg.clone()
    first.defrost()
    first.DATASETS.UNLABELLED_TEST = (cfg.DATASETS.UNLABELLED_TEST or cfg.DATASETS.UNLABELLED)[:1]
    images = HeldOutImages(first)
    return [images[i] for i in range(min(count, len(images)))]


class Painter:
    """Draws what a MaskJEPA makes of a few images.

    Errors are drawn on one scale for the whole run: 0 is black; 1, the error of a prediction of zeros, orange;
    white 2 and more. (The target of the reconstruction has unit variance over the channels of a cell; errors of
    denoising are divided by the noise's variance, those of predicted images are in units of the network's input.)

    Args:
        model: in eval mode when it draws. image_format: of its images, as INPUT.FORMAT.
    """

    def __init__(self, model: Any, image_format: str) -> None:
        self.model, self.image_format = model, image_format

    @torch.no_grad()
    def draw(self, inputs: list[dict]) -> dict[str, list[Tensor]]:
        """Pictures uint8 [3, H, W] of each image, by kind: "reconstruction" and "denoising", where these losses
        are on, and "kmeans"."""
        maps, drawn = self.model.run_step(inputs).maps, {}
        if "cell_errors" in maps:
            drawn["reconstruction"] = self._reconstruction(maps, inputs)
        if "denoised" in maps:
            drawn["denoising"] = self._denoising(maps, inputs)
        return {**drawn, "kmeans": self._kmeans(inputs)}

    def _reconstruction(self, maps: dict[str, Tensor], inputs: list[dict]) -> list[Tensor]:
        """The image, the same with hidden tiles in grey, the error of each predicted cell (no prediction: grey)."""
        stride, pictures = self.model.settings.recon_stride, []
        for item, hidden, errors in zip(inputs, maps["hidden"], maps["cell_errors"], strict=True):
            size, image = _size(item), rgb(item["image"], self.image_format)
            covered = enlarged(hidden, size, stride).cpu().numpy()[..., None]
            shown = np.where(covered, GREY, image).astype(np.uint8)
            pictures.append(beside([image, shown, heat(enlarged(errors, size, stride), 2.0)]))
        return pictures

    def _denoising(self, maps: dict[str, Tensor], inputs: list[dict]) -> list[Tensor]:
        """The noisy image, what should be predicted, what is, and the error; noise is shown around mid-grey."""
        settings, mean, std = self.model.settings, self.model.pixel_mean, self.model.pixel_std
        unit = 1.0
        if settings.denoise_target == "noise":
            unit = 1.0 if settings.denoise_noise_scale == "unit" else settings.noise_sigma
            mean, std = torch.full_like(mean, 127.5), torch.full_like(std, 127.5 / (3 * unit))
        noisy = maps["noisy"] * self.model.pixel_std + self.model.pixel_mean
        errors = ((maps["denoised"] - maps["denoise_target"]) / unit).square().mean(1)
        small = [maps[name].float() * std + mean for name in ("denoise_target", "denoised")]
        pictures = []
        for i, item in enumerate(inputs):
            size = _size(item)
            panels = [noisy[i, :, : size[0], : size[1]], *(enlarged(m[i], size, NOISE_CELL) for m in small)]
            error = heat(enlarged(errors[i], size, NOISE_CELL), 2.0)
            pictures.append(beside([*(rgb(panel, self.image_format) for panel in panels), error]))
        return pictures

    def _kmeans(self, inputs: list[dict]) -> list[Tensor]:
        """The image, and k-means of its own cells of the online stride-4 feature (the paper's figure 5)."""
        pictures = []
        for item, feature in zip(inputs, self.model.features(inputs)["stride4"], strict=True):
            pictures.append(
                beside([rgb(item["image"], self.image_format), cluster_picture(feature, _size(item))])
            )
        return pictures


def _size(item: dict) -> tuple[int, int]:
    return int(item["image"].shape[-2]), int(item["image"].shape[-1])
