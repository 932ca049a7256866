"""The manifest of everything the two papers report: configs/reproduction.yaml, read and checked.

It has five parts. `families` say how the configurations of one kind are run: what they train, how weights reach them,
how each scale shrinks them. `weights` are public files, `pretrainings` and `experiments` are runs with their
configurations and the papers' numbers, and `rows` are the papers' rows, which name them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from jepa_plugins.config_files import config_root

KINDS = ("run", "quote", "component", "figure")
ORIGINS = ("TRAIN", "LOAD", "ZOO", "QUOTE")
PAPERS = {"mask_jepa": "Mask-JEPA", "dmt_jepa": "DMT-JEPA"}
SCALES = ("smoke", "quick", "full")


class ManifestError(ValueError):
    """One sentence on what is wrong with the manifest, or with a name that is not in it."""


@dataclass(frozen=True)
class Family:
    """How the configurations of one kind are run.

    Attributes:
        name: of the family; match: patterns of configuration names, the first family that matches takes it.
        launcher: the tool that trains: train_net, lazyconfig_train_net, train.
        pretrains: whether its runs are pre-trainings.
        weights_key: override that takes a weight file; export: tool and arguments that turn a pre-training
            checkpoint into that file ({checkpoint}, {out}), empty when the checkpoint itself is read.
        data_keys: overrides that name the data, {data} being the root of all data sets.
        batch_keys: overrides that spread the recipe's batch ({local}, {accumulation}).
        images_per_gpu: the most images of a process at once, unless the user says otherwise; 0 for no limit.
        seed_key: override that takes the seed.
        smoke, quick: overrides of these scales; quick_config: the configuration that stands in at quick.
    """

    name: str
    match: tuple[str, ...]
    launcher: str
    seed_key: str
    pretrains: bool = False
    weights_key: str = ""
    export: tuple[str, ...] = ()
    data_keys: Mapping[str, Any] = field(default_factory=dict)
    batch_keys: Mapping[str, Any] = field(default_factory=dict)
    images_per_gpu: int = 0
    smoke: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    quick_config: str = ""


@dataclass(frozen=True)
class Weights:
    """A public weight file.

    Attributes:
        name: in the manifest; file: where runs look for it; how: what to do to have it; licence: as known.
        url: what the toolkit fetches when the file is not there; empty when nothing does.
    """

    name: str
    file: str
    how: str
    licence: str = "unknown"
    url: str = ""


@dataclass(frozen=True)
class Run:
    """A pre-training or an experiment.

    Attributes:
        name: in the manifest; config: below configs/, empty only when it waits; overrides: of its keys.
        data: keys of `data`; weights: key of `weights` or empty.
        gpu_hours: of the full run, and hours_source: where that number comes from; None and empty when unknown.
        batch: images of an optimiser step; images_per_gpu: the most of a process at once, 0 as the family says.
        waits_for: what the project does not have yet.
        finished: the run only evaluates its weights.
    """

    name: str
    config: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    weights: str = ""
    gpu_hours: float | None = None
    hours_source: str = ""
    batch: int | None = None
    images_per_gpu: int = 0
    waits_for: str = ""
    finished: bool = False

    @property
    def toolkit(self) -> str:
        """detectron2 or mmengine, by the configuration's folder; empty without a configuration."""
        return {"detectron2": "detectron2", "mmseg": "mmengine"}.get(self.config.split("/")[0], "")


@dataclass(frozen=True)
class Pretraining(Run):
    """A run without labels."""


@dataclass(frozen=True)
class Experiment(Run):
    """A run with labels and what the paper reports of it.

    Attributes:
        title: for people.
        pretraining: key of `pretrainings` or empty; export_options: further arguments of the export.
        metrics: the paper's number by our metric's name; spread: the paper's, over seeds.
        tables: where the paper prints it; baseline: the experiment that it is to be compared with.
        origin: of its numbers in the paper, of `ORIGINS`, where that is not its rows'.
        rerun: the paper marks them as its own re-run of another method's official code.
    """

    title: str = ""
    pretraining: str = ""
    export_options: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    baseline: str = ""
    origin: str = ""
    rerun: bool = False


