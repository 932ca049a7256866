"""Values of mask logits and of stored masks at fractional points.

The mask losses of Mask2Former look at a few thousand points instead of whole masks (Mask2Former, section 3.3;
PointRend, section 3). Points are pairs (x, y) in [0, 1], (0, 0) being the top left corner of the image and
(1, 1) its bottom right corner. Values are bilinear between pixel centres; outside the map they fade to zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Sample floating maps [N,C,H,W] at points [N,P,2] (or [1,P,2], shared by all N): float32 [N,C,P].

    Differentiable in `maps`; computed in float32 under autocast too.
    """
    with torch.autocast(maps.device.type, enabled=False):
        grid = (2 * points.float() - 1)[:, None].expand(maps.shape[0], -1, -1, -1)
        return F.grid_sample(maps.float(), grid, padding_mode="zeros", align_corners=False)[:, :, 0]


def sample_masks(masks: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """Sample stored masks without turning them into floating maps: float32 [M,P].

    masks: bool or uint8 (0 and 1) [N,H,W]. index: int64 [M], which mask each row reads.
    points: [M,P,2], or [1,P,2] shared by all rows. The result equals `point_sample(masks[index][:, None],
    points)`, but reads four bytes a point: no float copy of the masks, no copy of a mask that several rows
    read.
    """
    height, width = masks.shape[-2:]
    flat = masks.reshape(-1)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    with torch.autocast(masks.device.type, enabled=False):
        # The arithmetic of grid_sample, rounding included, so that both agree at the border of a pixel.
        size = points.new_tensor([width, height], dtype=torch.float32)
        position = ((2 * points.float() - 1 + 1) * size - 1) / 2
        corner = position.floor()
        high = position - corner
        corner = corner.long()
        base = index[:, None] * (height * width)
        result = torch.zeros(len(index), points.shape[1], device=masks.device)
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            weight_x = high[..., 0] if dx else 1 - high[..., 0]
            weight_y = high[..., 1] if dy else 1 - high[..., 1]
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            weight = (weight_x * weight_y).mul_(inside)
            where = base + (y.clamp_(0, height - 1) * width + x.clamp_(0, width - 1))
            result += flat.index_select(0, where.reshape(-1)).view(where.shape) * weight
    return result


def select_uncertain_points(logits: Tensor, candidates: Tensor, uniform: Tensor, count: int) -> Tensor:
    """Points for the mask loss: the `count` least certain candidates and all uniform ones.

    logits: [N,H,W]. candidates: [N,K,2], K >= count. uniform: [N,R,2]. Returns [N,count+R,2], without
    gradient. A point is uncertain when its logit is near zero (PointRend, section 3.1).
    """
    with torch.no_grad():
        certainty = point_sample(logits[:, None], candidates)[:, 0].abs()
        chosen = certainty.topk(count, dim=1, largest=False, sorted=False).indices
        return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), uniform], dim=1)
