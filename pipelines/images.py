"""Image files in and out: frames that are surely whole, and masks as palette PNGs."""

import functools
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smtc.errors import UserError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")

_MARKERS = (  # start and end of a JPEG and of a PNG file
    (b"\xff\xd8", b"\xff\xd9"),
    (b"\x89PNG\r\n\x1a\n", b"IEND\xae\x42\x60\x82"),
)
_PADDING = b"\x00\xff\r\n\t "  # some writers add it after the end


class BadFrame(UserError):  # noqa: N818
    """An image file that cannot be read whole; its text is `<video>/<frame file>: <reason>`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(f"{Path(path).parent.name}/{Path(path).name}: {reason}")

    def __reduce__(self) -> tuple[type["BadFrame"], tuple[str, str]]:
        return type(self), (self.path, self.reason)


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """The image as RGB uint8 `[h,w,3]`, whatever its depth, palette or alpha.

    Raises `BadFrame` for a file that is missing, empty, cut short or no JPEG or PNG image. OpenCV
    returns a JPEG that was cut short partly grey and without an error, so its end is checked first.
    """
    data = _read_bytes(path)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise BadFrame(path, "it cannot be decoded")
    # In place: OpenCV hands out a fresh array, and a second one would only cost time.
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)  # type: ignore[return-value]


def _read_bytes(path: str | Path) -> bytes:
    """The content of a JPEG or PNG file that has its end marker."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise BadFrame(path, "the file is missing") from None
    except OSError as error:
        raise BadFrame(path, f"it cannot be read ({error.strerror})") from None
    if not data:
        raise BadFrame(path, "the file is empty")
    for start, end in _MARKERS:
        if data.startswith(start):
            if data.rstrip(_PADDING).endswith(end):
                return data
            raise BadFrame(path, "the file is cut short")
    raise BadFrame(path, "it is neither a JPEG nor a PNG file")


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
