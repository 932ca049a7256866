"""Imports point one way: configs, tools -> d2 | mm -> core, and core needs no toolkit."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLKITS = {"detectron2", "mmengine", "mmcv", "mmseg", "mmdet", "mmpretrain"}
# Optional packages may be imported where they are used, never when core is.
LAZY_PACKAGES = {"safetensors", "torch_ms_deform_attn", "scipy"}
CORE_PACKAGES = {"torch", "torchvision", "timm", "numpy", "PIL"} | LAZY_PACKAGES
# Longest prefix first: which rule a file of this repository falls under.
LAYERS = (
    *("jepa_plugins.core", "jepa_plugins.d2", "jepa_plugins.mm", "jepa_plugins.reproduction", "jepa_plugins"),
    *("configs", "tools"),
)
MAY_IMPORT = {
    "jepa_plugins.core": {"jepa_plugins.core", "jepa_plugins"},
    "jepa_plugins.d2": {"jepa_plugins.d2", "jepa_plugins.core", "jepa_plugins"},
    "jepa_plugins.mm": {"jepa_plugins.mm", "jepa_plugins.core", "jepa_plugins"},
    "jepa_plugins.reproduction": {"jepa_plugins.reproduction", "jepa_plugins.core", "jepa_plugins"},
    "jepa_plugins": {"jepa_plugins"},
    "configs": set(LAYERS),
    "tools": set(LAYERS),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    return next((layer for layer in LAYERS if module == layer or module.startswith(layer + ".")), None)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Absolute names of everything that ``source`` imports, and whether that happens inside a function."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(child) for function in functions for child in ast.walk(function)}
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                # A submodule counts as itself: `from jepa_plugins import d2` imports jepa_plugins.d2.
                full = f"{base}.{alias.name}"
                yield (full if layer_of(full) != layer_of(base) else base), id(node) in inside


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    layer = layer_of(module)
    assert layer is not None, f"{module} belongs to no layer"
    found = []
    for name, lazy in imports(source, module, is_package):
        top = name.split(".")[0]
        target = layer_of(name)
        if target is not None:
            if target not in MAY_IMPORT[layer]:
                found.append(f"{module} imports {name}")
        elif top in TOOLKITS and layer.startswith("jepa_plugins"):
            if (layer == "jepa_plugins.d2") != (top == "detectron2") or layer in (
                "jepa_plugins.core",
                "jepa_plugins",
            ):
                found.append(f"{module} imports {name}")
        elif layer == "jepa_plugins.core" and top not in sys.stdlib_module_names:
            if top not in CORE_PACKAGES or (top in LAZY_PACKAGES and not lazy):
                found.append(f"{module} imports {name}")
        elif layer == "jepa_plugins" and top not in sys.stdlib_module_names:
            found.append(f"{module} imports {name}")
    return found


def source_files() -> list[Path]:
    return sorted(
        p for root in ("jepa_plugins", "configs", "tools") for p in (REPOSITORY / root).rglob("*.py")
    )


def test_every_file_keeps_the_direction() -> None:
    files = source_files()
    assert any("core" in path.parts for path in files)
    found = [
        line
        for path in files
        for line in violations(
            path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py"
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jepa_plugins.core.x", "import detectron2"),
        ("jepa_plugins.core.x", "def f():\n    from mmengine.model import BaseModel"),
        ("jepa_plugins.core.x", "import scipy.optimize"),
        ("jepa_plugins.core.x", "import safetensors"),
        ("jepa_plugins.core.x", "from ..d2 import config"),
        ("jepa_plugins.core.x", "from jepa_plugins import d2"),
        ("jepa_plugins.core.x", "import tools.train_net"),
        ("jepa_plugins.d2.x", "import mmcv"),
        ("jepa_plugins.d2.data.x", "from ...mm import backbone"),
        ("jepa_plugins.mm.x", "from detectron2.config import get_cfg"),
        ("jepa_plugins.mm.x", "from jepa_plugins.d2.config import add_config"),
        ("jepa_plugins.config_files", "import torch"),
        ("jepa_plugins.config_files", "from jepa_plugins.core import ema"),
        ("jepa_plugins.d2.x", "import configs.detectron2"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "jepa_plugins.core.x",
            "import math\nimport torch.nn as nn\nfrom .ema import Ema\nfrom PIL import Image",
        ),
        ("jepa_plugins.core.x", "def f():\n    from safetensors.torch import load_file"),
        ("jepa_plugins.d2.x", "from detectron2.config import CfgNode\nfrom ..core import ema\nimport scipy"),
        ("jepa_plugins.mm.x", "from mmengine.registry import MODELS\nfrom jepa_plugins.core import ema"),
        (
            "tools.x",
            "import jepa_plugins.d2\nimport detectron2\nfrom jepa_plugins.config_files import find_config",
        ),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_core_imports_with_every_toolkit_blocked() -> None:
    script = f"""
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(TOOLKITS)!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocked())
import jepa_plugins
assert "torch" not in sys.modules, "importing jepa_plugins alone must stay cheap"
import jepa_plugins.core
names = [m.name for m in pkgutil.walk_packages(jepa_plugins.core.__path__, "jepa_plugins.core.")]
for name in names:
    importlib.import_module(name)
try:
    import detectron2
except ModuleNotFoundError:
    print(len(names), "modules")
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    count, word = result.stdout.split()[-2:]
    assert word == "modules" and int(count) > 0
