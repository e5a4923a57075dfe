"""`smtc data inspect` reads every file and says what is broken, whatever stops it."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from commands import Command
from inspected import manifest_of, reasons, three_videos, with_a_gap
from PIL import Image

from smtc.errors import UserError
from smtc.pipelines import file_checks
from smtc.pipelines.clips import find_videos
from smtc.pipelines.inspection import inspect_folder
from smtc.pipelines.manifest import load_manifest
from smtc.pipelines.places import cache_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(picture: bytes, tmp_path: Path) -> Path:
    """Three videos `a`, `b` and `c` of six frames."""
    return three_videos(tmp_path / "data", picture)


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
    assert (
        "size       160x120 in 3 videos\n"
        "size       mixed in 1 video (b); training resizes each frame by itself\n"
        "  b: 160x120 in 5 frames, 30x20 in 1 frame\n"
    ) in told.out
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
        "text.jpg": "it is neither a JPEG nor a PNG file but a text file; download it again",
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
