"""The processes that a launcher has started, found in its environment variables, and how they join.

Known are torchrun, Slurm's srun and submitit's executor on this machine. Nobody types a rank, an address or a port.
"""

from __future__ import annotations

import datetime
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SUBMITIT = (
    "SUBMITIT_LOCAL_GLOBALID",
    "SUBMITIT_LOCAL_NTASKS",
    "SUBMITIT_LOCAL_LOCALID",
    "SUBMITIT_LOCAL_JOB_ID",
)
FIRST_PORT, PORTS = 20000, 12007  # below the ports that Linux gives to outgoing connections
STEPS = 16  # of one job, that have ports of their own
TIMEOUT = 1800.0  # seconds: an evaluation may keep the others waiting for the first process
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        launcher: "torchrun", "slurm", "submitit" or "spawn" (of a tool's own).
        rank: 0 ... world - 1; local_rank: the same on this machine; node: number of this machine.
        address, port: where the first process listens.
    """

    launcher: str
    rank: int
    world: int
    local_rank: int
    node: int = 0
    address: str = LOOPBACK
    port: int = 0


def detect(environ: Mapping[str, str] | None = None) -> Processes | None:
    """The processes of the launcher that started this one; None where it was started plainly.

    torchrun's variables count before Slurm's, since srun may start torchrun. A batch script or a shell inside an
    allocation is no process of srun's.

    Args:
        environ: variables to look at; by default this process's.

    Raises:
        ValueError: the variables are incomplete or make no sense.
    """
    found = os.environ if environ is None else environ
    if "RANK" in found or "WORLD_SIZE" in found:
        return _of_torchrun(found)
    if found.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in found:
        return _of_submitit(found)
    if "SLURM_STEP_ID" in found:
        return _of_slurm(found)
    return None


def _required(environ: Mapping[str, str], names: tuple[str, ...], launcher: str, remedy: str) -> None:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        there = [name for name in names if environ.get(name)]
        raise ValueError(
            f"the environment is only half that of {launcher}: {', '.join(there) or 'some'} set, but not "
            f"{', '.join(missing)}: {remedy}"
        )


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"the environment variable {name} is no number: {environ[name]!r}") from None


def _checked(processes: Processes, names: str) -> Processes:
    if not 0 <= processes.rank < processes.world or processes.local_rank < 0:
        raise ValueError(
            f"the environment variables {names} make no sense: process {processes.rank} of {processes.world}, "
            f"{processes.local_rank} on its machine"
        )
    return processes


def _of_torchrun(environ: Mapping[str, str]) -> Processes:
    remedy = "start with torchrun, or unset RANK and WORLD_SIZE to run one process"
    _required(environ, TORCHRUN, "torchrun", remedy)
    rank, local_rank = _number(environ, "RANK"), _number(environ, "LOCAL_RANK")
    # By hand there may be no number of the machine; the first rank on it does as well.
    node = _number(environ, "GROUP_RANK") if environ.get("GROUP_RANK") else rank - local_rank
    found = Processes(
        "torchrun",
        rank,
        _number(environ, "WORLD_SIZE"),
        local_rank,
        node,
        environ["MASTER_ADDR"],
        _number(environ, "MASTER_PORT"),
    )
    return _checked(found, "RANK, WORLD_SIZE and LOCAL_RANK")


def _of_submitit(environ: Mapping[str, str]) -> Processes:
    _required(environ, SUBMITIT, "submitit", "submit with tools/submit.py")
    rank, world, local_rank, job = (_number(environ, name) for name in SUBMITIT)
    found = Processes("submitit", rank, world, local_rank, port=port_of(job))
    return _checked(found, ", ".join(SUBMITIT[:3]))


def _of_slurm(environ: Mapping[str, str]) -> Processes:
    """A step's own size and nodes count, where srun tells them: it may be smaller than the job."""
    tasks = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((name for name in names if environ.get(name)), "SLURM_JOB_NODELIST")
    needed = ("SLURM_PROCID", tasks, "SLURM_LOCALID", nodes, "SLURM_JOB_ID")
    _required(environ, needed, "srun", "start with srun, or unset SLURM_STEP_ID to run one process")
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    hosts = expand_hosts(environ[nodes])
    port = port_of(_number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID"))
    found = Processes(
        "slurm",
        rank,
        _number(environ, tasks),
        local_rank,
        _number(environ, "SLURM_NODEID") if environ.get("SLURM_NODEID") else rank - local_rank,
        # A machine alone need not be able to look up its own name.
        environ.get("MASTER_ADDR") or (hosts[0] if len(hosts) > 1 else LOOPBACK),
        _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else port,
    )
    return _checked(found, f"SLURM_PROCID, {tasks} and SLURM_LOCALID")


def port_of(job: int, step: int = 0) -> int:
    """A port, 20000 ... 32006, that differs for jobs of near numbers and for the first 16 steps of each."""
    return FIRST_PORT + (job * STEPS + step) % PORTS


def expand_hosts(nodes: str) -> list[str]:
    """Names of a Slurm list such as "a1,node[01-03,07],rack[1-2]n[3-4]", in its order.

    Raises:
        ValueError: the list cannot be read.
    """
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[\d,-]+\])+(?:,(?:[^\[\],\s]|\[[\d,-]+\])+)*", nodes):
        raise ValueError(f"Slurm's list of nodes cannot be read: {nodes!r}")
    return [host for part in re.split(r",(?![^\[]*\])", nodes) for host in _expand(part)]


