"""The sine position encoding against its formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core.position import PositionEmbeddingSine


@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([4, 8]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_values(height, width, features, normalize) -> None:
    got = PositionEmbeddingSine(features, normalize=normalize)(torch.zeros(2, 5, height, width))
    assert got.shape == (2, 2 * features, height, width) and got.dtype == torch.float32
    assert torch.equal(got[0], got[1])
    for i in range(height):
        for j in range(width):
            y, x = float(i + 1), float(j + 1)
            if normalize:
                y, x = y / (height + 1e-6) * 2 * math.pi, x / (width + 1e-6) * 2 * math.pi
            want = []
            for position in (y, x):
                for k in range(features):
                    phase = position / 10000 ** (2 * (k // 2) / features)
                    want.append(math.sin(phase) if k % 2 == 0 else math.cos(phase))
            assert torch.allclose(got[0, :, i, j], torch.tensor(want), atol=2e-6)


def test_padding_leaves_the_image_as_it_is_alone() -> None:
    module = PositionEmbeddingSine(8, normalize=True)
    mask = torch.ones(1, 6, 9, dtype=torch.bool)
    mask[:, :4, :5] = False
    padded = module(torch.zeros(1, 1, 6, 9), mask)
    assert torch.allclose(padded[:, :, :4, :5], module(torch.zeros(1, 1, 4, 5)), atol=1e-6)


def test_has_no_parameters_and_refuses_a_scale_without_normalisation() -> None:
    assert not PositionEmbeddingSine(8).state_dict()
    with pytest.raises(ValueError, match="normalize=True"):
        PositionEmbeddingSine(8, scale=1.0)
