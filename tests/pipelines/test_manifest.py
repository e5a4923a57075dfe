"""`smtc data inspect` reads every file and says what is broken; loaders trust what it wrote."""

import io
import json
import logging
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from smtc.config import DataConfig
from smtc.errors import UserError
from smtc.pipelines import file_checks, images
from smtc.pipelines.clips import ClipSampler, Schedule, find_videos
from smtc.pipelines.faults import Faults
from smtc.pipelines.file_checks import check_files
from smtc.pipelines.frames import FileFrames
from smtc.pipelines.inspection import inspect_folder
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

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def picture() -> bytes:
    """A JPEG file of 160x120."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
    pixels = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


@pytest.fixture
def data(picture: bytes, tmp_path: Path) -> Path:
    """Three videos `a`, `b` and `c` of six frames."""
    for video in "abc":
        (tmp_path / "data" / video).mkdir(parents=True)
        for frame in range(6):
            (tmp_path / "data" / video / f"{frame}.jpg").write_bytes(picture)
    return tmp_path / "data"


def manifest_of(folder: Path) -> Manifest:
    """What the loaders find."""
    manifest = load_manifest(cache_folder(folder), folder)
    assert manifest is not None
    return manifest


def reasons(folder: Path) -> dict[str, str]:
    """`<video>/<file>` to reason of the broken files in the manifest."""
    return {
        f"{record.name}/{name}": broken.reason
        for record in manifest_of(folder).videos
        for name, broken in record.broken.items()
    }


def with_a_gap(picture: bytes) -> bytes:
    middle = len(picture) // 2
    return picture[:middle] + picture[middle + 600 :]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything under `folder` with size and time."""
    found = {str(path): path.lstat() for path in (folder, *folder.rglob("*"))}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}


# What is there.


def test_a_healthy_folder_is_described_and_left_alone(cli: Command, data: Path) -> None:
    shutil.rmtree(data / "c")
    (data / "b" / "5.jpg").unlink()
    before = tree(data)
    told = cli("data", "inspect", data)
    place = cache_folder(data) / "manifest.json"
    size = sum(path.stat().st_size for path in data.rglob("*.jpg"))
    assert told.out.splitlines() == [
        "videos     2",
        "frames     11",
        f"bytes      {size / 1e6:.1f} MB",
        "size       160x120 in 2 videos",
        "length     5 to 6 frames, median 5",
        "broken     nothing",
        f"manifest   {place}",
    ]
    assert (told.code, tree(data)) == (0, before)
    assert sorted(os.listdir(place.parent)) == ["manifest.json"]
    assert "Inspecting: 100%" in told.error and "11/11" in told.error
    first, second = manifest_of(data).videos
    assert (first.name, first.path, first.length, first.sizes) == ("a", "a", 6, {"160x120": 6})
    assert second.frames == ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    assert (first.bytes + second.bytes, first.codec, first.timestamps) == (size, "", ())


def test_sizes_and_short_videos_are_named(cli: Command, data: Path, picture: bytes) -> None:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(data / "b" / "3.jpg")
    shutil.copytree(data / "a", data / "kurz")
    for frame in range(1, 6):
        (data / "kurz" / f"{frame}.jpg").unlink()
    told = cli("data", "inspect", data)
    assert "size       160x120 in 3 videos\nsize       mixed in 1 video (b)\n" in told.out
    assert "length     1 to 6 frames, median 6\n" in told.out
    assert "too short  1 video (kurz) with fewer than 4 frames\n" in told.out
    assert "too short  4 videos (a, b, c, kurz) with fewer" in (
        cli("data", "inspect", data, "--frames", 7).out
    )
    assert "too short" not in cli("data", "inspect", data, "--frames", 1).out


def test_many_sizes_take_few_lines(cli: Command, tmp_path: Path) -> None:
    for number in range(14):
        folder = tmp_path / "data" / f"{number}"
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((10 + number, 30, 3), np.uint8)).save(folder / "0.png")
    lines = cli("data", "inspect", tmp_path / "data").out.splitlines()
    sizes = [line for line in lines if line.startswith("size")]
    assert len(sizes) == 11 and sizes[-1] == "size       4 others in 4 videos"


def test_files_under_another_name_are_noted_and_no_fault(cli: Command, data: Path) -> None:
    pixels = np.zeros((120, 160, 3), np.uint8)
    Image.fromarray(pixels).save(data / "a" / "0.jpg", format="PNG")
    Image.fromarray(pixels).save(data / "a" / "7.PNG", format="JPEG")
    Image.fromarray(pixels).save(data / "a" / "8.PNG")
    told = cli("data", "inspect", data)
    assert "misnamed   2 PNG or JPEG files called the other" in told.out
    assert told.code == 0 and "broken     nothing" in told.out


