"""mmengine's checkpoint files: read without running their code, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from jepa_plugins.core.checkpoints import CheckpointError, atomic_write, read_checkpoint

ATOMIC_BACKEND = "atomic"


class AtomicBackend(LocalBackend):
    """Local files that appear under their name when all of their content is on the disk."""

    def put(self, obj: bytes, filepath: Any) -> None:
        """Write.

        Raises:
            CheckpointError: the disk refuses; an older file stays as it was.
        """
        atomic_write(filepath, lambda file: file.write(obj))


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A local checkpoint, weights and mmengine's own log history only.

    Raises:
        FileNotFoundError, CheckpointError: no such file, a damaged one, or one that holds other classes; see
            `core.checkpoints.read_checkpoint`.
    """
    with _admitting_history():
        content = read_checkpoint(os.path.expanduser(filename))
    if map_location in (None, "cpu", torch.device("cpu")):
        return content
    return _moved(content, torch.device(map_location))


def _statistic(owner: Any, name: str) -> Any:
    """All that mmengine's pickled histories need of `getattr`: a statistic of `HistoryBuffer`."""
    if owner is not HistoryBuffer or name not in HistoryBuffer._statistics_methods:
        raise CheckpointError(
            f"a checkpoint asks for the attribute {name!r} of {owner!r}, which is no weight"
        )
    return HistoryBuffer._statistics_methods[name]


# Weights-only readers tell what they admit by its module and name.
_statistic.__module__, _statistic.__name__, _statistic.__qualname__ = "builtins", "getattr", "getattr"
HistoryBuffer()  # fills in the statistics
_ADMITTED = [HistoryBuffer, _statistic]


@contextlib.contextmanager
def _admitting_history() -> Iterator[None]:
    """mmengine's own checkpoints hold its log's history: arrays, and references to its statistics."""
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(_ADMITTED):
            yield
    else:  # older torch can only add to its list
        torch.serialization.add_safe_globals(_ADMITTED)
        yield


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors of nested dicts and lists on a device, in place."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        for key in value:
            value[key] = _moved(value[key], device)
    elif isinstance(value, list):
        value[:] = [_moved(part, device) for part in value]
    return value


def install() -> None:
    """Make mmengine read local files by `load_from_local`, and know the backend "atomic"."""
    CheckpointLoader.register_scheme("", load_from_local, force=True)
    register_backend(ATOMIC_BACKEND, AtomicBackend, force=True)
