"""Writing packed frames (cache.py says what they are): `smtc data pack`.

Processes decode pieces of videos and write them into `<video>.npy.partial`; a whole video is
renamed and added to `finished.jsonl`. A later call goes on from that file, whenever the former one
was killed. At the end `index.json` takes its place.
"""

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smtc.errors import UserError
from smtc.pipelines.cache import (
    INDEX,
    PACKED,
    VERSION,
    PackSettings,
    Shard,
    parse_index,
    read_index,
    source_of,
)
from smtc.pipelines.clips import Video, find_videos
from smtc.pipelines.manifest import load_manifest
from smtc.pipelines.places import cache_folder
from smtc.pipelines.shards import PARTIAL, is_readable, packed_size, write_shards
from smtc.progress import bar

_LOG = logging.getLogger("smtc")
_OURS = re.compile(r"[A-Za-z0-9_-]*-[0-9a-f]{12}\.npy(\.partial)?")
_RECORD = "finished.jsonl"

Job = tuple[Video, tuple[int, int]]
"""A video and the height and width of its packed frames."""


def pack(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    size: int = 256,
    keep_aspect: bool = False,
    antialias: bool = False,
    workers: int | None = None,
) -> Path:
    """Decode and resize the frames of the data folder `folder` for `open_packed`.

    Whole frames are squashed to `size` x `size`; with `keep_aspect` the shorter side gets `size`
    pixels (of the first frame where a video's frames differ). They go to `packed` in the cache
    folder, which is returned: `output`, or else the one that the loaders know. What is packed
    already and has not changed is left as it is. An unreadable frame is reported, packed as a black
    one and listed, so that its clips are replaced as they are without packing.

    Raises `UserError`: no videos, frames packed with other settings there, too little space, an
    output that cannot be written, a video that changes meanwhile.
    """
    for name, value in (("size", size), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    root = str(Path(folder).resolve())
    settings = PackSettings(size=size, keep_aspect=keep_aspect, antialias=antialias, root=root)
    target = cache_folder(folder, output)
    manifest = load_manifest(target, folder)
    timestamps = manifest.timestamps() if manifest else None
    videos = find_videos(folder, containers=True, timestamps=timestamps)
    packed = target / PACKED
    try:
        shards = _pack(videos, packed, settings, workers or _cores())
    except OSError as error:
        raise UserError(
            f"{packed} cannot be written ({error.strerror or error}); mend that and run the same "
            "command again, which goes on where it stopped, or choose another --output."
        ) from error
    except BrokenProcessPool:
        raise UserError(
            "A decoding process was killed, perhaps for want of memory; run the same command "
            "again with fewer --workers, and it goes on where it stopped."
        ) from None
    _say_result(shards, packed, output)
    return target


def _pack(
    videos: Sequence[Video], packed: Path, settings: PackSettings, workers: int
) -> list[Shard]:
    """The shards of `videos`, of which those that are missing are written."""
    finished = _finished(packed, settings)
    kept = _still_good(finished, videos, packed)
    todo = [video for video in videos if video.name not in kept]
    # An index beside a record: killed between the last two steps, which are now taken again.
    complete = (packed / INDEX).exists() and not (packed / _RECORD).exists()
    if complete and not todo and len(kept) == len(finished):
        _LOG.info("Everything is packed already.")
        return list(kept.values())
    jobs = _jobs(todo, settings, workers)
    _say_size(jobs, len(videos), packed, kept)
    with _locked(packed):
        if _finished(packed, settings) != finished:
            raise UserError(f"Another smtc data pack has just written to {packed}; run it again.")
        _begin(packed, settings, kept)
        try:
            with closing(_written(jobs, packed, settings, workers)) as written:
                for shard in written:
                    kept[shard.video] = shard
                    with (packed / _RECORD).open("a", encoding="utf-8") as record:
                        record.write(json.dumps(asdict(shard)) + "\n")
        finally:
            _remove([path for path in packed.glob("*" + PARTIAL) if _is_ours(path.name)])
        shards = [kept[video.name] for video in videos]
        index = _head(settings) | {"videos": [asdict(shard) for shard in shards]}
        _write_whole(packed / INDEX, json.dumps(index))
        (packed / _RECORD).unlink()
    return shards


def _jobs(todo: Sequence[Video], settings: PackSettings, workers: int) -> list[Job]:
    def size_of(video: Video) -> tuple[int, int]:
        return packed_size(video, settings.size, keep_aspect=settings.keep_aspect)

    with ThreadPoolExecutor(workers) as threads:
        return list(zip(todo, threads.map(size_of, todo), strict=True))


def _written(
    jobs: Sequence[Job], packed: Path, settings: PackSettings, workers: int
) -> Generator[Shard, None, None]:
    """The jobs done one by one, beside a bar."""
    if not jobs:
        return
    frames = sum(len(video.frames) for video, _ in jobs)
    with bar(total=frames, title="Packing", unit="frame") as shown:
        shards = write_shards(
            jobs, packed, antialias=settings.antialias, workers=workers, progress=shown.update
        )
        with closing(shards):
            yield from shards


def _finished(packed: Path, settings: PackSettings) -> list[Shard]:
    """What earlier calls packed; `UserError` for other settings or a stranger's files."""
    index = read_index(packed)
    if index is None:
        index = _read_record(packed / _RECORD)
    if index is None:
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(packed)):
                if not _is_ours(name):
                    raise UserError(
                        f"{packed} already holds {name!r}, which smtc data pack knows nothing "
                        "about; delete that folder or choose another --output."
                    )
        return []
    found, shards = index
    if found.root != settings.root:
        raise UserError(
            f"{packed} holds the frames of {found.root}; choose another --output for those of "
            f"{settings.root}."
        )
    if found != settings:
        raise UserError(
            f"{packed} holds frames packed with {found.flags}, not with {settings.flags}; delete "
            "that folder, or choose another --output."
        )
    return shards


