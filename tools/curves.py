#!/usr/bin/env python3
"""Curves of pre-training runs in one picture: the loss, and what tells learning from collapse.

python tools/curves.py work_dirs/quick/dmt_jepa work_dirs/quick/ijepa --out curves.png --probe probe.json

Reads the folders of mmengine runs (vis_data/scalars.json of every start, joined where a run was resumed) and of
detectron2 runs (metrics.json). Drawn are the loss, the target's variance, the dense RankMe of the centred target over
its first value, the explained variance, and a probe's score over time: from files of tools/vit_probe.py, or as a run
logged it while it trained, with its floors as dotted lines; and, if a run logged them, the measures of held-out
images. A table of the same values is printed: at the start, at
quarters of the run, at its end, and the lowest. Losses of different methods do not compare; a loss that falls with
the target's variance or its RankMe shows a collapse.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

import matplotlib  # noqa: E402

from jepa_plugins.core.cli import one_sentence  # noqa: E402
from jepa_plugins.core.probes import FLOORS  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.backend_bases import FigureCanvasBase  # noqa: E402

Points = dict[int, float]  # a value by its step
COLUMNS = 3
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOWEST_SHOWN = -1.0  # of the explained variance, which starts far below
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Measure:
    """A panel: its title, the names that logs give the value, and whether its first value is the unit.

    A rare one is measured more rarely than logged, so of equal values in a row the first counts. `lowest` is shown at
    most, of a value that may start far below.
    """

    title: str
    names: tuple[str, ...]
    relative: bool = False
    rare: bool = False
    lowest: float = -math.inf

    def of(self, series: Mapping[str, Points]) -> Points:
        """Its points in a run; empty when the run did not log it."""
        found = next((series[name] for name in self.names if series.get(name)), {})
        points = dict(sorted(found.items()))
        if self.rare and points:
            points = changes(points)
        if not (self.relative and points):
            return points
        first = next(iter(points.values()))
        return {step: value / first if first else math.nan for step, value in points.items()}


def changes(points: Points) -> Points:
    """Without the values that only repeat the one before them; the last stays."""
    steps = list(points)
    kept = [a for a, b in zip(steps[1:-1], steps, strict=False) if points[a] != points[b]]
    return {step: points[step] for step in dict.fromkeys([steps[0], *kept, steps[-1]])}


MEASURES = (
    Measure("loss", ("loss", "total_loss")),
    Measure("target variance", ("target_variance",)),
    Measure("dense RankMe / its first value", ("rankme_dense_centred",), relative=True, rare=True),
    Measure("explained variance", ("explained_variance",), lowest=LOWEST_SHOWN),
)


def held_out(title: str, name: str, lowest: float = -math.inf) -> Measure:
    """What a hook (mmengine) or an evaluation (detectron2) logs of images that do not train."""
    names = (f"held_out_{name}", f"held_out/{name}")
    return Measure(f"held out: {title}", names, rare=True, lowest=lowest)


HELD_OUT = (
    held_out("target variance", "target_variance"),
    held_out("explained variance", "explained_variance", LOWEST_SHOWN),
    held_out("explained beyond position", "explained_variance_beyond_position", LOWEST_SHOWN),
)


@dataclass
class Probes:
    """Scores over time by (run, encoder), and the floors by name."""

    curves: dict[tuple[str, str], Points] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)


# --- reading


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log; a last line that is still being written is left out.

    Raises:
        ValueError: another line is no JSON object.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        try:
            content = json.loads(line)
        except ValueError:
            if i + 1 == len(lines):
                return
            content = None
        if not isinstance(content, dict):
            raise ValueError(f"line {i + 1} of '{file}' is no JSON object: it is no log of a training run")
        yield content


def joined(logs: Iterable[tuple[Path, str]]) -> dict[str, Points]:
    """Series of the starts of one run, oldest first; `logs`: (file, name of the step in it).

    What an earlier start logged from a later one's first step on is left out: that course was given up.
    """
    series: dict[str, Points] = {}
    for file, key in logs:
        entries = [(int(entry[key]), entry) for entry in json_lines(file) if key in entry]
        first = min((step for step, _ in entries), default=math.inf)
        for points in series.values():
            for step in [step for step in points if step >= first]:
                del points[step]
        for step, entry in entries:
            for name, value in entry.items():
                if name != key and isinstance(value, (int, float)):
                    series.setdefault(name, {})[step] = float(value)
    return series


def read_run(folder: str) -> dict[str, Points]:
    """Every logged value of a run by name.

    Raises:
        FileNotFoundError: no such folder, or no log in it. ValueError: a damaged log.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"the run's folder '{folder}' does not exist")
    logs = [(file, "step") for file in sorted(root.glob("*/vis_data/scalars.json"))]  # named by their time
    if (root / "metrics.json").is_file():
        logs.append((root / "metrics.json", "iteration"))
    series = joined(logs)
    if not series:
        raise FileNotFoundError(
            f"'{folder}' holds no values of a run: give a work_dir of mmengine (with */vis_data/scalars.json) or an "
            "OUTPUT_DIR of detectron2 (with metrics.json)"
        )
    return series


