"""Checks beside the published Mask2Former, in a process of their own: `python checks.py ours|theirs NAME ...`.

The first argument says what is imported first. Prints one JSON object: {name of a check: traceback or ""}.
"""

import copy
import json
import logging
import sys
import tempfile
import traceback
import types
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

torch.set_num_threads(1)
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parents[1])]  # helpers of the tests, and the clone
MESSAGES: list[str] = []


class Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        MESSAGES.append(record.getMessage())


def import_both(first: str) -> None:
    """Import the two packages in that order."""
    logging.getLogger("jepa_plugins").setLevel(logging.INFO)
    logging.getLogger("jepa_plugins").addHandler(Keep())
    try:
        import detectron2.evaluation.fast_eval_api  # noqa: F401
    except ImportError:  # a detectron2 without compiled parts; the published code asks for it all the same
        from pycocotools.cocoeval import COCOeval

        stub = types.ModuleType("detectron2.evaluation.fast_eval_api")
        stub.COCOeval_opt = COCOeval
        sys.modules[stub.__name__] = stub
    names = ["jepa_plugins.d2", "mask2former"]
    for name in names if first == "ours" else names[::-1]:
        __import__(name)


import_both(sys.argv[1])

import MultiScaleDeformableAttention as operator  # noqa: E402
from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.modeling import (  # noqa: E402
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    build_model,
)
from mask2former import add_maskformer2_config  # noqa: E402
from mask2former import maskformer_model as published_model  # noqa: E402
from mask2former.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder  # noqa: E402
from mask2former.modeling.transformer_decoder import mask2former_transformer_decoder  # noqa: E402
from tiny import BACKBONE, SMALL, pictures, steps, tiny_config  # noqa: E402

from jepa_plugins.core.checkpoints import read_checkpoint, save_atomic  # noqa: E402
from jepa_plugins.core.export import Options, export  # noqa: E402
from jepa_plugins.d2 import add_jepa_config  # noqa: E402
from jepa_plugins.d2.checkpoint import Checkpointer  # noqa: E402
from jepa_plugins.d2.hooks import PretrainingNote  # noqa: E402
from jepa_plugins.d2.mask2former import TRANSFORMER_DECODER_REGISTRY  # noqa: E402
from jepa_plugins.d2.solver import build_optimizer  # noqa: E402


class Criterion(published_model.SetCriterion):
    """The published criterion as the published model calls it: the copy on PyPI names its arguments otherwise."""

    def __init__(self, num_classes, matcher, weight_dict, **others) -> None:
        weights = {f"{name}_weight": weight_dict[f"loss_{key}"] for key, name in KINDS.items()}
        super().__init__(num_classes, matcher, **weights, num_layers=len(weight_dict) // 3 - 1, **others)


KINDS = {"ce": "class", "mask": "mask", "dice": "dice"}
published_model.SetCriterion = Criterion

# The published pixel decoder fixes this width in code.
WIDTH = {"MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD": 1024}
OURS = {
    "MODEL.SEM_SEG_HEAD.NAME": "JEPAMaskFormerHead",
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "JEPAMSDeformAttnPixelDecoder",
}
PRE_NORM = {"MODEL.MASK_FORMER.PRE_NORM": True}
METHOD = "MODEL.MASK_JEPA."
SQUARES = ((64, 64), (64, 96))


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that no initialisation gives, since many start as zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "running" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.02)
    return model


def pretraining_pair(changes: dict) -> tuple[nn.Module, nn.Module]:
    """MaskJEPA on the published heads and on ours, with equal weights."""
    theirs = stir(build_model(tiny_config("mask_jepa", {**WIDTH, **changes})))
    ours = build_model(tiny_config("mask_jepa", {**WIDTH, **changes, **OURS}))
    for part in (theirs.sem_seg_head, theirs.sem_seg_head.pixel_decoder, theirs.sem_seg_head.predictor):
        assert type(part).__module__.startswith("mask2former."), type(part)
    for part in (ours.sem_seg_head, ours.sem_seg_head.pixel_decoder, ours.sem_seg_head.predictor):
        assert type(part).__module__.startswith("jepa_plugins."), type(part)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def finetuning_pair(changes: dict) -> tuple[nn.Module, nn.Module]:
    """The published MaskFormer and ours, with weights of their own."""
    theirs = build_model(tiny_config("semantic", {**WIDTH, **changes}))
    named = {"MODEL.META_ARCHITECTURE": "JEPAMaskFormer", **OURS}
    ours = build_model(tiny_config("semantic", {**WIDTH, **changes, **named}))
    assert type(theirs).__module__.startswith("mask2former.") and type(theirs).__name__ == "MaskFormer"
    assert type(ours).__module__.startswith("jepa_plugins.") and type(ours).__name__ == "JEPAMaskFormer"
    return stir(theirs).eval(), stir(ours, 1).eval()


