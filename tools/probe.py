#!/usr/bin/env python3
"""Probes of Mask-JEPA's frozen features on a labelled data set, before and after pre-training, with their floors.

    python tools/probe.py --config-file detectron2/quick/mask_jepa.yaml --weights pretrain/model_final.pth \\
        --train folder_semantic@camvid@training --val folder_semantic@camvid@validation --size 128 160

Each line is one row: a linear classifier, k nearest neighbours and k-means (its clusters named by the training
labels), fitted on --train and scored on --val. The first rows are what pre-training has to beat: the cell's
position alone, its mean colour and position, and the same model untrained (with its backbone's weights).
"""

from __future__ import annotations

import argparse
import json

from jepa_plugins.core.cli import one_sentence
from jepa_plugins.core.probes import PROBES
from jepa_plugins.core.probing import Rows
from jepa_plugins.d2.cli import built_model, configuration
from jepa_plugins.d2.probing import COPIES, FEATURES, ProbeSettings, probe_floors, probe_model


def print_rows(rows: Rows, **what: str) -> None:
    """One JSON object a line."""
    for name, values in rows.items():
        rounded = {key: round(value, 2) for key, value in values.items()}
        print(json.dumps({**what, "features": name, **rounded}), flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="of the pre-training")
    parser.add_argument("--weights", nargs="*", default=[], help="pre-training checkpoints")
    parser.add_argument("--train", required=True, help="a data set with label images")
    parser.add_argument("--val", required=True, help="another of the same classes")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(128, 160), metavar=("H", "W"), help="multiples of 32"
    )
    parser.add_argument("--which", nargs="+", choices=COPIES, default=["online"], help="copies of the model")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=["stride8"])
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--cells", type=int, default=40000, help="cells of each set, evenly spread")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE ...")
    return parser


@one_sentence
def main() -> None:
    """Command line."""
    args = build_parser().parse_args()
    cfg = configuration(args.config_file, args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "MaskJEPA":
        raise ValueError(
            f"{args.config_file} describes {cfg.MODEL.META_ARCHITECTURE}: give the configuration of a "
            "pre-training (MaskJEPA)"
        )
    settings = ProbeSettings(
        train=args.train,
        val=args.val,
        size=tuple(args.size),
        image_format=cfg.INPUT.FORMAT,
        features=tuple(args.features),
        copies=tuple(args.which),
        kinds=tuple(args.probes),
        cells=args.cells,
    )
    print_rows(probe_floors(settings), weights="none")
    for weights in (None, *args.weights):
        print_rows(probe_model(built_model(cfg, weights), settings), weights=weights or "untrained")


if __name__ == "__main__":
    main()
