"""Which frames make a clip: videos in a folder, and a sampler that is pure in the index."""

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.pipelines.images import FRAME_SUFFIXES, BadFrame
from smtc.pipelines.keyed import Stream, generator
from smtc.pipelines.video_files import VIDEO_SUFFIXES, compact, read_timestamps
from smtc.progress import track

_LOG = logging.getLogger("smtc")


@dataclass(frozen=True)
class NumberedFrames(Sequence[str]):
    """The names `<path>#<position>` of a video file's frames, each made when it is asked for."""

    path: str
    positions: range

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "NumberedFrames": ...
    def __getitem__(self, index: int | slice) -> "str | NumberedFrames":
        if isinstance(index, slice):
            return NumberedFrames(self.path, self.positions[index])
        return f"{self.path}#{self.positions[index]}"


@dataclass(frozen=True)
class Video:
    """A video: its name and its frames in the order in which they are shown."""

    name: str
    frames: Sequence[str]
    """Paths of image files; of a video file `<path>#<position>`, which no file is called."""
    container: str | None = None
    """The video file, or None for a folder of images."""
    timestamps: Sequence[int] = ()
    """Of a video file: presentation times of its frames, ascending, in the stream's time base; a
    range where they are evenly spaced.
    """


@dataclass(frozen=True)
class Clip:
    """The frames of one sample."""

    index: int
    """The global sample index."""
    video: Video
    start: int
    gap: int
    frames: tuple[int, ...]
    """Positions in the video."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The files of the frames."""
        return tuple(self.video.frames[position] for position in self.frames)


