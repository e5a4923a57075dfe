"""Video files that play in browsers, written frame by frame."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError

Pixels = NDArray[np.uint8]

LONGEST = 1920
"""Pixels on the longer side of a film."""
_THREADS = 2  # x264's bits depend on their number
# With its look-ahead on macroblocks, two encodings of the same frames can differ.
_X264: dict[str, Any] = {"crf": "20", "preset": "veryfast", "x264-params": "mbtree=0:b-adapt=0"}


def film_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the film of frames of a size: at most `LONGEST`, even, at least 2."""
    scale = min(1.0, LONGEST / max(height, width))
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


@contextmanager
def film(path: Path, rate: float) -> Iterator[Callable[[Pixels], None]]:
    """A function that adds an RGB image `[h,w,3]`, of a size that `film_size` gives, to the video
    at `path`, which shows `rate` images a second, at least one in 1000 seconds.

    H.264 where PyAV is there and has an encoder of it, else OpenCV's MPEG-4, which fewer players
    show. Raises `UserError` where there is neither, and `OSError` where the file cannot be written.
    """
    writer: Any = None

    def add(image: Pixels) -> None:
        nonlocal writer
        if writer is None:
            make = _H264 if _has_h264() else _MPEG4
            writer = make(path, rate, (image.shape[0], image.shape[1]))
        writer.add(image)

    try:
        yield add
    except BaseException:
        # What went wrong first is what counts.
        with suppress(Exception):
            if writer is not None:
                writer.close()
        raise
    if writer is not None:
        writer.close()


def _has_h264() -> bool:
    try:
        import av
    except ImportError:
        return False
    return "libx264" in av.codecs_available


class _H264:
    def __init__(self, path: Path, rate: float, size: tuple[int, int]) -> None:
        import av

        self._av = av
        # FFmpeg leaves a file open whose head could not be written.
        self._file = path.open("wb")
        self._container = av.open(self._file, "w", format="mp4")
        stream = self._container.add_stream(
            "libx264", Fraction(max(rate, 0.001)).limit_denominator(1001)
        )
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = _THREADS
        stream.options = _X264
        self._stream = stream

    def add(self, image: Pixels) -> None:
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        with self._told_by_the_system():
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        try:
            with self._told_by_the_system():
                self._container.mux(self._stream.encode(None))
                self._container.close()
        finally:
            self._file.close()

    @contextmanager
    def _told_by_the_system(self) -> Iterator[None]:
        """Errors in writing are those of the file."""
        try:
            yield
        except self._av.FFmpegError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise


class _MPEG4:
    def __init__(self, path: Path, rate: float, size: tuple[int, int]) -> None:
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(path), codec, rate, (size[1], size[0]))
        if not self._writer.isOpened():
            raise UserError(
                "There is no encoder for the overlay: install av (the extra video), or "
                "opencv-python-headless from the package index, whose builds have one."
            )

    def add(self, image: Pixels) -> None:
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()
