"""UPerNet and linear segmentation: configurations, mmsegmentation's own launchers, ours, a user's configuration."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_tiny import QUICK, REPOSITORY
from preparing.synthetic import make_synthetic

pytest.importorskip("mmseg")

from mmengine.config import Config, DictAction  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from jepa_plugins.core.dmt_jepa import DMTJEPAModel, DMTJEPASettings  # noqa: E402
from jepa_plugins.core.vit import Predictor, VisionTransformer  # noqa: E402

UPERNET = REPOSITORY / "configs" / "mmseg" / "upernet"
PAPER = sorted(path.stem for path in UPERNET.glob("*ade20k*.py"))
_spec = find_spec("mmseg")
MMSEG = (
    Path(_spec.origin).parent / ".mim" if _spec and _spec.origin else Path()
)  # configs and tools, if installed
_runs = itertools.count()  # mmengine keeps what runs of one name in one process share
ARCH = {"width": 24, "depth": 6, "heads": 2}


# --- configurations -----------------------------------------------------------------------------------


def build(cfg: Config) -> torch.nn.Module:
    """The model on the meta device: shapes without numbers."""
    init_default_scope("mmseg")
    with torch.device("meta"):
        return MODELS.build(copy.deepcopy(cfg.model)).eval()


@pytest.mark.parametrize("name", PAPER)
def test_paper_configurations_build_and_run(name: str) -> None:
    cfg = Config.fromfile(UPERNET / f"{name}.py")
    model = build(cfg)
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 96, 96, device="meta"), mode="tensor")
    assert logits.shape[:2] == (1, 150)
    frozen = not any(p.requires_grad for p in model.backbone.parameters())
    assert frozen == name.startswith("linear")
    origin = "ijepa" if name.endswith("_ijepa") else "dmt_jepa"
    vit = name.removeprefix("linear_").split("_ade20k")[0]
    assert cfg.model.backbone.init_cfg.checkpoint == f"checkpoints/{origin}_{vit}.pth"


@pytest.mark.parametrize(
    ("name", "indices", "width"),
    [
        ("vit_base16", (3, 5, 7, 11), 768),
        ("vit_large16", (7, 11, 15, 23), 1024),
        ("vit_huge14", (7, 15, 23, 31), 1280),
        ("vit_huge16", (7, 15, 23, 31), 1280),
    ],
)
def test_the_papers_recipe(name: str, indices: tuple[int, ...], width: int) -> None:
    cfg = Config.fromfile(UPERNET / f"{name}_ade20k_512x512_160k.py")
    optimizer = cfg.optim_wrapper.optimizer
    assert tuple(cfg.model.backbone.out_indices) == indices and cfg.model.decode_head.channels == width
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 3e-4, 0.05)
    assert cfg.optim_wrapper.paramwise_cfg.decay_rate == 0.65
    assert cfg.param_scheduler[-1].power == 0.9 and cfg.param_scheduler[-1].end == 160000
    assert cfg.train_cfg.max_iters == 160000 and cfg.train_dataloader.batch_size * 8 == 16
    assert cfg.crop_size == (512, 512)
    assert cfg.custom_imports.imports == ["jepa_plugins.mm"]


# --- runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated data, and a checkpoint as DMT-JEPA's pre-training holds its model."""
    folder = tmp_path_factory.mktemp("upernet")
    make_synthetic(
        folder / "synthetic", train=4, val=2, unlabelled=0, size=48, seed=0, workers=1, overwrite=False
    )
    torch.manual_seed(0)
    encoder = VisionTransformer(32, 8, width=24, depth=6, heads=2)
    predictor = Predictor((4, 4), 24, width=16, depth=1, heads=2)
    settings = DMTJEPASettings(neighbourhood=None, target="none", context="none")
    model = DMTJEPAModel(encoder, predictor, settings, ema=(0.996, 1.0), total_steps=1)
    torch.save({"state_dict": model.state_dict()}, folder / "pretrained.pth")
    return folder


def options(work: Path, data: str = "synthetic") -> list[str]:
    """What shrinks a quick configuration."""
    datasets = [f"{kind}_dataloader.dataset.data_root={work / data}" for kind in ("train", "val", "test")]
    return [
        *datasets,
        *(f"model.backbone.arch.{key}={value}" for key, value in ARCH.items()),
        "train_dataloader.batch_size=2",
        "default_hooks.recipe.batch=None",
        "train_cfg.max_iters=2",
        "train_cfg.val_interval=2",
        "default_hooks.logger.interval=1",
        "default_hooks.checkpoint.interval=2",
        "log_level=WARNING",
        *(f"{key}={key}{next(_runs)}" for key in ("visualizer.name", "experiment_name")),
    ]


SMALL_HEADS = [
    "model.neck.embed_dim=24",
    "model.decode_head.in_channels=[24,24,24,24]",
    "model.decode_head.channels=8",
    "model.auxiliary_head.in_channels=24",
    "model.auxiliary_head.channels=8",
]
LINEAR_HEADS = ["model.neck.channels=24", "model.decode_head.in_channels=24", "model.decode_head.channels=24"]


