#!/usr/bin/env python
"""Make data sets ready for training, and check that they are.

python tools/prepare_data.py check                          # every data set that the configurations name
python tools/prepare_data.py check ade20k_panoptic coco
python tools/prepare_data.py ade20k --out datasets/ADEChallengeData2016
python tools/prepare_data.py cityscapes --out datasets/cityscapes
python tools/prepare_data.py coco --out datasets/coco
python tools/prepare_data.py imagenet --out datasets/imagenet --train-archive ILSVRC2012_img_train.tar
python tools/prepare_data.py low-data --out datasets/ADEChallengeData2016
python tools/prepare_data.py synthetic --out datasets/synthetic
python tools/prepare_data.py stand-ins --out datasets/stand_ins

A command that was interrupted goes on where it stopped when it is run again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from preparing import (  # noqa: E402
    DataError,
    ade20k,
    check,
    cityscapes,
    coco,
    imagenet,
    low_data,
    stand_ins,
    synthetic,
)
from preparing.synthetic import make_synthetic  # noqa: E402


def _run_synthetic(args: argparse.Namespace) -> int:
    options = {k: v for k, v in vars(args).items() if k not in ("command", "run")}
    started = time.monotonic()
    if make_synthetic(**options):
        count = args.train + args.val + args.unlabelled
        print(f"{args.out}: {count} pictures in {time.monotonic() - started:.1f} s")
    else:
        print(f"{args.out}: already there")
    return 0


def _run_stand_ins(args: argparse.Namespace) -> int:
    options = {k: v for k, v in vars(args).items() if k not in ("command", "run")}
    started = time.monotonic()
    if stand_ins.make_stand_ins(**options):
        print(f"{args.out}: {', '.join(args.sets)} in {time.monotonic() - started:.1f} s")
    else:
        print(f"{args.out}: already there")
    return 0


def _conclude(args: argparse.Namespace, *names: str) -> int:
    if not args.any_count:
        check.conclude(args.out, names)
    return 0


def _run_ade20k(args: argparse.Namespace) -> int:
    ade20k.prepare(args.out, args.tasks, args.workers)
    return _conclude(args, *(f"ade20k_{task}" for task in args.tasks))


def _run_cityscapes(args: argparse.Namespace) -> int:
    cityscapes.prepare(args.out, args.workers)
    return _conclude(args, "cityscapes_semantic", "cityscapes_instance", "cityscapes_panoptic")


def _run_coco(args: argparse.Namespace) -> int:
    coco.prepare(args.out, args.workers)
    return _conclude(args, "coco_panoptic")


def _run_imagenet(args: argparse.Namespace) -> int:
    wanted = imagenet.requests(args.train_archive, args.val_archive, args.val_labels)
    counts = imagenet.prepare(args.out, wanted, args.shards, args.workers)
    for split, count in counts.items():
        print(f"{split}: {count:,} images")
        published = check.published_count("imagenet" if split == "train" else "imagenet_val")
        if count != published and not args.any_count:
            raise DataError(
                f"{args.out} has {count:,} of {published:,} {split} images: give the whole archive and remove "
                "classes that were unpacked otherwise, or add --any-count if the set is meant to be smaller."
            )
    return 0


def _run_low_data(args: argparse.Namespace) -> int:
    count = low_data.write_lists(args.out)
    published = check.published_count("ade20k_semantic")
    if count != published and not args.any_count:
        raise DataError(
            f"{args.out} has {count:,} of {published:,} training images, so that the lists are not the published "
            "set's: unpack ADEChallengeData2016.zip again, or add --any-count if the set is meant to be smaller."
        )
    return 0


def _run_check(args: argparse.Namespace) -> int:
    return 0 if check.report(args.sets, args.root) else 1


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _add_synthetic(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "synthetic",
        help="generated scenes with exact labels, in the COCO and the ADE20K layout",
        description=synthetic.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    numbers = {
        "train": (2000, "training pictures"),
        "val": (200, "validation pictures"),
        "unlabelled": (0, "pictures without labels"),
        "size": (128, "side of a picture in pixels"),
        "seed": (0, "another seed gives other pictures"),
        "workers": (_processors(), "processes; they do not change the result"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace generated data in the folder")
    parser.set_defaults(run=_run_synthetic)


def _add_stand_ins(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "stand-ins", stand_ins, "tiny generated trees of all data sets", "folder to make")
    parser.add_argument(
        "--sets", nargs="+", choices=stand_ins.SETS, default=list(stand_ins.SETS), help="default: all"
    )
    numbers = {
        "images": (4, "pictures of each split"),
        "size": (96, "shorter side of a picture in pixels"),
        "seed": (0, "another seed gives other pictures"),
        "workers": (1, "processes; they do not change the result"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace generated data in the folder")
    parser.set_defaults(run=_run_stand_ins)


def _add(
    commands: argparse._SubParsersAction, name: str, module: ModuleType, what: str, out: str
) -> argparse.ArgumentParser:
    """A subcommand that its module's text describes, with --out."""
    parser = commands.add_parser(
        name, help=what, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help=out)
    return parser


