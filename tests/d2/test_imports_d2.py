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


STOCK_TRAINING = """
import sys, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from jepa_plugins.d2.yaml_files import read_yaml
from detectron2.config import CfgNode
from jepa_plugins.config_files import find_config
from detectron2.utils.env import seed_all_rng
images, out, ours = sys.argv[1:]
cfg = get_cfg()
cfg.merge_from_other_cfg(CfgNode(read_yaml(find_config("detectron2/quick/mask_jepa.yaml"))))
cfg.merge_from_list(["MODEL.TIMM.NAME", "resnet18", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "DATASETS.UNLABELLED",
    (images,), "MODEL.SEM_SEG_HEAD.MASK_DIM", 32, "MODEL.MASK_FORMER.HIDDEN_DIM", 32, "OUTPUT_DIR", out,
    "INPUT.PRETRAIN_CROP_SIZE", (64, 64), "MODEL.MASK_JEPA.MASK.PATCH", 2, "SOLVER.MAX_ITER", 4,
    "SOLVER.IMS_PER_BATCH", 2])
seed_all_rng(0)
if ours == "ours":
    from jepa_plugins.d2.engine import Trainer
else:
    Trainer = DefaultTrainer
trainer = Trainer(cfg)
trainer.resume_or_load(False)
trainer.train()
if trainer.checkpointer.model.ema_pending:
    trainer.checkpointer.model.update_target()
torch.save(trainer.checkpointer.model.state_dict(), out + "/last.pth")
"""


def test_detectron2s_own_trainer_gives_the_same_weights(tmp_path: Path) -> None:
    """Under the environment module DefaultTrainer gets our optimiser, schedule and data."""
    import numpy as np
    import torch
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    states = []
    for trainer in ("ours", "theirs"):
        out = tmp_path / trainer
        out.mkdir()
        argv = f"import sys; sys.argv[1:] = {[str(tmp_path), str(out), trainer]!r}\n"
        run(argv + STOCK_TRAINING, DETECTRON2_ENV_MODULE="jepa_plugins.d2.env", OMP_NUM_THREADS="1")
        states.append(torch.load(out / "last.pth", weights_only=True))
    assert int(states[0]["step"]) == 4
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