def _expand(part: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", part)
    if match is None:
        return [part]
    before, after = part[: match.start()], _expand(part[match.end() :])
    numbers: list[str] = []
    for item in match[1].split(","):
        first, dash, last = item.partition("-")
        if not first or (dash and not last) or "-" in last:
            raise ValueError(f"Slurm's list of nodes cannot be read: {part!r}")
        numbers += [str(i).zfill(len(first)) for i in range(int(first), int(last or first) + 1)]
    return [f"{before}{number}{rest}" for number in numbers for rest in after]


def device_index(processes: Processes, count: int) -> int:
    """Number of the GPU of a process that sees `count` of them, at least one.

    Slurm can show each process its own GPU alone, which then is number 0.

    Raises:
        ValueError: more processes than GPUs.
    """
    if processes.local_rank < count:
        return processes.local_rank
    if count == 1 and processes.launcher == "slurm":
        return 0
    raise ValueError(
        f"process {processes.local_rank} of this machine has no GPU, since {count} are visible: start one process "
        "for each GPU"
    )


def join(
    processes: Processes,
    *,
    backend: str = "nccl",
    init_method: str | None = None,
    timeout: float | None = None,
) -> None:
    """Create the process group of all, and give each its GPU; libraries find the usual variables set.

    Args:
        backend: where there are GPUs; without one it is gloo.
        init_method: address as a URL; by default the address and port of `processes`.
        timeout: seconds that a process waits for the others; by default 1800.

    Raises:
        ValueError: more processes than GPUs.
    """
    if dist.is_initialized():
        return
    index = processes.local_rank
    if torch.cuda.is_available():
        index = device_index(processes, torch.cuda.device_count())
        torch.cuda.set_device(index)
    os.environ.update(
        RANK=str(processes.rank),
        WORLD_SIZE=str(processes.world),
        LOCAL_RANK=str(index),  # which libraries take for the number of the GPU
    )
    if init_method is None:
        os.environ.update(MASTER_ADDR=processes.address, MASTER_PORT=str(processes.port))
    dist.init_process_group(
        backend if torch.cuda.is_available() else "gloo",
        init_method=init_method,
        rank=processes.rank,
        world_size=processes.world,
        timeout=datetime.timedelta(seconds=timeout or TIMEOUT),
    )


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])
