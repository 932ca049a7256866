"""Every configuration builds, and says what the papers say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, TRANSFORMS  # noqa: E402

import jepa_plugins.mm  # noqa: E402, F401
from jepa_plugins.core.dmt_jepa import IJEPA, DMTJEPASettings  # noqa: E402
from jepa_plugins.core.multiblock import MultiBlock  # noqa: E402
from jepa_plugins.core.neighbours import Neighbourhood  # noqa: E402
from jepa_plugins.mm.model import DMTJEPA  # noqa: E402

ROOT = Path(__file__).resolve().parents[2] / "configs" / "mmseg"
FOLDERS = ("dmt_jepa", "ijepa", "quick")  # of pre-training
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if "DMTJEPA" in Config.fromfile(path).model.type
)
# width, depth, heads, predictor's width and depth, patch, pixels, epochs
SIZES = {
    "vit_tiny16": (192, 12, 3, 192, 6, 16, 224, 600),
    "vit_small16": (384, 12, 6, 384, 6, 16, 224, 600),
    "vit_base16": (768, 12, 12, 384, 6, 16, 224, 600),
    "vit_large16": (1024, 24, 16, 384, 12, 16, 224, 600),
    "vit_large16_416": (1024, 24, 16, 384, 12, 16, 416, 600),
    "vit_huge14": (1280, 32, 16, 384, 12, 14, 224, 300),
    "vit_huge16": (1280, 32, 16, 384, 12, 16, 224, 300),
}


def load(name: str) -> Config:
    return Config.fromfile(ROOT / name)


def build(cfg: Config) -> DMTJEPA:
    with torch.device("meta"):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize("name", FILES)
def test_configurations_build(name: str) -> None:
    cfg = load(name)
    model = build(cfg)
    assert cfg.custom_imports.imports == ["jepa_plugins.mm"]
    for transform in cfg.train_dataloader.dataset.pipeline:
        TRANSFORMS.build(transform)
    assert cfg.train_dataloader.dataset.pipeline[0].size == cfg.model.img_size
    assert (model.settings == IJEPA) == ("ijepa/" in name or name.startswith("quick/ijepa"))


@pytest.mark.parametrize("method", ["dmt_jepa", "ijepa"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_golden(method: str, size: str) -> None:
    cfg = load(f"{method}/{size}.py")
    model = build(cfg)
    encoder, predictor = model.encoder, model.predictor
    got = (
        encoder.width,
        len(encoder.blocks),
        encoder.heads,
        predictor.mask_token.shape[-1],
        len(predictor.predictor_blocks),
        encoder.patch_size,
        cfg.model.img_size,
        cfg.train_cfg.epochs,
    )
    assert got == SIZES[size]
    assert cfg.train_cfg.recipe.steps == 626 * cfg.train_cfg.epochs
    assert 2048 % cfg.train_dataloader.batch_size == 0 and cfg.train_cfg.recipe.batch == 2048


def test_paper_recipe_golden() -> None:
    """Section 4.1 and appendix A.1."""
    cfg = load("dmt_jepa/vit_base16.py")
    model = build(cfg)
    assert model.settings == DMTJEPASettings() and model.mask == MultiBlock() and model.scope == "process"
    assert model.settings.neighbourhood == Neighbourhood(window=3, k=4, include_self=False, border="shift")
    assert (cfg.optim_wrapper.optimizer.type, cfg.optim_wrapper.optimizer.lr) == ("AdamW", 1e-3)
    assert cfg.optim_wrapper.clip_grad is None and cfg.optim_wrapper.dtype == "bfloat16"
    lr, decay = cfg.param_scheduler
    assert (lr.start, lr.final, lr.warmup_epochs, lr.ref_batch) == (1e-4, 1e-6, 15, 2048)
    assert (cfg.optim_wrapper.optimizer.weight_decay, decay.final, decay.shape) == (0.04, 0.4, "linear")
    assert tuple(cfg.model.ema) == (0.996, 1.0)
    assert cfg.train_cfg.recipe.steps == 375600 and not cfg.train_dataloader.batch_sampler.drop_last
    crop, jitter, grey = cfg.train_dataloader.dataset.pipeline
    assert tuple(crop.scale) == (0.2, 1.0) and crop.flip == 0.5 and grey.prob == 0.2
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.4, 0.4, 0.4, 0.1)


def test_released_recipe_golden() -> None:
    cfg = load("dmt_jepa/released/vit_base16.py")
    lr, decay = cfg.param_scheduler
    assert (lr.start, lr.warmup_epochs, decay.shape) == (2e-4, 40, "cosine")
    assert cfg.model.loss == "smooth_l1" and cfg.model.msn.border == "wrap"
    (crop,) = cfg.train_dataloader.dataset.pipeline
    assert tuple(crop.scale) == (0.3, 1.0) and crop.flip == 0.0
    assert cfg.train_dataloader.batch_sampler.drop_last and cfg.train_cfg.recipe.steps == 375000
    assert load("dmt_jepa/released/vit_huge14.py").train_cfg.recipe.steps == 187500


ABLATIONS = {
    "table8_none": DMTJEPASettings(neighbourhood=None, target="none", context="none"),
    "table8_msn": DMTJEPASettings(lat="parameter_free", target="average", context="none"),
    "table8_lat": DMTJEPASettings(neighbourhood=None),
    "table8_both": DMTJEPASettings(),
    "tableD3_average": DMTJEPASettings(lat="parameter_free", target="average", context="none"),
    "tableD3_max": DMTJEPASettings(lat="parameter_free", target="max", context="none"),
    "tableD4_self_cross": DMTJEPASettings(context_attention="self"),
    "tableD4_self_self": DMTJEPASettings(context_attention="self", target="self"),
    "tableD6_window5": DMTJEPASettings(neighbourhood=Neighbourhood(window=5)),
    "tableD6_window_all": DMTJEPASettings(neighbourhood=Neighbourhood(window=0)),
    "tableD6_k1": DMTJEPASettings(neighbourhood=Neighbourhood(k=1)),
    "tableD6_k2": DMTJEPASettings(neighbourhood=Neighbourhood(k=2)),
    "tableD6_k8": DMTJEPASettings(neighbourhood=Neighbourhood(k=8)),
    "parameter_free": DMTJEPASettings(lat="parameter_free"),
}


def test_all_ablations_are_checked() -> None:
    assert {path.stem for path in (ROOT / "dmt_jepa" / "ablations").glob("*.py")} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_golden(name: str) -> None:
    cfg = load(f"dmt_jepa/ablations/{name}.py")
    model = build(cfg)
    assert model.settings == ABLATIONS[name] and model.encoder.width == 384
    base = load("dmt_jepa/vit_small16.py")
    different = {key for key in base if cfg[key] != base[key] and key != "model"}
    assert different == set()


@pytest.mark.parametrize("name", ABLATIONS)
def test_quick_twins_of_the_ablations_golden(name: str) -> None:
    """The same changes at the quick size, and no other."""
    twin = "quick/dmt_jepa_parameter_free.py" if name == "parameter_free" else f"quick/ablations/{name}.py"
    cfg, base = load(twin), load("quick/dmt_jepa.py")
    assert build(cfg).settings == ABLATIONS[name]
    assert {key for key in base if cfg[key] != base[key]} <= {"model"}
    methods = ("msn", "lat")
    assert {key: value for key, value in cfg.model.items() if key not in methods} == {
        key: value for key, value in base.model.items() if key not in methods
    }
