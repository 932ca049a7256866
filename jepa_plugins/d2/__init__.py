"""The detectron2 adapter: importing it registers every backbone, head and meta-architecture of ours, and gives our
models our checkpointer where a launcher asks for detectron2's, and registers Mask2Former's data sets."""

# First: under DETECTRON2_ENV_MODULE it is this import that registers everything, and it needs our modules whole.
import detectron2  # noqa: F401

from jepa_plugins.d2 import backbones, mask2former, mask_jepa, mask_rcnn  # noqa: F401
from jepa_plugins.d2.config import add_jepa_config, get_config
from jepa_plugins.d2.data.builtin import register_builtin
from jepa_plugins.d2.launchers import serve_checkpointer

__all__ = ["add_jepa_config", "get_config"]

serve_checkpointer()
register_builtin()
