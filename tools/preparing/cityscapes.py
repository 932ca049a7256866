"""Cityscapes's label images by cityscapesScripts: labelTrainIds beside the polygons, and the panoptic files.

Below the folder cityscapes, of the downloads leftImg8bit and gtFine:

gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png      19 classes, 255 elsewhere
gtFine/cityscapes_panoptic_{train,val} and their .json  ids of the classes as in labelIds

labelIds and instanceIds come with gtFine; they are made of the polygons, too, where they are missing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import DataError
from .running import Journal, is_whole, read_json, run_all, work_off, write_json, write_png

SPLITS = ("train", "val")
KINDS = ("labelIds", "instanceIds", "labelTrainIds")
POLYGONS = "_gtFine_polygons.json"
AGAIN = "unpack gtFine_trainvaltest.zip again"


def prepare(out: Path, workers: int) -> None:
    """Make what is not there yet.

    Args:
        out: the folder cityscapes.

    Raises:
        DataError: the polygons or cityscapesScripts are missing.
    """
    try:
        import cityscapesscripts  # noqa: F401
    except ImportError as error:
        raise DataError("this needs cityscapesScripts: pip install cityscapesScripts.") from error
    if not any((out / "gtFine").glob("*/*/*_gtFine_polygons.json")):
        raise DataError(
            f"{out / 'gtFine'} holds no polygons; unpack gtFine_trainvaltest.zip in the folder cityscapes."
        )
    for split in SPLITS:
        polygons = sorted((out / "gtFine" / split).glob("*/*_gtFine_polygons.json"))
        missing = [path for path in polygons if not all(map(is_whole, _label_files(path).values()))]
        work_off(f"labels of {split}", draw_labels, missing, workers)
        if polygons:
            print(f"{out / 'gtFine' / split}: {len(polygons)} images with all label images")
            make_panoptic(out / "gtFine", split, polygons, workers)


def _label_files(polygons: Path) -> dict[str, Path]:
    return {kind: polygons.with_name(polygons.name.replace("polygons.json", f"{kind}.png")) for kind in KINDS}


def draw_labels(polygons: Path) -> None:
    """Write the label images of one file of polygons that are not there."""
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    kinds = {
        "labelIds": lambda annotation: np.asarray(createLabelImage(annotation, "ids")),
        "instanceIds": lambda annotation: np.asarray(createInstanceImage(annotation, "ids")).astype(
            np.uint16
        ),
        "labelTrainIds": lambda annotation: np.asarray(createLabelImage(annotation, "trainIds")),
    }
    try:
        with _quiet():
            annotation = Annotation()
            annotation.fromJsonFile(str(polygons))
            for kind, path in _label_files(polygons).items():
                if not is_whole(path):
                    write_png(path, kinds[kind](annotation))
    except (
        ValueError,
        KeyError,
        TypeError,
        SystemExit,
    ) as error:  # it leaves the process at an unknown label
        raise DataError(f"{polygons} cannot be drawn ({error!r}); {AGAIN}.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without cityscapesScripts's lines: there is a progress bar."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def make_panoptic(root: Path, split: str, polygons: list[Path], workers: int) -> None:
    """Write cityscapes_panoptic_{split} and its .json; images that are done are left out.

    Args:
        root: the folder gtFine. polygons: the split's files, whose label images are there.
    """
    folder = root / f"cityscapes_panoptic_{split}"
    names = {path.name.removesuffix(POLYGONS): path for path in polygons}
    target = folder.with_suffix(".json")
    folder.mkdir(exist_ok=True)
    journal = Journal(target)
    known: dict[str, Any] = journal.read()
    content = read_json(target, "remove it and run the command again") if is_whole(target) else {}
    for image, annotation in zip(content.get("images", []), content.get("annotations", []), strict=True):
        known[image["id"]] = [image, annotation, content["categories"]]
    missing = [n for n in names if n not in known or not is_whole(folder / f"{n}_gtFine_panoptic.png")]
    if missing or not content:
        work = partial(_panoptic, folder)
        found = run_all(f"panoptic {split}", work, [names[name] for name in missing], workers)
        journal.collect(known, missing, found)
        images, annotations, classes = zip(*(known[name] for name in names), strict=True)
        write_json(target, {"images": images, "annotations": annotations, "categories": classes[0]})
    journal.remove()
    print(f"{target}: {len(names)} images")


def _panoptic(folder: Path, polygons: Path) -> list[Any]:
    """One image through cityscapesScripts, which takes a split as a whole and starts from the beginning.

    Returns its entry, its annotation and the categories.
    """
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    source, split = _label_files(polygons)["instanceIds"], polygons.parents[1].name
    with tempfile.TemporaryDirectory(prefix=f".{source.stem}.", suffix=".partial", dir=folder) as scratch:
        city = Path(scratch) / split / source.parent.name
        city.mkdir(parents=True)
        os.symlink(source.resolve(), city / source.name)
        try:
            with _quiet():
                convert2panoptic(
                    cityscapesPath=scratch, outputFolder=scratch, useTrainId=False, setNames=[split]
                )
        except (OSError, SyntaxError, KeyError) as error:
            raise DataError(f"{source} cannot be read ({error!r}); {AGAIN}.") from error
        made = Path(scratch) / folder.name
        content = json.loads(Path(f"{made}.json").read_text())
        (annotation,), (image,) = content["annotations"], content["images"]
        os.replace(made / annotation["file_name"], folder / annotation["file_name"])
    return [image, annotation, content["categories"]]
