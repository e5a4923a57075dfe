"""Object discovery: a model's masks, without any label, against a data set's."""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smtc.evaluation import metrics
from smtc.evaluation.datasets import EvaluationVideo, open_dataset
from smtc.evaluation.manifest import build_manifest
from smtc.folders import whole_folder
from smtc.inference import PRESETS, InferenceSettings, Prediction, predict, render, winners
from smtc.model import SMTC
from smtc.progress import track
from smtc.visualize import Sample, sample_sheet, save_picture
from smtc.weights import checkpoint_hash

Pixels = NDArray[np.uint8]
Labels = NDArray[np.integer]
FrameScores = dict[str, NDArray[np.float64]]
"""Scores of one video by name, float64 `[frames]`; NaN where a score is not defined."""
Row = dict[str, Any]

_SHOWN = 6
_FILES = ("results.json", "results.csv", "manifest.json", "sheet.png")


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


def _score_synthetic(prediction: Prediction, video: EvaluationVideo, true: Pixels) -> FrameScores:
    size, frames = true.shape[1:], video.annotated
    semantic = label_frames(prediction.semantic[frames], size)
    # Regions before any candidate is chosen, labelled n·P + p.
    instance = label_frames(prediction.instance[frames].flatten(1, 2), size)
    return score_video(semantic, true, instance)


def _score_davis(prediction: Prediction, video: EvaluationVideo, true: Pixels) -> FrameScores:
    size = true.shape[1:]
    found = [render(prediction, index, size, PRESETS["ours"]) for index in video.annotated]
    instances = np.stack([frame.mask for frame in found])
    return score_foreground(instances, np.stack([frame.semantic for frame in found]), true)


@dataclass(frozen=True)
class Protocol:
    """How a data set is scored and averaged."""

    score: Callable[[Prediction, EvaluationVideo, Pixels], FrameScores]
    """Of a video's prediction and its true ids `[A,h,w]`."""
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


def label_frames(masks: Tensor, size: tuple[int, int]) -> Pixels:
    """Label maps uint8 `[F,*size]`: the strongest of `[F,K,rows,columns]` after upsampling."""
    return np.stack([winners(frame, size) for frame in masks])


def evaluate_discovery(
    model: SMTC,
    dataset: str,
    root: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Score a model's semantic and instance masks on a data set, and write a folder of results.

    Args:
        model: an `SMTC`; moved to `device` when one is given.
        dataset: "synthetic" or "davis2016"; `root` is its folder.
        output: gets `results.json`, `results.csv` (a row a video), `manifest.json` and `sheet.png`
            at once, when all is done; an earlier result there is replaced.
        checkpoint: where the model came from, and `seed`, what it was drawn from: for the manifest
            only.
        batch: windows of four frames that the model sees at once.

    Returns what `results.json` holds: the data set's means by score, and `per_video`. Raises
    `UserError` for a data set that is not whole, a frame that cannot be read, or a folder that
    cannot be written.
    """
    root = Path(root)
    videos = open_dataset(dataset, root)
    protocol, settings = PROTOCOLS[dataset], PRESETS["ours"]
    if device is not None:
        model = model.to(device)
    with whole_folder(output, _FILES, writer="smtc evaluate discovery") as folder:
        shown = _spread(len(videos), _SHOWN)
        scores, samples = [], []
        for index, video in enumerate(track(videos, title=f"evaluate {dataset}", unit="video")):
            frames, truth = video.load()
            prediction = predict(model, frames, settings=settings, batch=batch)
            scores.append(protocol.score(prediction, video, truth))
            if index in shown:
                samples.append(_sample(video, frames, truth, prediction))
        source = (
            {"path": str(checkpoint), "sha256": checkpoint_hash(checkpoint)} if checkpoint else None
        )
        manifest = build_manifest(
            protocol=f"discovery {dataset}",
            switches=_switches(model, settings) | {"foreground": protocol.foreground},
            root=root,
            files=[path for video in videos for path in video.files],
            model=model,
            checkpoint=source,
            seed=seed,
        )
        results = write_json(folder / "results.json", _results(dataset, protocol, videos, scores))
        write_json(folder / "manifest.json", manifest)
        _write_csv(folder / "results.csv", results["per_video"])
        save_picture(folder / "sheet.png", sample_sheet(samples))
    return results


def _results(
    dataset: str,
    protocol: Protocol,
    videos: Sequence[EvaluationVideo],
    scores: Sequence[FrameScores],
) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "videos": len(videos),
        "frames": sum(len(video.annotated) for video in videos),
        **protocol.summarise(scores),
        "per_video": [
            {"video": video.name, "frames": len(video.annotated), **protocol.video(found)}
            for video, found in zip(videos, scores, strict=True)
        ],
    }


def model_row(model: SMTC, videos: Sequence[EvaluationVideo], name: str, *, batch: int = 8) -> Row:
    """A model's means under the synthetic protocol, as a row of a comparison table."""
    scores = []
    for video in track(videos, title=name, unit="video"):
        frames, truth = video.load()
        prediction = predict(model, frames, batch=batch)
        scores.append(_score_synthetic(prediction, video, truth))
    return {"model": name, **mean_row(scores)}


def _switches(model: SMTC, settings: InferenceSettings) -> dict[str, Any]:
    return {
        **dataclasses.asdict(settings),
        "size": list(settings.size or model.config.resolution),
        "iterations": settings.iterations or model.config.iterations,
        "frame_interpolation": "bilinear, no antialias, aspect ratio not kept",
        "mask_interpolation": "bilinear, align_corners=False",
        "regions": "argmax of the upsampled masks",
    }


def sample_maps(
    model: SMTC, videos: Sequence[EvaluationVideo], count: int = 4, *, batch: int = 8
) -> list[Sample]:
    """The middle frame of `count` of the videos, evenly spread, with the maps `segment` gives."""
    samples = []
    for index in _spread(len(videos), count):
        frames, truth = videos[index].load()
        samples.append(_sample(videos[index], frames, truth, predict(model, frames, batch=batch)))
    return samples


def _spread(total: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def _sample(
    video: EvaluationVideo, frames: Pixels, truth: Pixels, prediction: Prediction
) -> Sample:
    middle = len(truth) // 2
    position = video.annotated[middle]
    found = render(prediction, position, frames.shape[1:3], PRESETS["ours"])
    name = f"{video.name}, frame {position}"
    return Sample(
        name, frames[position], found.semantic, found.mask, truth[middle], prediction.background
    )


def write_json(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Write `values` as strict JSON, with null for NaN, and return what reading it back gives."""
    kept = _without_nan(values)
    path.write_text(json.dumps(kept, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return kept


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