@torch.no_grad()
def assert_equal_outputs(theirs: nn.Module, ours: nn.Module) -> None:
    batch = pictures(*SQUARES, seed=3)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    raw = [model.sem_seg_head(model.backbone(x)) for model in (theirs, ours)]
    for key in ("pred_logits", "pred_masks"):
        assert torch.allclose(raw[0][key], raw[1][key], atol=1e-4), key
    assert len(raw[0]["aux_outputs"]) == len(raw[1]["aux_outputs"])
    for one, other in zip(theirs(batch), ours(batch), strict=True):
        assert torch.allclose(one["sem_seg"], other["sem_seg"], atol=1e-4)


# --- the checks


def check_names() -> None:
    """Theirs keep their names, ours are called JEPA<name>, and one line says so."""
    claimed = (
        (META_ARCH_REGISTRY, ["MaskFormer"]),
        (SEM_SEG_HEADS_REGISTRY, ["MaskFormerHead", "MSDeformAttnPixelDecoder"]),
        (BACKBONE_REGISTRY, ["D2SwinTransformer"]),
    )
    for registry, names in claimed:
        for name in names:
            assert registry.get(name).__module__.startswith("mask2former."), name
            assert registry.get("JEPA" + name).__module__.startswith("jepa_plugins."), name
    assert "JEPAMultiScaleMaskedTransformerDecoder" in TRANSFORMER_DECODER_REGISTRY
    assert META_ARCH_REGISTRY.get("MaskJEPA").__module__.startswith("jepa_plugins.")
    lines = [line for line in MESSAGES if "JEPA<name>" in line]
    assert len(lines) == 1 and lines[0].startswith("mask2former is installed"), MESSAGES


def check_keys() -> None:
    """A configuration with their keys and ours; either order of adding them."""
    from detectron2.projects.deeplab import add_deeplab_config

    one, other = get_cfg(), get_cfg()
    add_deeplab_config(one)
    add_maskformer2_config(one)
    theirs = copy.deepcopy(one)
    add_jepa_config(one)
    add_jepa_config(other)
    assert one == other
    # ours holds each of their values
    other.merge_from_other_cfg(theirs)
    assert other == one


def check_pretraining() -> None:
    for changes in ({}, PRE_NORM, {METHOD + "READOUT": "query_mix", METHOD + "FREEZE_BACKBONE": False}):
        theirs, ours = pretraining_pair(changes)
        losses = []
        for model in (theirs, ours):
            before = dict(operator.calls)
            out = model.train()(pictures((64, 64), (64, 64)))
            sum(out.values()).backward()
            assert (operator.calls["backward"] > before["backward"]) == (model is theirs)
            losses.append(out)
        assert set(losses[0]) == set(losses[1]) == {"loss_recon", "loss_denoise"}
        for key in losses[0]:
            assert torch.isfinite(losses[0][key])
            assert torch.allclose(losses[0][key], losses[1][key], rtol=1e-5), key
        others = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            assert parameter.requires_grad == others[name].requires_grad, name
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if parameter.requires_grad:
                largest = others[name].grad.abs().max()
                assert largest > 0 or name.endswith("in_proj_bias"), name
                assert (parameter.grad - others[name].grad).abs().max() <= 1e-4 * largest + 1e-7, name


def check_training() -> None:
    """Some steps: finite falling losses, a moving target, equal runs on their heads and on ours."""
    cfg = tiny_config("mask_jepa", WIDTH)
    runs, states = [], []
    for model in pretraining_pair({}):
        before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("target_")}
        runs.append(steps(model, build_optimizer(cfg, model), [pictures((64, 64), (64, 64))] * 6))
        model.update_target()
        states.append(model.state_dict())
        assert any(not torch.equal(value, states[-1][key]) for key, value in before.items())
        assert int(model.step) == 6
    assert torch.isfinite(torch.tensor(runs[0])).all() and runs[0][-1] < runs[0][0]
    assert torch.allclose(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-3)


