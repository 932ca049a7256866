"""Generated scenes: determinism, exact labels, and that colour alone does not give a class away."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_plugins.core import scenes

THINGS = len(scenes.THING_CLASSES)
CLASSES = len(scenes.CLASSES)


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
    return [scenes.make_scene(7, index, 96) for index in range(200)]


def same(a: scenes.Scene, b: scenes.Scene) -> bool:
    return np.array_equal(a.image, b.image) and np.array_equal(a.segments, b.segments) and a.infos == b.infos


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**40),
    index=st.integers(0, 10**6),
    height=st.integers(32, 160),
    width=st.integers(32, 160),
)
def test_labels_are_consistent_at_any_size(seed: int, index: int, height: int, width: int) -> None:
    scene = scenes.make_scene(seed, index, (height, width))
    assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
    assert scene.segments.shape == (height, width) and scene.segments.dtype == np.int32
    # Every pixel has a segment, every listed segment has pixels.
    assert np.unique(scene.segments).tolist() == [info.id for info in scene.infos]
    assert [info.id for info in scene.infos] == list(range(1, len(scene.infos) + 1))
    for info in scene.infos:
        assert info.isthing == (info.class_id < THINGS) and 0 <= info.class_id < CLASSES
        assert (scene.semantic()[scene.segments == info.id] == info.class_id).all()
        assert not info.isthing or (scene.segments == info.id).sum() >= 10
    stuff = [info.class_id for info in scene.infos if not info.isthing]
    assert len(set(stuff)) == len(stuff)
    assert same(scene, scenes.make_scene(seed, index, (height, width)))


def test_scene_does_not_depend_on_what_was_drawn_before() -> None:
    forwards = [scenes.make_scene(3, index) for index in range(4)]
    np.random.seed(1)
    backwards = [scenes.make_scene(3, index) for index in reversed(range(4))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_seed_and_index_both_matter() -> None:
    first = scenes.make_scene(0, 1)
    for other in (scenes.make_scene(0, 2), scenes.make_scene(1, 1), scenes.make_scene(1, 0)):
        assert not same(first, other)


def test_scenes_of_this_version_are_kept() -> None:
    """If this changes on purpose, raise scenes.VERSION: it tells old data from new."""
    drawn = [[info.class_id for info in scenes.make_scene(0, index).infos] for index in (1, 2, 3)]
    assert (scenes.VERSION, drawn) == (2, [[4, 6, 1, 8, 10, 11], [4, 2, 9, 10], [6, 5, 1, 4, 9, 10]])


def test_every_class_occurs_about_equally_often(many: list[scenes.Scene]) -> None:
    counts = np.bincount([info.class_id for scene in many for info in scene.infos], minlength=CLASSES)
    for group in (counts[:THINGS], counts[THINGS:]):
        assert group.min() > 0.6 * group.mean(), counts


def test_sizes_vary_and_things_occlude_each_other(many: list[scenes.Scene]) -> None:
    areas = np.array(
        [(s.segments == info.id).mean() for s in many for info in s.infos if info.isthing], dtype=float
    )
    assert (areas < 0.03).mean() > 0.2 and (areas > 0.08).mean() > 0.2 and np.quantile(areas, 0.98) < 0.25
    touching = 0
    for scene in many:
        thing = np.array([False, *(info.isthing for info in scene.infos)])
        a, b = scene.segments[:, :-1], scene.segments[:, 1:]
        touching += bool(((a != b) & thing[a] & thing[b]).any())
    assert touching > 0.3 * len(many)


def test_a_nearer_thing_takes_its_pixels_from_a_farther_one() -> None:
    far, near = (
        scenes._Patch(scenes._Thing(0, 32, x, 14, 0, (1.0, 0.0), np.zeros((2, 3), np.float32)), 64, 64)
        for x in (28.0, 40.0)
    )
    kept, owner = scenes._visible([far, near], 64, 64)
    assert kept == [far, near]
    y, x = np.mgrid[:64, :64] + 0.5
    in_far, in_near = ((y - 32) ** 2 + (x - c) ** 2 < (0.92 * 14) ** 2 for c in (28.0, 40.0))
    assert (in_far & in_near).any()
    np.testing.assert_array_equal(owner, np.where(in_near, 1, np.where(in_far, 0, -1)))


def test_hidden_things_are_dropped() -> None:
    colors = np.zeros((2, 3), np.float32)
    hidden = scenes._Patch(scenes._Thing(0, 32, 32, 5, 0, (1.0, 0.0), colors), 64, 64)
    cover = scenes._Patch(scenes._Thing(0, 32, 32, 14, 0, (1.0, 0.0), colors), 64, 64)
    kept, owner = scenes._visible([hidden, cover], 64, 64)
    assert kept == [cover] and set(np.unique(owner)) == {-1, 0}


@pytest.mark.parametrize("class_id", range(THINGS), ids=scenes.THING_CLASSES)
def test_shapes_differ_from_each_other(class_id: int) -> None:
    """Upright and at equal size, a shape overlaps every other one clearly less than itself."""
    y, x = scenes._pixel_grid(-64, 64, -64, 64)
    masks = [
        scenes._Thing(k, 0, 0, 40, 0, (0.5, 0.5), np.zeros((2, 3), np.float32)).distance(y, x) < 0
        for k in range(THINGS)
    ]
    own = masks[class_id]
    assert 0.1 * 40**2 < own.sum() < 4 * 40**2
    assert not (own[0].any() or own[-1].any() or own[:, 0].any() or own[:, -1].any())
    for k, other in enumerate(masks):
        assert k == class_id or (own & other).sum() / (own | other).sum() < 0.85


def test_drawing_stays_in_single_precision() -> None:
    """Twice the width would be half the speed, and other pictures under another NumPy."""
    rng = np.random.default_rng(0)
    canvas, _, palette = scenes._draw_grounds(rng, 40, 50)
    assert canvas.dtype == palette.dtype == np.float32
    y, x = scenes._pixel_grid(0, 40, 0, 50)
    for name, texture in scenes._TEXTURES.items():
        assert texture(rng, x + 0 * y, y + 0 * x, 8.0).dtype == np.float32, name
    colors = scenes._random_colors(rng, 2)
    for class_id, name in enumerate(scenes.THING_CLASSES):
        patch = scenes._Patch(scenes._Thing(class_id, 20, 20, 9, 0.3, (0.5, 0.5), colors), 40, 50)
        assert patch.distance.dtype == np.float32, name
        assert {scenes._surface(rng, patch).dtype for _ in range(20)} == {np.dtype(np.float32)}


def mean_iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    confusion = np.bincount(truth * CLASSES + predicted, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    inside = np.diag(confusion)
    return float((inside / np.maximum(confusion.sum(0) + confusion.sum(1) - inside, 1)).mean())


def colour_only_score(images: np.ndarray, truth: np.ndarray, balance: bool) -> float:
    """mIoU on the last 50 pictures of the best class per colour (16 levels a channel) in the others.

    images: uint8 [N, H, W, 3]. truth: int64 [N, H, W]. balance: let all classes weigh the same.
    """
    bins = (images.astype(np.int64) // 16) @ [256, 16, 1]
    table = np.zeros((16**3, CLASSES))
    np.add.at(table, (bins[:-50].ravel(), truth[:-50].ravel()), 1)
    if balance:
        table /= table.sum(0)
    return mean_iou(truth[-50:].ravel(), table.argmax(1)[bins[-50:]].ravel())


@pytest.mark.parametrize("balance", [False, True])
def test_colour_alone_does_not_give_the_class_away(many: list[scenes.Scene], balance: bool) -> None:
    truth = np.stack([scene.semantic() for scene in many]).astype(np.int64)
    assert colour_only_score(np.stack([scene.image for scene in many]), truth, balance) < 0.12
    # The measure would notice: pictures painted in their classes' colours.
    assert colour_only_score(np.array(scenes.COLORS, np.uint8)[truth], truth, balance) > 0.99


def test_borders_are_where_the_labels_change() -> None:
    """Pixels inside one segment differ less from their neighbour than pixels on both sides of a border."""
    inner, across = [], []
    for index in range(30):
        scene = scenes.make_scene(11, index)
        step = np.abs(np.diff(scene.image.astype(float), axis=1)).sum(-1)
        border = scene.segments[:, :-1] != scene.segments[:, 1:]
        inner.append(step[~border].mean())
        across.append(step[border].mean())
    assert np.mean(across) > 1.5 * np.mean(inner)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 31), "at least 32"),
        ((0, 0, (64, 8)), "at least 32"),
        ((-1, 0), "negative"),
        ((0, -1), "negative"),
    ],
)
def test_impossible_requests_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes.make_scene(*arguments)


def test_classes_have_distinct_names_and_colors() -> None:
    assert len(set(scenes.CLASSES)) == len(scenes.COLORS) == len(set(scenes.COLORS)) == CLASSES


def test_import_is_light() -> None:
    code = "import sys, jepa_plugins.core.scenes; print(sorted({'torch', 'PIL', 'timm'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
