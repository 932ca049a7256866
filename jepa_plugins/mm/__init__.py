"""mmengine adapter: importing it registers DMT-JEPA's pre-training in mmengine's root registries.

In a configuration: ``custom_imports = dict(imports=["jepa_plugins.mm"])``.
"""

from jepa_plugins.mm import (
    backbone,
    checkpoints,
    data,
    distributed,
    hooks,
    layer_decay,
    loops,
    model,
    optim,
    run_hooks,
    transforms,
)

__all__ = [
    "backbone",
    "checkpoints",
    "data",
    "distributed",
    "hooks",
    "layer_decay",
    "loops",
    "model",
    "optim",
    "run_hooks",
    "transforms",
]
checkpoints.install()
