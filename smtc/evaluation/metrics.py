"""Scores of masks and label maps: DAVIS's J and F, rand indices, matched and foreground IoU, and
how well ids persist.

Masks are bool `[frames,h,w]`; label maps are non-negative integers `[h,w]`, a true map's background
being 0. A score that is not defined for a frame is NaN and left out of means.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from smtc.errors import UserError

Masks = NDArray[np.bool_]
Labels = NDArray[np.integer]
Floats = NDArray[np.float64]

_PART = 32


def region_similarity(predicted: Masks, true: Masks, void: Masks | None = None) -> Floats:
    """J of every frame: intersection over union outside `void`; 1 where both are empty.

    Args: bool `[frames,h,w]` each. Returns float64 `[frames]`. Raises `UserError` when shapes
    differ.
    Source: Perazzi et al., CVPR 2016.
    """
    predicted, true = _without_void(predicted, true, void)
    intersection = np.count_nonzero(predicted & true, axis=(1, 2))
    return _ratio(intersection, np.count_nonzero(predicted | true, axis=(1, 2)), empty=1.0)


def boundary_f(predicted: Masks, true: Masks, void: Masks | None = None) -> Floats:
    """F of every frame: harmonic mean of the boundaries' precision and recall.

    A boundary pixel is matched by one of the other mask within `ceil(0.008 · diagonal)` pixels.
    Args: bool `[frames,h,w]` each; `void` is set to 0 in both masks. Returns float64 `[frames]`.
    Raises `UserError` when shapes differ. Source: Perazzi et al., CVPR 2016.
    """
    predicted, true = _without_void(predicted, true, void)
    disk = _disk(math.ceil(0.008 * math.hypot(*true.shape[1:])))
    # OpenCV releases the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scores = pool.map(partial(_frame_f, disk=disk), predicted, true)
        return np.fromiter(scores, np.float64, len(true))


def _without_void(predicted: Masks, true: Masks, void: Masks | None) -> tuple[Masks, Masks]:
    shapes = {np.shape(masks) for masks in (predicted, true, void) if masks is not None}
    if len(shapes) != 1 or np.ndim(true) != 3:
        listed = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise UserError(f"Masks to compare must be [frames,h,w] and of one shape, not {listed}.")
    predicted, true = np.asarray(predicted, bool), np.asarray(true, bool)
    return (predicted, true) if void is None else (predicted & ~void, true & ~void)


def _ratio(part: NDArray[np.integer], whole: NDArray[np.integer], empty: float) -> Floats:
    return np.where(whole > 0, part / np.maximum(whole, 1), empty)


def _disk(radius: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def _frame_f(predicted: Masks, true: Masks, disk: NDArray[np.uint8]) -> float:
    return float(_pairs(predicted[None], true[None], disk)[1][0, 0])


def pair_scores(predicted: Masks, true: Masks, void: Masks | None = None) -> tuple[Floats, Floats]:
    """J and F of each of K masks with each of M others, all of one frame.

    Args: bool `[K,h,w]` and `[M,h,w]`, which may overlap; `void` `[h,w]` is set to 0 in all.
    Returns two float64 `[K,M]`: what `region_similarity` and `boundary_f` give for the pairs.
    """
    if void is not None:
        predicted, true = predicted & ~void, true & ~void
    disk = _disk(math.ceil(0.008 * math.hypot(*true.shape[1:])))
    # In parts, so that the boundaries of hundreds of masks need not be held at once.
    starts = range(0, max(1, len(predicted)), _PART)
    parts = [_pairs(predicted[start : start + _PART], true, disk) for start in starts]
    return np.concatenate([j for j, _ in parts]), np.concatenate([f for _, f in parts])


def _pairs(predicted: Masks, true: Masks, disk: NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """As `pair_scores`; each mask's boundary and what is near it are found once."""
    both = _overlaps(predicted, true)
    union = _sizes(predicted)[:, None] + _sizes(true) - both
    found = np.array([_boundary(mask) for mask in predicted]).reshape(predicted.shape)
    wanted = np.array([_boundary(mask) for mask in true])
    near_found = np.array([_near(edge, disk) for edge in found]).reshape(predicted.shape)
    near_wanted = np.array([_near(edge, disk) for edge in wanted])
    n_found, n_wanted = _sizes(found)[:, None], _sizes(wanted)
    precision = _ratio(_overlaps(found, near_wanted), n_found, empty=0.0)
    recall = _ratio(_overlaps(near_found, wanted), n_wanted, empty=0.0)
    f = 2 * precision * recall / np.where(precision + recall > 0, precision + recall, 1)
    f[(n_found == 0) & (n_wanted == 0)] = 1
    return _ratio(both, union, empty=1.0), f