def test_the_layout_of_davis_and_one_video_alone(
    cli: Command, videos: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(videos, tmp_path / "davis"))
    assert cli("data", "inspect", copy).code == 0
    records = manifest_of(copy).videos
    assert [record.path for record in records] == [f"JPEGImages/480p/{v:05}" for v in range(8)]
    alone = copy / "JPEGImages" / "480p" / "00002"
    (alone / "00001.jpg").write_bytes(b"")
    told = cli("data", "inspect", alone)
    assert "  00002/00001.jpg: the file is empty" in told.out
    (record,) = manifest_of(alone).videos
    assert (record.name, record.path) == ("00002", ".")


# What is broken.


def test_every_kind_of_broken_file_is_named(cli: Command, data: Path, picture: bytes) -> None:
    folder, small = data / "a", np.zeros((9, 9, 3), np.uint8)
    (folder / "cut.jpg").write_bytes(picture[:-200])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no picture")
    (folder / "noise.jpg").write_bytes(with_a_gap(picture))
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    Image.fromarray(small).save(folder / "bit.png")
    png = bytearray((folder / "bit.png").read_bytes())
    png[45] ^= 1
    (folder / "bit.png").write_bytes(png)
    with (folder / "huge.jpg").open("wb") as file:
        file.truncate(1 << 41)
    (folder / "good link.jpg").symlink_to("0.jpg")
    told = cli("data", "inspect", data)
    assert told.code == 1
    expected = {
        "cut.jpg": "the file is cut short",
        "empty.png": "the file is empty",
        "text.jpg": "it is neither a JPEG nor a PNG file",
        "noise.jpg": "its content is damaged (premature end of data segment)",
        "folder.jpg": "it is a folder or a device and no file",
        "pipe.jpg": "it is a folder or a device and no file",
        "zero.jpg": "it is a folder or a device and no file",
        "dangling.jpg": "the file is missing",
        "loop.jpg": "it cannot be read (Too many levels of symbolic links)",
        "bit.png": "it cannot be decoded",
        "huge.jpg": "it is larger than a frame can be (2199023255552 bytes)",
    }
    assert reasons(data) == {f"a/{name}": reason for name, reason in expected.items()}
    assert f"broken     {len(expected)} files\n" in told.out
    for name, reason in expected.items():
        assert told.out.count(f"  a/{name}: {reason}\n") == 1


def test_twenty_broken_files_are_shown_and_all_are_kept(cli: Command, data: Path) -> None:
    for number in range(50):
        (data / "b" / f"x{number}.jpg").touch()
    told = cli("data", "inspect", data)
    assert told.out.count(": the file is empty\n") == 20
    assert "  b/x19.jpg: the file is empty\n  and 30 more, which the manifest names\n" in told.out
    assert len(reasons(data)) == 50


def test_a_thousand_damaged_files_are_each_named_once(
    cli: Command, picture: bytes, tmp_path: Path
) -> None:
    """None of them ends the inspection, and no whole file among them is blamed."""
    rng, folder = random.Random(0), tmp_path / "data" / "video"
    folder.mkdir(parents=True)
    damaged, certain = set(), set()
    for number in range(1100):
        content, name, at = bytearray(picture), f"{number:04}.jpg", rng.randrange(len(picture))
        kind = rng.choice(["bits", "noise", "cut", "gap"])
        if number % 11 == 0:
            kind = "whole"
        elif kind == "bits":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "noise":
            content[at : at + 300] = rng.randbytes(len(content[at : at + 300]))
        elif kind == "cut":
            del content[at:]
        else:
            del content[at : at + 200]
        (folder / name).write_bytes(content)
        if bytes(content) != picture:
            damaged.add(name)
        if kind == "cut":
            certain.add(name)
    told = cli("data", "inspect", tmp_path / "data", "--workers", 2)
    entry = json.loads((cache_folder(tmp_path / "data") / "manifest.json").read_text())
    named = list(entry["videos"][0]["broken"])
    assert told.code == 1 and len(damaged) == 1000
    assert len(named) == len(set(named)) and certain <= set(named) <= damaged
    assert len(named) > 650, len(named)


