"""Video files through PyAV: which frames one holds, and the pixels of some of them.

A frame is known by its presentation time, in the time base of the file's first video stream that is
no cover picture. What decoders drop (before the start of an edit list, say) is no frame.

Pixels are RGB by the textbook formula with chroma interpolated linearly, for the matrix and range
that the file states; where it states none, for BT.601 and limited range, as FFmpeg and OpenCV take
it. Alpha is dropped, high dynamic range is not toned down. Frames are turned and mirrored as the
file asks, so those of phones stand upright.

Not all damage can be detected. The decoders of HEVC, VP8, VP9 and FFV1 paint over it up to the next
keyframe and do not say so; that of H.264 says so for some of it, those of MPEG-2 and MPEG-4 for
most. A Matroska, WebM or AVI file that is cut short is taken for a shorter video.
"""

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.pipelines.images import BadFrame

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")

_PROBED = 8  # frames decoded to see whether the packets tell the truth about them
_BACK = (0, 0.25, 1, 4, 16)  # seconds before the wanted frame to seek to, one after the other
_SWSCALE = 0x2 | 0x2000 | 0x40000  # bilinear, every pixel its own chroma, exact rounding
_MATRICES = {1: 1, 4: 4, 7: 7, 9: 9, 10: 9}  # the file's to swscale's; all others are BT.601
_BT601 = 5
_FULL_RANGE = 2


def read_timestamps(path: str | Path) -> Sequence[int]:
    """Presentation times of the frames of a video file, ascending, in its stream's time base.

    Exactly the frames that decoding shows; of frames with one time the first. The file is demuxed,
    and decoded only where its packets do not tell. Raises `BadFrame` for a file that is missing,
    cut short, damaged, no video or without frames, and `UserError` without PyAV.
    """
    with open_video(path) as (container, stream):
        times = None if _is_counted(container, stream) else _packet_times(path, container, stream)
    if times is None:
        times = _decoded_times(path)
    if not times:
        raise BadFrame(path, "it holds no frames")
    return compact(times)


def frame_rate(path: str | Path) -> float | None:
    """Frames a second of a video file, on average; None where it does not say. Errors as above."""
    with open_video(path) as (_, stream):
        rate = stream.average_rate or stream.guessed_rate
        return float(rate) if rate else None


def compact(times: Sequence[int]) -> Sequence[int]:
    """The same ascending times in little memory: a range where they are evenly spaced."""
    if isinstance(times, range) or not times:
        return times or ()
    step = times[1] - times[0] if len(times) > 1 else 1
    if step > 0 and all(later - earlier == step for earlier, later in itertools.pairwise(times)):
        return range(times[0], times[-1] + 1, step)
    return tuple(times)


def read_frames(path: str | Path, timestamps: Sequence[int]) -> list[NDArray[np.uint8]]:
    """The frames shown at `timestamps`, all at once; otherwise as `iterate_frames`."""
    return list(iterate_frames(path, timestamps))


