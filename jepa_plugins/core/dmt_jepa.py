"""DMT-JEPA: I-JEPA whose targets gather semantic neighbours (DMT-JEPA, section 3), in plain PyTorch.

With the neighbours and both heads switched off it is I-JEPA exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_plugins.core.aggregation import (
    ATTENTIONS,
    CONTEXTS,
    LAT_TYPES,
    AggregationHead,
    pooled_context,
    pooled_targets,
)
from jepa_plugins.core.derived import Derived
from jepa_plugins.core.ema import ema_update, momentum_at, target_copy
from jepa_plugins.core.multiblock import Masks
from jepa_plugins.core.neighbours import (
    Neighbourhood,
    Neighbours,
    choose_neighbours,
    shared_with,
)
from jepa_plugins.core.step import StepOutput, channel_moments, variance_of
from jepa_plugins.core.vit import Predictor, VisionTransformer, pick

LOSSES = ("mse", "smooth_l1")


@dataclass(frozen=True)
class DMTJEPASettings:
    """The method's options; the defaults are the paper's.

    Args:
        neighbourhood: of Masked Semantic Neighboring; None turns it off, and aggregation then reads all patches
            of the image.
        lat: aggregation by "learned" heads or "parameter_free". depth: blocks of a learned head.
        target: what the target branch aggregates with: "cross" attention, "self" attention, "average", "max", or
            "none" (the patches themselves). residual: add the image's mean; None follows `lat`.
        context: where the context branch's aggregate goes: added to every token ("broadcast"), one more "token",
            or nowhere ("none"). context_attention: how it is made: "cross", "self", "average" or "max".
        loss: squared error ("mse", eq. 5) or "smooth_l1" (as released), mean over all elements.

    Raises:
        ValueError: one sentence for a value, or a combination, that makes no sense.
    """

    neighbourhood: Neighbourhood | None = field(default_factory=Neighbourhood)
    lat: str = "learned"
    depth: int = 2
    target: str = "cross"
    residual: bool | None = None
    context: str = "broadcast"
    context_attention: str = "cross"
    loss: str = "mse"

    def __post_init__(self) -> None:
        choices = {
            "lat": LAT_TYPES,
            "target": ATTENTIONS,
            "context": CONTEXTS,
            "context_attention": ATTENTIONS[:-1],
            "loss": LOSSES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {getattr(self, name)!r}")
        trained_target = self.lat == "learned" and self.target in ("cross", "self")
        problems = [
            (
                self.residual not in (None, True, False),
                f"residual is True, False or None, which follows the kind of aggregation, got {self.residual!r}",
            ),
            (
                self.neighbourhood is not None and self.target == "none",
                "neighbours are chosen for targets that aggregate nothing: turn them off, or choose a target",
            ),
            (self.depth < 1, f"a learned head has at least one block, got depth {self.depth}"),
            (
                self.lat == "parameter_free" and "self" in (self.target, self._context_kind()),
                "self-attention without parameters is not defined: use lat learned",
            ),
            (
                trained_target and not self.has_head,
                "the target head is the moving average of the context head, which these settings do not have: "
                "use a context with cross or self attention, or lat parameter_free",
            ),
            (
                self.target == "self"
                and self.neighbourhood is not None
                and self.neighbourhood.border == "mask",
                "self-attention over neighbours needs as many at every patch: use the border shift or wrap",
            ),
            (
                self.context == "token" and self.context_attention == "self",
                "context self-attention has no aggregate to make a token of: use the context broadcast",
            ),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise ValueError(sentence)

    def _context_kind(self) -> str:
        return "none" if self.context == "none" else self.context_attention

    @property
    def has_head(self) -> bool:
        """Whether a context head trains."""
        return self.lat == "learned" and self._context_kind() in ("cross", "self")

    @property
    def target_residual(self) -> bool:
        """Whether the image's mean is added to the targets."""
        return self.lat == "learned" if self.residual is None else self.residual


IJEPA = DMTJEPASettings(neighbourhood=None, target="none", context="none", loss="smooth_l1")


