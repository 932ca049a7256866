"""Fused attention against explicit softmax, forward and backward: where the choice of core.attention comes
from.

    python benchmarks/attention.py [--threads 2] [--device cpu]

Prints, for each precision and number of scores a head, the median time of both and their ratio in the same
run.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from jepa_plugins.core import attention as module

SHAPES = [  # batch, heads, queries, keys, width of a head, masked
    (8, 8, 30, 256, 8, True),
    (4, 8, 64, 64, 32, False),
    (4, 8, 100, 100, 32, False),
    (4, 8, 128, 256, 8, False),
    (4, 12, 196, 196, 64, False),
    (4, 8, 100, 256, 32, True),
    (4, 8, 256, 256, 32, False),
    (2, 8, 100, 1024, 32, True),
    (2, 8, 512, 512, 32, False),
    (1, 8, 1024, 1024, 32, False),
    (1, 8, 100, 4096, 32, True),
    (1, 8, 2048, 4096, 32, False),
]


def seconds(shape, dtype, device, limit):
    """Median time of forward and backward with the choice forced by `limit` scores."""
    batch, heads, queries, keys, width, masked = shape
    q, k, v = (
        torch.randn(batch, heads, n, width, dtype=dtype, device=device, requires_grad=True)
        for n in (queries, keys, keys)
    )
    mask = torch.rand(batch, 1, queries, keys, device=device) > 0.3 if masked else None
    module.EXPLICIT_UP_TO[(q.device.type, dtype)] = limit
    times = []
    for _ in range(3 if queries * keys > 10**6 else 11):
        start = time.perf_counter()
        module.attention(q, k, v, mask).sum().backward()
        if q.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main():
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} threads")
    print(f"{'dtype':>9} {'shape':>30} {'scores':>9} {'explicit ms':>12} {'fused ms':>9} {'ratio':>6}")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            explicit = 1e3 * seconds(shape, dtype, args.device, 2**62)
            fused = 1e3 * seconds(shape, dtype, args.device, 0)
            name = str(dtype).removeprefix("torch.")
            scores = shape[2] * shape[3]
            print(
                f"{name:>9} {shape!s:>30} {scores:>9} {explicit:>12.2f} {fused:>9.2f} "
                f"{fused / explicit:>6.2f}"
            )


if __name__ == "__main__":
    main()