def test_damage_that_decodes_is_found(cli: Command, picture: bytes, tmp_path: Path) -> None:
    """A gap or a zeroed block in a JPEG, a bit in a PNG; OpenCV alone lets nearly all pass."""
    rng, pixels = random.Random(1), cv2.imdecode(np.frombuffer(picture, np.uint8), 1)
    png = cv2.imencode(".png", pixels)[1].tobytes()
    (tmp_path / "data" / "video").mkdir(parents=True)
    header = picture.index(b"\xff\xda") + 20
    passed = 0
    for number in range(100):
        at = rng.randrange(header, len(picture) - 700)
        if number % 2:
            content = picture[:at] + picture[at + rng.randrange(1, 500) :]
        else:
            content = picture[:at] + bytes(512) + picture[at + 512 :]
        (tmp_path / "data" / "video" / f"{number}.jpg").write_bytes(content)
        passed += cv2.imdecode(np.frombuffer(content, np.uint8), 1) is not None
        damaged = bytearray(png)
        damaged[rng.randrange(60, len(png) - 30)] ^= 1 << rng.randrange(8)
        (tmp_path / "data" / "video" / f"{number}.png").write_bytes(damaged)
    cli("data", "inspect", tmp_path / "data")
    found = reasons(tmp_path / "data")
    assert passed > 95
    assert sum(name.endswith(".jpg") for name in found) > 80
    assert sum(name.endswith(".png") for name in found) == 100


def test_bytes_before_the_end_are_a_fault_only_where_they_are_rare(
    cli: Command, data: Path, picture: bytes
) -> None:
    odd = picture[:-2] + bytes(range(1, 41)) + picture[-2:]
    (data / "a" / "0.jpg").write_bytes(odd)
    for frame in range(5):
        (data / "b" / f"{frame}.jpg").write_bytes(odd)
    (data / "b" / "5.jpg").write_bytes(with_a_gap(picture))
    cli("data", "inspect", data)
    found = reasons(data)
    assert " extraneous bytes before marker 0xd9)" in found.pop("a/0.jpg")
    assert list(found) == ["b/5.jpg"]


def test_awkward_names(cli: Command, data: Path) -> None:
    names = ["ü ñ 漢.jpg", "two\nlines.jpg", 'quote".jpg', "tab\t.jpg", "back\\slash.jpg"]
    latin = os.fsdecode(b"caf\xe9")
    shutil.copytree(data / "a", data / latin)
    for name in [*names, latin + ".jpg"]:
        (data / latin / name).touch()
    told = cli("data", "inspect", data)
    assert told.code == 1
    assert set(reasons(data)) == {f"{latin}/{name}" for name in [*names, latin + ".jpg"]}
    assert r"  caf\udce9/two\nlines.jpg: the file is empty" in told.out.splitlines()
    assert r"  caf\udce9/ü ñ 漢.jpg: the file is empty" in told.out.splitlines()
    videos = find_videos(data)
    bad = manifest_of(data).known_bad(videos)
    assert set(bad) == {str(data / latin / name) for name in [*names, latin + ".jpg"]}
    assert "not read   4 videos unchanged" in cli("data", "inspect", data).out


# Video files.


@pytest.fixture(scope="module")
def film() -> dict[str, bytes]:
    """Suffix to content of a video file of 40 frames of 96x64."""
    av = pytest.importorskip("av")
    rng, made = np.random.default_rng(0), {}
    for suffix, codec in ((".mp4", "mpeg4"), (".avi", "mjpeg")):
        file = io.BytesIO()
        with av.open(file, "w", format=suffix[1:]) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = 96, 64
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for _ in range(40):
                pixels = cv2.resize(rng.integers(0, 256, (8, 12, 3), np.uint8), (96, 64))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        made[suffix] = file.getvalue()
    return made


@pytest.fixture
def films(film: dict[str, bytes], tmp_path: Path) -> Path:
    """A folder of two video files."""
    (tmp_path / "films" / "sub").mkdir(parents=True)
    (tmp_path / "films" / "one.mp4").write_bytes(film[".mp4"])
    (tmp_path / "films" / "sub" / "zwölf.avi").write_bytes(film[".avi"])
    return tmp_path / "films"