def check_mixed_precision() -> None:
    """Under the CPU's bfloat16 too both pixel decoders run in float32; the published one sees to CUDA only."""
    for model in pretraining_pair({}):
        kinds = set()
        decoder = model.sem_seg_head.pixel_decoder
        decoder.mask_features.register_forward_hook(lambda _, args, out, kinds=kinds: kinds.add(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            losses = model.train()(pictures((64, 64), (64, 64)))
        sum(losses.values()).backward()
        assert kinds == {torch.float32}, kinds
        assert all(torch.isfinite(loss) for loss in losses.values())


class LargestTensor(TorchDispatchMode):
    """Remembers the number of values of the largest tensor that any operation gave."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return out


def check_memory() -> None:
    """No operation, forward or backward, gives as many values as one head's weights for all pairs of cells."""
    model, _ = pretraining_pair({METHOD + "READOUT": "spatial_queries", METHOD + "MASK.PATCH": 8})
    side = 448  # 56 x 56 cells: where explicit weights would need 4 x 3136 x 3136 values a layer
    cells = (side // 8) ** 2
    with LargestTensor() as seen:
        losses = model.train()(pictures((side, side)))
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert 0 < seen.largest < cells * cells, (seen.largest, cells * cells)
    layer = model.sem_seg_head.predictor.transformer_cross_attention_layers[0]
    with LargestTensor() as seen, torch.no_grad():  # as the layer's own call would
        layer(torch.zeros(cells, 1, 32), torch.zeros(cells, 1, 32))
    assert seen.largest >= cells * cells


def check_checkpoints() -> None:
    """Ours into theirs and back, strictly, with equal outputs; through a file too."""
    for changes in ({}, PRE_NORM, {"MODEL.MASK_FORMER.HIDDEN_DIM": 64}):
        theirs, ours = finetuning_pair(changes)
        state = ours.state_dict()
        assert state._metadata["sem_seg_head"] == {"version": 2}
        # the published decoder swallows names that it does not know, so a strict load alone proves less
        shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (theirs, ours)]
        assert shapes[0] == shapes[1]
        theirs.load_state_dict(copy.copy(state), strict=True)
        assert_equal_outputs(theirs, ours)
        stir(theirs, 5)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert_equal_outputs(theirs, ours)
        with tempfile.TemporaryDirectory() as folder:
            Checkpointer(ours, folder).save("model_final")
            stir(theirs, 6)
            DetectionCheckpointer(theirs).load(f"{folder}/model_final.pth")
            assert_equal_outputs(theirs, ours)
            save_atomic(theirs.state_dict(), f"{folder}/theirs.safetensors")
            stir(ours, 7)
            Checkpointer(ours, required=[""]).load(f"{folder}/theirs.safetensors")
            assert_equal_outputs(theirs, ours)


def check_old_checkpoints() -> None:
    """A version 1 file, without module versions, loads strictly into both; so does a plain copy into ours."""
    theirs, ours = finetuning_pair({})
    source = build_model(tiny_config("semantic", WIDTH)).state_dict()
    old = OrderedDict(
        (
            name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace(
                "query_feat", "static_query"
            ),
            value,
        )
        for name, value in stir_state(source).items()
    )
    for model in (theirs, ours):
        model.load_state_dict(copy.copy(old), strict=True)
    assert_equal_outputs(theirs, ours)
    ours.load_state_dict(dict(theirs.state_dict()), strict=True)
    assert_equal_outputs(theirs, ours)


def stir_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        if value.is_floating_point() and "running" not in name
        else value
        for name, value in state.items()
    }


def check_exports() -> None:
    """A pre-training on their heads, exported: into theirs by detectron2's checkpointer, into ours by ours."""
    for suffix, readout in ((".pth", "spatial_queries"), (".safetensors", "query_mix")):
        model = stir(build_model(tiny_config("mask_jepa", {**WIDTH, METHOD + "READOUT": readout})))
        theirs, ours = finetuning_pair({})
        ours.load_state_dict(theirs.state_dict(), strict=True)
        with tempfile.TemporaryDirectory() as folder:
            Checkpointer(model, folder, jepa_pretraining=PretrainingNote(model)).save("model_final")
            source = read_checkpoint(f"{folder}/model_final.pth")
            content, _ = export(source, Options(keep_queries=readout == "query_mix"), "model_final.pth")
            save_atomic(content, f"{folder}/export{suffix}")
            Checkpointer(ours).load(f"{folder}/export{suffix}")
            read = read_checkpoint(f"{folder}/export{suffix}")
            if suffix == ".pth":
                DetectionCheckpointer(theirs).load(f"{folder}/export.pth")
            else:
                outcome = theirs.load_state_dict(copy.copy(read["model"]), strict=False)
                assert not outcome.unexpected_keys, outcome.unexpected_keys
        state = theirs.state_dict()
        kept = [name for name in read["model"] if name.startswith("sem_seg_head.")]
        assert len(kept) > 60 and all(torch.equal(state[name], read["model"][name]) for name in kept)
        assert any("query_feat" in name for name in kept) == (readout == "query_mix")
        # theirs takes the whole table, ours the trained row of it
        table = ours.sem_seg_head.predictor.level_embed.weight.data
        assert torch.equal(table[2], state["sem_seg_head.predictor.level_embed.weight"][2])
        table.copy_(state["sem_seg_head.predictor.level_embed.weight"])
        assert_equal_outputs(theirs, ours)


# --- relatives, by stand-ins that have what matters of them


@SEM_SEG_HEADS_REGISTRY.register()
class FiveValuedPixelDecoder(MSDeformAttnPixelDecoder):
    """OneFormer's gives the shapes and the starts of its levels besides."""

    def forward_features(self, features):
        values = super().forward_features(features)
        shapes = torch.tensor([level.shape[-2:] for level in values[2]])
        return (*values, shapes, shapes.prod(1).cumsum(0))


@SEM_SEG_HEADS_REGISTRY.register()
class RelativeHead(nn.Module):
    """A head of another family: its own version, and decoders that are built by name."""

    _version = 2

    def __init__(self, cfg, input_shape) -> None:
        super().__init__()
        self.pixel_decoder = SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME)(
            cfg, input_shape
        )
        self.predictor = RelativeDecoder(cfg, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, True)


