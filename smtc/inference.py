"""From a video's frames to object masks: the model in windows of four, chunk by chunk, so that a
video of any length needs little memory.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smtc.errors import UserError
from smtc.evaluation.metrics import border_counts, border_label
from smtc.model import SMTC
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD, prepare_frames
from smtc.rendering import MOST_IDS, FrameMasks, frame_masks, soft_masks, winners
from smtc.tracking import Tracker

Pixels = NDArray[np.uint8]

WINDOW = 4
"""Frames the model sees together."""
CHUNK = 32
"""Frames that are held at a time; the background is decided for each chunk."""
CUT = 0.25
"""The least share of a frame's pixels that changes its colour where a scene ends; within the scenes
of six sequences of DAVIS-2016 it is at most 0.12, between two of them at least 0.33."""


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
    min_object: float = 0.001
    """The least share of the frame that an object covers; smaller ones are background."""
    max_objects: int = MOST_IDS
    """The most ids of a video: the largest objects of a frame get them, and a new one takes over
    the id that was seen longest ago."""
    track: bool = True
    """Whether ids follow objects; else instance slot p of semantic n always has n·P + p + 1."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16: autocast; slots and softmax stay in fp32."""
    seed: int = 0
    """Of the noise that the instance slots start from; the same in every frame."""

    def __post_init__(self) -> None:
        for name in ("threshold", "min_area", "min_object"):
            value = getattr(self, name)
            flag = " (--area)" if name == "min_object" else ""
            if not 0 <= value <= 1:
                raise UserError(f"{name}{flag} is {value}; give a share between 0 and 1.")
        if not -1 <= self.similarity <= 1:
            raise UserError(
                f"similarity (--score) is {self.similarity}; give a cosine between -1 and 1."
            )
        if not 1 <= self.max_objects <= MOST_IDS:
            raise UserError(f"max_objects is {self.max_objects}; give 1 to {MOST_IDS}.")
        if self.iterations is not None and self.iterations < 1:
            raise UserError(f"iterations is {self.iterations}; at least 1 is needed.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; give a whole number from 0.")


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
    embeddings: Tensor
    """`[F,N,P,D]`: of unit norm, what objects are recognised by."""
    cuts: Tensor
    """Bool `[F]`: whether a scene begins with this frame."""

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, frames: slice | Sequence[int]) -> "Prediction":
        return Prediction(*(getattr(self, name)[frames] for name in self.__dataclass_fields__))

    @property
    def background(self) -> int:
        """The semantic slot that wins most tokens on the border, over all these frames."""
        return border_label(self.semantic.argmax(1).numpy())


@dataclass(frozen=True)
class FrameSegmentation:
    """One frame as `segment_frames` gives it."""

    mask: Pixels
    """Ids `[h,w]`, 0 is background."""
    scores: dict[int, float]
    """Of every id in `mask`."""
    found: FrameMasks
    """What the ids were given to; its objects may overlap where the settings let them."""
    soft_semantic: Tensor
    """`[N,rows,columns]`"""
    soft_instance: Tensor
    """`[N·P,rows,columns]`"""
    background: int
    """The semantic slot taken for background."""

    @property
    def semantic(self) -> Pixels:
        """The semantic slot that wins each pixel, `[h,w]`; made anew at each use."""
        return winners(self.soft_semantic, self.found.size)

    @property
    def proposals(self) -> NDArray[np.bool_]:
        """Every object's own mask `[K,h,w]`, by falling score; made anew at each use."""
        return self.found.proposals()


class SegmentedFrame(NamedTuple):
    """One frame of a `Segmentation`."""

    mask: Pixels
    scores: dict[int, float]
    semantic: Pixels


@dataclass(frozen=True)
class Segmentation:
    """The objects of a video; iterating gives a `SegmentedFrame` a frame."""

    masks: Pixels
    """Object ids `[F,h,w]`, 0 is background."""
    scores: list[dict[int, float]]
    """For each frame the score of every id seen in it."""
    semantic: Pixels
    """The semantic slot that wins each pixel, `[F,h,w]`."""

    def __iter__(self) -> Iterator[SegmentedFrame]:
        yield from map(SegmentedFrame, self.masks, self.scores, self.semantic)


def segment(
    model: SMTC,
    frames: Pixels | Sequence[Pixels],
    *,
    preset: str | InferenceSettings = "default",
    batch: int = 4,
) -> Segmentation:
    """Find the objects of a video, with ids that follow them.

    For videos that do not fit into memory there is `segment_frames`.

    Args:
        model: an `SMTC`, on any device; it runs in eval mode and without gradients.
        frames: RGB uint8 `[F,h,w,3]`, or F images `[h,w,3]` of one size.
        preset: "default", "official" (the authors' multi-object script) or settings of one's own.
        batch: windows of four frames that the model sees at once.

    Raises:
        UserError: for no frames, frames that are not RGB uint8 of one size, an unknown preset, a
            size that the model cannot take, or a batch below 1.
    """
    _check_frames(frames)
    settings = inference_settings(preset)
    found = [
        (frame.mask, frame.scores, frame.semantic)
        for frame in segment_frames(model, frames, settings=settings, batch=batch)
    ]
    masks, scores, semantic = zip(*found, strict=True)
    return Segmentation(masks=np.stack(masks), scores=list(scores), semantic=np.stack(semantic))


