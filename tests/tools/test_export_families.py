"""tools/export.py on the names and shapes of the published Mask2Former, MP-Former and OneFormer."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.export import PIXEL_DECODER, PREDICTOR, Options, export
from jepa_plugins.core.settings import PREDICTOR_PARTS

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "state_dicts"
FAMILIES = [
    ("mask2former", "mask2former_r50"),
    ("mask2former", "mask2former_swin_t"),
    ("mpformer", "mpformer_r50"),
    ("mpformer", "mpformer_r50_mask_dn"),
    ("oneformer", "oneformer_r50"),
]


def keys(name: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["keys"]


def pretraining(name: str = "mask2former_r50", **info: object) -> dict:
    """A checkpoint of the published sizes, whose tensors have no storage."""
    shapes = {key: shape for key, shape in keys(name).items() if not key.startswith("criterion")}
    prefix = PIXEL_DECODER + "."
    shapes |= {
        "target_pixel_decoder." + key.removeprefix(prefix): shape
        for key, shape in shapes.items()
        if key.startswith(prefix)
    }
    shapes |= {"jepa.mask_token": [256], "jepa.prediction.weight": [4096, 100]}
    model: OrderedDict[str, torch.Tensor] = OrderedDict(
        (key, torch.empty(shape, device="meta")) for key, shape in shapes.items()
    )
    model["step"] = torch.tensor(5)
    versions = {"": {"version": 1}, "backbone": {"version": 1}, "sem_seg_head": {"version": 2}}
    versions |= {PIXEL_DECODER: {"version": 1}, PREDICTOR: {"version": 2}}
    model._metadata = OrderedDict(versions)
    note = {"trained_level_rows": [2], "reconstruction": True, "denoising": True, "readout": "query_mix"}
    return {"model": model, "jepa_pretraining": {**note, **info}}


@pytest.mark.parametrize(("family", "name"), FAMILIES)
@pytest.mark.parametrize("which", ["online", "ema"])
def test_an_export_fits_the_family(family, name, which) -> None:
    source = "mask2former_swin_t" if "swin" in name else "mask2former_r50"
    content, _ = export(pretraining(source), Options(which=which, family=family), "pre.pth")
    theirs = keys(name)
    out = content["model"]
    assert all(theirs[key] == list(tensor.shape) for key, tensor in out.items())
    covered = ("backbone.", f"{PIXEL_DECODER}.", *(f"{PREDICTOR}.{part}" for part in PREDICTOR_PARTS))
    assert set(out) == {key for key in theirs if key.startswith(covered)}
    assert out._metadata["sem_seg_head"] == {"version": 2} and out._metadata[PREDICTOR]["version"] == 2


def tables(content: dict) -> list[str]:
    return sorted(key.split(".")[2] for key in content["model"] if ".query_" in key)


def test_trained_queries_go_where_they_fit() -> None:
    kept = {}
    for family in ("mask2former", "mpformer"):
        kept[family], _ = export(pretraining(), Options(keep_queries=True, family=family), "pre.pth")
    assert tables(kept["mask2former"]) == ["query_embed", "query_feat"]
    assert tables(kept["mpformer"]) == ["query_feat"]
    with pytest.raises(CheckpointError, match="queries of oneformer"):
        export(pretraining(), Options(keep_queries=True, family="oneformer"), "pre.pth")


@pytest.mark.parametrize("note", [{"readout": "spatial_queries"}, {"readout": "masked_queries"},
                                  {"reconstruction": False}])  # fmt: skip
def test_untrained_queries_stay(note) -> None:
    with pytest.raises(CheckpointError, match="no trained queries"):
        export(pretraining(**note), Options(keep_queries=True), "pre.pth")
    content, _ = export(pretraining(**note), Options(), "pre.pth")
    assert tables(content) == []


def test_without_a_note_the_weights_tell_the_read_out() -> None:
    checkpoint = pretraining()
    del checkpoint["jepa_pretraining"]
    options = Options(keep_queries=True, level_rows=[2])
    assert len(tables(export(checkpoint, options, "pre.pth")[0])) == 2
    checkpoint["model"]["jepa.query"] = torch.ones(256)
    with pytest.raises(CheckpointError, match="no trained queries"):
        export(checkpoint, options, "pre.pth")


def test_parts_that_were_read_around_stay() -> None:
    parts = [part for part in PREDICTOR_PARTS if part != "decoder_norm"]
    settings = json.dumps({"denoise_feature": "stride4"})
    note = {"trained_predictor_parts": parts, "settings": settings}
    content, report = export(pretraining(**note), Options(), "pre.pth")
    assert not any("decoder_norm" in key or "mask_features" in key for key in content["model"])
    assert any("layer_1" in key for key in content["model"])
    manifest = content["jepa_export"]
    assert manifest["untrained"] == ["decoder_norm"] and manifest["whole"] == ["backbone"]
    assert (
        f"{PREDICTOR}.decoder_norm" in report.dropped and f"{PIXEL_DECODER}.mask_features" in report.dropped
    )
