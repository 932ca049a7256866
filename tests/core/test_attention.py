"""Attention and deformable attention: every way of computing them gives the same numbers."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jepa_plugins.core import attention as attention_module
from jepa_plugins.core import deformable_attention as deformable
from jepa_plugins.core.attention import attention, multihead_attention, uses_explicit_softmax
from jepa_plugins.core.deformable_attention import MSDeformAttn, deformable_attention_pytorch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def inputs(dtype=torch.float32, seed=0, queries=7, keys=11, width=8):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 3, queries, width, generator=generator).to(dtype)
    key, value = (torch.randn(2, 3, keys, width, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(2, 1, queries, keys, generator=generator) > 0.5
    mask[..., 0] = True
    return query, key, value, mask


def reference(query, key, value, mask=None):
    """In float64, by the formula."""
    query, key, value = query.double(), key.double(), value.double()
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    weights = scores.exp()
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), value)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_explicit_and_fused_equal_the_formula(monkeypatch, dtype, masked, explicit) -> None:
    limit = 10**9 if explicit else 0
    monkeypatch.setattr(attention_module, "EXPLICIT_UP_TO", {("cpu", dtype): limit})
    query, key, value, mask = inputs(dtype)
    got = attention(query, key, value, mask if masked else None)
    want = reference(query, key, value, mask if masked else None)
    assert got.dtype == dtype
    assert float((got.double() - want).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("masked", [False, True])
def test_explicit_and_fused_have_equal_gradients(monkeypatch, masked) -> None:
    gradients = []
    for limit in (0, 10**9):
        monkeypatch.setattr(attention_module, "EXPLICIT_UP_TO", {("cpu", torch.float32): limit})
        query, key, value, mask = inputs()
        tensors = [t.requires_grad_() for t in (query, key, value)]
        attention(*tensors, mask if masked else None).square().sum().backward()
        gradients.append([t.grad for t in tensors])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_choice_depends_on_device_precision_and_size() -> None:
    limit = attention_module.EXPLICIT_UP_TO["cpu", torch.float32]
    assert uses_explicit_softmax("cpu", torch.float32, limit)
    assert not uses_explicit_softmax("cpu", torch.float32, limit + 1)
    assert not uses_explicit_softmax("cuda", torch.float32, 1)
    assert not uses_explicit_softmax("cpu", torch.float64, 1)


def test_choice_is_logged_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(attention_module, "_logged", set())
    with caplog.at_level(logging.INFO, logger=attention_module.__name__):
        for _ in range(3):
            attention(*inputs()[:3])
    assert len(caplog.records) == 1
    assert "explicit softmax" in caplog.text and "float32" in caplog.text
    with caplog.at_level(logging.INFO, logger=attention_module.__name__):
        attention(*inputs(queries=200, keys=200)[:3])
    assert len(caplog.records) == 2 and "fused" in caplog.records[1].message


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention_is_torchs(bias, masked) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 4, bias=bias)
    if bias:
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    mask = torch.rand(2, 1, 1, 9) > 0.4
    mask[..., 0] = True
    want, _ = module(
        *(t.transpose(0, 1) for t in (query, key, value)),
        key_padding_mask=~mask[:, 0, 0] if masked else None,
        need_weights=False,
    )
    got = multihead_attention(module, query, key, value, mask if masked else None)
    assert torch.allclose(got, want.transpose(0, 1), atol=1e-5)


def naive_deformable(value, shapes, locations, weights):
    """Bilinear interpolation by loops, in float64; cell (i, j) is centred at ((j + .5) / W, (i + .5) / H)."""
    batch, _, heads, width = value.shape
    value, locations, weights = value.double(), locations.double(), weights.double()
    out = torch.zeros(batch, locations.shape[1], heads, width, dtype=torch.float64)
    start = 0
    for level, (h, w) in enumerate(shapes):
        cells = value[:, start : start + h * w].view(batch, h, w, heads, width)
        start += h * w
        for b, q, m, p in torch.cartesian_prod(
            *(torch.arange(n) for n in (batch, locations.shape[1], heads, locations.shape[4]))
        ).tolist():
            x = float(locations[b, q, m, level, p, 0]) * w - 0.5
            y = float(locations[b, q, m, level, p, 1]) * h - 0.5
            for i in (math.floor(y), math.floor(y) + 1):
                for j in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < h and 0 <= j < w:
                        share = (1 - abs(x - j)) * (1 - abs(y - i))
                        out[b, q, m] += weights[b, q, m, level, p] * share * cells[b, i, j, m]
    return out.flatten(2)


@st.composite
def deformable_inputs(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3))
    batch, queries, heads, points = (draw(st.integers(1, most)) for most in (2, 3, 3, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, 4, generator=generator)
    # beyond the map on every side, where the value is zero
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, generator=generator) * 1.6 - 0.3
    weights = torch.randn(batch, queries, heads, len(shapes), points, generator=generator)
    return value, shapes, locations, weights


@given(deformable_inputs())
@settings(max_examples=25, deadline=None)
def test_deformable_attention_equals_a_loop(case) -> None:
    got = deformable_attention_pytorch(*case)
    assert torch.allclose(got.double(), naive_deformable(*case), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_deformable_attention_is_float32_inside(dtype) -> None:
    value, locations, weights = (
        torch.randn(1, 25, 2, 4),
        torch.rand(1, 6, 2, 1, 4, 2),
        torch.rand(1, 6, 2, 1, 4),
    )
    got = deformable_attention_pytorch(value.to(dtype), [(5, 5)], locations, weights)
    want = deformable_attention_pytorch(value.to(dtype).float(), [(5, 5)], locations, weights)
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def test_deformable_attention_refuses_another_number_of_cells() -> None:
    with pytest.raises(ValueError, match="holds 25 cells"):
        deformable.multi_scale_deformable_attention(
            torch.zeros(1, 25, 1, 4), [(5, 6)], torch.zeros(1, 2, 1, 1, 1, 2), torch.zeros(1, 2, 1, 1, 1)
        )


def test_backend_names(monkeypatch) -> None:
    monkeypatch.setattr(deformable, "_backend", None)
    monkeypatch.setattr(deformable, "operator_installed", lambda: True)
    assert deformable.chosen_backend() == "operator"
    monkeypatch.setattr(deformable, "operator_installed", lambda: False)
    assert deformable.chosen_backend() == "pytorch"
    deformable.set_backend("operator")
    assert deformable.chosen_backend() == "operator"
    with pytest.raises(ValueError, match="'triton'"):
        deformable.set_backend("triton")


def test_a_failing_operator_is_an_error_and_never_a_fallback(monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(deformable, "_backend", "operator")
    monkeypatch.setattr(deformable, "_operator", lambda: broken)
    with pytest.raises(RuntimeError, match="no kernel image"):
        deformable.multi_scale_deformable_attention(
            torch.zeros(1, 4, 1, 4), [(2, 2)], torch.zeros(1, 2, 1, 1, 1, 2), torch.zeros(1, 2, 1, 1, 1)
        )


def test_deformable_backend_is_logged_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(deformable, "_logged", set())
    monkeypatch.setattr(deformable, "_backend", "pytorch")
    module = MSDeformAttn(8, 1, 2, 2)
    with caplog.at_level(logging.INFO, logger=deformable.__name__):
        for _ in range(2):
            module(torch.zeros(1, 4, 8), torch.full((1, 4, 1, 2), 0.5), torch.zeros(1, 4, 8), [(2, 2)])
    assert [record.message for record in caplog.records] == ["deformable attention on cpu: pytorch"]


def test_deformable_module_starts_by_looking_around() -> None:
    """Point p lies p + 1 cells away; each head looks in a direction of its own; all weights are equal."""
    module = MSDeformAttn(d_model=32, n_levels=2, n_heads=8, n_points=3)
    offsets = module.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    assert torch.allclose(offsets.abs().amax(-1), torch.tensor([1.0, 2.0, 3.0]).expand(8, 2, 3), atol=1e-6)
    angles = torch.atan2(offsets[:, 0, 0, 1], offsets[:, 0, 0, 0]) % (2 * math.pi)
    assert len({round(float(a), 3) for a in angles}) == 8
    query, source = torch.randn(1, 12, 32), torch.randn(1, 16, 32)
    out = module(query, torch.rand(1, 12, 2, 2), source, [(3, 4), (2, 2)])
    assert out.shape == (1, 12, 32)
    again = module(torch.randn(1, 12, 32), torch.rand(1, 12, 2, 2), source, [(3, 4), (2, 2)])
    assert not torch.equal(out, again)
    assert F.mse_loss(module.attention_weights(query), torch.zeros(1, 12, 48)) == 0


def test_deformable_module_needs_a_width_that_the_heads_divide() -> None:
    with pytest.raises(ValueError, match="multiple of the number of heads"):
        MSDeformAttn(d_model=30, n_heads=8)
