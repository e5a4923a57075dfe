"""What `smtc data inspect` wrote is trusted by its next call and by loaders while it holds."""

import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from inspected import manifest_of, reasons, three_videos, with_a_gap

from smtc.config import DataConfig
from smtc.pipelines import images
from smtc.pipelines.clips import ClipSampler, Schedule, find_videos
from smtc.pipelines.faults import Faults
from smtc.pipelines.frames import FileFrames
from smtc.pipelines.manifest import (
    Manifest,
    VideoRecord,
    fingerprint,
    load_manifest,
    save_manifest,
    stamp_of,
)
from smtc.pipelines.places import cache_folder
from smtc.pipelines.torch_loader import TorchLoader


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(picture: bytes, tmp_path: Path) -> Path:
    """Three videos `a`, `b` and `c` of six frames."""
    return three_videos(tmp_path / "data", picture)


# Again.


def test_only_videos_that_changed_are_read_again(cli: Command, data: Path, picture: bytes) -> None:
    cli("data", "inspect", data)
    unseen = data / "a" / "0.jpg"
    status = unseen.stat()
    unseen.write_bytes(bytes(len(picture)))
    os.utime(unseen, ns=(status.st_atime_ns, status.st_mtime_ns))
    (data / "b" / "0.jpg").write_bytes(bytes(len(picture)))
    os.utime(data / "b" / "0.jpg", ns=(0, status.st_mtime_ns + 1))
    (data / "c" / "0.jpg").write_bytes(b"")
    os.utime(data / "c" / "0.jpg", ns=(0, status.st_mtime_ns))
    told = cli("data", "inspect", data)
    assert "not read   1 video unchanged since the last inspection\n" in told.out
    assert "12/12" in told.error
    assert set(reasons(data)) == {"b/0.jpg", "c/0.jpg"}
    for change in (
        lambda: (data / "b" / "0.jpg").unlink(),
        lambda: (data / "b" / "1.jpg").rename(data / "b" / "9.jpg"),
        lambda: (data / "b" / "10.jpg").write_bytes(picture),
    ):
        change()
        assert "not read   2 videos" in cli("data", "inspect", data).out
    told = cli("data", "inspect", data)
    assert "not read   3 videos" in told.out and "Inspecting" not in told.error
    assert told.code == 1 and set(reasons(data)) == {"c/0.jpg"}
    shutil.rmtree(data / "c")
    assert cli("data", "inspect", data).code == 0
    assert [record.name for record in manifest_of(data).videos] == ["a", "b"]


def test_a_file_that_could_not_be_opened_is_tried_again(cli: Command, data: Path) -> None:
    (data / "a" / "x.jpg").symlink_to(data / "later.jpg")
    assert cli("data", "inspect", data).code == 1
    assert reasons(data) == {"a/x.jpg": "the file is missing"}
    assert manifest_of(data).known_bad(find_videos(data)) == {}
    assert "not read   2 videos" in cli("data", "inspect", data).out
    shutil.copy2(data / "a" / "0.jpg", data / "later.jpg")
    assert cli("data", "inspect", data).code == 0


def test_a_file_that_turns_unreadable_is_not_held_against_its_content(
    cli: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images, "open", refuse, raising=False)
    told = cli("data", "inspect", data)
    assert "  c/5.jpg: it cannot be read (Permission denied)" in told.out
    assert manifest_of(data).known_bad(find_videos(data)) == {}


# What loaders take from it.


def test_known_bad_files_are_those_that_have_not_changed(
    cli: Command, data: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for video in "ab":
        (data / video / "3.jpg").write_bytes(picture[:-99])
        (data / video / "4.jpg").write_bytes(with_a_gap(picture))
    cli("data", "inspect", data)
    manifest, videos = manifest_of(data), find_videos(data)
    looked_at = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: looked_at.append(path) or stat(path))
    damage = "its content is damaged (premature end of data segment)"
    expected = {
        str(data / video / name): reason
        for video in "ab"
        for name, reason in (("3.jpg", "the file is cut short"), ("4.jpg", damage))
    }
    assert manifest.known_bad(videos) == expected
    assert sorted(looked_at) == sorted(expected)
    (data / "a" / "3.jpg").write_bytes(picture)
    (data / "b" / "4.jpg").unlink()
    os.utime(data / "b" / "3.jpg")
    assert list(manifest.known_bad(videos)) == [str(data / "a" / "4.jpg")]
    assert manifest.known_bad(videos[1:]) == {}


