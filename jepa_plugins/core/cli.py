"""What the command-line tools of both adapters share: errors of one sentence."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.images import ImageError

# what mmengine's registries put before the message of an error while building
_BUILDING = re.compile(r"^(class `[^`]*` in [^:]*: )+")
USER_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    FileNotFoundError,
    KeyError,
    ImportError,
    FloatingPointError,
    CheckpointError,
    ImageError,
)


def sentence_of(error: BaseException) -> str:
    """The message of an error; of one that a data loader's worker raised, without that worker's traceback."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]
    return _BUILDING.sub("", text)


def one_sentence(function: Callable[..., Any], more: tuple[type[Exception], ...] = ()) -> Callable[..., Any]:
    """End the program with the one sentence of an error of the user's; JEPA_TRACEBACK=1 shows the rest.

    Args:
        more: further kinds of errors that a toolkit raises for what the user wrote.
    """

    kinds: tuple[type[Exception], ...] = USER_ERRORS + more

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except kinds as error:
            if os.environ.get("JEPA_TRACEBACK"):
                raise
            sys.exit(f"error: {sentence_of(error)}")

    return guarded
