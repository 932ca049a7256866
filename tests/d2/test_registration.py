"""Names in detectron2's registries, alone and beside the published package."""

import logging
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("detectron2")

from fvcore.common.registry import Registry  # noqa: E402

from jepa_plugins.d2 import registration  # noqa: E402
from jepa_plugins.d2.registration import look_up  # noqa: E402

HEADER = """
import importlib.machinery, importlib.util, logging, sys, types
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stdout)
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

def install_published(name="mask2former"):
    "Make a published package look installed, without importing it."
    real = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec(name, None)
    importlib.util.find_spec = lambda n, *a: spec if n == name else real(n, *a)

def import_published():
    "What importing the published package does: it registers its classes under their names."
    for registry, names in ((META_ARCH_REGISTRY, ["MaskFormer"]),
                            (SEM_SEG_HEADS_REGISTRY, ["MaskFormerHead", "MSDeformAttnPixelDecoder"])):
        for name in names:
            registry.register(type(name, (), {"theirs": True}))
"""


def run(body: str) -> str:
    """Standard output of a fresh process, in which nothing is registered yet."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HEADER + textwrap.dedent(body)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_alone_ours_have_the_published_names() -> None:
    printed = run("""
        import jepa_plugins.d2
        for registry in (META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY):
            print(sorted(n for n, c in registry if c.__module__.startswith("jepa_plugins")))
        from jepa_plugins.d2.mask2former import TRANSFORMER_DECODER_REGISTRY
        print([n for n, _ in TRANSFORMER_DECODER_REGISTRY])
    """)
    assert "['JEPAMaskRCNN', 'MaskFormer', 'MaskJEPA']" in printed
    assert "['MSDeformAttnPixelDecoder', 'MaskFormerHead']" in printed
    assert "['MultiScaleMaskedTransformerDecoder']" in printed
    assert "is installed" not in printed


CHECK = """
    for registry, names in ((META_ARCH_REGISTRY, ["MaskFormer"]),
                            (SEM_SEG_HEADS_REGISTRY, ["MaskFormerHead", "MSDeformAttnPixelDecoder"])):
        for name in names:
            assert registry.get(name).theirs and not hasattr(registry.get("JEPA" + name), "theirs")
            assert registry.get("JEPA" + name).__name__ == "JEPA" + name
    from jepa_plugins.d2.registration import look_up
    from jepa_plugins.d2.mask2former import TRANSFORMER_DECODER_REGISTRY
    look_up(TRANSFORMER_DECODER_REGISTRY, "MultiScaleMaskedTransformerDecoder")
    assert "MaskJEPA" in META_ARCH_REGISTRY
    from detectron2.modeling import build_model
    from jepa_plugins.d2 import get_config
    import torch
    cfg = get_config("detectron2/quick/semantic.yaml", ["MODEL.DEVICE", "meta",
        "MODEL.META_ARCHITECTURE", "JEPAMaskFormer", "MODEL.SEM_SEG_HEAD.NAME", "JEPAMaskFormerHead",
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "JEPAMSDeformAttnPixelDecoder"])
    with torch.device("meta"):
        print(type(build_model(cfg)).__name__)
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_beside_the_published_package_no_order_of_imports_fails(first) -> None:
    orders = {"ours": ["import jepa_plugins.d2", "import_published()"]}
    orders["theirs"] = orders["ours"][::-1]
    body = "\n".join(["install_published()", *orders[first], textwrap.dedent(CHECK)])
    printed = run(body)
    assert printed.count("our Mask2Former classes are registered as JEPA<name>") == 1
    assert "mask2former is installed" in printed and "JEPAMaskFormer" in printed


@pytest.mark.parametrize("installed", [("oneformer",), ("mask2former", "oneformer"), ()])
def test_who_claims_the_names(monkeypatch, caplog, installed) -> None:
    monkeypatch.setattr(
        registration.importlib.util, "find_spec", lambda name: name if name in installed else None
    )
    registration.published_packages.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger=registration.__name__):
            names = [registration.registered_name("MaskFormer") for _ in range(2)]
    finally:
        registration.published_packages.cache_clear()
    assert names == ["JEPAMaskFormer" if installed else "MaskFormer"] * 2
    assert len(caplog.records) == bool(installed) and all(name in caplog.text for name in installed)


def test_look_up_takes_either_name() -> None:
    registry = Registry("SHAPES")
    registry._do_register("JEPASquare", 1)
    registry._do_register("Circle", 2)
    registry._do_register("JEPACircle", 3)
    assert look_up(registry, "Square") == look_up(registry, "JEPASquare") == 1
    assert (look_up(registry, "Circle"), look_up(registry, "JEPACircle")) == (2, 3)
    with pytest.raises(
        KeyError, match="no 'Line' in the registry SHAPES; it holds: Circle, JEPACircle, JEPASquare"
    ):
        look_up(registry, "Line")
