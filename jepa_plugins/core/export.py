"""From a Mask-JEPA pre-training checkpoint to a Mask2Former checkpoint.

Kept under Mask2Former's names: the backbone, the pixel decoder, and the parts of the transformer decoder that
pre-training trained. Left out: what only pre-training uses, the target copies, and untrained heads and queries.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from jepa_plugins.core.checkpoints import CheckpointError, below, describe, state_dict_of
from jepa_plugins.core.key_maps import FAMILY_QUERIES
from jepa_plugins.core.settings import PREDICTOR_PARTS, QUERY_TABLES

FORMAT = 1
PIXEL_DECODER = "sem_seg_head.pixel_decoder"
PREDICTOR = "sem_seg_head.predictor"
LEVEL_EMBED = f"{PREDICTOR}.level_embed.weight"
# Parts of the pixel decoder that lead to the stride-8 map; only denoising trains the rest.
ENCODER_PARTS = ("input_proj", "transformer")
FPN_PARTS = ("adapter_", "layer_")


@dataclass(frozen=True)
class Options:
    """What to export.

    which: the "online" copy of the pixel decoder (and of a backbone that trained), or its "ema".
    drop: parts to leave out, of "backbone" and "predictor". keep_queries: the query tables too, of a read-out
    that trains them, as far as `family` ("mask2former", "mpformer" or "oneformer") has them. level_rows: the
    trained rows of `level_embed`, for a checkpoint that does not say.
    """

    which: str = "online"
    drop: Sequence[str] = ()
    keep_queries: bool = False
    level_rows: Sequence[int] | None = None
    family: str = "mask2former"


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


def is_pretraining(weights: Iterable[str]) -> bool:
    """Whether the names are those of a Mask-JEPA pre-training checkpoint."""
    return any(below(name, part) for name in weights for part in ("jepa", "target_pixel_decoder"))


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


def trained_pixel_parts(info: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of the pixel decoder's trained tensors begin; "" begins every name."""
    if not info.get("denoising", True):
        return ENCODER_PARTS
    settings = json.loads(info.get("settings", "{}"))
    return (*ENCODER_PARTS, *FPN_PARTS) if settings.get("denoise_feature") == "stride4" else ("",)


def untrained_predictor_parts(info: Mapping[str, Any]) -> list[str]:
    """Parts of the transformer decoder that a run with L_recon read around, such as its last norm."""
    trained = info.get("trained_predictor_parts", PREDICTOR_PARTS)
    return [part for part in PREDICTOR_PARTS if part not in trained]


def wanted_predictor_parts(info: Mapping[str, Any], options: Options) -> tuple[str, ...]:
    """Names of the transformer decoder's parts to keep."""
    if "predictor" in options.drop or not info.get("reconstruction", True):
        return ()
    untrained = untrained_predictor_parts(info)
    parts = tuple(part for part in PREDICTOR_PARTS if part not in untrained)
    return parts + (FAMILY_QUERIES[options.family] if options.keep_queries else ())


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
            if target != PIXEL_DECODER or part.startswith(trained_pixel_parts(info)):
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


def check_queries(
    info: Mapping[str, Any], weights: Mapping[str, Tensor], options: Options, source: str
) -> None:
    """Raise CheckpointError when there are no trained queries to keep."""
    tables = FAMILY_QUERIES[options.family]
    if not tables:
        raise CheckpointError(
            f"the queries of {options.family} are others than those that pre-training trains: leave "
            "--keep-queries away"
        )
    present = all(f"{PREDICTOR}.{table}.weight" in weights for table in tables)
    # a query of its own for the cells is what every other read-out has
    readout = info.get("readout", "spatial_queries" if "jepa.query" in weights else "query_mix")
    if not present or readout != "query_mix" or not info.get("reconstruction", True):
        raise CheckpointError(
            f"{source} holds no trained queries, which the read-out query_mix alone trains: leave "
            "--keep-queries away"
        )


def export(checkpoint: Mapping[str, Any], options: Options, source: str) -> tuple[dict[str, Any], Report]:
    """The content of the export, and what was kept and dropped.

    Raises CheckpointError when the checkpoint is another kind or does not say what is needed.
    """
    weights = state_dict_of(checkpoint)
    check_is_pretraining(checkpoint, weights, source)
    info = pretraining_info(checkpoint, weights)
    names = key_map(weights, info, options)
    if options.keep_queries:
        check_queries(info, weights, options, source)
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
    if trained_pixel_parts(info) != ("",):
        whole = [part for part in whole if part != PIXEL_DECODER]
    manifest = {
        "format": FORMAT,
        "which": options.which,
        "tensors": len(model),
        "whole": whole,
        "untrained": untrained_predictor_parts(info) if LEVEL_EMBED in model else [],
        "source_step": int(weights["step"]) if "step" in weights else None,
    }
    return {"model": model, "jepa_export": manifest}, report


def expected_missing(name: str, exported: Iterable[str], manifest: Mapping[str, Any]) -> bool:
    """Whether a fine-tuning model may start with this tensor as initialised."""
    heads = ("class_embed", "mask_embed", *QUERY_TABLES, *manifest["untrained"])
    if below(name, "criterion") or any(below(name, f"{PREDICTOR}.{part}") for part in heads):
        return True
    for part in ("backbone", PIXEL_DECODER):
        if below(name, part):
            return part not in manifest["whole"]
    part = ".".join(name.split(".")[:3])
    return not any(below(key, part) for key in exported)  # what only this kind of fine-tuning has
