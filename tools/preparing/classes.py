"""Classes of the published data sets, from the files that the detectron2 adapter registers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jepa_plugins


@cache
def categories(name: str) -> list[dict[str, Any]]:
    """Classes in the order of their ids, each with id, name, isthing (0 or 1) and color.

    Args:
        name: "ade20k", 150 classes with ids from 0, or "coco", 133 classes with gaps between the ids.
    """
    path = Path(jepa_plugins.__file__).parent / "d2" / "data" / "classes" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def ids_of(name: str, isthing: int) -> list[int]:
    """The ids of the things (1) or of the stuff (0), ascending."""
    return [category["id"] for category in categories(name) if category["isthing"] == isthing]
