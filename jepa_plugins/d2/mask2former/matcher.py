"""Bipartite matching of queries and objects (DETR, section 3.1; Mask2Former, section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils.events import get_event_storage
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .point_sampling import point_sample, sample_masks


@dataclass(frozen=True)
class PackedTargets:
    """The objects of all images of a batch, image after image.

    labels: int64 [S]. masks: bool [S,H,W], H and W the largest of the batch. counts: objects of each image.
    """

    labels: Tensor
    masks: Tensor
    counts: list[int]

    def slots(self) -> Tensor:
        """Row of each object in a table [B * Tmax], Tmax the largest count: int64 [S]."""
        counts = torch.tensor(self.counts)
        before = (max(self.counts) - counts).cumsum(0) - (max(self.counts) - counts)
        slots = torch.arange(sum(self.counts)) + before.repeat_interleave(counts)
        return slots.to(self.labels.device, non_blocking=True)


@dataclass(frozen=True)
class Matching:
    """Matched pairs of one layer, by image and inside an image by query: int64 [N] each.

    `target` counts through all objects of the batch (rows of `PackedTargets`).
    """

    image: Tensor
    query: Tensor
    target: Tensor


def pack_targets(targets: Sequence[dict[str, Tensor]]) -> PackedTargets:
    """Join the targets {"labels": int64 [T], "masks": bool or integer [T,H,W]} of a batch.

    Smaller masks are padded with zeros at the right and at the bottom. Raises ValueError when labels and
    masks of an image differ in number, TypeError for floating masks.
    """
    for i, target in enumerate(targets):
        labels, masks = target["labels"], target["masks"]
        if masks.dim() != 3 or len(masks) != len(labels):
            raise ValueError(
                f"targets[{i}]: 'masks' has shape {list(masks.shape)} for {len(labels)} labels; "
                "give one mask of shape [H,W] for each label."
            )
        if masks.is_floating_point():
            raise TypeError(
                f"targets[{i}]: 'masks' is {masks.dtype}; give bool or integer masks (0 is outside)."
            )
    height = max(t["masks"].shape[1] for t in targets)
    width = max(t["masks"].shape[2] for t in targets)
    padded = [
        F.pad(t["masks"].bool(), (0, width - t["masks"].shape[2], 0, height - t["masks"].shape[1]))
        for t in targets
    ]
    return PackedTargets(
        labels=torch.cat([t["labels"] for t in targets]).long(),
        masks=torch.cat(padded),
        counts=[len(t["labels"]) for t in targets],
    )


def pairwise_costs(
    pred_logits: Tensor, mask_values: Tensor, labels: Tensor, target_values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Costs of pairing each query with each object, unweighted: (class, mask, dice), float32 [B,Q,T] each.

    pred_logits: [B,Q,K+1]. mask_values: mask logits at P points [B,Q,P]. labels: int64 [B,T].
    target_values: masks at the same points, in [0, 1], [B,T,P].
    class: minus the probability of the object's class; not a number where the label is outside 0..K-1.
    mask: mean over the points of the binary cross-entropy. dice: 1 - (2 x.t + 1) / (sum x + sum t + 1), x =
    sigmoid.
    """
    num_classes = pred_logits.shape[-1] - 1
    with torch.autocast(pred_logits.device.type, enabled=False):
        probabilities = pred_logits.float().softmax(-1)
        index = labels.clamp(0, num_classes - 1)[:, None].expand(-1, probabilities.shape[1], -1)
        cost_class = -probabilities.gather(2, index)
        cost_class = cost_class.masked_fill(
            (labels != labels.clamp(0, num_classes - 1))[:, None], float("nan")
        )

        x, t = mask_values.float(), target_values.float().transpose(1, 2)
        # Cross-entropy of logit x and target t is softplus(x) - x t: only the last term pairs.
        # softplus(x) = max(x, 0) - log sigmoid(|x|), to float32 rounding; several times faster on CPUs.
        softplus = x.clamp(min=0) - x.abs().sigmoid_().log_()
        cost_mask = (softplus.sum(-1, keepdim=True) - x @ t) / x.shape[-1]
        x = x.sigmoid()
        cost_dice = 1 - (2 * (x @ t) + 1) / (x.sum(-1, keepdim=True) + t.sum(1, keepdim=True) + 1)
    return cost_class, cost_mask, cost_dice


