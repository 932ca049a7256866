#!/usr/bin/env python3
"""Pictures: predictions beside the truth, and k-means of the stride-4 feature before and after pre-training.

python tools/figures.py predictions --config-file FINETUNE.yaml --weights without=a.pth with=b.pth --out
predictions.png
python tools/figures.py kmeans --config-file PRETRAIN.yaml --weights model_final.pth --images FOLDER --out
kmeans.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from jepa_plugins.core.archives import ImageList
from jepa_plugins.core.cli import one_sentence
from jepa_plugins.core.images import crop_and_resize, read_image
from jepa_plugins.d2.cli import built_model, configuration
from jepa_plugins.d2.data.catalog import ensure_registered
from jepa_plugins.d2.data.mappers import build_mapper
from jepa_plugins.d2.data.unlabelled import list_source
from jepa_plugins.d2.evaluation import SemanticEvaluator
from jepa_plugins.d2.held_out import centred_box
from jepa_plugins.d2.pictures import cluster_picture, coloured, rgb

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def save_grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], path: str) -> None:
    """Pictures in rows and columns, with a title over each column."""
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(2.2 * len(titles), 2.3 * len(rows)), squeeze=False
    )
    for line, row in zip(axes, rows, strict=True):
        for axis, picture in zip(line, row, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.axis("off")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def draw_predictions(cfg: CfgNode, weights: dict[str, str], path: str, count: int = 6) -> None:
    """Input, truth and the semantic prediction of each named checkpoint, on the first test set's images."""
    name = cfg.DATASETS.TEST[0]
    ensure_registered(name)
    records = DatasetCatalog.get(name)
    records = records[:: max(len(records) // count, 1)][:count]
    colours = MetadataCatalog.get(name).stuff_colors
    truth, mapper = SemanticEvaluator(name, distributed=False), build_mapper(cfg, False)
    rows = [[read_image(r["file_name"]), coloured(truth.labels(r["file_name"]), colours)] for r in records]
    for file in weights.values():
        model = built_model(cfg, file)
        for row, record in zip(rows, records, strict=True):
            result = model([mapper(record)])[0]["sem_seg"].argmax(0).cpu().numpy()
            row.append(coloured(result, colours))
    save_grid(rows, ["image", "truth", *weights], path)


@torch.no_grad()
def draw_kmeans(cfg: CfgNode, weights: str, files: ImageList, count: int, path: str) -> None:
    """Image, and k-means of the online stride-4 feature of the untrained and of the pre-trained model
    (figure 5)."""
    size = tuple(cfg.INPUT.PRETRAIN_CROP_SIZE)
    channels = len(cfg.MODEL.PIXEL_MEAN)
    images = [files.read(i, cfg.INPUT.FORMAT, channels=channels) for i in range(min(count, len(files)))]
    images = [crop_and_resize(image, centred_box(*image.shape[:2], size), size) for image in images]
    batch = [{"image": torch.from_numpy(image).permute(2, 0, 1).contiguous()} for image in images]
    rows = [[rgb(item["image"], cfg.INPUT.FORMAT)] for item in batch]
    for file in (None, weights):
        maps = built_model(cfg, file).features(batch)["stride4"]
        for row, feature in zip(rows, maps, strict=True):
            row.append(cluster_picture(feature, size))
    save_grid(rows, ["image", "before pre-training", "after pre-training"], path)


@one_sentence
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    predictions = commands.add_parser("predictions", help="input, truth and semantic predictions")
    predictions.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE")
    predictions.add_argument("--count", type=int, default=6, help="images")
    kmeans = commands.add_parser(
        "kmeans", help="k-means of the stride-4 feature before and after pre-training"
    )
    kmeans.add_argument("--weights", required=True, help="a pre-training checkpoint")
    kmeans.add_argument("--images", required=True, help="folder, list file, COCO json, zip or tar")
    kmeans.add_argument("--count", type=int, default=6, help="images")
    for command in (predictions, kmeans):
        command.add_argument("--config-file", required=True)
        command.add_argument("--out", required=True, help="a .png file")
        command.add_argument("--opts", nargs="*", default=[], help="KEY VALUE ...")
    args = parser.parse_args()
    if args.command == "predictions":
        draw_predictions(
            configuration(args.config_file, args.opts),
            dict(w.split("=", 1) for w in args.weights),
            args.out,
            args.count,
        )
    else:
        draw_kmeans(
            configuration(args.config_file, args.opts),
            args.weights,
            list_source(args.images),
            args.count,
            args.out,
        )
    print(args.out)


if __name__ == "__main__":
    main()
