"""Shares of a data set for low-data runs: which images, by a rule that depends on their names alone.

The paper says how many images it takes, not which (Mask-JEPA, section 4.3, table 4). Here images are ordered by the
SHA-256 of their names, and a share is the beginning of that order. So all arms and tasks, on every machine, train on
the same images, a smaller share lies inside a larger one, and neither the order of the files nor a library's random
generator has a say.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from fractions import Fraction

LOW_DATA_PERCENT = (1, 2, 5, 10)
"""Shares of the paper's table 4, in percent."""

_KEY = "low data"


def stem_of(path: str | os.PathLike[str]) -> str:
    """A file's name without folder and suffix, which an image and its label image have in common."""
    return os.path.splitext(os.path.basename(os.fspath(path)))[0]


def share_size(count: int, percent: str | int) -> int:
    """Images in a share: `percent` of `count`, rounded down, but at least one of those there are.

    Raises:
        ValueError: `percent` is no number above 0 and up to 100.
    """
    try:
        part = Fraction(percent)  # of text: 0.1 is a tenth, which no float is
    except (ValueError, ZeroDivisionError):
        part = Fraction(0)
    if not 0 < part <= 100:
        raise ValueError(f"'{percent}' is no percentage above 0 and up to 100: give one such as 5 or 0.5.")
    return min(count, max(1, int(count * part / 100)))


def share_of(names: Iterable[str], percent: str | int) -> list[str]:
    """The names of a share, sorted.

    Args:
        names: of all images, in any order; a name that comes twice counts once.
        percent: above 0 and up to 100.

    Raises:
        ValueError: as `share_size`.
    """
    distinct = set(names)
    size = share_size(len(distinct), percent)
    return sorted(sorted(distinct, key=_place)[:size])


def _place(name: str) -> tuple[str, str]:
    return hashlib.sha256(f"{_KEY}:{name}".encode("utf-8", "surrogateescape")).hexdigest(), name
