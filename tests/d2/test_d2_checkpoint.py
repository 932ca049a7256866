"""The detectron2 checkpointer: whole files, safe reading, and loads that fail loudly."""

from __future__ import annotations

import copy
import logging
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from fvcore.common.checkpoint import PeriodicCheckpointer

from jepa_plugins.core.checkpoints import CheckpointError, save_atomic
from jepa_plugins.d2.checkpoint import Checkpointer


class Head(nn.Module):
    """Renames everything but the predictor of a version 1 checkpoint, as the published head does."""

    _version = 2

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.pixel_decoder = nn.Linear(4, 4)
        self.predictor = nn.ModuleDict({"class_embed": nn.Linear(4, classes + 1)})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if (local_metadata.get("version") or 1) < 2:
            for name in [n for n in state_dict if n.startswith(prefix)]:
                if not name.startswith(prefix + "predictor."):
                    state_dict[prefix + "pixel_decoder." + name[len(prefix) :]] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Former(nn.Module):
    def __init__(self, classes: int = 3, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone or nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.sem_seg_head = Head(classes)
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))


class PreTraining(Former):
    def __init__(self, frozen: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.jepa = nn.Linear(4, 4)
        self.target_pixel_decoder = copy.deepcopy(self.sem_seg_head.pixel_decoder)
        if not frozen:
            self.target_backbone = copy.deepcopy(self.backbone)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1, generator=generator)
    return model


def equal(left: nn.Module, right: nn.Module, prefix: str = "") -> bool:
    theirs = right.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in left.state_dict().items() if k.startswith(prefix))


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()


def resnet(depth: int = 18) -> nn.Module:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res5"]
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def imagenet_pkl(path: Path, depth: int = 18) -> nn.Module:
    """A file like ImageNetPretrained/torchvision/R-50.pkl of detectron2; returns the backbone in it."""
    backbone = randomised(resnet(depth), seed=7)
    arrays = {name: tensor.numpy() for name, tensor in backbone.state_dict().items()}
    arrays["stem.fc.weight"] = np.zeros((10, 4), dtype=np.float32)
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return backbone


# --- saving and resuming


def test_saves_versions_and_resumes_everything(tmp_path: Path) -> None:
    model = randomised(Former())
    optimizer = torch.optim.AdamW(model.parameters())
    train_a_step(model, optimizer)
    saver = Checkpointer(model, str(tmp_path), optimizer=optimizer)
    PeriodicCheckpointer(saver, period=1, max_iter=5).step(3, rng=torch.arange(3), best=np.float64(2.0))
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000003.pth"]
    written = torch.load(tmp_path / "model_0000003.pth", weights_only=False)
    assert written["model"]._metadata["sem_seg_head"]["version"] == 2

    again = Former()
    other = torch.optim.AdamW(again.parameters())
    rest = Checkpointer(again, str(tmp_path), optimizer=other).resume_or_load("ignored.pth", resume=True)
    assert equal(again, model) and rest["iteration"] == 3 and rest["best"] == 2.0
    assert rest["rng"].tolist() == [0, 1, 2]
    moments = other.state_dict()["state"]
    assert moments and torch.equal(moments[0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_crash_while_saving_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch) -> None:
    model = randomised(Former())
    saver = Checkpointer(model, str(tmp_path))
    saver.save("model_1")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("model_1", "model_2"):
        with pytest.raises(CheckpointError, match="No space left"):
            saver.save(name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    Checkpointer(Former(), str(tmp_path), save_to_disk=False).save("model")
    Checkpointer(Former(), "").save("model")
    assert not list(tmp_path.iterdir())


def test_resume_needs_everything(tmp_path: Path) -> None:
    model = randomised(Former())
    Checkpointer(model, str(tmp_path)).save("model_1")
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    with pytest.raises(CheckpointError, match="lacks the state of optimizer"):
        Checkpointer(model, str(tmp_path), optimizer=optimizer).resume_or_load("", resume=True)
    with pytest.raises(CheckpointError, match="lacks 2 of the .* jepa"):
        Checkpointer(PreTraining(frozen=True), str(tmp_path), required=["jepa"]).load(
            str(tmp_path / "model_1.pth")
        )
    with pytest.raises(CheckpointError, match="lacks"):
        Checkpointer(PreTraining(), str(tmp_path)).resume_or_load("", resume=True)
    (tmp_path / "model_1.pth").unlink()
    with pytest.raises(FileNotFoundError, match="last_checkpoint.* names model_1.pth"):
        Checkpointer(model, str(tmp_path)).resume_or_load("", resume=True)


def test_without_resume_only_the_model_is_loaded(tmp_path: Path) -> None:
    model = randomised(Former())
    optimizer = torch.optim.AdamW(model.parameters())
    train_a_step(model, optimizer)
    Checkpointer(model, str(tmp_path), optimizer=optimizer).save("a", iteration=9)
    again = Former()
    other = torch.optim.AdamW(again.parameters())
    loader = Checkpointer(again, str(tmp_path / "run"), optimizer=other)
    loader.resume_or_load(str(tmp_path / "a.pth"), resume=True)  # nothing to resume there
    assert equal(again, model) and not other.state_dict()["state"]
    assert Checkpointer(Former()).load("") == {}


# --- foreign files


def test_torchvision_pkl_loads_into_the_backbone(tmp_path: Path, caplog) -> None:
    backbone = imagenet_pkl(tmp_path / "R-18.pkl")
    model = Former(backbone=resnet())
    with caplog.at_level(logging.INFO):
        loader = Checkpointer(model)
        loader.load(str(tmp_path / "R-18.pkl"))
    assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in backbone.state_dict().items())
    assert loader.report.unexpected == ["stem.fc.weight"]
    assert "tensors loaded" in caplog.text and "stem.fc.weight" in caplog.text
    assert "sem_seg_head.pixel_decoder" in caplog.text  # named as missing
    assert not any("renamed" in record.message for record in caplog.records)


@pytest.mark.parametrize("frozen", [True, False])
def test_targets_start_as_the_loaded_online_modules(tmp_path: Path, frozen: bool) -> None:
    backbone = imagenet_pkl(tmp_path / "R-18.pkl")
    model = PreTraining(frozen, backbone=resnet())
    Checkpointer(model).load(str(tmp_path / "R-18.pkl"))
    expected = backbone.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.backbone.state_dict().items())
    if not frozen:
        assert all(torch.equal(v, expected[k]) for k, v in model.target_backbone.state_dict().items())
    former = randomised(Former(backbone=resnet()))
    save_atomic({"model": former.state_dict()}, tmp_path / "former.pth")
    Checkpointer(model, required=["backbone", "sem_seg_head", "target_pixel_decoder"]).load(
        str(tmp_path / "former.pth")
    )
    assert torch.equal(model.target_pixel_decoder.weight, former.sem_seg_head.pixel_decoder.weight)
    assert equal(former, model)