def test_with_the_manifest_the_loader_gives_the_same_without_opening_broken_files(
    cli: Command, data: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for frame in (1, 4):
        (data / "b" / f"{frame}.jpg").write_bytes(picture[: 1000 * frame])
    assert cli("data", "inspect", data).code == 1
    config = DataConfig(root=str(data), workers=0, max_bad_share=1.0, gap=1)
    videos = find_videos(data)
    known = manifest_of(data).known_bad(videos)
    opened: list[str] = []
    read = images._read_bytes
    monkeypatch.setattr(images, "_read_bytes", lambda path: opened.append(path) or read(path))

    def batches(frames: FileFrames) -> tuple[list[Any], Faults]:
        sampler = ClipSampler(videos, frames=4, gap=1, random_gap=False, seed=0)
        faults, schedule = Faults(config), Schedule(batch=2, steps=6)
        return list(TorchLoader(config, schedule, sampler, frames, faults, size=(32, 32))), faults

    plain, met = batches(FileFrames())
    assert set(known) <= set(opened)
    opened.clear()
    helped, known_met = batches(FileFrames(known))
    assert opened and not set(known) & set(opened)
    assert (
        known_met.bad_files
        == met.bad_files
        == {path: f"b/{Path(path).name}: {reason}" for path, reason in known.items()}
    )
    assert known_met.replaced == met.replaced > 0
    for one, other in zip(plain, helped, strict=True):
        assert torch.equal(one.views, other.views) and one.sources == other.sources


def test_the_folder_may_be_named_in_several_ways(
    cli: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "b" / "2.jpg").write_bytes(b"")
    cli("data", "inspect", data)
    link = data.parent / "link"
    link.symlink_to(data)
    monkeypatch.chdir(data.parent)
    for name in ("data", "./data/", "link", str(link) + "/", "data/../data", f"{data}/b/.."):
        told = cli("data", "inspect", name)
        assert "not read   3 videos" in told.out, name
        manifest = manifest_of(Path(name))
        bad = manifest.known_bad(find_videos(name))
        assert list(bad) == [os.path.join(Path(name) / "b", "2.jpg")]
    assert len(os.listdir(data.parent / "cache" / "smtc")) == 1
    monkeypatch.chdir(data)
    assert list(manifest_of(Path(".")).known_bad(find_videos("."))) == ["b/2.jpg"]


def record(name: str, frames: int) -> VideoRecord:
    return VideoRecord(
        name=name,
        path=f"train/JPEGImages/{name}",
        frames=tuple(f"{number:05}.jpg" for number in range(frames)),
        length=frames,
        bytes=frames * 100_000,
        fingerprint="0123456789abcdef",
        sizes={"1280x720": frames},
    )


def test_a_hundred_thousand_frames_are_small_and_quick(tmp_path: Path) -> None:
    videos = [record(f"{number:08x}", 100) for number in range(1000)]
    path = save_manifest(tmp_path, Manifest(tmp_path, tuple(videos)))
    assert path.stat().st_size < 1_500_000
    begun = time.perf_counter()
    manifest = load_manifest(tmp_path, tmp_path)
    assert time.perf_counter() - begun < 0.5
    assert manifest is not None and list(manifest.videos) == videos


def test_timestamps_survive_and_hold_for_the_same_file_only(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    times: dict[str, Sequence[int]] = {
        "constant.mp4": range(-1024, 512 * 100_000 - 1024, 512),
        "varying.mkv": (0, 33, 67, 100, 133, 167, 1000, 1 << 40),
        "single.mp4": range(7, 8),
    }
    videos = []
    for name, timestamps in times.items():
        (root / name).write_bytes(name.encode())
        told = fingerprint([(name, stamp_of(root / name))])
        videos.append(
            VideoRecord(
                name=name,
                path=name,
                length=len(timestamps),
                bytes=12,
                fingerprint=told,
                sizes={},
                codec="h264",
                timestamps=timestamps,
            )
        )
    path = save_manifest(tmp_path, Manifest(root, tuple(videos)))
    assert path.stat().st_size < 1000
    manifest = load_manifest(tmp_path, root)
    assert manifest is not None
    assert manifest.timestamps() == {str(root / name): told for name, told in times.items()}
    (root / "single.mp4").unlink()
    os.utime(root / "varying.mkv")
    assert list(manifest.timestamps()) == [str(root / "constant.mp4")]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: "7",
        lambda text: "[]",
        lambda text: "null",
        lambda text: '{"version": 1}',
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"path"', '"pfad"'),
        lambda text: text.replace('{"160x120": 6}', "[6]"),
        lambda text: text.replace('"the file is empty", [', '[3, "the file is empty", ['),
        lambda text: text.replace("data", "elsewhere", 1),
    ],
)
def test_a_manifest_of_no_use_is_ignored_with_a_line(
    cli: Command, data: Path, caplog: pytest.LogCaptureFixture, change: Callable[[str], str]
) -> None:
    (data / "b" / "2.jpg").write_bytes(b"")
    cli("data", "inspect", data)
    path = cache_folder(data) / "manifest.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with caplog.at_level(logging.WARNING, "smtc"):
        caplog.clear()
        assert load_manifest(path.parent, data) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(path) in line and "is ignored" in line
    assert cli("data", "inspect", data).code == 1
    assert path.read_text() == text


def test_a_manifest_that_is_a_folder_is_no_crash(data: Path, refused: Command) -> None:
    (cache_folder(data) / "manifest.json").mkdir(parents=True)
    assert load_manifest(cache_folder(data), data) is None
    assert "manifest.json cannot be written" in refused("data", "inspect", data)


def test_no_scribble_in_a_manifest_crashes_a_loader(cli: Command, data: Path) -> None:
    (data / "b" / "2.jpg").write_bytes(b"")
    cli("data", "inspect", data)
    path, rng = cache_folder(data) / "manifest.json", random.Random(0)
    whole, videos = path.read_bytes(), find_videos(data)
    for _ in range(300):
        content = bytearray(whole)
        content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        manifest = load_manifest(path.parent, data)
        if manifest is not None:
            assert set(manifest.known_bad(videos)) <= {str(data / "b" / "2.jpg")}
            assert manifest.timestamps() == {}


def test_without_a_manifest_there_is_none(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_manifest(cache_folder(data), data) is None
    (data.parent / "cache").touch()
    assert load_manifest(cache_folder(data), data) is None
    assert caplog.records == []
