"""What to run for a row: the exact commands in their order, for this machine or for nodes with GPUs."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from jepa_plugins.config_files import config_root
from jepa_plugins.reproduction.manifest import (
    Experiment,
    Family,
    Manifest,
    ManifestError,
    Pretraining,
    Row,
    Run,
)

LAUNCHERS = ("plain", "torchrun", "slurm")


@dataclass(frozen=True)
class Machine:
    """Where the commands run.

    Attributes:
        nodes: machines; gpus: on each, 0 for one process on the CPU.
        launcher: plain (one process), torchrun, or slurm (srun, inside an allocation).
        images_per_gpu: the most images that one process holds at once; None leaves it to the manifest.
        cpus_per_task: processors of each process under Slurm.

    Raises:
        ManifestError: numbers that make no machine.
    """

    nodes: int = 1
    gpus: int = 0
    launcher: str = "plain"
    images_per_gpu: int | None = None
    cpus_per_task: int = 8

    def __post_init__(self) -> None:
        if self.images_per_gpu is not None and self.images_per_gpu < 1:
            raise ManifestError(f"--images-per-gpu is a number from 1 on, got {self.images_per_gpu}")
        if self.cpus_per_task < 1:
            raise ManifestError(f"--cpus-per-task is a number from 1 on, got {self.cpus_per_task}")
        if self.nodes < 1 or self.gpus < 0:
            raise ManifestError(
                f"{self.nodes} nodes with {self.gpus} GPUs each are no machine: give 1 or more nodes"
            )
        if self.launcher not in LAUNCHERS:
            raise ManifestError(f"the launcher {self.launcher!r} is unknown: give {', '.join(LAUNCHERS)}")
        if self.launcher == "plain" and self.processes > 1:
            raise ManifestError(f"{self.processes} processes need --launcher torchrun or slurm")

    @property
    def processes(self) -> int:
        """How many train together."""
        return self.nodes * max(self.gpus, 1)

    def dividing(self, batch: int) -> Machine:
        """The largest part of the machine whose processes divide a batch, on as few nodes as they fill."""
        parts = ((n, g) for n in range(1, self.nodes + 1) for g in range(1, max(self.gpus, 1) + 1))
        nodes, gpus = max((part for part in parts if batch % math.prod(part) == 0), key=_most_on_fewest)
        return self if nodes * gpus == self.processes else replace(self, nodes=nodes, gpus=gpus)

    def prefix(self) -> list[str]:
        """What stands before the tool."""
        if self.launcher == "plain":
            return ["python"]
        count = max(self.gpus, 1)
        if self.launcher == "slurm":
            gpus = [f"--gpus-per-node={self.gpus}"] if self.gpus else []
            tasks = [
                f"--nodes={self.nodes}",
                f"--ntasks-per-node={count}",
                f"--cpus-per-task={self.cpus_per_task}",
            ]
            return ["srun", *tasks, *gpus, "--kill-on-bad-exit=1", "python"]
        if self.nodes == 1:
            return ["torchrun", "--standalone", f"--nproc-per-node={count}"]
        endpoint = "--rdzv-endpoint=$MASTER_ADDR:29500"
        return [
            "torchrun",
            f"--nnodes={self.nodes}",
            f"--nproc-per-node={count}",
            "--rdzv-backend=c10d",
            endpoint,
        ]


def _most_on_fewest(part: tuple[int, int]) -> tuple[int, int]:
    """Orders parts of a machine, (nodes, GPUs of each), by their processes, then by how few their nodes are."""
    return math.prod(part), -part[0]


@dataclass(frozen=True)
class Checkpoint:
    """The last checkpoint of a run, known when it has run.

    Attributes:
        folder: of the run; toolkit: detectron2 or mmengine.
    """

    folder: Path
    toolkit: str

    def shell(self) -> str:
        """For a person's shell."""
        if self.toolkit == "detectron2":
            return shlex.quote(str(self.folder / "model_final.pth"))
        return f'"$(cat {shlex.quote(str(self.folder / "last_checkpoint"))})"'

    def resolve(self) -> str:
        """The file.

        Raises:
            FileNotFoundError: the run has not finished.
        """
        if self.toolkit == "detectron2":
            path = self.folder / "model_final.pth"
        else:
            pointer = self.folder / "last_checkpoint"
            path = Path(pointer.read_text(encoding="utf-8").strip()) if pointer.is_file() else pointer
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: the run in {self.folder} has not finished")
        return str(path)


