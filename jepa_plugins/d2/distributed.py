"""The processes of a detectron2 run: those of torchrun or srun, or the tool's own of --num-gpus."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.utils import comm

from jepa_plugins.core.cli import one_sentence
from jepa_plugins.core.launch import LOOPBACK, Processes, detect, free_port, join

Main = Callable[[Any], Any]
OWN = "--num-gpus, --num-machines, --machine-rank and --dist-url"


def run(main: Main, args: argparse.Namespace) -> None:
    """Run `main(args)` in each process of a launcher, or else in `args.num_gpus` processes on each machine.

    Raises:
        ValueError: both are asked for; what --num-gpus and its companions say makes no sense.
    """
    processes = one_sentence(find)(args)
    if processes is None:
        return own_processes(main, args)
    if processes.world == 1:
        return main(args)
    return in_group(main, args, processes)


def find(args: argparse.Namespace) -> Processes | None:
    """The launcher's processes; None where detectron2's options say how many there are."""
    processes, own = detect(), args.num_gpus * args.num_machines
    if processes is None or (processes.world == 1 and processes.launcher == "slurm"):
        check_own(args)
        return None
    if own > 1:
        raise ValueError(
            f"{processes.launcher} has started {processes.world} processes and --num-gpus {args.num_gpus} "
            f"--num-machines {args.num_machines} asks for {own} more: leave out {OWN}, or start without "
            f"{processes.launcher}"
        )
    return processes


def check_own(args: argparse.Namespace) -> None:
    """Raise ValueError unless the options fit each other and the machine."""
    if args.num_gpus < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} --machine-rank {args.machine_rank} "
            "make no sense: machines are numbered from 0, each with one process or more"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError(
            "--num-machines needs --dist-url tcp://HOST:PORT, of the machine with --machine-rank 0"
        )
    if args.dist_url != "auto" and not is_address(args.dist_url):
        raise ValueError(
            f"--dist-url {args.dist_url} is no address: give tcp://HOST:PORT, of the machine with --machine-rank 0"
        )
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise ValueError(f"--num-gpus {args.num_gpus}, but this machine has {torch.cuda.device_count()}")


def is_address(url: str) -> bool:
    """Whether processes can find each other by it: tcp://HOST:PORT, file:///PATH or env://."""
    try:
        parts = urlsplit(url)
        known = {"tcp": parts.hostname and parts.port, "file": parts.path, "env": True}
    except ValueError:  # a port that is none
        return False
    return bool(known.get(parts.scheme))


def own_processes(main: Main, args: argparse.Namespace) -> None:
    """Start the processes of this machine; without GPUs they run on the CPU."""
    if args.num_gpus * args.num_machines == 1:
        return main(args)
    url = f"tcp://{LOOPBACK}:{free_port()}" if args.dist_url == "auto" else args.dist_url
    try:
        torch.multiprocessing.spawn(_spawned, args=(main, args, url), nprocs=args.num_gpus)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code < 0:
            sys.exit(
                f"error: process {error.error_index} of this machine was ended by {error.signal_name} before it "
                "could say why: where that is memory running out, take fewer processes or smaller batches"
            )
        sys.exit(error.exit_code)  # it has said why


def _spawned(local_rank: int, main: Main, args: argparse.Namespace, url: str) -> None:
    rank = args.machine_rank * args.num_gpus + local_rank
    world = args.num_machines * args.num_gpus
    in_group(main, args, Processes("spawn", rank, world, local_rank, args.machine_rank), url)


def in_group(main: Main, args: argparse.Namespace, processes: Processes, url: str | None = None) -> None:
    """Run `main(args)` as one of several processes."""
    one_sentence(join)(processes, init_method=url)
    create_local_group(processes)
    main(args)
    comm.synchronize()
    comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()


def create_local_group(processes: Processes) -> None:
    """What detectron2's own `launch` creates: the group of the processes on this machine.

    Machines may hold different numbers of processes, in any order.
    """
    nodes: list[Any] = [None] * processes.world
    dist.all_gather_object(nodes, processes.node)
    for node in sorted(set(nodes)):
        group = dist.new_group([rank for rank, place in enumerate(nodes) if place == node])
        if node == processes.node:
            comm._LOCAL_PROCESS_GROUP = group
