"""Registration under a launcher that nobody may edit: `DETECTRON2_ENV_MODULE=jepa_plugins.d2.env`.

detectron2 imports the module that this variable names and calls its `setup_environment` once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def setup_environment() -> None:
    """Register every model of ours, make our keys known to `get_cfg()`, and serve `DefaultTrainer` with our parts.

    detectron2's `DefaultTrainer` builds SGD, knows no full-model clipping and reads labelled data only. For
    configurations whose meta-architecture is ours, and only for those, it gets our optimiser, schedule, training
    data and checkpointer instead.
    """
    # Imported here: detectron2 itself is still being imported when it loads this module.
    import detectron2.config.defaults as defaults

    import jepa_plugins.d2.backbones
    import jepa_plugins.d2.mask2former
    import jepa_plugins.d2.mask_jepa  # noqa: F401
    from jepa_plugins.d2.config import add_jepa_config

    add_jepa_config(defaults._C)
    _serve_default_trainer()


def _serve_default_trainer() -> None:
    import detectron2.engine.defaults as defaults

    from jepa_plugins.d2 import solver
    from jepa_plugins.d2.checkpoint import Checkpointer
    from jepa_plugins.d2.engine import Trainer, prepare_data
    from jepa_plugins.d2.hooks import unwrapped

    def train_loader(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        prepare_data(cfg)
        return Trainer.build_train_loader(cfg)

    replacements = {
        "build_optimizer": solver.build_optimizer,
        "build_lr_scheduler": solver.build_lr_scheduler,
        "build_detection_train_loader": train_loader,
    }
    for name, ours in replacements.items():
        setattr(defaults, name, _for_our_configs(name, ours, getattr(defaults, name)))
    stock = defaults.DetectionCheckpointer
    defaults.DetectionCheckpointer = lambda model, *args, **kwargs: (
        Checkpointer if is_ours(unwrapped(model)) else stock
    )(model, *args, **kwargs)


def is_ours(model: Any) -> bool:
    """Whether a model's class is one of this package."""
    return type(model).__module__.startswith("jepa_plugins.")


def _for_our_configs(name: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` where the configured meta-architecture is one of this package, else `theirs`."""

    def chosen(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        from detectron2.modeling import META_ARCH_REGISTRY

        registry, architecture = META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE
        if architecture not in registry or not registry.get(architecture).__module__.startswith(
            "jepa_plugins."
        ):
            return theirs(cfg, *args, **kwargs)
        logger.info("%s: %s of jepa_plugins instead of detectron2's", architecture, name)
        return ours(cfg, *args, **kwargs)

    return chosen
