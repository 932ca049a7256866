"""tools/export.py: a pre-training checkpoint becomes a Mask2Former checkpoint."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from jepa_plugins.core import export as core_export
from jepa_plugins.core.checkpoints import CheckpointError, read_checkpoint, save_atomic, state_dict_of
from jepa_plugins.core.export import PIXEL_DECODER as PIXEL
from jepa_plugins.core.export import PREDICTOR

TOOL = Path(__file__).resolve().parents[2] / "tools" / "export.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


export = load_tool()


class PixelDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_proj = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)])
        self.transformer = nn.ModuleDict({"encoder": nn.Linear(4, 4)})
        self.adapter_1 = nn.Conv2d(4, 4, 1)
        self.mask_features = nn.Conv2d(4, 4, 1)


class Predictor(nn.Module):
    _version = 2

    def __init__(self, classes: int, layers: int, queries: int) -> None:
        super().__init__()
        for kind in ("cross_attention", "self_attention", "ffn"):
            setattr(self, f"transformer_{kind}_layers", nn.ModuleList(nn.Linear(4, 4) for _ in range(layers)))
        self.decoder_norm = nn.LayerNorm(4)
        self.query_feat, self.query_embed = nn.Embedding(queries, 4), nn.Embedding(queries, 4)
        self.level_embed = nn.Embedding(3, 4)
        self.input_proj = nn.ModuleList([nn.Sequential(), nn.Sequential(), nn.Conv2d(4, 4, 1)])
        self.class_embed = nn.Linear(4, classes + 1)
        self.mask_embed = nn.Linear(4, 4)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        rows, key = local_metadata.get("trained_level_rows"), prefix + "level_embed.weight"
        if rows is not None and key in state_dict:
            table = self.level_embed.weight.detach().clone()
            table[rows] = state_dict[key][rows]
            state_dict[key] = table
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Head(nn.Module):
    """Renames everything but the predictor of a version 1 checkpoint, as the published head does."""

    _version = 2

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.pixel_decoder = PixelDecoder()
        self.predictor = Predictor(**sizes)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if (local_metadata.get("version") or 1) < 2:
            for name in [n for n in state_dict if n.startswith(prefix)]:
                if not name.startswith(prefix + "predictor."):
                    state_dict[prefix + "pixel_decoder." + name[len(prefix) :]] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Former(nn.Module):
    def __init__(self, classes: int = 3, layers: int = 2, queries: int = 5, width: int = 4) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.sem_seg_head = Head(classes=classes, layers=layers, queries=queries)
        self.criterion = nn.Module()
        self.criterion.register_buffer("empty_weight", torch.ones(classes + 1))


class PreTraining(nn.Module):
    """The names of MaskJEPA."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        former = Former()
        self.backbone, self.sem_seg_head = former.backbone, former.sem_seg_head
        self.jepa = nn.ModuleDict({"prediction": nn.Linear(4, 4), "denoise": nn.Conv2d(4, 3, 1)})
        self.jepa.mask_token = nn.Parameter(torch.zeros(4))
        self.target_pixel_decoder = copy.deepcopy(self.sem_seg_head.pixel_decoder)
        if not frozen:
            self.target_backbone = copy.deepcopy(self.backbone)
        self.register_buffer("step", torch.tensor(17))
        self.register_buffer("ema_pending", torch.tensor(False))
        with torch.no_grad():
            for tensor in [*self.parameters(), *(b for b in self.buffers() if b.is_floating_point())]:
                tensor.uniform_(-1, 1)


INFO = {"trained_level_rows": [2], "reconstruction": True}


def checkpoint(frozen: bool = True, **info: object) -> dict:
    torch.manual_seed(3)
    return {"model": PreTraining(frozen).state_dict(), "jepa_pretraining": {**INFO, **info}}


def run(content: dict, **options) -> tuple[OrderedDict, dict, object]:
    result, report = export.export(content, export.Options(**options), "pre.pth")
    return result["model"], result["jepa_export"], report


LAYERS = {f"{PREDICTOR}.transformer_{kind}_layers" for kind in ("cross_attention", "self_attention", "ffn")}
DECODER = {f"{PREDICTOR}.{part}" for part in ("decoder_norm", "level_embed", "input_proj")} | LAYERS


