"""Generated scenes: textured, shaded, overlapping things on textured grounds, with exact labels.

A thing's class is its shape and a ground's class is its texture. Colours, sizes, surface patterns and light
are drawn without regard to the class. Things tend to be more vivid than grounds, which helps to find them but
not to tell one class from another. A scene depends on ``(seed, index)`` and its size alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CLASSES",
    "COLORS",
    "STUFF_CLASSES",
    "THING_CLASSES",
    "VERSION",
    "Scene",
    "SegmentInfo",
    "make_scene",
]

VERSION = 2
"""Raised whenever the same ``(seed, index)`` gives another picture than before."""

MIN_SIZE = 32
MAX_THINGS = 6
MAX_TILT = 0.5  # Radians from upright.

THING_CLASSES = ("disc", "box", "triangle", "star", "ring", "cross", "crescent", "heart")
STUFF_CLASSES = ("stripes", "bricks", "sand", "waves")
CLASSES = THING_CLASSES + STUFF_CLASSES
"""Names by contiguous class id: things first, then stuff."""

COLORS = (
    (220, 60, 50),
    (60, 110, 220),
    (245, 190, 40),
    (150, 70, 190),
    (40, 180, 170),
    (240, 120, 30),
    (230, 110, 170),
    (130, 20, 60),
    (110, 150, 90),
    (150, 120, 100),
    (210, 200, 150),
    (90, 150, 180),
)
"""One RGB colour (0 to 255) per class for drawing label maps; unrelated to the colours in the pictures."""

Array = NDArray[np.floating[Any]]  # float32 throughout: factors are Python floats, which do not widen it.


class SegmentInfo(NamedTuple):
    """One segment: its value in ``Scene.segments``, its contiguous class id, and whether it is a thing."""

    id: int
    class_id: int
    isthing: bool


@dataclass(frozen=True)
class Scene:
    """A picture with its labels.

    image: uint8 [H, W, 3], RGB.
    segments: int32 [H, W], values 1 to n; every pixel belongs to a segment, so 0 (void) does not occur.
    infos: the n segments in the order of their ids. Each visible thing is one segment (possibly in several
        pieces); all pixels of one stuff class are one segment.
    """

    image: NDArray[np.uint8]
    segments: NDArray[np.int32]
    infos: list[SegmentInfo]

    def semantic(self) -> NDArray[np.uint8]:
        """Contiguous class id of every pixel, uint8 [H, W]."""
        table = np.zeros(len(self.infos) + 1, np.uint8)
        for info in self.infos:
            table[info.id] = info.class_id
        return table[self.segments]


def make_scene(seed: int, index: int, size: int | tuple[int, int] = 128) -> Scene:
    """Scene number ``index`` of the collection ``seed``.

    size: side of a square picture or (height, width), in pixels, at least 32 each.
    Raises ValueError for a negative seed or index and for a size below 32.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"scene size {height}x{width} is too small: use at least {MIN_SIZE} pixels a side")
    if seed < 0 or index < 0:
        raise ValueError(f"scene seed {seed} and index {index} must not be negative")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    canvas, grounds, palette = _draw_grounds(rng, height, width)
    light = rng.uniform(0, 2 * math.pi)
    things = [_Patch(thing, height, width) for thing in _place_things(rng, height, width, palette)]
    things, owner = _visible(things, height, width)
    for patch in things:
        _draw_thing(rng, canvas, patch, light)
    segments, infos = _segments(grounds, owner, [patch.thing.class_id for patch in things])
    return Scene(_expose(rng, canvas, light), segments, infos)


# --- noise, colours ----------------------------------------------------------------------------------------


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Array:
    """Random field [H, W] in [0, 1] that changes over about ``cell`` pixels."""

    def corners(length: int) -> tuple[NDArray[np.intp], Array]:
        position = (np.arange(length, dtype=np.float32) + 0.5) / cell
        low = position.astype(np.intp)
        part = position - low.astype(np.float32)
        return low, part * part * (3 - 2 * part)

    (y, fy), (x, fx) = corners(height), corners(width)
    grid = rng.random((int(y[-1]) + 2, int(x[-1]) + 2), dtype=np.float32)
    rows = grid[y] + (grid[y + 1] - grid[y]) * fy[:, None]
    return rows[:, x] + (rows[:, x + 1] - rows[:, x]) * fx


