"""Video files of numbered pictures, in many codecs and containers."""

import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from smtc.pipelines.images import BadFrame
from smtc.pipelines.video_files import read_frames, read_timestamps

av = pytest.importorskip("av")

Picture = NDArray[np.uint8]
SHORT_GOPS = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:open-gop"
TEXTURE = cv2.GaussianBlur(
    np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8), (0, 0), 2
)
TEXTURE = cv2.normalize(TEXTURE, TEXTURE, 0, 255, cv2.NORM_MINMAX)


def drawn(number: int, width: int = 64, height: int = 48) -> Picture:
    """A moving texture that shows `number` as twelve dark or bright fields."""
    y, x = number * 3 % 97, number * 5 % 199
    picture = TEXTURE[y : y + height, x : x + width] // 2
    for bit in range(12):
        row, column = divmod(bit, 6)
        field = np.s_[
            row * height // 2 : (row + 1) * height // 2,
            column * width // 6 : (column + 1) * width // 6,
        ]
        picture[field] += np.uint8(127 * (number >> bit & 1))
    return picture


def number_of(picture: Picture) -> int:
    """The number that `drawn` wrote."""
    height, width = picture.shape[:2]
    number = 0
    for bit in range(12):
        row, column = divmod(bit, 6)
        middle = picture[
            row * height // 2 + height // 8 : (row + 1) * height // 2 - height // 8,
            column * width // 6 + width // 24 : (column + 1) * width // 6 - width // 24,
        ]
        number |= int(middle.mean() > 127) << bit
    return number


def write(
    path: Path,
    codec: str = "libx264",
    pictures: Iterable[Picture] | int = 40,
    *,
    pixels: str = "yuv420p",
    times: list[int] | None = None,
    size: tuple[int, int] = (64, 48),
    container: dict[str, str] | None = None,
    set_up: Callable[[Any], object] = lambda _: None,
    **options: str,
) -> Path:
    """A video of (numbered) pictures of `size` (width, height), at 25 frames/s or `times` in ms."""
    if isinstance(pictures, int):
        pictures = [drawn(number, *size) for number in range(pictures)]
    base = Fraction(1, 25) if times is None else Fraction(1, 1000)
    if codec == "libx265":
        options["x265-params"] = "log-level=none:" + options.get("x265-params", "")
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.codec_context.time_base = base
        set_up(stream)
        for position, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = times[position] if times else position, base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def remuxed(source: Path, path: Path, *, drop: int = 0, earlier: int = 0) -> Path:
    """A copy without the first `drop` packets, all others moved by `earlier` frames of 512."""
    with av.open(str(source)) as given, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(given.streams.video[0])
        for position, packet in enumerate(given.demux(video=0)):
            if packet.dts is None or position < drop:
                continue
            packet.pts, packet.dts = packet.pts - 512 * earlier, packet.dts - 512 * earlier
            packet.stream = stream
            file.mux(packet)
    return path


def said(path: Path, times: list[int] | None = None) -> str:
    """The reason for which a file is refused; nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BadFrame) as caught:
        read_timestamps(path) if times is None else read_frames(path, times)
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    name, reason = str(caught.value).split(": ")
    assert name == f"{path.parent.name}/{path.name}"
    return reason


@dataclass(frozen=True)
class Case:
    """A kind of file: its name, its codec and how it is written."""

    file: str
    codec: str = "libx264"
    more: dict[str, Any] = field(default_factory=dict)


UNEVEN = [0, 10, 11, 50, 51, 400, 401, *range(500, 731, 7)]
CASES = {
    "B-frames": Case("v.mp4"),
    "closed GOPs": Case("v.mp4", more={"x264-params": SHORT_GOPS + "=0"}),
    "open GOPs": Case("v.mp4", more={"x264-params": SHORT_GOPS + "=1"}),
    "open GOPs in Matroska": Case("v.mkv", more={"x264-params": SHORT_GOPS + "=1"}),
    "HEVC with open GOPs": Case("v.mp4", "libx265", {"x265-params": SHORT_GOPS + "=1"}),
    "HEVC of 10 bits": Case("v.mkv", "libx265", {"pixels": "yuv420p10le"}),
    "intra refresh": Case(
        "v.mkv", more={"x264-params": "bframes=0:intra-refresh=1:keyint=20", "preset": "fast"}
    ),
    "interlaced": Case("v.mp4", more={"x264-params": "interlaced=1:keyint=15"}),
    "uneven times": Case("v.mp4", more={"times": UNEVEN, "x264-params": SHORT_GOPS + "=0"}),
    "uneven times in Matroska": Case("v.mkv", more={"times": UNEVEN, "g": "9"}),
    "fragments": Case("v.mp4", more={"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "MPEG-4": Case("v.m4v", "mpeg4", {"bf": "2", "g": "12", "container": {"f": "mp4"}}),
    "MPEG-2": Case("v.mkv", "mpeg2video", {"bf": "2", "g": "12"}),
    "MPEG-4 in AVI": Case("v.avi", "mpeg4", {"g": "12"}),
    "B-frames in AVI": Case("v.avi", "mpeg4", {"bf": "2", "g": "12"}),
    "H.264 in AVI": Case("v.avi", more={"x264-params": SHORT_GOPS + "=0"}),
    "repeated frames in AVI": Case("v.avi", "mpeg4", {"times": [n * 120 for n in range(40)]}),
    "hidden frames of VP9": Case(
        "v.webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20", "b": "99k"}
    ),
    "VP8": Case("v.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "20"}),
    "no index": Case("v.webm", "libvpx-vp9", {"g": "12", "container": {"live": "1"}}),
    "motion JPEG": Case("v.mov", "mjpeg", {"pixels": "yuvj420p"}),
    "odd sizes": Case("v.mkv", "ffv1", {"size": (63, 47)}),
    "grey": Case("v.mkv", "ffv1", {"pixels": "gray"}),
    "grey of 16 bits": Case("v.mkv", "ffv1", {"pixels": "gray16le"}),
    "alpha": Case("v.mkv", "ffv1", {"pixels": "bgra"}),
    "one frame": Case("v.mp4", more={"pictures": 1}),
}
