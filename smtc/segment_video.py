"""`smtc segment`: a video in, a folder of masks, scores and an overlay out."""

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.film import film, film_size
from smtc.folders import whole_folder
from smtc.inference import (
    CHUNK,
    InferenceSettings,
    Segmenter,
    inference_settings,
    model_size,
    segment_frames,
)
from smtc.model import SMTC
from smtc.pipelines.frame_source import FrameSource, open_source
from smtc.pipelines.images import read_ids, write_ids
from smtc.progress import track
from smtc.rendering import MOST_IDS
from smtc.segment_progress import SegmentProgress, Told, progress_key
from smtc.viewer import open_viewer
from smtc.visualize import overlay

Pixels = NDArray[np.uint8]
Maps = Literal["instance", "semantic"]
Show = Callable[[Pixels, Pixels, Mapping[int, float]], None]
"""Shows a frame, its ids and their scores to whoever looks at the result."""

RATE = 10.0
"""Frames a second of the overlay where the video does not say."""
_HOLDS = ("masks", "scores.json", "overlay.mp4", "viewer.html")


@dataclass
class Summary:
    """What was found in a video."""

    frames: int = 0
    objects: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By id: `first` and `last` frame, `frames` in which it is seen, mean `score`."""

    def add(self, scores: dict[int, float]) -> None:
        """Count the next frame's scores."""
        for number, score in scores.items():
            seen = self.objects.setdefault(
                number, {"first": self.frames, "last": 0, "frames": 0, "score": 0.0}
            )
            mean = seen["score"] + (score - seen["score"]) / (seen["frames"] + 1)
            seen["score"] = round(mean, 6)
            seen["frames"] += 1
            seen["last"] = self.frames
        self.frames += 1


