"""Training losses of Mask2Former (section 3.3): classification, and mask losses at sampled points."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .matcher import HungarianMatcher, Matching, PackedTargets, pack_targets
from .point_sampling import point_sample, sample_masks, select_uncertain_points


def sigmoid_ce_loss(logits: Tensor, targets: Tensor, num_masks: Tensor | float) -> Tensor:
    """Binary cross-entropy, mean over points [N,P], summed over masks and divided by `num_masks`."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss.mean(1).sum() / num_masks


def dice_loss(logits: Tensor, targets: Tensor, num_masks: Tensor | float) -> Tensor:
    """1 - (2 x.t + 1) / (sum x + sum t + 1) over the points of [N,P], x = sigmoid; then as above."""
    x = logits.sigmoid()
    loss = 1 - (2 * (x * targets).sum(1) + 1) / (x.sum(1) + targets.sum(1) + 1)
    return loss.sum() / num_masks


class SetCriterion(nn.Module):
    """Losses of every decoder layer after matching queries and objects.

    num_classes: K; class K is "no object", of weight `eos_coef` in the classification loss.
    weight_dict: kept for the caller, who multiplies; the losses come out unweighted.
    losses: of "labels" (loss_ce) and "masks" (loss_mask, loss_dice).
    num_points: points a mask is compared at. The share `importance_sample_ratio` of them are the least
    certain of `num_points * oversample_ratio` random ones, the rest are random (Mask2Former, section 3.3;
    PointRend, section 3.1).

    The random points of a step are drawn once for each matched mask and serve all layers (the published
    code draws anew for each layer): every mask of every layer still meets points of the same distribution.
    All losses are float32, under autocast too. Raises ValueError for arguments out of range.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: Sequence[str],
        num_points: int,
        oversample_ratio: float,
        importance_sample_ratio: float,
    ) -> None:
        super().__init__()
        unknown = sorted(set(losses) - {"labels", "masks"})
        if unknown:
            raise ValueError(f"SetCriterion: unknown losses {unknown}; use 'labels' and 'masks'.")
        if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
            raise ValueError(
                f"SetCriterion: num_points={num_points} must be at least 1, oversample_ratio="
                f"{oversample_ratio} at least 1, importance_sample_ratio={importance_sample_ratio} in [0, 1]."
            )
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = list(losses)
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, eos_coef={self.eos_coef}, losses={self.losses}, "
            f"num_points={self.num_points}, oversample_ratio={self.oversample_ratio}, "
            f"importance_sample_ratio={self.importance_sample_ratio}, weight_dict={self.weight_dict}"
        )

    def forward(self, outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Unweighted loss_ce, loss_mask, loss_dice of the final layer; with suffix _i of auxiliary layer i.

        outputs: "pred_logits" [B,Q,K+1], "pred_masks" [B,Q,H,W] (logits) and optionally "aux_outputs", a
        list of the same. targets: one {"labels": int64 [T], "masks": bool or integer [T,H',W']} an image; T
        may be 0 and masks may differ in size (zero padding). Without any object the mask losses are 0 and
        have a graph. Raises FloatingPointError for costs that are not finite, ValueError for bad targets or
        numbers of classes.
        """
        layers = [outputs, *outputs.get("aux_outputs", [])]
        classes = outputs["pred_logits"].shape[-1] - 1
        if classes != self.num_classes:
            raise ValueError(
                f"SetCriterion: the outputs have {classes} classes, the criterion {self.num_classes}; "
                "set MODEL.SEM_SEG_HEAD.NUM_CLASSES to the same number for both."
            )
        packed = pack_targets(targets)
        matchings = self.matcher.match(layers, packed)
        num_masks = self._count_masks(packed)
        points = self._draw_points(matchings[0].query)
        losses: dict[str, Tensor] = {}
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            for i, (layer, matching) in enumerate(zip(layers, matchings, strict=True)):
                found: dict[str, Tensor] = {}
                if "labels" in self.losses:
                    found |= self.loss_labels(layer["pred_logits"], packed, matching)
                if "masks" in self.losses:
                    found |= self.loss_masks(layer["pred_masks"], packed, matching, points, num_masks)
                losses |= {name + (f"_{i - 1}" if i else ""): value for name, value in found.items()}
        return losses

    def loss_labels(
        self, pred_logits: Tensor, targets: PackedTargets, matching: Matching
    ) -> dict[str, Tensor]:
        """Cross-entropy of all queries (unmatched: "no object"), mean weighted by `empty_weight`."""
        classes = torch.full(pred_logits.shape[:2], self.num_classes, device=pred_logits.device)
        classes[matching.image, matching.query] = targets.labels[matching.target]
        logits = pred_logits.float().flatten(0, 1)
        total = F.cross_entropy(logits, classes.flatten(), self.empty_weight, reduction="sum")
        # With eos_coef 0 and no object the weights sum to zero: the loss is then 0, not 0 / 0.
        weight = self.empty_weight[classes].sum().clamp(min=torch.finfo(torch.float32).tiny)
        return {"loss_ce": total / weight}

    def loss_masks(
        self,
        pred_masks: Tensor,
        targets: PackedTargets,
        matching: Matching,
        points: tuple[Tensor, Tensor],
        num_masks: Tensor | float,
    ) -> dict[str, Tensor]:
        """Cross-entropy and dice of matched masks at sampled points (`points`: see `_draw_points`)."""
        masks = pred_masks[matching.image, matching.query]
        candidates, uniform = points
        chosen = select_uncertain_points(masks, candidates, uniform, self.num_points - uniform.shape[1])
        logits = point_sample(masks[:, None], chosen)[:, 0]
        with torch.no_grad():
            values = sample_masks(targets.masks, matching.target, chosen)
        return {
            "loss_mask": sigmoid_ce_loss(logits, values, num_masks),
            "loss_dice": dice_loss(logits, values, num_masks),
        }

    def _draw_points(self, matched: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates [N, int(num_points * oversample_ratio), 2] and uniform [N,R,2] of N matched masks."""
        candidates = int(self.num_points * self.oversample_ratio)
        uniform = self.num_points - int(self.importance_sample_ratio * self.num_points)
        count, device = len(matched), matched.device
        return torch.rand(count, candidates, 2, device=device), torch.rand(count, uniform, 2, device=device)

    @staticmethod
    def _count_masks(targets: PackedTargets) -> Tensor | float:
        """Objects of a process's batch, averaged over processes, at least 1."""
        count = float(len(targets.labels))
        if not (dist.is_available() and dist.is_initialized()):
            return max(count, 1.0)
        total = torch.tensor([count], device=targets.labels.device)
        dist.all_reduce(total)
        return (total[0] / dist.get_world_size()).clamp(min=1)
