"""From a video's frames to instance masks: the model in windows, candidates, masks, files."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smtc.errors import UserError
from smtc.evaluation.metrics import border_label
from smtc.folders import whole_folder
from smtc.model import SMTC
from smtc.pipelines.clips import find_videos
from smtc.pipelines.images import read_image, write_ids
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD, prepare_frames
from smtc.progress import track
from smtc.visualize import overlay

Pixels = NDArray[np.uint8]

WINDOW = 4
"""Frames the model sees together."""
OVERLAY_FPS = 10.0


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How frames are fed to the model and masks made of what it says."""

    size: tuple[int, int] | None = None
    """Height and width that frames are squashed to; none: the model's training resolution."""
    iterations: int | None = None
    """Slot-attention iterations; none: the model's own."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    similarity: float = 0.5
    """The least cosine between a candidate's instance slot and its semantic slot."""
    masks: Literal["argmax", "threshold"] = "argmax"
    """argmax: candidates and background compete for a pixel; threshold: each by itself."""
    threshold: float = 0.3
    """Of a min-max normalised mask (threshold), and of a semantic mask when its area is taken."""
    min_area: float = 0.0
    """The least share of the frame that a candidate's semantic covers (tau_1, Eq. 11); 0: none."""


PRESETS = {
    "default": InferenceSettings(),
    # The authors' multi-object script, with its Kinetics statistics.
    "official": InferenceSettings(
        size=(480, 800),
        iterations=5,
        mean=(0.43216, 0.394666, 0.37645),
        std=(0.22803, 0.22145, 0.216989),
        masks="threshold",
    ),
}


@dataclass(frozen=True)
class Prediction:
    """Soft masks of F frames on the grid of tokens; float32 on the CPU."""

    semantic: Tensor
    """`[F,N,rows,columns]`, sums to 1 over N."""
    instance: Tensor
    """`[F,N,P,rows,columns]`, sums to the semantic mask over P."""
    scores: Tensor
    """`[F,N,P]`: cosine of the semantic and the instance slot."""

    @cached_property
    def background(self) -> int:
        """The semantic slot that wins most tokens on the border, over all frames of the video."""
        return border_label(self.semantic.argmax(1).numpy())


@dataclass(frozen=True)
class FrameSegmentation:
    """One frame of a `Segmentation`."""

    mask: Pixels
    scores: dict[int, float]
    semantic: Pixels


@dataclass(frozen=True)
class Segmentation:
    """The objects of a video; iterating gives a `FrameSegmentation` a frame."""

    masks: Pixels
    """Instance ids `[F,h,w]`, 0 is background. Instance slot p of semantic n has id n·P + p + 1 in
    every frame: the slots' starts are shared by all frames, so an id follows its object to first
    order only.
    """
    scores: list[dict[int, float]]
    """For each frame the score of every id seen in it."""
    semantic: Pixels
    """The semantic slot that wins each pixel, `[F,h,w]`."""

    def __iter__(self) -> Iterator[FrameSegmentation]:
        for frame in zip(self.masks, self.scores, self.semantic, strict=True):
            yield FrameSegmentation(*frame)


def segment(
    model: SMTC,
    frames: Pixels | Sequence[Pixels],
    *,
    preset: str | InferenceSettings = "default",
    batch: int = 1,
) -> Segmentation:
    """Find the objects of a video.

    Args:
        model: an `SMTC`, on any device; it runs in eval mode and without gradients.
        frames: RGB uint8 `[F,h,w,3]`, or F images `[h,w,3]` of one size.
        preset: "default", "official" (the authors' multi-object script) or settings of one's own.
        batch: windows of four frames that the model sees at once.

    Raises:
        UserError: for no frames, frames that are not RGB uint8 of one size, an unknown preset, a
            batch below 1, or a model with more instance slots than a mask file has ids.
    """
    settings = _settings(preset)
    _check_frames(frames)
    prediction = predict(model, frames, settings=settings, batch=batch)
    size = frames[0].shape[:2]
    found = [render(prediction, index, size, settings) for index in range(len(frames))]
    return Segmentation(
        masks=np.stack([frame.mask for frame in found]),
        scores=[frame.scores for frame in found],
        semantic=np.stack([frame.semantic for frame in found]),
    )


def _settings(preset: str | InferenceSettings) -> InferenceSettings:
    if isinstance(preset, InferenceSettings):
        return preset
    if preset not in PRESETS:
        raise UserError(
            f"There is no inference preset {preset!r}; choose from {', '.join(PRESETS)}."
        )
    return PRESETS[preset]


