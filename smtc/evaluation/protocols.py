"""How discovered objects are scored: each protocol's scores of a video and its averages.

A protocol scores what a method sees in a video (`Found`), whatever the method is.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from smtc.evaluation import metrics
from smtc.evaluation.proposals import (
    MOST_PER_FRAME,
    MOST_PER_SEQUENCE,
    proposals_row,
    score_proposals,
)
from smtc.inference import FrameSegmentation
from smtc.rendering import FrameMasks, winners

Pixels = NDArray[np.uint8]
Labels = NDArray[np.integer]
FrameScores = dict[str, NDArray[np.float64]]
"""Scores of one video by name, float64 `[frames]` (DAVIS-2017: `[objects, frames]`); NaN where a
score is not defined. `scores_to_json` and `scores_from_json` write and read them exactly."""

_RATES = {
    "identity_switch_rate": ("id_switches", "id_transitions"),
    "id_coverage": ("ids_matched", "ids_visible"),
}


@dataclass(frozen=True)
class Found:
    """What a method sees in the A annotated frames of a video; label maps uint8 `[A,h,w]`."""

    semantic: Pixels
    """Regions that divide the frame, the background among them."""
    instances: Pixels
    """Object ids that persist through the video; 0 is background."""
    regions: Pixels | None = None
    """Instance regions before any is chosen as an object, where the method has such."""
    proposals: Sequence[NDArray[np.bool_]] | None = None
    """For each frame its objects `[K,h,w]`, which may overlap; none: the ids of `instances`."""


def found_in(frames: Iterable[FrameSegmentation], positions: Sequence[int]) -> Found:
    """What a model sees at `positions` of a video, of which `frames` are all frames in order; only
    those at `positions` are kept. Proposals that may overlap are made as they are asked for.
    """
    wanted = set(positions)
    semantic, instances, regions, objects = [], [], [], []
    for index, frame in enumerate(itertools.islice(frames, max(wanted) + 1)):
        if index in wanted:
            semantic.append(frame.semantic)
            instances.append(frame.mask)
            regions.append(winners(frame.soft_instance, frame.found.size))
            if frame.found.threshold is not None:
                objects.append(frame.found)
    return Found(
        semantic=np.stack(semantic),
        instances=np.stack(instances),
        regions=np.stack(regions),
        proposals=_Proposals(objects) if objects else None,
    )


class _Proposals(Sequence[NDArray[np.bool_]]):
    """The objects of each frame, which would not fit into memory together."""

    def __init__(self, frames: Sequence[FrameMasks]) -> None:
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: Any) -> Any:
        return self._frames[index].proposals()


def label_frames(masks: Tensor, size: tuple[int, int]) -> Pixels:
    """Label maps uint8 `[F,*size]`: the strongest of `[F,K,rows,columns]` after upsampling."""
    return np.stack([winners(frame, size) for frame in masks])


def score_video(semantic: Labels, true: Labels, instance: Labels | None = None) -> FrameScores:
    """The scores of the synthetic protocol, frame by frame.

    Args: label maps `[F,h,w]`: the predicted semantic regions, the true instance ids (0
    background), and the predicted instance regions, whose scores are named `instance_ari` and
    `instance_miou`.
    """
    scores = {
        "ari": _per_frame(metrics.adjusted_rand_index, semantic, true),
        "fg_iou": _per_frame(metrics.foreground_iou, semantic, true),
        "miou": _per_frame(metrics.matched_miou, semantic, true),
        "fg_ari": _per_frame(metrics.fg_ari, semantic, true),
    }
    if instance is not None:
        scores["instance_ari"] = _per_frame(metrics.adjusted_rand_index, instance, true)
        scores["instance_miou"] = _per_frame(metrics.matched_miou, instance, true)
    return scores


def score_foreground(instances: Labels, semantic: Labels, true: Labels) -> FrameScores:
    """J and F of three foregrounds against the union of a video's objects, frame by frame.

    `j`, `f`: the union of the predicted instances (ids, 0 is background).
    `border_j`, `border_f`: all but the semantic region that holds most border pixels of the frame.
    `best_slot_j`, `best_slot_f`: the one region with the best mean J over the video, which only
    labels can tell.
    Args: label maps `[F,h,w]`. Where `true` holds ids of objects 255 is void, else the object.
    """
    true = np.asarray(true)
    ids = bool(((true > 0) & (true < 255)).any())
    void = true == 255 if ids else None
    objects = true > 0 if void is None else (true > 0) & ~void
    foregrounds = {
        "": np.asarray(instances) > 0,
        "border_": np.stack([metrics.foreground(labels) for labels in semantic]),
        "best_slot_": semantic == _best_slot(semantic, objects),
    }
    scores = {}
    for name, predicted in foregrounds.items():
        scores[name + "j"] = metrics.region_similarity(predicted, objects, void)
        scores[name + "f"] = metrics.boundary_f(predicted, objects, void)
    return scores


def _best_slot(semantic: Labels, objects: NDArray[np.bool_]) -> int:
    """The label with the greatest J, averaged over frames; J is 1 where both are empty."""
    summed = np.zeros(int(semantic.max()) + 1)
    for labels, mask in zip(semantic, objects, strict=True):
        inside = np.bincount(labels[mask], minlength=len(summed))
        union = np.bincount(labels.ravel(), minlength=len(summed)) + mask.sum() - inside
        summed += np.where(union > 0, inside / np.maximum(union, 1), 1)
    return int(summed.argmax())


def _per_frame(
    score: Callable[[Labels, Labels], float], predicted: Labels, true: Labels
) -> NDArray[np.float64]:
    return np.array([score(*frame) for frame in zip(predicted, true, strict=True)], np.float64)


def mean_row(videos: Sequence[FrameScores]) -> dict[str, float]:
    """Each score's mean over all frames of all videos where it is defined.

    Counts of `score_identity` give two rates instead, each a ratio of sums.
    """
    pooled = {name: np.concatenate([scores[name] for scores in videos]) for name in videos[0]}
    counts = {part for parts in _RATES.values() for part in parts}
    row = {name: metrics.nan_mean(pooled[name]) for name in pooled if name not in counts}
    rates = {
        name: pooled[part].sum() / pooled[whole].sum() if pooled[whole].any() else math.nan
        for name, (part, whole) in _RATES.items()
        if part in pooled
    }
    return row | {name: float(value) for name, value in rates.items()}


def score_identity(instances: Labels, true: Labels) -> FrameScores:
    """How well ids persist, as counts by frame (`metrics.identity_switches`): `id_switches`,
    `id_transitions`, `ids_matched`, `ids_visible`.

    `mean_row` makes `identity_switch_rate` of the first two and `id_coverage` of the last two.
    """
    counts = metrics.identity_switches(instances, true)
    return {
        "id_switches": counts.switches,
        "id_transitions": counts.transitions,
        "ids_matched": counts.matched,
        "ids_visible": counts.visible,
    }


def davis_row(videos: Sequence[FrameScores]) -> dict[str, float]:
    """The two averages of DAVIS-2016.

    `<score>_frames`: the mean over all frames, the self-supervised line. `<score>_sequences`: the
    mean over sequences of the mean over their frames but the first and the last, the benchmark's.
    """
    return _two_means(videos, slice(1, -1))


def foreground_row(videos: Sequence[FrameScores]) -> dict[str, float]:
    """As `davis_row`, for the data sets of which every annotated frame counts in both averages."""
    return _two_means(videos, slice(None))


def _two_means(videos: Sequence[FrameScores], kept: slice) -> dict[str, float]:
    pooled = {f"{name}_frames": value for name, value in mean_row(videos).items()}
    return pooled | {
        f"{name}_sequences": metrics.nan_mean(
            np.array([metrics.nan_mean(scores[name][kept]) for scores in videos])
        )
        for name in videos[0]
    }


def _davis_video_row(scores: FrameScores) -> dict[str, float]:
    inner = metrics.statistics(scores["j"][1:-1])
    return davis_row([scores]) | {"j_recall": inner["recall"], "j_decay": inner["decay"]}


def _foreground_video_row(scores: FrameScores) -> dict[str, float]:
    found = metrics.statistics(scores["j"])
    return foreground_row([scores]) | {"j_recall": found["recall"], "j_decay": found["decay"]}


def _proposals_video_row(scores: FrameScores) -> dict[str, float]:
    return {"objects": len(scores["per_sequence_j"])} | proposals_row([scores])


def _score_synthetic(found: Found, true: Pixels) -> FrameScores:
    identity = score_identity(found.instances, true)
    return identity | score_video(found.semantic, true, found.regions)


def _score_foreground(found: Found, true: Pixels) -> FrameScores:
    return score_foreground(found.instances, found.semantic, true)


def _score_proposals(found: Found, true: Pixels) -> FrameScores:
    return score_proposals(found.instances, true, found.proposals)


def scores_to_json(scores: FrameScores) -> dict[str, Any]:
    """Scores as lists that strict JSON holds exactly, null for NaN."""
    return {name: _without_nan(values.tolist()) for name, values in scores.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if math.isnan(value) else value


def scores_from_json(values: Mapping[str, Any]) -> FrameScores:
    """What `scores_to_json` was given, to the last bit."""
    return {name: np.array(kept, np.float64) for name, kept in values.items()}


@dataclass(frozen=True)
class Protocol:
    """How a data set is scored and averaged.

    The scores of one video are a dict of float64 arrays. A caller may keep them as JSON
    (`scores_to_json`, `scores_from_json`) and average them later to the same numbers.
    """

    score: Callable[[Found, Pixels], FrameScores]
    """Of what was found in a video and its true ids `[A,h,w]`."""
    summarise: Callable[[Sequence[FrameScores]], dict[str, float]]
    """Of all videos."""
    video: Callable[[FrameScores], dict[str, float]]
    """One video's row."""
    foreground: str
    """What counts as foreground, for the manifest."""


_UNION = "union of valid instances"

PROTOCOLS = {
    "synthetic": Protocol(
        _score_synthetic,
        mean_row,
        lambda scores: mean_row([scores]),
        "all but the semantic region with most border pixels",
    ),
    "davis2016": Protocol(_score_foreground, davis_row, _davis_video_row, _UNION),
    "davis2017-unsupervised": Protocol(
        _score_proposals,
        proposals_row,
        _proposals_video_row,
        f"per_sequence: the {MOST_PER_SEQUENCE} instance ids of the most pixels; "
        f"per_frame: each frame's instances, at most {MOST_PER_FRAME}",
    ),
    "segtrackv2": Protocol(_score_foreground, foreground_row, _foreground_video_row, _UNION),
    "fbms59": Protocol(_score_foreground, foreground_row, _foreground_video_row, _UNION),
}
