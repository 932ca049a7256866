"""What a run is, in one block of its log: method, data, batch, parameters, precision and kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from torch import nn

from jepa_plugins.core.attention import EXPLICIT_UP_TO
from jepa_plugins.core.deformable_attention import OPERATOR_PACKAGE, MSDeformAttn, chosen_backend
from jepa_plugins.d2.mask_jepa import MaskJEPA

# Parts of a model by the first part of their parameters' names; the rest goes by its own first name.
PARTS = {
    "backbone": "backbone.",
    "pixel decoder": "sem_seg_head.pixel_decoder.",
    "transformer decoder": "sem_seg_head.predictor.",
    "pre-training only": "jepa.",
    "EMA copies": "target_",
}


def method_line(cfg: CfgNode, model: nn.Module) -> str:
    """The method and its main options."""
    if not hasattr(model, "sem_seg_head"):
        return f"{cfg.MODEL.META_ARCHITECTURE}, supervised"
    if not isinstance(model, MaskJEPA):
        outputs = [
            word
            for word, key in (
                ("semantic", "SEMANTIC_ON"),
                ("instance", "INSTANCE_ON"),
                ("panoptic", "PANOPTIC_ON"),
            )
            if cfg.MODEL.MASK_FORMER.TEST[key]
        ]
        return (
            f"{cfg.MODEL.META_ARCHITECTURE}, supervised, {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES} classes, "
            f"predicts {' + '.join(outputs) or 'nothing'}"
        )
    s = model.settings
    losses = []
    if s.recon_weight > 0:
        losses.append(
            f"{s.recon_weight:g} x reconstruction at stride {s.recon_stride} ({s.readout}, {s.mask_ratio:g} hidden "
            f"in tiles of {s.mask_patch}x{s.mask_patch} cells, M {s.self_attention_blocks})"
        )
    if s.denoise_weight > 0:
        losses.append(f"{s.denoise_weight:g} x denoising (predicts the {s.denoise_target})")
    return f"Mask-JEPA: {' + '.join(losses)}, noise of sigma {s.noise_sigma:g}"


def backbone_line(cfg: CfgNode, model: nn.Module) -> str:
    """The backbone's name, its weights and whether it trains."""
    name, weights = cfg.MODEL.BACKBONE.NAME, [cfg.MODEL.WEIGHTS]
    if name == "TimmBackbone":
        name, weights = f"timm {cfg.MODEL.TIMM.NAME}", [cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.WEIGHTS]
    trains = any(p.requires_grad for n, p in model.named_parameters() if n.startswith(PARTS["backbone"]))
    start = " and ".join(w for w in weights if w) or "random"
    return f"{name}, {'trains' if trains else 'frozen'}; initial weights: {start}"


def parameter_rows(model: nn.Module) -> list[tuple[str, int, int]]:
    """(part, parameters, of which trained), without parts that the model lacks; the last row is the total."""
    counts: dict[str, list[int]] = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = next((part for part, prefix in PARTS.items() if name.startswith(prefix)), name.split(".")[0])
        row = counts.setdefault(part, [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    rows = [(part, count, trained) for part, (count, trained) in counts.items() if count]
    return [*rows, ("total", sum(row[1] for row in rows), sum(row[2] for row in rows))]


def data_line(cfg: CfgNode, images: int | None) -> str:
    """Images, steps an epoch, epochs of the run."""
    steps, batch = cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH
    if not images:
        return f"{steps:,} steps of {batch} images; the number of images is not known"
    return (
        f"{images:,} images, {images / batch:,.1f} steps an epoch; {steps:,} steps are "
        f"{steps * batch / images:,.2f} epochs"
    )


def device_line(device: torch.device, processes: int) -> str:
    """Kind and number of devices."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    return f"{processes} x {device.type}" + (
        f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
    )


def deformable_line(model: nn.Module) -> str:
    """What runs the pixel decoder's deformable attention."""
    if not any(isinstance(module, MSDeformAttn) for module in model.modules()):
        return "none of this package's"
    return f"the operator of {OPERATOR_PACKAGE}" if chosen_backend() == "operator" else "PyTorch version"


def attention_line(device: torch.device, dtype: torch.dtype | None) -> str:
    """Which kernel our attention takes."""
    most = EXPLICIT_UP_TO.get((device.type, dtype or torch.float32), 0)
    if not most:
        return "torch's fused kernel"
    return f"explicit softmax up to {most:,} scores a head, above that torch's fused kernel"


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return [f"  {name.ljust(width)}  {text}" for name, text in rows]


def summary(
    cfg: CfgNode, model: nn.Module, *, images: int | None, dtype: torch.dtype | None, processes: int
) -> str:
    """The block, as aligned text of several lines.

    Args:
        images: of the training data, if that is known. dtype: of autocast, None without.
        processes: of the run.
    """
    device = next(model.parameters()).device
    parts, total = cfg.SOLVER.ACCUMULATION, cfg.SOLVER.IMS_PER_BATCH
    precision = "float32" if dtype is None else f"mixed, {str(dtype).removeprefix('torch.')}"
    counts = parameter_rows(model)
    digits = len(f"{counts[-1][1]:,}")
    rows = [
        ("method", method_line(cfg, model)),
        ("backbone", backbone_line(cfg, model)),
        ("data", data_line(cfg, images)),
        (
            "effective batch",
            f"{total} = {total // (processes * parts)} images x {processes} processes x {parts} accumulated",
        ),
        ("precision", precision),
        ("device", device_line(device, processes)),
        ("deformable attention", deformable_line(model)),
        ("attention", attention_line(device, dtype)),
        *(
            (f"parameters: {part}", f"{count:>{digits},}, of which {trained:>{digits},} trained")
            for part, count, trained in counts
        ),
    ]
    return "\n".join(["start-up summary", *_aligned(rows)])
