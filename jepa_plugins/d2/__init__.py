"""The detectron2 adapter: importing it registers every backbone, head and meta-architecture of ours."""

from jepa_plugins.d2 import backbones, mask2former, mask_jepa  # noqa: F401
from jepa_plugins.d2.config import add_jepa_config, get_config

__all__ = ["add_jepa_config", "get_config"]
