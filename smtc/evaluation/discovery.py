"""Object discovery: a model's masks, without any label, against a data set's."""

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from smtc.evaluation.datasets import EvaluationVideo, open_dataset
from smtc.evaluation.manifest import build_manifest
from smtc.evaluation.protocols import PROTOCOLS, FrameScores, Protocol, found_in, mean_row
from smtc.folders import whole_folder
from smtc.inference import PRESETS, InferenceSettings, Prediction, predict, render
from smtc.model import SMTC
from smtc.progress import track
from smtc.visualize import Sample, sample_sheet, save_picture
from smtc.weights import checkpoint_hash

Pixels = NDArray[np.uint8]
Row = dict[str, Any]

_SHOWN = 6
_FILES = ("results.json", "results.csv", "manifest.json", "sheet.png")


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
    protocol, settings = PROTOCOLS[dataset], PRESETS["default"]
    if device is not None:
        model = model.to(device)
    with whole_folder(output, _FILES, writer="smtc evaluate discovery") as folder:
        shown = _spread(len(videos), _SHOWN)
        scores, samples = [], []
        for index, video in enumerate(track(videos, title=f"evaluate {dataset}", unit="video")):
            frames, truth = video.load()
            prediction = predict(model, frames, settings=settings, batch=batch)
            found = found_in(prediction, video.annotated, truth.shape[1:], settings)
            scores.append(protocol.score(found, truth))
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
        found = found_in(prediction, video.annotated, truth.shape[1:], PRESETS["default"])
        scores.append(PROTOCOLS["synthetic"].score(found, truth))
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
    found = render(prediction, position, frames.shape[1:3], PRESETS["default"])
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
