"""Lists of the images of ADE20K's low-data runs: 1, 2, 5 and 10 % of its training images.

low_data/train_{1,2,5,10}pct.txt below the folder ADEChallengeData2016 name an image a line, without suffix, as
mmsegmentation's ``ann_file`` takes them. detectron2 needs no lists: ade20k_sem_seg_train_1pct,
ade20k_panoptic_train_5pct, ade20k_instance_train_10pct and so on choose the same images by themselves.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import BinaryIO

from jepa_plugins.core.subsets import LOW_DATA_PERCENT, share_of

from . import DataError
from .running import write_whole


def write_lists(out: Path) -> int:
    """Write the lists; returns the number of training images.

    Args:
        out: the unpacked folder ADEChallengeData2016.

    Raises:
        DataError: there are no training images.
    """
    images = out / "images" / "training"
    names = [path.stem for path in images.glob("*.jpg")]
    if not names:
        raise DataError(f"{images} holds no images; unpack ADEChallengeData2016.zip and name its folder.")
    folder = out / "low_data"
    folder.mkdir(exist_ok=True)
    for percent in LOW_DATA_PERCENT:
        share = share_of(names, percent)
        path = folder / f"train_{percent}pct.txt"
        text = "".join(f"{name}\n" for name in share)
        write_whole(path, partial(_write, text))
        print(f"{path}: {len(share):,} of {len(names):,} images")
    return len(names)


def _write(text: str, file: BinaryIO) -> None:
    file.write(text.encode())