def run_names(folders: Sequence[str]) -> list[str]:
    """The folders' own names, or their paths where those are not unique."""
    names = [Path(folder).absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(Path(folder)) for folder in folders]


def read_probes(files: Sequence[str], score: str) -> Probes:
    """Files of tools/vit_probe.py; runs of one name are called by their paths, as `run_names` does.

    Raises:
        FileNotFoundError, ValueError: no such file; no such score in it; files that were measured differently.
    """
    probes, contents = Probes(), {}
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no file '{file}' (--probe)")
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{file}' is no valid json ({error}): give what vit_probe.py wrote") from error
        if not isinstance(content, dict) or "protocol" not in content:
            raise ValueError(f"'{file}' has no \"protocol\": give what vit_probe.py wrote (--probe)")
        contents[file] = content
    folders: dict[str, set[Path]] = {}  # of runs of one name
    for content in contents.values():
        for row in content.values():
            if "run" in row:
                folders.setdefault(row["run"], set()).add(Path(row["file"]).parent)
    for file, content in contents.items():
        for row in content.values():
            if "run" in row and len(folders[row["run"]]) > 1:
                row["run"] = str(Path(row["file"]).parent)
        add_probes(probes, content, score, file)
    return probes


def add_probes(probes: Probes, content: dict[str, Any], score: str, file: str) -> None:
    """Take one file's scores."""
    own = ("config", "untrained_seeds", "probes")
    protocol = {name: value for name, value in content["protocol"].items() if name not in own}
    if probes.protocol and protocol != probes.protocol:
        different = sorted(k for k in protocol if protocol[k] != probes.protocol.get(k))
        raise ValueError(
            f"'{file}' was measured with other values of {', '.join(different)} than the files before it: probe "
            "all checkpoints in the same way"
        )
    probes.protocol = protocol
    for label, row in content.items():
        if label == "protocol":
            continue
        if score not in row:
            known = sorted(name for name, value in row.items() if name.endswith(("_mIoU", "_accuracy")))
            raise ValueError(f"'{file}' holds no {score}: give --score one of {', '.join(known)}")
        if "run" in row:
            if row["step"] is not None:
                curve = probes.curves.setdefault((row["run"], row["encoder"]), {})
                curve[row["step"]] = row[score]
        elif label in (*FLOORS, "untrained"):
            if probes.floors.get(label, row[score]) != row[score]:
                label = f"{label} ({Path(content['protocol']['config']).stem})"
            probes.floors[label] = row[score]


def add_logged(probes: Probes, name: str, series: Mapping[str, Points], score: str) -> None:
    """Take the scores that a run logged while it trained, unless a file holds the run's."""
    if any(run == name for run, _ in probes.curves):
        return
    for encoder, suffix in (("target", ""), ("context", "_context")):
        if points := series.get(f"probe/{score}{suffix}"):
            probes.curves[name, encoder] = dict(sorted(points.items()))
    for floor in FLOORS:
        if points := series.get(f"probe/{score}_{floor}"):
            probes.floors.setdefault(floor, points[max(points)])


# --- table


def at_quarters(points: Points) -> list[float]:
    """Values at the shares `QUARTERS` of the last step, each of the nearest step that was logged."""
    last = max(points)
    return [points[min(points, key=lambda step: abs(step - share * last))] for share in QUARTERS]