def _sizes(masks: Masks) -> NDArray[np.int64]:
    """Pixels of each mask; one by one, which NumPy counts much faster than along an axis."""
    return np.array([np.count_nonzero(mask) for mask in masks], np.int64)


def _overlaps(first: Masks, second: Masks) -> NDArray[np.int64]:
    """Pixels `[K,M]` that each of `[K,h,w]` shares with each of `[M,h,w]`, which should be few."""
    flat = first.reshape(len(first), second[0].size)
    return np.stack([_sizes(flat[:, np.flatnonzero(mask)]) for mask in second], axis=1)


def _near(points: Masks, disk: NDArray[np.uint8]) -> Masks:
    """True within a disk of any point `[h,w]`; looks only around the points."""
    near, reach = np.zeros(points.shape, np.uint8), len(disk) // 2
    x, y, width, height = cv2.boundingRect(points.astype(np.uint8))
    if width:
        part = np.s_[max(0, y - reach) : y + height + reach, max(0, x - reach) : x + width + reach]
        near[part] = cv2.dilate(points[part].astype(np.uint8), disk)
    return near.view(bool)


def _boundary(mask: Masks) -> Masks:
    """True where a pixel of `[h,w]` differs from its east, south or south-east neighbour."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    east, south, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != east) | (mask != south) | (mask != diagonal)


def statistics(values: Floats, *, wrap_bins: bool = False) -> dict[str, float]:
    """DAVIS's mean, recall (share of frames above 0.5) and decay (first minus last of 4 bins).

    Args: `values` float `[frames]`, NaN where undefined. `wrap_bins` reproduces the reference
    implementation, whose bin edges are uint8 and so wrap beyond 255 frames.
    Returns the keys `mean`, `recall`, `decay`; all NaN for no frames.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        return {"mean": math.nan, "recall": math.nan, "decay": math.nan}
    # Neighbouring bins share their edge frame, as in the reference.
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(np.int64) - 1
    if wrap_bins:
        edges = edges % 256
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    return {
        "mean": nan_mean(values),
        "recall": float(np.mean(values > 0.5)),
        "decay": nan_mean(first) - nan_mean(last),
    }


def nan_mean(values: Floats) -> float:
    """The mean of the values that are not NaN; NaN when there are none."""
    values = np.asarray(values, np.float64)
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else math.nan