def test_video_files_are_read_and_their_times_kept(
    cli: Command, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = cli("data", "inspect", films)
    assert told.out.startswith("videos     2 (2 of them video files)\nframes     80\n")
    assert "size       96x64 in 2 videos\n" in told.out and told.code == 0
    plain, manifest = find_videos(films, containers=True), manifest_of(films)
    assert [(r.name, r.codec, r.frames) for r in manifest.videos] == [
        ("one", "mpeg4", ()),
        ("sub/zwölf", "mjpeg", ()),
    ]
    monkeypatch.setattr("smtc.pipelines.clips.read_timestamps", None)
    assert find_videos(films, containers=True, timestamps=manifest.timestamps()) == plain
    assert manifest.known_bad(plain) == {}
    assert "not read   2 videos unchanged" in cli("data", "inspect", films).out


def test_broken_video_files_are_named_and_their_clips_replaced(
    cli: Command, films: Path, film: dict[str, bytes]
) -> None:
    (films / "cut.mp4").write_bytes(film[".mp4"][:9000])
    (films / "empty.mov").touch()
    (films / "gone.mkv").symlink_to("nowhere")
    for suffix, content in film.items():
        middle = len(content) // 2
        damaged = content[:middle] + bytes(400) + content[middle + 400 :]
        (films / "sub" / f"noise{suffix}").write_bytes(damaged)
    told = cli("data", "inspect", films)
    assert told.code == 1 and "broken     5 files" in told.out
    broken = {
        record.path: bad.reason
        for record in manifest_of(films).videos
        for bad in record.broken.values()
    }
    damage = re.compile(r"(cannot be decoded|damaged).* of \d+|frames are missing")
    assert {path: reason for path, reason in broken.items() if "noise" not in path} == {
        "cut.mp4": "it is no video file",
        "empty.mov": "the file is empty",
        "gone.mkv": "the file is missing",
    }
    assert all(damage.search(broken[f"sub/noise{suffix}"]) for suffix in film), broken
    assert all(f"  {path}: {reason}\n" in told.out for path, reason in broken.items())
    manifest = manifest_of(films)
    videos = find_videos(films, containers=True, timestamps=manifest.timestamps())
    known = manifest.known_bad(videos)
    assert set(known) == {str(films / "sub" / f"noise{suffix}") for suffix in film}
    sampler = ClipSampler(videos, frames=4, gap=2, random_gap=False, seed=0)
    config = DataConfig(root=str(films), workers=0, max_bad_share=1.0)
    faults = Faults(config)
    args = (config, Schedule(batch=4, steps=2), sampler, FileFrames(known), faults)
    drawn = {
        source.video for batch in TorchLoader(*args, size=(32, 32)) for source in batch.sources
    }
    assert drawn == {"one", "sub/zwölf"}
    assert set(faults.bad_files) == set(known)


def test_odd_video_files_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cover picture, tags that are no UTF-8, a colon in the name, a repeated frame."""
    av = pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with av.open("v.mp4", "w") as file:
        file.metadata.update(title="TITLE")
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for to, shape in ((cover, (32, 32, 3)), *[(stream, (64, 96, 3))] * 9):
            picture = cv2.blur(rng.integers(0, 256, shape, np.uint8), (9, 9))
            file.mux(to.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for to in (cover, stream):
            file.mux(to.encode(None))
    content = Path("v.mp4").read_bytes()
    assert b"TITLE" in content
    Path("http:a b.mp4").write_bytes(content.replace(b"TITLE", b"caf\xe9!"))
    with av.open("repeated.mov", "w") as file:
        stream = file.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for _ in range(9):
            picture = rng.integers(0, 256, (64, 96, 3), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    moved = bytearray(Path("repeated.mov").read_bytes())
    table = moved.find(b"stsz") + 16  # sizes of the frames
    sizes = list(struct.unpack_from(">9I", moved, table))
    sizes[4:6] = [sizes[4] + sizes[5], 0]
    struct.pack_into(">9I", moved, table, *sizes)
    Path("repeated.mov").write_bytes(moved)
    odd, repeated = check_files(["http:a b.mp4", "repeated.mov"], videos=True)
    assert (odd.reason, odd.codec, odd.sizes) == ("", "mpeg4", {"96x64": 9})
    assert (repeated.reason, repeated.sizes) == ("", {"96x64": 8})
    assert len(repeated.timestamps) == 8


def test_video_files_without_the_library(
    refused: Command, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert "need PyAV" in refused("data", "inspect", films)


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


# Mistakes and mishaps.


def test_a_folder_without_videos(safe: Command, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert "No videos in" in safe("data", "inspect", tmp_path / "none")
    assert "does not exist" in safe("data", "inspect", tmp_path / "gone")


@pytest.mark.parametrize("flag", ["--workers", "--frames"])
def test_counts_of_zero_are_refused(safe: Command, data: Path, flag: str) -> None:
    assert f"{flag} is 0" in safe("data", "inspect", data, flag, 0)


def test_an_output_inside_the_data_is_refused(
    safe: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = data.parent / "link"
    link.symlink_to(data / "a")
    monkeypatch.setattr("smtc.pipelines.inspection.find_videos", None)
    for output in (data, data / "new", link / "deeper", data / "a" / ".." / "x"):
        assert "lies inside the data folder" in safe("data", "inspect", data, "--output", output)


def test_an_output_of_ones_own(cli: Command, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er"
    told = cli("data", "inspect", data, "--output", output)
    assert told.out.endswith(f"manifest   {output / 'manifest.json'}\n")
    assert load_manifest(output, data) is not None
    assert not (tmp_path / "cache").exists()
    other = shutil.copytree(data, tmp_path / "other")
    assert load_manifest(output, other) is None


def test_an_output_that_cannot_be_written(
    refused: Command, data: Path, read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smtc.pipelines.inspection._read", None)  # nothing is read before
    (data.parent / "file").write_text("precious")
    for output in (read_only, read_only / "new", data.parent / "file"):
        said = refused("data", "inspect", data, "--output", output)
        assert str(output) in said and "written" in said
    assert (data.parent / "file").read_text() == "precious"


def test_a_full_output(
    refused: Command, data: Path, mounted: Callable[[str], Path], picture: bytes
) -> None:
    output = mounted("size=8k")
    for number in range(2000):
        (data / "a" / f"{number:020}.jpg").symlink_to("0.jpg")
    said = refused("data", "inspect", data, "--output", output)
    assert str(output / "manifest.json") in said and "No space left" in said
    assert [name for name in os.listdir(output) if name != "unfinished-manifest.json"] == []


def test_a_reading_process_that_dies_is_told(
    refused: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getpid()

    def die(_: object) -> Any:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(file_checks, "read_image", die)
    assert "was killed, perhaps for want of memory" in refused("data", "inspect", data)
    assert not (cache_folder(data) / "manifest.json").exists()


@pytest.fixture
def long(data: Path) -> Path:
    """A folder that takes a while: many links to a large frame."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (720, 1280, 3), np.uint8)).save(data / "large.jpg")
    for video in range(300):
        (data / f"long{video:03}").mkdir()
        for frame in range(4):
            (data / f"long{video:03}" / f"{frame}.jpg").symlink_to(data / "large.jpg")
    return data


def started(folder: Path, *before: str) -> subprocess.Popen[str]:
    """An inspection of `folder` in a session of its own, in the middle of its work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "smtc", "data", "inspect", str(folder), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and len(session(process.pid)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(1)
    assert process.poll() is None
    return process


def session(leader: int) -> list[int]:
    """The live processes of a session."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = status.read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(number) == leader and state != "Z":
            found.append(int(status.parent.name))
    return found


def gone(leader: int) -> bool:
    deadline = time.monotonic() + 5
    while session(leader) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not session(leader)


def test_control_c_ends_in_a_sentence_and_the_next_call_goes_on(cli: Command, long: Path) -> None:
    process = started(long)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=10)
    assert process.returncode == 130 and out == ""
    assert "Traceback" not in error
    assert error.rstrip().endswith("smtc: stopped. The same command goes on with what is left.")
    assert gone(process.pid)
    place = cache_folder(long)
    assert os.listdir(place) == ["unfinished-manifest.json"]
    for video in range(15, 300):
        shutil.rmtree(long / f"long{video:03}")
    told = cli("data", "inspect", long)
    taken = re.search(r"not read   (\d+) videos", told.out)
    assert taken is not None and int(taken[1]) > 3
    assert os.listdir(place) == ["manifest.json"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_inspection_leaves_no_process_and_no_manifest(long: Path, how: int) -> None:
    process = started(long)
    os.kill(process.pid, how)
    process.communicate(timeout=10)
    assert gone(process.pid)
    assert os.listdir(cache_folder(long)) == ["unfinished-manifest.json"]


def test_one_process_finds_what_several_find(data: Path, picture: bytes) -> None:
    (data / "b" / "2.jpg").write_bytes(with_a_gap(picture))
    texts = set()
    for workers in (1, 3):
        output = data.parent / f"out{workers}"
        assert inspect_folder(data, output, workers=workers) == 1
        texts.add((output / "manifest.json").read_text())
    assert len(texts) == 1
    with pytest.raises(UserError, match="workers is -1"):
        inspect_folder(data, workers=-1)
