"""Bring a plain ViT's weights into the form of detectron2, mmsegmentation (our `JEPAViT`) or timm.

Every step is reported: as exact, or as a change by design. `core.vit_proof` compares the result with the source.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from timm.layers import resample_patch_embed
from torch import Tensor

from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.vit_weights import IMAGENET, INFO, Encoder, ViTShape, resample_grid

TARGETS = ("detectron2", "mmseg", "timm")

# --- changes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wishes:
    """What the target shall hold; None leaves it as it is, as far as the target can.

    class_token, layer_scale: keep them. patch_size: in pixels. img_size: height and width in pixels that the
    positions are for. bgr: the target reads blue, green, red.

    Raises:
        ValueError: sizes below 1.
    """

    class_token: bool | None = None
    layer_scale: bool | None = None
    rel_pos_bias: bool | None = None
    patch_size: int | None = None
    img_size: tuple[int, int] | None = None
    bgr: bool = False

    def __post_init__(self) -> None:
        if self.patch_size is not None and self.patch_size < 1:
            raise ValueError(f"--patch-size is at least 1, got {self.patch_size}")
        if self.img_size is not None and min(self.img_size) < 1:
            raise ValueError(f"--img-size is at least one patch a side, got {min(self.img_size)}")


@dataclass
class Converted:
    """An encoder in the form of a target, with what was done: exactly, and by design."""

    encoder: Encoder
    exactly: list[str] = field(default_factory=list)
    by_design: list[str] = field(default_factory=list)


def fold_layer_scale(weights: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """LayerScale multiplied into the linear layer before it; the network computes the same."""
    out = OrderedDict(weights)
    for name in [name for name in weights if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        gamma = out.pop(name)
        block, _, which = name.removesuffix(".gamma").rpartition(".")
        layer = f"{block}.attn.proj" if which == "ls1" else f"{block}.mlp.fc2"
        out[f"{layer}.weight"] = out[f"{layer}.weight"] * gamma[:, None]
        out[f"{layer}.bias"] = out[f"{layer}.bias"] * gamma
    return out


def without_tokens(
    weights: Mapping[str, Tensor], shape: ViTShape, *, class_token: bool, registers: bool
) -> OrderedDict[str, Tensor]:
    """Without the class token and the registers unless they stay; rows of tables go with the class token."""
    out = OrderedDict((k, v) for k, v in weights.items() if registers or k != "reg_token")
    if shape.class_token and not class_token:
        del out["cls_token"]
        out["pos_embed"] = out["pos_embed"][:, 1:]
        for name in [name for name in out if name.endswith("relative_position_bias_table")]:
            out[name] = out[name][:-3]
    return out


def convert(source: Encoder, target: str, wishes: Wishes | None = None) -> Converted:
    """Bring an encoder into the form that `target` ("detectron2", "mmseg" or "timm") can hold.

    Raises:
        CheckpointError: a wish that cannot be met.
    """
    wishes = wishes or Wishes()
    result = Converted(replace(source, weights=OrderedDict(source.weights)))
    _convert_tokens(result, target, wishes)
    _convert_scale(result, target, wishes)
    _convert_bias(result, target, wishes)
    _convert_patches(result, wishes)
    if wishes.bgr != source.bgr:
        _reverse_channels(result)
    if target == "detectron2" and result.encoder.shape.norm:
        weights = result.encoder.weights
        for name in ("norm.weight", "norm.bias"):
            del weights[name]
        result.encoder.shape = replace(result.encoder.shape, norm=False)
        result.exactly.append("left out the final norm, which detectron2's ViT has not")
    return result


def _convert_tokens(result: Converted, target: str, wishes: Wishes) -> None:
    encoder = result.encoder
    shape = encoder.shape
    keep = wishes.class_token if wishes.class_token is not None else target != "detectron2"
    if keep and target == "detectron2" and shape.class_token:
        raise CheckpointError("detectron2's ViT has no class token: leave out '--class-token keep'")
    if wishes.class_token and not shape.class_token:
        raise CheckpointError("the file has no class token to keep: leave out '--class-token keep'")
    dropped = [] if keep or not shape.class_token else ["the class token"]
    # timm's model of relative positions has no registers
    registers = target == "timm" and not shape.rel_pos_bias
    dropped += [f"{shape.registers} further tokens"] if shape.registers and not registers else []
    if dropped:
        encoder.weights = without_tokens(encoder.weights, shape, class_token=keep, registers=registers)
        left = shape.registers if registers else 0
        encoder.shape = replace(shape, class_token=shape.class_token and keep, registers=left)
        result.by_design.append(f"{' and '.join(dropped)} dropped")


def _convert_scale(result: Converted, target: str, wishes: Wishes) -> None:
    encoder = result.encoder
    keep = wishes.layer_scale if wishes.layer_scale is not None else target != "detectron2"
    if keep and target == "detectron2" and encoder.shape.layer_scale:
        raise CheckpointError("detectron2's ViT has no LayerScale: leave out '--layer-scale keep'")
    if encoder.shape.layer_scale and not keep:
        encoder.weights = fold_layer_scale(encoder.weights)
        encoder.shape = replace(encoder.shape, layer_scale=False)
        result.exactly.append("folded LayerScale into the layers before it")


def _convert_bias(result: Converted, target: str, wishes: Wishes) -> None:
    encoder = result.encoder
    if not encoder.shape.rel_pos_bias:
        return
    # timm's model of relative positions always has a class token
    able = target == "mmseg" or (target == "timm" and encoder.shape.class_token)
    if wishes.rel_pos_bias and not able:
        raise CheckpointError(
            f"{target} cannot hold this relative position bias: leave out '--rel-pos-bias keep'"
        )
    if able and wishes.rel_pos_bias is not False:
        return
    encoder.weights = OrderedDict(
        (k, v) for k, v in encoder.weights.items() if not k.endswith("relative_position_bias_table")
    )
    encoder.shape = replace(encoder.shape, rel_pos_bias=False)
    why = "" if able else f", which {target}'s ViT cannot express"
    result.by_design.append(f"the relative position bias{why} dropped")


def _convert_patches(result: Converted, wishes: Wishes) -> None:
    encoder = result.encoder
    patch = encoder.shape.patch_size if wishes.patch_size is None else wishes.patch_size
    if patch != encoder.shape.patch_size:
        name = "patch_embed.proj.weight"
        encoder.weights[name] = resample_patch_embed(encoder.weights[name], [patch, patch])
        result.by_design.append(f"patches resampled from {encoder.shape.patch_size} to {patch} pixels")
        encoder.shape = replace(encoder.shape, patch_size=patch)
    if wishes.img_size is None:
        return
    height, width = wishes.img_size
    if height % patch or width % patch:
        raise CheckpointError(
            f"--img-size {height} {width} is no whole number of patches of {patch} pixels: give multiples of {patch}"
        )
    grid = (height // patch, width // patch)
    if grid != encoder.shape.grid:
        encoder.weights = resample_grid(encoder.weights, encoder.shape, grid)
        old = encoder.shape.grid
        encoder.shape = replace(encoder.shape, grid=grid)
        result.by_design.append(f"positions resampled from {old[0]}x{old[1]} to {grid[0]}x{grid[1]}")


def _reverse_channels(result: Converted) -> None:
    encoder = result.encoder
    if encoder.shape.in_chans != 3:
        raise CheckpointError(
            f"--channels bgr: the file reads {encoder.shape.in_chans} channels, not red, green, blue"
        )
    name = "patch_embed.proj.weight"
    encoder.weights[name] = encoder.weights[name].flip(1)
    encoder.bgr = not encoder.bgr
    order = "blue, green, red" if encoder.bgr else "red, green, blue"
    result.exactly.append(f"reversed the channels: the target reads {order}")


# --- the target's file --------------------------------------------------------------------------------


def target_weights(encoder: Encoder, target: str) -> OrderedDict[str, Tensor]:
    """The tensors under the target's names."""
    weights = encoder.weights
    if target == "detectron2":
        weights = OrderedDict((f"backbone.net.{name}", value) for name, value in weights.items())
    elif target == "timm" and encoder.shape.rel_pos_bias:
        weights = _as_timm_beit(encoder)
    elif target == "timm" and encoder.shape.registers:
        weights = _as_timm_registers(encoder)
    return OrderedDict((name, value.detach().clone().contiguous()) for name, value in weights.items())


