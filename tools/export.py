#!/usr/bin/env python
"""Turn a Mask-JEPA pre-training checkpoint into a Mask2Former checkpoint, and prove that it loads.

    python tools/export.py output/model_final.pth mask_jepa_r50.pth --config-file FINETUNE.yaml

Kept under Mask2Former's names: the backbone, the pixel decoder, and of the transformer decoder the layers,
`decoder_norm`, `level_embed` and `input_proj`. Left out: what only pre-training uses, the target copies, and
heads and queries that it does not train. Module versions are kept in `.pth` and `.safetensors` alike.
With --config-file the fine-tuning model is built, the written file is loaded into it and every tensor is
compared; a file that fails is not kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from jepa_plugins.core.checkpoints import (  # noqa: E402
    CheckpointError,
    below,
    describe,
    drop_batch_counters,
    load_into,
    read_checkpoint,
    save_atomic,
    state_dict_of,
)
from jepa_plugins.core.settings import PREDICTOR_PARTS  # noqa: E402

FORMAT = 1
PIXEL_DECODER = "sem_seg_head.pixel_decoder"
PREDICTOR = "sem_seg_head.predictor"
LEVEL_EMBED = f"{PREDICTOR}.level_embed.weight"
QUERIES = ("query_feat", "query_embed")
# Parts of the pixel decoder that lead to the stride-8 map; only denoising trains the rest.
ENCODER_PARTS = ("input_proj", "transformer")
# Read-outs with a query for each cell, which leave Mask2Former's query tables alone.
SPATIAL_READOUTS = ("spatial_queries", "masked_queries")
DROPPABLE = ("backbone", "predictor")


@dataclass(frozen=True)
class Options:
    """What to export; see `parse_arguments` for the meaning."""

    which: str = "online"
    drop: Sequence[str] = ()
    keep_queries: bool = False
    level_rows: Sequence[int] | None = None


@dataclass
class Report:
    """Tensors kept and dropped, by group."""

    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    dropped: dict[str, list[Tensor]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for title, groups in (("kept", self.kept), ("dropped", self.dropped)):
            everything = [tensor for tensors in groups.values() for tensor in tensors]
            for group, tensors in [*sorted(groups.items()), ("total", everything)]:
                count = sum(tensor.numel() for tensor in tensors)
                lines.append(f"{title:8}{group:60}{len(tensors):5} tensors {count:12,} values")
        return "\n".join(lines)


def pretraining_info(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the run says of itself: beside the model, or among its module versions; {} if nowhere."""
    versions = getattr(weights, "_metadata", {})
    return dict(checkpoint.get("jepa_pretraining") or versions.get("", {}).get("jepa_pretraining") or {})


