"""What a result says of its protocol is what its configuration, or the transform that it leaves it to, says."""

from __future__ import annotations

from pathlib import Path

import pytest

from jepa_plugins.reproduction import protocol
from jepa_plugins.reproduction.protocol import protocol_of

SEMANTIC = "detectron2/mask2former/ade20k/semantic_R50.yaml"
PANOPTIC_COCO = "detectron2/mask2former/coco/panoptic_R50.yaml"
BOXES = "detectron2/mask_rcnn/vitb_100ep.yaml"
UPERNET = "mmseg/upernet/vit_base16_ade20k_512x512_160k.py"
LINEAR = "mmseg/upernet/linear_vit_large16_ade20k_512x512_40k.py"


def detectron2(folder: Path, config: str, *opts: object) -> dict:
    pytest.importorskip("detectron2")
    from jepa_plugins.d2.config import get_config

    (folder / "config.yaml").write_text(get_config(config, list(opts)).dump())
    return protocol_of(folder, "detectron2")


def mmengine(folder: Path, config: str, **changes: object) -> dict:
    pytest.importorskip("mmengine")
    from mmengine.config import Config

    from jepa_plugins.config_files import config_root

    cfg = Config.fromfile(config_root() / config)
    cfg.merge_from_dict(changes)
    cfg.dump(folder / "config.py")
    return protocol_of(folder, "mmengine")


def test_mask2former(tmp_path: Path) -> None:
    found = detectron2(tmp_path, SEMANTIC, "SOLVER.BASE_LR", 0.0002)
    assert found["crop"] == [512, 512] and found["train short sides"][0] == 256
    assert (found["test short side"], found["test longest side"]) == (512, 2048)
    assert found["layers"] == ["res2", "res3", "res4", "res5"] and found["queries"] == 100
    assert found["mixed precision"] is True and found["learning rate"] == 0.0002
    assert found["scales"] == "single" and found["flip in test"] is False
    assert found["iterations"] == 160000 and found["images an iteration"] == 16


def test_large_scale_jitter_has_its_range(tmp_path: Path) -> None:
    found = detectron2(tmp_path, PANOPTIC_COCO)
    assert found["crop"] == 1024 and found["train scales"] == [0.1, 2.0]
    assert "train short sides" not in found  # which this mapper does not read


def test_boxes(tmp_path: Path) -> None:
    found = detectron2(tmp_path, BOXES, "SOLVER.AMP.ENABLED", False, "INPUT.MIN_SCALE", 0.5)
    assert found["mixed precision"] is False and found["train scales"] == [0.5, 2.0]
    assert found["thresholds"] == {"score": 0.05, "nms": 0.5} and "queries" not in found


def test_what_the_configuration_asks_for_otherwise_is_not_called_single(tmp_path: Path) -> None:
    found = detectron2(tmp_path, SEMANTIC, "TEST.AUG.ENABLED", True)
    assert "scales" not in found and "flip in test" not in found


def test_interpolation_is_the_transforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert detectron2(tmp_path, SEMANTIC)["interpolation"] == "bilinear"
    transforms = pytest.importorskip("detectron2.data.transforms")

    class Nearest:
        def __init__(self, interp: int = 0) -> None:
            pass

    monkeypatch.setattr(transforms, "ResizeShortestEdge", Nearest)
    assert protocol_of(tmp_path, "detectron2")["interpolation"] == "nearest"
    monkeypatch.setattr(protocol, "_default", lambda *names: None)
    assert "interpolation" not in protocol_of(tmp_path, "detectron2")


def test_upernet(tmp_path: Path) -> None:
    found = mmengine(tmp_path, UPERNET)
    assert found["crop"] == [512, 512] and found["test size"] == [2048, 512]
    assert found["train size"] == [2048, 512] and found["train scales"] == [0.5, 2.0]
    assert found["layers"] == [3, 5, 7, 11] and found["final norm"] is False
    assert found["frozen backbone"] is False and found["mixed precision"] is False
    assert found["inference"]["mode"] == "slide" and found["scales"] == "single"
    assert found["interpolation"] == "bilinear" and "pooling" not in found


def test_changes_of_an_mmseg_configuration_are_seen(tmp_path: Path) -> None:
    changes = {
        "model.backbone.out_indices": [1, 2],
        "model.backbone.final_norm": True,
        "optim_wrapper.type": "AmpOptimWrapper",
        "test_dataloader.dataset.pipeline.1.interpolation": "bicubic",
    }
    found = mmengine(tmp_path, UPERNET, **changes)
    assert found["layers"] == [1, 2] and found["final norm"] is True
    assert found["mixed precision"] is True and found["interpolation"] == "bicubic"
    several = mmengine(tmp_path, UPERNET, **{"test_dataloader.dataset.pipeline.1.type": "TestTimeAug"})
    assert several["scales"] != "single" and "test size" not in several


def test_linear_heads_read_a_frozen_backbone(tmp_path: Path) -> None:
    found = mmengine(tmp_path, LINEAR)
    assert found["frozen backbone"] is True and found["layers"] == [-1] and found["final norm"] is True


def test_no_configuration_no_protocol(tmp_path: Path) -> None:
    assert protocol_of(tmp_path, "detectron2") == protocol_of(tmp_path, "mmengine") == {}
