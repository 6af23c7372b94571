"""Stars: targets from maps of ids, their loss, and objects from scores and rays."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import label, points_in_poly
from skimage.morphology import convex_hull_image

from pointformer.annotations import Category, Segment
from pointformer.data import Annotation
from pointformer.metrics import average_precision
from pointformer.segmentation.tiling import windows_of
from pointformer.tasks.instance import InstanceStars
from pointformer.tasks.stars import ray_directions, star_targets, stars_to_objects

TASK = InstanceStars([Category(1, "nucleus")])


def ellipses(shape, rows):
    """Map of ids of ellipses (y, x, radius, stretch, angle); later ones leave earlier ones be."""
    y, x = np.indices(shape)
    ids = np.zeros(shape, np.int32)
    for number, (cy, cx, radius, stretch, angle) in enumerate(rows, 1):
        along = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
        across = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
        inside = (along / stretch) ** 2 + (across * stretch) ** 2 <= radius**2
        ids[inside & (ids == 0)] = number
    return ids


def output_of(ids, rays=32, kinds=1, classes=None):
    """What a head would say that has learned everything: (K + R, h, w)."""
    target = star_targets(ids, rays)
    lengths = np.full((rays, target.ids.size), 0.1, np.float32)
    lengths[:, target.cells] = target.rays.T
    scores = np.zeros((kinds, *target.ids.shape), np.float32)
    kind = np.zeros_like(target.ids) if classes is None else np.array([0, *classes])[target.ids]
    np.put_along_axis(scores, kind[None], target.scores[None], 0)
    logits = torch.from_numpy(scores).logit(1e-4)
    return torch.cat([logits, torch.from_numpy(lengths).log().view(rays, *target.ids.shape)])


def found_in(ids, **options):
    (found,) = TASK.decode([output_of(ids, **options)], [ids.shape])
    return found


@example(ellipses((30, 34), [(14, 16, 12, 1.1, 0.5), (3, 30, 5, 1, 0)]), 12)
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 11), st.integers(1, 11)),
                  elements=st.integers(0, 3)), st.sampled_from([4, 8, 12]))  # fmt: skip
def test_targets_equal_their_definition(ids, rays):
    target = star_targets(ids, rays)
    height, width = (-(-side // 2) for side in ids.shape)
    assert target.ids.shape == target.scores.shape == target.weights.shape == (height, width)
    padded = np.pad(ids, ((1, 2), (1, 2)))
    outline = {
        (y, x)
        for y, x in np.argwhere(padded != 0).tolist()
        if (padded[[y - 1, y + 1, y, y], [x, x, x - 1, x + 1]] != padded[y, x]).any()
    }
    depths = np.zeros(padded.shape)
    for y, x in np.argwhere(padded != 0).tolist():
        depths[y, x] = 1 + min(math.dist((y, x), point) for point in outline)
    for row, column in np.ndindex(height, width):
        here = (slice(1 + 2 * row, 3 + 2 * row), slice(1 + 2 * column, 3 + 2 * column))
        owner = target.ids[row, column]
        assert (owner != 0) == (padded[here] != 0).any()
        deepest = depths[here].max()
        assert owner in padded[here][np.isclose(depths[here], deepest)]
        same = target.ids == owner
        expected = 0
        if owner:
            others = [
                depths[1 + 2 * r : 3 + 2 * r, 1 + 2 * c : 3 + 2 * c].max()
                for r, c in np.argwhere(same).tolist()
            ]
            expected = deepest / max(others)
            assert target.weights[row, column] == pytest.approx(max(1, 64 / same.sum()) ** 0.5)
        else:
            assert target.weights[row, column] == 1
        assert target.scores[row, column] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_array_equal(target.cells, np.flatnonzero(target.scores >= 0.2))
    cosines, sines = ray_directions(rays)
    steps = np.arange(0.01, 20, 0.02)
    for cell, lengths in zip(target.cells.tolist(), target.rays, strict=True):
        row, column = divmod(cell, width)
        y = np.rint(2 * row + 1.5 + np.outer(sines, steps)).astype(int)
        x = np.rint(2 * column + 1.5 + np.outer(cosines, steps)).astype(int)
        beyond = (y < 0) | (x < 0) | (y >= padded.shape[0]) | (x >= padded.shape[1])
        at = padded[y.clip(0, padded.shape[0] - 1), x.clip(0, padded.shape[1] - 1)]
        leaves = (beyond | (at != target.ids[row, column])).argmax(1) * 0.02
        # What lies between two samples, half a pixel apart, may be passed over.
        assert (lengths >= np.minimum(leaves, 0.25) - 1e-3).all()
        assert (lengths >= leaves - 0.27).all()


@given(st.integers(0, 2**32 - 1), st.integers(40, 90), st.integers(40, 90))
def test_ellipses_come_back(seed, height, width):
    """Those that touch, at the border, and down to one pixel, with the loss that was measured."""
    rng = np.random.default_rng(seed)
    rows = [
        (*rng.uniform(0, (height, width)), rng.uniform(0.7, 14), rng.uniform(0.8, 1.3),
         rng.uniform(0, math.pi))
        for _ in range(12)
    ]  # fmt: skip
    ids = ellipses((height, width), rows)
    # A rest behind another may be in pieces; here each piece is an object.
    ids = label(ids, connectivity=1).astype(np.int32)
    areas = np.bincount(ids.ravel())
    shown = TASK.shown(found_in(ids)).ids
    whole = [n for n in range(1, len(areas)) if areas[n] >= 30 and _convex(ids == n)]
    for n in whole:
        inside = np.bincount(shown[ids == n], minlength=shown.max() + 1)
        match = inside[1:].argmax() + 1 if len(inside) > 1 else 0
        overlap = inside[match] / ((shown == match).sum() + areas[n] - inside[match])
        assert match, n
        assert overlap >= 0.7, (n, areas[n], overlap)


def _convex(mask):
    """Where a neighbor's bite is deeper, not all of the object can be seen from its middle."""
    return mask.sum() >= 0.96 * convex_hull_image(mask).sum()


