"""`smtc data inspect`: every file of a data folder read whole, a table, and the manifest."""

import contextlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from smtc.errors import UserError
from smtc.pipelines.clips import Video, find_video_files, find_videos
from smtc.pipelines.file_checks import Finding, check_files, prepare_worker
from smtc.pipelines.manifest import (
    MANIFEST,
    BrokenFile,
    Manifest,
    VideoRecord,
    fingerprint,
    load_manifest,
    save_manifest,
    stamp_of,
)
from smtc.pipelines.places import cache_folder
from smtc.pipelines.processes import processes
from smtc.progress import bar

_UNFINISHED = "unfinished-manifest.json"
_SAVE_EVERY = 30.0  # seconds
_FILES_A_TASK = 32
_BROKEN_SHOWN = 20
_NAMES_SHOWN = 5
_SIZES_SHOWN = 10


def inspect_folder(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    frames: int = 4,
    workers: int | None = None,
) -> int:
    """Read every file of the data folder, print what is there and write the manifest.

    The manifest goes to `cache_folder(folder, output)`. Videos whose files have kept their sizes
    and times since an earlier inspection, be it one that was stopped, are not read again. `frames`
    is how many a clip needs, `workers` how many processes read (one a core when not given).

    Returns 0, or 1 when a file is broken. `UserError`: no videos, or an output that lies in the
    data folder or cannot be written.
    """
    root, target = Path(folder), cache_folder(folder, output)
    for name, value in (("frames", frames), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; use 1 or more.")
    videos = _listed(root)
    paths = [_path_of(video, root) for video in videos]
    records = _unchanged(videos, paths, _earlier(target, root))
    taken_over = len(records)

    def save(name: str) -> Path:
        kept = tuple(records[path] for path in paths if path in records)
        return save_manifest(target, Manifest(root, kept), name=name)

    save(_UNFINISHED)  # before the long work, to see that it can be written
    saved = time.monotonic()
    todo = [(video, path) for video, path in zip(videos, paths, strict=True) if path not in records]
    try:
        with contextlib.closing(_read(todo, workers or os.cpu_count() or 1)) as fresh:
            for record in fresh:
                records[record.path] = record
                if time.monotonic() - saved > _SAVE_EVERY:
                    save(_UNFINISHED)
                    saved = time.monotonic()
    except BaseException:
        with contextlib.suppress(UserError):
            save(_UNFINISHED)
        raise
    manifest = save(MANIFEST)
    (target / _UNFINISHED).unlink(missing_ok=True)
    found = [records[path] for path in paths]
    print("\n".join([*_table(found, frames, taken_over), _row("manifest", str(manifest))]))
    return 1 if any(record.broken for record in found) else 0


def _listed(root: Path) -> list[Video]:
    """The videos, of video files without their frames."""
    files: dict[str, str] = {}
    with contextlib.suppress(OSError):  # which `find_videos` puts into words
        files = find_video_files(root)
    # Reading the times takes long, so it is done in parallel, together with the rest.
    unread = dict.fromkeys(files.values(), ())
    return find_videos(root, containers=True, timestamps=unread)


def _path_of(video: Video, root: Path) -> str:
    """The folder of the frames, or the video file, relative to `root`."""
    place = video.container or os.path.dirname(video.frames[0])
    return os.path.relpath(place, root)


def _files(video: Video) -> Sequence[str]:
    return video.frames if video.container is None else (video.container,)


def _earlier(target: Path, root: Path) -> dict[str, VideoRecord]:
    """By path, what the last inspection found, and one after it that was stopped."""
    known = {}
    for name in (MANIFEST, _UNFINISHED):
        manifest = load_manifest(target, root, name=name)
        if manifest is not None:
            known.update({record.path: record for record in manifest.videos})
    return known


def _unchanged(
    videos: Sequence[Video], paths: Sequence[str], earlier: dict[str, VideoRecord]
) -> dict[str, VideoRecord]:
    """By path, the records of the videos whose files are as they were."""

    def now(video: Video) -> str:
        return fingerprint((file, stamp_of(file)) for file in _files(video))

    known = [
        (video, earlier[path])
        for video, path in zip(videos, paths, strict=True)
        if path in earlier and earlier[path].fingerprint
    ]
    with ThreadPoolExecutor() as threads:  # for disks across a network
        prints = list(threads.map(now, (video for video, _ in known)))
    return {
        record.path: record
        for (_, record), now_ in zip(known, prints, strict=True)
        if record.fingerprint == now_
    }


def _read(todo: Sequence[tuple[Video, str]], workers: int) -> Generator[VideoRecord, None, None]:
    """The records of videos (with their paths), each when it is finished; a bar counts files."""
    total = sum(len(_files(video)) for video, _ in todo)
    if not total:
        return
    findings = [[Finding(None)] * len(_files(video)) for video, _ in todo]  # to be replaced
    missing = [len(found) for found in findings]
    try:
        with processes(min(workers, total), prepare_worker) as pool:
            futures = {pool.submit(check_files, *task): place for place, task in _tasks(todo)}
            with bar(total=total, title="Inspecting", unit="file") as shown:
                for future in as_completed(futures):
                    (number, first), result = futures.pop(future), future.result()
                    findings[number][first : first + len(result)] = result
                    missing[number] -= len(result)
                    shown.update(len(result))
                    if not missing[number]:
                        yield _record(*todo[number], findings[number])
                        findings[number] = []
    except BrokenProcessPool:
        raise UserError(
            "A process that read files was killed, perhaps for want of memory; the same command "
            "goes on with what is left, with --workers 1, say."
        ) from None


def _tasks(
    todo: Sequence[tuple[Video, str]],
) -> Iterator[tuple[tuple[int, int], tuple[Sequence[str], bool]]]:
    """Number of a video and of a file in it, and what to call `check_files` with."""
    # Video files first, as one takes long.
    for number in sorted(range(len(todo)), key=lambda number: todo[number][0].container is None):
        video, _ = todo[number]
        files = _files(video)
        for first in range(0, len(files), _FILES_A_TASK):
            task = files[first : first + _FILES_A_TASK], video.container is not None
            yield (number, first), task


def _record(video: Video, path: str, findings: Sequence[Finding]) -> VideoRecord:
    """What the findings about the files of `video` say together."""
    names = [os.path.basename(file) for file in _files(video)]
    # Cameras and writers that leave bytes before the end marker do so in most frames, and their
    # pixels are whole; damage is rarer.
    habit = sum(found.trailing for found in findings) > len(findings) / 2
    found_by_name = {
        name: replace(found, reason="") if habit and found.trailing else found
        for name, found in zip(names, findings, strict=True)
    }
    whole = [found for found in found_by_name.values() if not found.reason]
    is_folder, first = video.container is None, findings[0]
    return VideoRecord(
        name=video.name,
        path=path,
        frames=tuple(names) if is_folder else (),
        length=len(names) if is_folder else len(first.timestamps),
        bytes=sum(found.stamp[0] for found in findings if found.stamp),
        fingerprint=fingerprint((name, found.stamp) for name, found in found_by_name.items()),
        sizes=dict(sum((found.sizes for found in whole), Counter())),
        broken={
            name: BrokenFile(found.reason, found.stamp)
            for name, found in found_by_name.items()
            if found.reason
        },
        misnamed=sum(found.misnamed for found in whole),
        codec=first.codec,
        timestamps=first.timestamps,
    )


def _table(records: Sequence[VideoRecord], frames: int, taken_over: int) -> Iterator[str]:
    """What is there, a line each."""
    video_files = sum(record.is_file for record in records)
    note = f" ({video_files} of them video files)" if video_files else ""
    yield _row("videos", f"{len(records)}{note}")
    lengths = [record.length for record in records]
    yield _row("frames", f"{sum(lengths)}")
    yield _row("bytes", _amount(sum(record.bytes for record in records)))
    yield from _sizes(records)
    middle = statistics.median_low(lengths)
    yield _row("length", f"{min(lengths)} to {max(lengths)} frames, median {middle}")
    if short := [record.name for record in records if record.length < frames]:
        yield _row("too short", f"{_some(short)} with fewer than {frames} frames")
    if misnamed := sum(record.misnamed for record in records):
        yield _row("misnamed", f"{_count(misnamed, 'PNG or JPEG file')} called the other, no fault")
    if taken_over:
        yield _row("not read", f"{_count(taken_over, 'video')} unchanged since the last inspection")
    yield from _broken(records)


def _sizes(records: Sequence[VideoRecord]) -> Iterator[str]:
    """Width and height of the frames."""
    one_size = Counter(next(iter(record.sizes)) for record in records if len(record.sizes) == 1)
    for size, count in one_size.most_common(_SIZES_SHOWN):
        yield _row("size", f"{size} in {_count(count, 'video')}")
    if rest := one_size.most_common()[_SIZES_SHOWN:]:
        others = _count(sum(count for _, count in rest), "video")
        yield _row("size", f"{len(rest)} others in {others}")
    if mixed := [record for record in records if len(record.sizes) > 1]:
        names = _some([record.name for record in mixed])
        yield _row("size", f"mixed in {names}; training resizes each frame by itself")
        for record in mixed[:_NAMES_SHOWN]:
            sizes = Counter(record.sizes).most_common(_SIZES_SHOWN)
            told = [f"{size} in {_count(count, 'frame')}" for size, count in sizes]
            more = ["…"] if len(record.sizes) > len(sizes) else []
            yield f"  {_printable(record.name)}: {', '.join(told + more)}"


def _broken(records: Sequence[VideoRecord]) -> Iterator[str]:
    lines = [
        f"  {record.path if record.is_file else f'{record.name}/{name}'}: {broken.reason}"
        for record in records
        for name, broken in record.broken.items()
    ]
    yield _row("broken", _count(len(lines), "file") if lines else "nothing")
    yield from map(_printable, lines[:_BROKEN_SHOWN])
    if len(lines) > _BROKEN_SHOWN:
        yield f"  and {len(lines) - _BROKEN_SHOWN} more, which the manifest names"


def _row(title: str, text: str) -> str:
    return f"{title:<11}{_printable(text)}"


def _some(videos: Sequence[str]) -> str:
    names = ", ".join(videos[:_NAMES_SHOWN]) + (", …" if len(videos) > _NAMES_SHOWN else "")
    return f"{_count(len(videos), 'video')} ({names})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _printable(text: str) -> str:
    """File names may hold line breaks, and bytes that are no text."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
