"""Several processes of one tool, forked from a test, and stand-ins for Slurm's programs."""

from __future__ import annotations

import contextlib
import os
import runpy
import socket
import stat
import sys
import traceback
from pathlib import Path

import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _child(rank: int, world: int, port: int, tool: str, arguments: list[str], before, log: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    if before is not None:
        before()
    sys.argv = [tool, *arguments]
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise


def in_processes(world: int, tool: str, arguments: list[str], folder: Path, before=None) -> None:
    """Run a tool in so many processes, which find torchrun's variables; one finds none.

    Forked processes need not import everything again. What they print goes to FOLDER/RANK.log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    context = torch.multiprocessing.get_context("fork")
    logs = [folder / f"{rank}.log" for rank in range(world)]
    children = [
        context.Process(target=_child, args=(rank, world, port, tool, arguments, before, str(logs[rank])))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-2000:] for log in logs)


def write_program(path: Path, text: str) -> None:
    """An executable script."""
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def largest_difference(one: dict, other: dict) -> float:
    """Between the tensors of two models of the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def share_beyond(one: dict, other: dict, tolerance: float) -> float:
    """Share of all numbers that differ by more.

    Adam divides by the gradient's size: one of rounding size moves its weight by up to the learning rate.
    """
    away = [(one[name].double() - other[name].double()).abs().flatten() > tolerance for name in one]
    return float(torch.cat(away).double().mean())


# Stand-ins for Slurm's programs: they set its variables and start real processes on this machine.

SBATCH = """#!{python}
import json, os, pathlib, shutil, signal, subprocess, sys, time
options, words = {{}}, sys.argv[1:]
while words and words[0].startswith("-"):
    name, _, value = words.pop(0).lstrip("-").partition("=")
    options[name] = value
state = pathlib.Path(__file__).parent
with open(state / "submitted.jsonl", "a") as file:
    file.write(json.dumps([options, words]) + "\\n")
if (state / "dry").exists():
    sys.exit()
nodes, tasks = int(options["nodes"]), int(options["ntasks-per-node"])
last = int(options.get("array", "0-0").split("-")[1])
for index in range(last + 1):
    job = str(os.getpid() + index)
    env = dict(os.environ, SLURM_JOB_ID=job, SLURM_NTASKS=str(nodes * tasks), SLURM_CPUS_PER_TASK="1",
        SLURM_JOB_NUM_NODES=str(nodes), SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0",
        SLURM_JOB_NODELIST="127.0.0.1" if nodes == 1 else f"127.0.0.[1-{{nodes}}]")
    if "array" in options:
        env.update(SLURM_ARRAY_JOB_ID=job, SLURM_ARRAY_TASK_ID=str(index))
    spool = state / "spool" / job / "slurm_script"
    spool.parent.mkdir(parents=True)
    shutil.copy(words[0], spool)
    log = options["output"].replace("%A", job).replace("%a", str(index)).replace("%j", job)
    restarts, requeued = 0, state / ("requeue_" + job)
    while True:
        env["SLURM_RESTART_COUNT"] = str(restarts)
        with open(log, "a") as sink:
            process = subprocess.Popen(["bash", spool, *words[1:]], env=env, stdout=sink, stderr=sink,
                start_new_session=True)
        told = restarts > 0
        while process.poll() is None and not requeued.exists():
            wanted = os.environ.get("SIGNAL_WHEN_THERE")
            if wanted and not told and os.path.exists(wanted):
                told = True
                assert options["signal"].startswith("B:USR1@")
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.01)
        if not requeued.exists():
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        requeued.unlink()
        restarts += 1
    if process.returncode:
        sys.exit(process.returncode)
"""
# Its tasks fork from it, so that it imports once for all of them.
SRUN = """#!{python}
import importlib, os, runpy, signal, sys, traceback
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
assert words[0] == sys.executable, words
sys.path.insert(0, {root!r})
for name in os.environ.get("SRUN_IMPORTS", "").split():
    importlib.import_module(name)
tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_JOB_NUM_NODES"])
each, running = tasks // nodes, set()
for rank in range(tasks):
    child = os.fork()
    if child:
        running.add(child)
        continue
    os.environ.update(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=str(tasks), SLURM_PROCID=str(rank),
        SLURM_STEP_NODELIST=os.environ["SLURM_JOB_NODELIST"], SLURM_LOCALID=str(rank % each),
        SLURM_NODEID=str(rank // each))
    sys.argv, code = words[1:], 0
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
worst = 0
while running:
    child, status = os.wait()
    running.discard(child)
    code = os.waitstatus_to_exitcode(status)
    if code and not worst:
        for other in running:
            os.kill(other, signal.SIGKILL)
    worst = worst or abs(code)
sys.exit(worst)
"""
SCONTROL = """#!/bin/bash
test "$1" = requeue && touch "$(dirname "$0")/requeue_$2" && sleep 30
"""


def stand_ins(folder: Path, dry: bool = False) -> Path:
    """Write sbatch, srun and scontrol; a dry sbatch only notes its arguments, in submitted.jsonl."""
    folder.mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        filled = text.format(python=sys.executable, root=str(TOOLS.parent)) if name != "scontrol" else text
        write_program(folder / name, filled)
    if dry:
        (folder / "dry").touch()
    return folder


def environment(programs: Path | None = None, **variables: object) -> dict[str, str]:
    """Of a script, with the stand-ins in front of everything else and no launcher's variables."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SUBMITIT_")) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    path = os.environ["PATH"] if programs is None else f"{programs}{os.pathsep}{os.environ['PATH']}"
    fixed = {"PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return {**kept, **fixed, **{name: str(value) for name, value in variables.items()}}
