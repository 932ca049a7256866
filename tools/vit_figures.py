#!/usr/bin/env python3
"""Pictures of a pre-trained ViT: what it looks at and which patches look alike to it, before and after.

python tools/vit_figures.py mmseg/quick/dmt_jepa.py --weights work_dirs/quick/dmt_jepa/iter_600.pth --images FOLDER \\
    --out attention.png similarity.png

The first file shows the target encoder's last attention (mean over heads) and the aggregation head's last attention,
of the query patch and as the mean over all patches; the second the cosine similarity of the query patch's features to
all patches, and the tenth of the patches that is most similar. "Before" is the untrained model of the
configuration's seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from mmengine.config import Config, DictAction  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import Tensor  # noqa: E402

from jepa_plugins.core.attention_maps import (  # noqa: E402
    cosine_maps,
    last_attention,
    most_similar,
    target_weights,
)
from jepa_plugins.core.cli import one_sentence  # noqa: E402
from jepa_plugins.core.images import CHANNELS, crop_and_resize  # noqa: E402
from jepa_plugins.core.sources import Sources  # noqa: E402
from jepa_plugins.mm.cli import built_model, configuration, image_format  # noqa: E402
from jepa_plugins.mm.model import DMTJEPA  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SOURCES = Sources("--images", "--images")
Picture = NDArray[np.uint8]  # [H, W, 3] in RGB
MARK = (255, 40, 40)  # colour of the query's frame
DIMMED = 0.25  # brightness of what is not shown
WHEN = ("before", "after")


@dataclass
class Maps:
    """What one model makes of the images, each [B, N].

    The query's and the mean attention of the encoder; the same of the aggregation head, and the weight [B] of its
    query itself, or None without one; the cosine similarity to the query, and whether a patch is among the most
    similar.
    """

    attention: Tensor
    mean_attention: Tensor
    lat: Tensor | None
    mean_lat: Tensor | None
    lat_own: Tensor | None
    cosine: Tensor
    similar: Tensor


def read_crops(source: str, count: int, order: str, size: tuple[int, int]) -> list[Picture]:
    """The first images of a source, each the largest centred box with the aspect of `size`, resized to it."""
    files, crops = SOURCES.list(source), []
    for i in range(min(count, len(files))):
        image = files.read(i, order, channels=CHANNELS[order])
        height, width = image.shape[:2]
        scale = min(height / size[0], width / size[1])
        box = max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
        crops.append(crop_and_resize(image, ((height - box[0]) // 2, (width - box[1]) // 2, *box), size))
    return crops


@torch.no_grad()
def maps_of(model: DMTJEPA, crops: Sequence[Picture], query: int) -> Maps:
    """All maps of the target encoder for one query patch, given in raster order."""
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    images = model.data_preprocessor({"inputs": pixels, "place": None})["inputs"]
    attention = last_attention(model.target_encoder, images).mean(1)
    features = model.target_encoder(images)
    lat = target_weights(model, features, model.encoder.grid_of(*images.shape[-2:]))
    cosine = cosine_maps(features, torch.full((len(images),), query))
    return Maps(
        attention[:, query],
        attention.mean(1),
        None if lat is None else lat[1][:, query],
        None if lat is None else lat[1].mean(1),
        None if lat is None else lat[0][:, query],
        cosine,
        most_similar(cosine),
    )


def rounded(picture: NDArray) -> Picture:
    """Values in 0..255 as a picture of its own."""
    return np.rint(picture).clip(0, 255).astype(np.uint8)


class Drawer:
    """Turns values of patches into pictures over their image.

    Args:
        grid: patches along height and width; patch: side of one in pixels; query: in raster order.
    """

    def __init__(self, grid: tuple[int, int], patch: int, query: int) -> None:
        self.grid, self.patch, self.query = grid, patch, query

    def enlarged(self, values: Tensor) -> NDArray[np.float32]:
        """[N] -> [H, W, 1]."""
        cells = values.float().view(self.grid).numpy()
        return cells.repeat(self.patch, 0).repeat(self.patch, 1)[..., None]

    def framed(self, picture: NDArray) -> Picture:
        """With a frame around the query patch."""
        picture = rounded(picture)
        top, left = (self.patch * i for i in divmod(self.query, self.grid[1]))
        cell = picture[top : top + self.patch, left : left + self.patch]
        line = max(self.patch // 8, 1)
        inside = cell[line:-line, line:-line].copy()
        cell[:] = MARK
        cell[line:-line, line:-line] = inside
        return picture

    def heat(self, values: Tensor, low: float, high: float, colours: str) -> NDArray[np.float32]:
        """[N] in colours of a matplotlib map from `low` to `high`: [H, W, 3] in 0..255."""
        share = (self.enlarged(values)[..., 0] - low) / max(high - low, 1e-12)
        return 255 * matplotlib.colormaps[colours](share.clip(0, 1))[..., :3].astype(np.float32)

    def over(self, image: Picture, values: Tensor, high: float) -> NDArray[np.float32]:
        """Weights in colours where there are any, on the dimmed image."""
        shown = self.enlarged(values) > 0
        return np.where(shown, self.heat(values, 0, high, "inferno"), DIMMED * image)

    def chosen(self, image: Picture, marks: Tensor) -> Picture:
        """The image, dimmed where a patch is not marked."""
        return self.framed(np.where(self.enlarged(marks) > 0, image, DIMMED * image))


Column = tuple[str, list[Picture], list[str]]  # title, a picture of each image, a caption of each


def scale_of(pair: Sequence[Tensor], image: int) -> float:
    """One scale for an image before and after, so that the two compare: the larger of the 99 % quantiles."""
    return max(float(values[image].quantile(0.99)) for values in pair)


def attention_columns(drawer: Drawer, images: Sequence[Picture], maps: Sequence[Maps]) -> list[Column]:
    """Attention of the encoder and of the aggregation head, before beside after; the query's patch is framed."""
    columns: list[Column] = []
    for name, title in (("attention", "attention"), ("mean_attention", "mean attention")):
        pair = [getattr(m, name) for m in maps]
        for when, values in zip(WHEN, pair, strict=True):
            heats = [drawer.heat(v, 0, scale_of(pair, i), "inferno") for i, v in enumerate(values)]
            pictures = [drawer.framed(heat) if name == "attention" else rounded(heat) for heat in heats]
            columns.append((f"{title}, {when}", pictures, [""] * len(images)))
    if maps[0].lat is None:
        return columns
    for name, title in (("lat", "LAT"), ("mean_lat", "mean LAT")):
        pair = [getattr(m, name) for m in maps]
        tops = [max(float(each[i].max()) for each in pair) for i in range(len(images))]
        for when, values, m in zip(WHEN, pair, maps, strict=True):
            parts = zip(images, values, tops, strict=True)
            heats = [drawer.over(image, v, top) for image, v, top in parts]
            pictures = [drawer.framed(heat) if name == "lat" else rounded(heat) for heat in heats]
            captions = [f"image's mean {w:.2f}" if name == "lat" else "" for w in m.lat_own]
            columns.append((f"{title}, {when}", pictures, captions))
    return columns