def segment_frames(
    model: SMTC,
    frames: Iterable[Pixels],
    *,
    settings: InferenceSettings = PRESETS["default"],
    batch: int = 4,
    segmenter: "Segmenter | None" = None,
    before: Pixels | None = None,
) -> Iterator[FrameSegmentation]:
    """`segment` for an iterable of RGB uint8 frames `[h,w,3]` of one size, which is read once.

    Holds what the model says of 32 frames, and one frame. A `segmenter` that has seen the chunks
    before these frames goes on with its ids, and `before` is the last of them. Raises `UserError`
    for no frames, a size that the model cannot take, a model that says NaN, and a batch below 1.
    """
    seen: list[tuple[int, int]] = []

    def watched() -> Iterator[Pixels]:
        for frame in frames:
            if not seen:
                seen.append((frame.shape[0], frame.shape[1]))
            yield frame

    segmenter = segmenter or Segmenter(settings)
    chunks = predict_chunks(model, watched(), settings=settings, batch=batch, before=before)
    for prediction in chunks:
        yield from segmenter.frames(prediction, seen[0])


def segment_prediction(
    prediction: Prediction, size: tuple[int, int], settings: InferenceSettings
) -> Iterator[FrameSegmentation]:
    """What `segment_frames` gives for a video whose whole `prediction` is at hand; `size` is the
    height and width of its frames.
    """
    segmenter = Segmenter(settings)
    for start in range(0, len(prediction), CHUNK):
        yield from segmenter.frames(prediction[start : start + CHUNK], size)


class Segmenter:
    """Turns the predictions of a video's chunks, in order, into frames with ids that persist.

    The background is the semantic slot with most tokens on the border, in this chunk and, each
    counting half of the next, in those of the scene before: a short video is judged as a whole.
    With a scene all objects are new.
    """

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._tracker = Tracker(settings.max_objects)
        self._border: NDArray[np.float64] | None = None

    def frames(self, prediction: Prediction, size: tuple[int, int]) -> Iterator[FrameSegmentation]:
        """The next chunk's frames at the height and width `size`."""
        slots = prediction.scores[0].numel()
        if slots > MOST_IDS and not self._settings.track:
            raise UserError(
                f"{slots} instance slots are more than the {MOST_IDS} ids of a mask; "
                "leave tracking on, which numbers only what is seen."
            )
        starts = [0, *(prediction.cuts[1:].nonzero()[:, 0] + 1).tolist(), len(prediction)]
        for start, end in itertools.pairwise(starts):
            if prediction.cuts[start]:
                self._tracker.forget()
                self._border = None
            scene = prediction[start:end]
            background = self._background(scene)
            for index in range(len(scene)):
                yield self._frame(scene, index, background, size)

    def state(self) -> dict[str, NDArray[Any]]:
        """What the next chunk follows from, as arrays that `restore` takes."""
        border = np.zeros(0) if self._border is None else self._border
        return self._tracker.state() | {"border": border}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a `state`."""
        self._tracker.restore(state)
        self._border = state["border"] if len(state["border"]) else None

    def _background(self, prediction: Prediction) -> int:
        labels = prediction.semantic.argmax(1).numpy()
        counts = border_counts(labels, minlength=prediction.semantic.shape[1])
        border = counts + (0 if self._border is None else self._border / 2)
        self._border = np.asarray(border, np.float64)
        return int(border.argmax())

    def _frame(
        self, prediction: Prediction, index: int, background: int, size: tuple[int, int]
    ) -> FrameSegmentation:
        settings = self._settings
        soft = soft_masks(
            prediction.semantic[index],
            prediction.instance[index],
            prediction.scores[index],
            similarity=settings.similarity,
            threshold=settings.threshold,
            min_area=settings.min_area,
        )
        found = frame_masks(
            soft,
            size,
            # What the authors' script leaves to overlap has no background of its own.
            background=background if settings.masks == "argmax" else None,
            threshold=settings.threshold,
            min_object=settings.min_object,
            max_objects=settings.max_objects,
        )
        if settings.track:
            flat = prediction.embeddings[index].flatten(0, 1)[found.slots]
            ids = self._tracker.update(found.visible(), flat.numpy())
        else:
            ids = found.slots + 1
        mask = found.paint(ids)
        scores = {int(k): round(float(v), 4) for k, v in zip(ids, found.scores, strict=True)}
        seen = np.unique(mask[mask > 0]).tolist()
        return FrameSegmentation(
            mask=mask,
            scores={k: scores[k] for k in seen},
            found=found,
            soft_semantic=prediction.semantic[index],
            soft_instance=soft.masks,
            background=background,
        )


def inference_settings(preset: str | InferenceSettings) -> InferenceSettings:
    """The settings of a preset's name; settings are returned as they are."""
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
            f"The frames are a {type(frames).__name__}; give an array [F,h,w,3] or a list, such as "
            "list(smtc.pipelines.frame_source.open_source(path))."
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
    batch: int = 4,
) -> Prediction:
    """`predict_chunks`, put together: the soft masks of a whole video."""
    parts = list(predict_chunks(model, frames, settings=settings, batch=batch))
    fields = Prediction.__dataclass_fields__
    return Prediction(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def predict_chunks(
    model: SMTC,
    frames: Iterable[Pixels],
    *,
    settings: InferenceSettings = PRESETS["default"],
    batch: int = 4,
    before: Pixels | None = None,
) -> Iterator[Prediction]:
    """Run the model over windows of four consecutive frames; a `Prediction` of 32 frames at a time.

    The last window is filled up with the video's last frame. `frames` (RGB uint8 `[h,w,3]`) may be
    a generator: one frame is held at a time, and 32 of the size that the model sees. `before` is
    the frame before them, where there is one. Raises `UserError` for no frames, a size that is no
    multiple of the patch, a model that says NaN, and a `batch` below 1.
    """
    if not isinstance(batch, int) or batch < 1:
        raise UserError(f"batch is {batch}; give a whole number of windows, 1 or more.")
    size = model_size(model, settings)
    iterator = iter(frames)
    last = None if before is None else _colours(before)
    empty = True
    while True:
        # Each frame is made small as it comes: those of a 4K video would fill the memory.
        chunk, cuts = [], []
        for frame in islice(iterator, CHUNK):
            chunk.append(prepare_frames([frame], size, mean=settings.mean, std=settings.std))
            colours = _colours(frame)
            cuts.append(last is not None and bool(np.abs(colours - last).sum() / 2 >= CUT))
            last = colours
        if not chunk:
            break
        empty = False
        with evaluating(model):
            fields = _predict_chunk(model, torch.cat(chunk), settings, batch)
        yield Prediction(*fields, cuts=torch.tensor(cuts))
    if empty:
        raise UserError("There are no frames to segment.")


def _colours(frame: Pixels) -> NDArray[np.float32]:
    """The share of a small copy of the frame in each of 4 x 4 x 4 colours: float32 `[64]`."""
    small = np.asarray(cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA), np.uint8) >> 6
    code = (small[..., 0] * 16 + small[..., 1] * 4 + small[..., 2]).ravel()
    return np.bincount(code, minlength=64).astype(np.float32) / code.size


