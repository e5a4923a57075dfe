"""Scores of masks and label maps: DAVIS's J and F, rand indices, matched and foreground IoU.

Masks are bool `[frames,h,w]`; label maps are non-negative integers `[h,w]`, a true map's background
being 0. A score that is not defined for a frame is NaN and left out of means.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from smtc.errors import UserError

Masks = NDArray[np.bool_]
Labels = NDArray[np.integer]
Floats = NDArray[np.float64]


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
    found, wanted = _boundary(predicted), _boundary(true)
    n_found, n_wanted = np.count_nonzero(found), np.count_nonzero(wanted)
    if n_found == 0 or n_wanted == 0:
        return float(n_found == n_wanted)
    precision = np.count_nonzero(found & _near(wanted, disk)) / n_found
    recall = np.count_nonzero(wanted & _near(found, disk)) / n_wanted
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _near(points: Masks, disk: NDArray[np.uint8]) -> Masks:
    return np.asarray(cv2.dilate(points.astype(np.uint8), disk), bool)


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


def border_label(labels: Labels) -> int:
    """The label that holds most border pixels of `[h,w]`, or of all frames of `[frames,h,w]`.

    Ties go to the smallest label.
    """
    labels = np.asarray(labels)
    inner = np.zeros(labels.shape[-2:], bool)
    inner[1:-1, 1:-1] = True
    return int(np.bincount(labels[..., ~inner].ravel().astype(np.int64)).argmax())


def foreground(labels: Labels) -> Masks:
    """A guess without labels: all of a map `[h,w]` but the region that holds most border pixels."""
    return np.asarray(labels) != border_label(labels)


def foreground_iou(predicted: Labels, true: Labels) -> float:
    """IoU of `foreground(predicted)` with the union of the true objects; 1 when both are empty."""
    guess, objects = foreground(predicted), np.asarray(true) > 0
    return float(region_similarity(guess[None], objects[None])[0])
