"""What an evaluation found, in one JSON file of the same form for both toolkits."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from jepa_plugins.core.checkpoints import atomic_write

FILE = "evaluation.json"


def write_evaluation(
    folder: str | os.PathLike,
    metrics: Mapping[str, Any],
    *,
    checkpoint: str | None,
    config: str | None,
    images: int | None = None,
) -> Path:
    """Write FOLDER/evaluation.json whole or not at all, over an earlier one; returns its path.

    Args:
        metrics: numbers by flat name, in the toolkit's units (percent).
        checkpoint: file of the weights that were evaluated; None when they are in none.
        config: name or path. images: how many were evaluated, if known.

    The numbers that are not finite (a class that occurs nowhere has no IoU), which JSON cannot hold, stand by name
    under "undefined".
    """
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}
    content = {
        "metrics": {name: value for name, value in numbers.items() if math.isfinite(value)},
        "undefined": [name for name, value in numbers.items() if not math.isfinite(value)],
        "checkpoint": checkpoint,
        "config": config,
        "images": images,
    }
    path = Path(folder) / FILE
    atomic_write(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))
    return path
