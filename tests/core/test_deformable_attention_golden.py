"""The two deformable-attention versions against numbers of the published implementation."""

import pytest
import torch
from golden_tools import assert_close, load, tensor

from jepa_plugins.core import deformable_attention as da

META, WANT = load("msdeform_core")
BACKENDS = [
    "pytorch",
    pytest.param(
        "operator",
        marks=pytest.mark.skipif(not da.operator_installed(), reason=f"no operator: {da.INSTALL_LINE}"),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_golden(backend):
    value = tensor(50, [2, 252, 4, 8]).requires_grad_()
    locations = tensor(51, [2, 60, 4, 3, 4, 2], -0.2, 1.2).requires_grad_()
    weights = tensor(52, [2, 60, 4, 3, 4], 0, 1).requires_grad_()
    shapes = [tuple(s) for s in META["spatial_shapes"]]
    try:
        da.set_backend(backend)
        out = da.multi_scale_deformable_attention(value, shapes, locations, weights)
        out.backward(tensor(53, [2, 60, 32]))
    finally:
        da.set_backend(None)
    assert_close(out, WANT["output"])
    assert_close(value.grad, WANT["grad_value"])
    assert_close(locations.grad, WANT["grad_locations"])
    assert_close(weights.grad, WANT["grad_weights"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_inside(backend, dtype):
    value = tensor(1, [1, 20, 2, 4]).to(dtype)
    locations = torch.rand(1, 5, 2, 2, 3, 2).to(dtype)
    weights = torch.rand(1, 5, 2, 2, 3).to(dtype)
    shapes = [(4, 4), (2, 2)]
    try:
        da.set_backend(backend)
        got = da.multi_scale_deformable_attention(value, shapes, locations, weights)
    finally:
        da.set_backend(None)
    want = da.deformable_attention_pytorch(value.float(), shapes, locations.float(), weights.float())
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype)) or (got.float() - want).abs().max() < 0.01


def test_wrong_number_of_cells_is_named():
    with pytest.raises(ValueError, match="value holds 19 cells"):
        da.multi_scale_deformable_attention(
            torch.zeros(1, 19, 2, 4),
            [(4, 4), (2, 2)],
            torch.zeros(1, 5, 2, 2, 3, 2),
            torch.zeros(1, 5, 2, 2, 3),
        )


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'pytorch', 'operator' or None"):
        da.set_backend("cuda")
