"""Reading yaml configurations without running code.

The published Mask2Former configurations hold one pattern of evaluated Python, the sizes of multi-scale training
and testing: `[int(x * 0.1 * N) for x in range(a, b)]`. It is parsed here; any other tag is refused with its file
and line.
"""

from __future__ import annotations

import os
import re
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

EVALUATED = "tag:yaml.org,2002:python/object/apply:eval"
_SIZES = re.compile(r"\[int\(x \* 0\.1 \* (\d+)\) for x in range\((\d+), (\d+)\)\]")


class _Loader(yaml.SafeLoader):
    """Plain values, and the one published pattern."""


def _sizes(loader: _Loader, node: yaml.Node) -> list[int]:
    arguments = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    match = _SIZES.fullmatch(str(arguments[0])) if len(arguments) == 1 else None
    if match is None:
        raise yaml.constructor.ConstructorError(None, None, "Python code, which is not run", node.start_mark)
    base, first, last = map(int, match.groups())
    return [int(x * 0.1 * base) for x in range(first, last)]


_Loader.add_constructor(EVALUATED, _sizes)


def _read(path: str) -> dict[str, Any]:
    with PathManager.open(path, "r") as file:
        try:
            content = yaml.load(file, Loader=_Loader)  # a SafeLoader
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            problem = str(getattr(error, "problem", None) or error).splitlines()[0]
            raise ValueError(
                f"{path}{line}: {problem}; a configuration holds plain yaml, and of Python only "
                "[int(x * 0.1 * N) for x in range(a, b)]"
            ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no configuration: it holds no KEY: VALUE pairs")
    return content


def _merge(over: dict, base: dict) -> dict:
    """`over` on top of `base`, key by key at every depth."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(value, merged[key]) if both else value
    return merged


def read_yaml(path: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a yaml file on top of those of its `_BASE_` (a path relative to it, `~`, or a URL).

    Raises:
        ValueError: no plain yaml, with file and line; or files that are each other's base.
        FileNotFoundError: a missing file, or base.
    """
    if path in seen:
        raise ValueError(f"{path} is its own {BASE_KEY}, by way of {' -> '.join(seen[1:]) or 'itself'}")
    if "://" not in path and not os.path.isfile(path):
        named = f" (the {BASE_KEY} of {seen[-1]})" if seen else ""
        raise FileNotFoundError(f"no configuration {path}{named}")
    values = _read(path)
    if BASE_KEY not in values:
        return values
    base = os.path.expanduser(values.pop(BASE_KEY))
    if "://" not in base and not os.path.isabs(base):
        base = os.path.normpath(os.path.join(os.path.dirname(path), base))
    return _merge(values, read_yaml(base, (*seen, path)))
