"""Registration under a launcher that nobody may edit: `DETECTRON2_ENV_MODULE=jepa_plugins.d2.env`.

detectron2 imports the module that this variable names and calls its `setup_environment` once.
"""

from __future__ import annotations


def setup_environment() -> None:
    """Register every model of ours and make our configuration keys known to `detectron2.config.get_cfg`."""
    # Imported here: detectron2 itself is still being imported when it loads this module.
    import detectron2.config.defaults as defaults

    import jepa_plugins.d2.backbones
    import jepa_plugins.d2.mask2former
    import jepa_plugins.d2.mask_jepa  # noqa: F401
    from jepa_plugins.d2.config import add_jepa_config

    add_jepa_config(defaults._C)
