"""`smtc data pack`: right pixels from any picture under any name, whatever stops it on its way."""

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from commands import tree

from smtc.errors import UserError
from smtc.pipelines import packing, shards
from smtc.pipelines.cache import Shard, read_index
from smtc.pipelines.clips import find_videos
from smtc.pipelines.images import read_image
from smtc.pipelines.packing import pack
from smtc.pipelines.views import resize_frame


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(videos: Path, tmp_path: Path) -> Path:
    """Videos that a test may change."""
    return Path(shutil.copytree(videos, tmp_path / "data"))


def write(root: Path, name: str, *frames: np.ndarray, suffix: str = ".png") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{number:03d}{suffix}"), frame)
    return folder


def noise(*shape: int, kind: Any = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max, shape, kind)


def index_of(folder: Path) -> dict[str, Shard]:
    index = read_index(folder / "packed")
    assert index is not None
    return {shard.video: shard for shard in index[1]}


def array_of(folder: Path, video: str) -> np.ndarray:
    return np.load(folder / "packed" / index_of(folder)[video].file, mmap_mode="r")


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What shows that a file was written anew."""
    seen = {path.name: path.stat() for path in (folder / "packed").glob("*.npy")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in seen.items()}


def expect_whole(root: Path, folder: Path, size: int = 16) -> None:
    """Every frame of every video is there, and nothing else."""
    index = index_of(folder)
    assert set(index) == {video.name for video in find_videos(root)}
    assert set(os.listdir(folder / "packed")) == {"index.json", *(s.file for s in index.values())}
    for video in find_videos(root):
        expected = [resize_frame(read_image(frame), (size, size)) for frame in video.frames]
        np.testing.assert_array_equal(array_of(folder, video.name), expected)


@pytest.mark.parametrize("antialias", [False, True])
def test_frames_are_decoded_and_squashed(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, antialias: bool
) -> None:
    monkeypatch.setattr(shards, "_PIECE", 3)
    folder = pack(videos, tmp_path / "out", size=20, antialias=antialias, workers=3)
    assert folder == tmp_path / "out"
    for video in find_videos(videos):
        frames = array_of(folder, video.name)
        assert (frames.shape, frames.dtype) == ((8, 20, 20, 3), np.uint8)
        for frame, path in zip(frames, video.frames, strict=True):
            expected = resize_frame(read_image(path), (20, 20), antialias=antialias)
            np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((30, 45), (10, 15)), ((44, 30), (15, 10)), ((7, 7), (10, 10)), ((1, 33), (10, 330))],
)
def test_the_shorter_side_gets_the_size_when_the_aspect_is_kept(
    tmp_path: Path, shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    write(tmp_path / "data", "odd", noise(*shape, 3), noise(20, 20, 3))
    folder = pack(tmp_path / "data", size=10, keep_aspect=True)
    frames = array_of(folder, "odd")
    assert frames.shape == (2, *expected, 3)
    for frame, path in zip(frames, find_videos(tmp_path / "data")[0].frames, strict=True):
        np.testing.assert_array_equal(frame, resize_frame(read_image(path), expected))


def test_the_first_readable_frame_says_the_aspect(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "v", *[noise(10, 30, 3)] * 3)
    (folder / "000.png").write_bytes(b"")
    assert array_of(pack(tmp_path / "data", size=5, keep_aspect=True), "v").shape == (3, 5, 15, 3)
    for frame in folder.iterdir():
        frame.write_bytes(b"")
    assert array_of(pack(tmp_path / "data", size=5, keep_aspect=True), "v").shape == (3, 5, 5, 3)


def test_pictures_of_any_kind_and_size_go_into_one_video(tmp_path: Path) -> None:
    pictures = [noise(9, 5), noise(64, 3, 4), noise(8, 8, 3, kind=np.uint16), noise(1, 1, 3)]
    write(tmp_path / "data", "mixed", *pictures)
    expect_whole(tmp_path / "data", pack(tmp_path / "data", size=16))


def test_videos_of_any_name_get_files_of_their_own(tmp_path: Path) -> None:
    names = [
        "a b",
        "a_b",
        "a\\b",
        "c..",
        "ä…😀",
        "n\nl",
        "x" * 255,
        "é" * 127,
        "A_B",
        "-",
    ]
    names.append(os.fsdecode(b"\xff\xfe raw"))
    for number, name in enumerate(names):
        write(tmp_path / "data", f"to be {number}", noise(4, 4, 3, seed=number))
        (tmp_path / "data" / f"to be {number}").rename(tmp_path / "data" / name)
    folder = pack(tmp_path / "data", size=4)
    index = index_of(folder)
    assert set(index) == set(names)
    assert len({shard.file.lower() for shard in index.values()}) == len(names)
    for number, name in enumerate(names):
        np.testing.assert_array_equal(
            array_of(folder, name)[0], noise(4, 4, 3, seed=number)[..., ::-1]
        )
    assert pack(tmp_path / "data", size=4) == folder


def test_links_are_followed(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    (tmp_path / "data").symlink_to(videos)
    pack(tmp_path / "data", tmp_path / "out", size=16)
    expect_whole(videos, tmp_path / "real")


def test_the_size_is_said_before_and_the_place_after(
    videos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "smtc"):
        folder = pack(videos, size=128)
    before, after = (record.getMessage() for record in caplog.records)
    assert before.startswith("8 of 8 videos, 64 frames, take 3.1 MB of the ")
    assert before.endswith(f"free for {folder / 'packed'}.")
    assert after == f"8 videos, 64 frames, 3.1 MB, are packed in {folder / 'packed'}."


def test_too_little_space_is_refused_before_anything_is_written(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    needed = 64 * 16 * 16 * 3

    def little(path: Any) -> Any:
        return real(path)._replace(free=needed - 1)

    monkeypatch.setattr(shutil, "disk_usage", little)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"take 0\.0 MB of the 0\.0 MB .*free some, choose"):
        pack(videos, size=16)
    assert tree(tmp_path) == before


def test_what_will_be_replaced_counts_as_free(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack(data, size=64)
    for frame in find_videos(data)[0].frames:
        os.utime(frame, (1, 1))
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=0))
    assert pack(data, size=64) == folder


def test_a_second_call_has_nothing_to_do(
    videos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pack(videos, size=16)
    before = stamps(folder)
    monkeypatch.setattr(shards, "processes", None)
    with caplog.at_level(logging.INFO, "smtc"):
        assert pack(videos, size=16) == folder
    assert caplog.messages[0] == "Everything is packed already."
    assert stamps(folder) == before


def test_only_what_changed_is_packed_again(data: Path) -> None:
    folder = pack(data, size=16)
    before = stamps(folder)
    changed, gone, grown, cut, *others = find_videos(data)
    cv2.imwrite(changed.frames[0], noise(9, 9, 3))
    shutil.rmtree(Path(gone.frames[0]).parent)
    shutil.copy(grown.frames[0], Path(grown.frames[0]).with_name("00099.jpg"))
    (folder / "packed" / index_of(folder)[cut.name].file).write_bytes(b"short")
    write(data / "JPEGImages" / "480p", "new", noise(5, 5, 3))
    pack(data, size=16)
    expect_whole(data, folder)
    kept = {index_of(folder)[video.name].file for video in others}
    after = stamps(folder)
    assert {name for name in after if after[name] == before.get(name)} == kept
    assert len(after) == 8


def test_a_vanished_video_alone_is_a_change(data: Path) -> None:
    folder = pack(data, size=16)
    shutil.rmtree(Path(find_videos(data)[0].frames[0]).parent)
    pack(data, size=16)
    expect_whole(data, folder)


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(data: Path, finished: bool) -> None:
    folder = pack(data, size=16, antialias=True)
    if not finished:
        head = json.loads((folder / "packed" / "index.json").read_text())
        del head["videos"]
        (folder / "packed" / "index.json").unlink()
        (folder / "packed" / "finished.jsonl").write_text(json.dumps(head) + "\n")
    before = tree(folder)
    for other in ({"size": 17, "antialias": True}, {"size": 16}):
        with pytest.raises(UserError, match="with --size 16 --antialias, not with --size 1"):
            pack(data, **other)  # type: ignore[arg-type]
    assert tree(folder) == before


def test_an_unreadable_frame_is_reported_once_and_left_black(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    video = find_videos(data)[0]
    whole = Path(video.frames[2]).read_bytes()
    Path(video.frames[2]).write_bytes(whole[:-9])
    os.utime(video.frames[2], (10, 10))
    Path(video.frames[5]).unlink()
    Path(video.frames[5]).symlink_to("nowhere")
    folder = pack(data, size=16)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        "00000/00002.jpg: the file is cut short",
        "00000/00005.jpg: the file is missing",
    ]
    assert index_of(folder)["00000"].bad == {
        "2": "the file is cut short",
        "5": "the file is missing",
    }
    frames = array_of(folder, "00000")
    assert [int(frame.max()) > 0 for frame in frames] == [p not in (2, 5) for p in range(8)]
    before = stamps(folder)
    pack(data, size=16)
    assert stamps(folder) == before


def test_a_frame_that_can_be_read_again_is_packed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its permissions say nothing about its size and time."""
    video = find_videos(data)[0]
    real = read_image

    def refusing(path: str) -> np.ndarray:
        return real(path if path != video.frames[2] else path + "x")

    monkeypatch.setattr(shards, "read_image", refusing)
    folder = pack(data, size=16)
    assert list(index_of(folder)["00000"].bad) == ["2"]
    monkeypatch.undo()
    pack(data, folder, size=16)
    expect_whole(data, folder)