def test_keeps_and_drops() -> None:
    content = checkpoint()
    model, manifest, report = run(content)
    pixel = {f"{PIXEL}.{part}" for part in ("input_proj", "transformer", "adapter_1", "mask_features")}
    assert {core_export.group_of(name) for name in model} == {"backbone", *pixel, *DECODER}
    assert all(torch.equal(tensor, content["model"][name]) for name, tensor in model.items())
    assert manifest == {
        "format": 1,
        "which": "online",
        "tensors": len(model),
        "whole": ["backbone", PIXEL],
        "untrained": [],
        "source_step": 17,
    }
    assert model._metadata["sem_seg_head"]["version"] == model._metadata[PREDICTOR]["version"] == 2
    assert model._metadata[PREDICTOR]["trained_level_rows"] == [2]
    for path in model._metadata:
        assert not path or any(name.startswith(path) for name in model), path
    kept = sum(len(tensors) for tensors in report.kept.values())
    dropped = sum(len(tensors) for tensors in report.dropped.values())
    assert kept == len(model) and kept + dropped == len(content["model"])
    for words in ("target_pixel_decoder", "jepa.prediction", "step", "total"):
        assert words in str(report)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_file_loads_and_a_plain_dict_would_not(tmp_path: Path, suffix: str) -> None:
    content = checkpoint()
    result, _ = export.export(content, export.Options(), "pre.pth")
    save_atomic(result, tmp_path / f"out{suffix}")
    weights = state_dict_of(read_checkpoint(tmp_path / f"out{suffix}"))
    model = Former()
    before = model.sem_seg_head.predictor.level_embed.weight.detach().clone()
    outcome = model.load_state_dict(weights, strict=False)
    assert not outcome.unexpected_keys
    heads = ("class_embed", "mask_embed", "query_feat", "query_embed", "empty_weight")
    assert all(any(head in name for head in heads) for name in outcome.missing_keys)
    table = model.sem_seg_head.predictor.level_embed.weight
    assert torch.equal(table[2], weights[export.LEVEL_EMBED][2]) and torch.equal(table[:2], before[:2])
    assert Former().load_state_dict(dict(weights), strict=False).unexpected_keys  # the pitfall


@pytest.mark.parametrize("frozen", [True, False])
def test_ema_takes_the_target_copies(frozen: bool) -> None:
    content = checkpoint(frozen)
    online, _, _ = run(content)
    model, manifest, _ = run(content, which="ema")
    weights = content["model"]
    assert manifest["which"] == "ema" and set(model) == set(online)
    assert dict(model._metadata) == dict(online._metadata)
    for name, tensor in model.items():
        source = name
        if name.startswith(PIXEL):
            source = "target_pixel_decoder" + name[len(PIXEL) :]
        elif name.startswith("backbone.") and not frozen:
            source = "target_" + name
        assert torch.equal(tensor, weights[source])
    assert not torch.equal(model[f"{PIXEL}.adapter_1.weight"], online[f"{PIXEL}.adapter_1.weight"])


def test_options_leave_parts_out() -> None:
    model, manifest, _ = run(checkpoint(), drop=("predictor",))
    assert not any(name.startswith(PREDICTOR) for name in model) and PREDICTOR not in model._metadata
    assert model._metadata["sem_seg_head"]["version"] == 2
    model, manifest, _ = run(checkpoint(), drop=("backbone",))
    assert not any(name.startswith("backbone") for name in model) and manifest["whole"] == [PIXEL]
    model, _, _ = run(checkpoint(readout="query_mix"), keep_queries=True)
    assert f"{PREDICTOR}.query_feat.weight" in model and f"{PREDICTOR}.class_embed.weight" not in model


def test_runs_with_one_loss() -> None:
    model, _, _ = run(checkpoint(reconstruction=False))
    assert not any(name.startswith(PREDICTOR) for name in model)
    model, manifest, _ = run(checkpoint(denoising=False))
    assert f"{PIXEL}.transformer.encoder.weight" in model and f"{PIXEL}.input_proj.0.weight" in model
    assert not any("adapter_1" in name or "mask_features" in name for name in model)
    assert manifest["whole"] == ["backbone"]


def test_rows_come_from_the_run_or_the_command_line() -> None:
    content = checkpoint()
    del content["jepa_pretraining"]
    with pytest.raises(CheckpointError, match="--level-rows"):
        run(content)
    assert run(content, level_rows=[2, 0])[0]._metadata[PREDICTOR]["trained_level_rows"] == [0, 2]
    with pytest.raises(CheckpointError, match="rows 0 to 2"):
        run(content, level_rows=[3])
    run(content, drop=("predictor",))  # nothing is asked when the table is not exported
    content["model"]._metadata[""]["jepa_pretraining"] = INFO  # a launcher that saves the model alone
    model, _, _ = run(content)
    assert model._metadata[PREDICTOR]["trained_level_rows"] == [2]
    assert "jepa_pretraining" not in model._metadata[""]
    content = checkpoint()
    del content["jepa_pretraining"]
    content["model"][export.LEVEL_EMBED] = torch.ones(1, 4)  # a single level has a single row
    assert run(content)[0]._metadata[PREDICTOR]["trained_level_rows"] == [0]


def test_other_checkpoints_are_described() -> None:
    former = Former().state_dict()
    with pytest.raises(
        CheckpointError, match="no Mask-JEPA .*'target_pixel_decoder.*looks like a Mask2Former"
    ):
        run({"model": former})
    with pytest.raises(CheckpointError, match="ResNet"):
        run({"layer1.0.conv1.weight": torch.ones(1)})
    result, _ = export.export(checkpoint(), export.Options(), "pre.pth")
    with pytest.raises(CheckpointError, match="export already"):
        run(result)
    content = checkpoint()
    content["model"] = dict(content["model"])
    with pytest.raises(CheckpointError, match="_metadata"):
        run(content)
    with pytest.raises(CheckpointError, match="--keep-queries"):
        run(checkpoint(readout="masked_queries"), keep_queries=True)


