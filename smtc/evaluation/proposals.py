"""DAVIS-2017 without supervision: proposals matched to the objects of a video, in two ways.

`per_sequence`: ids that persist, of which none overlap, matched once for the whole video: the
benchmark's own. `per_frame`: the masks of each frame, which may overlap, matched anew in each: what
the released code of SMTC reports. The second is far easier and never goes under the first's name.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from smtc.errors import UserError
from smtc.evaluation import metrics

Labels = NDArray[np.integer]
Masks = NDArray[np.bool_]
Floats = NDArray[np.float64]

WAYS = ("per_sequence", "per_frame")
MOST_PER_SEQUENCE = 20
MOST_PER_FRAME = 300
_VOID = 255


def score_proposals(
    instances: Labels, true: Labels, proposals: Sequence[Masks] | None = None
) -> dict[str, Floats]:
    """J and F of each object in each frame, by both ways of matching.

    Args:
        instances: ids `[F,h,w]` that persist through the video, 0 is background. When there are
            more than 20, those that cover the fewest pixels of the video are left out.
        true: ids `[F,h,w]`; 255 is void and counts nowhere. The objects are those of the first
            frame, as in the benchmark's code.
        proposals: for each frame masks `[K,h,w]`, of which the first 300 count; none: the ids that
            `instances` has there.

    Returns `per_sequence_j`, `per_sequence_f`, `per_frame_j` and `per_frame_f`, float64
    `[objects, frames]`. With too few proposals the objects left over get empty ones; what is left
    of too many is ignored. Matched once, an object counts in frames without it as well (1 where
    nothing is proposed there); matched per frame it does not (NaN). Raises `UserError` when the
    first frame has no object.
    """
    keys = np.unique(true[0])
    keys = keys[(keys > 0) & (keys != _VOID)]
    if not keys.size:
        raise UserError(
            "The video's first mask shows no object; use the masks of Annotations_unsupervised."
        )
    ids = _largest(instances, MOST_PER_SEQUENCE)
    all_are_tracked = proposals is None and len(ids) < MOST_PER_SEQUENCE

    def score(index: int) -> tuple[Floats, Floats]:
        void = true[index] == _VOID
        objects = true[index] == keys[:, None, None]
        tracked = _padded(instances[index] == ids[:, None, None], len(keys))
        pairs = shown = np.stack(metrics.pair_scores(tracked, objects, void))
        if not all_are_tracked:
            masks = _present(instances[index]) if proposals is None else proposals[index]
            masks = _padded(np.asarray(masks[:MOST_PER_FRAME], bool), len(keys))
            shown = np.stack(metrics.pair_scores(masks, objects, void))
        return pairs, _match_visible(shown, objects.any((1, 2)))

    # OpenCV and NumPy release the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scored = list(pool.map(score, range(len(true))))
    found = {}
    for name, values in zip("jf", _match_once(np.stack([s for s, _ in scored], -1)), strict=True):
        found[f"per_sequence_{name}"] = values
    for place, name in enumerate("jf"):
        found[f"per_frame_{name}"] = np.stack([shown[place] for _, shown in scored], -1)
    return found


def _present(labels: Labels) -> Masks:
    """A mask for each id but 0 of a frame."""
    ids = np.unique(labels)
    return labels == ids[ids > 0][:, None, None]


def _largest(instances: Labels, count: int) -> Labels:
    """The ids but 0 of a video, at most `count`: those of the most pixels."""
    pixels = np.bincount(instances.ravel())
    pixels[0] = 0
    order = np.argsort(-pixels, kind="stable")[:count]
    return np.sort(order[pixels[order] > 0]).astype(instances.dtype)


def _padded(masks: Masks, count: int) -> Masks:
    """At least `count` masks: empty ones are added."""
    spare = max(0, count - len(masks))
    return np.pad(masks, ((0, spare), (0, 0), (0, 0)))


def _match_once(pairs: Floats) -> Floats:
    """J and F `[2,K,M,F]` of all pairs to those `[2,M,F]` of the best matching for the video."""
    rows, columns = linear_sum_assignment(pairs.mean((0, 3)), maximize=True)
    return pairs[:, rows[np.argsort(columns)], np.sort(columns)]


def _match_visible(pairs: Floats, visible: Masks) -> Floats:
    """J and F `[2,K,M]` of a frame's pairs to those `[2,M]` of its best matching; NaN where an
    object is not visible.
    """
    scores = np.full((2, len(visible)), np.nan)
    rows, columns = linear_sum_assignment(pairs[:, :, visible].mean(0), maximize=True)
    scores[:, np.flatnonzero(visible)[columns]] = pairs[:, :, visible][:, rows, columns]
    return scores


def proposals_row(videos: Sequence[dict[str, Floats]]) -> dict[str, float]:
    """Means over the objects of all videos, for both ways of matching.

    `<way>_jf_mean` is the mean of the two means below; `<way>_j_mean`, `_recall` and `_decay`, and
    the same of `f`, are the benchmark's statistics of an object, of the frames where it counts.
    """
    row = {}
    for way in WAYS:
        each = {}
        for name in "jf":
            objects = [values for scores in videos for values in scores[f"{way}_{name}"]]
            kept = [metrics.statistics(values[~np.isnan(values)]) for values in objects]
            for key in ("mean", "recall", "decay"):
                value = metrics.nan_mean(np.array([one[key] for one in kept]))
                each[f"{way}_{name}_{key}"] = value
        row[f"{way}_jf_mean"] = (each[f"{way}_j_mean"] + each[f"{way}_f_mean"]) / 2
        row |= each
    return row
