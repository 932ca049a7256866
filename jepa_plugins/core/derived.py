"""Values that follow from a tensor, worked out once and not at every step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

V = TypeVar("V")


class Derived(Generic[V]):
    """The last value worked out from a tensor, kept until the tensor is another one or was written to.

    Loading weights, moving a module, copying it and writing into the tensor all make it work the value out again,
    so a module that owns one needs no buffer for it and its state dict knows nothing of it.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, Hashable, V] | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        """A copy starts empty: its tensor counts its writes anew."""
        return type(self), ()

    def get(self, source: Tensor, work_out: Callable[[], V], key: Hashable = None) -> V:
        """The value for `source`; `key`: what else it follows from."""
        kept = self._kept
        if kept is not None and kept[0] is source and kept[1:3] == (source._version, key):
            return kept[3]
        return self.put(source, work_out(), key)

    def put(self, source: Tensor, value: V, key: Hashable = None) -> V:
        """Take a value that is known to be right for `source` as it now is."""
        self._kept = (source, source._version, key, value)
        return value
