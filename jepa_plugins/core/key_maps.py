"""Names of Mask2Former's parameters in other programs, and the tensors that they hold in another form.

The published Mask2Former, MP-Former and OneFormer share names, apart from their queries. The package
`transformers` has other names, and keeps apart the three projections of an attention that PyTorch stacks.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.settings import QUERY_TABLES

# Query tables that a relative's decoder has under the same name. OneFormer derives the content of its queries
# from the task, and its positions are for another number of them.
FAMILY_QUERIES: dict[str, tuple[str, ...]] = {
    "mask2former": QUERY_TABLES,
    "mpformer": ("query_feat",),
    "oneformer": (),
}

# Buffers that every model computes for itself.
_COMPUTED = re.compile(r"pixel_mean|pixel_std|.*\.relative_position_index")
_PIXEL = "model.pixel_level_module"
_QUERIES = "model.transformer_module"
_LAYER = f"{_QUERIES}.decoder.layers.#"
_SWIN = f"{_PIXEL}.encoder.encoder.layers.#"
# Ours (without "sem_seg_head.") to theirs: # is a number, * the rest, {a,b,c} the parts of a stack. Swin has the
# names of the files on the model hub, which every release of the package reads.
TRANSFORMERS: dict[str, str] = {
    "pixel_decoder.input_proj.*": f"{_PIXEL}.decoder.input_projections.*",
    "pixel_decoder.transformer.level_embed": f"{_PIXEL}.decoder.level_embed",
    "pixel_decoder.transformer.encoder.layers.#.self_attn.*": f"{_PIXEL}.decoder.encoder.layers.#.self_attn.*",
    "pixel_decoder.transformer.encoder.layers.#.norm1.*": (
        f"{_PIXEL}.decoder.encoder.layers.#.self_attn_layer_norm.*"
    ),
    "pixel_decoder.transformer.encoder.layers.#.linear#.*": f"{_PIXEL}.decoder.encoder.layers.#.fc#.*",
    "pixel_decoder.transformer.encoder.layers.#.norm2.*": f"{_PIXEL}.decoder.encoder.layers.#.final_layer_norm.*",
    "pixel_decoder.mask_features.*": f"{_PIXEL}.decoder.mask_projection.*",
    "pixel_decoder.adapter_#.weight": f"{_PIXEL}.decoder.adapter_#.0.weight",
    "pixel_decoder.adapter_#.norm.*": f"{_PIXEL}.decoder.adapter_#.1.*",
    "pixel_decoder.layer_#.weight": f"{_PIXEL}.decoder.layer_#.0.weight",
    "pixel_decoder.layer_#.norm.*": f"{_PIXEL}.decoder.layer_#.1.*",
    "predictor.query_feat.weight": f"{_QUERIES}.queries_features.weight",
    "predictor.query_embed.weight": f"{_QUERIES}.queries_embedder.weight",
    "predictor.level_embed.weight": f"{_QUERIES}.level_embed.weight",
    "predictor.input_proj.*": f"{_QUERIES}.input_projections.*",
    "predictor.transformer_self_attention_layers.#.self_attn.in_proj_*": f"{_LAYER}.self_attn.{{q,k,v}}_proj.*",
    "predictor.transformer_self_attention_layers.#.self_attn.out_proj.*": f"{_LAYER}.self_attn.out_proj.*",
    "predictor.transformer_self_attention_layers.#.norm.*": f"{_LAYER}.self_attn_layer_norm.*",
    "predictor.transformer_cross_attention_layers.#.multihead_attn.*": f"{_LAYER}.cross_attn.*",
    "predictor.transformer_cross_attention_layers.#.norm.*": f"{_LAYER}.cross_attn_layer_norm.*",
    "predictor.transformer_ffn_layers.#.linear#.*": f"{_LAYER}.fc#.*",
    "predictor.transformer_ffn_layers.#.norm.*": f"{_LAYER}.final_layer_norm.*",
    "predictor.decoder_norm.*": f"{_QUERIES}.decoder.layernorm.*",
    "predictor.mask_embed.layers.#.*": f"{_QUERIES}.decoder.mask_predictor.mask_embedder.#.0.*",
    "predictor.class_embed.*": "class_predictor.*",
    "criterion.empty_weight": "criterion.empty_weight",
    # detectron2's ResNet
    "backbone.stem.conv1.weight": f"{_PIXEL}.encoder.embedder.embedder.convolution.weight",
    "backbone.stem.conv1.norm.*": f"{_PIXEL}.encoder.embedder.embedder.normalization.*",
    **{
        f"backbone.res{stage + 2}.#.{ours}.{part}": (
            f"{_PIXEL}.encoder.encoder.stages.{stage}.layers.#.{theirs}.{their_part}"
        )
        for stage in range(4)
        for ours, theirs in (
            ("shortcut", "shortcut"),
            ("conv1", "layer.0"),
            ("conv2", "layer.1"),
            ("conv3", "layer.2"),
        )
        for part, their_part in (("weight", "convolution.weight"), ("norm.*", "normalization.*"))
    },
    # Swin
    "backbone.patch_embed.proj.*": f"{_PIXEL}.encoder.embeddings.patch_embeddings.projection.*",
    "backbone.patch_embed.norm.*": f"{_PIXEL}.encoder.embeddings.norm.*",
    "backbone.layers.#.blocks.#.norm1.*": f"{_SWIN}.blocks.#.layernorm_before.*",
    "backbone.layers.#.blocks.#.norm2.*": f"{_SWIN}.blocks.#.layernorm_after.*",
    "backbone.layers.#.blocks.#.attn.relative_position_bias_table": (
        f"{_SWIN}.blocks.#.attention.self.relative_position_bias_table"
    ),
    "backbone.layers.#.blocks.#.attn.qkv.*": f"{_SWIN}.blocks.#.attention.self.{{query,key,value}}.*",
    "backbone.layers.#.blocks.#.attn.proj.*": f"{_SWIN}.blocks.#.attention.output.dense.*",
    "backbone.layers.#.blocks.#.mlp.fc1.*": f"{_SWIN}.blocks.#.intermediate.dense.*",
    "backbone.layers.#.blocks.#.mlp.fc2.*": f"{_SWIN}.blocks.#.output.dense.*",
    "backbone.layers.#.downsample.*": f"{_SWIN}.downsample.*",
    **{f"backbone.norm{i}.*": f"{_PIXEL}.encoder.hidden_states_norms.stage{i + 1}.*" for i in range(4)},
    # timm, as our TimmBackbone holds it
    "backbone.net.*": f"{_PIXEL}.encoder._backbone.*",
}


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


_TRANSFORMERS = [(_pattern(ours), theirs) for ours, theirs in TRANSFORMERS.items()]


def _filled(template: str, values: Iterable[str]) -> list[str]:
    """The template with its # and * replaced in order, once for each part of a stack."""
    rest = iter(values)
    name = re.sub(r"[#*]", lambda _: next(rest), template)
    parts = re.search(r"\{(.+)\}", name)
    return [name.replace(parts[0], part) for part in parts[1].split(",")] if parts else [name]


