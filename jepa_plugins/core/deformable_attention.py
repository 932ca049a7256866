"""Multi-scale deformable attention (Deformable DETR, eq. 3), in PyTorch or by an installed operator.

The package `torch-ms-deform-attn` brings the operator; without it the PyTorch version runs everywhere. Which
one runs is logged once. An operator that is installed and fails is an error, never a silent fallback.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

OPERATOR_PACKAGE = "torch_ms_deform_attn"
INSTALL_LINE = "pip install --no-build-isolation torch-ms-deform-attn==0.1.1"
_backend: str | None = None  # None: the operator when it is installed
_logged: set[tuple[str, str]] = set()


def set_backend(name: str | None) -> None:
    """Choose "pytorch", "operator", or None for the operator when it is installed (the default)."""
    global _backend
    if name not in (None, "pytorch", "operator"):
        raise ValueError(f"the deformable-attention backend is 'pytorch', 'operator' or None, not {name!r}")
    _backend = name


@functools.cache
def operator_installed() -> bool:
    """Whether the operator's package is there (it is not imported)."""
    return importlib.util.find_spec(OPERATOR_PACKAGE) is not None


def chosen_backend() -> str:
    """ "operator" or "pytorch": what `multi_scale_deformable_attention` runs."""
    if _backend is not None:
        return _backend
    return "operator" if operator_installed() else "pytorch"


def _log_once(backend: str, device: str) -> None:
    if torch.compiler.is_compiling() or (backend, device) in _logged:
        return
    _logged.add((backend, device))
    hint = ""
    if backend == "pytorch" and device == "cuda" and not operator_installed():
        hint = f"; the CUDA operator is faster: {INSTALL_LINE}"
    logger.info("deformable attention on %s: %s%s", device, backend, hint)


def deformable_attention_pytorch(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The PyTorch version; arguments and result as `multi_scale_deformable_attention`. float32 inside."""
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    grids = (2.0 * locations.float() - 1.0).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # [L, B*heads, Q, P, 2]
    maps = value.float().permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], dim=-1)
    sampled = [
        F.grid_sample(
            level.unflatten(-1, (h, w)), grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        for level, (h, w), grid in zip(maps, shapes, grids, strict=True)
    ]
    per_head = weights.float().permute(0, 2, 1, 3, 4).flatten(3).reshape(batch * heads, 1, queries, -1)
    out = (torch.cat(sampled, dim=-1) * per_head).sum(-1)  # [B*heads, d, Q]
    return out.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype)


@functools.cache
def _operator():  # type: ignore[no-untyped-def]
    try:
        from torch_ms_deform_attn import ms_deform_attn
    except ImportError as error:
        raise RuntimeError(
            f"the deformable-attention operator is installed but does not load ({error}); reinstall it: "
            f"{INSTALL_LINE}, or remove it: pip uninstall torch-ms-deform-attn"
        ) from error
    return ms_deform_attn


def _deformable_attention_operator(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    sizes = torch.tensor(shapes, dtype=torch.int64, device=value.device)
    cells = sizes.prod(dim=1)
    starts = cells.cumsum(0) - cells
    with torch.autocast(value.device.type, enabled=False):
        out = _operator()(value.float(), sizes, starts, locations.float(), weights.float())
    return out.to(value.dtype)


def multi_scale_deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted bilinear samples of several maps, zeros outside.

    Args:
        value: [B, sum of H*W over levels, heads, d], levels one after another, row by row.
        shapes: (H, W) of each level.
        locations: [B, Q, heads, L, P, 2], (x, y) in [0, 1] over each level's whole area (align_corners
            False).
        weights: [B, Q, heads, L, P]; used as given.

    Returns:
        [B, Q, heads * d] in the dtype of `value`; float32 inside.

    Raises:
        ValueError: when `value` does not hold as many cells as `shapes` says.
    """
    if value.shape[1] != sum(h * w for h, w in shapes):
        raise ValueError(
            f"value holds {value.shape[1]} cells, but the levels {list(shapes)} have another sum"
        )
    backend = chosen_backend()
    _log_once(backend, value.device.type)
    run = _deformable_attention_operator if backend == "operator" else deformable_attention_pytorch
    return run(value, shapes, locations, weights)


class MSDeformAttn(nn.Module):
    """Deformable attention with its projections, under the published parameter names.

    Args:
        d_model: width C; n_levels, n_heads, n_points: L, heads, P.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"the width {d_model} must be a multiple of the number of heads {n_heads}")
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head starts by looking in a direction of its own, point p at p + 1 cells; all weights
        equal."""
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2.0 * torch.pi / self.n_heads)
        direction = torch.stack([angles.cos(), angles.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        reach = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None, :] * reach[None, None, :, None]
        offsets = offsets.expand(self.n_heads, self.n_levels, self.n_points, 2)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()
            for projection in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(projection.weight)
                projection.bias.zero_()

    def forward(
        self, query: Tensor, reference_points: Tensor, source: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """
        Args:
            query: [B, Q, C]; reference_points: [B or 1, Q, L, 2] in [0, 1]; source: [B, sum of H*W, C].

        Returns:
            [B, Q, C].
        """
        batch, queries, _ = query.shape
        value = self.value_proj(source).unflatten(-1, (self.n_heads, -1))
        per_level = (self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).view(batch, queries, *per_level, 2)
        weights = self.attention_weights(query).view(batch, queries, self.n_heads, -1).softmax(-1)
        extent = query.new_tensor([(w, h) for h, w in shapes])  # offsets are in cells of their level
        locations = reference_points[:, :, None, :, None, :] + offsets / extent[None, None, None, :, None, :]
        weights = weights.view(batch, queries, *per_level)
        return self.output_proj(multi_scale_deformable_attention(value, shapes, locations, weights))