def model_size(model: SMTC, settings: InferenceSettings) -> tuple[int, int]:
    """Height and width that frames are squashed to; `UserError` where the model cannot take it."""
    size = settings.size or model.config.resolution
    patch = model.config.backbone.patch
    for side in size:
        if side < patch or side % patch:
            raise UserError(
                f"The size {size[0]}x{size[1]} is no multiple of the model's patch ({patch}); "
                f"use {max(patch, side - side % patch)} instead of {side}, say."
            )
    return size


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
    model: SMTC, inputs: Tensor, settings: InferenceSettings, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first fields of `Prediction` for frames `[F,3,H,W]` as the model wants them."""
    count = len(inputs)
    padded = torch.cat([inputs, inputs[-1:].expand(-count % WINDOW, -1, -1, -1)])
    device = next(model.parameters()).device
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]
    noise = model.inference_noise(device, settings.seed)
    parts = []
    for clips in padded.unflatten(0, (-1, WINDOW)).split(batch):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = model(
                clips.to(device),
                noise.expand(len(clips), WINDOW, -1, -1, -1),
                iterations=settings.iterations,
            )
        fields = (
            output.semantic_logits,
            output.instance_logits,
            output.semantic_slots,
            output.instance_slots,
            output.embeddings,
        )
        parts.append([field.flatten(0, 1).float().cpu() for field in fields])
    joined = [torch.cat(field)[:count] for field in zip(*parts, strict=True)]
    semantic_logits, instance_logits, semantic_slots, instance_slots, embeddings = joined
    if not (semantic_logits.isfinite().all() and instance_logits.isfinite().all()):
        raise UserError(
            "The model says NaN: its weights are damaged, or half precision is too coarse; "
            "use fp32, or another checkpoint."
        )
    semantic = semantic_logits.softmax(1)  # [F,N,L]
    instance = semantic[:, :, None] * instance_logits.softmax(2)  # [F,N,P,L]
    return (
        semantic.unflatten(-1, output.grid),
        instance.unflatten(-1, output.grid),
        F.cosine_similarity(semantic_slots[:, :, None], instance_slots, dim=-1),
        F.normalize(embeddings, dim=-1),
    )
