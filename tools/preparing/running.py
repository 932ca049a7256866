"""What the commands share: processes, progress, files that are whole or absent, and runs that go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import Image

from . import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
Advance = Callable[[Iterable[Any]], Iterator[Any]]


# --- processes and progress --------------------------------------------------------------------------------


def _leave_interrupts_to_the_main_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def mapper(workers: int, chunk: int = 16) -> Iterator[Run]:
    """A ``map`` that keeps the order: over processes, or in this one when there is one worker."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers, initializer=_leave_interrupts_to_the_main_process) as pool:
        try:
            yield partial(pool.map, chunksize=chunk)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A function that passes items on and shows how many of ``total`` have passed (lines without rich)."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield partial(_print_progress, {"done": 0, "shown": time.monotonic()}, what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Refreshed by hand: rich's own thread must not run while worker processes are forked.
    with Progress(*columns, auto_refresh=False) as bar:
        task = bar.add_task(what, total=total)

        def advance(items: Iterable[Any]) -> Iterator[Any]:
            for done, item in enumerate(items):
                bar.update(task, advance=1, refresh=done % 16 == 0)
                yield item

        yield advance


def _print_progress(state: dict[str, float], what: str, total: int, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        state["done"] += 1
        if time.monotonic() - state["shown"] > 5 or state["done"] == total:
            state["shown"] = time.monotonic()
            print(f"{what}: {int(state['done'])}/{total}", flush=True)
        yield item


def run_all(
    what: str, work: Callable[[Item], Result], items: Sequence[Item], workers: int, chunk: int = 16
) -> Iterator[Result]:
    """The results of ``work`` for all items, in their order, with a progress line; nothing for no items.

    Raises:
        DataError: fewer than one worker; and whatever ``work`` raises.
    """
    if workers < 1:
        raise DataError(f"--workers is {workers}: give a number from 1.")
    if not items:
        return
    with mapper(min(workers, len(items)), chunk) as run, progress(what, len(items)) as advance:
        yield from advance(run(work, items))


def work_off(
    what: str, work: Callable[[Item], Any], items: Sequence[Item], workers: int, chunk: int = 16
) -> None:
    """`run_all` for work without a result."""
    for _ in run_all(what, work, items, workers, chunk):
        pass


# --- files -------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Give ``path`` what ``write`` writes, all of it or nothing: under another name first, then renamed.

    Unlike ``core.checkpoints.atomic_write`` it does not wait for the disk: there are many small files, and
    `is_whole` finds those that a power failure leaves empty.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(scratch, "wb") as file:
            write(file)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def is_whole(path: Path) -> bool:
    """Whether a file that `write_whole` writes is there."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def write_png(path: Path, pixels: Any) -> None:
    """An array of pixels as a PNG file, by `write_whole`."""
    write_whole(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))


def write_json(path: Path, content: Any) -> None:
    """Content as a json file, by `write_whole`."""
    write_whole(path, lambda file: file.write(json.dumps(content).encode()))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object of a json file.

    Raises:
        DataError: it is missing or damaged; ``remedy`` says what to do.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {remedy}.") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): {remedy}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no json object: {remedy}.")
    return content


class Journal:
    """Results by name, kept beside the file that they will make up, so that an interrupted run goes on.

    Args:
        target: the file; the journal is hidden beside it.
    """

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f".{target.name}.journal")

    def read(self) -> dict[str, Any]:
        """What is kept; a line that was cut short is left out."""
        kept: dict[str, Any] = {}
        if not self.path.exists():
            return kept
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    name, result = json.loads(line)
                except ValueError:
                    continue
                kept[name] = result
        return kept

    def collect(self, known: dict[str, Any], names: Sequence[str], results: Iterable[Any]) -> None:
        """Put results into ``known`` by name, and keep each as it comes."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n")  # ends a line that was cut short
            for name, result in zip(names, results, strict=True):
                known[name] = result
                file.write(json.dumps([name, result]) + "\n")
                file.flush()

    def remove(self) -> None:
        """When the file is written."""
        self.path.unlink(missing_ok=True)


# --- folders of generated data -----------------------------------------------------------------------------


def already_there(out: Path, meta: dict[str, Any], overwrite: bool) -> bool:
    """Whether ``out`` holds exactly the generated data that ``meta`` describes, by its ``meta.json``.

    Raises:
        DataError: it holds something that may not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "meta.json").read_text())
        generator = found["generator"]
    except (OSError, ValueError, TypeError, KeyError):
        generator = None
    if generator != meta["generator"]:
        raise DataError(f"{out} holds files that are not generated data: choose another --out or empty it.")
    if found == meta and not overwrite:
        return True
    if not overwrite:
        different = [f"{k} {found.get(k)} instead of {meta[k]}" for k in meta if found.get(k) != meta[k]]
        what = ", ".join(different) or "unknown entries in meta.json"
        raise DataError(f"{out} holds other generated data ({what}): add --overwrite to replace it.")
    return False


def replace_folder(new: Path, out: Path) -> None:
    """Give ``new`` the name ``out``; what was there is removed only after it has been moved away."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
