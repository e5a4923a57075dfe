"""Every score against a slow, loop-written version of its definition."""

import itertools
import math

import numpy as np
import pytest

from smtc.errors import UserError
from smtc.evaluation import metrics


def blobs(rng, frames=4, size=(41, 57)):
    """Bool masks of a few random discs, `[frames,h,w]`."""
    y, x = np.mgrid[: size[0], : size[1]]
    masks = np.zeros((frames, *size), bool)
    for mask in masks:
        for _ in range(rng.integers(1, 4)):
            cy, cx, r = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(3, 14)
            mask |= (y - cy) ** 2 + (x - cx) ** 2 < r * r
    return masks


def label_maps(rng, size=(24, 30), regions=5):
    """A label map of `regions` Voronoi cells, `[h,w]`."""
    points = rng.uniform(0, 1, (regions, 2)) * size
    grid = np.stack(np.mgrid[: size[0], : size[1]], -1)
    return np.linalg.norm(grid[..., None, :] - points, axis=-1).argmin(-1)


def slow_j(predicted, true, void):
    both = either = 0
    for a, b, hidden in zip(predicted.flat, true.flat, void.flat, strict=True):
        if not hidden:
            both += a and b
            either += a or b
    return both / either if either else 1.0


def slow_boundary(mask):
    height, width = mask.shape
    points = set()
    for y, x in itertools.product(range(height), range(width)):
        for dy, dx in ((0, 1), (1, 0), (1, 1)):
            v, u = y + dy, x + dx
            if v < height and u < width and mask[v, u] != mask[y, x]:
                points.add((y, x))
    return points


