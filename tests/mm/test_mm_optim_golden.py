"""Schedules and parameter groups against the published code's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.registry import PARAM_SCHEDULERS  # noqa: E402

from jepa_plugins.mm.model import DMTJEPA  # noqa: E402
from jepa_plugins.mm.optim import PretrainOptimWrapper, parameter_groups  # noqa: E402


def test_schedules_golden(golden_dir: Path) -> None:
    folder = golden_dir / "ijepa_schedules"
    meta = json.loads((folder / "meta.json").read_text())
    rows = {int(row[0]): row[1:3] for row in np.load(folder / "arrays.npz")["rows64"].tolist()}
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2, 2))]},
        {"params": [torch.nn.Parameter(torch.zeros(2))], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=meta["lr"], weight_decay=meta["weight_decay"])
    wrapper = PretrainOptimWrapper(optimizer)
    per_epoch = meta["iterations_per_epoch"]
    configs = [
        {
            "type": "WarmupCosineLR",
            "start": meta["start_lr"],
            "final": meta["final_lr"],
            "warmup_epochs": meta["warmup_epochs"],
            "ref_batch": 2048,
        },
        {"type": "RisingWeightDecay", "final": meta["final_weight_decay"], "shape": "cosine"},
    ]
    schedules = [PARAM_SCHEDULERS.build(c, default_args={"optimizer": wrapper}) for c in configs]
    total = meta["epochs"] * per_epoch
    for schedule in schedules:
        schedule.configure(total, 1, per_epoch, 2048)
    for iteration in range(max(rows) + 1):
        if iteration in rows:
            got = [optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]]
            assert got == pytest.approx(rows[iteration], rel=1e-9)
            assert optimizer.param_groups[1]["weight_decay"] == 0.0
        for schedule in schedules:
            schedule.step()


def test_parameter_groups_golden(golden_dir: Path) -> None:
    meta = json.loads((golden_dir / "ijepa_schedules" / "meta.json").read_text())
    counts = meta["parameter_groups"]["tensors_vit_tiny_predictor_depth_2"]
    model = DMTJEPA("tiny", predictor={"width": 384, "depth": 2}, msn=None, lat=None, loss="smooth_l1")
    decayed, plain = parameter_groups(model)
    tables = 2  # pos_embed and predictor_pos_embed, which take no gradient, are counted there
    assert len(decayed["params"]) == counts[0] + counts[1] - tables
    assert len(plain["params"]) == counts[2] + counts[3] and plain["weight_decay"] == 0.0
    assert any(p is model.predictor.mask_token for p in decayed["params"])
