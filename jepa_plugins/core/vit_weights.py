"""Weights of plain vision transformers, as published by many methods: recognise them, and load them into ours.

Every file is brought to the names of `core.vit.VisionTransformer`, which are timm's. `core.vit_convert` writes
them in the form of other programs.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_plugins.core.checkpoints import (
    CheckpointError,
    LoadReport,
    below,
    check_finite,
    describe,
    load_into,
    read_checkpoint,
    state_dict_of,
)
from jepa_plugins.core.vit import SIZES, VisionTransformer, resample_bias_table, resample_positions

INFO = "jepa_vit"  # entry of a converted file that tells its shape
OURS = "DMT-JEPA or I-JEPA pre-training of this project"

# What is known of the files that each method published. Weights that somebody trained himself are his own.
NON_COMMERCIAL = "CC BY-NC 4.0: no commercial use"
LICENCES: dict[str, str] = {
    OURS: "yours: as you trained it",
    "I-JEPA": NON_COMMERCIAL,
    "MAE": NON_COMMERCIAL,
    "MoCo v3": NON_COMMERCIAL,
    "DINO": "Apache 2.0",
    "iBOT": "Apache 2.0",
    "DINOv2": "Apache 2.0 (files of its first months: CC BY-NC 4.0)",
    "DeiT": "Apache 2.0",
    "DeiT III": "Apache 2.0",
    "BEiT": "MIT",
    "data2vec": "MIT for the code; see the page of the weights",
    "timm": "Apache 2.0 for the code; each model's page names that of its weights",
}
UNKNOWN_LICENCE = "not known: see where the file came from"
# Pixels that the published models were trained on, RGB in [0, 1]; ImageNet's elsewhere.
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ViTShape:
    """What a plain ViT's weights need to be run.

    grid: patches along height and width of the table of positions. registers: tokens after the class token.
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    grid: tuple[int, int]
    in_chans: int = 3
    class_token: bool = False
    registers: int = 0
    layer_scale: bool = False
    rel_pos_bias: bool = False
    norm: bool = True

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def name(self) -> str | None:
        """Of the size, one of `core.vit.SIZES`."""
        sizes = {size: name for name, size in SIZES.items()}
        return sizes.get((self.width, self.depth, self.heads))

    def __str__(self) -> str:
        parts = [
            f"ViT {self.name or 'of its own size'}: width {self.width}, depth {self.depth}, {self.heads} heads",
            f"patch {self.patch_size}, {self.grid[0]}x{self.grid[1]} positions",
            "class token" if self.class_token else "no class token",
        ]
        parts += [f"{self.registers} further tokens"] if self.registers else []
        parts += ["LayerScale"] if self.layer_scale else []
        parts += ["relative position bias"] if self.rel_pos_bias else []
        parts += [] if self.norm else ["no final norm"]
        return ", ".join(parts)


@dataclass
class Encoder:
    """A ViT's weights under our names (`reg_token` too), with what is known of them.

    published: the tensors under the names that the file gave them, without a prefix.
    notes: what was chosen, in words. left_out: names of the file that are no part of the encoder.
    pixels: mean and std of the images, RGB in [0, 1]. bgr: it reads blue, green, red.
    """

    origin: str
    shape: ViTShape
    weights: OrderedDict[str, Tensor]
    published: OrderedDict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    bgr: bool = False

    @property
    def licence(self) -> str:
        """What is known of the licence of the origin's published files."""
        return LICENCES.get(self.origin, UNKNOWN_LICENCE)


# --- reading ------------------------------------------------------------------------------------------


class _History:
    """Stands in for the log history of mmengine's checkpoints, so that reading needs no mmengine."""


_History.__module__, _History.__name__, _History.__qualname__ = (
    "mmengine.logging.history_buffer",
    "HistoryBuffer",
    "HistoryBuffer",
)


@contextlib.contextmanager
def admitting_plain() -> Iterator[None]:
    """Admit what checkpoints of ViT methods hold beside weights: argparse's options, mmengine's log history."""
    kinds: list[Any] = [argparse.Namespace, _History]
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(kinds):
            yield
    else:  # older torch can only add to its list
        torch.serialization.add_safe_globals(kinds)
        yield