def _hsv_to_rgb(hsv: Array) -> Array:
    """Hue, saturation, value in [0, 1] (hue wraps) to RGB in [0, 1], over the last axis."""
    hue, saturation, value = hsv[..., 0:1], hsv[..., 1:2], hsv[..., 2:3]
    sector = (np.array([5, 3, 1], np.float32) + hue * 6) % 6
    wheel = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return value - value * saturation * wheel


def _random_colors(rng: np.random.Generator, count: int) -> Array:
    """``count`` colours for things: RGB in [0, 1], [count, 3]."""
    low, high = (0.0, 0.4, 0.4), (1.0, 0.95, 1.0)
    return _hsv_to_rgb(rng.uniform(low, high, (count, 3)).astype(np.float32))


def _color_pair(rng: np.random.Generator) -> Array:
    """Two related colours that differ in brightness, for a ground: RGB in about [0, 1], [2, 3]."""
    hue, saturation, value = rng.random(), rng.uniform(0.05, 0.45), rng.uniform(0.55, 0.95)
    other = (hue + rng.normal(0, 0.08), rng.uniform(0.05, 0.45), value - rng.uniform(0.2, 0.45))
    pair = _hsv_to_rgb(np.array([(hue, saturation, value), other], np.float32))
    return pair[::-1] if rng.random() < 0.5 else pair


# --- grounds -----------------------------------------------------------------------------------------------
# A texture maps rotated, slightly warped pixel coordinates to the share of its second colour, in [0, 1].


def _stripes(rng: np.random.Generator, u: Array, v: Array, unit: float) -> Array:
    period = unit * rng.uniform(0.8, 1.7)
    return np.clip(0.5 + rng.uniform(0.7, 2.0) * np.sin(u * (2 * math.pi / period)), 0, 1)


def _waves(rng: np.random.Generator, u: Array, v: Array, unit: float) -> Array:
    period = unit * rng.uniform(0.8, 1.5)
    swing = rng.uniform(0.5, 0.8) * period * np.sin(v * (2 * math.pi / (period * rng.uniform(2.2, 3.2))))
    return np.clip(0.5 + rng.uniform(0.7, 2.0) * np.sin((u + swing) * (2 * math.pi / period)), 0, 1)


def _bricks(rng: np.random.Generator, u: Array, v: Array, unit: float) -> Array:
    tall = unit * rng.uniform(0.8, 1.5)
    wide = tall * rng.uniform(1.7, 2.6)
    row = np.floor(v / tall)
    across = u / wide + 0.5 * (row % 2)
    column = np.floor(across)
    edge = np.minimum(_to_edge(across - column) * wide, _to_edge(v / tall - row) * tall)
    tint = rng.random((32, 32), dtype=np.float32)[row.astype(int) % 32, column.astype(int) % 32]
    joint = np.clip(rng.uniform(1.0, 1.6) - edge, 0, 1)
    return joint + (1 - joint) * 0.35 * tint


def _to_edge(part: Array) -> Array:
    return np.minimum(part, 1 - part)


def _sand(rng: np.random.Generator, u: Array, v: Array, unit: float) -> Array:
    height, width = u.shape
    fine = _smooth_noise(rng, height, width, max(1.2, unit * rng.uniform(0.12, 0.2)))
    coarse = _smooth_noise(rng, height, width, max(2.0, unit * rng.uniform(0.3, 0.5)))
    return np.clip(0.5 + rng.uniform(1.0, 1.8) * (0.6 * fine + 0.4 * coarse - 0.5), 0, 1)


_Texture = Callable[[np.random.Generator, Array, Array, float], Array]
_TEXTURES: dict[str, _Texture] = {"stripes": _stripes, "bricks": _bricks, "sand": _sand, "waves": _waves}


def _draw_grounds(rng: np.random.Generator, height: int, width: int) -> tuple[Array, NDArray[np.intp], Array]:
    """One to three grounds with irregular borders.

    Returns the picture [H, W, 3] in about [0, 1], the stuff class (0 to 3) of each pixel [H, W], and the
    grounds' colours [2 * grounds, 3].
    """
    side = min(height, width)
    chosen = rng.permutation(len(STUFF_CLASSES))[: rng.choice((1, 2, 3), p=(0.1, 0.55, 0.35))]
    y, x = _pixel_grid(0, height, 0, width)
    score = np.empty((len(chosen), height, width), np.float32)
    for k in range(len(chosen)):
        cy, cx = rng.uniform((0, 0), (height, width)).tolist()
        rough = _smooth_noise(rng, height, width, side / 3.5)
        rough += 0.4 * _smooth_noise(rng, height, width, side / 10)
        score[k] = 0.5 * rough - np.sqrt((y - cy) ** 2 + (x - cx) ** 2) / side
    nearest = score.argmax(0)
    weight = np.exp(np.maximum(score - score.max(0), -1) * (1.5 * side))
    weight /= weight.sum(0)
    canvas = np.zeros((height, width, 3), np.float32)
    palette = []
    for k, stuff in enumerate(chosen):
        colors = _color_pair(rng)
        palette.append(colors)
        canvas += weight[k, ..., None] * _ground_color(rng, STUFF_CLASSES[stuff], colors, height, width)
    return canvas, chosen[nearest], np.concatenate(palette)


