"""What `smtc data inspect` found in a data folder, for the loaders and for the next inspection."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smtc.errors import UserError
from smtc.pipelines.clips import Video
from smtc.pipelines.video_files import compact

_LOG = logging.getLogger("smtc")
MANIFEST = "manifest.json"
_VERSION = 1

Stamp = tuple[int, int]
"""Size and time of change (ns) of a file."""


@dataclass(frozen=True)
class BrokenFile:
    """A file that is no whole frame, or no whole video."""

    reason: str
    stamp: Stamp | None
    """None when the file was missing or could not be opened, which may have other causes."""


@dataclass(frozen=True, kw_only=True)
class VideoRecord:
    """A video as it was when it was read."""

    name: str
    path: str
    """Relative to the data folder: the folder of the frames, or the video file."""
    frames: tuple[str, ...] = ()
    """File names; none for a video file."""
    length: int
    """Frames."""
    bytes: int
    fingerprint: str
    """Follows names, sizes and times of the files; empty when one could not be opened."""
    sizes: dict[str, int]
    """`<width>x<height>` to how many frames have it."""
    broken: dict[str, BrokenFile] = field(default_factory=dict)
    """By file name."""
    misnamed: int = 0
    """PNG files called JPEG and the reverse, which are read all the same."""
    codec: str = ""
    """Of a video file."""
    timestamps: Sequence[int] = ()
    """Of a video file, as in `Video`."""

    @property
    def is_file(self) -> bool:
        """Whether it is a video file and no folder of images."""
        return not self.frames


@dataclass(frozen=True)
class Manifest:
    """The videos of a data folder; `root` is the folder as the caller names it."""

    root: Path
    videos: tuple[VideoRecord, ...]

    def known_bad(self, videos: Sequence[Video]) -> dict[str, str]:
        """Path to reason of the broken files of `videos` that have not changed since.

        Files that could not be opened are not among them, as they may be readable by now.
        """
        wanted = {(video.name, video.container is not None): video for video in videos}
        bad = {}
        for record in self.videos:
            video = wanted.get((record.name, record.is_file))
            if video is None or not record.broken:
                continue
            paths = video.frames if video.container is None else (video.container,)
            for path in paths:
                broken = record.broken.get(os.path.basename(path))
                if broken and broken.stamp and broken.stamp == stamp_of(path):
                    bad[path] = broken.reason
        return bad

    def of_mixed_sizes(self) -> list[str]:
        """The names of the folders whose frames differ in size."""
        return [r.name for r in self.videos if len(r.sizes) > 1 and not r.is_file]

    def timestamps(self) -> dict[str, Sequence[int]]:
        """Path to timestamps of the video files that have not changed since."""
        known = {}
        for record in self.videos:
            path = os.path.join(self.root, record.path)
            if record.timestamps and record.fingerprint == fingerprint([(path, stamp_of(path))]):
                known[path] = record.timestamps
        return known


def load_manifest(folder: str | Path, root: str | Path, *, name: str = MANIFEST) -> Manifest | None:
    """What is known of the data folder `root`, from the cache folder `folder`.

    None where there is no manifest, and, with a line in the log, where it is damaged, of another
    version of smtc or of another data folder.
    """
    path = Path(folder) / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        why = _unusable(content, root)
        videos = () if why else tuple(_from_json(entry) for entry in content["videos"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        why, videos = f"cannot be read ({error.strerror})", ()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        why, videos = "is damaged", ()
    if why:
        _LOG.warning("%s %s and is ignored; smtc data inspect writes a new one.", path, why)
        return None
    return Manifest(Path(root), videos)


def _unusable(content: Any, root: str | Path) -> str | None:
    if content["version"] != _VERSION:
        return "is of another version of smtc"
    if content["root"] != str(Path(root).resolve()):
        return f"tells of another data folder ({content['root']})"
    return None


def save_manifest(folder: Path, manifest: Manifest, *, name: str = MANIFEST) -> Path:
    """Write it whole or not at all; `UserError` when `folder` cannot be written."""
    path = folder / name
    partial = folder / f".{name}.{os.getpid()}"
    head = {"version": _VERSION, "root": str(manifest.root.resolve())}
    entries = ",\n".join(json.dumps(_to_json(video)) for video in manifest.videos)
    text = f'{json.dumps(head)[:-1]}, "videos": [\n{entries}\n]}}\n'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); choose another --output folder."
        ) from None
    return path


def stamp_of(path: str | Path) -> Stamp | None:
    """Size and time of change of the file; None where there is none to be seen."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return None


def fingerprint(files: Iterable[tuple[str, Stamp | None]]) -> str:
    """A hash of the names and stamps of files; empty when one has no stamp."""
    told = hashlib.sha256()
    for path, stamp in files:
        if stamp is None:
            return ""
        told.update(b"%s\0%d\0%d\0" % (os.fsencode(os.path.basename(path)), *stamp))
    return told.hexdigest()[:16]


def _to_json(record: VideoRecord) -> dict[str, Any]:
    """File names are joined by the one sign that none can hold, timestamps told by their steps."""
    entry = {**vars(record), "frames": "/".join(record.frames)}
    entry["broken"] = {name: [bad.reason, bad.stamp] for name, bad in record.broken.items()}
    entry["timestamps"] = _steps(record.timestamps)
    return {key: value for key, value in entry.items() if value or key == "length"}


def _from_json(entry: dict[str, Any]) -> VideoRecord:
    frames = entry.get("frames", "")
    broken = {
        str(name): BrokenFile(str(reason), stamp and (int(stamp[0]), int(stamp[1])))
        for name, (reason, stamp) in entry.get("broken", {}).items()
    }
    length, timestamps = int(entry["length"]), entry.get("timestamps", [])
    return VideoRecord(
        name=str(entry["name"]),
        path=str(entry["path"]),
        frames=tuple(frames.split("/")) if frames else (),
        length=length,
        bytes=int(entry.get("bytes", 0)),
        fingerprint=str(entry.get("fingerprint", "")),
        sizes={str(size): int(count) for size, count in entry.get("sizes", {}).items()},
        broken=broken,
        misnamed=int(entry.get("misnamed", 0)),
        codec=str(entry.get("codec", "")),
        timestamps=_from_steps(timestamps, length) if timestamps else (),
    )


def _steps(times: Sequence[int]) -> list[int]:
    """The first time, then step and how often it is taken, in turns."""
    if not times:
        return []
    steps = (later - earlier for earlier, later in itertools.pairwise(times))
    runs = ((step, sum(1 for _ in run)) for step, run in itertools.groupby(steps))
    return [times[0], *itertools.chain.from_iterable(runs)]


def _from_steps(told: Sequence[int], length: int) -> Sequence[int]:
    first, *runs = told
    if 1 + sum(runs[1::2]) != length:  # before so many are made
        raise ValueError("another number of timestamps than of frames")
    steps = itertools.chain.from_iterable(map(itertools.repeat, runs[::2], runs[1::2]))
    return compact(list(itertools.accumulate(steps, initial=first)))
