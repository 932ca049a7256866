#!/usr/bin/env python3
"""What DMT-JEPA costs over I-JEPA: time of a whole step, of what it adds alone, in the same run, and peak memory.

    python benchmarks/dmt_jepa.py --sizes small base --batch 4
    python benchmarks/dmt_jepa.py --masks

A step is forward, backward, optimiser and moving average. The additions are everything in it that I-JEPA does not
have: neighbours, aggregated targets, the share that the position table would choose too, the context's aggregate
forward and backward, and the heads' part of optimiser and moving average. Arms take turns, so that a change of the
machine's load meets them all alike; the median over rounds counts. Peak memory is that of a process of its own, as in
cost.py; both ratios are to I-JEPA. The paper reports +0.3 % time and no memory at ViT-B/16 (table 6).

--masks shows what drawing the masks costs instead: as a share of a step of mmseg/quick/dmt_jepa.py in the same run,
and at the paper's batches, of which a process draws 256 images, or all 2,048 with mask.scope "global".
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # A clone works without being installed.

from cost import GIB, peak_memory  # noqa: E402

from jepa_plugins.core.dmt_jepa import IJEPA, DMTJEPAModel, DMTJEPASettings  # noqa: E402
from jepa_plugins.core.ema import ema_update  # noqa: E402
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
        # A learning rate of 0 costs the same and keeps the weights what they are.
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)
        head = self.model.context_head
        self.head_optimizer = None if head is None else torch.optim.AdamW(head.parameters(), lr=0.0)

    def step(self) -> None:
        """Forward, backward, optimiser, moving average."""
        self.model(self.images, self.masks).losses["loss"].backward()
        self.optimizer.step()
        self.model.update_target()
        self.model.zero_grad(set_to_none=True)

    def addition(self) -> None:
        """Everything that I-JEPA's step does not have."""
        model = self.model
        with torch.no_grad():
            _, chosen = model.aggregate(self.patches, model.encoder.grid)
            if chosen is not None:
                model.by_position(chosen, self.images)
        out = model.context_tokens(self.context)
        if out is not self.context:
            out.sum().backward()
        if self.head_optimizer is not None:
            self.head_optimizer.step()
            ema_update(model.target_head, model.context_head, model.ema_momentum())
            self.head_optimizer.zero_grad(set_to_none=True)
        self.context.grad = None


class FreshArm:
    """An arm that is built where its memory is measured, for `peak_memory`."""

    def __init__(self, size: str, name: str) -> None:
        self.size, self.settings = size, ARMS[name]

    def stepper(self, device: str, images: int) -> Callable[[], None]:
        """Its step on so many images."""
        return Arm(self.size, self.settings, images, device).step


def peak_memory_apart(size: str, name: str, batch: int, device: str) -> int:
    """Bytes that an arm's step needs at most, in a process of its own."""
    command = [sys.executable, __file__, "--measure-memory", name, "--sizes", size]
    command += ["--batch", str(batch), "--device", device]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@dataclass(frozen=True)
class Row:
    """What an arm costs: seconds of a step and of the additions in it, most bytes held, trained parameters."""

    size: str
    arm: str
    step: float
    additions: float
    memory: int
    parameters: int


def measure(size: str, batch: int, rounds: int, device: str) -> list[Row]:
    """One row an arm, the first I-JEPA's."""
    memory = {name: peak_memory_apart(size, name, batch, device) for name in ARMS}
    arms = {name: Arm(size, settings, batch, device) for name, settings in ARMS.items()}
    steps: dict[str, list[float]] = {name: [] for name in arms}
    parts: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, arm in arms.items():
            step, part = seconds(arm.step), seconds(arm.addition)
            if round_:  # the first one warms up
                steps[name].append(step)
                parts[name].append(part)
    return [
        Row(
            size,
            name,
            statistics.median(steps[name]),
            statistics.median(parts[name]),
            memory[name],
            sum(p.numel() for p in arm.model.parameters() if p.requires_grad),
        )
        for name, arm in arms.items()
    ]


def table(rows: list[Row]) -> str:
    """Rows of one size, the first one's arm being the reference, as lines of a Markdown table."""
    lines = []
    for row in rows:
        cells = [
            f"{row.size:6} | {row.arm:24} | {1000 * row.step:8.1f} | {row.step / rows[0].step:10.3f}",
            f"{1000 * row.additions:9.2f} | {row.additions / row.step:8.1%} | {row.memory / GIB:8.2f}",
            f"{row.memory / rows[0].memory:10.3f} | {row.parameters / 1e6:6.1f}M",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


HEAD = """\
| size   | method                   | step, ms | time ratio | added, ms |  of step | peak GiB | peak ratio | trained |
|--------|--------------------------|---------:|-----------:|----------:|---------:|---------:|-----------:|--------:|"""


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
    parser.add_argument(
        "--measure-memory", choices=ARMS, help=argparse.SUPPRESS
    )  # of this arm, and nothing else
    args = parser.parse_args()
    if args.measure_memory:
        print(peak_memory(FreshArm(args.sizes[0], args.measure_memory), args.device, args.batch))
        return
    if args.masks:
        measure_masks(args.rounds, args.device)
        return
    print(HEAD)
    for size in args.sizes:
        print(table(measure(size, args.batch, args.rounds, args.device)), flush=True)


if __name__ == "__main__":
    main()
