"""Which processes a detectron2 tool runs in, and the groups of those on one machine."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

import train_net  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from jepa_plugins.core.launch import Processes, free_port, join  # noqa: E402
from jepa_plugins.d2 import distributed  # noqa: E402

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def options(*words: str):
    return train_net.build_parser().parse_args(["--config-file", "a.yaml", *words])


def torchrun(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    values = {"RANK": 0, "WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def slurm(monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    values = {"STEP_ID": 0, "JOB_ID": 5, "PROCID": 0, "LOCALID": 0, "STEP_NUM_TASKS": tasks}
    for name, value in {**values, "STEP_NODELIST": "a"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_a_launchers_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.find(options()) is None
    torchrun(monkeypatch, 8)
    found = distributed.find(options())
    assert found is not None and (found.launcher, found.world) == ("torchrun", 8)


@pytest.mark.parametrize("world", [1, 8])
def test_both_ways_at_once_are_one_sentence(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    torchrun(monkeypatch, world)
    with pytest.raises(
        ValueError, match=f"torchrun has started {world} processes and --num-gpus 8 .*leave out"
    ):
        distributed.find(options("--num-gpus", "8"))


def test_one_task_of_slurm_may_start_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, 1)
    assert distributed.find(options("--num-gpus", "8")) is None
    slurm(monkeypatch, 2)
    with pytest.raises(ValueError, match="slurm has started 2 processes"):
        distributed.find(options("--num-machines", "2", "--machine-rank", "1"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--num-gpus", "0"), "make no sense: machines are numbered from 0"),
        (("--num-machines", "2", "--machine-rank", "2"), "--machine-rank 2 make no sense"),
        (("--num-machines", "2"), "--num-machines needs --dist-url tcp://HOST:PORT"),
        (
            ("--dist-url", "nonsense"),
            "--dist-url nonsense is no address: give tcp://HOST:PORT, of the machine",
        ),
        (("--dist-url", "tcp://host"), "--dist-url tcp://host is no address"),
        (("--dist-url", "tcp://host:99999"), "--dist-url tcp://host:99999 is no address"),
        (("--dist-url", "http://host:1"), "--dist-url http://host:1 is no address"),
    ],
)
def test_options_that_make_no_sense(words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        distributed.find(options(*words))


@pytest.mark.parametrize("url", ["tcp://host:1", "tcp://[::1]:1", "file:///a/b", "env://", "auto"])
def test_addresses(url: str) -> None:
    assert distributed.find(options("--num-gpus", "2", "--dist-url", url)) is None


def _end_second(how: int) -> None:
    """The end of the second process, by a signal or an exit code; the first waits for it."""
    if comm.get_rank() == 1 and how < 0:
        os.kill(os.getpid(), -how)
    if comm.get_rank() == 1:
        raise SystemExit(how)


@pytest.mark.parametrize(
    ("how", "end"),
    [
        (
            -signal.SIGKILL,
            "error: process 1 of this machine was ended by SIGKILL before it could say why: where",
        ),
        (3, 3),  # it has said why
    ],
)
def test_a_process_that_a_signal_ends_is_one_sentence(monkeypatch, how: int, end: object) -> None:
    fork = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", fork)
    with pytest.raises(SystemExit) as stop:
        distributed.run(lambda args: _end_second(how), options("--num-gpus", "2"))
    code = stop.value.code
    assert code == end if isinstance(end, int) else code.startswith(end) and "\n" not in code


def test_one_process_runs_here() -> None:
    seen: list[object] = []
    distributed.run(seen.append, options())
    assert len(seen) == 1


NODES = (7, 3, 7)  # uneven, and not in order


def _member(rank: int, port: int, out: str) -> None:
    processes = Processes("slurm", rank, len(NODES), 0, NODES[rank], port=port)
    join(processes)
    distributed.create_local_group(processes)
    place = [comm.get_rank(), comm.get_local_rank(), comm.get_local_size(), comm.is_main_process()]
    Path(out, f"{rank}.json").write_text(json.dumps(place))
    torch.distributed.destroy_process_group()


def test_the_processes_of_a_machine_are_a_group(tmp_path: Path) -> None:
    arguments = (free_port(), str(tmp_path))
    torch.multiprocessing.start_processes(_member, arguments, nprocs=len(NODES), start_method="fork")
    places = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(len(NODES))]
    assert places == [[0, 0, 2, True], [1, 0, 1, False], [2, 1, 2, False]]
