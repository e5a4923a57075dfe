"""Which frames make a clip: videos in a folder, and a sampler that is pure in the index."""

import functools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.pipelines.images import FRAME_SUFFIXES
from smtc.pipelines.keyed import Stream, generator

_LOG = logging.getLogger("smtc")


@dataclass(frozen=True)
class Video:
    """A video: its name and its frames in the order in which they are shown."""

    name: str
    frames: tuple[str, ...]
    """Paths of image files; of a video file `<path>#<position>`, which no file is called."""
    container: str | None = None
    """The video file, or None for a folder of images."""
    timestamps: tuple[int, ...] = ()
    """Of a video file: presentation times of its frames, ascending, in the stream's time base."""


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


def find_videos(root: str | Path) -> list[Video]:
    """The videos under `root`, sorted by name, their frames in natural order.

    Looked for in this order: the DAVIS layout (`JPEGImages/480p`, or else another resolution),
    the YouTube-VOS layout (`train/JPEGImages` or `JPEGImages`), folders of frames in `root`
    itself, and frames in `root` itself (one video). Frames are JPEG or PNG files. A missing or
    unreadable folder and one without videos are a `UserError`.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {what}; give a folder of videos with --data.")
    try:
        videos = _search(root)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from None
    if videos:
        return videos
    raise UserError(
        f"No videos in {root}: looked for folders of JPEG or PNG frames in JPEGImages/480p "
        "(DAVIS), train/JPEGImages and JPEGImages (YouTube-VOS) and the folder itself."
    )


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
    found = ((inner.name, _frames_in(inner)) for inner in folder.iterdir() if inner.is_dir())
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
