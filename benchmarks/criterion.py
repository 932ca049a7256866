"""Time of the criterion (matching, losses, backward) as a ratio to a plain loop over images and layers.

    python benchmarks/criterion.py [--repeats 5] [--threads 1]

The loop is the yardstick of the tests (tests/d2/criterion_reference.py): points drawn and masks sampled anew
for every image and every layer. Both run in turn in one process, so that a busy machine slows both; a ratio
is the median of the repeats.
"""

import argparse
import runpy
import statistics
import time
from pathlib import Path

import torch

from jepa_plugins.d2.mask2former.criterion import SetCriterion
from jepa_plugins.d2.mask2former.matcher import HungarianMatcher

REFERENCE = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "d2" / "criterion_reference.py"))
WEIGHTS = (2.0, 5.0, 5.0)
LAYERS, QUERIES, CLASSES, OVERSAMPLE, IMPORTANCE, NO_OBJECT = 10, 100, 133, 3.0, 0.75, 0.1
# name: images, objects an image, side of the masks, side of the logits, points
CASES = {
    "small": (2, 12, 128, 32, 2048),
    "training": (2, 12, 512, 128, 12544),
    "crowded": (4, 40, 512, 128, 12544),
}


def make_case(batch: int, objects: int, side: int, logits_side: int) -> tuple[list, list]:
    layers = [
        {
            "pred_logits": torch.randn(batch, QUERIES, CLASSES + 1, requires_grad=True),
            "pred_masks": torch.randn(batch, QUERIES, logits_side, logits_side, requires_grad=True),
        }
        for _ in range(LAYERS)
    ]
    targets = [
        {"labels": torch.randint(CLASSES, (objects,)), "masks": torch.rand(objects, side, side) > 0.9}
        for _ in range(batch)
    ]
    return layers, targets


def run_loop(layers: list, targets: list, points: int) -> None:
    total = 0.0
    for layer in layers:
        pairs = REFERENCE["assign"](REFERENCE["layer_costs"](layer, targets, WEIGHTS, points, torch.rand))
        losses = REFERENCE["layer_losses"](
            layer, targets, pairs, NO_OBJECT, points, OVERSAMPLE, IMPORTANCE, torch.rand
        )
        total = total + sum(losses)
    total.backward()


def run_ours(criterion: SetCriterion, layers: list, targets: list) -> None:
    losses = criterion({**layers[0], "aux_outputs": layers[1:]}, targets)
    sum(losses.values()).backward()


def seconds(work, *arguments) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'case':10} {'loop ms':>9} {'ours ms':>9} {'ours / loop':>12}   (medians of {arguments.repeats})")
    for name in arguments.cases:
        *shape, points = CASES[name]
        torch.manual_seed(0)
        layers, targets = make_case(*shape)
        criterion = SetCriterion(
            CLASSES,
            HungarianMatcher(*WEIGHTS, points),
            {},
            NO_OBJECT,
            ["labels", "masks"],
            points,
            OVERSAMPLE,
            IMPORTANCE,
        )
        run_ours(criterion, layers, targets)
        times = [
            (seconds(run_loop, layers, targets, points), seconds(run_ours, criterion, layers, targets))
            for _ in range(arguments.repeats)
        ]
        loop, ours = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(mine / plain for plain, mine in times)
        print(f"{name:10} {loop:9.0f} {ours:9.0f} {ratio:12.2f}", flush=True)


if __name__ == "__main__":
    main()
