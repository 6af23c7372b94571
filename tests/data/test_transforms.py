"""Transforms: pictures and what is annotated in them stay together."""

import colorsys
import math
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from skimage import measure

from pointformer.data import VOID, Annotation, Mask, Segment
from pointformer.data.transforms import (
    CenterCrop,
    Chain,
    ColorJitter,
    Mix,
    RandAugment,
    RandomCrop,
    RandomCurves,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    RandomTurn,
    Resize,
)

INSIDE = 200  # third channel of pictures; what lies beyond them is gray
STEP = 6  # first and second channel: row and column, times this
EXACT = [
    RandomCrop(12),
    RandomCrop((7, 30)),
    RandomCrop((33, 9), beyond="mirror"),
    RandomFlip(),
    RandomFlip(0.5, 0.5),
    RandomTurn(),
    CenterCrop((20, 11)),
    Chain((RandomCrop(24), RandomFlip(), RandomTurn())),
]
SCALED = [
    RandomCrop(16, scales=(0.4, 3.0), logarithmic=True),
    RandomCrop((20, 12), scales=(0.1, 2.0), measure="fit"),
    RandomCrop((10, 24), scales=(0.5, 2.0), measure="short", longest=40),
    RandomCrop(20, scales=(0.7, 1.6), beyond="mirror"),
    RandomResizedCrop(16),
    RandomResizedCrop((9, 31), areas=(0.3, 0.9), interpolation="bilinear"),
    Resize(18),
    Resize(30, longest=41),
    Resize((14, 25)),
]


def picture(height, width):
    """Each pixel says where it is."""
    image = np.full((height, width, 3), INSIDE, np.uint8)
    image[..., 0] = STEP * np.arange(height)[:, None]
    image[..., 1] = STEP * np.arange(width)
    return image


