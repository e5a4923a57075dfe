"""How discovered objects are scored: each protocol's scores of a video and its averages.

A protocol scores what a method sees in a video (`Found`), whatever the method is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from smtc.evaluation import metrics
from smtc.inference import InferenceSettings, Prediction, render, winners

Pixels = NDArray[np.uint8]
Labels = NDArray[np.integer]
FrameScores = dict[str, NDArray[np.float64]]
"""Scores of one video by name, float64 `[frames]` (DAVIS-2017: `[objects, frames]`); NaN where a
score is not defined. `scores_to_json` and `scores_from_json` write and read them exactly."""


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


def found_in(
    prediction: Prediction,
    positions: Sequence[int],
    size: tuple[int, int],
    settings: InferenceSettings,
) -> Found:
    """What a model's prediction shows at `positions`, at the height and width `size`."""
    seen = [render(prediction, index, size, settings) for index in positions]
    frames = list(positions)
    return Found(
        semantic=np.stack([frame.semantic for frame in seen]),
        instances=np.stack([frame.mask for frame in seen]),
        regions=label_frames(prediction.instance[frames].flatten(1, 2), size),
    )


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
    Args: label maps `[F,h,w]`.
    """
    objects = np.asarray(true) > 0
    foregrounds = {
        "": np.asarray(instances) > 0,
        "border_": np.stack([metrics.foreground(labels) for labels in semantic]),
        "best_slot_": semantic == _best_slot(semantic, objects),
    }
    scores = {}
    for name, predicted in foregrounds.items():
        scores[name + "j"] = metrics.region_similarity(predicted, objects)
        scores[name + "f"] = metrics.boundary_f(predicted, objects)
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
    """Each score's mean over all frames of all videos where it is defined."""
    return {
        name: metrics.nan_mean(np.concatenate([scores[name] for scores in videos]))
        for name in videos[0]
    }


def davis_row(videos: Sequence[FrameScores]) -> dict[str, float]:
    """The two averages of DAVIS-2016.

    `<score>_frames`: the mean over all frames, the self-supervised line. `<score>_sequences`: the
    mean over sequences of the mean over their frames but the first and the last, the benchmark's.
    """
    pooled = {f"{name}_frames": value for name, value in mean_row(videos).items()}
    inner = [{name: metrics.nan_mean(v[1:-1]) for name, v in scores.items()} for scores in videos]
    return pooled | {
        f"{name}_sequences": metrics.nan_mean(np.array([scores[name] for scores in inner]))
        for name in videos[0]
    }


def _davis_video_row(scores: FrameScores) -> dict[str, float]:
    inner = metrics.statistics(scores["j"][1:-1])
    return davis_row([scores]) | {"j_recall": inner["recall"], "j_decay": inner["decay"]}


def _score_synthetic(found: Found, true: Pixels) -> FrameScores:
    return score_video(found.semantic, true, found.regions)


def _score_davis(found: Found, true: Pixels) -> FrameScores:
    return score_foreground(found.instances, found.semantic, true)


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


PROTOCOLS = {
    "synthetic": Protocol(
        _score_synthetic,
        mean_row,
        lambda scores: mean_row([scores]),
        "all but the semantic region with most border pixels",
    ),
    "davis2016": Protocol(_score_davis, davis_row, _davis_video_row, "union of valid instances"),
}