@dataclass(frozen=True)
class Quote:
    """A number of another paper, which needs no run."""

    label: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the papers: one of `KINDS`, with what it needs.

    Attributes:
        number: 1 to 123; item: what it is; paper: key of `PAPERS`, or both for the project's own needs.
        where: sections, tables and figures; toolkits: detectron2, mmengine, or none; origin: of `ORIGINS`.
        pretrainings, experiments: names; quotes: numbers of other papers.
        weights: public files that a run of one's own could start from.
        tests: of a component, file::test; commands: of a figure; costs: configurations to measure.
        waits_for: what the project does not have yet; notes: keys of `notes`, the papers' contradictions.
    """

    number: int
    item: str
    kind: str
    paper: tuple[str, ...]
    where: tuple[str, ...] = ()
    toolkits: tuple[str, ...] = ()
    origin: tuple[str, ...] = ()
    pretrainings: tuple[str, ...] = ()
    experiments: tuple[str, ...] = ()
    quotes: tuple[Quote, ...] = ()
    weights: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    waits_for: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything, by name; rows by number.

    `data` says what to do to have a data set, `scale_data` how the small scales make theirs.
    """

    families: Mapping[str, Family]
    data: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, Weights]
    pretrainings: Mapping[str, Pretraining]
    experiments: Mapping[str, Experiment]
    rows: Mapping[int, Row]
    notes: Mapping[str, str]
    scale_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def family(self, config: str) -> Family:
        """The family of a configuration."""
        for family in self.families.values():
            if any(fnmatch(config, pattern) for pattern in family.match):
                return family
        raise ManifestError(f"no family of the manifest matches the configuration {config}")

    def row(self, number: int) -> Row:
        """A row by its number."""
        if number not in self.rows:
            raise ManifestError(f"there is no row {number}: rows are numbered from 1 to {max(self.rows)}")
        return self.rows[number]

    def experiments_of(self, rows: Iterable[Row]) -> list[Experiment]:
        """The experiments that rows name, each once."""
        return [self.experiments[name] for name in dict.fromkeys(n for row in rows for n in row.experiments)]

    def pretrainings_of(self, rows: Iterable[Row]) -> list[Pretraining]:
        """The pre-trainings that rows or their experiments name, each once."""
        chosen = list(rows)
        names = [name for row in chosen for name in row.pretrainings]
        names += [e.pretraining for e in self.experiments_of(chosen) if e.pretraining]
        return [self.pretrainings[name] for name in dict.fromkeys(names)]

    def costs_of(self, row: Row, scale: str) -> tuple[str, ...]:
        """Configurations whose cost a row measures; the small scales measure their quick twins."""
        if scale == "full":
            return row.costs
        return tuple(dict.fromkeys(self.family(config).quick_config or config for config in row.costs))

    def in_table(self, table: str) -> list[Row]:
        """Rows that a table of the papers shows, such as T1 or D.6."""
        found = [row for row in self.rows.values() if table in tables_of(self, row)]
        if not found:
            known = sorted({t for row in self.rows.values() for t in tables_of(self, row)})
            raise ManifestError(f"no row stands in table {table!r}; the manifest knows {', '.join(known)}")
        return found


def tables_of(manifest: Manifest, row: Row) -> list[str]:
    """Tables of a row: its own places, and those of its experiments and quotes."""
    places = [*row.where]
    for name in row.experiments:
        places += manifest.experiments[name].tables
    for quote in row.quotes:
        places += quote.tables
    return list(dict.fromkeys(places))


def default_path() -> Path:
    """The project's manifest."""
    return config_root() / "reproduction.yaml"


