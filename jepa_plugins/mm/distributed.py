"""Several processes, with or without GPUs."""

from __future__ import annotations

from logging import WARNING
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from torch import nn

from jepa_plugins.core.launch import detect, join

LAUNCHERS = ("auto", "none", "pytorch", "slurm", "mpi")
STARTED_BY = {"pytorch": "torchrun", "slurm": "srun"}


@MODEL_WRAPPERS.register_module()
class PretrainDistributed(MMDistributedDataParallel):
    """mmengine's wrapper, also for a model on the CPU."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        on_cpu = next(module.parameters()).device.type == "cpu"
        if on_cpu and any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
            print_log(
                "batch norms are synchronised on GPUs alone: here each process has its own",
                "current",
                WARNING,
            )
            module = revert_sync_batchnorm(module)
        super().__init__(
            module,
            device_ids=None if on_cpu else device_ids,
            broadcast_buffers=kwargs.pop("broadcast_buffers", False),
            **kwargs,
        )


def start_processes(cfg: Config) -> None:
    """Join a launcher's processes, with or without GPUs; `cfg.launcher` says afterwards which launcher it was.

    "auto" takes the one that started this process: torchrun or srun, or none.

    Raises:
        ValueError: the named launcher has not started this process, or its variables are incomplete.
    """
    wanted = cfg.get("launcher", "none")
    if wanted in ("none", "mpi") or dist.is_initialized():
        return  # mmengine itself does the latter
    processes = detect()
    found = "none" if processes is None else "slurm" if processes.launcher == "slurm" else "pytorch"
    if wanted != "auto" and wanted != found:
        starter = STARTED_BY[wanted]
        raise ValueError(
            f"--launcher {wanted} is for processes that {starter} starts: start it with {starter}, or leave "
            "--launcher out"
        )
    if processes is None or (wanted == "auto" and processes.world == 1):
        cfg.launcher = "none"
        return
    cfg.launcher = found
    options = cfg.get("env_cfg", {}).get("dist_cfg", {})
    join(processes, backend=options.get("backend", "nccl"), timeout=options.get("timeout"))
    if not torch.cuda.is_available() and cfg.get("model_wrapper_cfg") is None:
        cfg.model_wrapper_cfg = {"type": "PretrainDistributed"}


def leave_processes() -> None:
    """The reverse, at the end of a run."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
