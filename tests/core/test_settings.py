"""Mask-JEPA's options: defaults, validation, and what follows from them."""

import pytest

from jepa_plugins.core.settings import CHOICES, PREDICTOR_PARTS, QUERY_TABLES, MaskJEPASettings


def test_defaults_are_the_papers() -> None:
    settings_ = MaskJEPASettings()
    assert (settings_.noise_sigma, settings_.mask_ratio, settings_.mask_patch) == (0.4, 0.5, 8)
    assert (settings_.recon_stride, settings_.self_attention_blocks) == (8, 2)
    assert (settings_.readout, settings_.denoise_target) == ("spatial_queries", "noise")
    assert (settings_.recon_weight, settings_.denoise_weight) == (1.0, 1.0)
    for name, choices in CHOICES.items():
        assert getattr(settings_, name) == choices[0]
    assert settings_.readout_norm and not settings_.pos_on_value


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise_sigma": -0.1}, "sigma must not be negative, got -0.1"),
        ({"mask_ratio": 0.0}, "between 0 and 1, got 0.0"),
        ({"mask_ratio": 1.0}, "between 0 and 1, got 1.0"),
        ({"mask_patch": 0}, "at least one cell, got 0"),
        ({"recon_stride": 4}, "8, 16 or 32, got 4"),
        ({"self_attention_blocks": -1}, "M must not be negative, got -1"),
        ({"readout": "queries"}, "spatial_queries.*got 'queries'"),
        ({"denoise_target": "pixels"}, "noise.*image"),
        ({"recon_weight": -1.0}, "must not be negative"),
        ({"recon_weight": 0.0, "denoise_weight": 0.0}, "nothing to train"),
        ({"noise_sigma": 0.0}, "no sense with sigma 0"),
        ({"denoise_downsample": "nearest"}, "downsample concerns the clean image"),
        ({"denoise_target": "image", "denoise_noise_scale": "unit"}, "scale concerns the noise"),
        ({"self_attention_blocks": 0, "placement": "pre"}, "placement pre.*M is 0"),
        ({"levels": "round_robin", "mask_patch": 6}, "stride-32 cells wide.*a multiple of 4"),
        ({"levels": "round_robin", "mask_patch": 1, "recon_stride": 16}, "a multiple of 2"),
    ],
)
def test_settings_that_make_no_sense(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        MaskJEPASettings(**options)


def test_settings_that_make_sense_without_noise() -> None:
    assert MaskJEPASettings(noise_sigma=0.0, denoise_target="image").noise_sigma == 0
    assert MaskJEPASettings(noise_sigma=0.0, denoise_weight=0.0).recon_weight == 1
    assert [MaskJEPASettings(recon_stride=stride).level for stride in (32, 16, 8)] == [0, 1, 2]


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_checked(name) -> None:
    with pytest.raises(ValueError, match=f"{name.replace('_', ' ')} is one of .*got 'else'"):
        MaskJEPASettings(**{name: "else"})


def test_the_order_in_which_layers_read_the_maps() -> None:
    assert MaskJEPASettings().reading_order(4) == (2, 2, 2, 2)
    assert MaskJEPASettings(recon_stride=32).reading_order(2) == (0, 0)
    assert MaskJEPASettings(levels="round_robin").reading_order(5) == (0, 1, 2, 0, 1)


def test_parts_of_the_decoder_that_train() -> None:
    assert MaskJEPASettings().predictor_parts() == PREDICTOR_PARTS
    assert MaskJEPASettings(recon_weight=0.0).predictor_parts() == ()
    assert set(PREDICTOR_PARTS) - set(MaskJEPASettings(readout_norm=False).predictor_parts()) == {
        "decoder_norm"
    }
    assert MaskJEPASettings(readout="query_mix").predictor_parts() == (*PREDICTOR_PARTS, *QUERY_TABLES)