def _read_record(path: Path) -> tuple[PackSettings, list[Shard]] | None:
    if not path.exists():
        return None
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # the last one, cut off by a kill
    head = lines[0] if lines and isinstance(lines[0], dict) else {}
    return parse_index(head | {"videos": lines[1:]}, path)


def _still_good(
    finished: Sequence[Shard], videos: Sequence[Video], packed: Path
) -> dict[str, Shard]:
    """By name, the shards that are whole and whose video has not changed."""
    by_name, kept = {video.name: video for video in videos}, {}
    for shard in finished:
        video, path = by_name.get(shard.video), packed / shard.file
        if video is None or not path.exists() or path.stat().st_size != shard.bytes:
            continue
        if source_of(video) != shard.source:
            continue
        # A frame may have been unreadable because of its owner or of a network.
        if not any(is_readable(video, int(position)) for position in shard.bad):
            kept[video.name] = shard
    return kept


def _say_size(jobs: Sequence[Job], videos: int, packed: Path, kept: dict[str, Shard]) -> None:
    """Say what will be written; `UserError` when it does not fit."""
    if not jobs:
        return
    needed = sum(len(video.frames) * height * width * 3 for video, (height, width) in jobs)
    existing = next(folder for folder in (packed, *packed.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    free += sum(path.stat().st_blocks * 512 for path in _superseded(packed, kept))
    frames = sum(len(video.frames) for video, _ in jobs)
    there = f" ({len(kept)} are there already)" if kept else ""
    sentence = (
        f"{len(jobs)} of {videos} videos{there}, {frames} frames, take {_amount(needed)} of "
        f"the {_amount(free)} that are free for {packed}"
    )
    if needed > free:
        raise UserError(f"{sentence}; free some, choose another --output or a smaller --size.")
    _LOG.info("%s.", sentence)


def _say_result(shards: Sequence[Shard], packed: Path, output: str | Path | None) -> None:
    bad = sum(len(shard.bad) for shard in shards)
    _LOG.info(
        "%d videos, %d frames%s, %s, are packed in %s%s.",
        len(shards),
        sum(shard.frames for shard in shards),
        f" ({bad} of them unreadable)" if bad else "",
        _amount(sum(shard.bytes for shard in shards)),
        packed,
        f"; train with --data.cache {output}" if output is not None else "",
    )


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextmanager
def _locked(packed: Path) -> Iterator[None]:
    """The folder, made when missing, for this call alone."""
    packed.mkdir(parents=True, exist_ok=True)
    handle = os.open(packed, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another smtc data pack writes to {packed}; wait for it.") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _begin(packed: Path, settings: PackSettings, kept: dict[str, Shard]) -> None:
    """Go from a finished or unfinished folder to an unfinished one with the shards of `kept`."""
    lines = [_head(settings), *(asdict(shard) for shard in kept.values())]
    _write_whole(packed / _RECORD, "".join(json.dumps(line) + "\n" for line in lines))
    (packed / INDEX).unlink(missing_ok=True)
    _remove(_superseded(packed, kept))


def _head(settings: PackSettings) -> dict[str, Any]:
    return {"version": VERSION, "settings": asdict(settings)}


def _is_ours(name: str) -> bool:
    """Whether this module names files so: a shard's, whole or not, or an index's on its way."""
    return bool(_OURS.fullmatch(name)) or name in (INDEX + PARTIAL, _RECORD + PARTIAL)


def _superseded(packed: Path, kept: dict[str, Shard]) -> list[Path]:
    """Shards of vanished and changed videos, and what a killed run left."""
    names = {shard.file for shard in kept.values()}
    found = [path for path in packed.glob("*") if _is_ours(path.name)]
    return [path for path in found if path.name not in names]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