def _as_timm_beit(encoder: Encoder) -> OrderedDict[str, Tensor]:
    out: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in encoder.weights.items():
        if name.endswith(".attn.qkv.bias"):
            query, _, rest = value.chunk(3)
            out[name.replace(".qkv.bias", ".q_bias")], out[name.replace(".qkv.bias", ".v_bias")] = query, rest
        else:
            out[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)] = value
    return out


def _as_timm_registers(encoder: Encoder) -> OrderedDict[str, Tensor]:
    """timm's models with registers (`no_embed_class`) place patches alone: the class token takes its row along."""
    out = OrderedDict(encoder.weights)
    if encoder.shape.class_token:
        table = out["pos_embed"]
        out["cls_token"], out["pos_embed"] = out["cls_token"] + table[:, :1], table[:, 1:]
    return out


def file_content(converted: Converted, target: str) -> dict[str, Any]:
    """What to write: the weights with their description; for timm, whose loaders expect no more, the weights."""
    encoder = converted.encoder
    weights = target_weights(encoder, target)
    if target == "timm":
        return weights
    info = {"origin": encoder.origin, "heads": encoder.shape.heads, "grid": list(encoder.shape.grid)}
    pixels = encoder.pixels and [list(part) for part in encoder.pixels]
    read = {"pixels": pixels, "bgr": encoder.bgr, "certain": encoder.certain}
    return {"model": weights, INFO: {**info, **read}}