def similarity_columns(drawer: Drawer, images: Sequence[Picture], maps: Sequence[Maps]) -> list[Column]:
    """Cosine similarity to the query patch and the most similar patches, before beside after."""
    columns = []
    for when, m in zip(WHEN, maps, strict=True):
        heats = [drawer.framed(drawer.heat(v, -1, 1, "coolwarm")) for v in m.cosine]
        captions = [f"{v.min():.2f} to {v.max():.2f}" for v in m.cosine]
        columns.append((f"cosine, {when}", heats, captions))
    for when, m in zip(WHEN, maps, strict=True):
        pictures = [drawer.chosen(*pair) for pair in zip(images, m.similar, strict=True)]
        columns.append((f"top 10 %, {when}", pictures, [""] * len(images)))
    return columns


def save_columns(columns: Sequence[Column], path: str) -> None:
    """Columns of pictures side by side, each under its title."""
    count = len(columns[0][1])
    figure, axes = plt.subplots(count, len(columns), figsize=(1.9 * len(columns), 2.1 * count), squeeze=False)
    for line, (title, pictures, captions) in zip(axes.T, columns, strict=True):
        line[0].set_title(title, fontsize=9)
        for axis, picture, caption in zip(line, pictures, captions, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(caption, fontsize=7)
    figure.tight_layout(pad=0.4)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shown(crop: Picture, order: str) -> Picture:
    """A crop in RGB; one channel becomes grey, a fourth is left out."""
    if order == "BGR":
        return np.ascontiguousarray(crop[..., ::-1])
    return crop.repeat(3, axis=2) if crop.shape[2] == 1 else crop[..., :3]


def draw(cfg: Config, args: argparse.Namespace) -> None:
    """Both files."""
    if args.count < 1:
        raise ValueError(f"--count is a number of images from 1 on, got {args.count}")
    if not all(0 <= place <= 1 for place in args.query):
        raise ValueError(f"--query is a place from 0 0 (top left) to 1 1 (bottom right), got {args.query}")
    models = [built_model(cfg, file) for file in (None, args.weights)]
    encoder = models[0].encoder
    (height, width), patch = encoder.grid, encoder.patch_size
    row, column = (min(int(p * n), n - 1) for p, n in zip(args.query, encoder.grid, strict=True))
    query = row * width + column
    order = image_format(cfg)
    crops = read_crops(args.images, args.count, order, (height * patch, width * patch))
    maps = [maps_of(model, crops, query) for model in models]
    drawer, images = Drawer(encoder.grid, patch, query), [shown(crop, order) for crop in crops]
    first: Column = ("query patch", [drawer.framed(image) for image in images], [""] * len(images))
    save_columns([first, *attention_columns(drawer, images, maps)], args.out[0])
    save_columns([first, *similarity_columns(drawer, images, maps)], args.out[1])


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="of the pre-training: a file, or the name of one of this project's")
    parser.add_argument("--weights", required=True, help="a checkpoint that tools/train.py wrote")
    parser.add_argument("--images", required=True, help="folder, list file, COCO json, zip or tar")
    parser.add_argument(
        "--out", required=True, nargs=2, metavar=("ATTENTION", "SIMILARITY"), help="two .png files"
    )
    parser.add_argument("--count", type=int, default=4, help="images, from the first on")
    parser.add_argument(
        "--query",
        type=float,
        nargs=2,
        default=[0.5, 0.5],
        metavar=("DOWN", "RIGHT"),
        help="shares of the image",
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    return parser


def run() -> None:
    """Draw as the command line says."""
    args = build_parser().parse_args()
    draw(configuration(args.config, args.cfg_options), args)
    print(*args.out, sep="\n")


def main() -> None:
    """Command line; TypeError is mmengine's word for an entry that a class does not take."""
    one_sentence(run, more=(TypeError,))()


if __name__ == "__main__":
    main()