def launch(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run a launcher as the command line does, in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


def losses(folder: Path) -> list[float]:
    """Of the iterations of a run."""
    logs = [path.read_text().splitlines() for path in sorted(folder.glob("*/vis_data/scalars.json"))]
    lines = [json.loads(line) for log in logs for line in log]
    return [line["loss"] for line in lines if "loss" in line]


def launcher(whose: str, name: str) -> Path:
    path = (MMSEG if whose == "mmsegmentation" else REPOSITORY) / "tools" / f"{name}.py"
    if not path.is_file():
        pytest.skip(f"{whose} is installed without its tools")
    return path


@pytest.mark.parametrize("whose", ["mmsegmentation", "ours"])
def test_unmodified_launchers_train_and_test(whose: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = work / whose
    checkpoint = f"model.backbone.init_cfg.checkpoint={work / 'pretrained.pth'}"
    train, test = launcher(whose, "train"), launcher(whose, "test")

    def arguments() -> tuple[object, ...]:
        return "--work-dir", folder, "--cfg-options", *options(work), *SMALL_HEADS, checkpoint

    launch(train, monkeypatch, QUICK / "upernet.py", *arguments())
    assert len(losses(folder)) == 2
    weights = torch.load(folder / "iter_2.pth", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in weights} == {"backbone", "neck", "decode_head", "auxiliary_head"}
    launch(test, monkeypatch, QUICK / "upernet.py", folder / "iter_2.pth", *arguments())
    (result,) = folder.glob("*/*.json")
    assert 0 <= json.loads(result.read_text())["mIoU"] <= 100


def test_both_launchers_do_the_same(work: Path) -> None:
    if not (work / "mmsegmentation").is_dir():
        pytest.skip("mmsegmentation is installed without its tools")
    assert losses(work / "mmsegmentation") == pytest.approx(losses(work / "ours"))


def run(cfg: Config, work: Path, name: str, changes: list[str]) -> Runner:
    """Train a configuration as `tools/train.py` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--changes", nargs="+", action=DictAction)
    cfg.merge_from_dict(parser.parse_args(["--changes", *changes]).changes)
    cfg.work_dir = str(work / name)
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def test_linear_segmentation_trains_the_head_alone(work: Path) -> None:
    cfg = Config.fromfile(QUICK / "upernet_linear.py")
    cfg.model.backbone.init_cfg.checkpoint = str(work / "pretrained.pth")
    model = run(cfg, work, "linear", [*options(work), *LINEAR_HEADS]).model
    weights = torch.load(work / "pretrained.pth", weights_only=True)["state_dict"]
    for name, value in model.backbone.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(value, weights[f"target_encoder.{name}"])
    assert not model.backbone.training or not model.backbone.blocks[0].training
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {
        "neck",
        "decode_head",
    }
    trained = sum(p.numel() for p in model.decode_head.parameters() if p.requires_grad)
    assert trained == 24 * 12 + 12


@pytest.mark.parametrize(
    "name", ["upernet_camvid", "upernet_scratch", "upernet_ijepa", "upernet_camvid_scratch"]
)
def test_quick_configurations_build(name: str) -> None:
    cfg = Config.fromfile(QUICK / f"{name}.py")
    model = build(cfg)
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 64, 72, device="meta"), mode="tensor")
    classes = len(cfg.train_dataloader.dataset.metainfo.classes)
    assert logits.shape == (1, classes, 16, 18) and cfg.model.decode_head.num_classes == classes
    assert len(cfg.train_dataloader.dataset.metainfo.palette) == classes
    assert (cfg.model.backbone.init_cfg is None) == name.endswith("scratch")


def test_camvid_reads_the_shared_images(shared: Path) -> None:
    from mmseg.registry import DATASETS

    if not (shared / "data" / "camvid").is_dir():
        pytest.skip("no data/camvid")
    cfg = Config.fromfile(QUICK / "upernet_camvid.py")
    init_default_scope("mmseg")
    for loader, count in ((cfg.train_dataloader, 367), (cfg.val_dataloader, 101)):
        dataset = DATASETS.build({**loader.dataset, "data_root": str(shared / "data" / "camvid")})
        assert len(dataset) == count
        labels = dataset[0]["data_samples"].gt_sem_seg.data
        assert set(labels.unique().tolist()) <= {*range(11), 255}


# --- a user's configuration ---------------------------------------------------------------------------

# As the documents show it, with the checkpoint's name in place of FILE.
FIVE_LINES = """\
custom_imports = dict(imports=["jepa_plugins.mm"])
vit = dict(type="JEPAViT", arch="base", init_cfg=dict(type="Pretrained", checkpoint="FILE"), _delete_=True)
neck = dict(type="Feature2Pyramid", embed_dim=768, rescales=[4, 2, 1, 0.5])
heads = dict(decode_head=dict(in_channels=[768] * 4), auxiliary_head=dict(in_channels=768))
model = dict(pretrained=None, backbone=vit, neck=neck, **heads)
"""


STOCK = "upernet/upernet_r50_4xb4-160k_ade20k-512x512.py"


def users_config(folder: Path, lines: str, name: str = STOCK) -> Config:
    stock = MMSEG / "configs" / name
    if not stock.is_file():
        pytest.skip("mmsegmentation is installed without its configurations")
    path = folder / "mine.py"
    path.write_text(f"_base_ = {str(stock)!r}\n{lines}")
    return Config.fromfile(path)


def test_five_lines_change_a_stock_configuration(tmp_path: Path) -> None:
    assert FIVE_LINES.count("\n") == 5 and FIVE_LINES in (REPOSITORY / "README.md").read_text(
        encoding="utf-8"
    )
    cfg = users_config(tmp_path, FIVE_LINES)
    assert cfg.model.decode_head.type == "UPerHead" and cfg.model.decode_head.num_classes == 150
    model = build(cfg)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64, device="meta"), mode="tensor").shape == (1, 150, 16, 16)


@pytest.mark.parametrize(
    "name",
    [
        "vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py",
        "vit/vit_deit-b16_upernet_8xb2-80k_ade20k-512x512.py",  # whose neck is None
    ],
)
def test_five_lines_where_the_base_has_a_neck(tmp_path: Path, name: str) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "add `_delete_=True` to `neck`" in readme
    cfg = users_config(tmp_path, FIVE_LINES.replace("0.5])", "0.5], _delete_=True)"), name)
    model = build(cfg)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64, device="meta"), mode="tensor").shape == (1, 150, 16, 16)


DECAY_LINES = """\
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="ViTLayerDecayConstructor",
    paramwise_cfg=dict(decay_rate=0.65),
    optimizer=dict(type="AdamW", lr=3e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
"""


@pytest.mark.parametrize(
    "name", [STOCK, "mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"]
)  # whose optimisers are SGD and mmsegmentation's own layer-wise one
def test_layer_decay_replaces_a_stock_optimiser(tmp_path: Path, name: str) -> None:
    assert DECAY_LINES in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    neck = FIVE_LINES.replace("0.5])", "0.5], _delete_=True)") if "mae" in name else FIVE_LINES
    cfg = users_config(tmp_path, neck + DECAY_LINES, name)
    wrapper = build_optim_wrapper(build(cfg), cfg.optim_wrapper)
    rates = {group["lr_scale"] for group in wrapper.optimizer.param_groups}
    assert type(wrapper.optimizer) is torch.optim.AdamW and len(rates) == 14
    with pytest.raises(ValueError, match="_delete_=True"):
        inherited = "optim_wrapper = dict(constructor='ViTLayerDecayConstructor', paramwise_cfg=dict(a=1))"
        cfg = users_config(tmp_path, neck + inherited, name)
        build_optim_wrapper(build(cfg), cfg.optim_wrapper)


def test_five_lines_train(work: Path, tmp_path: Path) -> None:
    small = (
        FIVE_LINES.replace('"base"', str(ARCH))
        .replace("768", "24")
        .replace("FILE", str(work / "pretrained.pth"))
    )
    small = small.replace('JEPAViT",', 'JEPAViT", patch_size=8, out_indices=(1, 2, 3, 5),')
    cfg = users_config(tmp_path, small)
    changes: dict[str, Any] = {
        "model.decode_head.channels": 8,
        "model.auxiliary_head.channels": 8,
        "model.data_preprocessor.size": (32, 32),
        "train_cfg.max_iters": 1,
        "train_cfg.val_interval": 5,
        "default_hooks.logger.interval": 1,
        "log_level": "WARNING",
        "work_dir": str(tmp_path / "run"),
        "experiment_name": "five_lines",
        "visualizer.name": "five_lines",
    }
    for kind in ("train", "val", "test"):
        changes[f"{kind}_dataloader.dataset.data_root"] = str(work / "synthetic")
        changes[f"{kind}_dataloader.num_workers"] = 0
        changes[f"{kind}_dataloader.persistent_workers"] = False
    changes["train_dataloader.batch_size"] = 2
    cfg.merge_from_dict(changes)
    cfg.train_dataloader.dataset.pipeline[2].scale = (64, 48)
    cfg.train_dataloader.dataset.pipeline[3].crop_size = (32, 32)
    runner = Runner.from_cfg(cfg)
    runner.train()
    weights = torch.load(work / "pretrained.pth", weights_only=True)["state_dict"]
    got = runner.model.backbone.state_dict()["blocks.3.attn.qkv.weight"]
    torch.testing.assert_close(got, weights["target_encoder.blocks.3.attn.qkv.weight"], rtol=0, atol=0.02)
    assert len(losses(tmp_path / "run")) == 1
