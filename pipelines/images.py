"""Image files in and out: frames that are surely whole, and masks as palette PNGs."""

import functools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smtc.errors import UserError
from smtc.pipelines.file_kinds import told

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")

_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xae\x42\x60\x82"
_MARKERS = ((_JPEG, _JPEG_END), (_PNG, _PNG_END))
_PIXELS_FOLLOW = b"\xda"  # the second byte of a JPEG's start of scan
_PADDING = b"\x00\xff\r\n\t "  # some writers add it after the end
_END = 512  # bytes read at either end of a file to look for markers
_IMREAD_RGB: int | None = getattr(cv2, "IMREAD_COLOR_RGB", None)  # OpenCV 4.11; saves a pass


class BadFrame(UserError):  # noqa: N818
    """An image file that cannot be read whole; its text is `<video>/<frame file>: <reason>`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = str(path), reason
        whole = Path(os.path.abspath(path))
        super().__init__(f"{whole.parent.name}/{whole.name}: {reason}")

    def __reduce__(self) -> tuple[type["BadFrame"], tuple[str, str]]:
        return type(self), (self.path, self.reason)


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """The image as RGB uint8 `[h,w,3]`, whatever its depth, palette or alpha.

    Raises `BadFrame` for a file that is missing, empty, cut short or no JPEG or PNG image. OpenCV
    returns a JPEG that was cut short partly grey and without an error, so its end is checked first.
    """
    data = _read_bytes(path)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), _IMREAD_RGB or cv2.IMREAD_COLOR)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise BadFrame(path, "it cannot be decoded")
    if _IMREAD_RGB is None:
        # In place: OpenCV hands out a fresh array, and a second one would only cost time.
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return pixels  # type: ignore[return-value]


def check_image(path: str | Path) -> None:
    """Raise what `read_image` would for a file that is missing, empty, cut short or no image.

    Reads little more than its two ends, so damage in between is not found.
    """
    with _opened(path) as file:
        head = file.read(_END)
        file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
        if not _ends(head, file.read(_END)):
            file.seek(0)
            _check_whole(path, file.read())


def _read_bytes(path: str | Path) -> bytes:
    """The content of a JPEG or PNG file that has its end marker."""
    with _opened(path) as file:
        data = file.read()
    _check_whole(path, data)
    return data


@contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    """A regular file; errors of the operating system become `BadFrame`."""
    try:
        # A pipe that nobody writes to would be waited for without the flag.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadFrame(path, "it is no regular file")
            yield file
    except FileNotFoundError:
        raise BadFrame(path, "the file is missing") from None
    except OSError as error:
        raise BadFrame(path, f"it cannot be read ({error.strerror})") from None


def _ends(head: bytes, tail: bytes) -> bool:
    """Whether a file that begins and ends like this is a JPEG or PNG file up to its end marker."""
    end = next((end for start, end in _MARKERS if head.startswith(start)), None)
    return end is not None and tail.rstrip(_PADDING).endswith(end)


def _check_whole(path: str | Path, data: bytes) -> None:
    """`BadFrame` for content that is no JPEG or PNG file, or one without its end."""
    if _ends(data, data):
        return
    if not data:
        raise BadFrame(path, "the file is empty")
    if data.startswith(_JPEG):
        whole = _has_end(data)
    elif data.startswith(_PNG):
        whole = _PNG_END in data
    else:
        what = told(data[:_END])
        also = "" if what is None else f" but {what}"
        raise BadFrame(path, f"it is neither a JPEG nor a PNG file{also}")
    if not whole:
        raise BadFrame(path, "the file is cut short")


def _has_end(data: bytes) -> bool:
    """Whether a JPEG has its end marker behind the start of its pixels: cameras append what they
    like, and a thumbnail in the header has an end of its own.
    """
    at = len(_JPEG)
    while data[at : at + 1] == b"\xff":
        if data[at + 1 : at + 2] == _PIXELS_FOLLOW:
            return data.find(_JPEG_END, at) >= 0
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


@functools.cache
def mask_palette() -> bytes:
    """The 256 RGB colours of mask files, the usual colour map of PASCAL VOC and DAVIS.

    Bits 0, 1 and 2 of an id become the highest bits of red, green and blue, bits 3 to 5 the next.
    """
    ids = np.arange(256)[:, None]
    channel = np.arange(3)
    colours = sum(((ids >> (3 * level + channel)) & 1) << (7 - level) for level in range(3))
    return np.asarray(colours, np.uint8).tobytes()


def write_ids(path: str | Path, ids: NDArray[np.uint8]) -> None:
    """Write ids `[h,w]` (0 is background) as a palette PNG."""
    image = Image.fromarray(ids, mode="P")
    image.putpalette(mask_palette())
    image.save(path, format="PNG")


def read_ids(path: str | Path) -> NDArray[np.uint8]:
    """The ids `[h,w]` of a palette or 8-bit grey PNG as stored; errors like `read_image`."""
    _read_bytes(path)
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise BadFrame(
                    path, f"a mask holds one id a pixel, this one is of mode {image.mode}"
                )
            return np.array(image.convert("L") if image.mode == "1" else image, np.uint8)
    except (OSError, SyntaxError):
        raise BadFrame(path, "it cannot be decoded") from None
