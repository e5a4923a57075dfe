"""A video to be read from its first frame to its last: a folder of frames, one image or a file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.pipelines.clips import find_videos
from smtc.pipelines.images import FRAME_SUFFIXES, BadFrame, read_image
from smtc.pipelines.video_files import (
    VIDEO_SUFFIXES,
    frame_rate,
    iterate_frames,
    read_timestamps,
)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class FrameSource:
    """A video's frames, read anew at each iteration; one is held at a time."""

    name: str
    frames: Sequence[str]
    """Paths of image files; empty for a video file."""
    container: str | None = None
    timestamps: Sequence[int] = ()
    rate: float | None = None
    """Frames a second, where the video says so."""

    def __len__(self) -> int:
        return len(self.timestamps) if self.container else len(self.frames)

    def __iter__(self) -> Iterator[Pixels]:
        """RGB uint8 `[h,w,3]`; a `UserError` for one that cannot be read or is of another size than
        the first.
        """
        first: tuple[int, ...] | None = None
        for place, frame in enumerate(self._read()):
            first = first or frame.shape
            if frame.shape != first:
                name = self.container and f"frame {place} of {self.container}"
                raise UserError(
                    f"{name or self.frames[place]} is {frame.shape[1]}x{frame.shape[0]}, the first "
                    f"frame {first[1]}x{first[0]}; frames of a video must be of one size."
                )
            yield frame

    def _read(self) -> Iterator[Pixels]:
        if self.container:
            yield from iterate_frames(self.container, self.timestamps)
        for path in self.frames:
            yield read_image(path)


def open_source(path: str | Path) -> FrameSource:
    """The video at `path`: a folder of JPEG or PNG frames, one such image, or a video file.

    Folders are listed and files demuxed, so that what is missing or cut short is found before any
    work. Raises `UserError` for a path that is none of these, and for a folder of several videos.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise UserError(
            f"There is no {path}; give a folder of JPEG or PNG frames, or a video file."
        )
    suffix, name = path.suffix.lower(), path.stem or path.name
    if suffix in FRAME_SUFFIXES:
        return FrameSource(name, (str(path),))
    if suffix not in VIDEO_SUFFIXES:
        raise UserError(
            f"{path} is neither a folder of frames, nor an image, nor a video file "
            f"({', '.join(VIDEO_SUFFIXES)}); convert it to one of these."
        )
    try:
        times = read_timestamps(path)
        return FrameSource(name, (), str(path), times, frame_rate(path))
    except BadFrame as error:
        raise BadFrame(path, f"{error.reason}; give a whole video file or its frames") from None


def _from_folder(folder: Path) -> FrameSource:
    videos = find_videos(folder)
    if len(videos) > 1:
        raise UserError(
            f"{folder} holds {len(videos)} videos; "
            f"give the folder of one, such as {Path(videos[0].frames[0]).parent}."
        )
    return FrameSource(videos[0].name, videos[0].frames)