def test_targets_of_a_checkpoint_are_kept(tmp_path: Path) -> None:
    trained = randomised(PreTraining())
    save_atomic({"model": trained.state_dict()}, tmp_path / "a.pth")
    model = PreTraining()
    Checkpointer(model).load(str(tmp_path / "a.pth"))
    assert equal(model, trained)
    assert not torch.equal(model.target_pixel_decoder.weight, model.sem_seg_head.pixel_decoder.weight)


def test_another_depth_is_another_architecture(tmp_path: Path) -> None:
    imagenet_pkl(tmp_path / "R-18.pkl", depth=18)
    with pytest.raises(CheckpointError, match="R-18.pkl .* another architecture .*res2.2") as error:
        Checkpointer(Former(backbone=resnet(34))).load(str(tmp_path / "R-18.pkl"))
    assert "\n" not in str(error.value)


def test_caffe2_files_and_code_in_pickles(tmp_path: Path) -> None:
    weight = np.full((64, 3, 7, 7), 0.5, dtype=np.float32)
    norm = np.ones(64, np.float32)
    blobs = {"conv1_w": weight, "res_conv1_bn_s": norm, "res_conv1_bn_b": norm, "conv1_w_momentum": weight}
    (tmp_path / "c2.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Module()
            self.backbone.stem = nn.Module()
            self.backbone.stem.conv1 = nn.Conv2d(3, 64, 7, bias=False)
            self.backbone.stem.conv1.norm = nn.BatchNorm2d(64, track_running_stats=False)

    model = Stem()
    Checkpointer(model).load(str(tmp_path / "c2.pkl"))
    assert torch.equal(model.backbone.stem.conv1.weight, torch.from_numpy(weight))

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": {}, "__author__": os.mkdir}))
    with pytest.raises(CheckpointError, match="evil.pkl.*mkdir.*--trust"):
        Checkpointer(model).load(str(tmp_path / "evil.pkl"))
    with pytest.raises(CheckpointError, match="no tensors"):  # it is read, and holds nothing
        Checkpointer(model, trust=[str(tmp_path / "evil.pkl")]).load(str(tmp_path / "evil.pkl"))


def test_matching_heuristics_by_request(tmp_path: Path) -> None:
    bare = randomised(resnet(), seed=3)
    torch.save(bare.state_dict(), tmp_path / "bare.pth")
    model = Former(backbone=resnet())
    with pytest.raises(CheckpointError, match="another architecture"):
        Checkpointer(model).load(str(tmp_path / "bare.pth"))
    loader = Checkpointer(model)
    loader.load(f"{tmp_path}/bare.pth?matching_heuristics=True")
    assert all(torch.equal(v, model.backbone.state_dict()[k]) for k, v in bare.state_dict().items())
    with pytest.raises(CheckpointError, match="other"):
        loader.load(f"{tmp_path}/bare.pth?other=1")


def test_bad_paths_are_one_sentence(tmp_path: Path) -> None:
    loader = Checkpointer(Former(), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="none.pth"):
        loader.load(str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError, match="nowhere://a.pth could not be fetched"):
        loader.load("nowhere://a.pth")
    save_atomic({"model": Former().state_dict()}, tmp_path / "cut.pth")
    data = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut.pth is truncated"):
        loader.load(str(tmp_path / "cut.pth"))
    save_atomic({"model": Former().state_dict()}, tmp_path / "whole.pth")
    loader.load(str(tmp_path / "whole.pth"))  # a failed load leaves the loader usable


def test_a_failed_load_under_current_detectron2(tmp_path: Path, monkeypatch) -> None:
    """Current detectron2 keeps the URL during a load, and asserts at the next that it was cleared."""

    def load(self, path, *args, **kwargs):
        assert self._parsed_url_during_load is None
        self._parsed_url_during_load = path
        rest = FvcoreCheckpointer.load(self, path, *args, **kwargs)
        self._parsed_url_during_load = None
        return rest

    monkeypatch.setattr(DetectionCheckpointer, "load", load)
    monkeypatch.setattr(DetectionCheckpointer, "_parsed_url_during_load", None, raising=False)
    loader = Checkpointer(Former())
    save_atomic({"model": Former(classes=7).state_dict()}, tmp_path / "wrong.pth")
    save_atomic({"model": Former().state_dict()}, tmp_path / "right.pth")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="7 classes"):
            loader.load(str(tmp_path / "wrong.pth"))
    loader.load(str(tmp_path / "right.pth"))


