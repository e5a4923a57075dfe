"""A video with masks: its files, and how they are read and checked against each other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smtc.pipelines.images import BadFrame, check_image, read_ids, read_image

Pixels = NDArray[np.uint8]
MaskReader = Callable[[Sequence[Path]], Pixels]
"""The files of one frame's mask to ids `[h,w]`; `BadFrame` names a bad one."""

_UNMARKED = (".bmp", ".pgm", ".ppm", ".pnm")  # formats without an end marker, which Pillow reads


def read_mask(path: str | Path) -> Pixels:
    """The ids `[h,w]` of a palette or 8-bit grey PNG, as stored; `BadFrame` names a bad file."""
    try:
        return read_ids(path)
    except BadFrame as error:
        raise BadFrame(path, f"annotation, {error.reason}") from None


def read_first(paths: Sequence[Path]) -> Pixels:
    """The ids of a mask that is one file."""
    return read_mask(paths[0])


@dataclass(frozen=True)
class EvaluationVideo:
    """The files of one video; `annotations` and `categories` run parallel to `frames`."""

    name: str
    frames: list[Path]
    annotations: list[tuple[Path, ...] | None]
    """The files of each frame's mask (several where each object has its own), None where a data
    set annotates only some frames."""
    categories: list[Path] | None = None
    """Category ids of each frame, where the data set has them."""
    read: MaskReader = read_first
    """What makes ids of the files of a mask."""

    def iterate_frames(self) -> Iterator[Pixels]:
        """The frames in turn, RGB uint8 `[h,w,3]`, one in memory; a bad one is a `UserError`, and
        so is one whose size is not that of the first.
        """
        first = None
        for path in self.frames:
            frame = read_frame(path)
            first = first or frame.shape
            if frame.shape != first:
                size = (
                    f"{size_text(frame.shape)} is not that of the video's first, {size_text(first)}"
                )
                raise BadFrame(path, f"its size {size}")
            yield frame

    def load_frames(self) -> Pixels:
        """All frames, RGB uint8 `[F,h,w,3]`; errors as `iterate_frames`."""
        return np.stack(list(self.iterate_frames()))

    def load_truth(self) -> Pixels:
        """Ids uint8 `[A,h,w]` of the `annotated` frames: 0 background, 255 void where the data set
        has void.

        A bad mask is a `UserError`, and so is one whose size is not that of the video's first
        frame. Reads no other frame, so that this is found before any is scored.
        """
        frame = read_frame(self.frames[0]).shape
        masks = []
        for paths in self.annotations:
            if paths is None:
                continue
            masks.append(self.read(paths))
            if masks[-1].shape != frame[:2]:
                size = size_text(masks[-1].shape)
                raise BadFrame(
                    paths[0],
                    f"the mask's size {size} is not that of the video's frames, "
                    f"{size_text(frame)}; use the masks and the frames of one resolution",
                )
        return np.stack(masks)

    def load(self) -> tuple[Pixels, Pixels]:
        """All frames, and the ids of the `annotated` ones; errors as the two above."""
        truth = self.load_truth()
        return self.load_frames(), truth

    @property
    def annotated(self) -> list[int]:
        """Positions of the frames that have a mask."""
        return [index for index, paths in enumerate(self.annotations) if paths is not None]

    @property
    def files(self) -> list[Path]:
        """All files that scores depend on."""
        return [*self.frames, *(path for paths in self.annotations for path in paths or ())]


def size_text(shape: Sequence[int]) -> str:
    """Width and height of an image of that shape."""
    return f"{shape[1]}x{shape[0]}"


def read_frame(path: Path) -> Pixels:
    """RGB uint8 `[h,w,3]` of a JPEG, PNG or BMP file; `BadFrame` names a bad one."""
    if path.suffix.lower() not in _UNMARKED:
        return read_image(path)
    return np.asarray(_open_whole(path).convert("RGB"))


def read_grey(path: Path) -> Pixels:
    """Brightness uint8 `[h,w]` of a mask in any format; each id but 0 of a palette that is not grey
    counts as white.

    Raises `BadFrame` for a file that is missing, cut short or no image.
    """
    if path.suffix.lower() not in _UNMARKED:
        check_image(path)
    image = _open_whole(path)
    if image.mode == "P" and _is_grey(image):
        return np.asarray(image.convert("L"))
    if image.mode in ("P", "1"):
        return np.where(np.asarray(image) > 0, 255, 0).astype(np.uint8)
    if image.mode.startswith("I"):  # 16 bits
        return (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
    if image.mode == "L":
        return np.asarray(image)
    # OpenCV's rounding, not Pillow's: what the thresholds of data sets were chosen with.
    return np.asarray(cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2GRAY))


def _is_grey(image: Image.Image) -> bool:
    """Whether a palette holds nothing but brightness."""
    used = [colour for _, colour in image.convert("RGB").getcolors(256) or []]
    return all(isinstance(colour, tuple) and len(set(colour)) == 1 for colour in used)


def _open_whole(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise BadFrame(path, "the file is missing") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise BadFrame(path, "it cannot be decoded, or is cut short") from None
