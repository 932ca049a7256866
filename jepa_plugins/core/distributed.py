"""The few facts about other processes that the losses need."""

from __future__ import annotations

import torch
import torch.distributed as dist


def mean_count(count: int, device: torch.device) -> torch.Tensor:
    """Mean over processes of `count`, at least one: a float32 scalar.

    Dividing each process's sum by it makes the average over processes equal to the sum over all divided by
    all.
    """
    total = torch.tensor(float(count), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return total.clamp(min=1.0)