def summary(rows: Sequence[tuple[str, str, Points]]) -> str:
    """(run, measure, points) of each row -> aligned text."""
    head = ["run", "measure", *(f"{share:.0%}" for share in QUARTERS), "lowest", "at step"]
    lines = [head]
    for run, measure, points in rows:
        finite = {step: value for step, value in points.items() if math.isfinite(value)}
        lowest = min(finite, key=lambda step: finite[step]) if finite else None
        values = [*at_quarters(points), math.nan if lowest is None else finite[lowest]]
        numbers = [f"{value:.4g}" for value in values]
        lines.append([run, measure, *numbers, "-" if lowest is None else str(lowest)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = []
    for line in lines:
        cells = [
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        aligned.append("  ".join(cells).rstrip())
    return "\n".join(aligned)


def measures_of(runs: Mapping[str, Mapping[str, Points]]) -> list[Measure]:
    """The panels: those of every picture, and of held-out images what a run has logged."""
    return [*MEASURES, *(m for m in HELD_OUT if any(m.of(series) for series in runs.values()))]


def rows_of(runs: Mapping[str, Mapping[str, Points]], probes: Probes, score: str) -> list:
    """What the table shows."""
    rows = [
        (name, measure.title, points)
        for name, series in runs.items()
        for measure in measures_of(runs)
        if (points := measure.of(series))
    ]
    curves = probes.curves.items()
    return rows + [(run, f"{score}, {encoder}", points) for (run, encoder), points in curves]


# --- picture


def draw(runs: Mapping[str, Mapping[str, Points]], probes: Probes, score: str, path: str) -> None:
    """All panels, one colour a run."""
    names = list(dict.fromkeys([*runs, *(run for run, _ in probes.curves)]))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    lines = {name: STYLES[i // 10 % len(STYLES)] for i, name in enumerate(names)}  # when colours repeat
    measures = measures_of(runs)
    rows = -(-(len(measures) + 2) // COLUMNS)  # two more, for the probes and the legend
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(13, 3.5 * rows), layout="constrained")
    *panels, probed, legend = list(grid.flat)[: len(measures) + 2]
    for axis, measure in zip(panels, measures, strict=True):
        axis.set_title(measure.title, fontsize=10)
        for name, series in runs.items():
            points = measure.of(series)
            axis.plot(list(points), list(points.values()), lines[name], color=colours[name], lw=1.2)
        if measure.relative:
            axis.axhline(1, color="0.7", lw=0.8)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], measure.lowest))
    draw_probes(probed, probes, colours, score)
    probed.set_xlim(left=min(probed.get_xlim()[0], 0))
    handles = [plt.Line2D([], [], color=colours[name], ls=lines[name], label=name) for name in names]
    legend.legend(handles=handles, loc="center", frameon=False, fontsize=9)
    for axis in list(grid.flat)[len(measures) + 1 :]:
        axis.axis("off")
    for axis in (*panels, probed):
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.92")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_probes(axis: Any, probes: Probes, colours: Mapping[str, str], score: str) -> None:
    """Scores over time; the context encoder's dashed, the floors dotted and named at the right and left."""
    if not (probes.curves or probes.floors):
        axis.axis("off")
        return
    axis.set_title(f"{score.replace('_', ' ')} of frozen features, %", fontsize=10)
    for (run, encoder), points in probes.curves.items():
        points = dict(sorted(points.items()))
        style = "o-" if encoder == "target" else "s--"
        axis.plot(list(points), list(points.values()), style, color=colours[run], ms=3, lw=1.2)
    # in turn, so that the names of two floors of nearly one height do not cover each other
    for i, (name, value) in enumerate(sorted(probes.floors.items(), key=lambda floor: floor[1])):
        axis.axhline(value, color="0.35", ls=":", lw=1)
        axis.annotate(
            name.replace("_", " + "),
            ((1, 0)[i % 2], value),
            xycoords=("axes fraction", "data"),
            fontsize=7,
            ha=("right", "left")[i % 2],
            va="bottom",
        )


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="work_dir or OUTPUT_DIR of a run")
    parser.add_argument("--out", required=True, metavar="FILE", help="the picture, .png, .pdf or .svg")
    parser.add_argument(
        "--probe", nargs="*", default=[], metavar="FILE", help="what tools/vit_probe.py wrote"
    )
    parser.add_argument("--score", default="linear_mIoU", help="of the probes, such as knn_accuracy")
    return parser


def run() -> None:
    """Draw as the command line says."""
    args = build_parser().parse_args()
    if Path(args.out).suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--out {args.out}: give a name that ends in .png, .pdf or .svg")
    runs = {name: read_run(folder) for name, folder in zip(run_names(args.runs), args.runs, strict=True)}
    probes = read_probes(args.probe, args.score)
    for name, series in runs.items():
        add_logged(probes, name, series, args.score)
    print(summary(rows_of(runs, probes, args.score)))
    draw(runs, probes, args.score, args.out)
    print(args.out)


def main() -> None:
    """Command line."""
    one_sentence(run)()


if __name__ == "__main__":
    main()
