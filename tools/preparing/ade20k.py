"""ADE20K's labels in the form that detectron2 reads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from . import DataError


def shift_labels(out: Path) -> None:
    """Shift the labels so that classes are 0 to 149 and "other objects" (0) becomes 255, which is ignored.

    Args:
        out: the unpacked folder ADEChallengeData2016.

    Raises:
        DataError: there are no labels, or they are no 8-bit images.
    """
    for split in ("training", "validation"):
        source, target = out / "annotations" / split, out / "annotations_detectron2" / split
        files = sorted(source.glob("*.png"))
        if not files:
            raise DataError(
                f"{source} holds no label images; unpack ADEChallengeData2016.zip and name its folder."
            )
        target.mkdir(parents=True, exist_ok=True)
        for file in files:
            done = target / file.name
            if done.exists():
                continue
            labels = np.asarray(Image.open(file))
            if labels.dtype != np.uint8 or labels.ndim != 2:
                raise DataError(f"{file} is no 8-bit label image; unpack ADEChallengeData2016.zip again.")
            partial_file = done.with_suffix(".partial")
            Image.fromarray(labels - np.uint8(1)).save(partial_file, format="PNG")  # 0 wraps to 255
            os.replace(partial_file, done)
        print(f"{target}: {len(files)} label images")
