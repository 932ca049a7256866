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
TOKENLESS = "an encoder without class token"  # of I-JEPA or of this project, by its names alone

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
    pixels: mean and std of the images, RGB in [0, 1], or None where they are not known. bgr: it reads blue, green,
    red. certain: whether the origin is known, rather than one of several whose files have these names.
    """

    origin: str
    shape: ViTShape
    weights: OrderedDict[str, Tensor]
    published: OrderedDict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    bgr: bool = False
    certain: bool = True

    @property
    def licence(self) -> str:
        """What is known of the licence of the origin's published files: nothing, where the origin is not certain."""
        return LICENCES.get(self.origin, UNKNOWN_LICENCE) if self.certain else UNKNOWN_LICENCE


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
    strict: bool = False  # a row of positions for the class token exactly if there is that token
    detector: bool = False  # detectron2 keeps the row of a token that it has not


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
        found = _Found(origin, weights, strict=origin == "I-JEPA")
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
        found.origin, found.chosen, found.strict = OURS, True, True
    elif heads & {"base_encoder", "momentum_encoder"}:
        # the published evaluations take the base encoder, the momentum copy is the target
        wanted = "momentum_encoder" if which == "target" else "base_encoder"
        if wanted not in heads:
            raise CheckpointError(f"{source} holds no '{wanted}': take its other encoder with --encoder")
        found = _part(weights, f"{wanted}.")
        online, momentum = "the online encoder ('base_encoder')", "the momentum encoder ('momentum_encoder')"
        taken, other = (online, momentum) if wanted == "base_encoder" else (momentum, online)
        note = f"{taken} was taken, not {other}"
        found.origin, found.chosen = "MoCo v3", True
    elif any(name.startswith("backbone.net.") for name in weights):
        found, note = _part(weights, "backbone.net."), "'backbone.net' was taken"
        found.detector = True
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
    if not any(name.endswith("patch_embed.proj.weight") for name in found.weights):
        raise CheckpointError(
            f"{source} holds no plain ViT: it looks like {describe(found.weights)}; give a file of a ViT encoder"
        )
    check_finite(found.weights, source)
    return found


# No part of an encoder: heads, decoders, tokens of masked patches, computed buffers.
_BESIDE = re.compile(
    r"(mask_token|masked_embed|decoder_.*|head(_dist)?(\..*)?|lm_head\..*|pre_logits\..*|fc_norm\.num.*|"
    r".*relative_position_index|num_batches_tracked)"
)