def _ground_color(rng: np.random.Generator, name: str, colors: Array, height: int, width: int) -> Array:
    """One ground over the whole picture: RGB [H, W, 3] in about [0, 1]."""
    side = min(height, width)
    unit = max(5.0, side / 128 * rng.uniform(6.5, 12.0))
    angle = rng.uniform(0, math.pi)
    cosine, sine = math.cos(angle), math.sin(angle)
    y, x = _pixel_grid(0, height, 0, width)
    warp = rng.uniform(0, 1.2) * unit * _smooth_noise(rng, height, width, side / 2.5)
    share = _TEXTURES[name](rng, x * cosine + y * sine + warp, y * cosine - x * sine + warp, float(unit))
    grain = rng.uniform(0.02, 0.1) * (_smooth_noise(rng, height, width, 1.5) - 0.5)
    stain = rng.uniform(0.1, 0.4) * (_smooth_noise(rng, height, width, side / 5) - 0.5)
    color = colors[0] + share[..., None] * (colors[1] - colors[0])
    return color * (1 + stain + grain)[..., None]


def _pixel_grid(top: int, bottom: int, left: int, right: int) -> tuple[Array, Array]:
    """Pixel centres: y [rows, 1] and x [1, columns]."""
    y = np.arange(top, bottom, dtype=np.float32) + 0.5
    x = np.arange(left, right, dtype=np.float32) + 0.5
    return y[:, None], x[None]


# --- things ------------------------------------------------------------------------------------------------
# A shape maps coordinates in units of the thing's radius, and two free numbers in [0, 1], to a value that is
# negative inside and grows like the distance to the border near it; y points down.


def _disc(x: Array, y: Array, p: float, q: float) -> Array:
    return np.sqrt(x * x + (y / (0.7 + 0.3 * p)) ** 2) - 0.92


def _box(x: Array, y: Array, p: float, q: float) -> Array:
    return np.maximum(np.abs(x) - 0.85, np.abs(y) - (0.5 + 0.35 * p))


def _triangle(x: Array, y: Array, p: float, q: float) -> Array:
    y = -y / (0.85 + 0.35 * p)
    slanted = 0.75**0.5 * np.abs(x) + 0.5 * y
    return np.maximum(slanted, -y) - 0.6


def _star(x: Array, y: Array, p: float, q: float) -> Array:
    points = 5 if q < 0.75 else 6
    sector = math.pi / points
    radius = np.sqrt(x * x + y * y)
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    tip, notch = 1.15, 0.45 + 0.12 * p
    # The edge runs from a tip at angle 0 to a notch at the sector's end; its normal points outwards.
    normal_x, normal_y = notch * math.sin(sector), tip - notch * math.cos(sector)
    length = math.hypot(normal_x, normal_y)
    return (radius * (normal_x * np.cos(angle) + normal_y * np.sin(angle)) - tip * normal_x) / length


def _ring(x: Array, y: Array, p: float, q: float) -> Array:
    thick = 0.16 + 0.1 * p
    return np.abs(np.sqrt(x * x + (y / (0.75 + 0.25 * q)) ** 2) - (1 - thick)) - thick


def _cross(x: Array, y: Array, p: float, q: float) -> Array:
    arm, reach = 0.22 + 0.12 * p, 0.8 + 0.2 * q
    upright = np.maximum(np.abs(x) - arm, np.abs(y) - 1)
    return np.minimum(upright, np.maximum(np.abs(x) - reach, np.abs(y) - arm))


def _crescent(x: Array, y: Array, p: float, q: float) -> Array:
    outer = np.sqrt(x * x + y * y) - 1
    inner = np.sqrt((x - 0.5 - 0.15 * p) ** 2 + y * y) - 0.8
    return np.maximum(outer, -inner)


