#!/usr/bin/env python3
"""Probes of the frozen patch features of DMT-JEPA and I-JEPA checkpoints on labelled images, with their floors.

python tools/vit_probe.py mmseg/quick/dmt_jepa.py --weights work_dirs/quick/dmt_jepa/iter_*.pth --size 120 160 \\
    --train folder_semantic@datasets/camvid@training --val folder_semantic@datasets/camvid@validation --out probe.json

A linear classifier, k nearest neighbours and k-means (its clusters named by the training labels), fitted on the
patches of --train and scored on those of --val: whole images at one size, the label under the centre of each patch.
The first rows are what pre-training has to beat, on the same patches: their position alone, mean colour and
position, raw pixels and position, and the untrained network of each of --seeds, with their mean. Several checkpoints
give a curve; tools/curves.py draws it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

import torch  # noqa: E402
from mmengine.config import Config, DictAction  # noqa: E402

import jepa_plugins.mm  # noqa: E402, F401  registers the model
from jepa_plugins.core.checkpoints import atomic_write  # noqa: E402
from jepa_plugins.core.cli import one_sentence  # noqa: E402
from jepa_plugins.core.labelled import LabelledImages, labelled_images  # noqa: E402
from jepa_plugins.core.probes import PROBES  # noqa: E402
from jepa_plugins.core.probing import (  # noqa: E402
    Protocol,
    Rows,
    describe_protocol,
    mean_of,
    probe_floors,
    table,
)
from jepa_plugins.mm.cli import configuration, image_format, untrained_model  # noqa: E402
from jepa_plugins.mm.probing import ENCODERS, image_size, load_encoders, probe_vit  # noqa: E402

Sets = tuple[LabelledImages, LabelledImages]


def labels_of(files: Sequence[str]) -> list[str]:
    """A short label of each file: its folder and stem, or the whole path where that is not unique."""
    short = [f"{Path(file).absolute().parent.name}/{Path(file).stem}" for file in files]
    count = Counter(short)
    return [label if count[label] == 1 else file for label, file in zip(short, files, strict=True)]


def floor_rows(cfg: Config, sets: Sets, protocol: Protocol, seeds: Sequence[int], device: str) -> Rows:
    """What pre-training has to beat: no network, and untrained ones ("untrained" is the mean over seeds)."""
    rows = probe_floors(*sets, protocol, cfg.model.patch_size, device=device)
    untrained = {}
    for seed in seeds:
        model = untrained_model(cfg, seed).to(device)
        untrained[f"untrained_{seed}"] = probe_vit(model, *sets, protocol)[
            "target"
        ]  # both encoders are equal
    return {**rows, **untrained, **({"untrained": mean_of(untrained.values())} if untrained else {})}


def checkpoint_rows(
    cfg: Config, sets: Sets, protocol: Protocol, args: argparse.Namespace, device: str
) -> tuple[Rows, dict[str, dict[str, Any]]]:
    """Scores of every checkpoint's encoders, and where each comes from."""
    rows: Rows = {}
    about: dict[str, dict[str, Any]] = {}
    for file, label in zip(args.weights, labels_of(args.weights), strict=True):
        model = untrained_model(cfg).to(device)
        step = load_encoders(model, file, args.which)
        for name, scores in probe_vit(model, *sets, protocol, args.which).items():
            row = label if name == args.which[0] else f"{label} {name}"
            rows[row] = scores
            run = Path(file).absolute().parent.name
            about[row] = {"run": run, "step": step, "encoder": name, "file": file}
            print(row, *(f"{key} {value:.2f}" for key, value in scores.items()), flush=True)
    return rows, about


def prepared(cfg: Config, args: argparse.Namespace) -> tuple[Sets, Protocol]:
    """The data and the protocol, checked before anything is computed.

    Raises:
        ValueError, FileNotFoundError: a value that makes no sense; missing data or weights.
    """
    if args.images < 0:
        raise ValueError(f"--images is a number of images, or 0 for all, got {args.images}")
    size = image_size(untrained_model(cfg), args.size)
    protocol = Protocol(size, image_format(cfg), tuple(args.probes), args.tokens)
    sets = labelled_images(args.train).fewer(args.images), labelled_images(args.val).fewer(args.images)
    for file in args.weights:
        if not Path(file).expanduser().is_file():
            raise FileNotFoundError(f"there is no checkpoint '{file}' (--weights)")
    return sets, protocol


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="of the pre-training: a file, or the name of one of this project's")
    parser.add_argument("--weights", nargs="*", default=[], metavar="FILE", help="checkpoints, for a curve")
    data = "folder_semantic@ROOT@SPLIT: ROOT/images/SPLIT, ROOT/annotations/SPLIT, ROOT/classes.txt"
    parser.add_argument("--train", required=True, help=f"labelled images to fit on, {data}")
    parser.add_argument("--val", required=True, help="others of the same classes to score on")
    size = "of whole images in pixels, multiples of the patch; without it that of the training's crops"
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help=size)
    parser.add_argument("--tokens", type=int, default=20000, help="patches of each set, evenly spread")
    parser.add_argument("--images", type=int, default=0, help="images of each set, evenly spread; 0: all")
    parser.add_argument("--which", "--encoder", nargs="+", choices=ENCODERS, default=["target"])
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of untrained networks")
    parser.add_argument("--out", metavar="FILE", help="scores and protocol as .json")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE")
    return parser


def run() -> None:
    """Probe as the command line says."""
    args = build_parser().parse_args()
    cfg = configuration(args.config, args.cfg_options)
    sets, protocol = prepared(cfg, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = floor_rows(cfg, sets, protocol, args.seeds, device)
    measured, about = checkpoint_rows(cfg, sets, protocol, args, device)
    rows = {**rows, **measured}
    print(table(rows))
    if args.out:
        how = {
            "config": args.config,
            "patch_size": cfg.model.patch_size,
            **describe_protocol(*sets, protocol),
            "untrained_seeds": args.seeds,
        }
        content = {**{name: {**row, **about.get(name, {})} for name, row in rows.items()}, "protocol": how}
        text = json.dumps(content, indent=2) + "\n"
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.out, lambda file: file.write(text.encode()))
        print(args.out)


def main() -> None:
    """Command line; TypeError is mmengine's word for an entry that a class does not take."""
    one_sentence(run, more=(TypeError,))()


if __name__ == "__main__":
    main()
