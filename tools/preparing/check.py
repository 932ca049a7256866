"""What each data set needs below DETECTRON2_DATASETS, what is there, and what to do about the rest.

A SET is one of the names below, a name that configurations use (ade20k_panoptic_val), or how such names begin
(ade20k). The command gives 0 when all that was asked for is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import DataError
from .expected import DATA_SETS, SOURCES, DataSet, Part


@dataclass(frozen=True)
class Finding:
    """What is there of a part: the number of files, and whether that is all."""

    part: Part
    count: int
    whole: bool

    @property
    def hinders(self) -> bool:
        return not self.whole and not self.part.use

    def __str__(self) -> str:
        part = self.part
        if self.whole:
            return "ok" if part.count == 1 else f"ok, {self.count:,} files"
        if part.count == 1 and self.count:
            state = "damaged: it does not end as json does"
        else:
            state = f"{self.count:,} of {part.count:,} files" if self.count else "missing"
        return f"{state} (only for {part.use})" if part.use else state


def _json_is_whole(path: Path) -> bool:
    """Whether a file begins and ends as a json object does, which an interrupted copy does not."""
    with path.open("rb") as file:
        begin = file.read(64).lstrip()[:1]
        file.seek(max(path.stat().st_size - 64, 0))
        return begin == b"{" and file.read().rstrip()[-1:] == b"}"


def examine(folder: Path, part: Part) -> Finding:
    """Count the files of a part; of a json see whether it is whole."""
    files = list(folder.glob(part.pattern)) if folder.is_dir() else []
    whole = len(files) >= part.count
    if whole and part.pattern.endswith(".json") and part.count == 1:
        whole = _json_is_whole(files[0])
    return Finding(part, len(files), whole)


def select(names: Sequence[str]) -> list[DataSet]:
    """The data sets that names ask for; all without a name.

    Raises:
        DataError: a name asks for none.
    """
    if not names:
        return list(DATA_SETS)
    chosen: list[DataSet] = []
    for name in names:
        exact = [item for item in DATA_SETS if name == item.name or name in item.registered]
        found = exact or [
            item
            for item in DATA_SETS
            if any(known.startswith(name) for known in (item.name, *item.registered))
        ]
        if not found:
            raise DataError(
                f"no data set '{name}' is known: give one of {', '.join(item.name for item in DATA_SETS)}, or how "
                "they begin."
            )
        chosen.extend(item for item in found if item not in chosen)
    return chosen


def describe(item: DataSet, root: Path) -> tuple[list[str], bool]:
    """The lines on a data set, and whether it is complete."""
    folder = root / item.folder
    findings = [examine(folder, part) for part in item.parts]
    complete = not any(finding.hinders for finding in findings)
    width = max(len(part.pattern) for part in item.parts)
    lines = [
        f"{item.name} ({', '.join(item.registered)}): {'complete' if complete else 'incomplete'}",
        f"  {folder}/",
        *(f"    {finding.part.pattern:<{width}}  {finding}" for finding in findings),
    ]
    sources = dict.fromkeys(finding.part.source for finding in findings if not finding.whole)
    lines.extend(f"  to do: {SOURCES[source].format(root=root)}" for source in sources)
    return lines, complete


def report(names: Sequence[str], root: Path) -> bool:
    """Print what there is of the data sets that names ask for; whether all are complete.

    Args:
        names: see `select`.
        root: the folder of all data sets.

    Raises:
        DataError: an unknown name.
    """
    chosen = select(names)
    if not root.is_dir():
        print(f"{root} does not exist: set DETECTRON2_DATASETS to the folder of your data sets.\n")
    complete = []
    for item in chosen:
        lines, whole = describe(item, root)
        print("\n".join(lines), end="\n\n")
        complete.append(whole)
    print(f"{sum(complete)} of {len(complete)} data sets are complete.")
    return all(complete)
