"""`smtc data inspect` reads video files too, with their times and their damage."""

import io
import re
import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import Command
from inspected import manifest_of

from smtc.config import DataConfig
from smtc.pipelines.clips import ClipSampler, Schedule, find_videos
from smtc.pipelines.faults import Faults
from smtc.pipelines.file_checks import check_files
from smtc.pipelines.frames import FileFrames
from smtc.pipelines.torch_loader import TorchLoader


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