class HungarianMatcher(nn.Module):
    """Pairs every object with one query so that the summed cost is smallest.

    cost = cost_class * class + cost_mask * mask + cost_dice * dice, see `pairwise_costs`.

    The mask costs look at `num_points` random points. One set of points serves all images and all layers of
    a step (the published code draws anew for each): every mask still meets uniform points, but the objects'
    masks are read once a step.
    """

    def __init__(
        self, cost_class: float = 1, cost_mask: float = 1, cost_dice: float = 1, num_points: int = 12544
    ) -> None:
        super().__init__()
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError("HungarianMatcher: all three costs are 0; give at least one a weight.")
        if num_points < 1:
            raise ValueError(f"HungarianMatcher: num_points is {num_points}; it must be at least 1.")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    def extra_repr(self) -> str:
        return (
            f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, cost_dice={self.cost_dice}, "
            f"num_points={self.num_points}"
        )

    def forward(
        self, outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Match one layer: for each image (queries, objects), int64 [min(Q,T)] each, on the CPU, by query.

        outputs: "pred_logits" [B,Q,K+1] and "pred_masks" [B,Q,H,W] (logits). targets: see `pack_targets`.
        Raises as `match` does.
        """
        (pairs,) = self._assign([outputs], pack_targets(targets))
        return [(torch.from_numpy(query), torch.from_numpy(target)) for query, target in pairs]

    def match(self, layers: Sequence[dict[str, Tensor]], targets: PackedTargets) -> list[Matching]:
        """Match every layer; the first is the final one, the others are auxiliary outputs 0, 1, ...

        Raises FloatingPointError when a cost is infinite or not a number, ValueError for a label outside
        the classes.
        """
        starts = np.cumsum([0, *targets.counts[:-1]])
        table = np.array(
            [
                [
                    np.concatenate([np.full(len(query), image) for image, (query, _) in enumerate(pairs)]),
                    np.concatenate([query for query, _ in pairs]),
                    np.concatenate(
                        [target + start for (_, target), start in zip(pairs, starts, strict=True)]
                    ),
                ]
                for pairs in self._assign(layers, targets)
            ],
            dtype=np.int64,
        )
        rows = torch.from_numpy(table).to(targets.labels.device, non_blocking=True)
        return [Matching(*row) for row in rows.unbind(0)]

    def _assign(
        self, layers: Sequence[dict[str, Tensor]], targets: PackedTargets
    ) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """(queries, objects) of each layer and image, objects counted inside their image."""
        batch = layers[0]["pred_logits"].shape[0]
        if batch != len(targets.counts):
            raise ValueError(
                f"HungarianMatcher: outputs of {batch} images but targets of {len(targets.counts)}."
            )
        costs = self.costs(layers, targets).cpu()
        if not costs.isfinite().all():
            _raise_not_finite(costs, targets, layers[0]["pred_logits"].shape[-1] - 1)
        return [
            [
                linear_sum_assignment(image[:, :count])
                for image, count in zip(layer, targets.counts, strict=True)
            ]
            for layer in costs.numpy()
        ]

    @torch.no_grad()
    def costs(self, layers: Sequence[dict[str, Tensor]], targets: PackedTargets) -> Tensor:
        """Weighted costs, float32 [L,B,Q,Tmax]; columns after an image's objects are padding."""
        batch, widest = len(targets.counts), max(targets.counts)
        device = targets.masks.device
        points = torch.rand(1, self.num_points, 2, device=device)
        slots = targets.slots()
        everything = torch.arange(len(targets.labels), device=device)
        sampled = sample_masks(targets.masks, everything, points)
        values = sampled.new_zeros(batch * widest, self.num_points).index_copy_(0, slots, sampled)
        labels = targets.labels.new_zeros(batch * widest).index_copy_(0, slots, targets.labels)
        values, labels = values.view(batch, widest, self.num_points), labels.view(batch, widest)

        def weighted(layer: dict[str, Tensor]) -> Tensor:
            mask_values = point_sample(layer["pred_masks"], points)
            parts = pairwise_costs(layer["pred_logits"], mask_values, labels, values)
            return self.cost_class * parts[0] + self.cost_mask * parts[1] + self.cost_dice * parts[2]

        return torch.stack([weighted(layer) for layer in layers])


def _raise_not_finite(costs: Tensor, targets: PackedTargets, num_classes: int) -> None:
    """Say whether a label or the outputs made costs [L,B,Q,T] infinite or not a number."""
    labels = targets.labels.cpu()
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"A target has label {int(wrong[0])}, but the model has classes 0 to {num_classes - 1}: "
            "set MODEL.SEM_SEG_HEAD.NUM_CLASSES to the number of classes, and drop objects to be ignored."
        )
    layer, image = (~costs.isfinite()).flatten(2).any(-1).nonzero()[0].tolist()
    name = "final" if layer == 0 else f"aux {layer - 1}"
    try:
        when = f"at iteration {get_event_storage().iter}"
    except AssertionError:  # detectron2 has no storage outside its training loop
        when = "outside training"
    raise FloatingPointError(
        f"The matching cost of layer '{name}' is NaN or infinite {when} (image {image} of the batch): "
        "training has diverged; lower SOLVER.BASE_LR, or set SOLVER.AMP.ENABLED to False."
    )
