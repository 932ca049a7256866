"""Deterministic values for golden fixtures: weights from their official names, inputs from a seed.

fill(name, shape, gain) gives the value of one parameter or floating buffer of an official model, as
float32.  The name is the official state_dict key exactly as written in the fixture's json.
"""

import zlib

import numpy as np


def fill(name, shape, gain=1.0):
    shape = tuple(int(s) for s in shape)
    u = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, int(np.prod(shape))).reshape(shape)
    if name.endswith("running_var"):
        v = 1 + 0.1 * np.abs(u)
    elif len(shape) == 1 and name.endswith("weight"):  # the scale of a norm layer
        v = 1 + 0.1 * u
    elif len(shape) >= 3 and shape[0] == 1:  # position embeddings and lone tokens
        v = gain * 0.5 * u
    elif len(shape) >= 2:  # linear, convolution, embedding: unit gain over the fan-in
        v = gain * np.sqrt(3 / np.prod(shape[1:])) * u
    else:  # biases, running means
        v = gain * 0.1 * u
    return v.astype(np.float32)


def gain_of(name, gains):
    """The gain of the first key of `gains` (an ordered dict of the fixture's json) found in the name."""
    for part, gain in gains.items():
        if part in name:
            return gain
    return 1.0


def uniform(seed, shape, low=-1.0, high=1.0):
    """Inputs: legacy numpy RandomState, whose stream numpy promises not to change."""
    return np.random.RandomState(seed).uniform(low, high, shape).astype(np.float32)


def points(*shape):
    """A stand-in for torch.rand(*shape): values in [0, 1) that depend on the shape only."""
    shape = tuple(int(s) for s in shape)
    return np.random.RandomState(zlib.crc32(repr(shape).encode())).random_sample(shape).astype(np.float32)


def rectangles(seed, count, height, width):
    """`count` boolean masks: rectangle or ellipse, from a seed."""
    rng = np.random.RandomState(seed)
    yy, xx = np.mgrid[:height, :width]
    masks = []
    for i in range(count):
        cy, cx = rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width
        ry, rx = rng.uniform(0.1, 0.35) * height, rng.uniform(0.1, 0.35) * width
        if i % 2:
            masks.append(((yy - cy) / ry) ** 2 + ((xx - cx) / rx) ** 2 <= 1)
        else:
            masks.append((abs(yy - cy) <= ry) & (abs(xx - cx) <= rx))
    return np.stack(masks)
