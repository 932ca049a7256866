"""Parameter counts of the full-size mmengine configurations, on the meta device, against counts made elsewhere:
timm's models, mmsegmentation's own UPerNet, and sums over layers."""

from __future__ import annotations

import copy
import functools
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from mm_tiny import REPOSITORY
from torch import nn

pytest.importorskip("mmseg")

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402

import jepa_plugins.mm  # noqa: E402, F401
from jepa_plugins.core.vit import SIZES  # noqa: E402

ROOT = REPOSITORY / "configs" / "mmseg"
# of the encoder: timm's name, patch, side of the image in pre-training
VITS = {
    "vit_tiny16": ("vit_tiny_patch16_224", 16, 224),
    "vit_small16": ("vit_small_patch16_224", 16, 224),
    "vit_base16": ("vit_base_patch16_224", 16, 224),
    "vit_large16": ("vit_large_patch16_224", 16, 224),
    "vit_large16_416": ("vit_large_patch16_224", 16, 416),
    "vit_huge14": ("vit_huge_patch14_224", 14, 224),
    "vit_huge16": ("vit_huge_patch14_224", 16, 224),
}
LAT = {"small": 3.5, "base": 14.2, "large": 25.2, "huge": 39.4}  # millions, of one aggregation head
# width and depth of the predictor
PREDICTORS = {"tiny": (192, 6), "small": (384, 6), "base": (384, 6), "large": (384, 12), "huge": (384, 12)}
CLASSES = 150
DENSE = sorted(path.stem for path in (ROOT / "upernet").glob("*ade20k*.py"))


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@functools.cache
def build(name: str) -> nn.Module:
    cfg = Config.fromfile(ROOT / name)
    init_default_scope(cfg.default_scope)
    with torch.device("meta"):
        return MODELS.build(copy.deepcopy(cfg.model))


def size_of(vit: str) -> str:
    return vit.split("_")[1].rstrip("0123456789")


@functools.cache
def timms(vit: str, pixels: int | None = None) -> nn.Module:
    """timm's encoder without class token and head."""
    name, patch, side = VITS[vit]
    options = {"img_size": pixels or side, "patch_size": patch, "class_token": False, "global_pool": ""}
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **options)


def block(width: int) -> int:
    """Two norms, attention (query, key, value, projection) and an MLP of four times the width."""
    return 2 * 2 * width + 4 * (width * width + width) + (8 * width * width + 5 * width)


@pytest.mark.parametrize("method", ["dmt_jepa", "ijepa"])
@pytest.mark.parametrize("vit", VITS)
def test_pre_training(vit: str, method: str) -> None:
    model = build(f"{method}/{vit}.py")
    size, theirs = size_of(vit), timms(vit)
    assert count(model.encoder) == count(model.target_encoder) == count(theirs)
    assert {k: v.shape for k, v in model.encoder.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }

    width, (inner, depth) = SIZES[size][0], PREDICTORS[size]
    patches = theirs.pos_embed.shape[1]
    ends = (width * inner + inner) + 2 * inner + (inner * width + width)  # in, norm, out
    assert len(model.predictor.predictor_blocks) == depth
    assert count(model.predictor) == ends + depth * block(inner) + inner + patches * inner

    if method == "ijepa":
        assert model.context_head is None and model.target_head is None
    else:
        assert count(model.context_head) == count(model.target_head) == 2 * block(width) + 2 * width
        if size in LAT:
            assert count(model.context_head) / 1e6 == pytest.approx(LAT[size], abs=0.06)
    heads = 0 if method == "ijepa" else count(model.context_head)
    assert count(model) == 2 * (count(theirs) + heads) + count(model.predictor)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = patches * (width + inner)  # positions
    assert trained == count(theirs) + heads + count(model.predictor) - fixed


# --- dense models


def vit_of(name: str) -> tuple[str, int]:
    """The encoder's name and width."""
    vit = name.removeprefix("linear_").split("_ade20k")[0]
    return vit, SIZES[size_of(vit)][0]


def conv(inputs: int, outputs: int, kernel: int) -> int:
    """A convolution with batch norm."""
    return inputs * outputs * kernel**2 + 2 * outputs


def upernet_parts(width: int) -> dict[str, int]:
    """Feature2Pyramid, UPerHead as wide as the encoder, FCNHead of 256 (mmsegmentation)."""
    double = 4 * width * width + width
    return {
        "neck": 3 * double + 2 * width,
        "decode_head": 4 * conv(width, width, 1)  # pyramid pooling
        + conv(5 * width, width, 3)
        + 3 * (conv(width, width, 1) + conv(width, width, 3))
        + conv(4 * width, width, 3)
        + (width + 1) * CLASSES,
        "auxiliary_head": conv(width, 256, 3) + 257 * CLASSES,
    }


@pytest.mark.parametrize("name", [name for name in DENSE if not name.startswith("linear")])
def test_upernet(name: str) -> None:
    model, (vit, width) = build(f"upernet/{name}.py"), vit_of(name)
    got = {part: count(getattr(model, part)) for part in ("neck", "decode_head", "auxiliary_head")}
    assert got == upernet_parts(width)
    theirs = timms(vit, 518 if vit.endswith("14") else 512)
    assert count(model.backbone) == count(theirs) - count(theirs.norm)  # the neck takes raw maps
    assert count(model) == count(model.backbone) + sum(got.values())


@pytest.mark.parametrize("name", [name for name in DENSE if name.startswith("linear")])
def test_linear(name: str) -> None:
    model, (vit, width) = build(f"upernet/{name}.py"), vit_of(name)
    assert count(model.neck, model.decode_head) == 2 * width + (width + 1) * CLASSES
    assert count(model.backbone) == count(timms(vit, 512))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count(model.neck, model.decode_head)


def test_mmsegmentations_own_upernet_has_these_heads() -> None:
    """Its MAE ViT-B configuration, whose encoder differs by design (class token, relative positions)."""
    spec = find_spec("mmseg")
    path = Path(spec.origin).parent / ".mim/configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"
    if not path.is_file():
        pytest.skip("mmsegmentation is installed without its configurations")
    init_default_scope("mmseg")
    model = Config.fromfile(path).model
    with torch.device("meta"):
        got = {part: count(MODELS.build(model[part])) for part in ("neck", "decode_head", "auxiliary_head")}
    assert got == upernet_parts(768)


def test_totals() -> None:
    """Those of the documents, in millions: everything that is built; UPerNet with its positions for 512 pixels."""
    want = {
        "dmt_jepa/vit_small16.py": 61.45,
        "dmt_jepa/vit_base16.py": 211.26,
        "ijepa/vit_base16.py": 182.91,
        "dmt_jepa/vit_large16.py": 679.15,
        "dmt_jepa/vit_huge14.py": 1362.62,
        "upernet/vit_base16_ade20k_512x512_160k.py": 163.29,
        "upernet/vit_large16_ade20k_512x512_160k.py": 439.90,
        "upernet/vit_huge14_ade20k_512x512_160k.py": 843.48,
        "upernet/linear_vit_base16_ade20k_512x512_40k.py": 86.55,
    }
    assert {name: round(count(build(name)) / 1e6, 2) for name in want} == want