@dataclass(frozen=True)
class Argument:
    """An argument with a checkpoint in it: what stands before it, and the checkpoint."""

    before: str
    checkpoint: Checkpoint

    def shell(self) -> str:
        """For a person's shell."""
        return (shlex.quote(self.before) if self.before else "") + self.checkpoint.shell()

    def resolve(self) -> str:
        """The text of the argument."""
        return self.before + self.checkpoint.resolve()


Part = str | Argument


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: unique, such as pretrain/mask_jepa_R50/seed_0; kind: data, cost, pretrain, export, weights, experiment.
        folder: of everything that it writes.
        command: prefix, tool and arguments; environment: variables that it needs.
        run: what it trains or evaluates, None for data and exports; seed: of the run.
        overrides: of the run's configuration; needs: stages before it; config: the file.
        identity: what decides its outcome: neither where it runs nor how the batch is spread.
        machine: that it uses; products: what later stages read of it; note: on it, for a person.
    """

    name: str
    kind: str
    folder: Path
    command: tuple[Part, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    run: Run | None = None
    seed: int = 0
    config: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    identity: str = ""
    machine: Machine = Machine()
    products: tuple[Path | Checkpoint, ...] = ()
    note: str = ""

    def shell(self) -> str:
        """The command for a person's shell."""
        parts = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        for part in self.command:
            known = part.startswith("--rdzv-endpoint=$") if isinstance(part, str) else False
            parts.append(part.shell() if isinstance(part, Argument) else part if known else shlex.quote(part))
        return " ".join(parts)

    def resolved(self) -> list[str]:
        """The command for a process; FileNotFoundError when a stage before it has not finished."""
        return [part.resolve() if isinstance(part, Argument) else part for part in self.command]

    def lost(self) -> str:
        """The first product that is not there, or is an empty folder; empty when all are there."""
        for product in self.products:
            if isinstance(product, Checkpoint):
                try:
                    product.resolve()
                except FileNotFoundError:
                    return f"the checkpoint in {product.folder}"
            elif not (product.is_file() or (product.is_dir() and any(product.iterdir()))):
                return str(product)
        return ""


@dataclass(frozen=True)
class Choice:
    """How rows are run.

    Attributes:
        scale: smoke, quick or full; out: folder of everything; data: root of all data sets.
        machine: see there; seeds: of the experiments.
        pretraining_seeds: give each seed a pre-training of its own, instead of sharing that of seed 0.
        weights: files in place of the manifest's, by its names of public weights.
        root: of the project, below which the manifest's weight files are looked for.
    """

    out: Path
    data: Path
    scale: str = "full"
    machine: Machine = Machine()
    seeds: tuple[int, ...] = (0,)
    pretraining_seeds: bool = False
    weights: Mapping[str, str] = field(default_factory=dict)
    root: Path = Path()