def test_disks_that_touch_and_tiny_ones():
    rows = [(14, 14, 8, 1, 0), (14, 31, 8, 1, 0), (40, 12, 2, 1, 0), (42, 34, 10, 1, 0),
            (31, 50, 5, 1, 0), (0, 58, 4, 1, 0), (63, 3, 6, 1, 0)]  # fmt: skip
    ids = ellipses((64, 64), rows)
    ids[55, 20], ids[57:59, 50], ids[50:53, 55:58] = 8, 9, 10
    found = found_in(ids)
    assert len(found) == 10
    result = average_precision([(TASK.shown(found).ids, ids)])
    assert result.at(0.5) == 1
    assert result.at(0.75) >= 0.8
    assert (found.scores[:-1] >= found.scores[1:]).all()
    assert (found.scores >= 0.99).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (5, 5), (2, 2)])
def test_small_pictures_and_empty_ones(shape):
    full = np.ones(shape, np.int32)
    found = found_in(full)
    assert len(found) == 1
    assert TASK.shown(found).ids.shape == shape
    assert found.masks[0].area >= 0.5 * full.size
    assert len(found_in(0 * full)) == 0
    far = full.copy()
    far[0, 0] = 2**31 - 1  # any ids
    assert set(np.unique(star_targets(far, 8).ids)) <= {1, 2**31 - 1}


def test_a_hole_hides_what_is_behind():
    """Rays end there, as they do in the paper: the object is found, but not all of it."""
    ids = ellipses((48, 48), [(24, 24, 16, 1, 0)])
    ids[30:33, 24:27] = 0
    shown = TASK.shown(found_in(ids)).ids
    covered = np.bincount(shown[ids == 1], minlength=2)
    assert covered[1:].max() >= 0.75 * (ids == 1).sum()


@pytest.mark.parametrize("tile", [48, 64])
def test_windows_join(tile):
    rng = np.random.default_rng(0)
    rows = [
        (y + rng.uniform(-3, 3), x + rng.uniform(-3, 3), rng.uniform(3, 8), 1.1, rng.uniform(0, 3))
        for y in range(10, 150, 20)
        for x in range(10, 190, 20)
    ]
    ids = ellipses((150, 190), rows)
    windows = windows_of(150, 190, tile, 24)
    assert len(windows) > 4
    parts = [found_in(ids[window.window]) for window in windows]
    joined = TASK.shown(TASK.join(ids.shape, windows, parts)).ids
    result = average_precision([(joined, ids)])
    assert result.at(0.5) == 1
    assert result.at(0.75) >= 0.95


