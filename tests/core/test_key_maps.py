"""Names of Mask2Former in other programs."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core.checkpoints import CheckpointError
from jepa_plugins.core.key_maps import FAMILY_QUERIES, to_transformers, transformers_names

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "state_dicts"
HEAD = "sem_seg_head.predictor."
SELF = "transformer_self_attention_layers.3.self_attn.in_proj_"


def published(name: str) -> dict[str, torch.Tensor]:
    """Tensors without storage, of the names and shapes of a published model."""
    keys = json.loads((GOLDEN / f"{name}.json").read_text())["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


@pytest.mark.parametrize("name", ["mask2former_r50", "mask2former_swin_t"])
def test_every_published_tensor_has_one_place(name) -> None:
    weights = published(name)
    new = [other for _, others in transformers_names(weights) for other in others]
    assert len(set(new)) == len(new)
    out = to_transformers(weights)
    computed = [key for key in weights if key.endswith("relative_position_index")]
    counters = [key for key in out if key.endswith("num_batches_tracked")]
    assert len(computed) == (12 if "swin" in name else 0) and len(counters) == (0 if "swin" in name else 53)
    kept = sum(tensor.numel() for key, tensor in weights.items() if key not in computed)
    assert sum(tensor.numel() for key, tensor in out.items() if key not in counters) == kept
    assert not any("sem_seg_head" in key or "#" in key or "*" in key or "{" in key for key in out)


R50_NAMES = list(published("mask2former_r50"))


@settings(max_examples=25)
@given(st.lists(st.sampled_from(R50_NAMES), unique=True, max_size=20))
def test_a_part_gets_the_names_it_has_in_the_whole(chosen) -> None:
    whole = dict(transformers_names(R50_NAMES))
    assert dict(transformers_names(chosen)) == {name: whole[name] for name in chosen}


def test_examples() -> None:
    names = dict(
        transformers_names(
            [
                "backbone.res4.5.conv3.norm.running_var",
                "backbone.res2.0.shortcut.weight",
                "backbone.norm2.bias",
                "backbone.layers.2.blocks.11.mlp.fc2.weight",
                f"{HEAD}mask_embed.layers.2.bias",
                f"{HEAD}transformer_ffn_layers.8.linear2.weight",
                "sem_seg_head.pixel_decoder.layer_1.norm.weight",
            ]
        )
    )
    encoder = "model.pixel_level_module.encoder."
    assert [new for (new,) in names.values()] == [
        f"{encoder}encoder.stages.2.layers.5.layer.2.normalization.running_var",
        f"{encoder}encoder.stages.0.layers.0.shortcut.convolution.weight",
        f"{encoder}hidden_states_norms.stage3.bias",
        f"{encoder}encoder.layers.2.blocks.11.output.dense.weight",
        "model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.bias",
        "model.transformer_module.decoder.layers.8.fc2.weight",
        "model.pixel_level_module.decoder.layer_1.1.weight",
    ]


def test_a_stack_is_taken_apart_in_order() -> None:
    stack = torch.arange(12.0).view(6, 2)
    out = to_transformers({f"{HEAD}{SELF}weight": stack, f"{HEAD}{SELF}bias": torch.arange(6.0)})
    layer = "model.transformer_module.decoder.layers.3.self_attn."
    assert [key.removeprefix(layer) for key in out] == [
        f"{part}_proj.{kind}" for kind in ("weight", "bias") for part in "qkv"
    ]
    assert torch.equal(out[f"{layer}k_proj.weight"], stack[2:4])
    assert out[f"{layer}v_proj.bias"].tolist() == [4.0, 5.0]


def test_a_batch_counter_is_added_only_where_it_lacks() -> None:
    norm = "backbone.stem.conv1.norm."
    theirs = "model.pixel_level_module.encoder.embedder.embedder.normalization.num_batches_tracked"
    assert int(to_transformers({f"{norm}running_var": torch.ones(2)})[theirs]) == 0
    counted = {f"{norm}running_var": torch.ones(2), f"{norm}num_batches_tracked": torch.tensor(7)}
    assert int(to_transformers(counted)[theirs]) == 7


@pytest.mark.parametrize(
    "name",
    ["sem_seg_head.pixel_decoder.adapter_1.bias", "backbone.res2.0.conv1.bias", "proposal_generator.x"],
)
def test_what_has_no_place_is_named(name) -> None:
    with pytest.raises(CheckpointError, match=name):
        to_transformers({name: torch.ones(1)})


def test_query_tables_of_the_family() -> None:
    relatives = {"mask2former": "mask2former_r50", "mpformer": "mpformer_r50", "oneformer": "oneformer_r50"}
    ours = published("mask2former_r50")
    for family, file in relatives.items():
        theirs = published(file)
        same = [
            table
            for table in FAMILY_QUERIES["mask2former"]
            if (key := f"{HEAD}{table}.weight") in theirs and theirs[key].shape == ours[key].shape
        ]
        assert list(FAMILY_QUERIES[family]) == same
