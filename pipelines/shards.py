"""Videos on their way into shards (cache.py says what those are), decoded by several processes."""

import hashlib
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from smtc.errors import UserError
from smtc.pipelines.cache import Shard, source_of
from smtc.pipelines.clips import Video
from smtc.pipelines.images import BadFrame, read_image
from smtc.pipelines.processes import processes
from smtc.pipelines.video_files import iterate_frames, read_frames
from smtc.pipelines.views import resize_frame

_LOG = logging.getLogger("smtc")
PARTIAL = ".partial"
"""What the name of an unfinished file ends in."""
_PIECE = 64  # image files that a process packs at a time


def write_shards(
    videos: Iterable[tuple[Video, tuple[int, int]]],
    packed: Path,
    *,
    antialias: bool,
    workers: int,
    progress: Callable[[int], object],
) -> Generator[Shard, None, None]:
    """Pack each video at its size (h, w) into a file of the folder `packed`, and yield what it is.

    A video appears under its name when it is whole and on the disk. Reports the unreadable frames
    once each, and to `progress` how many more frames are packed. The processes end when the
    iterator is closed. `UserError`: the files of a video change meanwhile; `OSError`: one of ours
    cannot be written; `BrokenProcessPool`: a process was killed.
    """
    running: dict[Future[_Packed], tuple[_Writing, _Piece]] = {}

    def some_done() -> Iterator[Shard]:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            writing, piece = running.pop(future)
            writing.add(piece, *future.result())
            progress(len(piece.video.frames))
            if writing.missing == 0:
                yield writing.finish()

    with processes(workers, _prepare) as pool:
        for video, size in videos:
            writing = _Writing(video, size, packed)
            writing.create()
            for piece in writing.pieces(antialias):
                if len(running) >= 2 * workers:
                    yield from some_done()
                running[pool.submit(_pack, piece)] = writing, piece
        while running:
            yield from some_done()


def packed_size(video: Video, size: int, *, keep_aspect: bool) -> tuple[int, int]:
    """Height and width that the frames of `video` get.

    With `keep_aspect` the first readable frame's shorter side becomes `size`, else both sides do.
    """
    for position in range(len(video.frames)) if keep_aspect else ():
        frame = _read_one(video, position)
        if not isinstance(frame, BadFrame):
            height, width = frame.shape[:2]
            scale = size / min(height, width)
            return round(height * scale), round(width * scale)
    return size, size


def is_readable(video: Video, position: int) -> bool:
    """Whether a frame can be decoded."""
    return not isinstance(_read_one(video, position), BadFrame)


@dataclass(frozen=True)
class _Piece:
    """Consecutive frames of a video, and where they go."""

    video: Video
    """With these frames only."""
    first: int
    path: Path
    offset: int
    size: tuple[int, int]
    antialias: bool


_Packed = tuple[list[int], dict[int, BadFrame]]
"""The checksums of a piece's frames and, by place in the piece, its unreadable ones."""


@dataclass
class _Writing:
    """A video of which some pieces are packed."""

    video: Video
    size: tuple[int, int]
    packed: Path
    source: str = ""
    header: int = 0
    """Bytes."""
    missing: int = 0
    """Frames."""
    checksums: dict[int, int] = field(default_factory=dict)
    bad: dict[int, BadFrame] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """A short and plain name for any video, and another one for another video."""
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", self.video.name)[:64]
        told = hashlib.sha256(os.fsencode(self.video.name)).hexdigest()[:12]
        return f"{plain}-{told}.npy"

    @property
    def path(self) -> Path:
        """While it is being written."""
        return self.packed / (self.file + PARTIAL)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.video.frames), *self.size, 3

    def create(self) -> None:
        """The file with its header and without its frames."""
        self.source, self.missing = source_of(self.video), len(self.video.frames)
        with self.path.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            self.header = file.tell()
            file.truncate(self.header + math.prod(self.shape))

    def pieces(self, antialias: bool) -> Iterator[_Piece]:
        """A video file is one piece, for within it decoding would begin at an earlier keyframe."""
        count = _PIECE if self.video.container is None else len(self.video.frames)
        for first in range(0, len(self.video.frames), count):
            yield _Piece(
                video=_part(self.video, first, count),
                first=first,
                path=self.path,
                offset=self.header + first * math.prod(self.shape[1:]),
                size=self.size,
                antialias=antialias,
            )

    def add(self, piece: _Piece, checksums: list[int], bad: dict[int, BadFrame]) -> None:
        known = {str(error) for error in self.bad.values()}  # all frames of a video file have one
        for message in dict.fromkeys(map(str, bad.values())):
            if message not in known:
                _LOG.warning("%s", message)
        self.checksums |= {piece.first + number: value for number, value in enumerate(checksums)}
        self.bad |= {piece.first + number: error for number, error in bad.items()}
        self.missing -= len(checksums)

    def finish(self) -> Shard:
        """Give the whole file its name."""
        name = self.video.name
        if source_of(self.video) != self.source:
            raise UserError(
                f"The files of {name} changed while they were packed; run the same command again."
            )
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.rename(self.packed / self.file)
        frames, height, width, _ = self.shape
        return Shard(
            video=name,
            file=self.file,
            bytes=self.header + math.prod(self.shape),
            frames=frames,
            height=height,
            width=width,
            crc32="".join(f"{self.checksums[position]:08x}" for position in range(frames)),
            bad={str(position): error.reason for position, error in sorted(self.bad.items())},
            source=self.source,
        )


def _prepare() -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _pack(piece: _Piece) -> _Packed:
    checksums, bad = [], {}
    pixels = np.empty((*piece.size, 3), np.uint8)
    with piece.path.open("r+b") as file:  # no map: a full disk would end the process
        file.seek(piece.offset)
        for number, frame in enumerate(_read(piece.video)):
            if isinstance(frame, BadFrame):
                bad[number] = frame
                pixels.fill(0)
            else:
                resize_frame(frame, piece.size, antialias=piece.antialias, out=pixels)
            checksums.append(zlib.crc32(pixels.data))
            file.write(pixels.data)
    return checksums, bad


def _read(video: Video) -> Iterator[NDArray[np.uint8] | BadFrame]:
    """The frames one after the other, or why one of them cannot be read."""
    if video.container is None:
        yield from (_read_one(video, position) for position in range(len(video.frames)))
        return
    position = first = 0
    while position < len(video.frames):
        try:
            for frame in iterate_frames(video.container, video.timestamps[first:]):
                yield frame
                position += 1
        except BadFrame as error:
            # A frame counts as bad that cannot be read by itself either.
            if position == first:
                yield error
                position += 1
            first = position


def _read_one(video: Video, position: int) -> NDArray[np.uint8] | BadFrame:
    try:
        if video.container is None:
            return read_image(video.frames[position])
        return read_frames(video.container, video.timestamps[position : position + 1])[0]
    except BadFrame as error:
        return error


def _part(video: Video, first: int, count: int) -> Video:
    chosen = slice(first, first + count)
    return Video(video.name, video.frames[chosen], video.container, video.timestamps[chosen])
