"""Whether a file is a whole frame or a whole video; runs in processes of `smtc data inspect`."""

import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cv2

from smtc.pipelines.images import BadFrame, read_image
from smtc.pipelines.manifest import Stamp
from smtc.pipelines.video_files import decoded, open_video, read_timestamps

_LARGEST_IMAGE = 1 << 30  # bytes; nothing larger is read into memory
# Of the warnings of libjpeg those that mean other pixels. It gives the first one of a file only.
_DAMAGE = re.compile(r"Corrupt JPEG data: (?!bad ICC)(.*)|(Premature end of JPEG file)")
_TRAILING = "extraneous bytes before marker 0xd9"
_PNG = b"\x89PNG"


@dataclass(frozen=True)
class Finding:
    """What one file is."""

    stamp: Stamp | None
    """None when it is missing or cannot be opened."""
    reason: str = ""
    """Why it is broken."""
    trailing: bool = False
    """Whether the reason is only that bytes are left before a JPEG's end."""
    sizes: Counter[str] = field(default_factory=Counter)
    """`<width>x<height>` to number of frames."""
    misnamed: bool = False
    """A PNG file called JPEG or the reverse."""
    codec: str = ""
    timestamps: Sequence[int] = ()


def prepare_worker() -> None:
    """Keep standard error from the terminal: libjpeg tells there, and nowhere else, that it had to
    guess pixels.
    """
    with tempfile.TemporaryFile() as told:
        os.dup2(told.fileno(), 2)
    cv2.setNumThreads(0)


def check_files(paths: Sequence[str], videos: bool) -> list[Finding]:
    """Read image files, or video files, whole."""
    return [_check(path, videos) for path in paths]


def _check(path: str, video: bool) -> Finding:
    try:
        status = os.stat(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        why = "the file is missing" if missing else f"it cannot be read ({error.strerror})"
        return Finding(None, why)
    stamp = status.st_size, status.st_mtime_ns
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
        return Finding(stamp, "it is a folder or a device and no file")
    try:
        found = _check_video(path) if video else _check_image(path, status.st_size)
    except BadFrame as error:
        # `read_image` turns what the operating system refuses into a BadFrame, too.
        unopened = isinstance(error.__context__, OSError)
        return Finding(None if unopened else stamp, error.reason)
    return replace(found, stamp=stamp)


def _check_image(path: str, size: int) -> Finding:
    if size > _LARGEST_IMAGE:
        raise BadFrame(path, f"it is larger than a frame can be ({size} bytes)")
    _told_by_libjpeg()
    height, width, _ = read_image(path).shape
    damage = _DAMAGE.search(_told_by_libjpeg())
    with open(path, "rb") as file:
        is_png = file.read(4) == _PNG
    what = "" if damage is None else damage[1] or damage[2]
    return Finding(
        None,
        reason=f"its content is damaged ({what})" if what else "",
        trailing=_TRAILING in what,
        sizes=Counter([f"{width}x{height}"]),
        misnamed=is_png != path.lower().endswith(".png"),
    )


def _told_by_libjpeg() -> str:
    """What was written to standard error since the last call."""
    if not os.fstat(2).st_size:
        return ""
    os.lseek(2, 0, os.SEEK_SET)
    text = os.read(2, 1 << 16).decode(errors="replace")
    os.ftruncate(2, 0)
    os.lseek(2, 0, os.SEEK_SET)
    return text


def _check_video(path: str) -> Finding:
    timestamps = read_timestamps(path)
    sizes: Counter[str] = Counter()
    times, why = [], ""
    try:
        with open_video(path) as (container, stream):
            codec = stream.codec_context.name
            if codec == "mjpeg":  # its decoder else paints damage over without a word
                stream.codec_context.options = {"err_detect": "explode"}
            for time, frame in decoded(path, container, stream):
                times.append(time)
                sizes[f"{frame.width}x{frame.height}"] += 1
                if frame.is_corrupt and not why:
                    why = f"its content is damaged (frame {len(times)} of {len(timestamps)})"
    except BadFrame as error:
        why = f"{error.reason} beyond frame {len(times)} of {len(timestamps)}"
    if not why and list(dict.fromkeys(times)) != list(timestamps):
        why = "its content is damaged (frames are missing)"
    return Finding(None, why, sizes=sizes, codec=codec, timestamps=timestamps)