def test_files_that_change_meanwhile_are_noticed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, video = read_image, find_videos(data)[3]

    def slow(path: str) -> np.ndarray:
        if path == video.frames[-1]:
            os.utime(path, (5, 5))
        return real(path)

    monkeypatch.setattr(shards, "read_image", slow)
    with pytest.raises(UserError, match=f"files of {video.name} changed while"):
        pack(data, size=16, workers=1)
    expect_whole(data, pack(data, size=16))


# A process that packs four videos, 30 ms a frame, and comes to no end with the fifth.
_SLOW = """
import sys, time
from smtc.pipelines import shards
read_image = shards.read_image
shards.read_image = lambda path: time.sleep(99 if "/00004/" in path else 0.03) or read_image(path)
from smtc.cli import main
main(["data", "pack", *sys.argv[1:], "--size", "16", "--workers", "2"])
"""


def processes_of(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                told = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(told[2]) == group and told[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_call_leaves_no_process_and_can_go_on(
    data: Path, tmp_path: Path, how: signal.Signals
) -> None:
    folder = tmp_path / "out"
    record = folder / "packed" / "finished.jsonl"
    command = [sys.executable, "-c", _SLOW, str(data), "--output", str(folder)]
    running = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not record.exists() or record.read_text().count("\n") < 3:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert len(processes_of(running.pid)) == 3
    (os.killpg if how == signal.SIGINT else os.kill)(running.pid, how)
    _, said = running.communicate(timeout=20)
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert said.splitlines()[-1].startswith("smtc: stopped. The same command goes on")
        assert "Traceback" not in said and "rror" not in said
    while processes_of(running.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (folder / "packed" / "index.json").exists()
    done = {json.loads(line)["file"] for line in record.read_text().splitlines()[1:]}
    before = stamps(folder)
    assert 2 <= len(done) < 8
    pack(data, folder, size=16)
    expect_whole(data, folder)
    after = stamps(folder)
    assert all(after[name] == before[name] for name in done)


class Dead(BaseException):
    """Stands for a kill: nothing that is written afterwards reaches the disk."""


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A function: let the process die before the n-th change of a file's name."""
    left = [10**9]

    def until_death(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Dead
            return real(*arguments, **more)

        return call

    for name in ("rename", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, until_death(getattr(Path, name)))

    def die_at(moment: int) -> None:
        left[0] = moment

    yield die_at
    left[0] = 10**9


def test_whenever_it_is_killed_the_next_call_mends_it(
    tmp_path: Path, dying: Callable[[int], None]
) -> None:
    """First packing two videos, then packing after one changed, one vanished and one came."""
    root, folder = tmp_path / "data", tmp_path / "out"
    for moment in range(100):
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        write(root, "a", noise(8, 8, 3))
        write(root, "b", noise(8, 8, 3))
        survived = 0
        for change in (False, True):
            if change:
                shutil.rmtree(root / "a")
                cv2.imwrite(str(root / "b" / "000.png"), noise(8, 8, 3, seed=moment + 1))
                os.utime(root / "b" / "000.png", (moment, moment))
                write(root, "c", noise(8, 8, 3, seed=1))
            dying(moment)
            try:
                pack(root, folder, size=16, workers=1)
                survived += 1
            except Dead:
                pass
            dying(10**9)
            pack(root, folder, size=16, workers=1)
            expect_whole(root, folder)
        if survived == 2:
            assert moment > 6
            return
    raise AssertionError("it never came to an end")


def test_a_torn_record_counts_up_to_its_tear(data: Path) -> None:
    folder = pack(data, size=16)
    index = folder / "packed" / "index.json"
    told = json.loads(index.read_text())
    whole = told.pop("videos")
    lines = [json.dumps(entry) + "\n" for entry in [told, *whole]]
    index.unlink()
    record = folder / "packed" / "finished.jsonl"
    for cut in (0, 1, len(lines[4]) // 2, len(lines[4]) - 2):
        record.write_text("".join(lines[:4]) + lines[4][:cut])
        found = packing._finished(folder / "packed", packing.PackSettings(size=16, root=str(data)))
        assert [shard.video for shard in found] == ["00000", "00001", "00002"]
    for text in ("", "[]\n", "{}\n", "half"):
        record.write_text(text)
        with pytest.raises(UserError, match=r"finished\.jsonl is damaged; delete"):
            pack(data, size=16)
    record.write_bytes("".join(lines[:4]).encode() + b"\0" * 512 + b"\xff")
    before = stamps(folder)
    pack(data, size=16)
    expect_whole(data, folder)
    after = stamps(folder)
    assert sum(after[name] == before[name] for name in after) == 3


def test_a_disk_that_gets_full_is_one_sentence_and_no_loss(
    data: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mounted("size=300k")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(180_000))
    real = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10**9))
        with pytest.raises(UserError, match=r"\(No space left on device\); mend that and run the"):
            pack(data, disk, size=32, workers=1)
    packed = disk / "packed"
    assert not (packed / "index.json").exists()
    before = stamps(disk)
    assert 1 <= len(before) < 8
    assert not list(packed.glob("*.partial"))
    with pytest.raises(UserError, match="free some, choose another"):
        pack(data, disk, size=32)
    ballast.unlink()
    pack(data, disk, size=32)
    expect_whole(data, disk, size=32)
    after = stamps(disk)
    assert all(after[name] == before[name] for name in before)


def test_places_that_cannot_be_written_are_refused(
    videos: Path, tmp_path: Path, read_only: Path
) -> None:
    with pytest.raises(UserError, match=r"Read-only file system.* choose another --output"):
        pack(videos, read_only, size=8)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/packed cannot be written \(Not a directory\)"):
        pack(videos, tmp_path / "file")
    with pytest.raises(UserError, match="inside the data folder"):
        pack(videos, videos / "cache")
    assert not (videos / "cache").exists()


def test_a_strangers_folder_is_left_alone(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "packed").mkdir(parents=True)
    (tmp_path / "out" / "packed" / "mine.npy").touch()
    with pytest.raises(UserError, match=r"already holds 'mine\.npy'.*another --output"):
        pack(videos, tmp_path / "out")
    assert tree(tmp_path / "out") == ["packed", "packed/mine.npy"]


def test_two_calls_do_not_write_at_once(videos: Path, tmp_path: Path) -> None:
    packed = tmp_path / "out" / "packed"
    packed.mkdir(parents=True)
    handle = os.open(packed, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="Another smtc data pack writes to"):
        pack(videos, tmp_path / "out")
    os.close(handle)
    assert os.listdir(packed) == []


def test_a_call_that_another_overtook_starts_over(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*_: object) -> None:
        monkeypatch.undo()
        pack(videos, tmp_path / "out", size=16)

    monkeypatch.setattr(packing, "_say_size", overtaken)
    with pytest.raises(UserError, match="Another smtc data pack has just written to"):
        pack(videos, tmp_path / "out", size=16)
    expect_whole(videos, tmp_path / "out")


def test_a_killed_decoder_is_one_sentence(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "read_image", lambda path: os._exit(1))
    with pytest.raises(UserError, match=r"decoding process was killed.*fewer --workers"):
        pack(videos, tmp_path / "out")
    monkeypatch.undo()
    expect_whole(videos, pack(videos, tmp_path / "out", size=256), size=256)


def test_bad_settings_are_refused(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="size is 0"):
        pack(videos, size=0)
    with pytest.raises(UserError, match="workers is -1"):
        pack(videos, workers=-1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No videos in"):
        pack(tmp_path / "empty")
    assert os.listdir(tmp_path) == ["empty"]


def test_the_command_packs(videos: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    told = cli("data", "pack", videos, "--output", tmp_path / "out", "--size", 16, "--workers", 1)
    assert told.code == 0
    expect_whole(videos, tmp_path / "out")
    assert cli("data", "pack", videos, "--output", tmp_path / "out", "--size", 8).code == 2


def test_the_frames_of_another_data_folder_stay(videos: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(videos, tmp_path / "copied"))
    folder = pack(copied, tmp_path / "out", size=16)
    before = sorted(os.listdir(folder / "packed"))
    with pytest.raises(UserError, match=r"holds the frames of .*copied; choose another --output"):
        pack(videos, tmp_path / "out", size=16)
    assert sorted(os.listdir(folder / "packed")) == before


def test_files_of_others_are_never_deleted(videos: Path, tmp_path: Path) -> None:
    folder = pack(videos, tmp_path / "out", size=16)
    for name in ("my_features.npy", "movie.partial"):
        (folder / "packed" / name).write_bytes(b"precious")
    next((folder / "packed").glob("00000-*.npy")).unlink()
    pack(videos, tmp_path / "out", size=16)
    assert (folder / "packed" / "my_features.npy").read_bytes() == b"precious"
    assert (folder / "packed" / "movie.partial").read_bytes() == b"precious"
    (tmp_path / "other" / "packed").mkdir(parents=True)
    (tmp_path / "other" / "packed" / "download.partial").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"already holds 'download\.partial'"):
        pack(videos, tmp_path / "other", size=16)
