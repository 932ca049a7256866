#!/usr/bin/env python
"""Turn a Mask-JEPA pre-training checkpoint into a Mask2Former checkpoint, and prove that it loads.

    python tools/export.py output/model_final.pth mask_jepa_r50.pth --config-file FINETUNE.yaml

Kept under Mask2Former's names, which MP-Former and OneFormer share: the backbone, the pixel decoder, and of the
transformer decoder what pre-training trained. Left out: what only pre-training uses, the target copies, and
heads and queries that it does not train. Module versions are kept in `.pth` and `.safetensors` alike.
With --config-file the fine-tuning model is built, the written file is loaded into it and every tensor is
compared; a file that fails is not kept.

    python tools/export.py output/model_final.pth FOLDER --format transformers --config-file FINETUNE.yaml

writes a folder for the package `transformers` (`Mask2FormerForUniversalSegmentation.from_pretrained(FOLDER)`),
from a pre-training checkpoint, an export, or a fine-tuned Mask2Former; where that package is installed, its
outputs are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from jepa_plugins.core.checkpoints import (  # noqa: E402
    CheckpointError,
    LoadReport,
    drop_batch_counters,
    load_into,
    read_checkpoint,
    save_atomic,
    state_dict_of,
)
from jepa_plugins.core.export import (  # noqa: E402
    LEVEL_EMBED,
    PREDICTOR,
    Options,
    expected_missing,
    export,
    is_pretraining,
)
from jepa_plugins.core.key_maps import FAMILY_QUERIES  # noqa: E402

DROPPABLE = ("backbone", "predictor")
TRANSFORMERS = "transformers"


def take(
    model: nn.Module, weights: Mapping[str, Tensor], manifest: Mapping[str, Any], source: str
) -> LoadReport:
    """Load an export into a fine-tuning model.

    Raises CheckpointError when a tensor finds no place or is missing without reason.
    """
    counters = drop_batch_counters(weights, model)  # type: ignore[arg-type]
    report = load_into(model, weights, source=source)
    if report.unexpected or len(report.loaded) != manifest["tensors"] - counters:
        raise CheckpointError(
            f"the fine-tuning model took {len(report.loaded)} of {manifest['tensors']} tensors (no place for "
            f"{report.unexpected[:2]}): give a config with the pre-training run's backbone and decoder sizes"
        )
    lacking = [name for name in report.missing if not expected_missing(name, weights, manifest)]
    if lacking:
        raise CheckpointError(
            f"the fine-tuning model has {len(lacking)} tensors that the export lacks, for instance "
            f"{lacking[0]}: give a config with the pre-training run's backbone and decoder sizes"
        )
    return report


def prove(path: Path, model: nn.Module) -> str:
    """Load a written export into a fine-tuning model and compare; returns one line with the result.

    Raises CheckpointError when a tensor finds no place, differs after the load, or is missing without reason.
    """
    content = read_checkpoint(path)
    weights = state_dict_of(content)
    report = take(model, weights, content["jepa_export"], str(path))
    loaded = model.state_dict()
    rows = weights._metadata.get(PREDICTOR, {}).get("trained_level_rows")  # type: ignore[attr-defined]
    for name, tensor in weights.items():
        pick: Any = rows if name == LEVEL_EMBED else slice(None) if tensor.dim() else ()
        if not torch.equal(loaded[name][pick].cpu(), tensor[pick].to(loaded[name].dtype)):
            raise CheckpointError(f"{name} differs after the load: the model changes what it loads")
    return f"proof: {len(report.loaded)} tensors loaded and equal, {len(report.missing)} start as initialised"


def finetuning_config(config_file: str, opts: Sequence[str]) -> Any:
    """A fine-tuning configuration for a model on the CPU, without weights."""
    import jepa_plugins.d2  # noqa: F401
    from jepa_plugins.d2.config import get_config

    return get_config(config_file, [*opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])


def build_finetuning_model(config_file: str, opts: Sequence[str]) -> nn.Module:
    """The model of a fine-tuning config, on the CPU, without weights."""
    cfg = finetuning_config(config_file, opts)
    from jepa_plugins.d2.registration import build_model

    return build_model(cfg)


def write_proven(content: Mapping[str, Any], out: Path, build: Callable[[], nn.Module] | None) -> str:
    """Write the export; with `build`, only when what was written loads into the model that it returns."""
    if build is None:
        save_atomic(content, out)
        return "no --config-file: the export was not tried on a fine-tuning model"
    scratch = out.with_name(f".unproven-{os.getpid()}-{out.name}")
    try:
        save_atomic(content, scratch)
        proof = prove(scratch, build())
        os.replace(scratch, out)
    finally:
        scratch.unlink(missing_ok=True)
    return proof


def load_finetuning(
    model: nn.Module, checkpoint: Mapping[str, Any], options: Options, source: str
) -> list[str]:
    """Fill a Mask2Former from a pre-training checkpoint, an export or a Mask2Former's; names of what it took."""
    weights = state_dict_of(checkpoint)
    if is_pretraining(weights):
        checkpoint, report = export(checkpoint, options, source)
        print(report)
        weights = state_dict_of(checkpoint)
    if manifest := checkpoint.get("jepa_export"):
        return take(model, weights, manifest, source).loaded
    drop_batch_counters(weights, model)
    return load_into(model, weights, required=[""], source=source).loaded