def iterate_frames(path: str | Path, timestamps: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """The frames shown at `timestamps` (ascending), RGB uint8 `[h,w,3]` each, as they are decoded.

    The same bits as when the whole file is decoded, though only what lies between the keyframe
    before the first of them and the last is. Raises `BadFrame` for a file that is missing, damaged
    or no video, or that has no frame at the time of the next one, and `UserError` without PyAV. The
    file is open until the iterator ends or is closed.
    """
    if not timestamps:
        return
    for back in _BACK:
        with open_video(path) as (container, stream):
            target = timestamps[0] - int(back / stream.time_base)
            if _is_counted(container, stream) or not _seek(container, stream, target):
                break
            if (yield from _collect(path, container, stream, timestamps)):
                return
    with open_video(path) as (container, stream):
        if not (yield from _collect(path, container, stream, timestamps)):
            raise _missing(path, stream, timestamps[0])


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's container of a video file and its video stream, closed at the end.

    FFmpeg's errors on the way become `BadFrame`; `UserError` without PyAV.
    """
    av = _library()
    # Tags in another encoding than UTF-8 are no reason to refuse a file.
    lenient = {"metadata_errors": "replace"} if _version(av) < 19 else {}
    try:
        container = av.open(f"file:{path}", **lenient)  # or a colon would make it an address
    except FileNotFoundError:
        raise BadFrame(path, "the file is missing") from None
    except OSError as error:
        raise BadFrame(path, f"it cannot be read ({error.strerror})") from None
    except av.FFmpegError:
        empty = Path(path).stat().st_size == 0
        raise BadFrame(path, "the file is empty" if empty else "it is no video file") from None
    with container:
        stream = _video_stream(path, container)
        # Loaders run one process a core; more threads in each would only cost time.
        stream.codec_context.thread_count = 1
        try:
            yield container, stream
        except av.FFmpegError:
            raise BadFrame(path, "it cannot be decoded") from None


def decoded(path: str | Path, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """Time and PyAV's frame from where an opened video stands, in the order of display.

    Raises `BadFrame` for a frame without a time, and PyAV's errors.
    """
    counted = _is_counted(container, stream)
    count = 0
    for packet in _packets(container, stream):
        for frame in packet.decode():
            time = count if counted else frame.pts
            if time is None:
                raise BadFrame(path, "its frames have no times")
            yield time, frame
            count += 1


def _library() -> Any:
    try:
        import av
        import av.stream
        import av.video.reformatter
    except ImportError:
        raise UserError(
            "Video files need PyAV; run pip install av, or extract their frames."
        ) from None
    return av


def _version(av: Any) -> int:
    return int(av.__version__.split(".")[0])


def _video_stream(path: str | Path, container: Any) -> Any:
    """The first video stream that is no cover picture."""
    cover = _library().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise BadFrame(path, "it has no video stream")
    if streams[0].codec_context is None:
        raise BadFrame(path, "there is no decoder for it")
    return streams[0]


def _is_counted(container: Any, stream: Any) -> bool:
    """Whether frames are numbered from the start because their times are wrong.

    AVI has no presentation times, and FFmpeg often cannot work them out where frames are reordered
    (H.264, the packed bitstreams of DivX and XviD).
    """
    return container.format.name == "avi" and bool(stream.codec_context.has_b_frames)


def _packet_times(path: str | Path, container: Any, stream: Any) -> list[int] | None:
    """The times of the packets' frames, ascending; None where they do not agree with decoding."""
    times: list[int] = []
    shown: list[int | None] = []
    for packet in _packets(container, stream):
        if packet.is_corrupt:
            raise BadFrame(path, "the file is cut short or damaged")
        if len(shown) < _PROBED:
            shown += [frame.pts for frame in packet.decode()]
        if packet.size and not packet.is_discard:
            if packet.pts is None:
                return None
            times.append(packet.pts)
    times.sort()
    agree = times[:_PROBED] == shown[:_PROBED] and len(set(times)) == len(times)
    return times if agree else None


def _decoded_times(path: str | Path) -> list[int]:
    with open_video(path) as (container, stream):
        times = [time for time, _ in decoded(path, container, stream)]
    if times != sorted(times):
        raise BadFrame(path, "the times of its frames are not in order")
    return list(dict.fromkeys(times))


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets from the next keyframe on; the last one is empty and flushes the decoder."""
    begun = False
    for packet in container.demux(stream):
        begun = begun or packet.is_keyframe
        # An empty packet with a time repeats a frame in AVI; a decoder would take it for the end.
        if begun and (packet.size or packet.dts is None):
            yield packet


def _seek(container: Any, stream: Any, target: int) -> bool:
    """Go to the keyframe at or before `target`; False where that cannot be done."""
    try:
        container.seek(target, stream=stream)
    except _library().FFmpegError:
        return False
    return True


def _collect(
    path: str | Path, container: Any, stream: Any, timestamps: Sequence[int]
) -> Generator[NDArray[np.uint8], None, bool]:
    """The frames at `timestamps`; False where decoding has not begun early enough for the first."""
    av = _library()
    reformatter = av.video.reformatter.VideoReformatter()
    count = 0
    begun = False
    try:
        for time, frame in decoded(path, container, stream):
            if frame.is_corrupt or time > timestamps[count]:
                break
            begun = True
            if time == timestamps[count]:
                yield _pixels(frame, reformatter)
                count += 1
            if count == len(timestamps):
                return True
    except av.FFmpegError:
        pass
    if begun:
        raise _missing(path, stream, timestamps[count])
    return False


def _missing(path: str | Path, stream: Any, time: int) -> BadFrame:
    seconds = float(time * stream.time_base)
    return BadFrame(path, f"the frame at {seconds:.2f} s is missing or damaged")


def _pixels(frame: Any, reformatter: Any) -> NDArray[np.uint8]:
    """The frame upright, as contiguous RGB `[h,w,3]`."""
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    settings: dict[str, Any] = {
        "format": "rgb24",
        "interpolation": _SWSCALE,
        "src_colorspace": _MATRICES.get(frame.colorspace, _BT601),
        "src_color_range": _FULL_RANGE if full else frame.color_range,
        "dst_color_range": _FULL_RANGE,
    }
    if _version(_library()) >= 17:  # until then there is always one thread
        settings["threads"] = 1
    pixels = reformatter.reformat(frame, **settings).to_ndarray()
    return np.ascontiguousarray(_upright(pixels, _display_matrix(frame)))


def _display_matrix(frame: Any) -> NDArray[np.int32] | None:
    from av.sidedata.sidedata import Type

    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # another piece of side data is of a kind that this PyAV does not know
        return None
    return None if data is None else np.frombuffer(data, np.int32)


def _upright(pixels: NDArray[np.uint8], matrix: NDArray[np.int32] | None) -> NDArray[np.uint8]:
    """Turned by the nearest multiple of 90 degrees and mirrored as a display matrix says.

    Its numbers 0, 1, 3 and 4 take the column and row of a source pixel to those of its place.
    """
    if matrix is None:
        return pixels
    columns, rows = matrix[0], matrix[4]
    if abs(int(matrix[1])) > abs(int(matrix[0])):
        pixels = pixels.transpose(1, 0, 2)
        columns, rows = matrix[3], matrix[1]
    if columns < 0:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if rows < 0 else pixels
