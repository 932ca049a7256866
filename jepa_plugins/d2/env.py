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
    configurations whose meta-architecture is ours, and only for those, it gets our optimiser, schedule and data
    instead; their checkpointer and evaluators: see `jepa_plugins.d2.launchers`.
    """
    # Imported here: detectron2 itself is still being imported when it loads this module.
    import detectron2.config.defaults as defaults

    import jepa_plugins.d2.backbones
    import jepa_plugins.d2.mask2former
    import jepa_plugins.d2.mask_jepa  # noqa: F401
    from jepa_plugins.d2 import launchers
    from jepa_plugins.d2.config import add_jepa_config

    add_jepa_config(defaults._C)
    _serve_default_trainer()
    launchers.serve_evaluators()


def _serve_default_trainer() -> None:
    import detectron2.engine.defaults as defaults

    from jepa_plugins.d2 import solver

    replacements = {
        "build_optimizer": _optimizer,
        "build_lr_scheduler": solver.build_lr_scheduler,
        "build_detection_train_loader": _train_loader,
        "build_detection_test_loader": _test_loader,
    }
    for name, ours in replacements.items():
        setattr(defaults, name, _for_our_configs(name, ours, getattr(defaults, name)))


def _optimizer(cfg: Any, model: Any) -> Any:
    from jepa_plugins.d2 import solver

    optimizer = solver.build_optimizer(cfg, model)
    solver.announce_steps(optimizer, model)
    return optimizer


def _train_loader(cfg: Any, *args: Any, **kwargs: Any) -> Any:
    from detectron2.utils import comm

    from jepa_plugins.d2.engine import Trainer, check_batch, prepare_data
    from jepa_plugins.d2.launchers import Stream

    if cfg.SOLVER.ACCUMULATION != 1:
        raise ValueError(
            f"SOLVER.ACCUMULATION is {cfg.SOLVER.ACCUMULATION}, but detectron2's loop steps after every batch: set "
            "it to 1, or use the tools/train_net.py of jepa_plugins or a LazyConfig with optimizer.accumulation"
        )
    check_batch(cfg, comm.get_world_size())
    prepare_data(cfg)
    return Stream(Trainer.build_train_loader(cfg).build, max(cfg.SEED, 0))


def _test_loader(cfg: Any, dataset_name: str, *args: Any, **kwargs: Any) -> Any:
    from jepa_plugins.d2.data.catalog import check_num_classes
    from jepa_plugins.d2.engine import Trainer

    check_num_classes(cfg, dataset_name)
    return Trainer.build_test_loader(cfg, dataset_name)


def _for_our_configs(name: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` where the configured meta-architecture is one of this package, else `theirs`."""

    def chosen(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        from detectron2.modeling import META_ARCH_REGISTRY

        from jepa_plugins.d2 import launchers

        registry, architecture = META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE
        if architecture not in registry or not registry.get(architecture).__module__.startswith(
            "jepa_plugins."
        ):
            return theirs(cfg, *args, **kwargs)
        launchers.share_log()
        logger.info("%s: %s of jepa_plugins instead of detectron2's", architecture, name)
        return ours(cfg, *args, **kwargs)

    return chosen