def test_wrong_number_of_classes(tmp_path: Path) -> None:
    save_atomic({"model": Former(classes=7).state_dict()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="7 classes.*has 3.*MODEL.SEM_SEG_HEAD.NUM_CLASSES"):
        Checkpointer(Former(classes=3)).load(str(tmp_path / "a.pth"))
    head = "sem_seg_head.predictor.class_embed"
    loader = Checkpointer(Former(classes=3), leave_out=[head])
    loader.load(str(tmp_path / "a.pth"))
    assert loader.report.left_out == [f"{head}.weight", f"{head}.bias"]


def test_old_names_are_renamed_and_the_published_pixel_mean_may_lack(tmp_path: Path) -> None:
    trained = randomised(Former())
    old = OrderedDict((k.replace("pixel_decoder.", ""), v) for k, v in trained.state_dict().items())
    del old["pixel_mean"]
    torch.save({"model": old}, tmp_path / "v1.pth")
    model = Former()
    loader = Checkpointer(model, required=[""])
    loader.load(str(tmp_path / "v1.pth"))
    assert equal(model, trained, "sem_seg_head") and len(loader.report.renamed) == 2


# --- exports


def exported(model: nn.Module, **manifest: object) -> dict:
    weights = model.state_dict()
    for name in [n for n in weights if "class_embed" in n or n == "pixel_mean"]:
        del weights[name]
    promise = {"format": 1, "tensors": len(weights), "whole": ["backbone", "sem_seg_head.pixel_decoder"]}
    return {"model": weights, "jepa_export": {**promise, **manifest}}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_export_must_load_as_it_promises(tmp_path: Path, suffix: str) -> None:
    trained = randomised(Former())
    path = tmp_path / f"export{suffix}"
    save_atomic(exported(trained), path)
    model = Former(classes=9)
    loader = Checkpointer(model)
    loader.load(str(path))
    assert equal(model.backbone, trained.backbone)
    assert all(name.startswith("sem_seg_head.predictor.class_embed") for name in loader.report.missing)

    save_atomic(exported(trained, tensors=50), path)
    with pytest.raises(CheckpointError, match="export of 50 tensors and only 9 were loaded"):
        Checkpointer(Former()).load(str(path))

    wider = Former(backbone=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    save_atomic(exported(trained), path)
    with pytest.raises(CheckpointError, match="lacks 2 of the 9 tensors of backbone"):
        Checkpointer(wider).load(str(path))


def test_an_export_that_meets_a_version_1_head_fails(tmp_path: Path) -> None:
    """What happens with an export whose module versions say 1: names change and nothing fits."""
    content = exported(randomised(Former()))
    content["model"]._metadata["sem_seg_head"]["version"] = 1
    save_atomic(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="export of 9 tensors and only 7"):
        Checkpointer(Former()).load(str(tmp_path / "a.pth"))


def test_pretraining_checkpoint_in_fine_tuning_is_announced(tmp_path: Path, caplog) -> None:
    content = {"model": randomised(PreTraining()).state_dict(), "jepa_pretraining": {}}
    save_atomic(content, tmp_path / "pre.pth")
    with caplog.at_level(logging.WARNING):
        Checkpointer(PreTraining()).load(str(tmp_path / "pre.pth"))
        assert "export.py" not in caplog.text
        Checkpointer(Former()).load(str(tmp_path / "pre.pth"))
    assert "tools/export.py" in caplog.text
