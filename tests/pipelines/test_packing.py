"""`smtc data pack`: right pixels from any picture under any name."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from commands import tree
from packed_frames import array_of, expect_whole, index_of, noise, stamps, write

from smtc.errors import UserError
from smtc.pipelines import shards
from smtc.pipelines.clips import find_videos
from smtc.pipelines.images import read_image
from smtc.pipelines.packing import pack
from smtc.pipelines.views import resize_frame


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
