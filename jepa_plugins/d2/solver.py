"""Optimiser and schedule: AdamW in parameter groups, full-model clipping, poly decay; a ViT's layer decay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.projects.deeplab import build_lr_scheduler
from torch import Tensor, nn

from jepa_plugins.core.mask_jepa import MaskJEPAHead
from jepa_plugins.core.optim import ClippedAdamW, ClippedSGD

__all__ = ["announce_steps", "build_lr_scheduler", "build_optimizer", "group_parameters", "parameter_groups"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(module name, module, parameter name, parameter), each parameter once."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module_name, module, name, parameter


_BLOCK = re.compile(r"backbone\.(?:net\.)?blocks\.(\d+)\.")


def vit_depth(names: Iterable[str]) -> int:
    """Blocks of the plain ViT in a model's backbone, by its parameters' names; 0 without one."""
    return max((int(found[1]) + 1 for found in map(_BLOCK.match, names) if found), default=0)


def layer_decay_rate(name: str, *, decay: float, depth: int) -> float:
    """Factor of a parameter's learning rate (ViTDet, section A): `decay` for each layer between it and the heads.

    Args:
        name: of the parameter. decay: in (0, 1]. depth: blocks of the ViT; its patches and positions are the layer
            below block 0, pyramid and heads the one above the last.
    """
    layer = depth + 1
    if name.startswith("backbone."):
        if found := _BLOCK.match(name):
            layer = int(found[1]) + 1
        elif ".pos_embed" in name or ".patch_embed" in name:
            layer = 0
    return decay ** (depth + 1 - layer)


def group_parameters(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float = 0.0,
    weight_decay_embed: float = 0.0,
    backbone_multiplier: float = 1.0,
    layer_decay: float = 1.0,
) -> list[dict]:
    """Groups of equal learning rate and weight decay, as the published Mask2Former sets them.

    Args:
        model: only its parameters that take a gradient are grouped.
        base_lr: learning rate; the backbone's is `base_lr * backbone_multiplier`.
        weight_decay: of weights; norms take `weight_decay_norm`; embeddings, and MaskJEPA's mask token and query,
            `weight_decay_embed`; position tables none.
        layer_decay: see `layer_decay_rate`; 1 for none.

    Raises:
        ValueError: a `layer_decay` for a backbone that is no plain ViT, or outside of (0, 1].
    """
    depth = vit_depth(name for name, _ in model.named_parameters())
    if not 0 < layer_decay <= 1 or (layer_decay < 1 and not depth):
        raise ValueError(
            f"the layer decay (SOLVER.LAYER_DECAY) is {layer_decay}: it is a number above 0 and up to 1, and 1 for a "
            "backbone that is no plain ViT"
        )
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for module_name, module, name, parameter in _trainable(model):
        rate, decay = base_lr, weight_decay
        if "backbone" in module_name:
            rate = rate * backbone_multiplier
        if layer_decay < 1:
            rate = rate * layer_decay_rate(f"{module_name}.{name}", decay=layer_decay, depth=depth)
        if "relative_position_bias_table" in name or name.endswith("pos_embed"):
            decay = 0.0
        if isinstance(module, _NORMS):
            decay = weight_decay_norm
        if isinstance(module, (nn.Embedding, MaskJEPAHead)):
            decay = weight_decay_embed
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """`group_parameters` with the values of `SOLVER`."""
    solver = cfg.SOLVER
    return group_parameters(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_embed=solver.WEIGHT_DECAY_EMBED,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        layer_decay=solver.LAYER_DECAY,
    )


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over `parameter_groups`, clipping the norm of the whole model's gradient when configured.

    Raises:
        ValueError: for an optimiser or a clipping type that is not supported.
    """
    solver, clip = cfg.SOLVER, None
    if solver.CLIP_GRADIENTS.ENABLED:
        if solver.CLIP_GRADIENTS.CLIP_TYPE != "full_model":
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {solver.CLIP_GRADIENTS.CLIP_TYPE!r}; "
                "Mask2Former's is 'full_model'"
            )
        clip = solver.CLIP_GRADIENTS.CLIP_VALUE
    groups = parameter_groups(cfg, model)
    if solver.OPTIMIZER == "ADAMW":
        return ClippedAdamW(groups, lr=solver.BASE_LR, max_norm=clip)
    if solver.OPTIMIZER == "SGD":
        return ClippedSGD(
            groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, max_norm=clip
        )
    raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; give ADAMW or SGD")


def announce_steps(optimizer: ClippedAdamW | ClippedSGD, model: nn.Module) -> None:
    """Under a loop without our hooks: MaskJEPA's targets move after each step that moved the weights."""
    if hasattr(model, "update_target"):
        model.ema_by_hook = True
        optimizer.on_step = model.update_target
