"""Checkpoints of every version load into the head, as the published head loads them."""

import copy
import logging
from collections import OrderedDict

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from tiny import tiny_config, tiny_model  # noqa: E402

from jepa_plugins.d2.mask2former.transformer_decoder import keep_untrained_rows  # noqa: E402

PIXEL, PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
QUERY, LEVELS = f"{PREDICTOR}query_feat.weight", f"{PREDICTOR}level_embed.weight"


def former():
    return tiny_model(name="semantic")


def source() -> OrderedDict:
    """Weights that no initialisation gives, with the modules' versions."""
    model = former()
    generator = torch.Generator().manual_seed(4)
    state = model.state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.uniform_(0.1, 1, generator=generator)
    return copy.deepcopy(state)


def assert_loaded(model, want, but=()) -> None:
    got = model.state_dict()
    for name, value in want.items():
        if name not in but:
            assert torch.equal(got[name], value), name


def as_version_1(state) -> OrderedDict:
    """Without versions; pixel decoder directly under the head, queries under their old name."""
    old = OrderedDict()
    for name, value in state.items():
        old[name.replace(PIXEL, "sem_seg_head.").replace("query_feat", "static_query")] = value
    return old


def test_versions_are_the_published_ones() -> None:
    metadata = former().state_dict()._metadata
    assert metadata["sem_seg_head"]["version"] == 2 and metadata["sem_seg_head.predictor"]["version"] == 2


@pytest.mark.parametrize("plain", [True, False])
def test_a_current_checkpoint_loads_strictly_even_as_a_plain_dict(plain, caplog) -> None:
    state, model = source(), former()
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(OrderedDict(state) if plain else state, strict=True)
    assert_loaded(model, state)
    assert "renamed" not in caplog.text


def test_a_version_1_checkpoint_is_renamed(caplog) -> None:
    state, model = source(), former()
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(as_version_1(state), strict=True)
    assert_loaded(model, state)
    tensors = sum(name.startswith(PIXEL) for name in state)
    assert f"renamed {tensors} tensors of a version 1 checkpoint to {PIXEL}*" in caplog.text
    assert "static_query -> query_feat" in caplog.text


def test_a_version_1_file_loads_through_detectron2s_checkpointer(tmp_path) -> None:
    state, model = source(), former()
    torch.save({"model": dict(as_version_1(state))}, tmp_path / "old.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "old.pth"))
    assert_loaded(model, state)


def test_a_version_2_checkpoint_is_never_renamed() -> None:
    """With versions, names under the head that we do not know stay as they are, and are unexpected."""
    state = source()
    state["sem_seg_head.adapter_1.weight"] = torch.zeros(1)
    missing, unexpected = former().load_state_dict(state, strict=False)
    assert not missing and unexpected == ["sem_seg_head.adapter_1.weight"]


@pytest.mark.parametrize("rows", [[2], [0, 2], []])
def test_rows_that_were_not_trained_keep_the_models_own_values(rows) -> None:
    state, model = source(), former()
    own = model.sem_seg_head.predictor.level_embed.weight.detach().clone()
    state._metadata["sem_seg_head.predictor"]["trained_level_rows"] = rows
    model.load_state_dict(state)
    table = model.sem_seg_head.predictor.level_embed.weight
    for row in range(3):
        assert torch.equal(table[row], state[LEVELS][row] if row in rows else own[row])
    assert_loaded(model, state, but=[LEVELS])


def test_the_given_state_dict_is_not_changed() -> None:
    state = source()
    before = {name: value.clone() for name, value in state.items()}
    state._metadata["sem_seg_head.predictor"]["trained_level_rows"] = [2]
    former().load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_rows_of_a_table() -> None:
    own, loaded = torch.zeros(3, 2), torch.ones(3, 2)
    kept = keep_untrained_rows(own, loaded, [1, 7])
    assert kept.tolist() == [[0, 0], [1, 1], [0, 0]] and own.sum() == 0


def test_a_pre_training_loads_into_the_fine_tuning_model() -> None:
    """Only the criterion's class weights are missing; only parts of the pre-training are unexpected."""
    missing, unexpected = former().load_state_dict(tiny_model().state_dict(), strict=False)
    assert missing == ["criterion.empty_weight"]
    assert {name.split(".")[0] for name in unexpected} == {
        "jepa",
        "target_pixel_decoder",
        "step",
        "ema_pending",
    }


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (
            "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
            "res5",
            "TRANSFORMER_IN_FEATURE is 'res5'; only 'multi_scale",
        ),
        ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 48, "CONVS_DIM must be a multiple of 32"),
        ("MODEL.MASK_FORMER.DEC_LAYERS", 0, "DEC_LAYERS must be at least 1, not 0"),
    ],
)
def test_heads_that_cannot_be_built_are_one_sentence(key, value, sentence) -> None:
    from detectron2.modeling import build_model

    with pytest.raises(ValueError, match=sentence):
        build_model(tiny_config("semantic", {key: value}))


@pytest.mark.parametrize(
    "key", ["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME"]
)
def test_an_unknown_part_is_named_with_those_there_are(key) -> None:
    from detectron2.modeling import build_model

    with pytest.raises(KeyError, match="no 'Nobody' in the registry .*; it holds: .*M"):
        build_model(tiny_config("semantic", {key: "Nobody"}))