def _check_frames(frames: Any) -> None:
    array = isinstance(frames, np.ndarray) and frames.ndim > 0
    if not array and (not isinstance(frames, Sequence) or isinstance(frames, str | bytes)):
        raise UserError(
            f"The frames are a {type(frames).__name__}; give an array [F,h,w,3] or a list."
        )
    if len(frames) == 0:
        raise UserError("There are no frames to segment.")
    for index, frame in enumerate(frames):
        if not isinstance(frame, np.ndarray):
            raise UserError(
                f"Frame {index} is a {type(frame).__name__}; frames must be NumPy arrays [h,w,3]."
            )
        rgb = frame.ndim == 3 and frame.shape[2] == 3 and frame.size > 0
        if not rgb or frame.dtype != np.uint8:
            raise UserError(
                f"Frame {index} is {frame.dtype} {list(frame.shape)}; "
                "frames must be RGB uint8 [h,w,3], of one pixel at least."
            )
        if frame.shape != frames[0].shape:
            raise UserError(
                f"Frame {index} is {list(frame.shape)} and frame 0 {list(frames[0].shape)}; "
                "frames of a video must be of one size."
            )


def predict(
    model: SMTC,
    frames: Iterable[Pixels],
    *,
    settings: InferenceSettings = PRESETS["default"],
    batch: int = 1,
) -> Prediction:
    """Run the model over windows of four consecutive frames.

    The last window is filled up with the video's last frame. `frames` (RGB uint8 `[h,w,3]`) may be
    a generator: only one batch of windows is held at a time. Raises `UserError` for no frames and
    for a `batch` below 1.
    """
    if not isinstance(batch, int) or batch < 1:
        raise UserError(f"batch is {batch}; give a whole number of windows, 1 or more.")
    iterator = iter(frames)
    parts = []
    with evaluating(model):
        while chunk := list(islice(iterator, WINDOW * batch)):
            parts.append(_predict_chunk(model, chunk, settings))
    if not parts:
        raise UserError("There are no frames to segment.")
    return Prediction(*(torch.cat(field) for field in zip(*parts, strict=True)))