def _heart(x: Array, y: Array, p: float, q: float) -> Array:
    half = 0.55 + 0.05 * p
    # A square on its corner with a half-disc on each of the upper sides.
    x, y = 0.2 + (x - y) * 0.5**0.5, 0.2 - (x + y) * 0.5**0.5
    square = np.maximum(np.abs(x), np.abs(y))
    lobes = np.minimum((x - half) ** 2 + y * y, x * x + (y - half) ** 2)
    return np.minimum(square, np.sqrt(lobes)) - half


_Shape = Callable[[Array, Array, float, float], Array]
_SHAPES: tuple[_Shape, ...] = (_disc, _box, _triangle, _star, _ring, _cross, _crescent, _heart)


@dataclass(frozen=True)
class _Thing:
    class_id: int
    y: float
    x: float
    radius: float
    angle: float
    free: tuple[float, float]
    colors: Array

    def distance(self, y: Array, x: Array) -> Array:
        """Signed distance to the outline in pixels (approximate away from it), negative inside."""
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        dy, dx = (y - self.y) / self.radius, (x - self.x) / self.radius
        u, v = dx * cosine + dy * sine, dy * cosine - dx * sine
        return _SHAPES[self.class_id](u, v, *self.free) * self.radius


class _Patch:
    """A thing with the window of the picture that it and its shadow can reach."""

    def __init__(self, thing: _Thing, height: int, width: int) -> None:
        reach = 2 * thing.radius + 2
        self.thing = thing
        self.rows = slice(max(0, int(thing.y - reach)), min(height, int(thing.y + reach) + 1))
        self.columns = slice(max(0, int(thing.x - reach)), min(width, int(thing.x + reach) + 1))
        self.y, self.x = _pixel_grid(self.rows.start, self.rows.stop, self.columns.start, self.columns.stop)
        self.distance = thing.distance(self.y, self.x)


def _place_things(rng: np.random.Generator, height: int, width: int, palette: Array) -> list[_Thing]:
    """Two to six things, the farthest first; about half lie close to an earlier one and overlap it."""
    side = min(height, width)
    count = int(rng.integers(2, MAX_THINGS + 1))
    class_ids = rng.integers(len(THING_CLASSES), size=count)
    radii = np.maximum(4.0, side * (0.09 + 0.21 * rng.random(count) ** 1.3))  # More small ones than large.
    things: list[_Thing] = []
    for class_id, radius in zip(class_ids.tolist(), radii.tolist(), strict=True):
        y, x = rng.uniform((0.06, 0.06), (0.94, 0.94)) * (height, width)
        if things and rng.random() < 0.5:
            other = things[int(rng.integers(len(things)))]
            angle, gap = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 0.95) * (radius + other.radius)
            y, x = other.y + gap * math.sin(angle), other.x + gap * math.cos(angle)
        y, x = np.clip((y, x), 0.06 * side, (height - 0.06 * side, width - 0.06 * side))
        colors = np.stack([_contrasting(rng, palette), _random_colors(rng, 1)[0]])
        angle, p, q = rng.uniform((-MAX_TILT, 0, 0), (MAX_TILT, 1, 1)).tolist()
        things.append(_Thing(class_id, float(y), float(x), radius, angle, (p, q), colors))
    return things


def _contrasting(rng: np.random.Generator, palette: Array) -> Array:
    """A random colour [3] that is not too close to any of ``palette`` [n, 3]: best of four draws."""
    draws = _random_colors(rng, 4)
    gap = np.abs(draws[:, None] - palette[None]).sum(-1).min(1)
    return draws[int(gap.argmax())]


def _visible(patches: list[_Patch], height: int, width: int) -> tuple[list[_Patch], NDArray[np.intp]]:
    """Keep the things of which enough is seen to tell what they are.

    Returns them, farthest first, and the index (into that list) of the thing that each pixel shows, -1 where
    it shows the ground, [H, W]. Taken from the nearest to the farthest: what is dropped hides nothing.
    """
    owner = np.full((height, width), -1)
    kept: list[_Patch] = []
    least = max(10.0, 0.0015 * height * width)
    for patch in reversed(patches):
        inside = patch.distance < 0
        window = owner[patch.rows, patch.columns]
        seen = inside & (window < 0)
        if seen.sum() >= max(least, 0.4 * inside.sum()):
            window[seen] = len(kept)
            kept.append(patch)
    return kept[::-1], np.where(owner < 0, -1, len(kept) - 1 - owner)