class RelativeDecoder(mask2former_transformer_decoder.MultiScaleMaskedTransformerDecoder):
    """MP-Former's: no `query_embed`, and a table of labels."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        del self.query_embed
        self.label_enc = nn.Embedding(12, 32)


RELATIVE = {"MODEL.SEM_SEG_HEAD.NAME": "RelativeHead"}
FIVE = {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "FiveValuedPixelDecoder"}


def check_relatives() -> None:
    """Five values, a decoder without one query table and with a further parameter: the same losses."""
    for changes in ({}, {METHOD + "LOSS.DENOISE_WEIGHT": 0.0}, {METHOD + "DENOISE.FEATURE": "stride4"}):
        _, ours = pretraining_pair(changes)
        model = build_model(tiny_config("mask_jepa", {**WIDTH, **changes, **RELATIVE, **FIVE}))
        outcome = model.load_state_dict(ours.state_dict(), strict=False)
        assert outcome.missing_keys == ["sem_seg_head.predictor.label_enc.weight"], outcome
        batch = pictures((64, 64), (64, 64))
        losses, want = model.train()(batch), ours.train()(batch)
        assert set(losses) == set(want)
        assert all(torch.allclose(losses[key], want[key], rtol=1e-5) for key in want)
        sum(losses.values()).backward()
        unused = model.sem_seg_head.predictor.label_enc.weight
        assert not unused.requires_grad and unused.grad is None
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert set(model.features(batch)) == {"stride4", "stride8"}
    try:
        build_model(tiny_config("mask_jepa", {**WIDTH, **RELATIVE, METHOD + "READOUT": "query_mix"})).train()(
            batch
        )
    except ValueError as error:
        assert "query_embed" in str(error) and "\n" not in str(error)
    else:
        raise AssertionError("a decoder without query_embed served the read-out query_mix")


def run(names: list[str]) -> dict[str, str]:
    results = {}
    for name in names:
        torch.manual_seed(0)
        try:
            globals()[f"check_{name}"]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    return results


if __name__ == "__main__":
    assert SMALL and BACKBONE
    print(json.dumps(run(sys.argv[2:])))
