"""A Mask2Former as a folder of the package `transformers`: config.json, preprocessor_config.json,
model.safetensors; and the proof that its model gives the same outputs.

Writing needs detectron2's configuration alone; only the proof imports `transformers`.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor, nn

from jepa_plugins.core.checkpoints import CheckpointError, atomic_write, save_atomic
from jepa_plugins.core.key_maps import to_transformers

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET_DEPTHS = {
    18: [2, 2, 2, 2],
    34: [3, 4, 6, 3],
    50: [3, 4, 6, 3],
    101: [3, 4, 23, 3],
    152: [3, 8, 36, 3],
}
# Masked attention is a hard threshold: where one implementation rounds to the other side, outputs differ by
# far more than the rounding. An image where none does is among a few; wrong weights differ on all.
PROOF_IMAGES, PROOF_SIZE, TOLERANCE = 4, (128, 160), 1e-3


def _refuse(wrong: bool, key: str, remedy: str) -> None:
    if wrong:
        raise ValueError(f"transformers' Mask2Former cannot hold a model with this {key}: {remedy}")


def _resnet(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.MODEL.RESNETS
    basic = node.DEPTH < 50
    _refuse(
        node.STEM_TYPE != "basic" if "STEM_TYPE" in node else False, "MODEL.RESNETS.STEM_TYPE", "use basic"
    )
    _refuse(node.NUM_GROUPS != 1, "MODEL.RESNETS.NUM_GROUPS", "it knows no groups, use 1")
    wide = not basic and 4 * node.WIDTH_PER_GROUP != node.RES2_OUT_CHANNELS
    _refuse(wide, "MODEL.RESNETS.WIDTH_PER_GROUP", "it has a quarter of MODEL.RESNETS.RES2_OUT_CHANNELS")
    _refuse(node.RES5_DILATION != 1, "MODEL.RESNETS.RES5_DILATION", "it knows no dilation, use 1")
    _refuse(any(node.DEFORM_ON_PER_STAGE), "MODEL.RESNETS.DEFORM_ON_PER_STAGE", "use none")
    _refuse(node.NORM == "GN", "MODEL.RESNETS.NORM", "it has batch norm")
    return {
        "model_type": "resnet",
        "embedding_size": node.STEM_OUT_CHANNELS,
        "hidden_sizes": [node.RES2_OUT_CHANNELS * 2**i for i in range(4)],
        "depths": RESNET_DEPTHS[node.DEPTH],
        "layer_type": "basic" if basic else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_bottleneck": bool(node.STRIDE_IN_1X1) and not basic,
        "out_features": STAGES,
    }


def _swin(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.MODEL.SWIN
    _refuse(node.APE, "MODEL.SWIN.APE", "it has relative positions alone")
    _refuse(not node.PATCH_NORM, "MODEL.SWIN.PATCH_NORM", "it always has that norm")
    _refuse(bool(node.QK_SCALE), "MODEL.SWIN.QK_SCALE", "it has the usual scale")
    return {
        "model_type": "swin",
        "image_size": node.PRETRAIN_IMG_SIZE,
        "patch_size": node.PATCH_SIZE,
        "embed_dim": node.EMBED_DIM,
        "depths": list(node.DEPTHS),
        "num_heads": list(node.NUM_HEADS),
        "window_size": node.WINDOW_SIZE,
        "mlp_ratio": node.MLP_RATIO,
        "qkv_bias": node.QKV_BIAS,
        "hidden_dropout_prob": node.DROP_RATE,
        "attention_probs_dropout_prob": node.ATTN_DROP_RATE,
        "drop_path_rate": node.DROP_PATH_RATE,
        "layer_norm_eps": 1e-5,
        "out_features": STAGES,
    }


def _timm(cfg: CfgNode) -> dict[str, Any]:
    from jepa_plugins.d2.backbones import create_features

    node = cfg.MODEL.TIMM
    _refuse(bool(node.KWARGS), "MODEL.TIMM.KWARGS", "it builds the timm model by its name alone")
    _, indices = create_features(node.NAME, len(cfg.MODEL.PIXEL_MEAN), {})
    return {
        "model_type": "timm_backbone",
        "backbone": node.NAME,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": indices,
    }


BACKBONES = {"build_resnet_backbone": _resnet, "D2SwinTransformer": _swin, "TimmBackbone": _timm}


def _class_names(cfg: CfgNode) -> list[str]:
    """Of the training set, when its registration names as many classes as the model has."""
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for name in cfg.DATASETS.TRAIN:
        for kind in ("stuff_classes", "thing_classes"):
            names = list(MetadataCatalog.get(name).get(kind, []) or [])
            if len(names) == count and len(set(names)) == count:
                return names
    return [f"LABEL_{i}" for i in range(count)]


def model_config(cfg: CfgNode) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        ValueError: naming the key of an architecture that `transformers` does not have.
    """
    former, head, backbone = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.BACKBONE.NAME
    known = BACKBONES.get(backbone.removeprefix("JEPA"))
    _refuse(known is None, "MODEL.BACKBONE.NAME", f"{backbone} is none of {', '.join(BACKBONES)}")
    _refuse(head.NORM != "GN", "MODEL.SEM_SEG_HEAD.NORM", "use GN")
    _refuse(head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS != 4, "number of sampling points", "use 4")
    assert known is not None
    names = _class_names(cfg)
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": {**known(cfg), "num_channels": len(cfg.MODEL.PIXEL_MEAN)},
        "feature_size": head.CONVS_DIM,
        "mask_feature_size": head.MASK_DIM,
        "hidden_dim": former.HIDDEN_DIM,
        "encoder_feedforward_dim": head.TRANSFORMER_ENC_DIM_FEEDFORWARD,
        "encoder_layers": head.TRANSFORMER_ENC_LAYERS,
        "decoder_layers": former.DEC_LAYERS,
        "num_attention_heads": former.NHEADS,
        "dropout": former.DROPOUT,
        "dim_feedforward": former.DIM_FEEDFORWARD,
        "pre_norm": former.PRE_NORM,
        "enforce_input_projection": former.ENFORCE_INPUT_PROJ,
        "common_stride": head.COMMON_STRIDE,
        "ignore_value": head.IGNORE_VALUE,
        "num_queries": former.NUM_OBJECT_QUERIES,
        "no_object_weight": former.NO_OBJECT_WEIGHT,
        "class_weight": former.CLASS_WEIGHT,
        "mask_weight": former.MASK_WEIGHT,
        "dice_weight": former.DICE_WEIGHT,
        "train_num_points": former.TRAIN_NUM_POINTS,
        "oversample_ratio": former.OVERSAMPLE_RATIO,
        "importance_sample_ratio": former.IMPORTANCE_SAMPLE_RATIO,
        "use_auxiliary_loss": former.DEEP_SUPERVISION,
        "feature_strides": [4, 8, 16, 32],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def preprocessor_config(cfg: CfgNode) -> dict[str, Any]:
    """The content of preprocessor_config.json: sizes of inference and normalisation, for RGB in [0, 1].

    Raises:
        ValueError: when the model reads BGR.
    """
    _refuse(cfg.INPUT.FORMAT != "RGB", "INPUT.FORMAT", "its images are RGB")
    return {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": cfg.INPUT.MIN_SIZE_TEST, "longest_edge": cfg.INPUT.MAX_SIZE_TEST},
        "size_divisor": 32,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        "image_std": [value / 255 for value in cfg.MODEL.PIXEL_STD],
        "ignore_index": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        "do_reduce_labels": False,
        "num_labels": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    }