class Planner:
    """Turns rows into stages.

    Args:
        manifest: see `load_manifest`; choice: how to run.
    """

    def __init__(self, manifest: Manifest, choice: Choice) -> None:
        if choice.scale != "full" and choice.machine.processes > 1:
            raise ManifestError(f"--scale {choice.scale} runs as one process: leave --nodes and --gpus out")
        if unknown := sorted(set(choice.weights) - set(manifest.weights)):
            known = ", ".join(sorted(manifest.weights))
            raise ManifestError(f"--weights names {', '.join(unknown)}: the manifest knows {known}")
        self.manifest, self.choice = manifest, choice
        self.base = choice.out / choice.scale
        self.left_out: dict[str, str] = {}  # runs of the planned rows that are no part of the plan, and why
        self.scale_data = manifest.scale_data.get(choice.scale, {})
        self.data = choice.data if choice.scale == "full" else self.base / "data"
        self.stages: dict[str, Stage] = {}

    def plan(self, rows: Iterable[Row]) -> list[Stage]:
        """Every stage that rows need, each once, in order.

        Raises:
            ManifestError: a row that waits for a part of the project or has nothing to run, or no version at
                this scale.
        """
        for row in rows:
            ready = self.runs_of(row)
            if row.costs:
                self._cost(row)
            for run in ready:
                if isinstance(run, Experiment):
                    # nothing of a public model depends on a seed
                    for seed in (0,) if run.finished else self.choice.seeds:
                        self._experiment(run, seed)
                elif isinstance(run, Pretraining):
                    for seed in self.choice.seeds if self.choice.pretraining_seeds else (0,):
                        self._pretraining(run, seed)
        return list(self.stages.values())

    def runs_of(self, row: Row) -> list[Run]:
        """What can be run of a row; ManifestError says why there is nothing."""
        runs: list[Run] = [self.manifest.pretrainings[name] for name in row.pretrainings]
        runs += [self.manifest.experiments[name] for name in row.experiments]
        if row.kind != "run" and not runs:
            raise ManifestError(
                f"row {row.number} is a {row.kind}: there is nothing to run; see 'show {row.number}'"
            )
        runs = self._at_this_scale(row, runs)
        ready = [run for run in runs if not self.waits(run)]
        self.left_out.update({run.name: f"waits for {self.waits(run)}" for run in runs if self.waits(run)})
        if not ready and not row.costs:
            waits = row.waits_for or ", ".join(sorted({self.waits(run) for run in runs}))
            raise ManifestError(f"row {row.number} waits for what this project does not have yet: {waits}")
        return ready

    def _at_this_scale(self, row: Row, runs: list[Run]) -> list[Run]:
        """Runs that the scale has; the others are noted as left out."""
        only = self.scale_data.get("only")
        if only is None:
            return runs
        found = [run for run in runs if run.name in only]
        if not found and not row.costs:
            known = [
                str(number)
                for number, other in self.manifest.rows.items()
                if other.costs or {*other.experiments, *other.pretrainings} & {*only}
            ]
            raise ManifestError(
                f"row {row.number} has no {self.choice.scale} version; rows that have one: {', '.join(known)}"
            )
        missing = (run.name for run in runs if run.name not in only)
        self.left_out.update({name: f"has no {self.choice.scale} version" for name in missing})
        return found

    def _cost(self, row: Row) -> None:
        """What the configurations of a row cost, measured on this machine; the small scales measure their twins."""
        folder = self.base / "costs" / f"row_{row.number}"
        options = [] if self.choice.scale == "full" else ["--scale", "quick"]
        configs = self.manifest.costs_of(row, self.choice.scale)
        words = ["python", "benchmarks/cost.py", *configs, *options]
        command = (*words, "--out", str(folder / "costs.json"))
        identity = json.dumps([row.costs, options])
        products = (folder / "costs.json",)
        self._add(
            Stage(f"cost/row_{row.number}", "cost", folder, command, identity=identity, products=products)
        )

    def waits(self, run: Run) -> str:
        """What a run, or its pre-training, waits for; empty when it can run."""
        if run.waits_for:
            return run.waits_for
        if isinstance(run, Experiment) and run.pretraining:
            return self.manifest.pretrainings[run.pretraining].waits_for
        return ""

    # --- stages

    def _add(self, stage: Stage) -> Stage:
        return self.stages.setdefault(stage.name, stage)

    def _data(self) -> tuple[str, ...]:
        """The small scales generate their data."""
        names = []
        for name, command in (self.scale_data.get("commands") or {}).items():
            words = [self._fill(word) for word in shlex.split(command)]
            folder = self.base / "logs" / "data" / name
            made = tuple(Path(self._fill(word)) for word in shlex.split(command) if "{data}" in word)
            stage = Stage(f"data/{name}", "data", folder, ("python", *words), identity=command, products=made)
            names.append(self._add(stage).name)
        return tuple(names)

    def _pretraining(self, run: Pretraining, seed: int) -> Stage:
        folder = self.base / "pretrain" / run.name / f"seed_{seed}"
        stage = self._training(run, seed, folder, "pretrain", self._public(run), self._data())
        return self._add(replace(stage, products=(Checkpoint(folder, run.toolkit),)))

    def _public(self, run: Run) -> dict[str, Part]:
        """Override for the public weights that a full-size run starts from."""
        if not run.weights or self.choice.scale != "full":
            return {}
        return {self.family(run).weights_key: self.weight_file(run.weights)}

    def weight_file(self, name: str) -> str:
        """Where a run reads public weights: the user's file, the manifest's where it is there, or else its URL."""
        if name in self.choice.weights:
            return self.choice.weights[name]
        weights = self.manifest.weights[name]
        there = (self.choice.root / Path(weights.file).expanduser()).is_file()
        return weights.file if there or not weights.url else weights.url

    def _experiment(self, run: Experiment, seed: int) -> Stage:
        family, needs = self.family(run), self._data()
        if run.pretraining:
            pretraining = self.manifest.pretrainings[run.pretraining]
            first = self._pretraining(pretraining, seed if self.choice.pretraining_seeds else 0)
            file: Part = Argument("", Checkpoint(first.folder, pretraining.toolkit))
            source = first
            if family.export:
                source = self._export(first, family, run)
                file = str(source.folder / "export.pth")
            # Of the two what it reads: a pre-training may be gone when its export is there.
            needs = (*needs, source.name)
            weights = {family.weights_key: file}
        elif run.finished and self.choice.scale != "full":
            stand_in = self._stand_in(run, needs)
            weights = {family.weights_key: Argument("", Checkpoint(stand_in.folder, run.toolkit))}
            needs = (*needs, stand_in.name)
        else:
            weights = self._public(run)
        folder = self.base / "experiments" / run.name / f"seed_{seed}"
        return self._add(self._training(run, seed, folder, "experiment", weights, needs))

    def _stand_in(self, run: Experiment, needs: tuple[str, ...]) -> Stage:
        """A hardly trained model of the same configuration in place of finished public weights."""
        folder = self.base / "weights" / run.name
        stage = self._training(replace(run, finished=False), 0, folder, "weights", {}, needs)
        return self._add(replace(stage, run=None, products=(Checkpoint(folder, run.toolkit),)))

    def _export(self, first: Stage, family: Family, run: Experiment) -> Stage:
        tag = "_".join(("export", *(option.strip("-") for option in run.export_options)))
        folder = first.folder / tag
        assert first.run is not None
        found = {"{checkpoint}": Argument("", Checkpoint(first.folder, first.run.toolkit))}
        words = [found.get(word, word.replace("{out}", str(folder / "export.pth"))) for word in family.export]
        command = ("python", *words, *run.export_options)
        name = f"{first.name.replace('pretrain/', 'export/', 1)}/{tag}"
        identity = json.dumps([*family.export, *run.export_options])
        made = (folder / "export.pth",)
        return self._add(
            Stage(name, "export", folder, command, needs=(first.name,), identity=identity, products=made)
        )

    def _training(
        self,
        run: Run,
        seed: int,
        folder: Path,
        kind: str,
        weights: Mapping[str, Part],
        needs: tuple[str, ...],
    ) -> Stage:
        family, machine = self.family(run), self.machine_of(run)
        config, overrides = self.configured(run, family)
        overrides = {**overrides, **weights, family.seed_key: seed}
        tool = Tool(family.launcher, config, folder, overrides, finished=run.finished)
        return Stage(
            name=f"{kind}/{run.name}/seed_{seed}",
            kind=kind,
            folder=folder,
            command=(*machine.prefix(), *tool.arguments()),
            environment={"DETECTRON2_DATASETS": str(self.data)} if run.toolkit == "detectron2" else {},
            run=run,
            seed=seed,
            config=config,
            overrides={k: v for k, v in overrides.items() if k not in weights},
            needs=needs,
            identity=self._identity(run, config, overrides, weights),
            machine=machine,
            note=self._fewer(run, machine),
        )

    def _identity(
        self, run: Run, config: str, overrides: Mapping[str, Any], weights: Mapping[str, Part]
    ) -> str:
        """What decides the outcome of a training. Public weights count by their name, not by where they lie."""
        family, full = self.family(run), self.choice.scale == "full"
        machines = {*family.batch_keys, *(family.data_keys if full else ()), *weights}
        deciding = {key: value for key, value in overrides.items() if key not in machines}
        if full and run.weights:
            deciding[family.weights_key] = run.weights
        content = [family.launcher, config, run.finished, deciding]
        return json.dumps(content, sort_keys=True, default=str)

    def machine_of(self, run: Run) -> Machine:
        """What a run uses of the machine: a fine-tuning no more processes than divide its batch.

        Raises:
            ManifestError: a pre-training's batch does not divide among all.
        """
        machine = self.choice.machine
        if run.batch is None or run.finished or self.choice.scale != "full":
            return machine
        part = machine.dividing(run.batch)
        if part.processes < machine.processes and isinstance(run, Pretraining):
            raise ManifestError(
                f"{run.name}: the recipe's {run.batch} images do not divide among {machine.processes} processes; "
                f"of {machine.nodes} x {max(machine.gpus, 1)} the most that they divide among is "
                f"{part.processes}: --nodes {part.nodes} --gpus {part.gpus}"
            )
        return part

    def _fewer(self, run: Run, part: Machine) -> str:
        machine = self.choice.machine
        if part.processes == machine.processes:
            return ""
        return (
            f"on {part.nodes} x {part.gpus} of the {machine.nodes} x {machine.gpus} GPUs: its batch of "
            f"{run.batch} divides among no more"
        )

    def family(self, run: Run) -> Family:
        """Of a run's configuration."""
        return self.manifest.family(run.config)

    def configured(self, run: Run, family: Family) -> tuple[str, dict[str, Any]]:
        """The configuration of a run at this scale, and the overrides of its keys."""
        scale = self.choice.scale
        if scale == "quick":
            if not family.quick_config:
                raise ManifestError(f"{run.name} has no quick version: run it at --scale smoke or full")
            return family.quick_config, self._filled(family.quick)
        overrides = {**self._filled(family.data_keys), **run.overrides}
        if scale == "smoke":
            return run.config, {**overrides, **self._filled(family.smoke)}
        return run.config, {**overrides, **self._batch(run, family)}

    def _batch(self, run: Run, family: Family) -> dict[str, Any]:
        """Overrides that spread the recipe's batch over the processes."""
        if run.batch is None or not family.batch_keys or run.finished:
            return {}
        machine = self.machine_of(run)
        share = run.batch // machine.processes
        most = machine.images_per_gpu or run.images_per_gpu or family.images_per_gpu or share
        parts = next(n for n in range(max(math.ceil(share / most), 1), share + 1) if share % n == 0)
        if parts > 1 and "{accumulation}" not in family.batch_keys.values():
            raise ManifestError(
                f"{run.name} cannot accumulate: {share} images of the recipe's {run.batch} must fit each of "
                f"{machine.processes} processes; take more of them, up to {run.batch}, or --images-per-gpu "
                f"{share}"
            )
        values = {"{local}": share // parts, "{accumulation}": parts}
        return {key: values.get(str(value), value) for key, value in family.batch_keys.items()}

    def _filled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._fill(value) for key, value in values.items()}

    def _fill(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._fill(part) for part in value]
        return value.replace("{data}", str(self.data)) if isinstance(value, str) else value


