#!/usr/bin/env python3
"""Frozen linear probe of Mask-JEPA's stride-8 feature on a labelled folder, before and after pre-training.

    python tools/probe.py --config-file detectron2/quick/mask_jepa.yaml --weights pretrain/model_final.pth \\
        --train folder_semantic@camvid@training --val folder_semantic@camvid@validation --size 128 160

The first row is the same model untrained (with its backbone's weights): what pre-training has to beat.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from jepa_plugins.core.images import crop_and_resize, read_image, read_label_map
from jepa_plugins.core.probes import confusion_matrix, fit_linear, scores, spread_subset
from jepa_plugins.d2.cli import built_model, configuration, one_sentence
from jepa_plugins.d2.data.catalog import ensure_registered

STRIDE = 8


def at_cell_centres(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The label under the centre of each cell of a height x width grid: [height, width]."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    return labels[np.ix_(rows, columns)]


@torch.no_grad()
def cell_features(
    model, name: str, size: tuple[int, int], batch: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, C] and labels [n] of all labelled cells of a data set."""
    records = DatasetCatalog.get(name)
    ignore = MetadataCatalog.get(name).ignore_label
    features, labels = [], []
    for start in range(0, len(records), batch):
        part = records[start : start + batch]
        inputs = []
        for record in part:
            image = read_image(record["file_name"])
            whole = crop_and_resize(image, (0, 0, *image.shape[:2]), size)
            inputs.append({"image": torch.from_numpy(whole).permute(2, 0, 1).contiguous()})
            truth = read_label_map(record["sem_seg_file_name"])
            labels.append(
                torch.from_numpy(at_cell_centres(truth, size[0] // STRIDE, size[1] // STRIDE)).flatten()
            )
        features.append(model.features(inputs)["stride8"].flatten(2).transpose(1, 2).flatten(0, 1).cpu())
    x, y = torch.cat(features), torch.cat(labels)
    return x[y != ignore], y[y != ignore]


def probe(model, train: str, val: str, size: tuple[int, int], most: int) -> dict[str, float]:
    """Scores on `val` of a linear classifier fitted on `train`."""
    classes = len(MetadataCatalog.get(train).stuff_classes)
    x, y = cell_features(model, train, size)
    chosen = spread_subset(len(x), most)
    classifier = fit_linear(x[chosen], y[chosen], classes)
    x, y = cell_features(model, val, size)
    return scores(confusion_matrix(y, classifier.predict(x), classes))


@one_sentence
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", nargs="*", default=[], help="pre-training checkpoints")
    parser.add_argument("--train", required=True, help="a data set with label images")
    parser.add_argument("--val", required=True)
    parser.add_argument(
        "--size", type=int, nargs=2, default=(128, 160), metavar=("H", "W"), help="multiples of 32"
    )
    parser.add_argument("--cells", type=int, default=40000, help="training cells, evenly spread")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE ...")
    args = parser.parse_args()
    if any(side % 32 for side in args.size):
        parser.error(f"--size {args.size[0]} {args.size[1]}: give multiples of 32")
    cfg = configuration(args.config_file, args.opts)
    ensure_registered([args.train, args.val])
    for weights in (None, *args.weights):
        result = probe(built_model(cfg, weights), args.train, args.val, tuple(args.size), args.cells)
        print(
            json.dumps({"weights": weights or "untrained", **{k: round(v, 2) for k, v in result.items()}}),
            flush=True,
        )


if __name__ == "__main__":
    main()