def _origin_of(names: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> tuple[str, bool]:
    """Of a bare encoder, by its names and the key that held it; and whether other methods' files look different."""
    certain = _certain_origin(names) or _wrapped_origin(names, checkpoint)
    if certain:
        return certain, True
    if isinstance(checkpoint.get("model"), Mapping):
        return "MAE", False
    return ("iBOT" if isinstance(checkpoint.get("state_dict"), Mapping) else "DINO"), False


def _certain_origin(names: Mapping[str, Tensor]) -> str | None:
    """By names that one method's encoders have."""
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
    if "masked_embed" in names:
        return "iBOT"
    if any(part.startswith("ls1") or ".ls1." in part for part in blocks) and "cls_token" in names:
        return _origin_with_scale(names)
    return None if "cls_token" in names else TOKENLESS


def _origin_with_scale(names: Mapping[str, Tensor]) -> str:
    """Of an encoder with LayerScale: DINOv2's has patches of 14 pixels, and lost its mask token in timm's files."""
    patch = names["patch_embed.proj.weight"].shape[-1]
    dinov2 = patch == 14 and "norm.weight" in names and "head.weight" not in names
    return "DINOv2" if "mask_token" in names or dinov2 else "timm"


_MOCO_ARCHS = ("vit_small", "vit_base")


def _wrapped_origin(names: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> str | None:
    """Of names that several methods share: what surrounds the weights tells the published classifiers apart."""
    if isinstance(checkpoint.get("state_dict"), Mapping) and checkpoint.get("arch") in _MOCO_ARCHS:
        return "MoCo v3"
    if "head.weight" not in names:
        return None
    if isinstance(checkpoint.get("model"), Mapping):
        return "MAE" if "fc_norm.weight" in names else "DeiT"
    return "timm"


def recognise(
    checkpoint: Mapping[str, Any],
    *,
    source: str = "the checkpoint",
    which: str | None = None,
    heads: int | None = None,
    grid: Sequence[int] | None = None,
    expected: Sequence[int] | None = None,
    origin: str | None = None,
) -> Encoder:
    """The encoder in a checkpoint of any known kind, under our names.

    Args:
        which: "target" or "context", of a file with two encoders; None: the target, for MoCo v3 the base encoder.
        heads: of attention; needed where neither the file nor the width tells.
        grid: rows and columns of the table of positions, needed where it is no square and the file does not tell.
        expected: those of the model that it is for, believed where neither `grid` nor the file tells, they fit, and
            the file is this project's or its table no square: other methods train on squares.
        origin: a method's name, where names alone cannot tell.

    Raises:
        CheckpointError: no plain ViT; no such encoder; a part of a form that cannot be expressed; a tensor that is
            missing or of another shape.
    """
    found = _select(checkpoint, which, source)
    info = _info(checkpoint)
    known, certain = _known_origin(checkpoint, found, info, origin)
    notes = [*found.notes, *([] if certain else [_MAY_BE.format(known)])]
    weights, beside = _renamed(found.weights, source, notes)
    own_heads, own_grid = _own_settings(checkpoint, weights["patch_embed.proj.weight"].shape[-1])
    hints = _Hints(
        heads or info.get("heads") or own_heads,
        grid or info.get("grid") or own_grid,
        expected,
        known in (OURS, TOKENLESS),
        _rows_before(found, known),
        found.strict,
    )
    shape = _shape_of(weights, known, source, hints, notes)
    _completed(weights, shape)
    pixels = info["pixels"] if "pixels" in info else _pixels_of(known, shape.in_chans) if certain else None
    if info.get("bgr"):
        notes.append("it reads blue, green, red")
    return Encoder(
        known,
        shape,
        weights,
        found.weights,
        notes,
        found.left_out + beside,
        pixels and (tuple(pixels[0]), tuple(pixels[1])),
        bool(info.get("bgr")),
        certain,
    )


_MAY_BE = "by its names it may be MAE's, DINO's, iBOT's or timm's; taken for {}: --origin says else"


def _known_origin(
    checkpoint: Mapping[str, Any], found: _Found, info: Mapping[str, Any], given: str | None
) -> tuple[str, bool]:
    """The method that a file comes from, and whether that is certain."""
    told = given or found.origin
    if told:
        return told, True
    if "origin" in info:
        return info["origin"], bool(info.get("certain", True))
    return _origin_of(found.weights, checkpoint)


def _pixels_of(origin: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std that an origin's files were trained on; None where they differ from file to file."""
    if origin not in LICENCES or origin == "timm" or channels != 3:
        return None
    return HALVES if origin == "BEiT" else IMAGENET


@dataclass(frozen=True)
class _Hints:
    """What is known beside the tensors.

    grid: as the caller or the file tells. expected: of the model that the file is for. own: it may be this project's,
    whose grids are no squares of need. before: see `_rows_before`. strict: these are believed against a `grid`.
    """

    heads: int | None
    grid: Sequence[int] | None
    expected: Sequence[int] | None
    own: bool
    before: tuple[int, ...]
    strict: bool


def _rows_before(found: _Found, origin: str) -> tuple[int, ...]:
    """How many rows of the table of positions may lie before the patches', the likeliest first."""
    names = found.weights
    if found.strict:
        return (int("cls_token" in names),)
    if "reg_token" in names:  # timm's models with registers place patches alone
        return (0,)
    if "cls_token" not in names:
        return (0, 1) if found.detector else (0,)
    if origin == "DeiT III":
        return (0, 1)
    scaled = any(name.endswith((".ls1.gamma", ".gamma_1")) for name in names)
    beit = any(name.endswith(("relative_position_bias_table", "q_bias")) for name in names)
    return (
        (1, 0) if origin == "timm" or (scaled and not beit) else (1,)
    )  # timm's DeiT III has names of DINOv2


def _info(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a converted file says of itself."""
    found = checkpoint.get(INFO)
    return dict(found) if isinstance(found, Mapping) else {}


def _own_settings(
    checkpoint: Mapping[str, Any], patch_size: int
) -> tuple[int | None, tuple[int, int] | None]:
    """Heads and grid by the configuration that mmengine keeps in a checkpoint; None for what it does not tell."""
    model = _own_model(checkpoint)
    arch, size = model.get("arch"), model.get("img_size")
    heads = arch.get("heads") if isinstance(arch, Mapping) else None
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    grid = None
    if len(sides) == 2 and all(isinstance(side, int) for side in sides):
        grid = (sides[0] // patch_size, sides[1] // patch_size)
    return heads if isinstance(heads, int) else None, grid


def _own_model(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of the ViT, by that configuration, whose text is parsed, never run: of `model` or its backbone."""
    meta = checkpoint.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    try:
        tree = ast.parse(text) if isinstance(text, str) else None
    except SyntaxError:
        return {}
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "model":
            model = _literal(node.value)
            backbone = model.get("backbone", model) if isinstance(model, Mapping) else None
            return backbone if isinstance(backbone, Mapping) else {}
    return {}


def _literal(node: ast.AST) -> Any:
    """The value of a literal, or of dict(...) of them; None for anything else."""
    if isinstance(node, ast.Call):
        return {word.arg: _literal(word.value) for word in node.keywords}
    try:
        return ast.literal_eval(node)
    except ValueError:
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
    _stack_biases(out, source)
    _share_bias(out)
    _distilled(out)
    _check_names(out, source)
    _check_whole(out, source)
    return out, beside


def _stack_biases(weights: OrderedDict[str, Tensor], source: str) -> None:
    """BEiT's biases of queries and values; its keys have none."""
    for name in [name for name in weights if name.endswith(".q_bias")]:
        other = name.replace(".q_bias", ".v_bias")
        if other not in weights:
            raise CheckpointError(f"{source} lacks '{other}' beside '{name}': give a whole checkpoint")
        query, value = weights.pop(name), weights.pop(other)
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
    elif any(name.startswith("norm_pre.") for name in unknown):
        what = "a norm before its blocks (CLIP's), which the plain ViT has not"
    elif any(".w12." in name or ".fc1_g." in name for name in unknown):
        what = "a gated MLP (SwiGLU), which the plain ViT has not"
    else:
        what = "a part that the plain ViT has not"
    raise CheckpointError(f"{source} cannot be converted: it holds {what} ('{unknown[0]}')")


def _tensors_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a plain ViT of these weights' width, depth and optional parts has, but its tables."""
    width = weights["patch_embed.proj.weight"].shape[0]
    hidden = 4 * width
    vectors = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.proj.bias", "mlp.fc2.bias"}
    if any(re.search(r"\.ls[12]\.gamma$", name) for name in weights):
        vectors |= {"ls1.gamma", "ls2.gamma"}
    parts: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(sorted(vectors), (width,)),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
    }
    of_all = {"patch_embed.proj.bias": (width,)}
    if any(below(name, "norm") for name in weights):
        of_all |= {"norm.weight": (width,), "norm.bias": (width,)}
    blocks = range(_depth_of(weights))
    return of_all | {f"blocks.{i}.{name}": shape for i in blocks for name, shape in parts.items()}


def _check_whole(weights: Mapping[str, Tensor], source: str) -> None:
    """Every tensor of every block is there, and of the shape that the encoder's width asks for."""
    kernel = weights["patch_embed.proj.weight"]
    if kernel.dim() != 4:
        raise CheckpointError(
            f"{source} cannot be converted: 'patch_embed.proj.weight' has the shape {tuple(kernel.shape)}, not that "
            "of a convolution"
        )
    if not _depth_of(weights):
        raise CheckpointError(f"{source} holds no blocks of a ViT ('blocks.0.*'): give a whole checkpoint")
    wanted = _tensors_of(weights)
    tables = [name for name in weights if name.endswith("relative_position_bias_table")]
    needed = [
        *wanted,
        *(re.sub(r"\d+", str(i), tables[0], count=1) for i in range(_depth_of(weights)) if tables),
    ]
    missing = [name for name in needed if name not in weights]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of the {len(needed)} tensors of a plain ViT of {_depth_of(weights)} "
            f"blocks, for instance '{missing[0]}': give a whole checkpoint"
        )
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    if hidden != 4 * kernel.shape[0]:
        raise CheckpointError(
            f"{source} cannot be converted: its MLP is not four times as wide as its tokens "
            f"('blocks.0.mlp.fc1.weight')"
        )
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{source} cannot be converted: '{name}' has the shape {tuple(weights[name].shape)}, not {shape} as "
                f"the ViT's width of {kernel.shape[0]} asks for"
            )


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


_GRID_REMEDY = "give --grid ROWS COLUMNS of its training size (tools/convert_weights.py)"


def _squares(counts: Iterable[int]) -> list[tuple[int, int]]:
    """The square grids of so many cells."""
    return [(math.isqrt(n), math.isqrt(n)) for n in counts if n > 0 and math.isqrt(n) ** 2 == n]


def _likeliest(
    squares: Sequence[tuple[int, int]], fits: bool, hints: _Hints, what: str, notes: list[str]
) -> tuple[int, int] | None:
    """Of the grids that `what` may have: a square, or the model's if that fits; a choice or assumption is noted."""
    square = squares[0] if squares else None
    if hints.expected is None or not fits:
        return square
    model = (hints.expected[0], hints.expected[1])
    if model == square:
        return model
    taken = model if square is None or hints.own else square
    text = f"{what} were taken for {taken[0]}x{taken[1]}"
    text += ", as the model has" if taken == model else f", not the model's {model[0]}x{model[1]}"
    if taken == model and square:
        text += f", not {square[0]}x{square[1]}"
    notes.append(f"{text}; if that is wrong, {_GRID_REMEDY}")
    return taken


def _grid_of(rows: int, hints: _Hints, source: str, notes: list[str]) -> tuple[int, int]:
    """Rows and columns of patches of a table of `rows` positions."""
    counts = [rows - extra for extra in hints.before]
    if hints.grid is not None:
        height, width = hints.grid
        if height * width not in (counts if hints.strict else (rows, rows - 1)):
            raise CheckpointError(
                f"{source} holds {counts[0]} positions, not {height}x{width}: {_GRID_REMEDY}"
            )
        return height, width
    fits = hints.expected is not None and math.prod(hints.expected) in counts
    grid = _likeliest(_squares(counts), fits, hints, f"its {counts[0]} positions", notes)
    if grid is None:
        raise CheckpointError(f"{source} holds {counts[0]} positions, which are no square: {_GRID_REMEDY}")
    if math.prod(grid) != counts[0]:  # less likely, where two are possible
        row = "without a row for its class token" if counts[0] < rows else "after a row of no token"
        notes.append(
            f"its table of {rows} positions was taken for {grid[0]}x{grid[1]} patches {row}; if that is wrong, "
            f"{_GRID_REMEDY}"
        )
    return grid


def _shape_of(
    weights: Mapping[str, Tensor], origin: str, source: str, hints: _Hints, notes: list[str]
) -> ViTShape:
    """Read off the tensors what they tell. Raises CheckpointError for what the plain ViT cannot be."""
    kernel = weights["patch_embed.proj.weight"]
    width, channels, patch = kernel.shape[0], kernel.shape[1], kernel.shape[-1]
    if kernel.shape[-2] != patch:
        raise CheckpointError(
            f"{source} has patches of {tuple(kernel.shape[-2:])} pixels: they must be square"
        )
    relative = weights.get("blocks.0.attn.relative_position_bias_table")
    class_token = "cls_token" in weights
    if "pos_embed" in weights:
        at = _grid_of(weights["pos_embed"].shape[1], hints, source, notes)
    elif relative is not None:
        at = _grid_of_table(relative.shape[0] - 3 * class_token, hints, source, notes)
    else:
        raise CheckpointError(f"{source} holds no positions ('pos_embed'): give a whole encoder")
    tokens = weights.get("reg_token")
    return ViTShape(
        width,
        _depth_of(weights),
        hints.heads or _heads_of(weights, origin, width, source),
        patch,
        at,
        channels,
        class_token,
        0 if tokens is None else tokens.shape[1],
        "blocks.0.ls1.gamma" in weights,
        relative is not None,
        "norm.weight" in weights,
    )


def _grid_of_table(rows: int, hints: _Hints, source: str, notes: list[str]) -> tuple[int, int]:
    """Rows and columns of patches from a table's offsets, (2h - 1)(2w - 1)."""

    def fits(grid: Sequence[int] | None) -> bool:
        return grid is not None and (2 * grid[0] - 1) * (2 * grid[1] - 1) == rows

    if hints.grid is not None:
        found = (hints.grid[0], hints.grid[1]) if fits(hints.grid) else None
    else:
        squares = [((side + 1) // 2,) * 2 for side, _ in _squares([rows]) if side % 2]
        what = f"its {rows} relative positions"
        found = _likeliest(squares, fits(hints.expected), hints, what, notes)
    if found is None:
        raise CheckpointError(f"{source} holds a table of {rows} relative positions: {_GRID_REMEDY}")
    return found


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