@dataclass(frozen=True)
class Tool:
    """Arguments of a launcher, in its own style.

    Attributes:
        name: train_net, lazyconfig_train_net or train; config, folder: of the run; overrides: by key.
        finished: evaluate only.
    """

    name: str
    config: str
    folder: Path
    overrides: Mapping[str, Any]
    finished: bool = False

    def arguments(self) -> tuple[Part, ...]:
        """Tool and arguments; training resumes what it finds."""
        if self.name == "train":
            if self.finished:
                raise ManifestError(
                    f"{self.config}: finished weights are evaluated in detectron2 only so far"
                )
            start: list[Part] = ["tools/train.py", self.config, "--work-dir", str(self.folder), "--resume"]
            pairs = [joined(f"{key}=", value) for key, value in self.overrides.items()]
            return (*start, *(["--cfg-options", *pairs] if pairs else []))
        mode = "--eval-only" if self.finished else "--resume"
        start = [f"tools/{self.name}.py", "--config-file", self.config, mode]
        if self.name == "lazyconfig_train_net":
            values = {"train.output_dir": str(self.folder), **self.overrides}
            return (*start, *(joined(f"{key}=", value) for key, value in values.items()))
        values = {"OUTPUT_DIR": str(self.folder), **self.overrides}
        return (*start, *(part for key, value in values.items() for part in (key, joined("", value))))