def read_vit(path: str | Path, *, trust: Iterable[str | Path] = (), **options: Any) -> Encoder:
    """`recognise` on a file; raises FileNotFoundError and CheckpointError as `read_checkpoint` does."""
    with admitting_plain():
        content = read_checkpoint(path, trust=trust)
    return recognise(content, source=str(path), **options)


# --- recognising --------------------------------------------------------------------------------------


@dataclass
class _Found:
    """Tensors of one encoder out of a checkpoint, without prefix, and what the place told."""

    origin: str | None
    weights: OrderedDict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    chosen: bool = False  # out of several encoders


def _part(weights: Mapping[str, Tensor], prefix: str) -> _Found:
    """The tensors below a prefix."""
    kept = OrderedDict((name[len(prefix) :], v) for name, v in weights.items() if name.startswith(prefix))
    return _Found(None, kept, left_out=[name for name in weights if not name.startswith(prefix)])


# origin, and the part that is the target and the context (or online) encoder, of files with several
_PAIRS: tuple[tuple[str | None, str, str], ...] = (
    ("I-JEPA", "target_encoder", "encoder"),
    (None, "teacher", "student"),
)


def _choose(
    target: str, context: str, which: str | None, there: Iterable[str], source: str
) -> tuple[str, str]:
    """(the part to take, a note); raises CheckpointError when it is not there."""
    wanted = context if which == "context" else target
    if wanted not in there:
        other = "--encoder context" if wanted == target else "--encoder target"
        raise CheckpointError(
            f"{source} holds no '{wanted}': give a whole pre-training checkpoint, or take its other encoder with "
            f"{other} (tools/convert_weights.py)"
        )
    return wanted, f"the {'target' if wanted == target else 'context'} encoder ('{wanted}') was taken"


def _from_parts(checkpoint: Mapping[str, Any], which: str | None, source: str) -> _Found | None:
    """A file of several state dicts side by side: I-JEPA's, DINO's, iBOT's, DINOv2's."""
    for origin, target, context in _PAIRS:
        there = [name for name in (target, context) if isinstance(checkpoint.get(name), Mapping)]
        if not there or (origin and "predictor" not in checkpoint and len(there) < 2):
            continue
        wanted, note = _choose(target, context, which, there, source)
        weights = state_dict_of(checkpoint[wanted])
        found = _Found(origin, weights)
        if any(name.startswith("backbone.") for name in weights):
            found = _part(weights, "backbone.")
            found.origin = _distiller(checkpoint, found)
        found.notes.append(note)
        found.chosen = True
        return found
    return None


def _distiller(checkpoint: Mapping[str, Any], found: _Found) -> str:
    """DINO's family: DINOv2 has LayerScale, iBOT a second head, for patches, or a token for masked ones."""
    if any(name.endswith("ls1.gamma") for name in found.weights):
        return "DINOv2"
    student = checkpoint.get("student")
    names = [*found.left_out, *found.weights, *(student if isinstance(student, Mapping) else ())]
    patches = any(name.endswith("masked_embed") or "head.last_layer2" in name for name in names)
    return "iBOT" if patches else "DINO"


def _from_prefixes(weights: OrderedDict[str, Tensor], which: str | None, source: str) -> _Found:
    """One state dict that may hold several encoders, or one below a prefix."""
    heads = {name.split(".")[0] for name in weights}
    if "target_encoder" in heads or "encoder.patch_embed.proj.weight" in weights:
        wanted, note = _choose("target_encoder", "encoder", which, heads, source)
        found = _part(weights, f"{wanted}.")
        found.origin, found.chosen = OURS, True
    elif heads & {"base_encoder", "momentum_encoder"}:
        # the published evaluations take the base encoder, the momentum copy is the target
        wanted = "momentum_encoder" if which == "target" else "base_encoder"
        if wanted not in heads:
            raise CheckpointError(f"{source} holds no '{wanted}': take its other encoder with --encoder")
        found, note = _part(weights, f"{wanted}."), f"'{wanted}' was taken"
        found.origin, found.chosen = "MoCo v3", True
    elif any(name.startswith("backbone.net.") for name in weights):
        found, note = _part(weights, "backbone.net."), "'backbone.net' was taken"
    elif "backbone" in heads:
        found, note = _part(weights, "backbone."), "'backbone' was taken"
    else:
        return _Found(None, weights)
    found.notes.append(note)
    return found


