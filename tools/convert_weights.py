#!/usr/bin/env python3
"""Write a pre-trained ViT of any known method in the form that detectron2, mmsegmentation or timm loads.

    python tools/convert_weights.py work_dirs/dmt_jepa/vit_base16/iter_375600.pth vit_base16.pth --to detectron2
    python tools/convert_weights.py dinov2_vitb14_pretrain.pth dinov2_b16.pth --to mmseg --patch-size 16
    python tools/convert_weights.py beit_base_patch16_224_pt22k.pth beit.safetensors --to timm

Recognises, by their keys, this project's pre-training checkpoints and files of I-JEPA, MAE, DINO, iBOT, MoCo v3,
BEiT, data2vec (its first version), DeiT, DeiT III, timm and DINOv2. Then it runs source and result on a test image
and writes only when the features agree: with the source or, where something was changed by design, which it names,
with the source after the same change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from jepa_plugins.core.checkpoints import CheckpointError, save_atomic  # noqa: E402
from jepa_plugins.core.cli import one_sentence  # noqa: E402
from jepa_plugins.core.images import read_image  # noqa: E402
from jepa_plugins.core.vit_convert import (  # noqa: E402
    TARGETS,
    Wishes,
    convert,
    file_content,
    usage,
)
from jepa_plugins.core.vit_proof import prove  # noqa: E402
from jepa_plugins.core.vit_weights import IMAGENET, LICENCES, Encoder, read_vit  # noqa: E402

KEEP = {"keep": True, "drop": False, "fold": False, None: None}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="IN", help="the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, .pth or .safetensors")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the program that shall load it")
    parser.add_argument(
        "--encoder",
        choices=["target", "context"],
        help="of a file with two: the target (also: EMA, teacher, momentum) encoder or the one that learned by "
        "gradients (default: target; of MoCo v3 the base encoder)",
    )
    parser.add_argument("--class-token", choices=["keep", "drop"], help="default: kept where OUT can hold it")
    parser.add_argument("--layer-scale", choices=["keep", "fold"], help="default: kept where OUT can hold it")
    parser.add_argument(
        "--rel-pos-bias", choices=["keep", "drop"], help="default: kept where OUT can hold it"
    )
    parser.add_argument(
        "--patch-size", type=int, help="resample the patches to so many pixels, such as 14 to 16"
    )
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="resample the positions: a side, or height width",
    )
    parser.add_argument("--channels", choices=["rgb", "bgr"], default="rgb", help="that OUT will read")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of IN, if no square")
    parser.add_argument("--heads", type=int, help="of IN's attention, where its width does not tell")
    parser.add_argument(
        "--origin", choices=sorted(LICENCES), metavar="METHOD", help="of IN, where its names do not tell"
    )
    parser.add_argument("--image", type=Path, help="compare on this picture instead of a generated one")
    parser.add_argument(
        "--trust", type=Path, action="append", default=[], metavar="FILE", help="IN may run code"
    )
    return parser


def wishes_of(args: argparse.Namespace) -> Wishes:
    """What the command line asks for; raises ValueError for numbers that make no sense."""
    size = args.img_size
    if args.heads is not None and args.heads < 1:
        raise ValueError(f"--heads is at least 1, got {args.heads}")
    if args.grid is not None and min(args.grid) < 1:
        raise ValueError(f"--grid is at least 1 row and 1 column, got {args.grid[0]} {args.grid[1]}")
    if size is not None and len(size) > 2:
        raise ValueError("--img-size takes a side, or height and width")
    return Wishes(
        class_token=KEEP[args.class_token],
        layer_scale=KEEP[args.layer_scale],
        rel_pos_bias=KEEP[args.rel_pos_bias],
        patch_size=args.patch_size,
        img_size=None if size is None else (size[0], size[-1]),
        bgr=args.channels == "bgr",
    )


def check_heads(heads: int | None, encoder: Encoder, source: Path) -> None:
    """Raise ValueError when --heads cannot be those of the encoder."""
    width = encoder.shape.width
    if heads is not None and width % heads:
        raise ValueError(f"--heads {heads} is no divisor of the width {width} of {source}: give one that is")
    name = "blocks.0.attn.relative_position_bias_table"
    table = encoder.weights.get(name)
    if heads is not None and table is not None and table.shape[1] != heads:
        raise ValueError(
            f"--heads {heads}, but '{name}' of {source} has {table.shape[1]} columns, one a head: leave it out"
        )


def picture(path: Path | None, encoder: Encoder) -> Tensor | None:
    """A picture as the encoder reads it: float32 [1, 3, H, W], normalised."""
    if path is None:
        return None
    if encoder.shape.in_chans != 3:
        raise ValueError(f"--image: the file reads {encoder.shape.in_chans} channels, not red, green, blue")
    pixels = torch.from_numpy(read_image(path)).float() / 255
    mean, std = (torch.tensor(part) for part in encoder.pixels or IMAGENET)
    return ((pixels - mean) / std).permute(2, 0, 1)[None]


def tell(encoder: Encoder) -> None:
    """What was recognised."""
    print(f"origin:   {encoder.origin}\nlicence:  {encoder.licence}\nis:       {encoder.shape}")
    for note in encoder.notes:
        print(f"note:     {note}")
    if encoder.left_out:
        print(f"left out: {len(encoder.left_out)} tensors beside the encoder")


def pixels_of(encoder: Encoder) -> str:
    """Mean and std of the images, in words."""
    if encoder.pixels is None:
        return "mean and std not known: see where the file came from"
    mean, std = encoder.pixels
    return f"mean {tuple(mean)}, std {tuple(std)} (in RGB order)"


@one_sentence
def main(argv: list[str] | None = None) -> None:
    """Convert one file."""
    args = build_parser().parse_args(argv)
    if args.out.resolve() == args.source.resolve():
        raise ValueError(f"OUT would replace IN ({args.source}): name another file")
    wishes = wishes_of(args)
    encoder = read_vit(
        args.source,
        trust=args.trust,
        which=args.encoder,
        heads=args.heads,
        grid=args.grid,
        origin=args.origin,
    )
    check_heads(args.heads, encoder, args.source)
    tell(encoder)
    converted = convert(encoder, args.to, wishes)
    for step in converted.exactly:
        print(f"done:     {step}")
    proof = prove(encoder, converted, args.to, picture(args.image, encoder))
    print(f"proof:    {proof}")
    if not proof.right:
        raise CheckpointError(
            f"{args.out} is not written: the result does not compute what {args.source} does"
            + (", even with the same changes by design" if proof.by_design else "")
        )
    save_atomic(file_content(converted, args.to), args.out)
    print(f"pixels:   {args.channels.upper()} in [0, 1], {pixels_of(encoder)}")
    print(f"use:      {usage(converted.encoder, args.to)}\nwrote:    {args.out}")


if __name__ == "__main__":
    main()