def find_videos(
    root: str | Path,
    *,
    containers: bool = False,
    timestamps: Mapping[str, Sequence[int]] | None = None,
) -> list[Video]:
    """The videos under `root`, sorted by name, their frames in natural order.

    Looked for in this order: the DAVIS layout (`JPEGImages/480p`, or else another resolution),
    the YouTube-VOS layout (`train/JPEGImages` or `JPEGImages`), folders of frames in `root`
    itself, frames in `root` itself (one video), and with `containers` video files in `root` and
    its subfolders. Frames are JPEG or PNG files. The times of a video file's frames are read from
    it unless `timestamps` has them for its path; files that cannot be read are named in the log
    and left out. A missing or unreadable folder and one without videos are a `UserError`.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {what}; give a folder of videos.")
    try:
        videos = _search(root)
        files = find_video_files(root) if containers or not videos else {}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from None
    if videos and files:
        _LOG.warning(
            "Left out in %s, where folders of frames come first: %s", root, _told(files.values())
        )
    if videos:
        return videos
    if files and containers:
        return _read_video_files(root, files, timestamps or {})
    also = f", and for video files ({', '.join(VIDEO_SUFFIXES)})" if containers else ""
    one = min(files.values(), default="")
    hint = f" It holds {_told(files.values())}; name one, such as {one}." if files else ""
    raise UserError(
        f"No videos in {root}: looked for folders of JPEG or PNG frames in JPEGImages/480p "
        "(DAVIS), train/JPEGImages and JPEGImages (YouTube-VOS) and the folder itself"
        f"{also}.{hint}"
    )


def find_video_files(root: str | Path) -> dict[str, str]:
    """Name to path of the video files in `root` and in its subfolders, sorted by name.

    The name is the path below `root`, with its suffix only where it is not unique without.
    """
    with os.scandir(root) as entries:
        visible = [entry.path for entry in entries if not entry.name.startswith(".")]
    inner = [os.path.basename(path) for path in visible if os.path.isdir(path)]
    found: set[str] = set()
    for folder in ("", *inner):
        with os.scandir(os.path.join(root, folder)) as entries:
            found.update(os.path.join(folder, entry.name) for entry in entries if _is_video(entry))
    short = {file: os.path.splitext(file)[0] for file in found}
    count = Counter(short.values())
    names = {
        file if count[name] > 1 or name in found else name: os.path.join(root, file)
        for file, name in short.items()
    }
    return dict(sorted(names.items()))


def _search(root: Path) -> list[Video]:
    images = root / "JPEGImages"
    resolutions = sorted(images.iterdir()) if images.is_dir() else []
    for folder in (images / "480p", *resolutions, root / "train" / "JPEGImages", images, root):
        if videos := _videos_in(folder):
            return videos
    frames = _frames_in(root)
    return [Video(root.absolute().name, frames)] if frames else []


def _videos_in(folder: Path) -> list[Video]:
    """The subfolders of `folder` that hold frames."""
    if not folder.is_dir():
        return []
    inside = (inner for inner in folder.iterdir() if not inner.name.startswith("."))
    found = ((inner.name, _frames_in(inner)) for inner in inside if inner.is_dir())
    return sorted((Video(name, frames) for name, frames in found if frames), key=_by_name)


def _by_name(video: Video) -> str:
    return video.name


def _frames_in(folder: Path) -> tuple[str, ...]:
    """The image files directly in `folder`, 2 before 10."""
    names = (name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES))
    seen = sorted((name for name in names if not name.startswith(".")), key=_natural)
    return tuple(os.path.join(folder, name) for name in seen)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Digits compare as numbers; the name itself breaks ties such as 1 and 01."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if part.isdecimal() else part.lower() for part in parts], name


def _is_video(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or not entry.name.lower().endswith(VIDEO_SUFFIXES):
        return False
    # A link that leads nowhere counts, to be named as missing; a pipe would be waited for.
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry))


def _read_video_files(
    root: Path, files: Mapping[str, str], known: Mapping[str, Sequence[int]]
) -> list[Video]:
    """The readable ones of `files` (name to path); reads the times that are not `known`."""

    def read(path: str) -> Sequence[int] | BadFrame:
        try:
            return read_timestamps(path)
        except BadFrame as error:
            return error

    times = {path: compact(known[path]) for path in files.values() if path in known}
    errors: list[BadFrame] = []
    if new := [path for path in files.values() if path not in times]:
        with ThreadPoolExecutor() as pool:
            results = track(pool.map(read, new), total=len(new), title="video files", unit="file")
            for path, result in zip(new, results, strict=True):
                if isinstance(result, BadFrame):
                    _LOG.warning("%s; the video is left out", result)
                    errors.append(result)
                else:
                    times[path] = result
    if not times:
        raise UserError(
            f"None of the {len(files)} video files in {root} can be read; one is {errors[0]}."
        )
    return [
        Video(name, NumberedFrames(path, range(len(times[path]))), path, times[path])
        for name, path in files.items()
        if path in times
    ]


def _told(paths: Collection[str]) -> str:
    """Such as `3 video files (a.mp4, b.mp4, …)`."""
    names = ", ".join([os.path.basename(path) for path in paths][:2])
    plural = "s" if len(paths) > 1 else ""
    return f"{len(paths)} video file{plural} ({names}{', …' if len(paths) > 2 else ''})"


class ClipSampler:
    """Clips by global sample index, without state: nothing depends on rank, worker or history.

    An epoch is one random permutation of the usable videos, one clip of each; the start of a clip
    is uniform. In a video too short for the wanted gap, the largest gap that fits is taken.
    Videos with fewer than `frames` frames are left out with one warning; none left is a
    `UserError`.
    """

    def __init__(
        self, videos: Sequence[Video], *, frames: int, gap: int, random_gap: bool, seed: int
    ) -> None:
        self.videos = tuple(video for video in videos if len(video.frames) >= frames)
        self.frames, self.gap, self.random_gap, self.seed = frames, gap, random_gap, seed
        short = [video.name for video in videos if len(video.frames) < frames]
        if not self.videos:
            raise UserError(
                f"All {len(videos)} videos have fewer than {frames} frames, which a clip needs; "
                "lower data.frames or give longer videos."
            )
        if short:
            names = ", ".join(short[:5]) + (", …" if len(short) > 5 else "")
            _LOG.warning(
                "%d of %d videos have fewer than %d frames and are left out: %s",
                *(len(short), len(videos), frames, names),
            )

    def clip(self, index: int, attempt: int = 0) -> Clip:
        """The clip of sample `index`; `attempt` 1, 2, … are replacements, all videos in turn."""
        video = self.videos[self._video(index, attempt)]
        rng = generator(self.seed, Stream.CLIP, index, attempt)
        gap = int(rng.integers(1, self.gap + 1)) if self.random_gap else self.gap
        if self.frames > 1:
            gap = min(gap, (len(video.frames) - 1) // (self.frames - 1))
        span = (self.frames - 1) * gap
        start = int(rng.integers(len(video.frames) - span))
        return Clip(index, video, start, gap, tuple(range(start, start + span + 1, gap)))

    def _video(self, index: int, attempt: int) -> int:
        count = len(self.videos)
        if attempt == 0:
            epoch, position = divmod(index, count)
            return int(_permutation(self.seed, Stream.EPOCH, epoch, count)[position])
        order = _permutation(self.seed, Stream.REPLACEMENT, index, count)
        return int(order[(attempt - 1) % count])


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, stream: Stream, key: int, count: int) -> NDArray[np.int64]:
    return generator(seed, stream, key).permutation(count)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which samples one process draws in which steps.

    The ranks of a step draw consecutive global samples, and so do consecutive steps. After a change
    of `world`, or of `batch`, a run goes on without a gap at the same `start_sample`.
    """

    batch: int
    """Clips a step and rank."""
    steps: int
    """The step to end before."""
    start_step: int = 0
    start_sample: int | None = None
    """The first global sample of `start_step`; none: as if all steps before had been like this."""
    rank: int = 0
    world: int = 1

    @property
    def remaining(self) -> range:
        """The steps."""
        return range(self.start_step, max(self.start_step, self.steps))

    def samples(self, step: int) -> range:
        """The global sample indices of this rank in `step`."""
        whole = self.batch * self.world
        start = self.start_step * whole if self.start_sample is None else self.start_sample
        first = start + (step - self.start_step) * whole + self.rank * self.batch
        return range(first, first + self.batch)