def slow_f(predicted, true, void):
    found, wanted = slow_boundary(predicted & ~void), slow_boundary(true & ~void)
    radius = math.ceil(0.008 * math.sqrt(true.shape[0] ** 2 + true.shape[1] ** 2))

    def share(points, others):
        near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in points]
        return sum(near) / len(near)

    if not found and not wanted:
        return 1.0
    if not found or not wanted:
        return 0.0
    precision, recall = share(found, wanted), share(wanted, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def slow_ari(predicted, true):
    """From all pairs of pixels."""
    a, b = predicted.ravel(), true.ravel()
    same_a, same_b = a[:, None] == a, b[:, None] == b
    upper = np.triu_indices(len(a), 1)
    same_a, same_b = same_a[upper], same_b[upper]
    expected = same_a.sum() * same_b.sum() / len(same_a)
    greatest = (same_a.sum() + same_b.sum()) / 2
    return ((same_a & same_b).sum() - expected) / (greatest - expected)


def slow_miou(predicted, true, min_pixels=30):
    """Over every assignment of regions to objects."""
    regions = np.unique(predicted)
    objects = [k for k in np.unique(true) if k > 0 and (true == k).sum() >= min_pixels]
    iou = [[slow_j(predicted == r, true == k, true < 0) for k in objects] for r in regions]
    padded = [*range(len(regions)), *[None] * len(objects)]
    return max(
        sum(iou[r][k] for k, r in enumerate(chosen) if r is not None) / len(objects)
        for chosen in itertools.permutations(padded, len(objects))
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_void", [False, True])
def test_j_and_f_follow_their_definition(seed, with_void):
    rng = np.random.default_rng(seed)
    # 300 columns on the last run: a radius of 3, so that the disk differs from a square.
    size = (41, 57) if seed < 2 else (30, 300)
    predicted, true = blobs(rng, size=size), blobs(rng, size=size)
    predicted[0] = np.roll(true[0], 1, axis=1)
    void = blobs(rng, size=size) if with_void else None
    hidden = np.zeros_like(true) if void is None else void
    for fast, slow in (
        (metrics.region_similarity, slow_j),
        (metrics.boundary_f, slow_f),
    ):
        wanted = [slow(*frame) for frame in zip(predicted, true, hidden, strict=True)]
        assert fast(predicted, true, void) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("with_void", [False, True])
def test_pairs_of_masks_score_as_each_by_itself(with_void):
    rng = np.random.default_rng(5)
    predicted, true = blobs(rng, 35, (30, 140)), blobs(rng, 3, (30, 140))  # more than one part
    predicted[3] = true[1] = False
    predicted[34] = true[2]
    predicted[5] = True
    void = blobs(rng, 1, (30, 140))[0] if with_void else None
    hidden = np.zeros_like(true[0]) if void is None else void
    j, f = metrics.pair_scores(predicted, true, void)
    assert j.shape == f.shape == (35, 3)
    for row, column in itertools.product((0, 3, 5, 17, 32, 34), range(3)):
        frame = predicted[row], true[column], hidden
        assert j[row, column] == pytest.approx(slow_j(*frame), abs=1e-12)
        assert f[row, column] == pytest.approx(slow_f(*frame), abs=1e-12)
    nothing = metrics.pair_scores(predicted[:0], true, void)
    assert [scores.shape for scores in nothing] == [(0, 3), (0, 3)]


def test_boundary_is_on_the_north_west_side_and_ends_inside_the_image():
    mask = np.zeros((4, 5), bool)
    mask[2:, 3:] = True
    assert {tuple(p) for p in np.argwhere(metrics._boundary(mask))} == slow_boundary(mask)
    assert not metrics._boundary(np.ones((4, 5), bool)).any()


def test_boundary_disk_is_round():
    assert metrics._disk(2).tolist() == [
        [0, 0, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 0, 0],
    ]


def test_j_and_f_of_empty_and_distant_masks():
    empty, disc, other = (np.zeros((1, 40, 60), bool) for _ in range(3))
    disc[0, 5:15, 5:15] = True
    other[0, 25:35, 40:50] = True
    cases = [(empty, empty, 1, 1), (empty, disc, 0, 0), (disc, empty, 0, 0), (disc, other, 0, 0)]
    for predicted, true, j, f in cases:
        assert metrics.region_similarity(predicted, true).tolist() == [j]
        assert metrics.boundary_f(predicted, true).tolist() == [f]
    # Full masks have no boundary, and void may hide all there is.
    full = ~empty
    assert metrics.boundary_f(full, full).tolist() == [1]
    assert metrics.boundary_f(disc, empty, void=disc).tolist() == [1]
    assert metrics.region_similarity(disc, empty, void=disc).tolist() == [1]


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(UserError, match=r"of one shape, not \[2, 4, 4\] and \[2, 4, 5\]"):
        metrics.region_similarity(np.ones((2, 4, 4), bool), np.ones((2, 4, 5), bool))
    with pytest.raises(UserError, match="of one shape"):
        metrics.boundary_f(np.ones((4, 4), bool), np.ones((4, 4), bool))
    with pytest.raises(UserError, match="of one shape"):
        metrics.boundary_f(*[np.ones((1, 4, 4), bool)] * 2, np.ones((2, 4, 4), bool))


def test_statistics_of_few_frames():
    values = np.array([0.9, 0.8, np.nan, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    found = metrics.statistics(values)
    assert found["mean"] == pytest.approx(3.3 / 8)
    assert found["recall"] == pytest.approx(2 / 9)
    # 9 frames: edges at 0, 2, 4, 6, 8, shared by neighbouring bins.
    assert found["decay"] == pytest.approx(0.85 - 0.4 / 3)
    assert metrics.statistics(np.array([0.7])) == pytest.approx(
        {"mean": 0.7, "recall": 1, "decay": 0}
    )
    assert all(math.isnan(v) for v in metrics.statistics(np.array([])).values())


def test_decay_of_long_videos_is_right_unless_compatibility_is_asked_for():
    values = np.linspace(1, 0, 300)
    assert metrics.statistics(values)["decay"] == pytest.approx(0.75, abs=0.01)
    # Edges 0, 75, 150, 224, 299: the last wraps to 43, and the reference's last bin is empty.
    assert math.isnan(metrics.statistics(values, wrap_bins=True)["decay"])
    short = values[:200]
    assert metrics.statistics(short, wrap_bins=True) == metrics.statistics(short)


@pytest.mark.parametrize("seed", range(4))
def test_label_scores_follow_their_definition(seed):
    rng = np.random.default_rng(seed)
    predicted, true = label_maps(rng, regions=4 + seed % 3), label_maps(rng, regions=4)
    true[:2, :3] = 4  # an object too small to count
    assert metrics.adjusted_rand_index(predicted, true) == pytest.approx(slow_ari(predicted, true))
    inside = true > 0
    assert metrics.fg_ari(predicted, true) == pytest.approx(
        slow_ari(predicted[inside], true[inside])
    )
    assert metrics.matched_miou(predicted, true) == pytest.approx(slow_miou(predicted, true))


def test_ari_ignores_names_and_knows_degenerate_cases():
    rng = np.random.default_rng(0)
    true = label_maps(rng)
    assert metrics.adjusted_rand_index((true * 7 + 3) % 40, true) == 1
    one = np.zeros((300, 421), int)
    assert metrics.adjusted_rand_index(one, one + 3) == 1
    single = np.arange(12).reshape(3, 4)
    assert metrics.adjusted_rand_index(single, single[::-1]) == 1
    assert metrics.adjusted_rand_index(single, np.zeros((3, 4), int)) == 0
    assert metrics.adjusted_rand_index(one[:3, :4], single) == 0


def test_fg_ari_needs_two_objects():
    true = np.zeros((10, 10), int)
    assert math.isnan(metrics.fg_ari(true, true))
    true[2:5] = 7
    assert math.isnan(metrics.fg_ari(true, true))
    true[7:] = 2
    # The background is not looked at.
    assert metrics.fg_ari(np.where(true == 7, 1, 0), true) == 1


def test_one_region_is_matched_to_one_object_only():
    true = np.zeros((20, 20), int)
    true[:10, :10], true[:10, 10:] = 1, 2
    merged = (true > 0).astype(int)
    assert metrics.matched_miou(merged, true) == pytest.approx((0.5 + 0) / 2)
    assert metrics.matched_miou(true, true) == 1
    assert math.isnan(metrics.matched_miou(true, np.zeros_like(true)))
    assert metrics.matched_miou(true, (true == 2) * 3, min_pixels=100) == 1
    assert math.isnan(metrics.matched_miou(true, true, min_pixels=101))


def test_foreground_is_all_but_the_region_on_the_border():
    labels = np.full((10, 12), 3)
    labels[3:6, 3:9] = 1
    labels[0, :5] = 2
    assert metrics.border_label(labels) == 3
    true = np.zeros((10, 12), int)
    true[3:6, 3:9] = 4
    assert metrics.foreground_iou(labels, true) == pytest.approx(18 / 23)
    assert metrics.foreground_iou(true, true) == 1
    empty = np.zeros_like(true)
    assert metrics.foreground_iou(empty, empty) == 1
    assert metrics.foreground_iou(empty, true) == 0


@pytest.mark.parametrize("edge", [np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]])
def test_all_four_edges_are_border(edge):
    labels = np.ones((7, 7), int)
    ring = np.ones((7, 7), bool)
    ring[1:-1, 1:-1] = False
    labels[ring] = np.arange(24) % 8 + 2
    labels[edge] = 20
    assert metrics.border_label(labels) == 20


def test_border_of_a_video_and_ties():
    frames = np.zeros((2, 3, 3), int)
    frames[0] = 5
    frames[1, 0, 0] = 5
    assert metrics.border_label(frames) == 5
    assert metrics.border_label(np.array([[1, 1], [4, 4]])) == 1


def test_label_maps_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match=r"\[2, 3\] and \[3, 2\]"):
        metrics.adjusted_rand_index(np.zeros((2, 3), int), np.zeros((3, 2), int))
    with pytest.raises(UserError, match="negative"):
        metrics.adjusted_rand_index(np.full((2, 3), -1), np.zeros((2, 3), int))


def test_unsigned_maps_do_not_overflow():
    true = np.full((8, 8), 200, np.uint8)
    true[:4] = 100
    assert metrics.adjusted_rand_index(true, true) == 1
    assert metrics.contingency(true, true)[200, 200] == 32
