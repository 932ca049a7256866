"""What full-size stages read, whether it is there, and how long they take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_plugins.reproduction.plan import Planner, Stage

SHOWN = 3  # kinds of files that are named when they are missing
DETECTRON2_URL = "https://dl.fbaipublicfiles.com/"  # what follows it names the file in the cache of iopath


@dataclass(frozen=True)
class Stock:
    """Files of a data set.

    Attributes:
        files: how many training and evaluation ask for and are there; lacking: what is not, in words.
    """

    files: int
    lacking: tuple[str, ...] = ()


# Looks a data set up: what `prepare_data.py check` calls it, and the root of all data sets.
Check = Callable[[str, Path], Stock]


@dataclass(frozen=True)
class Need:
    """A data set or a weight file that full-size runs read.

    Attributes:
        name: in the manifest; what: data or weights; there: whether runs find it.
        found: what there is, in words; how: what to do for it.
    """

    name: str
    what: str
    there: bool
    found: str
    how: str

    def __str__(self) -> str:
        head = f"{self.what} {self.name}: "
        return head + (self.found if self.there else f"MISSING: {self.found}; {self.how}")


def needs_of(planner: Planner, stages: Iterable[Stage], check: Check | None = None) -> list[Need]:
    """What full-size stages read, and whether it is there.

    Args:
        planner: that made them; check: counts the files of a data set. Without it, and for data sets that name
            none, it is enough that the files and folders exist which the manifest names.
    """
    runs = [stage.run for stage in stages if stage.run is not None]
    data = dict.fromkeys(key for run in runs for key in run.data)
    weights = dict.fromkeys(run.weights for run in runs if run.weights)
    return [*(_data(planner, name, check) for name in data), *(_weights(planner, name) for name in weights)]


def _data(planner: Planner, name: str, check: Check | None) -> Need:
    entry, root = planner.manifest.data[name], planner.choice.data
    how = str(entry.get("how", "")).replace("DATA", str(root))
    if check is not None and entry.get("check"):
        stock = check(str(entry["check"]), root)
        more = [f"{len(stock.lacking) - SHOWN} more kinds of files"] if len(stock.lacking) > SHOWN else []
        found = "; ".join([*stock.lacking[:SHOWN], *more]) or f"there, {stock.files:,} files"
        return Need(name, "data", not stock.lacking, found, how)
    lacking = [str(root / path) for path in entry.get("needs", ()) if not (root / path).exists()]
    return Need(name, "data", not lacking, f"no {', '.join(lacking)}" if lacking else "there", how)


def _weights(planner: Planner, name: str) -> Need:
    file, how = planner.weight_file(name), weights_remedy(planner, name)
    if "://" in file:  # the toolkit fetches it
        found = "there, fetched before" if _is_cached(file) else "fetched when it is needed"
        return Need(name, "weights", True, found, how)
    there = (planner.choice.root / Path(file).expanduser()).is_file()
    return Need(name, "weights", there, f"there, {file}" if there else f"no {file}", how)


def weights_remedy(planner: Planner, name: str) -> str:
    """What to do for public weights that are not there."""
    return f"{planner.manifest.weights[name].how}; or name another place with --weights {name}=FILE"


def _is_cached(url: str) -> bool:
    """Whether iopath, which detectron2 downloads with, has a file already."""
    cache = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    address = url.replace("detectron2://", f"{DETECTRON2_URL}detectron2/")
    return address.startswith(DETECTRON2_URL) and (cache / address.removeprefix(DETECTRON2_URL)).is_file()


@dataclass(frozen=True)
class Hours:
    """GPU-hours of a full-size run.

    Attributes:
        name: of the stage; hours: None when nobody has said; source: of the number.
    """

    name: str
    hours: float | None
    source: str

    def __str__(self) -> str:
        if self.hours is None:
            return f"{self.name}: no public figure; measure with benchmarks/cost.py and --costs"
        return f"{self.name}: {self.hours:,.1f} ({self.source})"


def hours_of(stages: Iterable[Stage], costs: Iterable[Mapping[str, Any]] = ()) -> list[Hours]:
    """What the full-size trainings among stages take: as measured on a GPU, or else as others have published.

    Args:
        costs: contents of files that benchmarks/cost.py wrote.
    """
    measured = {
        entry["config"]: (
            entry["gpu_hours"],
            f"measured on {' and '.join(file['hardware']['gpus']) or 'a GPU'}",
        )
        for file in costs
        for entry in file["runs"]
        if entry.get("gpu_hours") is not None
    }
    trainings = [(stage.name, stage.run) for stage in stages if stage.run and not stage.run.finished]
    return [
        Hours(name, *measured.get(run.config, (run.gpu_hours, run.hours_source))) for name, run in trainings
    ]
