"""Matching costs and losses one image and one layer at a time, in the plainest form.

The yardstick of the criterion's tests and of its benchmark. `draw(*shape)` gives random points in [0, 1).
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment


def sample(maps, points):
    """Maps [N,H,W] at points [N,P,2]: [N,P]."""
    return F.grid_sample(maps[:, None].float(), 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


def padded(targets):
    height = max(t["masks"].shape[1] for t in targets)
    width = max(t["masks"].shape[2] for t in targets)
    masks = [torch.zeros(len(t["masks"]), height, width) for t in targets]
    for new, target in zip(masks, targets, strict=True):
        new[:, : target["masks"].shape[1], : target["masks"].shape[2]] = target["masks"].float()
    return masks


def image_cost(logits, pred_masks, labels, masks, weights, num_points, draw):
    """Cost [Q,T] of one image: logits [Q,K+1], pred_masks [Q,h,w], labels [T], masks [T,H,W]."""
    points = draw(1, num_points, 2)
    x = sample(pred_masks, points.expand(len(pred_masks), -1, -1))
    t = sample(masks, points.expand(len(masks), -1, -1))
    positive = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
    negative = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
    cost_mask = (positive @ t.T + negative @ (1 - t).T) / num_points
    x = x.sigmoid()
    cost_dice = 1 - (2 * x @ t.T + 1) / (x.sum(1)[:, None] + t.sum(1)[None] + 1)
    return weights[0] * -logits.softmax(1)[:, labels] + weights[1] * cost_mask + weights[2] * cost_dice


def layer_costs(layer, targets, weights, num_points, draw):
    """Costs of one layer, one [Q,T] an image."""
    images = zip(layer["pred_logits"], layer["pred_masks"], targets, padded(targets), strict=True)
    with torch.no_grad():
        return [
            image_cost(logits, pred, target["labels"], masks, weights, num_points, draw)
            for logits, pred, target, masks in images
        ]


def assign(costs):
    return [linear_sum_assignment(cost) for cost in costs]


def layer_losses(layer, targets, pairs, eos, num_points, oversample, importance, draw):
    """(loss_ce, loss_mask, loss_dice) of one layer with given pairs of each image."""
    total, weight, chosen_masks, chosen_targets = 0.0, 0.0, [], []
    classes = layer["pred_logits"].shape[-1] - 1
    weights = torch.tensor([1.0] * classes + [eos])
    for i, (masks, (query, target)) in enumerate(zip(padded(targets), pairs, strict=True)):
        query, target = torch.as_tensor(query), torch.as_tensor(target)
        wanted = torch.full((layer["pred_logits"].shape[1],), classes)
        wanted[query] = targets[i]["labels"][target]
        log = layer["pred_logits"][i].log_softmax(1)
        total = total - (log[torch.arange(len(wanted)), wanted] * weights[wanted]).sum()
        weight = weight + weights[wanted].sum()
        chosen_masks.append(layer["pred_masks"][i][query])
        chosen_targets.append(masks[target])
    pred, truth = torch.cat(chosen_masks), torch.cat(chosen_targets)
    num_masks = max(sum(len(t["labels"]) for t in targets), 1)
    with torch.no_grad():
        candidates = draw(len(pred), int(num_points * oversample), 2)
        uncertain = int(importance * num_points)
        order = sample(pred, candidates).abs().topk(uncertain, dim=1, largest=False).indices
        points = (
            torch.stack([c[o] for c, o in zip(candidates, order, strict=True)])
            if len(pred)
            else candidates[:, :0]
        )
        points = torch.cat([points, draw(len(pred), num_points - uncertain, 2)], 1)
        t = sample(truth, points)
    x = sample(pred, points)
    loss_mask = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1).sum() / num_masks
    x = x.sigmoid()
    dice = 1 - (2 * (x * t).sum(1) + 1) / (x.sum(1) + t.sum(1) + 1)
    return total / weight, loss_mask, dice.sum() / num_masks