def _add_published(
    commands: argparse._SubParsersAction,
    name: str,
    module: ModuleType,
    run: Callable[[argparse.Namespace], int],
    what: str,
    out: str,
) -> argparse.ArgumentParser:
    """A subcommand that prepares a published data set."""
    parser = _add(commands, name, module, what, out)
    workers = _processors()
    parser.add_argument("--workers", type=int, default=workers, help=f"processes (default: {workers})")
    parser.add_argument(
        "--any-count", action="store_true", help="accept other numbers of files than the published ones"
    )
    parser.set_defaults(run=run)
    return parser


def _add_imagenet(commands: argparse._SubParsersAction) -> None:
    what = "ImageNet-1K's archives, unpacked or as tar shards"
    parser = _add_published(commands, "imagenet", imagenet, _run_imagenet, what, "folder to make")
    archives = {
        "train-archive": "ILSVRC2012_img_train.tar",
        "val-archive": "ILSVRC2012_img_val.tar",
        "val-labels": "ILSVRC2012_devkit_t12.tar.gz, or a text file with the classes",
    }
    for option, which in archives.items():
        parser.add_argument(f"--{option}", type=Path, metavar="FILE", help=which)
    parser.add_argument(
        "--shards",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help="write N tar shards instead of folders; without N as many as make about 1 GB each",
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per data set, and the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_synthetic(commands)
    _add_stand_ins(commands)
    folder = "the unpacked folder ADEChallengeData2016"
    what = "ADE20K's semantic, panoptic and instance labels"
    tasks = _add_published(commands, "ade20k", ade20k, _run_ade20k, what, folder)
    tasks.add_argument(
        "--tasks", nargs="+", choices=ade20k.TASKS, default=list(ade20k.TASKS), help="default: all"
    )
    what = "Cityscapes's label images and panoptic labels"
    _add_published(commands, "cityscapes", cityscapes, _run_cityscapes, what, "the folder cityscapes")
    what = "COCO's semantic label images of its panoptic ones"
    _add_published(commands, "coco", coco, _run_coco, what, "the folder coco")
    _add_imagenet(commands)
    what = "lists of ADE20K's images for low-data runs"
    _add_published(commands, "low-data", low_data, _run_low_data, what, folder)
    checking = commands.add_parser(
        "check",
        help="what each data set needs below DETECTRON2_DATASETS, and what is there",
        description=check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checking.add_argument("sets", nargs="*", metavar="SET", help="a name, or how names begin; default: all")
    checking.add_argument(
        "--root",
        type=Path,
        default=Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser(),
        help="folder of all data sets (default: DETECTRON2_DATASETS, or else ./datasets)",
    )
    checking.set_defaults(run=_run_check)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; 0 on success, 1 with one sentence on standard error otherwise.

    ``check`` also gives 1 when something is missing.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or getattr(args, "out", "")
        print(
            f"error: {where}: {error.strerror}; check permissions and free space.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print("error: a worker process ended early (out of memory?): use fewer --workers.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