def segment_video(
    model: SMTC,
    source: str | Path | FrameSource,
    output: str | Path,
    *,
    preset: str | InferenceSettings = "default",
    maps: Maps = "instance",
    rate: float | None = None,
    viewer: bool = False,
    batch: int = 4,
) -> Summary:
    """Segment a video of any length, and write masks, scores and an overlay to `output`.

    `masks/<name>/00000.png` … are palette PNGs of the frames' size, `scores.json` has the scores of
    each frame's ids and what each id is seen in (of semantic maps each frame's background),
    `overlay.mp4` shows masks over frames.

    Args:
        source: a folder of JPEG or PNG frames, one such image, or a video file.
        output: a new or empty folder, or one with an earlier result for the same video, which is
            replaced when all is done.
        maps: "instance" (0 is background), or "semantic": the semantic slot of each pixel.
        rate: frames a second of the overlay; none: the video's own, or 10.
        viewer: also write `viewer.html`, one page to look at the result in a browser.

    A call that was killed or interrupted leaves what it did beside `output`, and the same call goes
    on there. Raises `UserError` where the video or `output` cannot be read or written, and as
    `segment`; then nothing half-written stays.
    """
    settings, semantic = inference_settings(preset), maps == "semantic"
    _check(model, settings, maps, rate)
    video = source if isinstance(source, FrameSource) else open_source(source)
    options = {"maps": maps, "batch": batch}
    progress = SegmentProgress(progress_key(model, video, settings, options))
    rate = rate or video.rate or RATE
    summary = Summary()
    with _result(output, video.name, progress) as folder, ExitStack() as stack:
        shows = [stack.enter_context(_overlay(folder / "overlay.mp4", rate))]
        if viewer:
            kind, first = ("semantic", 0) if semantic else ("object", 1)
            page = open_viewer(folder / "viewer.html", video.name, fps=rate, kind=kind, first=first)
            shows.append(stack.enter_context(page))
        work = _work(model, video, folder, settings, options, progress)
        bar = track(work, total=len(video), title=f"segment {video.name}", unit="frame")
        for picture, mask, told in bar:
            ids = _small_ids(mask, picture, told.background if semantic else None)
            # What has scores is no semantic slot but an object.
            scores = {} if semantic else told.scores
            for show in shows:
                show(picture, ids, scores)
            summary.add(scores)
        head = {"video": video.name, "maps": maps, "settings": _used(model, settings)}
        content = head | _told_of_maps(progress.told, None if semantic else summary)
        (folder / "scores.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        progress.close(folder)
    return summary


def _check(model: SMTC, settings: InferenceSettings, maps: Maps, rate: float | None) -> None:
    model_size(model, settings)
    if rate is not None and not 0 < rate <= 1000:
        raise UserError(f"fps is {rate}; give frames a second, more than 0 and at most 1000.")
    if maps == "semantic" and model.config.slots > MOST_IDS:
        raise UserError(
            f"{model.config.slots} semantic slots are more than the {MOST_IDS} of a map; "
            "write instance maps."
        )


def _used(model: SMTC, settings: InferenceSettings) -> dict[str, Any]:
    """The settings, with what the model decides."""
    iterations = settings.iterations or model.config.iterations
    decided = {"size": model_size(model, settings), "iterations": iterations}
    return dataclasses.asdict(settings) | decided


def _told_of_maps(told: Sequence[Told], summary: Summary | None) -> dict[str, Any]:
    """What `scores.json` says of objects, or without a `summary` of semantic maps."""
    if summary is None:
        return {"background": [frame.background for frame in told]}
    return {"objects": summary.objects, "frames": [frame.scores for frame in told]}


def _work(
    model: SMTC,
    video: FrameSource,
    folder: Path,
    settings: InferenceSettings,
    options: Mapping[str, Any],
    progress: SegmentProgress,
) -> Iterator[tuple[Pixels, Pixels, Told]]:
    """Of each frame the picture in the overlay's size, the mask and what is told of it.

    Masks are written; those that an earlier call wrote are read.
    """
    small: deque[Pixels] = deque()
    frames = _shrunk(video, small)
    done, before = progress.done, None
    for index, told in enumerate(progress.told[:done]):
        before = next(frames)
        yield small.popleft(), read_ids(_mask_path(folder, video.name, index)), told
    if done and done == len(video):
        return
    segmenter = Segmenter(settings)
    if done:
        segmenter.restore(progress.state)
    batch = options["batch"]
    found = segment_frames(
        model, frames, settings=settings, batch=batch, segmenter=segmenter, before=before
    )
    for index, frame in enumerate(found, start=done):
        mask = frame.semantic if options["maps"] == "semantic" else frame.mask
        write_ids(_mask_path(folder, video.name, index), mask)
        told = progress.add(frame.background, frame.scores)
        if (index + 1) % CHUNK == 0:
            progress.chunk_done(folder, segmenter.state())
        yield small.popleft(), mask, told


def _mask_path(folder: Path, name: str, index: int) -> Path:
    return folder / "masks" / name / f"{index:05d}.png"


@contextmanager
def _result(output: str | Path, name: str, progress: SegmentProgress) -> Iterator[Path]:
    """The folder that takes the place of `output`; refuses one with masks of another video."""
    with whole_folder(output, _HOLDS, writer="smtc segment", goes_on=progress.goes_on) as folder:
        others = sorted({path.name for path in Path(output, "masks").glob("*")} - {name})
        if others:
            raise UserError(
                f"{output} already holds masks of {others[0]!r}, not of {name!r}; "
                "choose another output folder."
            )
        (folder / "masks" / name).mkdir(parents=True, exist_ok=True)
        yield folder


def _shrunk(frames: Iterable[Pixels], small: deque[Pixels]) -> Iterator[Pixels]:
    """The same frames; each of them, in the overlay's size, is put into `small`."""
    for frame in frames:
        height, width = film_size(*frame.shape[:2])
        if frame.shape[:2] == (height, width):
            small.append(frame)
        else:
            shrunk = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
            small.append(np.asarray(shrunk, np.uint8))
        yield frame


def _small_ids(mask: Pixels, picture: Pixels, background: int | None) -> Pixels:
    """A mask in the size of `picture`; with a semantic `background`, that is 0 and others count
    from 1.
    """
    height, width = picture.shape[:2]
    ids = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    if background is None:
        return np.asarray(ids, np.uint8)
    return np.where(ids == background, 0, ids + 1).astype(np.uint8)


@contextmanager
def _overlay(path: Path, rate: float) -> Iterator[Show]:
    with film(path, rate) as add:
        yield lambda picture, ids, scores: add(overlay(picture, ids))