class DMTJEPAModel(nn.Module):
    """Context encoder, target encoder, predictor, and the two aggregation heads.

    Args:
        encoder: without class token; its copy is the target encoder. predictor: see `Predictor`.
        settings: the method's options.
        ema: momentum at the first and last step; total_steps: optimiser steps of the whole run.
    """

    step: Tensor
    ema_pending: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        settings: DMTJEPASettings,
        *,
        ema: tuple[float, float] = (0.996, 1.0),
        total_steps: int = 1,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.ema, self.total_steps = ema, total_steps
        self.encoder, self.predictor = encoder, predictor
        self.context_head = (
            AggregationHead(encoder.width, encoder.heads, settings.depth) if settings.has_head else None
        )
        target = target_copy(encoder)
        target.checkpointing = False  # no gradient, nothing to recompute
        self.target_encoder: Any = target
        self.target_head: Any = None if self.context_head is None else target_copy(self.context_head)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ema_pending", torch.zeros((), dtype=torch.bool))
        self._steps_done: Derived[int] = Derived()
        self._by_position: Derived[Neighbours] = Derived()

    @property
    def steps_done(self) -> int:
        """The number in `step`, which the device is asked for once and not at every step."""
        return self._counted()

    @torch.compiler.disable  # a number that changes at every step must not become part of a graph
    def _counted(self) -> int:
        return self._steps_done.get(self.step, lambda: int(self.step))

    def train(self, mode: bool = True) -> DMTJEPAModel:
        """As usual, but the targets stay in eval mode."""
        super().train(mode)
        self.target_encoder.eval()
        if self.target_head is not None:
            self.target_head.eval()
        return self

    def ema_momentum(self) -> float:
        """Of the next update of the targets."""
        return momentum_at(self.steps_done, self.total_steps, *self.ema)

    def update_target(self) -> float:
        """Move the targets once, after an optimiser step, and count the step; returns the momentum used."""
        done, momentum = self.steps_done, self.ema_momentum()
        ema_update(self.target_encoder, self.encoder, momentum)
        if self.target_head is not None:
            assert self.context_head is not None
            ema_update(self.target_head, self.context_head, momentum)
        self.step += 1
        self._steps_done.put(self.step, done + 1)
        self.ema_pending.fill_(False)
        return momentum

    @torch.no_grad()
    def targets(self, images: Tensor) -> tuple[Tensor, Neighbours | None]:
        """Target features of all patches [B, N, D], float32, and the neighbours that they gathered."""
        grid = self.encoder.grid_of(images.shape[-2], images.shape[-1])
        features = self.target_encoder(images)
        patches = F.layer_norm(features.float(), features.shape[-1:])
        return self.aggregate(patches, grid)

    def aggregate(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Neighbours | None]:
        """Normalised patches [B, N, D] -> aggregated targets [B, N, D] and the neighbours (section 3.2, eq. 4)."""
        settings = self.settings
        if settings.target == "none":
            return patches, None
        where = settings.neighbourhood
        chosen = None if where is None else choose_neighbours(patches, grid, where)
        if settings.lat == "learned" and settings.target in ("cross", "self"):
            assert self.target_head is not None
            out = self.target_head.targets(patches, chosen, settings.target, settings.target_residual)
        else:
            out = pooled_targets(patches, chosen, settings.target, settings.target_residual)
        return out.float(), chosen

    def context_tokens(self, tokens: Tensor) -> Tensor:
        """Context features [B, n, D] with their aggregate (section 3.3)."""
        settings = self.settings
        if settings.context == "none":
            return tokens
        if self.context_head is not None:
            return self.context_head.context(tokens, settings.context_attention, settings.context)
        return pooled_context(tokens, settings.context_attention, settings.context)

    def predict(self, images: Tensor, masks: Masks) -> Tensor:
        """Predictions of the target patches: [blocks * B, K, D], block by block."""
        grid = self.encoder.grid_of(images.shape[-2], images.shape[-1])
        context = self.context_tokens(self.encoder(images, masks.context))
        return self.predictor(context, masks.context, masks.targets, grid)

    def forward(self, images: Tensor, masks: Masks) -> StepOutput:
        """One step: loss and metrics of a batch; moves nothing.

        Args:
            images: [B, c, H, W], normalised; masks: on the same device.
        """
        batch, blocks, size = masks.targets.shape
        with torch.no_grad():
            every, chosen = self.targets(images)
            wanted = masks.targets.transpose(0, 1).reshape(blocks * batch, size)
            aim = pick(every.repeat(blocks, 1, 1), wanted)
        predicted = self.predict(images, masks).float()
        loss = F.mse_loss(predicted, aim) if self.settings.loss == "mse" else F.smooth_l1_loss(predicted, aim)
        with torch.no_grad():
            moments = channel_moments(every.flatten(0, 1))
            variance = variance_of(moments)
            error = F.mse_loss(predicted, aim)
            metrics = {
                "target_variance": variance,
                "explained_variance": 1 - error / variance,
                "context_patches": torch.tensor(float(masks.context.shape[1])),
            }
            if chosen is not None:
                metrics["neighbours_by_position"] = self.by_position(chosen, images)
        maps = {
            "target": every,
            "errors": (predicted.detach() - aim).square(),
            "moments": moments,
            "error": error,
        }
        return StepOutput({"loss": loss}, metrics, maps)

    def by_position(self, chosen: Neighbours, images: Tensor) -> Tensor:
        """Share of the chosen neighbours that the table of positions alone would have chosen."""
        where, encoder = self.settings.neighbourhood, self.encoder
        assert where is not None
        grid = encoder.grid_of(images.shape[-2], images.shape[-1])
        reference = self._by_position.get(
            encoder.pos_embed, lambda: choose_neighbours(encoder.positions(grid), grid, where), grid
        )
        return shared_with(chosen, reference)