def write_transformers(args: argparse.Namespace, checkpoint: Mapping[str, Any], options: Options) -> str:
    """Write a folder for `transformers`, whole and proven or not at all; returns the proof's line."""
    from jepa_plugins.d2.registration import build_model
    from jepa_plugins.d2.transformers_folder import FILES, prove_folder, write_folder

    cfg = finetuning_config(args.config_file, args.opts)
    model = build_model(cfg)
    names = load_finetuning(model, checkpoint, options, str(args.checkpoint))
    state = model.state_dict()
    weights = {name: state[name] for name in state if name in set(names)}
    scratch = args.out.with_name(f".unproven-{os.getpid()}-{args.out.name}")
    try:
        write_folder(scratch, cfg, weights)
        proof = prove_folder(scratch, cfg, model, weights)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            os.replace(scratch / name, args.out / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return f"{proof}\nwrote {args.out}: {', '.join(FILES)}"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="what pre-training has written")
    parser.add_argument("out", type=Path, help="a .pth or .safetensors file; a folder for transformers")
    parser.add_argument("--which", choices=("online", "ema"), default="online", help="which copy to export")
    parser.add_argument("--drop", choices=DROPPABLE, action="append", default=[], help="leave a part out")
    parser.add_argument("--keep-queries", action="store_true", help="for the read-out that trains them")
    parser.add_argument(
        "--format",
        choices=(*FAMILY_QUERIES, TRANSFORMERS),
        default="mask2former",
        help="whose names; the first three differ in the queries alone",
    )
    parser.add_argument(
        "--level-rows",
        type=int,
        nargs="+",
        help="trained rows of level_embed, if the checkpoint does not say",
    )
    parser.add_argument("--trust", type=Path, action="append", default=[], help="a file that may run code")
    parser.add_argument("--config-file", help="fine-tuning config to prove the export with")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="its overrides: KEY VALUE ...")
    args = parser.parse_args(arguments)
    if args.format == TRANSFORMERS and not args.config_file:
        parser.error("--format transformers needs --config-file, which says what the weights do not")
    return args


def run(args: argparse.Namespace) -> str:
    """Export as the command line says; returns what to print at last."""
    family = "mask2former" if args.format == TRANSFORMERS else args.format
    options = Options(args.which, tuple(args.drop), args.keep_queries, args.level_rows, family)
    checkpoint = read_checkpoint(args.checkpoint, trust=args.trust)
    if args.format == TRANSFORMERS:
        return write_transformers(args, checkpoint, options)
    content, report = export(checkpoint, options, str(args.checkpoint))
    print(report)
    build = (lambda: build_finetuning_model(args.config_file, args.opts)) if args.config_file else None
    proof = write_proven(content, args.out, build)
    return f"{proof}\nwrote {args.out}: {content['jepa_export']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code is 1 after an error, which is one sentence."""
    args = parse_arguments(arguments)
    try:
        print(run(args))
    except (CheckpointError, FileNotFoundError, KeyError, ValueError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
