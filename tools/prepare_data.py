#!/usr/bin/env python
"""Make data sets ready for training, and check that they are.

python tools/prepare_data.py check                          # every data set that the configurations name
python tools/prepare_data.py check ade20k_panoptic coco
python tools/prepare_data.py synthetic --out datasets/synthetic
python tools/prepare_data.py ade20k --out datasets/ADEChallengeData2016
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from preparing import DataError, check, synthetic  # noqa: E402
from preparing.ade20k import shift_labels  # noqa: E402
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


def _run_ade20k(args: argparse.Namespace) -> int:
    shift_labels(args.out)
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


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand per data set, and the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_synthetic(commands)
    ade20k = commands.add_parser("ade20k", help="ADE20K's semantic labels as detectron2 reads them")
    ade20k.add_argument("--out", type=Path, required=True, help="the unpacked folder ADEChallengeData2016")
    ade20k.set_defaults(run=_run_ade20k)
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
        print("error: interrupted; the same command starts again from the beginning.", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print("error: a worker process ended early (out of memory?): use fewer --workers.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
