"""Layer-wise learning rates for fine-tuning a plain ViT (BEiT, section 3; MAE, appendix A.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

KEYS = ("decay_rate", "num_layers", "backbone")
# tables of tokens, which never decay although they have more than one dimension
TOKENS = ("pos_embed", "cls_token")


def layer_of(name: str, layers: int) -> int:
    """Number of a backbone's parameter: 0 before the blocks, i + 1 in block i, layers + 1 after them."""
    first, _, rest = name.partition(".")
    if first in (*TOKENS, "patch_embed"):
        return 0
    if first == "blocks":
        return int(rest.split(".")[0]) + 1
    return layers + 1


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases, norms, tokens and tables of positions."""
    return parameter.dim() > 1 and not name.endswith(".bias") and name.split(".")[-1] not in TOKENS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ViTLayerDecayConstructor:
    """Optimiser whose learning rate falls by a factor from each block of the backbone to the one before it.

    A parameter of layer l (0 the patch embedding, i + 1 block i, n + 1 the final norm and everything outside of
    the backbone) learns with lr x decay_rate ** (n + 1 - l), n blocks. Biases, 1-D tensors, tokens and tables of
    positions do not decay. Every group keeps its factor as `lr_scale`.

    Args:
        paramwise_cfg: dict(decay_rate: factor; num_layers: n, by default the blocks that the backbone has;
            backbone: its name in the model).

    Raises:
        ValueError: no such backbone, or no blocks in it; an unknown or missing option.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        options = dict(paramwise_cfg or {})
        unknown = [key for key in options if key not in KEYS]
        if unknown or not 0 < options.get("decay_rate", 0) <= 1:
            raise ValueError(
                "ViTLayerDecayConstructor needs paramwise_cfg=dict(decay_rate=) above 0 and up to 1, and knows "
                f"{', '.join(KEYS)}; got {options} (what a base configuration has goes by dict(_delete_=True, "
                "decay_rate=...))"
            )
        self.rate, self.layers = options["decay_rate"], options.get("num_layers")
        self.backbone = options.get("backbone", "backbone")
        self.config = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.config.pop("optimizer"))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, "module", model)
        groups = self.groups(model)
        optimizer = OPTIMIZERS.build({**self.optimizer, "params": groups})
        self._tell(groups)
        return OPTIM_WRAPPERS.build(
            {"type": "OptimWrapper", **self.config}, default_args={"optimizer": optimizer}
        )

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups, the heads' first."""
        layers = self._layers(model)
        found: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter, layer in self._placed(model, layers):
            decayed = decays(name, parameter)
            scale = self.rate ** (layers + 1 - layer)
            empty = {"params": [], "param_names": [], "lr": self.optimizer["lr"] * scale, "lr_scale": scale}
            group = found.setdefault((layer, decayed), empty)
            if not decayed:
                group["weight_decay"] = 0.0
            group["params"].append(parameter)
            group["param_names"].append(name)
        return [found[key] for key in sorted(found, reverse=True)]

    def _layers(self, model: nn.Module) -> int:
        try:
            backbone = model.get_submodule(self.backbone)
        except AttributeError:
            backbone = None
        blocks = getattr(backbone, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            raise ValueError(
                f"ViTLayerDecayConstructor finds no '{self.backbone}.blocks' in the model: use the backbone JEPAViT, "
                "or mmsegmentation's LearningRateDecayOptimizerConstructor for its own backbones"
            )
        layers = self.layers or len(blocks)
        if layers < len(blocks):
            raise ValueError(
                f"paramwise_cfg.num_layers is {layers}, but the backbone has {len(blocks)} blocks"
            )
        return layers

    def _placed(self, model: nn.Module, layers: int) -> Iterator[tuple[str, nn.Parameter, int]]:
        """(name, parameter, layer) of everything that trains."""
        prefix = f"{self.backbone}."
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                inside = name.startswith(prefix)
                yield name, parameter, layer_of(name[len(prefix) :], layers) if inside else layers + 1

    def _tell(self, groups: list[dict[str, Any]]) -> None:
        rates = sorted({group["lr"] for group in groups})
        print_log(
            f"layer-wise learning rates: decay {self.rate:g}, {len(groups)} groups, from {rates[0]:.3g} to "
            f"{rates[-1]:.3g}",
            logger="current",
        )
