#!/usr/bin/env python3
"""Submit trainings or an evaluation to Slurm, or to processes of this machine, with submitit.

python tools/submit.py CONFIG OUT_DIR --nodes 2 --gpus-per-node 8 --partition gpu --hours 24 --seeds 0 1 2
python tools/submit.py CONFIG OUT_DIR --test CHECKPOINT --gpus-per-node 8
python tools/submit.py CONFIG OUT_DIR --cluster local --gpus-per-node 0 --tasks-per-node 2 -- SOLVER.MAX_ITER 100

What follows -- goes to the configuration's tool as it is. A training whose time is up, or that was preempted, is
requeued by submitit and goes on from its last checkpoint. From Python: submit.submit(...) gives submitit's jobs.
Needs `pip install submitit`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # For the tool beside this one.

try:
    import cloudpickle  # comes with submitit
    import submitit
except ImportError as missing:
    SENTENCE = (
        f"tools/submit.py needs submitit ({missing}): pip install submitit, or submit with tools/slurm_train.sh "
        "and tools/slurm_test.sh, which need Slurm alone"
    )
    if __name__ == "__main__":
        sys.exit(f"error: {SENTENCE}")
    raise ImportError(SENTENCE) from None
from command import test_command, train_command  # noqa: E402

from jepa_plugins.core.cli import one_sentence  # noqa: E402

# A worker need not find this file as a module: its job carries the code.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
MOST_REQUEUES = 100
# Slurm sends them to the tool too, but submitit acts on them, in the process above it.
IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
DIE_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG


class Job:
    """One process of a job: runs a tool, and starts again as it is when the job is requeued.

    Args:
        words: the command behind `python`; a training's has --resume. folder: of the run.
    """

    def __init__(self, words: Sequence[str], folder: str) -> None:
        self.words, self.folder = list(words), folder
        self.process: subprocess.Popen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process": None}

    def __call__(self) -> str:
        """Run to the end; returns the folder.

        Raises:
            RuntimeError: the tool failed, in the first process; the others just end.
        """
        command = [sys.executable, *self.words]
        self.process = subprocess.Popen(command, preexec_fn=follow_parent)
        code = self.process.wait()
        if code and submitit.JobEnvironment().global_rank > 0:
            sys.exit(code)  # where the first process is being requeued, this is no result
        if code:
            raise RuntimeError(
                f"{' '.join(self.words)} failed with exit code {code}: see the log of this job"
            )
        return self.folder

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit requeues; the tool has saved what it needs."""
        if self.process is not None:
            self.process.kill()
        return submitit.helpers.DelayedSubmission(Job(self.words, self.folder))


def follow_parent() -> None:
    """Make a process live as long as the one that started it, whatever signals come."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def jobs_of(
    config: str, out: Path, args: Sequence[str], checkpoint: str | None, seeds: Sequence[int]
) -> list[Job]:
    """A training for each seed, or an evaluation; arguments and errors as of `submit`."""
    if again := sorted({seed for seed in seeds if list(seeds).count(seed) > 1}):
        raise ValueError(
            f"seed {again[0]} is given twice, and two jobs cannot share a folder: give each seed once"
        )
    if checkpoint is not None:
        if seeds:
            raise ValueError("an evaluation has no seeds: leave out --seeds or --test")
        return [Job(test_command(config, checkpoint, args, out=str(out)), str(out))]
    runs = [(str(out / f"seed_{seed}"), seed) for seed in seeds] or [(str(out), None)]
    return [
        Job(train_command(config, args, out=folder, seed=seed, resume=True), folder) for folder, seed in runs
    ]


def submit(
    config: str,
    out: str | os.PathLike,
    args: Sequence[str] = (),
    *,
    checkpoint: str | None = None,
    seeds: Sequence[int] = (),
    cluster: str | None = None,
    nodes: int = 1,
    gpus_per_node: int = 8,
    tasks_per_node: int | None = None,
    cpus_per_task: int = 5,
    hours: float = 24.0,
    partition: str | None = None,
    name: str | None = None,
    **slurm: Any,
) -> list[submitit.Job]:
    """Submit a training, one for each seed, or with a checkpoint its evaluation.

    Args:
        config: a file, or the name of one of this project's configurations. out: folder of the run; of each seed in
            OUT/seed_S. args: of the configuration's tool.
        cluster: "slurm", "local" (processes of this machine) or None for Slurm where there is one.
        tasks_per_node: processes on each machine; by default one a GPU, at least one.
        slurm: further options of submitit, such as slurm_account or slurm_constraint.

    Returns:
        submitit's jobs; `job.results()` waits for all processes of one.

    Raises:
        ValueError, FileNotFoundError: one sentence for a configuration that is none, seeds of an evaluation or twice
            the same, or a cluster that this machine does not belong to.
    """
    if cluster == "slurm" and shutil.which("srun") is None:
        raise ValueError(
            "cluster slurm, but srun is not on the PATH: submit on a machine of the cluster, or to processes of this "
            "machine with --cluster local"
        )
    jobs = jobs_of(config, Path(out).absolute(), args, checkpoint, seeds)
    executor = submitit.AutoExecutor(
        Path(out).absolute() / "submitit", cluster=cluster, slurm_max_num_timeout=MOST_REQUEUES
    )
    executor.update_parameters(
        name=name or Path(config).stem,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node or max(gpus_per_node, 1),
        cpus_per_task=cpus_per_task,
        timeout_min=round(60 * hours),
        **({"slurm_partition": partition} if partition else {}),
        **slurm,
    )
    with executor.batch():  # an array, in Slurm
        return [executor.submit(job) for job in jobs]


def build_parser() -> argparse.ArgumentParser:
    """The options of `submit`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a file, or the name of one of this project's configurations")
    parser.add_argument("out", help="folder of the run; with several seeds, of OUT_DIR/seed_S")
    parser.add_argument("--test", metavar="CHECKPOINT", dest="checkpoint", help="evaluate this checkpoint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], metavar="S", help="one job each")
    parser.add_argument("--cluster", choices=["slurm", "local"], help="default: Slurm where there is one")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="0 for processes on the CPU")
    parser.add_argument("--tasks-per-node", type=int, help="processes; default: one a GPU")
    parser.add_argument("--cpus-per-task", type=int, default=5)
    parser.add_argument("--hours", type=float, default=24.0, help="of a job, before it is requeued")
    parser.add_argument("--partition")
    parser.add_argument("--name", help="of the job; default: the configuration's")
    parser.add_argument("--wait", action="store_true", help="until all jobs have ended")
    return parser


@one_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Submit, and say where the logs are."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = vars(build_parser().parse_args(words[:cut]))
    wait = args.pop("wait")
    jobs = submit(args.pop("config"), args.pop("out"), words[cut + 1 :], **args)
    for job in jobs:
        print(f"job {job.job_id}: {job.paths.stdout}")
    if wait:
        for job in jobs:
            print(f"job {job.job_id} has ended: {job.results()[0]}")


if __name__ == "__main__":
    main()
