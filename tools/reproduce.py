#!/usr/bin/env python3
"""The papers' tables with this project: what each row takes, how to run it, and what it gave.

python tools/reproduce.py list --paper mask_jepa --kind run
python tools/reproduce.py show 20
python tools/reproduce.py plan 20 --gpus 8 --nodes 2 --launcher slurm
python tools/reproduce.py run 20 --scale smoke
python tools/reproduce.py build
python tools/reproduce.py report --scale quick
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # A clone works without being installed.

from preparing import DataError, check  # noqa: E402

from jepa_plugins.core.cli import one_sentence  # noqa: E402
from jepa_plugins.reproduction import report  # noqa: E402
from jepa_plugins.reproduction.manifest import (  # noqa: E402
    KINDS,
    PAPERS,
    SCALES,
    Manifest,
    ManifestError,
    Row,
    load_manifest,
)
from jepa_plugins.reproduction.needs import Need, Stock, hours_of, needs_of  # noqa: E402
from jepa_plugins.reproduction.plan import (  # noqa: E402
    LAUNCHERS,
    Choice,
    Machine,
    Planner,
    Stage,
    config_hash,
)
from jepa_plugins.reproduction.results import (  # noqa: E402
    Results,
    commit_of,
    measured_costs,
    read_costs,
    read_json,
    write_json,
)
from jepa_plugins.reproduction.runner import Interrupted, Runner  # noqa: E402
from jepa_plugins.reproduction.state import BUILDS, STATES, States, read_builds  # noqa: E402


def rows_named(manifest: Manifest, names: Iterable[str]) -> list[Row]:
    """Rows by number (20), range (18-23) or table ("MJ T1"), each once, in order.

    Raises:
        ManifestError: no such row or table, or a range that runs backwards.
    """
    found: dict[int, Row] = {}
    for name in names:
        first, _, last = name.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            if int(last or first) < int(first):
                raise ManifestError(f"{name} holds no row: write the smaller number first, {last}-{first}")
            chosen = [manifest.row(n) for n in range(int(first), int(last or first) + 1)]
        else:
            chosen = manifest.in_table(name)
        found.update({row.number: row for row in chosen})
    return list(found.values())


def choice_of(args: argparse.Namespace) -> Choice:
    """How to run, from the command line."""
    if args.launcher == "slurm" and args.gpus is None:
        raise ManifestError("--launcher slurm needs --gpus, those of a node: this machine may have none")
    gpus = args.gpus if args.gpus is not None else _gpus_here() if args.scale == "full" else 0
    launcher = args.launcher or ("torchrun" if args.nodes * max(gpus, 1) > 1 else "plain")
    machine = Machine(args.nodes, gpus, launcher, args.images_per_gpu, args.cpus_per_task)
    return Choice(
        args.out,
        args.data.absolute(),
        args.scale,
        machine,
        tuple(range(args.seeds)),
        args.pretraining_seeds,
        weights_of(args.weights),
        ROOT,
    )


def weights_of(pairs: Iterable[str]) -> dict[str, str]:
    """Files by names of public weights; paths are the caller's, so they are made absolute.

    Raises:
        ManifestError: no NAME=FILE.
    """
    found = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if not name or not file:
            raise ManifestError(f"--weights takes NAME=FILE, got {pair!r}; 'plan' prints the names")
        found[name] = file if "://" in file else str(Path(file).expanduser().absolute())
    return found


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def run_list(args: argparse.Namespace, manifest: Manifest) -> None:
    """All rows that the filters leave."""
    states, remarks = all_states(args, manifest)
    filters = {key: getattr(args, key) for key in ("paper", "table", "toolkit", "kind", "state")}
    report.print_list(manifest, states, filters)
    print_remarks(remarks)


def all_states(args: argparse.Namespace, manifest: Manifest) -> tuple[dict[int, str], dict[Path, str]]:
    """States of all rows, and sentences on files that do not count."""
    found = States(manifest, args.out, ROOT, commit_of(ROOT))
    return found.all(), found.remarks


def print_remarks(remarks: Mapping[Path, str]) -> None:
    """Sentences on files, beside what a command prints, which others may read."""
    sys.stdout.flush()
    for remark in remarks.values():
        print(f"note: {remark}", file=sys.stderr)


def run_show(args: argparse.Namespace, manifest: Manifest) -> None:
    """Everything of some rows."""
    states = States(manifest, args.out, ROOT, commit_of(ROOT))
    results = [result for scale in SCALES for result in Results(args.out).load(scale)]
    for row in rows_named(manifest, args.rows):
        state = states.of(row)
        print(report.show_text(manifest, row, state, results, states.checks(row), str(data_root())))
    print_remarks(states.remarks)


def run_plan(args: argparse.Namespace, manifest: Manifest) -> None:
    """The commands, what they need, and what they cost."""
    costs = _costs(args)
    rows, choice = rows_named(manifest, args.rows), choice_of(args)
    planner = Planner(manifest, choice)
    machine = choice.machine
    print(f"# {args.scale}: {machine.nodes} x {machine.gpus or 'no'} GPUs, {machine.launcher}")
    if machine.launcher == "torchrun" and machine.nodes > 1:
        print(
            "# Set MASTER_ADDR to the first node and start each torchrun on every node; the rest runs on one."
        )
    stages = runnable(planner, rows)
    for stage in stages:
        print(f"\n# {stage.name}{', ' + stage.note if stage.note else ''}\n{stage.shell()}")
    if args.scale == "full":
        print("\n# data and weights", *(f"#   {need}" for need in needs_of(planner, stages, stock)), sep="\n")
        _print_hours(stages, costs)


def runnable(planner: Planner, rows: list[Row]) -> list[Stage]:
    """Stages of rows; of several rows, those that have nothing to run are named and left out.

    Raises:
        ManifestError: none of them has.
    """
    ready = []
    for row in rows:
        try:
            planner.runs_of(row)
            ready.append(row)
        except ManifestError as error:
            if len(rows) == 1:
                raise
            print(f"# left out: {error}")
    if not ready:
        raise ManifestError("none of these rows has anything to run")
    stages = planner.plan(ready)
    for name, reason in planner.left_out.items():
        print(f"# left out: {name} {reason}")
    return stages


def stock(name: str, root: Path) -> Stock:
    """What `prepare_data.py check NAME` finds below a folder."""
    parts = dict.fromkeys((item.folder, part) for item in check.select([name]) for part in item.parts)
    found = [check.examine(root / folder, part) for folder, part in parts]
    needed = [finding for finding in found if not finding.part.use]
    lacking = tuple(f"{finding.part.pattern} {finding}" for finding in needed if finding.hinders)
    return Stock(sum(finding.count for finding in needed), lacking)


def _costs(args: argparse.Namespace) -> list[dict]:
    return [read_costs(Path(path)) for path in args.costs]


def _print_hours(stages: list[Stage], costs: list[dict]) -> None:
    hours = hours_of(stages, costs)
    print("# GPU-hours", *(f"#   {run}" for run in hours), sep="\n")
    known = [run.hours for run in hours if run.hours is not None]
    unknown = len(hours) - len(known)
    print(f"#   in all {sum(known):,.1f}" + (f" and {unknown} unknown: measure them with" if unknown else ""))
    if unknown:
        print("#   python benchmarks/cost.py CONFIG --out costs.json, then plan --costs costs.json")


def run_run(args: argparse.Namespace, manifest: Manifest) -> None:
    """Run rows; finished stages are skipped."""
    planner = Planner(manifest, choice_of(args))
    stages = runnable(planner, rows_named(manifest, args.rows))
    runner = Runner(planner, ROOT, say=lambda line: print(line, flush=True), restart=args.restart)
    if args.scale == "full":
        pending = [stage for stage in stages if runner.pending(stage, stages)]
        refuse_missing(needs_of(planner, pending, stock), args.any_data)
    for result in runner.run(stages):
        experiment = manifest.experiments.get(result.name)
        wanted = experiment.metrics if experiment and experiment.metrics else result.metrics
        shown = [f"{name} {result.metrics[name]:.2f}" for name in wanted if name in result.metrics]
        nothing = "no finite figure" if experiment else "done"
        print(f"{result.name}, seed {result.seed}: {', '.join(shown) or nothing}")


def refuse_missing(needs: list[Need], any_data: bool) -> None:
    """Before anything runs: an experiment that lacks its data would say so after days of pre-training.

    Args:
        any_data: start all the same when only data are incomplete.

    Raises:
        ManifestError: what is missing.
    """
    missing = [need for need in needs if not need.there]
    for need in missing:
        print(f"# {need}", flush=True)
    refused = [need for need in missing if need.what == "weights" or not any_data]
    if refused:
        names = ", ".join(f"{need.what} {need.name}" for need in refused)
        hint = "" if any_data else "; --any-data accepts data sets that are meant to be smaller"
        raise ManifestError(f"nothing was run, for {names} would be missing{hint}")


def run_build(args: argparse.Namespace, manifest: Manifest) -> None:
    """Build the model of every configuration that runs name, on the meta device, and keep what came of it."""
    rows = rows_named(manifest, args.rows) if args.rows else list(manifest.rows.values())
    runs = [*manifest.pretrainings_of(rows), *manifest.experiments_of(rows)]
    configs = sorted(
        {run.config for run in runs if run.config and not run.waits_for}
        | {config for row in rows for config in row.costs}
    )
    if not configs:
        raise ManifestError("none of these rows has a configuration to build")
    costs = args.out / "parameters.json"
    costs.unlink(missing_ok=True)  # of an earlier commit
    args.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "benchmarks/cost.py", *configs, "--parameters-only", "--keep-going"]
    subprocess.run([*command, "--out", str(costs)], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    if not costs.is_file():
        raise ManifestError("benchmarks/cost.py wrote nothing: run it by hand to see why")
    commit, builds = commit_of(ROOT), read_builds(args.out)
    for entry in read_json(costs, dict, "move it away and build again")["runs"]:
        config = entry["config"]
        builds[config] = {**entry, "hash": config_hash(config), "commit": commit}
    write_json(args.out / BUILDS, builds)
    broken = {config: builds[config]["error"] for config in configs if builds.get(config, {}).get("error")}
    print(f"{len(configs) - len(broken)} of {len(configs)} configurations build")
    for config, error in broken.items():
        print(f"  {config}: {error}")
    if broken:
        sys.exit(1)


def run_report(args: argparse.Namespace, manifest: Manifest) -> None:
    """The tables as Markdown and as one HTML page."""
    given = _costs(args)
    rows = rows_named(manifest, args.rows) if args.rows else None
    states, remarks = all_states(args, manifest)
    results = Results(args.out).load(args.scale)
    measured, unreadable = measured_costs(args.out, args.scale)
    written = report.write(
        manifest, results, args.scale, states, rows, [*given, *measured], args.out / args.scale
    )
    print(*written, sep="\n")
    print_remarks({**unreadable, **remarks})


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("output/reproduction"), help="folder of runs and results"
    )


def data_root() -> Path:
    """Root of all data sets, unless the user names another."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def _add_machine(parser: argparse.ArgumentParser, scale: str) -> None:
    parser.add_argument("rows", nargs="+", metavar="ROW|TABLE", help="20, 18-23, or a table such as 'MJ T1'")
    parser.add_argument("--scale", choices=SCALES, default=scale)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each experiment, from 0 on")
    parser.add_argument(
        "--pretraining-seeds", action="store_true", help="a pre-training of its own for each seed"
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, help="on each node; default: those that are here, 0 for the CPU")
    parser.add_argument("--launcher", choices=LAUNCHERS, help="default: torchrun for several processes")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="of each process, under Slurm")
    parser.add_argument("--images-per-gpu", type=int, help="the most images at once; the rest is accumulated")
    parser.add_argument(
        "--data", type=Path, default=data_root(), help="root of all data sets: DETECTRON2_DATASETS"
    )
    parser.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE", help="another place of public weights"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="all rows of the papers and where they stand")
    listing.add_argument("--paper", choices=PAPERS)
    listing.add_argument("--table", help="such as 'MJ T1'")
    listing.add_argument("--toolkit", choices=("detectron2", "mmengine"))
    listing.add_argument("--kind", choices=KINDS)
    listing.add_argument("--state", choices=STATES)
    showing = commands.add_parser("show", help="everything of a row")
    showing.add_argument("rows", nargs="+", metavar="ROW|TABLE")
    for name, scale, text in (
        ("plan", "full", "the exact commands, what they need and cost"),
        ("run", "smoke", "run them; finished stages are skipped"),
    ):
        _add_machine(commands.add_parser(name, help=text), scale)
    building = commands.add_parser("build", help="build every configuration's model without memory")
    building.add_argument("rows", nargs="*", metavar="ROW|TABLE")
    reporting = commands.add_parser("report", help="Markdown and one HTML page")
    reporting.add_argument("rows", nargs="*", metavar="ROW|TABLE")
    reporting.add_argument("--scale", choices=SCALES, default="full")
    commands.choices["run"].add_argument(
        "--restart", action="store_true", help="runs whose configuration has changed start anew"
    )
    commands.choices["run"].add_argument(
        "--any-data", action="store_true", help="full runs start with fewer files than the published ones too"
    )
    for command in (reporting, commands.choices["plan"]):
        command.add_argument("--costs", nargs="*", default=[], metavar="FILE", help="of benchmarks/cost.py")
    for command in commands.choices.values():
        _add_common(command)
    return parser


RUN = {
    "list": run_list,
    "show": run_show,
    "plan": run_plan,
    "run": run_run,
    "build": run_build,
    "report": run_report,
}


@one_sentence
def main(argv: list[str] | None = None) -> None:
    """Run a subcommand."""
    args = build_parser().parse_args(argv)
    if getattr(args, "seeds", 1) < 1:
        raise ManifestError(f"--seeds is a number from 1 on, got {args.seeds}")
    args.out = args.out.absolute()
    try:
        RUN[args.command](args, load_manifest())
        sys.stdout.flush()
    except Interrupted as interrupted:
        print(f"error: {interrupted}", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    except DataError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
