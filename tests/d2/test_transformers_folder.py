"""tools/export.py --format transformers: folders that the package `transformers` loads."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip(
    "transformers", reason="the package transformers is not installed (pip install transformers)"
)

import export as tool  # noqa: E402
from tiny import BACKBONE, PRETRAIN, SMALL, options, tiny_config, tiny_model  # noqa: E402

from jepa_plugins.core.checkpoints import CheckpointError, save_atomic  # noqa: E402
from jepa_plugins.d2 import transformers_folder as folders  # noqa: E402
from jepa_plugins.d2.checkpoint import Checkpointer  # noqa: E402
from jepa_plugins.d2.hooks import PretrainingNote  # noqa: E402

RESNET = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
}
BACKBONES = {
    "timm": BACKBONE,
    "resnet": RESNET,
    "bottleneck": {**RESNET, "MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.WIDTH_PER_GROUP": 16},
    "swin": {
        "MODEL.BACKBONE.NAME": "D2SwinTransformer",
        "MODEL.SWIN.EMBED_DIM": 16,
        "MODEL.SWIN.DEPTHS": (2, 2, 2, 2),
        "MODEL.SWIN.NUM_HEADS": (1, 2, 4, 4),
        "MODEL.SWIN.WINDOW_SIZE": 3,
    },
}
CASES = [
    ("timm", {}),
    ("resnet", {"MODEL.MASK_FORMER.PRE_NORM": True}),
    ("bottleneck", {"MODEL.MASK_FORMER.HIDDEN_DIM": 16}),
    ("bottleneck", {"MODEL.RESNETS.STRIDE_IN_1X1": True}),
    ("swin", {}),
]


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that no initialisation gives; variances that keep a ResNet without training in range."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.fill_(30.0)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.02)
    return model.eval()


def arguments(checkpoint: Path, out: Path, backbone: dict, changes: dict, *more: str) -> list[str]:
    opts = [str(value) for value in options(SMALL, backbone, PRETRAIN, changes)]
    config = ["--config-file", "detectron2/quick/semantic.yaml"]
    return [str(checkpoint), str(out), "--format", "transformers", *config, *more, "--opts", *opts]


def loaded(folder: Path) -> torch.nn.Module:
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_a_fine_tuned_model_gives_equal_outputs(name, changes, tmp_path, capsys) -> None:
    model = stirred(tiny_model({**BACKBONES[name], **changes}, name="semantic"))
    Checkpointer(model, str(tmp_path)).save("model_final")
    out = tmp_path / "folder"
    command = arguments(tmp_path / "model_final.pth", out, BACKBONES[name], changes)
    assert tool.main(command) == 0, capsys.readouterr().err
    assert "gives the same outputs" in (printed := capsys.readouterr().out) and "; 0 tensors start" in printed
    assert sorted(path.name for path in out.iterdir()) == sorted(folders.FILES)
    assert [path.name for path in tmp_path.iterdir() if "unproven" in path.name] == []
    theirs = loaded(out)
    x = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours, other = model.sem_seg_head(model.backbone(x)), theirs(pixel_values=x)
    assert torch.allclose(ours["pred_logits"], other.class_queries_logits, atol=1e-4, rtol=1e-3)
    scale = ours["pred_masks"].abs().max()
    assert (ours["pred_masks"] - other.masks_queries_logits).abs().max() < 1e-3 * scale


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    model = stirred(tiny_model())
    folder = tmp_path_factory.mktemp("pretraining")
    Checkpointer(model, str(folder), jepa_pretraining=PretrainingNote(model)).save("model_final")
    return folder / "model_final.pth"


@pytest.mark.parametrize("which", ["online", "ema"])
def test_a_pre_training_gives_what_it_has(pretrained, which, tmp_path, capsys) -> None:
    out = tmp_path / "folder"
    assert tool.main(arguments(pretrained, out, BACKBONE, {}, "--which", which)) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    fresh = 2 + 6 + 2 + 1  # class head, mask head, queries, class weights of the loss
    assert "gives the same outputs" in printed and f"; {fresh} tensors start" in printed
    theirs = loaded(out)
    source = stirred(tiny_model())
    decoder = source.sem_seg_head.pixel_decoder if which == "online" else source.target_pixel_decoder
    x = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        mask_features, _, levels = decoder.forward_features(source.backbone(x))
        other = theirs.model.pixel_level_module(x)
    assert torch.allclose(mask_features, other.decoder_last_hidden_state, atol=1e-4)
    assert all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip(levels, other.decoder_hidden_states, strict=True)
    )
    ffn = source.sem_seg_head.predictor.transformer_ffn_layers[1].linear1.weight
    assert torch.equal(theirs.model.transformer_module.decoder.layers[1].fc1.weight, ffn)


def test_an_export_goes_on_without_the_decoder(pretrained, tmp_path, capsys) -> None:
    first, out = tmp_path / "export.safetensors", tmp_path / "folder"
    assert tool.main([str(pretrained), str(first), "--drop", "predictor"]) == 0
    assert tool.main(arguments(first, out, BACKBONE, {})) == 0, capsys.readouterr().err
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert all(name.startswith("model.pixel_level_module.") for name in file.keys())
        assert file.metadata()["format"] == "pt"


def test_the_processor_normalises_as_our_model_does(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    cfg = tiny_config("semantic", {"INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 128})
    model = tiny_model(name="semantic")
    folders.write_folder(tmp_path, cfg, model.state_dict())
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    except ImportError as error:  # it asks for more packages than the models do
        pytest.skip(str(error).strip().splitlines()[0])
    picture = torch.randint(
        0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    values = processor(picture, return_tensors="pt")["pixel_values"][0]
    ours = (picture - model.pixel_mean) / model.pixel_std
    assert values.shape == ours.shape and torch.allclose(values, ours, atol=1e-5)


def test_class_names_come_from_the_training_set(tmp_path) -> None:
    from detectron2.data import MetadataCatalog

    names = [f"thing {i}" for i in range(12)]
    MetadataCatalog.get("transformers_folder_test").set(stuff_classes=names)
    cfg = tiny_config("semantic")
    cfg.DATASETS.TRAIN = ("transformers_folder_test",)
    labels = folders.model_config(cfg)["id2label"]
    assert list(labels.values()) == names and list(labels)[-1] == "11"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    assert list(folders.model_config(cfg)["id2label"].values()) == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_wrong_weights_are_noticed_and_nothing_is_left(tmp_path, monkeypatch, capsys) -> None:
    """Queries and keys exchanged: every name and shape fits, and the outputs do not."""
    model = stirred(tiny_model(name="semantic"))
    Checkpointer(model, str(tmp_path)).save("model_final")
    right = folders.to_transformers

    def wrong(weights):
        out = right(weights)
        q, k = (f"model.transformer_module.decoder.layers.0.self_attn.{part}_proj.weight" for part in "qv")
        out[q], out[k] = out[k], out[q]
        return out

    monkeypatch.setattr(folders, "to_transformers", wrong)
    command = arguments(tmp_path / "model_final.pth", tmp_path / "folder", BACKBONE, {})
    assert tool.main(command) == 1
    assert "gives other outputs" in (printed := capsys.readouterr().err) and printed.count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]


def test_without_the_package_the_folder_is_written_untried(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(folders.importlib.util, "find_spec", lambda name: None)
    cfg, model = tiny_config("semantic"), tiny_model(name="semantic")
    folders.write_folder(tmp_path, cfg, model.state_dict())
    assert "not installed" in folders.prove_folder(tmp_path, cfg, model, model.state_dict())


@pytest.mark.parametrize(
    ("backbone", "key", "value"),
    [
        ("resnet", "MODEL.RESNETS.STEM_TYPE", "deeplab"),
        ("resnet", "MODEL.RESNETS.NUM_GROUPS", 2),
        ("resnet", "MODEL.RESNETS.RES5_DILATION", 2),
        ("bottleneck", "MODEL.RESNETS.WIDTH_PER_GROUP", 64),
        ("resnet", "MODEL.RESNETS.NORM", "GN"),
        ("swin", "MODEL.SWIN.APE", True),
        ("swin", "MODEL.SWIN.PATCH_NORM", False),
        ("swin", "MODEL.SWIN.QK_SCALE", 0.5),
        ("timm", "MODEL.SEM_SEG_HEAD.NORM", ""),
        ("timm", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        ("timm", "INPUT.FORMAT", "BGR"),
    ],
)
def test_what_transformers_cannot_hold_is_named(backbone, key, value, tmp_path) -> None:
    cfg = tiny_config("semantic", {**BACKBONES[backbone]})
    node, (*parts, last) = cfg, key.split(".")
    for part in parts:
        node = node[part]
    node[last] = value
    with pytest.raises(ValueError, match=key) as error:
        folders.write_folder(tmp_path / "folder", cfg, {})
    assert "\n" not in str(error.value) and not (tmp_path / "folder").exists()


def test_errors_of_the_command_line(pretrained, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        tool.main([str(pretrained), str(tmp_path / "folder"), "--format", "transformers"])
    assert "needs --config-file" in capsys.readouterr().err
    wrong = {"MODEL.MASK_FORMER.DIM_FEEDFORWARD": 48}
    assert tool.main(arguments(pretrained, tmp_path / "folder", BACKBONE, wrong)) == 1
    assert capsys.readouterr().err.count("error: ") == 1
    save_atomic({"model": {"layer1.0.conv1.weight": torch.ones(1)}}, tmp_path / "other.pth")
    assert tool.main(arguments(tmp_path / "other.pth", tmp_path / "folder", BACKBONE, {})) == 1
    assert not (tmp_path / "folder").exists()


def test_their_model_must_be_whole(tmp_path) -> None:
    """A configuration with more layers than the weights have."""
    model = tiny_model(name="semantic")
    cfg = tiny_config("semantic")
    folders.write_folder(tmp_path, cfg, model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    config["decoder_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="layers.2"):
        folders.prove_folder(tmp_path, cfg, model, model.state_dict())