def joined(before: str, value: Any) -> Part:
    """An override's text with what stands before it."""
    if isinstance(value, Argument):
        return Argument(before + value.before, value.checkpoint)
    if isinstance(value, (list, tuple)):
        return before + "[" + ",".join(map(repr, value)).replace("'", '"') + "]"
    return f"{before}{value}"


# --- what a configuration is made of


def config_chain(name: str) -> list[Path]:
    """A configuration and the files that it is based on, itself first.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    found: list[Path] = []
    waiting = [config_root() / name]
    while waiting:
        path = Path(os.path.normpath(waiting.pop(0)))
        if path in found:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"the configuration {path} is not there")
        found.append(path)
        waiting += [path.parent / base for base in _bases(path)]
    return found


def _bases(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        match = re.search(r"^_base_\s*=\s*(\[.*?\]|\(.*?\)|[\"'].*?[\"'])", text, re.MULTILINE | re.DOTALL)
        value = ast.literal_eval(match.group(1)) if match else []
    else:
        value = (yaml.safe_load(text) or {}).get("_BASE_", [])
    return [value] if isinstance(value, str) else list(value)


@cache
def config_hash(name: str) -> str:
    """SHA-256 over what a configuration and its bases say, without comments and layout; the first 16 digits."""
    digest = hashlib.sha256()
    for path in config_chain(name):
        text = path.read_text(encoding="utf-8")
        content = ast.dump(ast.parse(text)) if path.suffix == ".py" else json.dumps(yaml.safe_load(text))
        digest.update(content.encode())
    return digest.hexdigest()[:16]