def transformers_names(names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(name of a Mask2Former's tensor, its names in `transformers`), in order: three for a stack, which is
    taken apart, and none for a buffer that the model computes.

    Raises:
        CheckpointError: naming a tensor that has no place there.
    """
    for name in names:
        if _COMPUTED.fullmatch(name):
            yield name, []
            continue
        short = name.removeprefix("sem_seg_head.")
        for pattern, template in _TRANSFORMERS:
            if found := pattern.fullmatch(short):
                yield name, _filled(template, found.groups())
                break
        else:
            raise CheckpointError(
                f"transformers' Mask2Former has no place for '{name}': it knows detectron2's ResNet, Swin and "
                "timm backbones, the MSDeformAttn pixel decoder and the masked transformer decoder"
            )


def to_transformers(weights: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Weights of a Mask2Former, or of a part of one, as `Mask2FormerForUniversalSegmentation` names them.

    A frozen norm, which counts no batches, gets the counter of an ordinary one. Raises CheckpointError as
    `transformers_names` does.
    """
    out: OrderedDict[str, Tensor] = OrderedDict()
    for name, new in transformers_names(weights):
        if new:
            out.update(
                zip(new, weights[name].chunk(len(new)) if len(new) > 1 else [weights[name]], strict=True)
            )
    for name in [name for name in out if name.endswith(".running_var")]:
        out.setdefault(name.replace("running_var", "num_batches_tracked"), torch.zeros((), dtype=torch.int64))
    return out
