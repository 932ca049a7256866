"""The processes of torchrun, srun and submitit, found in their variables, and how they join."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from jepa_plugins.core.launch import Processes, detect, device_index, expand_hosts, free_port, join, port_of

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "a.b",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_NODELIST": "node[01-09]",
    "SLURM_STEP_NODELIST": "node[07,09]",
}
SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_JOB_ID": "4321",
}


def test_a_process_started_plainly_is_alone() -> None:
    assert detect({}) is None
    assert detect({"LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}) is None


def test_torchruns_variables() -> None:
    assert detect(TORCHRUN) == Processes("torchrun", 5, 8, 1, 1, "a.b", 1234)
    by_hand = {name: value for name, value in TORCHRUN.items() if name != "GROUP_RANK"}
    found = detect(by_hand)
    assert found is not None and found.node == 4  # the first rank on the machine, by which it is known


def test_slurms_variables() -> None:
    assert detect(SLURM) == Processes("slurm", 3, 4, 1, 1, "node07", port_of(77, 2))
    whole_job = {k: v for k, v in SLURM.items() if k not in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")}
    assert detect(whole_job) == Processes("slurm", 3, 8, 1, 1, "node01", port_of(77, 2))
    one_machine = {**SLURM, "SLURM_STEP_NODELIST": "node07"}
    assert detect(one_machine).address == "127.0.0.1"  # type: ignore[union-attr]
    chosen = detect({**SLURM, "MASTER_ADDR": "b", "MASTER_PORT": "99"})
    assert chosen is not None and (chosen.address, chosen.port) == ("b", 99)


def test_a_batch_script_is_no_process_of_sruns() -> None:
    assert detect({k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")}) is None


def test_submitits_variables() -> None:
    assert detect(SUBMITIT) == Processes("submitit", 1, 2, 1, 0, "127.0.0.1", port_of(4321))


def test_torchrun_may_be_started_by_srun() -> None:
    found = detect({**SLURM, **SUBMITIT, **TORCHRUN})
    assert found is not None and found.launcher == "torchrun"


@pytest.mark.parametrize(
    ("variables", "missing", "sentence"),
    [
        (
            TORCHRUN,
            "LOCAL_RANK",
            "half that of torchrun: .*but not LOCAL_RANK: start with torchrun, or unset",
        ),
        (TORCHRUN, "WORLD_SIZE", "half that of torchrun: .*but not WORLD_SIZE"),
        (TORCHRUN, "MASTER_ADDR", "half that of torchrun: .*but not MASTER_ADDR"),
        (SLURM, "SLURM_PROCID", "half that of srun: .*but not SLURM_PROCID: start with srun, or unset"),
        (SLURM, "SLURM_JOB_ID", "half that of srun: .*but not SLURM_JOB_ID"),
        (SUBMITIT, "SUBMITIT_LOCAL_NTASKS", "half that of submitit: .*but not SUBMITIT_LOCAL_NTASKS"),
    ],
)
def test_half_an_environment_is_one_sentence(variables: dict, missing: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        detect({name: value for name, value in variables.items() if name != missing})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"RANK": "8"}, "process 8 of 8"),
        ({"RANK": "x"}, "RANK is no number: 'x'"),
        ({"LOCAL_RANK": "-1"}, "-1 on its machine"),
    ],
)
def test_values_that_make_no_sense(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        detect({**TORCHRUN, **change})


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("a1", ["a1"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("a,node[8-10].x,b", ["a", "node8.x", "node9.x", "node10.x", "b"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
    ],
)
def test_lists_of_nodes(nodes: str, hosts: list[str]) -> None:
    assert expand_hosts(nodes) == hosts


@pytest.mark.parametrize("nodes", ["", "node[1-2", "node[]", "node[1-]", "node[1-2-3]", "a,,b", "a b"])
def test_lists_that_cannot_be_read(nodes: str) -> None:
    with pytest.raises(ValueError, match="Slurm's list of nodes cannot be read"):
        expand_hosts(nodes)


@given(st.integers(0, 999), st.integers(0, 20), st.integers(1, 3))
def test_ranges_keep_their_zeros(first: int, more: int, width: int) -> None:
    start, end = str(first).zfill(width), str(first + more).zfill(width)
    hosts = expand_hosts(f"n[{start}-{end}]")
    assert [int(host[1:]) for host in hosts] == list(range(first, first + more + 1))
    assert all(len(host) > width for host in hosts)


@given(st.integers(0, 2**31), st.integers(0, 15), st.integers(1, 700), st.integers(0, 15))
def test_jobs_and_steps_side_by_side_have_ports_of_their_own(
    job: int, step: int, later: int, other: int
) -> None:
    assert 20000 <= port_of(job, step) < 32768
    assert port_of(job, step) != port_of(job + later, other)
    assert (port_of(job, step) == port_of(job, other)) == (step == other)


def test_the_gpu_of_a_process() -> None:
    assert device_index(Processes("torchrun", 5, 8, 1), 4) == 1
    assert device_index(Processes("slurm", 5, 8, 1), 1) == 0  # bound to its own
    with pytest.raises(ValueError, match="process 4 of this machine has no GPU, since 4 are visible"):
        device_index(Processes("torchrun", 4, 8, 4), 4)


def _member(rank: int, variables: dict[str, str], out: str) -> None:
    os.environ.update(variables, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank))
    found = detect()
    assert found is not None
    join(found)
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    Path(out, str(rank)).write_text(f"{total.item():g} {os.environ['LOCAL_RANK']} {os.environ['RANK']}")
    dist.destroy_process_group()


def test_processes_on_two_nodes_of_slurm_find_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    variables = {
        **SLURM,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    }
    torch.multiprocessing.start_processes(_member, (variables, str(tmp_path)), nprocs=2, start_method="fork")
    assert [(tmp_path / name).read_text() for name in "01"] == ["3 0 0", "3 0 1"]


def test_a_free_port_is_free() -> None:
    assert 1024 < free_port() < 65536


def test_no_toolkit_is_needed() -> None:
    code = "import sys, jepa_plugins.core.launch; sys.exit(any(n in sys.modules for n in ('detectron2', 'mmengine')))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