def test_mirror_images_and_turns_change_the_order_of_rays():
    ids = ellipses((40, 52), [(14, 20, 9, 1.2, 0.5), (27, 36, 7, 1, 0), (5, 44, 3, 1, 0)])
    rays = 12
    mirror = np.arange(rays)[::-1] - rays // 2
    here, there = output_of(ids, rays)[1:], output_of(ids[:, ::-1], rays)[1:]
    torch.testing.assert_close(here.flip(2)[mirror % rays], there)
    turned = output_of(np.rot90(ids), rays)[1:]  # x becomes -y: angles a quarter less
    torch.testing.assert_close(torch.rot90(here, 1, (1, 2)).roll(-rays // 4, 0), turned)


def test_objects_in_pixels_of_the_picture():
    """Where the model saw the picture in another size, also of another shape."""
    ids = ellipses((60, 80), [(20, 20, 9, 1, 0), (38, 56, 14, 1.2, 1)])
    large = ids.repeat(3, 0).repeat(2, 1)
    (found,) = TASK.decode(output_of(ids)[None], [ids.shape], [large.shape])
    assert found.size == large.shape
    assert average_precision([(TASK.shown(found).ids, large)]).at(0.85) == 1


@given(st.data())
def test_objects_equal_their_definition(data):
    rows, columns = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = rng.uniform(0, 1, (2, rows, columns)).astype(np.float32)
    if rng.random() < 0.5:  # with equal ones
        scores = np.round(scores * 8) / 8
    scores[:, rng.random((rows, columns)) < rng.random()] = 0
    middle = rng.uniform(0.1, 8, (rows, columns))
    rays = (middle * rng.uniform(0.7, 1.3, (8, rows, columns))).astype(np.float32)
    size = tuple(rng.integers(1, 24, 2).tolist())
    scale = size[0] / (2 * rows), size[1] / (2 * columns)
    overlap = rng.choice([0.0, 0.3, 0.6])
    found = stars_to_objects(scores, rays, size, scale, overlap=overlap)

    cells = np.argsort(-scores.max(0).ravel(), kind="stable")
    cells = [n for n in cells.tolist() if scores.max(0).ravel()[n] >= 0.2]
    score = {n: scores.max(0).ravel()[n] for n in cells}
    grid = np.stack(np.indices(size), -1).reshape(-1, 2)
    inside, centers = {}, {}
    for n in cells:
        y, x = (
            (i + 0.5) * 2 * unit - 0.5 for i, unit in zip(divmod(n, columns), scale, strict=True)
        )
        centers[n] = tuple(
            min(max(round(v), 0), side - 1) for v, side in zip((y, x), size, strict=True)
        )
        cosines, sines = ray_directions(8)
        lengths = rays.reshape(8, -1)[:, n].astype(np.float64)
        corners = np.stack([y + lengths * sines * scale[0], x + lengths * cosines * scale[1]], 1)
        inside[n] = points_in_poly(grid, corners).reshape(size)

    def pixels(mask, n):
        if not mask.any():
            mask[centers[n]] = True
        return mask

    first, voters = np.full(size, -1), {}
    for n in cells:
        if first[centers[n]] >= 0:
            continue
        own = pixels(inside[n].copy(), n)
        if (first[own] >= 0).sum() <= overlap * own.sum():
            first[own & (first < 0)] = n
            voters[n] = [n]
    for n in cells:
        best = first[centers[n]]
        later = best >= 0 and n not in voters and cells.index(n) > cells.index(best)
        if later and score[n] >= score[best] / 2:
            voters[best].append(n)
    assert found.scores.tolist() == [score[n] for n in voters]
    assert found.classes.tolist() == [scores.reshape(2, -1)[:, n].argmax() for n in voters]
    for mask, (n, those) in zip(found.masks, voters.items(), strict=True):
        votes = sum(float(score[v]) * inside[v] for v in those)
        expected = pixels(votes > sum(float(score[v]) for v in those) / 2, n)
        np.testing.assert_array_equal(mask.dense(size), expected)


def test_many_votes_for_one_object():
    """Of more than 64 some."""
    ids = ellipses((120, 140), [(60, 70, 45, 1.1, 0.4)])
    found = found_in(ids)
    assert len(found) == 1
    expected = ids != 0
    shown = found.masks[0].dense(ids.shape)
    assert (shown & expected).sum() / (shown | expected).sum() >= 0.98
    # Of 150 every third has a vote.
    rank = np.arange(15 * 10).reshape(15, 10)
    scores = (0.9 - 0.001 * rank)[None]
    rays = np.where(rank % 3 == 0, 40.0, 2.0)[None].repeat(8, 0)
    (large,) = stars_to_objects(scores, rays, (30, 20)).masks
    assert large.area == 30 * 20


def test_the_best_of_a_place_wins():
    scores = np.full((1, 20, 20), 0.05, np.float32)
    rays = np.full((16, 20, 20), 6.0, np.float32)
    scores[0, 8, 8], scores[0, 9, 12], scores[0, 8, 9] = 0.6, 0.9, 0.7
    found = stars_to_objects(scores, rays, (40, 40))
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])  # 8, 8 lies in 8, 9
    assert len(stars_to_objects(scores, rays, (40, 40), overlap=0.1)) == 1
    again = stars_to_objects(scores, rays, (40, 40))
    for one, other in zip(found.masks, again.masks, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
    # What has next to no extent is still a pixel.
    scores[:], rays[:] = 0, 1e-9
    scores[0, 3, 3] = 1
    assert [m.area for m in stars_to_objects(scores, rays, (40, 40)).masks] == [1]


def test_from_which_score_and_up_to_which_overlap_there_is_an_object():
    scores, rays = np.zeros((1, 32, 36), np.float32), np.ones((16, 32, 36), np.float32)
    scores[0, 15, 12], scores[0, 15, 22] = 0.2, np.nextafter(np.float32(0.2), 0)
    assert stars_to_objects(scores, rays, (64, 72)).scores.tolist() == [np.float32(0.2)]
    shares = []
    for radius in range(3, 17):
        rays[:, :, :17], rays[:, :, 17:] = 19.8, radius
        alone = []
        for row, column, score in ((15, 12, 0.9), (15, 22, 0.8)):
            scores[:] = 0
            scores[0, row, column] = score
            alone += [*stars_to_objects(scores, rays, (64, 72)).dense()]
        scores[0, 15, 12] = 0.9
        assert not alone[0][30, 44]  # the middle of the second
        shares.append((alone[0] & alone[1]).sum() / alone[1].sum())
        found = stars_to_objects(scores, rays, (64, 72))
        assert len(found) == (2 if shares[-1] <= 0.4 else 1)
    assert min(shares) < 0.38
    assert 0.4 < max(shares) < 0.45


def test_rays_of_any_length_are_a_polygon_and_a_loss():
    """Those that a head says are powers, which may overflow."""
    scores = np.zeros((1, 4, 5), np.float32)
    scores[0, 2, 2] = 1
    for length in (1e6, 1e300, np.inf):
        (mask,) = stars_to_objects(scores, np.full((16, 4, 5), length), (8, 10)).masks
        assert mask.area == 80
    ids = ellipses((24, 24), [(12, 12, 9, 1, 0)])
    mean = np.log(star_targets(ids, 32).rays.mean(1))
    for power, extreme in ((1e3, 14 * math.log(2)), (-1e3, -6 * math.log(2))):
        output = torch.full((1, 33, 12, 12), power).requires_grad_()
        loss = TASK.loss(output, [annotated(ids)])["shape"]
        shares = star_targets(ids, 32)
        weights = (shares.scores * shares.weights).ravel()[shares.cells]
        expected = (np.abs(extreme - mean) * weights).sum() / max(64, weights.sum())
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        loss.backward()
        assert output.grad.isfinite().all()


def annotated(ids, classes=None, crowds=()):
    numbers = [n for n in np.unique(ids).tolist() if n]
    classes = classes or [0] * len(numbers)
    segments = tuple(
        Segment(n, kind, int((ids == n).sum()), n in crowds)
        for n, kind in zip(numbers, classes, strict=True)
    )
    return Annotation("cells", None, ids.shape, 0, ids=ids, segments=segments)


def test_loss_is_least_for_the_truth():
    ids = ellipses((40, 52), [(14, 20, 9, 1.2, 0.5), (27, 36, 7, 1, 0), (5, 44, 3, 1, 0)])
    truth = output_of(ids)[None]
    best = TASK.loss(truth, [annotated(ids)])
    assert best["shape"].item() == pytest.approx(0, abs=1e-5)
    g = torch.Generator().manual_seed(0)
    for change in (0.3, -0.3):
        other = TASK.loss(truth + change, [annotated(ids)])
        assert other["shape"].item() == pytest.approx(0.3, rel=1e-3)  # rays exp(0.3) as long
        assert other["score"] > best["score"]
    noise = truth + 0.5 * torch.randn(truth.shape, generator=g)
    noise.requires_grad_()
    terms = TASK.loss(noise, [annotated(ids)])
    assert terms["shape"] > best["shape"]
    sum(terms.values()).backward()
    assert noise.grad.isfinite().all()
    assert noise.grad.abs().sum() > 0
    empty = TASK.loss(noise, [annotated(0 * ids)])
    assert empty["shape"] == 0
    assert empty["score"] > 0


def test_loss_is_of_the_whole_batch():
    first = ellipses((40, 52), [(14, 20, 13, 1.2, 0.5), (27, 36, 9, 1, 0)])
    second = ellipses((31, 20), [(12, 9, 4, 1, 0)])
    g = torch.Generator().manual_seed(0)
    outputs = [torch.randn(33, 20, 26, generator=g), torch.randn(33, 16, 10, generator=g)]
    together = TASK.loss(outputs, [annotated(first), annotated(second)])
    alone = [TASK.loss([o], [annotated(i)]) for o, i in zip(outputs, (first, second), strict=True)]
    targets = [star_targets(ids, 32) for ids in (first, second)]
    shares = [float((t.scores * t.weights).ravel()[t.cells].sum()) for t in targets]
    assert min(shares) < 64 < max(shares)
    for name, term in together.items():
        sums = [terms[name].item() * max(s, 64) for terms, s in zip(alone, shares, strict=True)]
        assert term.item() == pytest.approx(sum(sums) / sum(shares), rel=1e-5), name
    target, p = targets[0], outputs[0][0].double().sigmoid().numpy()
    bits = -(target.scores * np.log(p) + (1 - target.scores) * np.log(1 - p))
    expected = ((target.scores - p) ** 2 * bits * target.weights).sum() / max(shares[0], 64)
    assert alone[0]["score"].item() == pytest.approx(expected, rel=1e-5)


def test_classes_and_crowds():
    """Each class has scores of its own, stuff is never found, and crowds teach nothing."""
    kinds = [Category(0, "tissue", False), Category(1, "cell"), Category(2, "nerve")]
    task = InstanceStars(kinds)
    ids = ellipses((48, 60), [(14, 20, 9, 1.2, 0.5), (27, 40, 7, 1, 0), (40, 10, 6, 1, 0)])
    truth = output_of(ids, kinds=3, classes=[1, 2, 0])
    (found,) = task.decode([truth], [ids.shape])
    assert sorted(found.classes.tolist()) == [1, 2]
    of_things = annotated(ids, [1, 2, 2], crowds=(3,))
    best = task.loss([truth], [of_things])
    wrong = task.loss([truth.roll(1, 0)], [of_things])
    assert wrong["score"] > best["score"] + 0.05
    other = truth.clone()
    crowd = torch.from_numpy(star_targets(ids, 32).ids == 3)
    other[:, crowd] = torch.randn(35, int(crowd.sum()), generator=torch.Generator().manual_seed(0))
    for name, term in task.loss([other], [of_things]).items():
        torch.testing.assert_close(term, best[name])
    assert task.loss([other], [annotated(ids, [1, 2, 2])])["score"] != best["score"]
    first = replace(of_things, segments=of_things.segments[::-1])  # the crowd
    for name, term in task.loss([truth], [first]).items():
        torch.testing.assert_close(term, best[name])