class _Loader(yaml.SafeLoader):
    """Plain values only; a name that stands twice in a mapping is an error, not the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, and not where values are made: by then a merge (<<) has joined its names to the mapping's own.
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in names:
                raise yaml.composer.ComposerError(None, None, f"{key.value} stands twice", key.start_mark)
            names.add(str(key.value))
        return node


def load_manifest(path: str | Path | None = None) -> Manifest:
    """Read and check a manifest.

    Raises:
        ManifestError: one sentence with the entry that is wrong.
        FileNotFoundError: no such file.
    """
    path = Path(path) if path is not None else default_path()
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a safe loader
    except yaml.YAMLError as error:
        raise ManifestError(f"{path} is no yaml file: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise ManifestError(f"{path} holds no mapping with families, rows and so on")
    known = {f.name for f in dataclasses.fields(Manifest)}
    if unknown := sorted(set(content) - known):
        raise ManifestError(
            f"{path} has unknown parts {', '.join(unknown)}; it knows {', '.join(sorted(known))}"
        )
    manifest = Manifest(
        families=_table(content, "families", Family),
        data=content.get("data") or {},
        weights=_table(content, "weights", Weights),
        pretrainings=_table(content, "pretrainings", Pretraining),
        experiments=_table(content, "experiments", Experiment),
        rows=_table(content, "rows", _row, key="number"),
        notes=content.get("notes") or {},
        scale_data=content.get("scale_data") or {},
    )
    _check(manifest)
    return manifest


def _row(**entry: Any) -> Row:
    name, found = str(entry.get("number")), entry.pop("quotes", ())
    if not isinstance(found, (list, tuple)) or not all(isinstance(quote, Mapping) for quote in found):
        raise ManifestError(f"row {name}: quotes is a list of mappings with label, metrics and so on")
    quotes = tuple(_entry("quote", str(quote.get("label")), Quote, quote) for quote in found)
    return _entry("row", name, Row, {**entry, "quotes": quotes})


def _table(content: Mapping[str, Any], part: str, build: Any, key: str = "name") -> dict:
    entries = content.get(part) or {}
    if not isinstance(entries, Mapping):
        raise ManifestError(f"{part} is no mapping from names to entries")
    built = {}
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise ManifestError(f"{part} {name} is no mapping")
        values = {key: name, **{str(k): v for k, v in entry.items()}}
        built[name] = build(**values) if build is _row else _entry(part, str(name), build, values)
    return built


def _entry(part: str, name: str, kind: type, values: Mapping[str, Any]) -> Any:
    """One entry of the manifest; lists become tuples, and one string stands for a list of one."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise ManifestError(f"{part} {name}: unknown {', '.join(unknown)}; it knows {', '.join(fields)}")
    ready = {}
    for key, value in values.items():
        if str(fields[key].type).startswith("tuple"):
            value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        elif str(fields[key].type).startswith("Mapping") and not isinstance(value, Mapping):
            raise ManifestError(f"{part} {name}: {key} is no mapping")
        if key in ("metrics", "spread") and (bad := [k for k, v in value.items() if not _is_number(v)]):
            raise ManifestError(f"{part} {name}: {key} of {', '.join(bad)} is no number")
        ready[key] = value
    try:
        return kind(**ready)
    except TypeError as error:
        raise ManifestError(f"{part} {name}: {str(error).split('__init__() ')[-1]}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(manifest: Manifest) -> None:
    """Names that are used must exist, and a row must have what its kind needs."""

    def known(owner: str, names: Iterable[str], table: Mapping[str, Any], part: str) -> None:
        for name in names:
            if name and name not in table:
                raise ManifestError(f"{owner} names {name!r}, which is not among the {part} of the manifest")

    for run in (*manifest.pretrainings.values(), *manifest.experiments.values()):
        known(run.name, run.data, manifest.data, "data")
        known(run.name, [run.weights], manifest.weights, "weights")
        if not run.config:
            if not run.waits_for:
                raise ManifestError(f"{run.name} has no config, and says not what it waits for")
        elif manifest.family(run.config).pretrains != isinstance(run, Pretraining):
            raise ManifestError(f"{run.name} stands in the wrong part of the manifest for {run.config}")
    for run in manifest.experiments.values():
        known(run.name, [run.pretraining], manifest.pretrainings, "pretrainings")
        known(run.name, [run.baseline], manifest.experiments, "experiments")
        known(run.name, [run.origin], dict.fromkeys(ORIGINS), "origins")
    needs = {"run": ("pretrainings", "experiments", "costs"), "quote": ("quotes",), "component": ("tests",)}
    needs["figure"] = ("commands",)
    for row in manifest.rows.values():
        owner = f"row {row.number}"
        known(owner, row.pretrainings, manifest.pretrainings, "pretrainings")
        known(owner, row.experiments, manifest.experiments, "experiments")
        known(owner, row.weights, manifest.weights, "weights")
        known(owner, row.notes, manifest.notes, "notes")
        known(owner, row.paper, PAPERS, "papers")
        known(owner, row.origin, dict.fromkeys(ORIGINS), "origins")
        if row.kind not in KINDS:
            raise ManifestError(f"{owner} is of the kind {row.kind!r}; give one of {', '.join(KINDS)}")
        if not row.waits_for and not any(getattr(row, part) for part in needs[row.kind]):
            raise ManifestError(f"{owner} is a {row.kind} and needs {' or '.join(needs[row.kind])}")
