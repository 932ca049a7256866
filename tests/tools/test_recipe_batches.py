"""The effective batch is printed, and another than the recipe's refused, in both toolkits and for every recipe."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from jepa_plugins.config_files import config_root, list_configs

ROOT = config_root()
FULL = [name for name in list_configs() if "quick/" not in name]
YAML = [name for name in FULL if name.startswith(("detectron2/mask", "detectron2/panoptic"))]
LAZY = [name for name in FULL if name.startswith("detectron2/lazy/") and "/common/" not in name]
UPERNET = [name for name in FULL if name.startswith("mmseg/upernet/") and "base" not in Path(name).stem]


@pytest.mark.parametrize("name", YAML)
def test_detectron2s_recipes(name: str) -> None:
    pytest.importorskip("detectron2")
    from jepa_plugins.d2 import get_config

    solver = get_config(name).SOLVER
    assert solver.RECIPE_IMS_PER_BATCH == solver.IMS_PER_BATCH > 8


@pytest.mark.parametrize("name", LAZY)
def test_lazyconfigs_recipes(name: str) -> None:
    config = pytest.importorskip("detectron2.config")
    cfg = config.LazyConfig.load(str(ROOT / name))
    wanted = cfg.train.recipe_batch
    assert wanted == cfg.dataloader.train.total_batch_size * cfg.optimizer.accumulation > 8


@pytest.mark.parametrize("name", UPERNET)
def test_mmsegmentations_recipes(name: str) -> None:
    config = pytest.importorskip("mmengine.config")
    cfg = config.Config.fromfile(ROOT / name)
    hook = cfg.default_hooks.recipe
    assert hook.type == "RecipeBatchHook" and hook.batch == 16 == 8 * cfg.train_dataloader.batch_size


def test_quick_configurations_have_batches_of_their_own() -> None:
    config = pytest.importorskip("mmengine.config")
    cfg = config.Config.fromfile(ROOT / "mmseg/quick/upernet.py")
    assert cfg.default_hooks.recipe.batch == cfg.train_dataloader.batch_size == 8


@pytest.mark.parametrize(
    ("recipe", "world", "sentence"),
    [
        (16, 2, r"batch is 12 \(2 images x 2 processes x 3 accumulated\), the recipe's 16: take a number of"),
        (24, 2, "the recipe's 24: set train_dataloader.batch_size=4, or default_hooks.recipe.batch=None"),
        (12, 2, None),
        (None, 5, None),
    ],
)
def test_the_hook(recipe, world, sentence, monkeypatch, caplog) -> None:
    pytest.importorskip("mmengine")
    from jepa_plugins.mm import run_hooks

    monkeypatch.setattr(run_hooks, "get_world_size", lambda: world)
    runner = SimpleNamespace(
        _train_loop=object(),
        train_dataloader=SimpleNamespace(batch_size=2),
        optim_wrapper=SimpleNamespace(_accumulative_counts=3),
        logger=logging.getLogger("a run"),
    )
    hook = run_hooks.RecipeBatchHook(recipe)
    with caplog.at_level(logging.INFO):
        if sentence is None:
            hook.before_run(runner)
        else:
            with pytest.raises(ValueError, match=sentence):
                hook.before_run(runner)
    assert f"effective batch {6 * world} = 2 images x {world} processes x 3 accumulated" in caplog.text
    hook.before_run(SimpleNamespace(_train_loop={"type": "IterBasedTrainLoop"}))  # of a test: nothing trains


def test_a_resumed_run_takes_its_own_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("mmengine")
    import train  # tools/train.py

    def configured(*flags: str):
        arguments = ["mmseg/quick/dmt_jepa.py", "--work-dir", str(tmp_path), *flags]
        return train.configuration(
            train.build_parser().parse_args([*arguments, "--cfg-options", "load_from=start.pth"])
        )

    assert (configured().resume, configured().load_from) == (False, "start.pth")
    first = configured("--resume")  # nothing has been saved yet
    assert (first.resume, first.load_from) == (False, "start.pth")
    (tmp_path / "iter_2.pth").touch()
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    later = configured("--resume")
    assert (later.resume, later.load_from) == (True, None)