@contextmanager
def evaluating(model: SMTC) -> Iterator[None]:
    """Eval mode and no gradients inside the block; the model's modes are restored after it."""
    # Module by module: a frozen part of a model in training may be in eval mode already.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _predict_chunk(
    model: SMTC, chunk: list[Pixels], settings: InferenceSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `Prediction` for the frames of one batch of windows."""
    count = len(chunk)
    padded = chunk + chunk[-1:] * (-count % WINDOW)
    size = settings.size or model.config.resolution
    inputs = prepare_frames(padded, size, mean=settings.mean, std=settings.std)
    clips = inputs.unflatten(0, (-1, WINDOW)).to(next(model.parameters()).device)
    output = model(clips, iterations=settings.iterations)

    def per_frame(values: Tensor) -> Tensor:
        return values.flatten(0, 1)[:count].float().cpu()

    semantic = per_frame(output.semantic_logits).softmax(1)  # [F,N,L]
    instance = semantic[:, :, None] * per_frame(output.instance_logits).softmax(2)  # [F,N,P,L]
    scores = F.cosine_similarity(
        per_frame(output.semantic_slots)[:, :, None], per_frame(output.instance_slots), dim=-1
    )
    return semantic.unflatten(-1, output.grid), instance.unflatten(-1, output.grid), scores


def render(
    prediction: Prediction, index: int, size: tuple[int, int], settings: InferenceSettings
) -> FrameSegmentation:
    """The full-size masks of frame `index`, whose height and width are `size`.

    With `masks="argmax"`, every pixel goes to the strongest of all candidates (score and area large
    enough) and of the background, which is all instance masks of the semantic slot that holds most
    of the video's border; masks are upsampled bilinearly. With "threshold", as in the authors'
    script, a candidate's mask is upsampled to the nearest, stretched to [0, 1] and thresholded;
    candidates are painted by rising score.
    """
    semantic, instance = prediction.semantic[index], prediction.instance[index]
    scores = prediction.scores[index]
    if scores.numel() > 255:
        raise UserError(
            f"{scores.numel()} instance slots are more than the 255 ids of a mask; "
            "use a model with fewer slots."
        )
    covered = (semantic > settings.threshold).float().mean((1, 2))  # [N]
    candidates = (scores >= settings.similarity) & (covered >= settings.min_area)[:, None]
    if settings.masks == "argmax":
        mask = _compete(instance, candidates, prediction.background, size)
    else:
        mask = _paint(instance, candidates, scores, settings.threshold, size)
    seen = np.unique(mask[mask > 0]).tolist()
    score_of = {k: round(float(scores.flatten()[k - 1]), 4) for k in seen}
    return FrameSegmentation(mask, score_of, winners(semantic, size))


def winners(masks: Tensor, size: tuple[int, int]) -> Pixels:
    """The strongest of at most 256 soft masks `[K,rows,columns]` at each pixel, uint8 `[h,w]`.

    Masks are upsampled bilinearly first; ties go to the first mask.
    """
    # One mask at a time: an argmax over the leading dimension is several times slower.
    best = _upsample(masks[0], size)
    label = torch.zeros(size, dtype=torch.uint8)
    for index in range(1, len(masks)):
        mask = _upsample(masks[index], size)
        label.masked_fill_(mask > best, index)
        torch.maximum(best, mask, out=best)
    return label.numpy()


def _upsample(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def _compete(
    instance: Tensor, candidates: Tensor, background: int, size: tuple[int, int]
) -> Pixels:
    competing = candidates.clone()
    competing[background] = True
    ids = torch.arange(1, competing.numel() + 1, dtype=torch.uint8).view_as(competing)
    ids[background] = 0
    return ids[competing].numpy()[winners(instance[competing], size)]


def _paint(
    instance: Tensor, candidates: Tensor, scores: Tensor, threshold: float, size: tuple[int, int]
) -> Pixels:
    mask = np.zeros(size, np.uint8)
    chosen = candidates.flatten().nonzero()[:, 0]
    rising = chosen[scores.flatten()[chosen].argsort(stable=True)]
    for index in rising.tolist():
        soft = F.interpolate(instance.flatten(0, 1)[None, index : index + 1], tuple(size))[0, 0]
        low, high = soft.min(), soft.max()
        mask[(soft - low > threshold * (high - low)).numpy()] = index + 1
    return mask


def write_segmentation(
    output: str | Path,
    name: str,
    frames: Iterable[Pixels],
    segmentation: Iterable[FrameSegmentation],
) -> Path:
    """Write `masks/<name>/00000.png` …, `scores.json` and `overlay.mp4` and return the folder.

    `frames` and `segmentation` (a `Segmentation`, or a generator) run in parallel and may be lazy.
    An earlier result for the same name is replaced. Raises `UserError` when the folder cannot be
    written or holds anything else, masks of another video too; nothing half-written stays.
    """
    holds = ("masks", "scores.json", "overlay.mp4")
    with whole_folder(output, holds, writer="smtc segment") as folder:
        others = sorted({path.name for path in Path(output, "masks").glob("*")} - {name})
        if others:
            raise UserError(
                f"{output} already holds masks of {others[0]!r}, not of {name!r}; "
                "choose another output folder."
            )
        masks = folder / "masks" / name
        masks.mkdir(parents=True)
        scores = []
        with _film(folder / "overlay.mp4") as add:
            for index, (found, frame) in enumerate(zip(segmentation, frames, strict=True)):
                write_ids(masks / f"{index:05d}.png", found.mask)
                scores.append({str(k): value for k, value in found.scores.items()})
                add(overlay(frame, found.mask))
        text = json.dumps({"video": name, "frames": scores}, indent=1)
        (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    return Path(output)


@contextmanager
def _film(path: Path) -> Iterator[Any]:
    """A function that adds an RGB image to the video at `path`."""
    writer: cv2.VideoWriter | None = None

    def add(image: Pixels) -> None:
        nonlocal writer
        if writer is None:
            size = (image.shape[1], image.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(path), codec, OVERLAY_FPS, size)
            if not writer.isOpened():
                raise UserError(
                    "This OpenCV cannot write MPEG-4 video; "
                    "install opencv-python-headless from the package index."
                )
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    try:
        yield add
    finally:
        if writer is not None:
            writer.release()


def segment_folder(
    model: SMTC,
    folder: str | Path,
    output: str | Path,
    *,
    preset: str | InferenceSettings = "default",
    batch: int = 1,
) -> Path:
    """Segment the video whose JPEG or PNG frames lie in `folder`.

    Files as `write_segmentation` makes them. Frames are read twice, so that a long video needs
    little memory. Raises `UserError` for a folder that is missing, without frames or with several
    videos, a frame that cannot be read or differs in size, and as `segment` does.
    """
    settings = _settings(preset)
    name, paths = _frame_paths(Path(folder))

    def frames(title: str) -> Iterator[Pixels]:
        first = read_image(paths[0])
        for path in track(paths, title=title, unit="frame"):
            frame = read_image(path)
            if frame.shape != first.shape:
                raise UserError(
                    f"{path} differs in size from {paths[0]}; "
                    "frames of a video must be of one size."
                )
            yield frame

    # A generator: the output folder is looked at before the long work begins.
    def found() -> Iterator[FrameSegmentation]:
        prediction = predict(model, frames("segment"), settings=settings, batch=batch)
        size = read_image(paths[0]).shape[:2]
        for index in range(len(paths)):
            yield render(prediction, index, size, settings)

    return write_segmentation(output, name, frames("write"), found())


def _frame_paths(folder: Path) -> tuple[str, Sequence[str]]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give a folder of JPEG or PNG frames.")
    videos = find_videos(folder)
    if len(videos) > 1:
        raise UserError(
            f"{folder} holds {len(videos)} videos; "
            f"give the folder of one, such as {Path(videos[0].frames[0]).parent}."
        )
    return videos[0].name, videos[0].frames