def usage(encoder: Encoder, target: str) -> str:
    """The lines of a configuration that goes with the converted file."""
    shape = encoder.shape
    size = shape.img_size[0] if shape.img_size[0] == shape.img_size[1] else shape.img_size
    if target == "timm":
        return _timm_usage(shape, size)
    if target == "detectron2":
        return _detection_usage(encoder)
    arch = (
        f'"{shape.name}"'
        if shape.name
        else f"dict(width={shape.width}, depth={shape.depth}, heads={shape.heads})"
    )
    options = [f'type="JEPAViT", arch={arch}, img_size={size}, patch_size={shape.patch_size}']
    options += [f"in_chans={shape.in_chans}"] if shape.in_chans != 3 else []
    options += [f"out_indices={_quarters(shape.depth)}"] if shape.depth != 12 else []
    options += ["class_token=True"] if shape.class_token else []
    options += ["layer_scale=1e-5"] if shape.layer_scale else []
    options += ["rel_pos_bias=True"] if shape.rel_pos_bias else []
    options += ['init_cfg=dict(type="Pretrained", checkpoint=FILE)']
    return f"backbone=dict({', '.join(options)})"


def _quarters(depth: int) -> tuple[int, ...]:
    """The last block, from 0, of each quarter of the blocks."""
    return tuple(sorted({max(depth * k // 4, 1) - 1 for k in range(1, 5)}))


_PYRAMID = (4, 8, 16)  # patches, in pixels, that the pyramid with levels of strides 4 to 32 can start from


def _detection_usage(encoder: Encoder) -> str:
    """Keys of this project's Mask R-CNN, and the same for a LazyConfig; other patches are resampled in loading."""
    shape = encoder.shape
    patch = shape.patch_size if shape.patch_size in _PYRAMID else 16
    whole = _quarters(shape.depth)
    values: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "window_block_indexes": [i for i in range(shape.depth) if i not in whole],
        "pretrain_img_size": (shape.grid[0] * patch, shape.grid[1] * patch),
    }
    lazy = ", ".join(f"{key}={value}" for key, value in values.items())
    lazy += f", in_chans={shape.in_chans}" if shape.in_chans != 3 else ""
    keys = {f"MODEL.VIT.{key.upper()}": value for key, value in values.items()}
    scales = [patch / stride for stride in (4, 8, 16, 32)]
    keys |= {"MODEL.VIT.SCALE_FACTORS": scales} if patch != 16 else {}
    keys |= _detection_pixels(encoder)
    words = (f'{key} "{value}"' if isinstance(value, (list, tuple)) else f"{key} {value}"
             for key, value in keys.items())  # fmt: skip
    yaml = "--config-file detectron2/mask_rcnn/vitb_100ep.yaml MODEL.WEIGHTS FILE " + " ".join(words)
    other = f" (patches are resampled from {shape.patch_size} to {patch} pixels in loading)"
    return (
        f"{yaml}\nor:       in a LazyConfig jepa_plugins.d2.vit.JEPAViT(img_size=1024, {lazy}, "
        f"window_size=14, use_rel_pos=True){other if patch != shape.patch_size else ''}"
    )


def _detection_pixels(encoder: Encoder) -> dict[str, Any]:
    """The keys of pixels that are not ImageNet's in RGB, which the configuration has."""
    keys: dict[str, Any] = {"INPUT.FORMAT": "BGR"} if encoder.bgr else {}
    if encoder.pixels is None or (encoder.pixels == IMAGENET and not encoder.bgr):
        return keys
    step = -1 if encoder.bgr else 1
    mean, std = ([round(255 * value, 3) for value in part][::step] for part in encoder.pixels)
    return keys | {"MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}


def _timm_usage(shape: ViTShape, size: int | tuple[int, int]) -> str:
    sizes = f"img_size={size}, patch_size={shape.patch_size}, embed_dim={shape.width}, depth={shape.depth}, "
    sizes += f"num_heads={shape.heads}, num_classes=0, global_pool=''"
    sizes += f", in_chans={shape.in_chans}" if shape.in_chans != 3 else ""
    scale = ", init_values=1e-5" if shape.layer_scale else ""
    if shape.rel_pos_bias:
        return f"timm.models.beit.Beit({sizes}{scale}, use_rel_pos_bias=True)"
    tokens = f", class_token={shape.class_token}"
    tokens += f", reg_tokens={shape.registers}, no_embed_class=True" if shape.registers else ""
    return f"timm.models.vision_transformer.VisionTransformer({sizes}{scale}{tokens})"