def test_proof_accepts_the_right_model_and_no_other(tmp_path: Path) -> None:
    content, _ = export.export(checkpoint(), export.Options(), "pre.pth")
    out = tmp_path / "out.safetensors"
    line = export.write_proven(content, out, lambda: Former(classes=11, queries=7))
    assert f"{len(content['model'])} tensors loaded and equal" in line and out.exists()
    for wrong in (Former(width=8), Former(layers=3), Former(layers=1)):
        with pytest.raises(CheckpointError) as error:
            export.write_proven(content, tmp_path / "wrong.pth", lambda model=wrong: model)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_proof_notices_a_model_that_changes_weights(tmp_path: Path) -> None:
    class Changing(Former):
        def load_state_dict(self, *args, **kwargs):
            outcome = super().load_state_dict(*args, **kwargs)
            with torch.no_grad():
                self.sem_seg_head.pixel_decoder.adapter_1.weight[0] += 1e-3
            return outcome

    content, _ = export.export(checkpoint(), export.Options(), "pre.pth")
    with pytest.raises(CheckpointError, match="adapter_1.weight differs"):
        export.write_proven(content, tmp_path / "out.pth", Changing)


def test_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    save_atomic(checkpoint(), tmp_path / "pre.pth")
    built = []

    def build(config_file: str, opts: list[str]) -> nn.Module:
        built.append((config_file, opts))
        return Former()

    monkeypatch.setattr(export, "build_finetuning_model", build)
    out = tmp_path / "out.pth"
    command = [
        str(tmp_path / "pre.pth"),
        str(out),
        "--which",
        "ema",
        "--config-file",
        "a.yaml",
        "--opts",
        "A",
        "1",
    ]
    assert export.main(command) == 0
    assert built == [("a.yaml", ["A", "1"])]
    printed = capsys.readouterr().out
    assert "loaded and equal" in printed and "dropped" in printed
    assert read_checkpoint(out)["jepa_export"]["which"] == "ema"
    assert export.main([str(tmp_path / "none.pth"), str(out)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- the real models


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small MaskJEPA, with weights that no initialisation gives."""
    pytest.importorskip("detectron2.modeling")
    from detectron2.modeling import build_model

    from jepa_plugins.d2.checkpoint import Checkpointer
    from jepa_plugins.d2.config import get_config

    model = build_model(get_config("detectron2/quick/mask_jepa.yaml", REAL_OPTIONS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1, generator=generator)
    folder = tmp_path_factory.mktemp("pretraining")
    Checkpointer(model, str(folder)).save("model_final", jepa_pretraining=INFO)
    return folder / "model_final.pth"


REAL_OPTIONS = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", "", "MODEL.TIMM.NAME", "resnet10t"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_real_pre_training_becomes_a_real_mask2former(
    real: Path, tmp_path: Path, suffix: str, capsys
) -> None:
    from detectron2.modeling import build_model

    from jepa_plugins.d2.checkpoint import Checkpointer
    from jepa_plugins.d2.config import get_config

    out, config = tmp_path / f"out{suffix}", "detectron2/quick/semantic.yaml"
    arguments = [str(real), str(out), "--config-file", config, "--opts", *REAL_OPTIONS]
    assert export.main(arguments) == 0, capsys.readouterr().err
    assert "loaded and equal" in capsys.readouterr().out
    model = build_model(get_config(config, [*REAL_OPTIONS, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"]))
    before = model.sem_seg_head.predictor.level_embed.weight.detach().clone()
    Checkpointer(model, required=["backbone", PIXEL]).load(str(out))
    source = read_checkpoint(real)["model"]
    table = model.sem_seg_head.predictor.level_embed.weight
    assert torch.equal(table[2], source[export.LEVEL_EMBED][2]) and torch.equal(table[:2], before[:2])
    assert torch.equal(
        model.sem_seg_head.predictor.decoder_norm.weight, source[f"{PREDICTOR}.decoder_norm.weight"]
    )


def test_a_fine_tuning_config_of_other_sizes_is_refused(real: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.pth"
    arguments = [
        str(real),
        str(out),
        "--config-file",
        "detectron2/quick/semantic.yaml",
        "--opts",
        *REAL_OPTIONS,
    ]
    for wrong in (["MODEL.MASK_FORMER.DIM_FEEDFORWARD", "128"], ["MODEL.MASK_FORMER.DEC_LAYERS", "6"]):
        assert export.main([*arguments, *wrong]) == 1
        assert capsys.readouterr().err.count("error: ") == 1
    assert not list(tmp_path.iterdir())
