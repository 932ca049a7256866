"""What the golden tests share: fixtures, their weights by formula, tolerances."""

import json
import runpy
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
FILL = runpy.run_path(str(GOLDEN / "fill.py"))
fill, gain_of, uniform, points, rectangles = (
    FILL[name] for name in ("fill", "gain_of", "uniform", "points", "rectangles")
)


def load(name):
    """(meta, arrays) of a fixture."""
    folder = GOLDEN / name
    return json.loads((folder / "meta.json").read_text()), np.load(folder / "arrays.npz")


def fill_module(module, meta, prefix=""):
    """Give every floating parameter and buffer of `module` the fixture's value."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not name.endswith(tuple(meta["kept"]) or ("\0",)):
                value = fill(prefix + name, tensor.shape, gain_of(prefix + name, meta["gains"]))
                tensor.copy_(torch.from_numpy(value))
    return module


def tensor(seed, shape, *bounds):
    return torch.from_numpy(uniform(seed, shape, *bounds))


def assert_close(got, want, noise=None, factor=5.0):
    """Within 5 x noise, or 1e-5 of the array's maximum where the fixture gives none."""
    got = got.detach().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    assert got.shape == want.shape
    tolerance = factor * noise if noise else 1e-5 * np.abs(want).max()
    worst = np.abs(got.astype(np.float64) - want).max()
    assert worst <= tolerance, f"differs by {worst:.3g}, tolerated {tolerance:.3g}"
