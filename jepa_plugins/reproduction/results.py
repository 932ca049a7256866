"""Results of runs: one JSON file each, written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from jepa_plugins.core.checkpoints import atomic_write

PACKAGES = (
    "jepa_plugins",
    "torch",
    "torchvision",
    "timm",
    "detectron2",
    "mmengine",
    "mmcv",
    "mmsegmentation",
    "numpy",
)
FORKS = {"mmengine": "onedl-mmengine", "mmcv": "onedl-mmcv", "mmsegmentation": "onedl-mmsegmentation"}


@dataclass(frozen=True)
class Result:
    """What a finished run gave.

    Attributes:
        name: of the experiment or pre-training in the manifest; kind: experiment or pretraining.
        scale: smoke, quick or full; seed: of the run.
        config: its configuration; config_hash: of that file and its bases; overrides: of its keys.
        pretraining: of an experiment, its name or empty.
        commit: of the project, with -dirty when files had changed; versions, hardware: of the machine.
        processes: how many trained; seconds: of wall time; command: as run; finished: time in ISO 8601.
        protocol: crop, interpolation, layers, test size, scales, and what else decides a number; see `protocol_of`.
        metrics: by name, as the toolkit reports them; undefined: names of those that have no finite value.
        fingerprint: of everything that decides the outcome; see `Runner.fingerprint`.
    """

    name: str
    kind: str
    scale: str
    seed: int
    config: str
    metrics: Mapping[str, float]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    config_hash: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    pretraining: str = ""
    commit: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    seconds: float = 0.0
    command: str = ""
    finished: str = ""
    undefined: tuple[str, ...] = ()
    fingerprint: str = ""


class Results:
    """The result files below a folder, OUT/SCALE/results/NAME__seed_S.json.

    Args:
        out: folder of all scales.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)

    def path(self, name: str, scale: str, seed: int) -> Path:
        """File of one result."""
        return self.out / scale / "results" / f"{name}__seed_{seed}.json"

    def save(self, result: Result) -> Path:
        """Write a result."""
        path = self.path(result.name, result.scale, result.seed)
        write_json(path, dataclasses.asdict(result))
        return path

    def load(self, scale: str) -> list[Result]:
        """All results of a scale, by name and seed.

        Raises:
            ValueError: one sentence that names a file that is no result.
        """
        found = [read_result(path) for path in sorted((self.out / scale / "results").glob("*.json"))]
        return sorted(found, key=lambda result: (result.name, result.seed))

    def of(self, name: str, scale: str) -> list[Result]:
        """Results of one experiment or pre-training, by seed."""
        return [result for result in self.load(scale) if result.name == name]


_AGAIN = "move it away and run again"
_TEXTS = ("name", "kind", "scale", "config", "config_hash", "pretraining", "commit", "command", "finished")
_MAPPINGS = ("metrics", "protocol", "overrides", "versions", "hardware")


def read_result(path: Path) -> Result:
    """One file; ValueError in one sentence when it is no result."""
    content = read_json(path, dict, _AGAIN)
    try:
        found = Result(**{**content, "undefined": tuple(content.get("undefined", ()))})
    except TypeError as error:
        reason = str(error).split("__init__() ")[-1]
        raise ValueError(f"{path} is no result of this project ({reason}): {_AGAIN}") from None
    kinds: dict[str, Any] = {
        **dict.fromkeys((*_TEXTS, "fingerprint"), str),
        **dict.fromkeys(_MAPPINGS, dict),
        **dict.fromkeys(("seed", "processes"), int),
        "seconds": (int, float),
    }
    if wrong := [key for key, kind in kinds.items() if not isinstance(getattr(found, key), kind)]:
        raise ValueError(
            f"{path} is no result of this project ({', '.join(wrong)}: of another type): {_AGAIN}"
        )
    return found


def read_json(path: Path, kind: type, remedy: str) -> Any:
    """The content of a JSON file.

    Args:
        kind: that it must be of, dict or list; remedy: what to do about a broken file, the end of the sentence.

    Raises:
        FileNotFoundError: one sentence with the file, which is not there.
        ValueError: one sentence with the file, which is no JSON or of another kind, and the remedy.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there: {remedy}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no JSON file that can be read ({error}): {remedy}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds no JSON {'object' if kind is dict else 'list'}: {remedy}")
    return content


def read_costs(path: Path) -> dict[str, Any]:
    """What benchmarks/cost.py wrote: {"runs": [{"config": ...}, ...], "hardware": ..., ...}.

    Raises:
        FileNotFoundError, ValueError: one sentence with the file and the remedy.
    """
    remedy = "write it with python benchmarks/cost.py CONFIG --out FILE"
    content = read_json(path, dict, remedy)
    runs = content.get("runs")
    if not isinstance(runs, list) or not runs or not all(_is_cost(run) for run in runs):
        raise ValueError(f"{path} holds no list of measured runs with their configurations: {remedy}")
    hardware_of = content.get("hardware")
    if not isinstance(hardware_of, Mapping) or not isinstance(hardware_of.get("gpus"), list):
        raise ValueError(f"{path} does not say on which hardware it was measured: {remedy}")
    return content


def measured_costs(out: Path, scale: str) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """What rows of a scale have cost, and sentences on files that hold nothing of the kind.

    Raises:
        ValueError: one sentence with a file that is no JSON.
    """
    found: list[dict[str, Any]] = []
    bad: dict[Path, str] = {}
    for path in sorted((out / scale / "costs").glob("*/costs.json")):
        read_json(path, dict, "move it away and measure again")
        try:
            found.append(read_costs(path))
        except ValueError as error:
            bad[path] = f"{path} does not count: {str(error).removeprefix(f'{path} ')}"
    return found, bad


def _is_cost(run: Any) -> bool:
    """Whether an entry names its configuration and its hours are a number, if it has any."""
    if not isinstance(run, Mapping) or not isinstance(run.get("config"), str):
        return False
    return run.get("gpu_hours") is None or type(run["gpu_hours"]) in (int, float)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


@dataclass(frozen=True)
class Summary:
    """A metric over seeds: median, smallest, largest, number of seeds."""

    median: float
    low: float
    high: float
    seeds: int


def summarise(results: Iterable[Result], metric: str) -> Summary | None:
    """A metric over the results that have it; None when none has."""
    values = [result.metrics[metric] for result in results if metric in result.metrics]
    return Summary(median(values), min(values), max(values), len(values)) if values else None


def commit_of(root: Path) -> str:
    """Commit of a clone, with -dirty and a hash of the changes when there are any; else the package's version."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return f"version {versions().get('jepa_plugins', 'unknown')}"
    return commit + (f"-dirty-{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else "")


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of what decides a number, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        for distribution in (name, FORKS.get(name, name)):
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, its cores, and GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": _processor(), "cores": cores, "gpus": gpus}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
