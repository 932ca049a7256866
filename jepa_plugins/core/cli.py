"""What the command-line tools of both adapters share: errors of one sentence."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.images import ImageError

USER_ERRORS = (
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
    return text


def one_sentence(function: Callable[..., Any], more: tuple[type[Exception], ...] = ()) -> Callable[..., Any]:
    """End the program with the one sentence of an error of the user's; JEPA_TRACEBACK=1 shows the rest.

    Args:
        more: further kinds of errors that a toolkit raises for what the user wrote.
    """

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (*USER_ERRORS, *more) as error:
            if os.environ.get("JEPA_TRACEBACK"):
                raise
            sys.exit(f"error: {sentence_of(error)}")

    return guarded
