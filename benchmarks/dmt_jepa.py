#!/usr/bin/env python3
"""What DMT-JEPA costs over I-JEPA: time of a whole step, and of the neighbours and heads alone, in the same run.

    python benchmarks/dmt_jepa.py --sizes small base --batch 4
    python benchmarks/dmt_jepa.py --masks

Arms take turns, so that a change of the machine's load meets them all alike; the median over rounds counts. The paper
reports +0.3 % time and no memory at ViT-B/16 (table 6). --masks shows what drawing the masks costs instead: as a
share of a step of mmseg/quick/dmt_jepa.py in the same run, and at the paper's batches, of which a process draws 256
images, or all 2,048 with mask.scope "global".
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from jepa_plugins.core.dmt_jepa import IJEPA, DMTJEPAModel, DMTJEPASettings  # noqa: E402
from jepa_plugins.core.multiblock import MultiBlock, draw_masks  # noqa: E402
from jepa_plugins.core.vit import SIZES, Predictor, VisionTransformer  # noqa: E402

ARMS = {
    "I-JEPA": IJEPA,
    "DMT-JEPA, learned": DMTJEPASettings(),
    "DMT-JEPA, parameter free": DMTJEPASettings(lat="parameter_free"),
}


PAPERS_STEP = 606.4  # ms, I-JEPA, ViT-B/16 at 256 images a GPU (table 6)


def build(size: str, settings: DMTJEPASettings) -> DMTJEPAModel:
    """A model of the paper's shapes at 224 pixels and patch 16, or that of mmseg/quick."""
    if size == "quick":
        encoder = VisionTransformer(80, 8, width=192, depth=6, heads=3)
        predictor = Predictor(encoder.grid, 192, width=96, depth=3, heads=3)
    else:
        width, depth, heads = SIZES[size]
        encoder = VisionTransformer(224, 16, width=width, depth=depth, heads=heads)
        predictor = Predictor(encoder.grid, width, width=384, depth=6, heads=heads)
    return DMTJEPAModel(encoder, predictor, settings).train()


def seconds(action: Callable[[], object]) -> float:
    """Of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Arm:
    """One method's step, and the part of it that I-JEPA does not have."""

    def __init__(self, size: str, settings: DMTJEPASettings, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.model = build(size, settings).to(device)
        grid = self.model.encoder.grid
        pixels = [self.model.encoder.patch_size * side for side in grid]
        self.images = torch.randn(batch, 3, *pixels, device=device)
        self.masks = draw_masks(MultiBlock(), grid, 0, torch.arange(batch), 0).to(torch.device(device))
        width = self.model.encoder.width
        self.patches = torch.randn(batch, grid[0] * grid[1], width, device=device)
        self.context = torch.randn(
            batch, self.masks.context.shape[1], width, device=device, requires_grad=True
        )

    def step(self) -> None:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        self.model(self.images, self.masks).losses["loss"].backward()

    def addition(self) -> None:
        """Neighbours and aggregated targets forward; the context's aggregate forward and backward."""
        with torch.no_grad():
            self.model.aggregate(self.patches, self.model.encoder.grid)
        out = self.model.context_tokens(self.context)
        if out.requires_grad and out is not self.context:
            out.sum().backward()


def measure(size: str, batch: int, rounds: int, device: str) -> None:
    """Print a line for each arm."""
    arms = {name: Arm(size, settings, batch, device) for name, settings in ARMS.items()}
    steps: dict[str, list[float]] = {name: [] for name in arms}
    parts: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, arm in arms.items():
            step, part = seconds(arm.step), seconds(arm.addition)
            if round_:  # the first one warms up
                steps[name].append(step)
                parts[name].append(part)
    reference = statistics.median(steps["I-JEPA"])
    for name in arms:
        step, part = statistics.median(steps[name]), statistics.median(parts[name])
        parameters = sum(p.numel() for p in arms[name].model.parameters() if p.requires_grad)
        print(
            f"{size:6} {name:26} step {step * 1000:8.1f} ms = {step / reference:5.3f} of I-JEPA; additions "
            f"{part * 1000:7.1f} ms = {part / step:6.1%} of the step; {parameters / 1e6:.1f}M trained parameters"
        )


def draw(batch: int, grid: tuple[int, int], sampler: str, number: int) -> None:
    """Masks of the batch of a number."""
    index = torch.arange(number * batch, (number + 1) * batch)
    draw_masks(MultiBlock(grid=sampler), grid, 0, index, number * batch)


def measure_masks(rounds: int, device: str) -> None:
    """Print what drawing costs; steps and all draws take turns."""
    arm, batch = Arm("quick", ARMS["DMT-JEPA, learned"], 32, device), 32
    cases = [("ijepa", batch, (10, 10))]
    cases += [(sampler, size, (14, 14)) for sampler in ("ijepa", "full_grid") for size in (256, 2048)]
    steps: list[float] = []
    draws: dict[tuple, list[float]] = {case: [] for case in cases}
    for round_ in range(rounds + 1):
        step = seconds(arm.step)
        times = [seconds(partial(draw, size, grid, name, round_)) for name, size, grid in cases]
        if round_:  # the first one warms up
            steps.append(step)
            for case, time_ in zip(cases, times, strict=True):
                draws[case].append(time_)
    median = 1000 * statistics.median(steps)
    for (sampler, size, grid), values in draws.items():
        took = 1000 * statistics.median(values)
        quick = size == batch
        of = f"the quick step's {median:,.1f} ms" if quick else f"the paper's {PAPERS_STEP} ms"
        share = took / (median if quick else PAPERS_STEP)
        print(
            f"masks {sampler:9} {size:5} images of {grid[0]}x{grid[1]}: {took:6.2f} ms "
            f"(least {1000 * min(values):.2f}) = {share:.2%} of {of}"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=["quick", *sorted(SIZES)], default=["small", "base"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--masks", action="store_true", help="measure drawing the masks instead")
    args = parser.parse_args()
    if args.masks:
        measure_masks(args.rounds, args.device)
        return
    for size in args.sizes:
        measure(size, args.batch, args.rounds, args.device)


if __name__ == "__main__":
    main()