def check_is_pretraining(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError, saying what the file looks like, unless it is of a Mask-JEPA pre-training."""
    if "jepa_export" in checkpoint:
        raise CheckpointError(
            f"{source} is an export already: give the pre-training checkpoint that it came from"
        )
    parts = (PIXEL_DECODER, PREDICTOR, "target_pixel_decoder", "jepa")
    lacking = [part for part in parts if not any(below(name, part) for name in weights)]
    if lacking:
        raise CheckpointError(
            f"{source} is no Mask-JEPA pre-training checkpoint: it has no '{lacking[0]}.*' and looks like "
            f"{describe(weights)}; give a file that pre-training with MODEL.META_ARCHITECTURE MaskJEPA wrote"
        )


def trained_rows(
    info: Mapping[str, Any], weights: Mapping[str, Tensor], given: Sequence[int] | None
) -> list[int]:
    """Rows of `level_embed` that pre-training read."""
    levels = len(weights[LEVEL_EMBED])
    rows = given if given is not None else info.get("trained_level_rows")
    if rows is None and levels == 1:
        rows = [0]
    if rows is None:
        raise CheckpointError(
            f"the checkpoint does not say which of the {levels} rows of {LEVEL_EMBED} were trained (it lacks "
            "'jepa_pretraining'): give --level-rows, 2 for a run that reconstructs the stride-8 map only"
        )
    rows = sorted(set(rows))
    if not rows or rows[0] < 0 or rows[-1] >= levels:
        raise CheckpointError(
            f"--level-rows {rows} does not fit {LEVEL_EMBED}, which has rows 0 to {levels - 1}"
        )
    return rows


def sources(weights: Iterable[str], which: str) -> dict[str, str]:
    """{prefix in the checkpoint: prefix in the export} of the two parts that have target copies."""
    online = {"backbone": "backbone", PIXEL_DECODER: PIXEL_DECODER}
    if which == "online":
        return online
    chosen = {"target_pixel_decoder": PIXEL_DECODER}
    if any(below(name, "target_backbone") for name in weights):
        return {**chosen, "target_backbone": "backbone"}
    return {**chosen, "backbone": "backbone"}  # a frozen backbone has no copy


def wanted_predictor_parts(info: Mapping[str, Any], options: Options) -> tuple[str, ...]:
    """Names of the transformer decoder's parts to keep."""
    if "predictor" in options.drop or not info.get("reconstruction", True):
        return ()
    return PREDICTOR_PARTS + (QUERIES if options.keep_queries else ())


def key_map(weights: Iterable[str], info: Mapping[str, Any], options: Options) -> dict[str, str]:
    """{name in the checkpoint: name in the export} of every tensor to keep."""
    parts = wanted_predictor_parts(info, options)
    names = {}
    weights = list(weights)
    for source, target in sources(weights, options.which).items():
        if target in options.drop:
            continue
        for name in (name for name in weights if below(name, source)):
            part = name[len(source) + 1 :]
            untrained = target == PIXEL_DECODER and not info.get("denoising", True)
            if not untrained or part.startswith(ENCODER_PARTS):
                names[name] = f"{target}.{part}"
    for name in weights:
        if any(below(name, f"{PREDICTOR}.{part}") for part in parts):
            names[name] = name
    return names


def export_versions(
    weights: Mapping[str, Tensor], names: Mapping[str, str], which: str
) -> OrderedDict[str, dict[str, Any]]:
    """Module versions of the kept modules, under their new names."""
    versions: Mapping[str, dict] = getattr(weights, "_metadata", None) or {}
    if not versions.get("sem_seg_head"):
        raise CheckpointError(
            "the checkpoint has no module versions ('_metadata'), so it cannot be told from an old one: save "
            "model.state_dict() as it is, not a copy in a plain dict"
        )
    moved = sources(weights, which)
    kept: OrderedDict[str, dict[str, Any]] = OrderedDict()
    for path, entry in versions.items():
        origin = next((source for source in moved if below(path, source)), "")
        target = moved[origin] + path[len(origin) :] if origin else path
        stale = not origin and any(below(path, replaced) for replaced in moved.values())
        if not stale and any(below(name, target) for name in names.values()):
            kept[target] = {key: value for key, value in entry.items() if key != "jepa_pretraining"}
    return kept


def group_of(name: str) -> str:
    """The line of the report that a tensor belongs to."""
    parts = name.split(".")
    return ".".join(parts[: {"sem_seg_head": 3, "jepa": 2}.get(parts[0], 1)])


def export(checkpoint: Mapping[str, Any], options: Options, source: str) -> tuple[dict[str, Any], Report]:
    """The content of the export, and what was kept and dropped.

    Raises CheckpointError when the checkpoint is another kind or does not say what is needed.
    """
    weights = state_dict_of(checkpoint)
    check_is_pretraining(checkpoint, weights, source)
    info = pretraining_info(checkpoint, weights)
    names = key_map(weights, info, options)
    if options.keep_queries:
        check_queries(info, names.values(), source)
    model: OrderedDict[str, Tensor] = OrderedDict((new, weights[old]) for old, new in names.items())
    versions = export_versions(weights, names, options.which)
    if LEVEL_EMBED in model:
        # the whole table is written, for code that loads it strictly; ours takes these rows only
        versions[PREDICTOR]["trained_level_rows"] = trained_rows(info, weights, options.level_rows)
    model._metadata = versions  # type: ignore[attr-defined]
    if not model:
        raise CheckpointError("nothing is left to export: name fewer parts in --drop")
    report = Report()
    for name, tensor in weights.items():
        groups = report.kept if name in names else report.dropped
        groups.setdefault(group_of(names.get(name, name)), []).append(tensor)
    whole = [p for p in ("backbone", PIXEL_DECODER) if any(below(name, p) for name in model)]
    if not info.get("denoising", True):
        whole = [part for part in whole if part != PIXEL_DECODER]
    manifest = {
        "format": FORMAT,
        "which": options.which,
        "tensors": len(model),
        "whole": whole,
        "source_step": int(weights["step"]) if "step" in weights else None,
    }
    return {"model": model, "jepa_export": manifest}, report


def check_queries(info: Mapping[str, Any], names: Iterable[str], source: str) -> None:
    """Raise CheckpointError when there are no trained queries to keep."""
    present = any(below(name, f"{PREDICTOR}.{part}") for name in names for part in QUERIES)
    if not present or info.get("readout") in SPATIAL_READOUTS:
        raise CheckpointError(f"{source} holds no trained queries: leave --keep-queries away")


def expected_missing(name: str, exported: Iterable[str], whole: Sequence[str]) -> bool:
    """Whether a fine-tuning model may start with this tensor as initialised."""
    heads = ("class_embed", "mask_embed", *QUERIES)
    if below(name, "criterion") or any(below(name, f"{PREDICTOR}.{part}") for part in heads):
        return True
    for part in ("backbone", PIXEL_DECODER):
        if below(name, part):
            return part not in whole
    part = ".".join(name.split(".")[:3])
    return not any(below(key, part) for key in exported)  # what only this kind of fine-tuning has


def prove(path: Path, model: nn.Module) -> str:
    """Load a written export into a fine-tuning model and compare; returns one line with the result.

    Raises CheckpointError when a tensor finds no place, differs after the load, or is missing without reason.
    """
    content = read_checkpoint(path)
    weights, manifest = state_dict_of(content), content["jepa_export"]
    counters = drop_batch_counters(weights, model)
    report = load_into(model, weights, source=str(path))
    if report.unexpected or len(report.loaded) != manifest["tensors"] - counters:
        raise CheckpointError(
            f"the fine-tuning model took {len(report.loaded)} of {manifest['tensors']} tensors (no place for "
            f"{report.unexpected[:2]}): give a config with the pre-training run's backbone and decoder sizes"
        )
    lacking = [name for name in report.missing if not expected_missing(name, weights, manifest["whole"])]
    if lacking:
        raise CheckpointError(
            f"the fine-tuning model has {len(lacking)} tensors that the export lacks, for instance "
            f"{lacking[0]}: give a config with the pre-training run's backbone and decoder sizes"
        )
    loaded = model.state_dict()
    rows = weights._metadata.get(PREDICTOR, {}).get("trained_level_rows")  # type: ignore[attr-defined]
    for name, tensor in weights.items():
        pick: Any = rows if name == LEVEL_EMBED else slice(None) if tensor.dim() else ()
        if not torch.equal(loaded[name][pick].cpu(), tensor[pick].to(loaded[name].dtype)):
            raise CheckpointError(f"{name} differs after the load: the model changes what it loads")
    return f"proof: {len(report.loaded)} tensors loaded and equal, {len(report.missing)} start as initialised"


def build_finetuning_model(config_file: str, opts: Sequence[str]) -> nn.Module:
    """The model of a fine-tuning config, on the CPU, without weights."""
    from detectron2.modeling import build_model

    import jepa_plugins.d2  # noqa: F401
    from jepa_plugins.d2.config import get_config

    return build_model(get_config(config_file, [*opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))


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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="what pre-training has written")
    parser.add_argument("out", type=Path, help="the Mask2Former checkpoint, .pth or .safetensors")
    parser.add_argument("--which", choices=("online", "ema"), default="online", help="which copy to export")
    parser.add_argument("--drop", choices=DROPPABLE, action="append", default=[], help="leave a part out")
    parser.add_argument("--keep-queries", action="store_true", help="for a read-out that trains them")
    parser.add_argument(
        "--level-rows",
        type=int,
        nargs="+",
        help="trained rows of level_embed, if the checkpoint does not say",
    )
    parser.add_argument("--trust", type=Path, action="append", default=[], help="a file that may run code")
    parser.add_argument("--config-file", help="fine-tuning config to prove the export with")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="its overrides: KEY VALUE ...")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; the exit code is 1 after an error, which is one sentence."""
    args = parse_arguments(arguments)
    options = Options(args.which, tuple(args.drop), args.keep_queries, args.level_rows)
    build = (lambda: build_finetuning_model(args.config_file, args.opts)) if args.config_file else None
    try:
        content, report = export(
            read_checkpoint(args.checkpoint, trust=args.trust), options, str(args.checkpoint)
        )
        print(report)
        print(write_proven(content, args.out, build))
    except (CheckpointError, FileNotFoundError, KeyError) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}: {content['jepa_export']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
