"""What each data set needs below DETECTRON2_DATASETS, what is there, and what to do about the rest.

A SET is one of the names below, a name that configurations use (ade20k_panoptic_val), or how such names begin
(ade20k). The command gives 0 when all that was asked for is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
    count, first = 0, ""
    for path in _matching(str(folder), part.pattern.split("/")):
        count, first = count + 1, first or path
    whole = count >= part.count
    if whole and part.pattern.endswith(".json") and part.count == 1:
        whole = _json_is_whole(Path(first))
    return Finding(part, count, whole)


def _matching(folder: str, names: Sequence[str]) -> Iterator[str]:
    """Paths below a folder, a pattern for each level. What is hidden, as what an interrupted run has left, is none.

    Reads folders and looks at no file, so that a million images take seconds.
    """
    name, *deeper = names
    try:
        if "*" in name:
            with os.scandir(folder) as entries:
                found = [e.path for e in entries if e.name[0] != "." and fnmatchcase(e.name, name)]
        else:
            found = [path] if os.path.lexists(path := os.path.join(folder, name)) else []
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in found:
        if deeper:
            yield from _matching(path, deeper)
        else:
            yield path


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


def published_count(name: str) -> int:
    """Files of a data set's first part, its images."""
    return select([name])[0].parts[0].count


def conclude(folder: Path, names: Sequence[str]) -> None:
    """Hold what a command has made to the published counts.

    Args:
        folder: of the data sets. names: see `select`.

    Raises:
        DataError: files are missing that training needs.
    """
    parts = dict.fromkeys(part for item in select(names) for part in item.parts)
    findings = [finding for finding in (examine(folder, part) for part in parts) if finding.hinders]
    if findings:
        missing = ", ".join(f"{finding.part.pattern} ({finding})" for finding in findings)
        raise DataError(
            f"{folder} is not complete: {missing}; add what is missing and run the command again, or add --any-count "
            "if the set is meant to be smaller."
        )


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
