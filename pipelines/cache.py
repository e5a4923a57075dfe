"""Packed frames: a data folder's frames, decoded and resized once, read through memory maps.

`smtc data pack` (packing.py) writes into `<cache folder>/packed/`

* a `.npy` file a video, uint8 `[frames,h,w,3]` RGB. NumPy has kept this format for long, maps it
  into memory and reads any frame of it without reading the others; a clip's frames lie far apart,
  so a tar (WebDataset) would have to be read from its start or be given an index of our own;
* `index.json`, last of all: the settings, and of each video its shape, its files as they were, the
  CRC-32 of each frame and the frames that could not be read. Without it a folder is unfinished.
"""

import functools
import hashlib
import json
import os
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smtc.config import DataConfig
from smtc.errors import UserError
from smtc.pipelines.clips import Clip, Video
from smtc.pipelines.images import BadFrame

PACKED = "packed"
INDEX = "index.json"
VERSION = 1
_OPEN_MAPS = 64  # each holds a file descriptor


class Unpacked(UserError):  # noqa: N818
    """There are no packed frames, or packing them was not finished."""


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How frames were packed."""

    size: int
    """Pixels on a side, or with `keep_aspect` on the shorter one."""
    keep_aspect: bool = False
    antialias: bool = False
    root: str = ""
    """The data folder, as it was called then."""

    @property
    def flags(self) -> str:
        """The settings as `smtc data pack` takes them."""
        text = f"--size {self.size}"
        for name in ("keep_aspect", "antialias"):
            text += f" --{name.replace('_', '-')}" * getattr(self, name)
        return text


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A packed video, as the index describes it."""

    video: str
    file: str
    bytes: int
    """Of the file, with its header."""
    frames: int
    height: int
    width: int
    crc32: str
    """Eight hexadecimal digits a frame."""
    bad: dict[str, str] = field(default_factory=dict)
    """Position to reason of the frames that could not be read; they are black."""
    source: str
    """What `source_of` said when the video was packed."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the array: frames, height, width, 3."""
        return self.frames, self.height, self.width, 3

    def is_sound(self) -> bool:
        """Whether the values can be those of a shard, whoever wrote the index."""
        numbers = (self.bytes, self.frames, self.height, self.width)
        digits = bytes.fromhex(self.crc32)  # ValueError, TypeError
        return (
            all(type(number) is int and number > 0 for number in numbers)
            and len(digits) == 4 * self.frames
            and type(self.video) is type(self.source) is str
            and Path(self.file).name == self.file
            and isinstance(self.bad, dict)
            and all(0 <= int(position) < self.frames for position in self.bad)
        )

    def checksum(self, position: int) -> int:
        """The CRC-32 of a frame."""
        return int(self.crc32[8 * position : 8 * position + 8], 16)


def source_of(video: Video) -> str:
    """A hash of the names, sizes and times of a video's files: another one, other frames.

    Times count in whole seconds, which every file system and archive keeps.
    """
    files = video.frames if video.container is None else (video.container,)
    told = hashlib.sha256(str(len(video.frames)).encode())
    for file in files:
        told.update(b"\0" + os.fsencode(os.path.basename(file)))
        try:
            status = os.stat(file)
        except OSError:
            continue  # missing: a file that comes back is a change
        told.update(f"\0{status.st_size}\0{int(status.st_mtime)}".encode())
    return told.hexdigest()[:32]


def read_index(packed: Path) -> tuple[PackSettings, list[Shard]] | None:
    """What the index of `packed` says; None where there is none, `UserError` for a damaged one."""
    path = packed / INDEX
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    return parse_index(told, path)


def parse_index(told: Any, path: Path) -> tuple[PackSettings, list[Shard]]:
    """Settings and videos from the JSON values of the file `path`."""
    try:
        if told["version"] == VERSION:
            shards = [Shard(**shard) for shard in told["videos"]]
            if all(shard.is_sound() for shard in shards):
                return PackSettings(**told["settings"]), shards
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged; delete {path.parent} and pack again.") from None
    raise UserError(
        f"{path} was written by another version of smtc; delete {path.parent} and pack again."
    )


def open_packed(
    folder: str | Path,
    videos: Sequence[Video],
    config: DataConfig,
    size: tuple[int, int],
    *,
    known_bad: Mapping[str, str] | None = None,
) -> "PackedFrames":
    """The packed frames of `videos` under the cache folder `folder`, for views of `size` (H, W).

    Clips that touch a file of `known_bad` (path to reason) are refused with `BadFrame`, as
    `FileFrames` does. Of the original files only names, sizes and times are looked at (for 100 000
    frames 0.3 s on a local disk), so they have to stay where `find_videos` finds them.

    Raises `Unpacked` where nothing is packed, and `UserError` where what is packed does not serve:
    a video is missing or its files have changed; the frames are smaller than the views; `config`
    wants centred crops of squashed frames, or another filter; a shard is missing or cut short.
    """
    packed = Path(folder) / PACKED
    index = read_index(packed)
    if index is None:
        raise Unpacked(
            f"No finished packed frames are in {packed}; run: {_command(config, folder)}"
        )
    settings, shards = index
    _refuse_settings(settings, config, packed)
    known = {shard.video: shard for shard in shards}
    changed = [
        video.name
        for video in videos
        if video.name not in known or known[video.name].source != source_of(video)
    ]
    if changed:
        raise UserError(
            f"{len(changed)} of {len(videos)} videos ({changed[0]}, say) are new or have changed "
            f"since {packed} was written; pack them: {_command(config, folder, settings)}"
        )
    wanted = {video.name: known[video.name] for video in videos}
    for shard in wanted.values():
        if shard.height < size[0] or shard.width < size[1]:
            raise UserError(
                f"Frames were packed at {shard.height}x{shard.width}, smaller than the views "
                f"({size[0]}x{size[1]}); delete {packed} and pack with --size {max(size)}."
            )
    return PackedFrames(packed, wanted, known_bad or {})