def annotated(kind, height, width, rng):
    """Void, crowds, overlaps, and segments without a pixel."""
    size = height, width
    base = Annotation("a", None, size, "a", label=int(rng.integers(-1, 5)))
    blocks = rng.integers(0, 7, (-(-height // 3), -(-width // 4)))
    coarse = np.repeat(np.repeat(blocks, 3, 0), 4, 1)[:height, :width].astype(np.int32)
    if kind == "label":
        return base
    if kind == "semantic":
        return replace(base, semantic=coarse - 1)
    if kind == "map":
        ids = coarse * 70001
        segments = [
            Segment(n * 70001, int(rng.integers(3)), np.sum(coarse == n), crowd=n == 2)
            for n in (1, 2, 3, 4, 9)
        ]
        return replace(base, ids=ids, segments=tuple(segments))
    segments = []
    for n in range(6):
        pixels = np.zeros(size, bool)
        top, left = rng.integers(height), rng.integers(width)
        pixels[top : top + rng.integers(0, 20), left : left + rng.integers(0, 20)] = True
        pixels &= rng.random(size) < 0.9
        category = VOID if n == 5 else n
        mask = Mask.of(pixels)
        segments.append(Segment(f"o{n}", category, mask.area, n in (3, 5), 1.0, mask))
    return replace(base, segments=tuple(segments))


KINDS = ["label", "semantic", "map", "objects"]


def scenes():
    return st.tuples(
        st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32)
    )


def layers(annotation):
    """(H, W) maps by name that show all that is annotated."""
    found = {}
    if annotation.semantic is not None:
        found["semantic"] = annotation.semantic
    if annotation.ids is not None:
        found["ids"] = annotation.ids
    for segment in annotation.segments:
        if segment.mask is not None:
            found[segment.id] = segment.mask.dense(annotation.size)
    return found


def mirrors(transform):
    return getattr(transform, "beyond", None) == "mirror"


def same(one, other):
    assert (one.name, one.label, one.size) == (other.name, other.label, other.size)
    assert one.segments == other.segments
    assert layers(one).keys() == layers(other).keys()
    for name, values in layers(one).items():
        np.testing.assert_array_equal(values, layers(other)[name])


@pytest.mark.parametrize("transform", EXACT, ids=repr)
@given(scenes())
def test_pixels_and_annotations_stay_together(transform, scene):
    kind, height, width, seed = scene
    rng = np.random.default_rng(seed)
    before = annotated(kind, height, width, rng)
    image, after = transform(picture(height, width), before, rng)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.shape == (*after.size, 3)
    inside = image[..., 2] == INSIDE
    rows, columns = image[..., 0] // STEP, image[..., 1] // STEP
    mirrored = mirrors(transform)
    assert inside.any()
    assert inside.all() or not mirrored
    old, new = layers(before), layers(after)
    for name, values in new.items():
        empty = VOID if name == "semantic" else 0
        assert (values[~inside] == empty).all()
        if name != "semantic" and mirrored:
            continue  # see the test of mirror images
        if name in old:
            np.testing.assert_array_equal(values[inside], old[name][rows[inside], columns[inside]])
    if not mirrored:  # nothing that can be seen was dropped
        gone = [old[name] for name in old.keys() - new.keys()]
        assert not any(values[rows[inside], columns[inside]].any() for values in gone)


@pytest.mark.parametrize("transform", SCALED, ids=repr)
@given(scenes())
def test_scaled_pictures_and_annotations_stay_together(transform, scene):
    """To a pixel, or as much as was averaged to one."""
    kind, height, width, seed = scene
    rng = np.random.default_rng(seed)
    before = annotated(kind, height, width, rng)
    image, after = transform(picture(height, width), before, rng)
    assert image.shape == (*after.size, 3)
    coordinates = image[..., :2].astype(float) / STEP
    inside = image[..., 2] == INSIDE
    slope = [np.abs(np.diff(coordinates[..., n], axis=n)).max(initial=0) for n in (0, 1)]
    for name, values in layers(after).items():
        if name != "semantic" and mirrors(transform):
            continue
        old = layers(before)[name]
        for row, column in np.argwhere(inside)[:: 1 + inside.sum() // 40]:
            place = [
                slice(max(0, int(at - reach - 1)), int(at + reach + 2))
                for at, reach in zip(coordinates[row, column], slope, strict=True)
            ]
            assert values[row, column] in old[tuple(place)]


@given(st.sampled_from(EXACT + SCALED), scenes())
def test_all_kinds_of_annotations_are_sampled_alike(transform, scene):
    """What is on top stays on top, crowds stay void."""
    kind, height, width, seed = scene
    before = annotated(kind, height, width, np.random.default_rng(seed))
    classes = Annotation("a", None, (height, width), "a", semantic=before.classes())
    image = picture(height, width)
    _, after = transform(image, before, np.random.default_rng(seed))
    _, painted = transform(image, classes, np.random.default_rng(seed))
    np.testing.assert_array_equal(after.classes(), painted.classes())


@given(st.sampled_from(EXACT + SCALED), scenes())
def test_segments_are_what_the_pixels_say(transform, scene):
    kind, height, width, seed = scene
    before = annotated(kind, height, width, np.random.default_rng(seed))
    image = picture(height, width)
    _, after = transform(image, before, np.random.default_rng(seed))
    known = {segment.id: segment for segment in before.segments}
    for segment, mask in zip(after.segments, after.masks(), strict=True):
        assert segment.area == mask.area
        assert mask.area or isinstance(transform, RandomFlip | RandomTurn)
        same_box = Mask.of(mask.dense(after.size))
        assert same_box.box == mask.box
        if segment.id in known:
            origin = known[segment.id]
            assert (segment.category, segment.crowd) == (origin.category, origin.crowd)
    ids = [segment.id for segment in after.segments]
    assert len(set(ids)) == len(ids)
    again_image, again = transform(image, before, np.random.default_rng(seed))
    same(again, after)
    np.testing.assert_array_equal(
        again_image, transform(image, before, np.random.default_rng(seed))[0]
    )
    same(before, annotated(kind, height, width, np.random.default_rng(seed)))  # not written to


def test_an_area_of_a_file_that_is_not_that_of_the_mask_is_shared_out():
    pixels = np.ones((8, 10), bool)
    segment = Segment(1, 0, 72.5, mask=Mask.of(pixels))
    before = Annotation("a", None, (8, 10), "a", segments=(segment,))
    rng = np.random.default_rng(0)
    _, after = RandomFlip(1.0)(picture(8, 10), before, rng)
    assert after.segments[0].area == 72.5
    _, after = CenterCrop(4)(picture(8, 10), before, rng)
    assert after.segments[0].area == 72.5 * 16 / 80


def test_turns_and_flips_are_all_drawn():
    image = picture(5, 7)
    nothing = Annotation("a", None, (5, 7), "a")
    chain = Chain((RandomFlip(0.5, 0.5), RandomTurn()))
    results = {
        chain(image, nothing, np.random.default_rng(seed))[0].tobytes() for seed in range(80)
    }
    assert len(results) == 8


def test_scales():
    """A scale of 1 means as the `measure` says, `longest` bounds it."""
    image, nothing = picture(20, 40), Annotation("a", None, (20, 40), "a")

    def extent(crop):
        image_, _ = crop(image, nothing, np.random.default_rng(0))
        inside = image_[..., 2] == INSIDE
        return inside.any(1).sum(), inside.any(0).sum()

    assert extent(RandomCrop(60)) == (20, 40)
    assert extent(RandomCrop(60, measure="fit")) == (30, 60)
    assert extent(RandomCrop(60, scales=(0.5, 0.5), measure="fit")) == (15, 30)
    assert extent(RandomCrop((40, 90), measure="short")) == (40, 80)
    assert extent(RandomCrop(80, measure="short", short=30)) == (30, 60)
    assert extent(RandomCrop(80, measure="short", longest=50)) == (25, 50)
    assert Resize(10)(image, nothing, np.random.default_rng(0))[1].size == (10, 20)
    assert Resize(10, longest=15)(image, nothing, np.random.default_rng(0))[1].size == (8, 15)
    rng = np.random.default_rng(1)
    crops = [RandomCrop(30, (0.1, 2.0), "fit")(image, nothing, rng)[0] for _ in range(50)]
    shares = [np.mean(crop[..., 2] == INSIDE) for crop in crops]
    assert min(shares) < 0.05
    assert max(shares) > 0.9


def test_scales_are_drawn_as_asked():
    """Choices at equal distances, with both ends; evenly, or evenly in the logarithm."""
    image, nothing = picture(40, 40), Annotation("a", None, (40, 40), "a")

    def sides(**options):
        crop = RandomCrop(64, (1 / 8, 1.0), "fit", **options)
        crops = [crop(image, nothing, np.random.default_rng(seed))[0] for seed in range(200)]
        return np.array([(crop[..., 2] == INSIDE).any(1).sum() for crop in crops])

    for options, expected in (
        ({"choices": 8}, range(8, 65, 8)),
        ({"choices": 4, "logarithmic": True}, (8, 16, 32, 64)),
    ):
        off = np.abs(sides(**options)[:, None] - np.array(expected))
        assert (off.min(1) <= 1).all()  # as windows are whole pixels
        assert set(off.argmin(1)) == set(range(len(expected)))
    assert 0.35 < np.mean(sides() < 36) < 0.65
    assert 0.35 < np.mean(sides(logarithmic=True) < 64 / 8**0.5) < 0.65


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "transform",
    [
        partial(RandomCrop, (20, 15), scales=(0.5, 0.5)),
        partial(RandomResizedCrop, (20, 15), areas=(1.0, 1.0), ratios=(0.75, 0.75)),
        partial(Resize, (20, 15)),
        partial(Resize, 15),
    ],
)
def test_pictures_are_resized_by_the_filter_that_is_asked_for(transform, interpolation):
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    expected = Image.fromarray(image).resize((15, 20), getattr(Image, interpolation.upper()))
    found, _ = transform(interpolation=interpolation)(
        image, Annotation("a", None, (40, 30), "a"), np.random.default_rng(0)
    )
    np.testing.assert_array_equal(found, expected)


def test_windows_lie_everywhere():
    """Of a larger picture any part, and a smaller one anywhere in them."""
    image, nothing = picture(40, 30), Annotation("a", None, (40, 30), "a")
    crops = [RandomCrop(20)(image, nothing, np.random.default_rng(n))[0] for n in range(300)]
    assert {int(crop[0, 0, 0]) // STEP for crop in crops} == set(range(21))
    assert {int(crop[0, 0, 1]) // STEP for crop in crops} == set(range(11))
    crops = [RandomCrop(50)(image, nothing, np.random.default_rng(n))[0] for n in range(300)]
    places = [np.argwhere(crop[..., 2] == INSIDE).min(0) for crop in crops]
    for axis, room in ((0, 10), (1, 20)):
        assert {int(place[axis]) for place in places} == set(range(room + 1))


def test_of_a_long_picture_the_largest_window_of_an_allowed_shape():
    """In the middle; so is a crop of it, rounded down."""
    nothing, rng = Annotation("a", None, (4, 40), "a"), np.random.default_rng(0)
    wide, _ = RandomResizedCrop((4, 5), areas=(1.0, 1.0))(picture(4, 40), nothing, rng)
    np.testing.assert_array_equal(wide, picture(4, 40)[:, 17:22])
    nothing = replace(nothing, size=(40, 4))
    tall, _ = RandomResizedCrop((5, 4), areas=(1.0, 1.0))(picture(40, 4), nothing, rng)
    np.testing.assert_array_equal(tall, picture(40, 4)[17:22])
    middle, _ = CenterCrop((7, 3))(picture(40, 4), nothing, rng)
    np.testing.assert_array_equal(middle, picture(40, 4)[16:23, :3])


@pytest.mark.parametrize("kind", ["map", "objects"])
def test_mirror_images_are_objects_of_their_own(kind):
    """Where a picture is continued by its mirror image, no object has two pieces, but crowds."""
    masks = np.zeros((4, 40, 40), bool)
    for mask, (rows, columns) in zip(
        masks,
        [((3, 9), (4, 12)), ((20, 30), (20, 26)), ((34, 40), (10, 20)), ((3, 9), (25, 31))],
        strict=True,
    ):
        mask[slice(*rows), slice(*columns)] = True
    numbers = [5, 9, 7, 8]
    segments = [
        Segment(n, 0, int(mask.sum()), n == 8, 1.0, Mask.of(mask) if kind == "objects" else None)
        for n, mask in zip(numbers, masks, strict=True)
    ]
    ids = (np.array(numbers)[:, None, None] * masks).sum(0).astype(np.uint8)
    before = Annotation(
        "a", None, (40, 40), "a", ids=ids if kind == "map" else None, segments=tuple(segments)
    )
    pieces = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        _, after = RandomCrop(96, beyond="mirror")(picture(40, 40), before, rng)
        assert len(after.segments) > 5
        for segment, mask in zip(after.segments, after.masks(), strict=True):
            found = measure.label(mask.pixels, connectivity=2).max()
            pieces += found if segment.crowd else 0
            assert segment.crowd or found == 1
        assert sum(segment.crowd for segment in after.segments) == 1
    assert pieces > 40


def test_curves_are_reproducible_varied_and_keep_gray_gray():
    gray = np.repeat(np.random.default_rng(0).integers(0, 256, (16, 16, 1), np.uint8), 3, 2)
    nothing = Annotation("a", None, (16, 16), "a")
    results = [RandomCurves()(gray, nothing, np.random.default_rng(seed))[0] for seed in range(30)]
    assert all((image[..., 0] == image[..., 2]).all() for image in results)
    assert len({image.tobytes() for image in results}) == 30
    again, _ = RandomCurves()(gray, nothing, np.random.default_rng(3))
    np.testing.assert_array_equal(results[3], again)
    darker = [np.corrcoef(gray.ravel(), image.ravel())[0, 1] < 0 for image in results]
    assert any(darker)
    assert not all(darker)


def curves_of(image, **options):
    """Of 300 seeds, with nothing but what `options` say."""
    nothing = Annotation("a", None, image.shape[:2], "a")
    transform = RandomCurves(**{"invert": 0, "gray": 0, "noise": 0, "hot": 0, **options})
    seeds = range(300)
    return np.stack([transform(image, nothing, np.random.default_rng(n))[0] for n in seeds])


def test_curves_are_as_strong_as_those_that_were_trained_with():
    """gain * level^gamma + shift: logarithms with standard deviations of 0.3 and 0.2, of 0.04, and
    in pictures with colors of 0.1 by channel."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    gray = curves_of(ramp).reshape(300, 256, 3)[..., 0] / 255
    shown = gray[(gray[:, 0] > 0) & (gray[:, -1] < 1)]  # not cut off
    shift, gain = shown[:, 0], shown[:, -1] - shown[:, 0]
    gamma = np.log((shown[:, 128] - shift) / gain) / np.log(128 / 255)
    assert len(shown) > 50
    assert 0.25 < np.log(gamma).std() < 0.35
    assert abs(np.log(gamma).mean()) < 0.1
    # Of a normal distribution the upper or lower half only: the median is 0.67 standard deviations.
    assert 0.02 < np.median(shift) < 0.035
    assert 0.1 < -np.median(np.log(gain)) < 0.2
    ramp[0, 0, 0] = 9  # a color
    colored = curves_of(ramp).reshape(300, 256, 3)[:, 100].astype(float)
    ratios = np.log(colored[:, 0] / colored[:, 2])[(colored < 255).all(1)]
    assert 0.11 < ratios.std() < 0.17


def test_curves_do_the_rest_now_and_then():
    """Negatives, gray pictures, and noise that is the same in all channels."""
    rng = np.random.default_rng(0)
    image = rng.integers(90, 160, (12, 16, 3), np.uint8)
    image[0, 0], image[0, 1] = 90, 160
    plain = curves_of(image)
    negative = curves_of(image, invert=0.3)
    assert 0.22 < np.mean(negative[:, 0, 0, 0] > negative[:, 0, 1, 0]) < 0.38
    assert not (plain[:, 0, 0, 0] > plain[:, 0, 1, 0]).any()
    gray = curves_of(image, gray=0.3)
    assert 0.22 < np.mean((gray == gray[..., :1]).all((1, 2, 3))) < 0.38
    noisy = curves_of(image, noise=0.3).astype(int) - plain
    inside = (plain > 50).all((1, 2, 3)) & (plain < 205).all((1, 2, 3))
    assert inside.sum() > 100
    spread = noisy[inside].std((1, 2, 3))
    assert 0.2 < np.mean(spread > 0) < 0.4
    assert 0.8 < spread[spread > 0].min() < 3 < 10 < spread.max() < 13
    assert (noisy[inside] == noisy[inside][..., :1]).all()


def test_curves_whiten_a_few_pixels_in_all_channels():
    """Of all sides alike, a hundredth in the mean, and only where `hot` says so."""
    image = np.full((60, 80, 3), 40, np.uint8)
    nothing = Annotation("a", None, (60, 80), "a")
    share = np.zeros((60, 80))
    for seed in range(200):
        hot, plain = (
            RandomCurves(invert=0, gray=0, noise=0, hot=p)(
                image, nothing, np.random.default_rng(seed)
            )[0]
            for p in (1.0, 0.0)
        )
        assert len(np.unique(plain)) == 1
        spots = (hot != plain).any(2)
        assert (hot[spots] == 255).all()
        assert spots.mean() < 0.026
        share += spots
    share /= 200
    assert 0.008 < share.mean() < 0.012
    assert (np.abs(share.reshape(2, 30, 2, 40).mean((1, 3)) - share.mean()) < 0.001).all()


def colored(height=24, width=32):
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    "transform",
    [ColorJitter(), RandAugment(), RandomErasing(0.5), RandomCurves(), ColorJitter(0, 0, 0, 0.5)],
    ids=repr,
)
@pytest.mark.parametrize("kind", KINDS)
def test_colors_change_and_annotations_stay(transform, kind):
    image = colored()
    kept = image.copy()
    before = annotated(kind, 24, 32, np.random.default_rng(0))
    results = set()
    for seed in range(40):
        changed, after = transform(image, before, np.random.default_rng(seed))
        again, _ = transform(image, before, np.random.default_rng(seed))
        np.testing.assert_array_equal(changed, again)
        assert after is before
        assert changed.dtype == np.uint8
        assert changed.shape == image.shape
        assert changed.flags.writeable
        assert changed.flags.c_contiguous
        results.add(changed.tobytes())
    np.testing.assert_array_equal(image, kept)
    assert len(results) > 5


def test_jitter_is_as_strong_as_it_says():
    image, nothing = colored(), Annotation("a", None, (24, 32), "a")

    def all_of(transform):
        return [transform(image, nothing, np.random.default_rng(n))[0] for n in range(60)]

    shifts = [
        (changed.astype(int) - image)[(image > 60) & (image < 190)]
        for changed in all_of(ColorJitter(0.2, 0, 0, 0, 1.0))
    ]
    assert all(len(np.unique(shift)) == 1 for shift in shifts)
    assert 40 < max(np.abs(shift[0]) for shift in shifts) <= 51
    assert min(shift[0] for shift in shifts) < -20
    factors = [changed[image == 100][0] / 100 for changed in all_of(ColorJitter(0, 0.5, 0, 0, 1.0))]
    assert 0.5 <= min(factors) < 0.7 < 1.3 < max(factors) <= 1.5
    same = all_of(ColorJitter(0, 0, 0, 0, 1.0)) + all_of(ColorJitter(probability=0.0))
    assert max(np.abs(changed.astype(int) - image).max() for changed in same) <= 4  # HSV's rounding
    gray = np.repeat(image[..., :1], 3, 2)
    changed, _ = ColorJitter()(gray, nothing, np.random.default_rng(1))
    assert (changed[..., 0] == changed[..., 2]).all()


def test_jitter_of_saturation_and_hue():
    image = np.full((4, 4, 3), (180, 120, 120), np.uint8)
    nothing = Annotation("a", None, (4, 4), "a")

    def of(transform):
        pixels = [transform(image, nothing, np.random.default_rng(n))[0][0, 0] for n in range(80)]
        return np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels])

    factors = of(ColorJitter(0, 0, 0.5, 0, 1.0))[:, 1] * 3
    assert 0.48 < factors.min() < 0.6
    assert 1.4 < factors.max() < 1.52
    turns = (of(ColorJitter(0, 0, 0, 0.1, 1.0))[:, 0] + 0.5) % 1 - 0.5
    assert -0.11 < turns.min() < -0.08
    assert 0.08 < turns.max() < 0.11


def test_contrast_comes_first_or_last():
    """What brightness adds is then multiplied, or not."""
    image = np.zeros((1, 3, 3), np.uint8) + np.array([0, 60, 120], np.uint8)[:, None]
    nothing = Annotation("a", None, (1, 3), "a")
    jitter = ColorJitter(0.2, 0.5, 0, 0, 1.0)
    changed = [jitter(image, nothing, np.random.default_rng(n))[0][0, :, 0] for n in range(300)]
    added, middle, high = np.array([c for c in changed if c[0] > 0 and c[-1] < 255]).T / 1.0
    contrast = (high - middle) / 60
    assert (added > 1.1 * 0.2 * 255).any()
    assert (added / contrast > 1.1 * 0.2 * 255).any()


def test_operations_are_pillows_with_the_strength_of_the_magnitude():
    """At 5 of 10, in both directions, half of: 30 degrees, a shear of 0.3, a move by 0.45, 110
    levels added to dark ones, all bits of 4, all levels of 256, and factors of 1.9 and 0.1."""
    y, x = np.mgrid[:40, :60]
    image = np.stack([4 * y + x, 200 - 2 * y - x, 60 + 2 * x], 2).astype(np.uint8)
    whole = Image.fromarray(image)
    expected = {
        ImageOps.autocontrast(whole).tobytes(),
        ImageOps.equalize(whole).tobytes(),
        (255 - image).tobytes(),
        (image & 0b11000000).tobytes(),
        np.where(image < 128, image, 255 - image).tobytes(),
        np.where(image < 128, image + 55, image).tobytes(),
    }
    for enhancer in ("Color", "Contrast", "Brightness", "Sharpness"):
        for factor in (1.45, 0.55):
            expected.add(getattr(ImageEnhance, enhancer)(whole).enhance(factor).tobytes())
    transform, label = RandAugment(1, 5.0, 0.0, 1.0), Annotation("a", None, (40, 60), "a", label=1)
    places = replace(label, semantic=np.zeros((40, 60), np.int32))
    seeds = [np.random.default_rng(n) for n in range(150)]
    assert {transform(image, places, rng)[0].tobytes() for rng in seeds} == expected

    down, right = y - 19.5, x - 29.5
    moved = []
    for sign in (1, -1):
        cos, sin = math.cos(math.radians(15)), sign * math.sin(math.radians(15))
        for below, beside in (
            (sin * right + cos * down, cos * right - sin * down),
            (down, right + sign * 0.15 * down),
            (down + sign * 0.15 * right, right),
            (down, right + sign * 0.225 * 60),
            (down + sign * 0.225 * 40, right),
        ):
            inside = (np.abs(below) < 19) & (np.abs(beside) < 29)
            places = below + 19.5, beside + 29.5
            channels = [ndimage.map_coordinates(image[..., n], places, order=1) for n in range(3)]
            moved.append((inside, np.stack(channels, 2).astype(int)))
    hits = set()
    for seed in range(150):
        found = transform(image, label, np.random.default_rng(seed))[0]
        if found.tobytes() not in expected:
            errors = [np.abs(found - wanted)[inside].max() for inside, wanted in moved]
            assert min(errors) <= 2
            hits.add(int(np.argmin(errors)))
    assert hits == set(range(10))


def test_operations_are_left_out_now_and_then():
    """Of one that always changes what it is given, so many as the probability says."""
    image = colored()
    label = Annotation("a", None, (24, 32), "a", label=1)
    same = [
        np.array_equal(RandAugment(1, 9, 0, 0.4)(image, label, np.random.default_rng(n))[0], image)
        for n in range(300)
    ]
    assert 0.5 < np.mean(same) < 0.75  # autocontrast changes nothing here


def test_pictures_are_moved_only_where_no_place_is_annotated():
    """Operations of colors leave an even picture even."""
    even = np.full((24, 32, 3), (90, 140, 30), np.uint8)
    transform = RandAugment(probability=1.0)
    moved = {}
    for kind in KINDS:
        annotation = annotated(kind, 24, 32, np.random.default_rng(0))
        pictures = [transform(even, annotation, np.random.default_rng(n))[0] for n in range(40)]
        moved[kind] = np.mean([len(np.unique(p.reshape(-1, 3), axis=0)) > 1 for p in pictures])
    assert moved.pop("label") > 0.3
    assert max(moved.values()) == 0


def test_operations_grow_with_the_magnitude_from_the_picture_as_it_is():
    smooth = np.full((64, 64, 3), 128, np.uint8)
    smooth[16:48, 16:48] += (np.arange(32)[:, None, None] + np.arange(32)[:, None]).astype(np.uint8)
    nothing = Annotation("a", None, (64, 64), "a", label=1)

    def change(magnitude):
        transform = RandAugment(1, magnitude, 0.0, 1.0)
        pictures = [transform(smooth, nothing, np.random.default_rng(n))[0] for n in range(150)]
        # Invert, equalize and autocontrast have no strength.
        return np.median([np.abs(picture.astype(int) - smooth).mean() for picture in pictures])

    assert change(0) < 1 < change(4) < change(9)


def test_erasing_takes_the_area_it_says():
    image, nothing = colored(60, 80), Annotation("a", None, (60, 80), "a", label=1)
    shares, ratios = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        erased, _ = RandomErasing(1.0, areas=(0.1, 0.3))(image, nothing, rng)
        changed = (erased != image).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert changed.sum() > 0.98 * box
        shares.append(box / 4800)
        ratios.append(np.log((columns[-1] - columns[0] + 1) / (rows[-1] - rows[0] + 1)))
        noise = erased[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float)
        assert abs(noise.mean() - 128) < 8
        assert 50 < noise.std() < 59  # 57, and what is beyond black and white cut off
    assert 0.08 < min(shares) < 0.13 < 0.27 < max(shares) < 0.32
    assert min(ratios) < -0.9
    assert max(ratios) > 0.9
    assert 0.35 < np.mean(np.array(ratios) > 0) < 0.65
    untouched, _ = RandomErasing(0.0)(image, nothing, np.random.default_rng(0))
    assert untouched is image


def test_ratios_are_widths_over_heights():
    image, nothing = colored(60, 80), Annotation("a", None, (60, 80), "a", label=1)
    for seed in range(20):
        transform = RandomErasing(1.0, areas=(0.1, 0.2), ratios=(2.0, 3.0))
        erased, _ = transform(image, nothing, np.random.default_rng(seed))
        changed = (erased != image).any(2)
        assert 1.8 < changed.any(0).sum() / changed.any(1).sum() < 3.3


@pytest.mark.parametrize("mix", [Mix(cutmix=0), Mix(mixup=0), Mix(), Mix(probability=0.5)], ids=str)
@given(st.integers(1, 7), st.integers(0, 2**32))
def test_the_share_says_what_is_of_which_picture(mix, batch, seed):
    images = torch.arange(1, batch + 1).float()[:, None, None, None].expand(-1, 3, 6, 8)
    mixed, partners, share = mix(images, np.random.default_rng(seed))
    assert sorted(partners.tolist()) == list(range(batch))
    torch.testing.assert_close(partners[partners], torch.arange(batch))
    assert 0 <= share <= 1
    expected = share * images + (1 - share) * images[partners]
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected.mean((1, 2, 3)))
    if mix.mixup == 0:
        assert torch.isin(mixed, images).all()
    again, _, other = mix(images, np.random.default_rng(seed))
    assert torch.equal(mixed, again)
    assert share == other


def test_parts_of_a_batch_are_mixed_as_the_whole():
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(8):
        whole, _, _ = Mix()(images, np.random.default_rng(seed))
        parts = [Mix()(part, np.random.default_rng(seed))[0] for part in images.chunk(2)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_shares_of_mixtures_are_drawn_from_a_beta_distribution():
    """Of parameters of 0.2 most are nearly one picture, of 5 hardly any; `switch` is the share of
    patches."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def extreme(strength):
        mix = Mix(mixup=strength, cutmix=0)
        shares = [mix(images, np.random.default_rng(n))[2] for n in range(300)]
        return np.mean([share < 0.1 or share > 0.9 for share in shares])

    assert 0.55 < extreme(0.2) < 0.75
    assert extreme(5.0) < 0.02
    mixed = [Mix(switch=0.9)(images, np.random.default_rng(n))[0] for n in range(200)]
    pasted = [((m == images) | (m == images.flip(0))).all().item() for m in mixed]
    assert 0.84 < np.mean(pasted) < 0.96


def test_all_ways_of_mixing_are_drawn():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    kinds, shares = [], []
    for seed in range(200):
        mixed, partners, share = Mix(probability=0.8)(images, np.random.default_rng(seed))
        pasted = ((mixed == images) | (mixed == images[partners])).all().item()
        kinds.append("none" if mixed is images else "cut" if pasted else "mixed")
        shares.append(share)
    assert {kind: kinds.count(kind) > 25 for kind in ("none", "cut", "mixed")} == dict.fromkeys(
        ("none", "cut", "mixed"), True
    )
    assert min(shares) < 0.1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: RandomCrop(8, scales=(2.0, 1.0)), r"scales: expected .* got \(2.0, 1.0\)"),
        (lambda: RandomCrop(0), "size: expected a positive integer, got 0"),
        (lambda: RandomCrop((8, 0)), "size: expected a positive integer, got 0"),
        (lambda: RandomCrop(8, longest=0), "longest: expected a positive integer, got 0"),
        (lambda: RandomResizedCrop(8, areas=(0, 1)), r"areas: expected .* got \(0, 1\)"),
        (lambda: RandomFlip(1.5), r"horizontal: expected a number in \[0, 1\], got 1.5"),
        (lambda: ColorJitter(contrast=2), r"contrast: expected a number in \[0, 1\], got 2"),
        (lambda: RandAugment(magnitude=11), r"magnitude: expected a number in \[0, 10\], got 11"),
        (lambda: RandAugment(operations=-1), "operations: expected an integer of at least 0"),
        (lambda: RandomErasing(ratios=(1,)), r"ratios: expected .* got \(1,\)"),
        (lambda: Mix(mixup=-1), "mixup: expected a number of at least 0, got -1"),
        (lambda: Mix(switch=float("nan")), r"switch: expected a number in \[0, 1\], got nan"),
    ],
)
def test_what_cannot_be_is_one_line(made, message):
    with pytest.raises(ValueError, match=message) as error:
        made()
    assert "\n" not in str(error.value)


def test_maps_are_sampled_at_the_middles_of_pixels():
    columns = np.tile(np.arange(9, dtype=np.int32), (3, 1))
    before = Annotation("a", None, (3, 9), "a", semantic=columns)
    _, after = Resize((1, 3))(picture(3, 9), before, np.random.default_rng(0))
    assert after.semantic.tolist() == [[1, 4, 7]]


def test_flips_are_those_that_are_asked_for():
    image, nothing = picture(5, 7), Annotation("a", None, (5, 7), "a")
    for flip, expected in (
        (RandomFlip(1.0, 0.0), image[:, ::-1]),
        (RandomFlip(0.0, 1.0), image[::-1]),
    ):
        found, _ = flip(image, nothing, np.random.default_rng(0))
        np.testing.assert_array_equal(found, expected)


def test_turns_are_no_mirror_images():
    image, nothing = picture(5, 7), Annotation("a", None, (5, 7), "a")
    turned = [RandomTurn()(image, nothing, np.random.default_rng(n))[0] for n in range(40)]
    assert {t.tobytes() for t in turned} == {np.rot90(image, n).tobytes() for n in range(4)}


def test_a_patch_has_the_area_of_its_share():
    """In the middle, where nothing of it is cut off."""
    images = torch.arange(2.0)[:, None, None, None].expand(-1, 3, 20, 40)
    rng = SimpleNamespace(beta=lambda *_: 0.75, integers=lambda side: side // 2, random=lambda: 0.0)
    mixed, _, share = Mix(mixup=0)(images, rng)
    assert share == 0.75
    assert mixed[0, 0].sum() == 10 * 20


def test_what_was_smaller_in_the_picture_is_on_top_in_crops_of_crops():
    pixels = np.zeros((2, 20, 20), bool)
    pixels[0, :, 10:] = pixels[1, 5:15, 5:15] = True
    masks = [Mask.of(some) for some in pixels]
    segments = tuple(Segment(n, n, mask.area, mask=mask) for n, mask in enumerate(masks))
    before = Annotation("a", None, (20, 20), "a", segments=segments)
    crops = Chain((CenterCrop(10), CenterCrop(4)))
    _, after = crops(picture(20, 20), before, np.random.default_rng(0))
    assert (after.classes() == 1).all()


def test_a_mirror_image_that_touches_itself_at_a_corner_is_one_object():
    ids = np.zeros((4, 4), np.int32)
    ids[1, 1] = ids[2, 2] = 1
    rng = SimpleNamespace(uniform=lambda *_: 1.0, integers=lambda *_, endpoint: -4)
    crop = RandomCrop(12, beyond="mirror")
    _, after = crop(picture(4, 4), Annotation.of_objects(ids), rng)
    assert [segment.area for segment in after.segments] == [2] * 9


def test_a_window_may_be_as_high_as_the_picture():
    transform = RandomResizedCrop(10, areas=(0.5, 0.5), ratios=(1.0, 1.0))
    image, nothing = picture(10, 20), Annotation("a", None, (10, 20), "a")
    found = [transform(image, nothing, np.random.default_rng(n))[0] for n in range(100)]
    assert {int(crop[0, 0, 1]) // STEP for crop in found} == set(range(11))


def test_the_magnitude_varies_by_the_spread():
    image, label = colored(), Annotation("a", None, (24, 32), "a", label=1)

    def kinds(spread):
        transform = RandAugment(1, 5.0, spread, 1.0)
        results = [transform(image, label, np.random.default_rng(n))[0] for n in range(100)]
        return len({result.tobytes() for result in results})

    assert kinds(0.0) <= 26 < 50 < kinds(1.0)


def test_defaults():
    """What recipes that say nothing else are trained with."""
    for transform, expected in (
        (RandomResizedCrop(8), (8, (0.08, 1.0), (3 / 4, 4 / 3), "bicubic")),
        (RandomFlip(), (0.5, 0.0)),
        (RandomCurves(), (0.15, 0.15, 0.2, 0.1)),
        (ColorJitter(), (32 / 255, 0.5, 0.5, 18 / 180, 0.5)),
        (RandAugment(), (2, 9.0, 0.5, 0.5)),
        (RandomErasing(), (0.25, (0.02, 1 / 3), (0.3, 1 / 0.3))),
        (Mix(), (0.8, 1.0, 1.0, 0.5)),
    ):
        assert tuple(asdict(transform).values()) == expected