def contingency(predicted: Labels, true: Labels) -> NDArray[np.int64]:
    """Pixels `[regions, objects]` that hold each pair of labels, both counted from label 0.

    Raises `UserError` when the maps differ in shape or hold a negative label.
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape or predicted.size == 0:
        raise UserError(
            f"Label maps to compare must be of one shape, not {list(predicted.shape)} "
            f"and {list(true.shape)}."
        )
    if min(predicted.min(), true.min()) < 0:
        raise UserError("Label maps must not hold negative labels; number the regions from 0.")
    rows, columns = int(predicted.max()) + 1, int(true.max()) + 1
    pairs = predicted.ravel().astype(np.int64) * columns + true.ravel()
    return np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)


def adjusted_rand_index(predicted: Labels, true: Labels) -> float:
    """ARI over all pixels of two label maps: 1 for equal partitions, about 0 for chance.

    Source: Hubert and Arabie, 1985.
    """
    return _rand_index(contingency(predicted, true))


def fg_ari(predicted: Labels, true: Labels) -> float:
    """ARI over the pixels of objects (true label > 0); NaN when fewer than two are visible."""
    table = contingency(predicted, true)[:, 1:]
    return _rand_index(table) if np.count_nonzero(table.any(0)) >= 2 else math.nan


def _rand_index(table: NDArray[np.int64]) -> float:
    def pairs(counts: NDArray[np.int64]) -> float:
        return float((counts * (counts - 1) // 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * (columns / max(pairs(table.sum(keepdims=True)), 1.0))
    greatest = (rows + columns) / 2
    # Equal only when both maps are one cluster, or both all singletons: the same partition.
    return 1.0 if greatest == expected else (both - expected) / (greatest - expected)


def matched_miou(predicted: Labels, true: Labels, *, min_pixels: int = 30) -> float:
    """Mean over true objects of the IoU under the one-to-one matching with the greatest IoU sum.

    Every predicted region may be matched, the true background and objects under `min_pixels` are
    not; an unmatched object counts 0. NaN without objects.
    """
    table = contingency(predicted, true)
    union = table.sum(1, keepdims=True) + table.sum(0, keepdims=True) - table
    large = table.sum(0) >= min_pixels
    large[0] = False
    if not large.any():
        return math.nan
    iou = _ratio(table, union, empty=0.0)[:, large]
    return float(iou[linear_sum_assignment(iou, maximize=True)].sum() / iou.shape[1])


def border_counts(labels: Labels, minlength: int = 0) -> NDArray[np.int64]:
    """Border pixels of each label from 0, of `[h,w]` or of all frames of `[frames,h,w]`."""
    labels = np.asarray(labels)
    inner = np.zeros(labels.shape[-2:], bool)
    inner[1:-1, 1:-1] = True
    return np.bincount(labels[..., ~inner].ravel().astype(np.int64), minlength=minlength)


def border_label(labels: Labels) -> int:
    """The label that holds most border pixels of `[h,w]`, or of all frames of `[frames,h,w]`.

    Ties go to the smallest label.
    """
    return int(border_counts(labels).argmax())


def foreground(labels: Labels) -> Masks:
    """A guess without labels: all of a map `[h,w]` but the region that holds most border pixels."""
    return np.asarray(labels) != border_label(labels)


def foreground_iou(predicted: Labels, true: Labels) -> float:
    """IoU of `foreground(predicted)` with the union of the true objects; 1 when both are empty."""
    guess, objects = foreground(predicted), np.asarray(true) > 0
    return float(region_similarity(guess[None], objects[None])[0])


class IdentityCounts(NamedTuple):
    """How ids persist, frame by frame: float64 `[F]` each, so that rates are ratios of sums."""

    switches: Floats
    """Objects whose id is not the one they were last matched to."""
    transitions: Floats
    """Objects that are matched here and were before: those that could switch."""
    matched: Floats
    """Objects that are matched to any id."""
    visible: Floats
    """Objects that are large enough to be matched."""


def identity_switches(
    predicted: Labels, true: Labels, *, min_pixels: int = 30, min_iou: float = 0.3
) -> IdentityCounts:
    """How often the predicted id of an object changes in a video of label maps `[F,h,w]`.

    In every frame predicted ids but 0 are matched one to one to the true objects (label > 0) of at
    least `min_pixels`, with the greatest sum of IoUs among pairs of at least `min_iou`. An object
    whose id differs from the last that it was matched to, in whatever frame that was, counts one
    switch. The rate is the sum of switches over that of transitions, NaN without any transition;
    beside it stands the coverage, the sum of matched over that of visible objects (NaN without any
    object), because who matches nothing never switches.
    """
    counts = np.zeros((4, len(true)))
    last: dict[int, int] = {}
    for index, (labels, objects) in enumerate(zip(predicted, true, strict=True)):
        matches, visible = _match_ids(labels, objects, min_pixels, min_iou)
        again = [key for key in matches if key in last]
        switched = sum(matches[key] != last[key] for key in again)
        counts[:, index] = switched, len(again), len(matches), visible
        last |= matches
    return IdentityCounts(*counts)


def _match_ids(
    predicted: Labels, true: Labels, min_pixels: int, min_iou: float
) -> tuple[dict[int, int], int]:
    """The predicted id of each matched object of a frame, and how many could be matched."""
    table = contingency(predicted, true)
    iou = _ratio(table, table.sum(1, keepdims=True) + table.sum(0, keepdims=True) - table, 0.0)
    iou[0] = 0
    iou[iou < min_iou] = 0
    objects = np.flatnonzero(table.sum(0) >= min_pixels)
    objects = objects[objects > 0]
    rows, columns = linear_sum_assignment(iou[:, objects], maximize=True)
    pairs = zip(rows.tolist(), objects[columns].tolist(), strict=True)
    return {key: label for label, key in pairs if iou[label, key] > 0}, len(objects)
