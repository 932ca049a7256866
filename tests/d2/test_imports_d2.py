"""The detectron2 adapter needs no OpenMMLab package and registers its names on import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("detectron2")
REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mmengine", "mmcv", "mmseg", "mmdet", "mmpretrain"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def run(script: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    result = subprocess.run([sys.executable, "-c", BLOCK + script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_registers_the_names_without_openmmlab() -> None:
    out = run(
        "import importlib, pkgutil\n"
        "from detectron2.modeling import META_ARCH_REGISTRY as registry\n"
        "before = 'MaskJEPA' in registry\n"
        "import jepa_plugins.d2 as d2\n"
        "print(before, 'MaskJEPA' in registry, 'MaskFormer' in registry)\n"
        "names = [m.name for m in pkgutil.walk_packages(d2.__path__, 'jepa_plugins.d2.')]\n"
        "[importlib.import_module(name) for name in names]\n"
        "print('jepa_plugins.d2.config' in names)"
    )
    assert out.split()[-4:] == ["False", "True", "True", "True"]


def test_environment_module_makes_our_keys_known() -> None:
    """detectron2's own mechanism, for launchers that nobody may edit."""
    out = run(
        "from detectron2.config import get_cfg\n"
        "from detectron2.modeling import META_ARCH_REGISTRY as registry\n"
        "print('MASK_FORMER' in get_cfg().MODEL, 'MaskJEPA' in registry)",
        DETECTRON2_ENV_MODULE="jepa_plugins.d2.env",
    )
    assert out.split()[-2:] == ["True", "True"]
