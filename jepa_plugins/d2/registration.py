"""Names under which our Mask2Former family enters detectron2's registries.

fvcore's Registry refuses a name twice, so ours take the published names only when no published package that
claims them (Mask2Former, OneFormer) is installed; otherwise each of ours is called `JEPA<name>`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from fvcore.common.registry import Registry

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=type)
PREFIX = "JEPA"


@functools.cache
def published_packages() -> tuple[str, ...]:
    """The installed packages that register the published names themselves."""
    found = tuple(name for name in ("mask2former", "oneformer") if importlib.util.find_spec(name) is not None)
    if found:
        logger.info(
            "%s is installed: our Mask2Former classes are registered as %s<name>", ", ".join(found), PREFIX
        )
    return found


def registered_name(name: str) -> str:
    """The name that our class of this published name has in the registries."""
    return PREFIX + name if published_packages() else name


def register_published(registry: Registry) -> Callable[[T], T]:
    """Class decorator: register under the published name, or `JEPA<name>` where that is claimed."""

    def register(cls: T) -> T:
        cls.__name__ = registered_name(cls.__name__)
        registry.register(cls)
        return cls

    return register


def look_up(registry: Registry, name: str) -> Any:
    """The entry of a published name, whichever of the two names it has in `registry`.

    Raises:
        KeyError: naming the registry, the name and what there is.
    """
    for candidate in (name, PREFIX + name):
        if candidate in registry:
            return registry.get(candidate)
    known = ", ".join(sorted(entry for entry, _ in registry))
    raise KeyError(f"no {name!r} in the registry {registry._name}; it holds: {known}")


def build_head(cfg, input_shape) -> Any:
    """The segmentation head that `MODEL.SEM_SEG_HEAD.NAME` names; ours also where it is called `JEPA<name>`."""
    return look_up(SEM_SEG_HEADS_REGISTRY, cfg.MODEL.SEM_SEG_HEAD.NAME)(cfg, input_shape)


def build_model(cfg) -> Any:
    """The model that `MODEL.META_ARCHITECTURE` names, likewise, on `MODEL.DEVICE`."""
    return look_up(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE)(cfg).to(cfg.MODEL.DEVICE)