def _refuse_settings(settings: PackSettings, config: DataConfig, packed: Path) -> None:
    if config.resize == "crop" and not settings.keep_aspect:
        raise UserError(
            f"The frames in {packed} were squashed, which data.resize=crop does not want; "
            "delete that folder and pack with --keep-aspect, or use data.resize=squash."
        )
    if config.antialias != settings.antialias:
        did, wants = ("with", "without") if settings.antialias else ("without", "with")
        raise UserError(
            f"The frames in {packed} were packed {did} --antialias and data.antialias asks for "
            f"frames {wants} it; delete that folder and pack again, or change data.antialias."
        )


def _command(config: DataConfig, folder: str | Path, settings: PackSettings | None = None) -> str:
    """What to type to pack the frames that `config` wants."""
    words = ["smtc", "data", "pack", str(config.root)]
    words += ["--output", str(folder)] if config.cache is not None else []
    flags = settings.flags if settings else ""
    if not settings and config.resize == "crop":
        flags += " --keep-aspect"
    if not settings and config.antialias:
        flags += " --antialias"
    return " ".join([shlex.join(words), *flags.split()])


class PackedFrames:
    """Clips from packed frames. It may be pickled and used after a fork and by threads.

    A frame's checksum is compared when this process first reads it.
    """

    def __init__(
        self, packed: Path, shards: Mapping[str, Shard], known_bad: Mapping[str, str]
    ) -> None:
        self._packed, self._shards, self._known_bad = packed, dict(shards), dict(known_bad)
        self._checked: dict[str, NDArray[np.bool_]] = {}
        self._open = functools.partial(_open, packed, self._shards)
        self._kept_open = functools.lru_cache(_OPEN_MAPS)(self._open)
        for shard in self._shards.values():
            _refuse_other_size(packed, shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._packed, self._shards, self._known_bad)

    @property
    def total_bytes(self) -> int:
        """Of the pixels of all frames."""
        return sum(int(np.prod(shard.shape)) for shard in self._shards.values())

    def read(self, clip: Clip) -> NDArray[np.uint8]:
        """A copy of the clip's frames, uint8 `[T,h,w,3]`.

        `BadFrame` where one could not be read when it was packed, `UserError` for a damaged shard.
        """
        self.refuse_bad(clip)
        frames = self._kept_open(clip.video.name)[list(clip.frames)]
        self._check(clip.video.name, clip.frames, frames)
        return frames

    def refuse_bad(self, clip: Clip) -> None:
        """Raise `BadFrame` for a clip with an unreadable frame; reads no pixels."""
        video, bad = clip.video, self._shards[clip.video.name].bad
        for position, path in zip(clip.frames, clip.paths, strict=True):
            file = video.container or path
            reason = self._known_bad.get(file, bad.get(str(position)))
            if reason is not None:
                raise BadFrame(file, reason)

    def arrays(self) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Each video's name and frames, checked: a read-only map, uint8 `[frames,h,w,3]`."""
        for name, shard in self._shards.items():
            array = self._open(name)
            self._check(name, range(shard.frames), array)
            yield name, array

    def _check(self, name: str, positions: Sequence[int], frames: NDArray[np.uint8]) -> None:
        shard = self._shards[name]
        checked = self._checked.setdefault(name, np.zeros(shard.frames, bool))
        for position, frame in zip(positions, frames, strict=True):
            if not checked[position]:
                if zlib.crc32(frame) != shard.checksum(position):
                    raise _damaged(self._packed, shard, f"frame {position} has another checksum")
                checked[position] = True


def _open(packed: Path, shards: Mapping[str, Shard], name: str) -> NDArray[np.uint8]:
    shard = shards[name]
    path = packed / shard.file
    _refuse_other_size(packed, shard)  # reading a map beyond its file's end ends the process
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except Exception:  # NumPy's reader of headers raises many kinds
        raise _damaged(packed, shard, "its header is broken") from None
    if array.shape != shard.shape or array.dtype != np.uint8:
        raise _damaged(packed, shard, "its header names another shape")
    return np.asarray(array)


def _refuse_other_size(packed: Path, shard: Shard) -> None:
    path = packed / shard.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{path}, the packed frames of {shard.video}, is missing; run the same smtc data "
            "pack again, which mends it."
        ) from None
    if size != shard.bytes:
        raise _damaged(packed, shard, f"it has {size} bytes instead of {shard.bytes}")


def _damaged(packed: Path, shard: Shard, reason: str) -> UserError:
    return UserError(
        f"{packed / shard.file}, the packed frames of {shard.video}, is damaged ({reason}); "
        "delete it and run the same smtc data pack again, which mends it."
    )
