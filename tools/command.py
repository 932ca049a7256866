#!/usr/bin/env python3
"""Print the command that trains or tests a configuration: which tool it takes, in that tool's own options.

python tools/command.py [--out DIR] [--seed N] [--resume] train CONFIG [ARGS...]
python tools/command.py [--out DIR] test CONFIG CHECKPOINT [ARGS...]

A yaml file is detectron2's (tools/train_net.py), a .py file a LazyConfig (tools/lazyconfig_train_net.py) or of
mmengine (tools/train.py, tools/test.py). ARGS go to that tool as they are. The words come quoted for a shell.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from jepa_plugins.config_files import find_config  # noqa: E402

TOOLS = Path(__file__).resolve().parent


def kind_of(config: str) -> str:
    """Of a configuration's file: "yaml", "lazy" or "mmengine".

    Raises:
        ValueError: it is neither.
        FileNotFoundError: there is no such configuration.
    """
    path = Path(find_config(config))
    if path.suffix in (".yaml", ".yml"):
        return "yaml"
    if path.suffix != ".py":
        raise ValueError(f"{config} is no configuration: give a .yaml or .py file")
    if path.match("detectron2/lazy/*.py") or path.match("detectron2/lazy/*/*.py"):
        return "lazy"
    text = path.read_text(encoding="utf-8")
    return "lazy" if re.search(r"\bLazyCall\b|^from detectron2", text, re.MULTILINE) else "mmengine"


def train_command(
    config: str,
    args: Sequence[str] = (),
    *,
    out: str | None = None,
    seed: int | None = None,
    resume: bool = False,
) -> list[str]:
    """Words behind `python` that train.

    Args:
        args: in the tool's own style. out: folder of the run. seed: of the run. resume: go on where a run in that
            folder has stopped, or start.

    Raises:
        ValueError, FileNotFoundError: see `kind_of`.
    """
    kind = kind_of(config)
    if kind == "mmengine":
        place = ["--work-dir", out] if out else []
        more = list(args) if seed is None else with_option(args, f"randomness.seed={seed}")
        return [str(TOOLS / "train.py"), config, *place, *["--resume"] * resume, *more]
    values: dict[str, str | int] = {}
    if out:
        values["OUTPUT_DIR"] = out
    if seed is not None:
        values["SEED"] = seed
    return [*detectron2_start(kind, config), *["--resume"] * resume, *args, *changes(kind, values)]


def test_command(
    config: str, checkpoint: str, args: Sequence[str] = (), *, out: str | None = None
) -> list[str]:
    """Words behind `python` that evaluate a checkpoint; see `train_command`."""
    kind = kind_of(config)
    if kind == "mmengine":
        place = ["--work-dir", out] if out else []
        return [str(TOOLS / "test.py"), config, checkpoint, *place, *args]
    values: dict[str, str | int] = {"MODEL.WEIGHTS": checkpoint}
    if out:
        values["OUTPUT_DIR"] = out
    return [*detectron2_start(kind, config), "--eval-only", *args, *changes(kind, values)]


def detectron2_start(kind: str, config: str) -> list[str]:
    """The tool and its configuration."""
    tool = "train_net.py" if kind == "yaml" else "lazyconfig_train_net.py"
    return [str(TOOLS / tool), "--config-file", config]


LAZY_KEYS = {"OUTPUT_DIR": "train.output_dir", "SEED": "train.seed", "MODEL.WEIGHTS": "train.init_checkpoint"}


def changes(kind: str, values: dict[str, str | int]) -> list[str]:
    """Changes of a detectron2 configuration; they stand last, since all that follows the first is one."""
    if kind == "yaml":
        return [str(word) for pair in values.items() for word in pair]
    quoted = {
        key: v if isinstance(v, int) else "'" + v.replace("'", r"\'") + "'" for key, v in values.items()
    }
    return [f"{LAZY_KEYS[key]}={value}" for key, value in quoted.items()]


def with_option(args: Sequence[str], change: str) -> list[str]:
    """mmengine's arguments with one more --cfg-options, of which the tool reads only one list."""
    words = [
        part
        for word in args
        for part in ([*word.split("=", 1)] if word.startswith("--cfg-options=") else [word])
    ]
    if "--cfg-options" not in words:
        return [*words, "--cfg-options", change]
    place = words.index("--cfg-options") + 1
    return [*words[:place], change, *words[place:]]


def build_parser() -> argparse.ArgumentParser:
    """Options first, since ARGS may hold any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="folder of the run")
    parser.add_argument("--seed", type=int, help="of a training")
    parser.add_argument("--resume", action="store_true", help="a training goes on where it has stopped")
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("train", "test"):
        action = actions.add_parser(name)
        action.add_argument("config")
        if name == "test":
            action.add_argument("checkpoint")
        action.add_argument("args", nargs=argparse.REMAINDER)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line; without torch, which takes seconds to import."""
    args = build_parser().parse_args(argv)
    try:
        if args.action == "train":
            words = train_command(args.config, args.args, out=args.out, seed=args.seed, resume=args.resume)
        else:
            words = test_command(args.config, args.checkpoint, args.args, out=args.out)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(shlex.join(words))


if __name__ == "__main__":
    main()
