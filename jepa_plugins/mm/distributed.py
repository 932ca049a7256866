"""Several processes, with or without GPUs."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import nn


@MODEL_WRAPPERS.register_module()
class PretrainDistributed(MMDistributedDataParallel):
    """mmengine's wrapper, also for a model on the CPU."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        on_cpu = next(module.parameters()).device.type == "cpu"
        super().__init__(
            module,
            device_ids=None if on_cpu else device_ids,
            broadcast_buffers=kwargs.pop("broadcast_buffers", False),
            **kwargs,
        )


def start_processes(cfg: Config) -> None:
    """Join a launcher's processes where mmengine's own way needs GPUs; with GPUs mmengine does it."""
    if cfg.get("launcher", "none") != "pytorch" or torch.cuda.is_available() or dist.is_initialized():
        return
    if "RANK" not in os.environ:
        raise ValueError("--launcher pytorch is for processes that torchrun starts: start it with torchrun")
    dist.init_process_group("gloo")