def _select(checkpoint: Mapping[str, Any], which: str | None, source: str) -> _Found:
    found = _from_parts(checkpoint, which, source)
    if found is None:
        nested = checkpoint.get("module")
        weights = state_dict_of(nested if isinstance(nested, Mapping) else checkpoint)
        found = _from_prefixes(weights, which, source)
    if which and not found.chosen:
        raise CheckpointError(f"{source} holds one encoder only: leave --encoder {which} out")
    return found


# No part of an encoder: heads, decoders, tokens of masked patches, computed buffers.
_BESIDE = re.compile(
    r"(mask_token|masked_embed|decoder_.*|head(_dist)?(\..*)?|lm_head\..*|pre_logits\..*|fc_norm\.num.*|"
    r".*relative_position_index|num_batches_tracked|norm_pre\..*)"
)


def _origin_of(names: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> str:
    """Of a bare encoder, by its names and the key that held it."""
    blocks = {name.split(".", 2)[2] for name in names if re.match(r"blocks\.\d+\.", name)}
    head = names.get("lm_head.weight")
    if "attn.q_bias" in blocks or any(name.startswith("rel_pos_bias") for name in names):
        return "data2vec" if head is not None and head.shape[0] == head.shape[1] else "BEiT"
    if any(name.startswith("decoder_blocks.") for name in names):
        return "MAE"
    if "dist_token" in names:
        return "DeiT"
    if "gamma_1" in blocks:
        return "DeiT III"
    if "mask_token" in names and any(part.startswith("ls1") or ".ls1." in part for part in blocks):
        return "DINOv2"
    if "masked_embed" in names:
        return "iBOT"
    return _origin_of_plain(names, checkpoint)


def _origin_of_plain(names: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> str:
    """Of names that several methods share: the wrapping tells the published files apart."""
    classes = "head.weight" in names
    if "cls_token" not in names:
        return "an encoder without class token"
    if isinstance(checkpoint.get("model"), Mapping):
        return "DeiT" if classes else "MAE"
    if isinstance(checkpoint.get("state_dict"), Mapping) and not classes:
        return "iBOT"
    return "timm" if classes else "DINO"


_AMBIGUOUS = ("MAE", "iBOT", "DINO")


def recognise(
    checkpoint: Mapping[str, Any],
    *,
    source: str = "the checkpoint",
    which: str | None = None,
    heads: int | None = None,
    grid: Sequence[int] | None = None,
    origin: str | None = None,
) -> Encoder:
    """The encoder in a checkpoint of any known kind, under our names.

    Args:
        which: "target" or "context", of a file with two encoders; None: the target, for MoCo v3 the base encoder.
        heads: of attention; needed where neither the file nor the width tells.
        grid: rows and columns of the table of positions, needed where it is no square.
        origin: a method's name, where names alone cannot tell.

    Raises:
        CheckpointError: no plain ViT; no such encoder; a part of a form that cannot be expressed.
    """
    found = _select(checkpoint, which, source)
    if not any(name.endswith("patch_embed.proj.weight") for name in found.weights):
        raise CheckpointError(
            f"{source} holds no plain ViT: it looks like {describe(found.weights)}; give a file of a ViT encoder"
        )
    check_finite(found.weights, source)
    info = _info(checkpoint)
    known = origin or found.origin or info.get("origin") or _origin_of(found.weights, checkpoint)
    notes = list(found.notes)
    if (
        not (origin or found.origin or info)
        and known in _AMBIGUOUS
        and "decoder_embed.weight" not in found.weights
    ):
        notes.append(
            f"by its names it may be MAE's, DINO's, iBOT's or timm's; taken for {known}: --origin says else"
        )
    weights, beside = _renamed(found.weights, source, notes)
    given = tuple(grid) if grid is not None else info.get("grid")
    shape = _shape_of(weights, known, source, heads or info.get("heads") or _own_heads(checkpoint), given)
    _completed(weights, shape)
    pixels = HALVES if known == "BEiT" else IMAGENET
    if info.get("bgr"):
        notes.append("it reads blue, green, red")
    return Encoder(
        known,
        shape,
        weights,
        found.weights,
        notes,
        found.left_out + beside,
        info.get("pixels", pixels),
        bool(info.get("bgr")),
    )


def _info(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a converted file says of itself."""
    found = checkpoint.get(INFO)
    return dict(found) if isinstance(found, Mapping) else {}


def _own_heads(checkpoint: Mapping[str, Any]) -> int | None:
    """Heads by the configuration that mmengine keeps in a checkpoint, whose text is parsed, never run."""
    meta = checkpoint.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    try:
        tree = ast.parse(text) if isinstance(text, str) else None
    except SyntaxError:
        return None
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.keyword) and node.arg == "arch" and isinstance(node.value, ast.Call):
            values = {word.arg: word.value for word in node.value.keywords}
            number = values.get("heads")
            if isinstance(number, ast.Constant) and isinstance(number.value, int):
                return number.value
    return None


_RENAMED = (
    (
        re.compile(r"blocks\.\d+\.(\d+)\."),
        r"blocks.\1.",
    ),  # DINOv2 in chunks; the second number counts them all
    (re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),
    (re.compile(r"^register_tokens$"), "reg_token"),
    (re.compile(r"^fc_norm\."), "norm."),
)


def _renamed(
    weights: Mapping[str, Tensor], source: str, notes: list[str]
) -> tuple[OrderedDict[str, Tensor], list[str]]:
    """(the encoder's tensors under our names, the names of the rest)."""
    out: OrderedDict[str, Tensor] = OrderedDict()
    beside = []
    for name, value in weights.items():
        if _BESIDE.fullmatch(name):
            beside.append(name)
            continue
        new = name
        for pattern, replacement in _RENAMED:
            new = pattern.sub(replacement, new)
        out[new] = value.float()
    if "fc_norm.weight" in weights:
        notes.append("the norm after its pooling (fc_norm) became the final norm")
    _stack_biases(out)
    _share_bias(out)
    _distilled(out)
    _check_names(out, source)
    return out, beside


def _stack_biases(weights: OrderedDict[str, Tensor]) -> None:
    """BEiT's biases of queries and values; its keys have none."""
    for name in [name for name in weights if name.endswith(".q_bias")]:
        query, value = weights.pop(name), weights.pop(name.replace(".q_bias", ".v_bias"))
        weights.pop(name.replace(".q_bias", ".k_bias"), None)
        weights[name.replace(".q_bias", ".qkv.bias")] = torch.cat([query, torch.zeros_like(query), value])


def _share_bias(weights: OrderedDict[str, Tensor]) -> None:
    """A table of relative positions that all blocks share becomes, or is added to, each block's own."""
    shared = weights.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is None:
        return
    for i in range(_depth_of(weights)):
        name = f"blocks.{i}.attn.relative_position_bias_table"
        weights[name] = weights[name] + shared if name in weights else shared.clone()


def _distilled(weights: OrderedDict[str, Tensor]) -> None:
    """DeiT's second token, with its position, becomes a register."""
    token = weights.pop("dist_token", None)
    if token is not None and "pos_embed" in weights:
        table = weights["pos_embed"]
        weights["reg_token"] = token + table[:, 1:2]
        weights["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)


_KNOWN = re.compile(
    r"(cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|"
    r"blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|mlp\.fc[12]\.(weight|bias)|"
    r"ls[12]\.gamma|attn\.relative_position_bias_table))"
)


def _check_names(weights: Mapping[str, Tensor], source: str) -> None:
    unknown = [name for name in weights if not _KNOWN.fullmatch(name)]
    if not unknown:
        return
    if any(".rel_pos_h" in name for name in unknown):
        what = "relative positions of detectron2's kind, which neither the bias tables of other models nor plain "
        what += "attention can express"
    elif any(".w12." in name or ".fc1_g." in name for name in unknown):
        what = "a gated MLP (SwiGLU), which the plain ViT has not"
    else:
        what = "a part that the plain ViT has not"
    raise CheckpointError(f"{source} cannot be converted: it holds {what} ('{unknown[0]}')")


def _depth_of(names: Iterable[str]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1)


def _heads_of(weights: Mapping[str, Tensor], origin: str, width: int, source: str) -> int:
    """Heads, which no plain weight shows."""
    table = weights.get("blocks.0.attn.relative_position_bias_table")
    if table is not None:
        return table.shape[1]
    if origin == "MoCo v3" and width == 384:
        return 12
    for size, _, heads in SIZES.values():
        if size == width:
            return heads
    if width % 64:
        raise CheckpointError(
            f"the heads of {source}'s attention (width {width}) are not known: give --heads"
        )
    return width // 64


def _grid_of(count: int, given: Sequence[int] | None, source: str) -> tuple[int, int]:
    """Rows and columns of a table of `count` positions of patches."""
    if given is not None:
        height, width = given
        if height * width != count:
            raise CheckpointError(f"{source} holds {count} positions, not {height}x{width}: correct the grid")
        return height, width
    side = math.isqrt(count)
    if side * side != count:
        raise CheckpointError(
            f"{source} holds {count} positions, which are no square: give --grid ROWS COLUMNS of its training size"
        )
    return side, side


def _shape_of(
    weights: Mapping[str, Tensor], origin: str, source: str, heads: int | None, grid: Sequence[int] | None
) -> ViTShape:
    """Read off the tensors what they tell. Raises CheckpointError for what the plain ViT cannot be."""
    kernel = weights["patch_embed.proj.weight"]
    width, channels, patch = kernel.shape[0], kernel.shape[1], kernel.shape[-1]
    if kernel.shape[-2] != patch:
        raise CheckpointError(
            f"{source} has patches of {tuple(kernel.shape[-2:])} pixels: they must be square"
        )
    depth = _depth_of(weights)
    hidden = weights.get("blocks.0.mlp.fc1.weight")
    if hidden is None or hidden.shape[0] != 4 * width:
        raise CheckpointError(
            f"{source} cannot be converted: its MLP is not four times as wide as its tokens"
        )
    relative = weights.get("blocks.0.attn.relative_position_bias_table")
    class_token = "cls_token" in weights
    if "pos_embed" in weights:
        given = grid
        rows = weights["pos_embed"].shape[1]
        # with a row for the class token, unless the patches alone make a square
        own_row = class_token and (
            math.isqrt(rows) ** 2 != rows if given is None else rows != given[0] * given[1]
        )
        spare = not class_token and given is None and math.isqrt(rows - 1) ** 2 == rows - 1
        at = _grid_of(rows - int(own_row or spare), given, source)
    elif relative is not None:
        extra = 3 * class_token
        at = _grid_of_table(relative.shape[0] - extra, grid, source)
    else:
        raise CheckpointError(f"{source} holds no positions ('pos_embed'): give a whole encoder")
    tokens = weights.get("reg_token")
    return ViTShape(
        width,
        depth,
        heads or _heads_of(weights, origin, width, source),
        patch,
        at,
        channels,
        class_token,
        0 if tokens is None else tokens.shape[1],
        "blocks.0.ls1.gamma" in weights,
        relative is not None,
        "norm.weight" in weights,
    )


def _grid_of_table(rows: int, given: Sequence[int] | None, source: str) -> tuple[int, int]:
    """Rows and columns of patches from a table's offsets, (2h - 1)(2w - 1)."""
    if given is not None and (2 * given[0] - 1) * (2 * given[1] - 1) == rows:
        return given[0], given[1]
    side = math.isqrt(rows)
    if side * side != rows or side % 2 == 0 or given is not None:
        raise CheckpointError(
            f"{source} holds a table of {rows} relative positions: give --grid ROWS COLUMNS of its training size"
        )
    return (side + 1) // 2, (side + 1) // 2


def _completed(weights: OrderedDict[str, Tensor], shape: ViTShape) -> None:
    """Absolute positions in our form: zeros where there are none, a row for the class token if there is one."""
    count = shape.grid[0] * shape.grid[1]
    table = weights.get("pos_embed")
    if table is None:
        table = torch.zeros(1, count + int(shape.class_token), shape.width)
    elif shape.class_token and table.shape[1] == count:
        table = torch.cat([torch.zeros(1, 1, shape.width), table], dim=1)
    elif not shape.class_token and table.shape[1] == count + 1:
        table = table[:, 1:]  # detectron2 keeps the row of a token that it has not
    weights["pos_embed"] = table


# --- loading into our model ---------------------------------------------------------------------------


def resample_grid(
    weights: Mapping[str, Tensor], shape: ViTShape, grid: tuple[int, int]
) -> OrderedDict[str, Tensor]:
    """Positions, absolute and relative, for another grid of patches."""
    out = OrderedDict(weights)
    out["pos_embed"] = resample_positions(out["pos_embed"], shape.grid, grid, int(shape.class_token))
    for name in [name for name in out if name.endswith("relative_position_bias_table")]:
        out[name] = resample_bias_table(out[name], shape.grid, grid)
    return out


def load_encoder(model: VisionTransformer, encoder: Encoder, source: str) -> LoadReport:
    """Load an encoder into our ViT: blocks that the model has not are left out, positions are resampled.

    Raises:
        CheckpointError: one sentence that names what does not fit, and the option or conversion that helps.
    """
    shape = encoder.shape
    _check_fit(model, shape, source)
    weights = encoder.weights
    resized = []
    if shape.grid != model.grid:
        weights = resample_grid(weights, shape, model.grid)
        resized = [name for name in weights if name == "pos_embed" or name.endswith("bias_table")]
    extra = [f"blocks.{i}" for i in range(len(model.blocks), shape.depth)]
    if not any(below(name, "norm") for name in model.state_dict()):
        extra.append("norm")
    report = load_into(model, weights, required=[""], leave_out=extra, adapt_stem=True, source=source)
    report.resized += resized
    report.left_out += _parts_of(encoder.left_out)
    return report


def _parts_of(names: Iterable[str]) -> list[str]:
    """The parts of a checkpoint that lie beside its encoder: "predictor.* (75)"."""
    counts = Counter(name.split(".")[0] + (".*" if "." in name else "") for name in names)
    return [f"{part} ({count})" if part.endswith("*") else part for part, count in counts.items()]


def _check_fit(model: VisionTransformer, shape: ViTShape, source: str) -> None:
    has_scale = "blocks.0.ls1.gamma" in model.state_dict()
    tool = "convert the file with tools/convert_weights.py --to mmseg"
    for there, here, what, remedy, option in (
        (shape.class_token, model.prefix == 1, "a class token", f"{tool} --class-token drop", "class_token"),
        (shape.layer_scale, has_scale, "LayerScale", f"{tool} --layer-scale fold", "layer_scale"),
        (
            shape.rel_pos_bias,
            model.rel_pos_bias,
            "a relative position bias",
            f"{tool} --rel-pos-bias drop",
            "rel_pos_bias",
        ),
    ):
        if there and not here:
            raise CheckpointError(f"{source} has {what} and the model has not: set {option}, or {remedy}")
        if here and not there:
            raise CheckpointError(f"{source} has not {what}, which the model has: leave {option} out")
    if shape.registers:
        raise CheckpointError(f"{source} has further tokens, which the model has not: {tool}")
    if shape.patch_size != model.patch_size:
        raise CheckpointError(
            f"{source} has patches of {shape.patch_size} pixels and the model of {model.patch_size}: set "
            f"patch_size={shape.patch_size}, or {tool} --patch-size {model.patch_size}"
        )
    if len(model.blocks) > shape.depth:
        raise CheckpointError(
            f"{source} has {shape.depth} blocks and the model {len(model.blocks)}: use the size that it was "
            "trained with"
        )