def _draw_thing(rng: np.random.Generator, canvas: Array, patch: _Patch, light: float) -> None:
    """Paint one thing and its shadow over ``canvas`` [H, W, 3]; light comes from the direction ``light``."""
    thing, radius = patch.thing, patch.thing.radius
    window = canvas[patch.rows, patch.columns]
    toward_y, toward_x = math.sin(light), math.cos(light)
    shift, blur = radius * rng.uniform(0.12, 0.35), 1 + radius * rng.uniform(0.05, 0.25)
    away = thing.distance(patch.y + shift * toward_y, patch.x + shift * toward_x)
    window *= 1 - rng.uniform(0.25, 0.55) * np.clip(0.5 - away / blur, 0, 1)[..., None]
    share = _surface(rng, patch)[..., None]
    color = thing.colors[0] + share * (thing.colors[1] - thing.colors[0])
    dy, dx = (patch.y - thing.y) / radius, (patch.x - thing.x) / radius
    shade = 1 + rng.uniform(0.1, 0.4) * (dx * toward_x + dy * toward_y)
    shade += rng.uniform(0, 0.35) * np.exp(-5 * ((dx - 0.4 * toward_x) ** 2 + (dy - 0.4 * toward_y) ** 2))
    shade *= 1 - rng.uniform(0, 0.4) * np.clip(1 + patch.distance / (0.1 * radius + 0.5), 0, 1)
    # Coverage of the pixel by the thing; above one half exactly where the label is the thing's.
    cover = np.clip(0.5 - patch.distance, 0, 1)[..., None]
    window += cover * (color * shade[..., None] - window)


def _surface(rng: np.random.Generator, patch: _Patch) -> Array:
    """Share of the second colour over a thing, [rows, columns] in [0, 1]: a pattern not tied to the class."""
    rows, columns = patch.distance.shape
    angle = rng.uniform(0, 2 * math.pi)
    cosine, sine = math.cos(angle), math.sin(angle)
    dy, dx = patch.y - patch.thing.y, patch.x - patch.thing.x
    u, v = dx * cosine + dy * sine, dy * cosine - dx * sine
    period = max(3.5, patch.thing.radius * rng.uniform(0.3, 0.6))
    strength = rng.uniform(0.35, 0.8)
    kind = int(rng.integers(6))
    if kind == 0:
        pattern = np.zeros_like(u)
    elif kind == 1:
        pattern = _smooth_noise(rng, rows, columns, 1.5)
    elif kind == 2:
        pattern = _smooth_noise(rng, rows, columns, period)
    elif kind == 3:
        pattern = np.clip(0.5 + u / period, 0, 1)
    elif kind == 4:
        dots = np.cos(u * (2 * math.pi / period)) + np.cos(v * (2 * math.pi / period))
        pattern = np.clip(2 * dots - 1, 0, 1)
    else:
        pattern = np.clip(0.5 + 2 * np.sin(u * (math.pi / period)) * np.sin(v * (math.pi / period)), 0, 1)
    return strength * pattern


# --- the finished picture ----------------------------------------------------------------------------------


def _segments(
    grounds: NDArray[np.intp], owner: NDArray[np.intp], class_ids: list[int]
) -> tuple[NDArray[np.int32], list[SegmentInfo]]:
    """Number the things in view and the grounds in view from 1, things first."""
    infos = [SegmentInfo(k + 1, class_id, True) for k, class_id in enumerate(class_ids)]
    segments = (owner + 1).astype(np.int32)
    bare = owner < 0
    for stuff in np.unique(grounds[bare]).tolist():
        infos.append(SegmentInfo(len(infos) + 1, len(THING_CLASSES) + stuff, False))
        segments[bare & (grounds == stuff)] = infos[-1].id
    return segments, infos


def _expose(rng: np.random.Generator, canvas: Array, light: float) -> NDArray[np.uint8]:
    """Uneven light over the scene, then the sensor's noise and rounding: uint8 [H, W, 3]."""
    height, width = canvas.shape[:2]
    y, x = _pixel_grid(0, height, 0, width)
    slope = (x / width - 0.5) * math.cos(light) + (y / height - 0.5) * math.sin(light)
    gain = rng.uniform(0.85, 1.15) * (1 + rng.uniform(0, 0.4) * slope)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(0.008, 0.03)
    pixels = (canvas * gain[..., None] + noise) * 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