def write_folder(folder: Path, cfg: CfgNode, weights: Mapping[str, Tensor]) -> None:
    """Write Mask2Former weights (all, or those there are) for `from_pretrained(folder)`.

    Raises:
        ValueError, CheckpointError: for what `transformers` does not have.
    """
    described = {"config.json": model_config(cfg), "preprocessor_config.json": preprocessor_config(cfg)}
    save_atomic(to_transformers(weights), folder / "model.safetensors")
    for name, content in described.items():
        text = json.dumps(content, indent=2) + "\n"
        atomic_write(folder / name, lambda file, text=text: file.write(text.encode()))


def _load(folder: Path) -> tuple[nn.Module, list[str]]:
    """Their model and the names of the tensors that the folder lacks.

    Raises:
        CheckpointError: when the folder holds a tensor that the model has no place for.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    model, report = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    odd = sorted(map(str, [*report["unexpected_keys"], *report["mismatched_keys"]]))
    if odd:
        raise CheckpointError(
            f"transformers' model has no place for {len(odd)} of the exported tensors, for instance {odd[0]}: give "
            "the config that the checkpoint was trained with"
        )
    # newer releases hold a last norm that no feature of the pyramid passes
    missing = [name for name in report["missing_keys"] if ".swin.layernorm." not in name]
    return model.eval(), sorted(missing)


@torch.no_grad()
def largest_difference(model: nn.Module, theirs: nn.Module, channels: int) -> float:
    """Between the outputs of our Mask2Former and theirs, relative to the largest output of ours.

    Of the features and masks at every stride, the class scores, and the masks of the last layer.
    """
    device, found = next(model.parameters()).device, []
    theirs = theirs.to(device)
    for seed in range(PROOF_IMAGES):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, channels, *PROOF_SIZE, generator=generator).to(device)
        decoded = model.sem_seg_head.pixel_decoder.forward_features(model.backbone(x))
        mask_features, levels = decoded[0], decoded[2]
        outputs = model.sem_seg_head.predictor(levels, mask_features)
        ours = [mask_features, *levels, outputs["pred_logits"], outputs["pred_masks"]]
        result = theirs(pixel_values=x, output_hidden_states=True)
        others = [
            result.pixel_decoder_last_hidden_state,
            *result.pixel_decoder_hidden_states,
            result.class_queries_logits,
            result.masks_queries_logits,
        ]
        found.append(
            max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, others, strict=True))
        )
        if found[-1] < TOLERANCE:
            break
    return min(found)


def prove_folder(folder: Path, cfg: CfgNode, model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Load what `write_folder` wrote and compare outputs with `model`, which holds `weights`; one line.

    Where `weights` are a part of the model (a pre-training), the outputs are compared with the rest of the
    model written too.

    Raises:
        CheckpointError: when a tensor finds no place or is missing, or the outputs differ.
    """
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: the export was not tried (pip install transformers)"
    theirs, fresh = _load(folder)
    state = model.state_dict()
    if len(to_transformers(weights)) < len(to_transformers(state)):
        with tempfile.TemporaryDirectory(dir=folder) as whole:
            write_folder(Path(whole), cfg, state)
            theirs, lacking = _load(Path(whole))
    else:
        lacking, fresh = fresh, []
    if lacking:
        raise CheckpointError(f"transformers' model has tensors that ours lacks, for instance {lacking[0]}")
    was_training = model.training
    difference = largest_difference(model.eval(), theirs, len(cfg.MODEL.PIXEL_MEAN))
    model.train(was_training)
    if not difference < TOLERANCE:
        raise CheckpointError(
            f"transformers' model gives other outputs (by {difference:.1e} of the largest): give the config that "
            "the checkpoint was trained with"
        )
    return (
        f"proof: transformers loads the folder and gives the same outputs (they differ by {difference:.0e} of the "
        f"largest); {len(fresh)} tensors start as it initialises them"
    )
