"""Folders of video files become videos, and the loader delivers their clips."""

import logging
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import cv2
import pytest
import torch
from written_videos import drawn, write

from smtc.config import AugmentConfig, DataConfig
from smtc.errors import UserError
from smtc.pipelines.clips import Clip, ClipSampler, Schedule, find_videos
from smtc.pipelines.faults import Faults
from smtc.pipelines.frames import FileFrames
from smtc.pipelines.torch_loader import TorchLoader
from smtc.pipelines.video_files import compact, read_frames, read_timestamps


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Lossless videos in two class folders, and one beside them."""
    root = tmp_path / "library"
    for number, name in enumerate(("run/b 2.mkv", "run/b 10.MKV", "walk/ä.mp4", "c.mkv")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pictures = [drawn(100 * number + n) for n in range(20 + number)]
        write(root / name, "libx264rgb", pictures, pixels="rgb24", qp="0", g="7")
    return root


def test_video_files_are_found_in_the_folder_and_its_subfolders(library: Path) -> None:
    for name in (".hidden.mp4", "run/notes.txt", "run/deep/er.mp4", ".cache/x.mp4"):
        (library / name).parent.mkdir(exist_ok=True)
        (library / name).write_bytes((library / "c.mkv").read_bytes())
    os.mkfifo(library / "pipe.mp4")
    videos = find_videos(library, containers=True)
    assert [video.name for video in videos] == ["c", "run/b 10", "run/b 2", "walk/ä"]
    assert [len(video.frames) for video in videos] == [23, 21, 20, 22]
    path = str(library / "run" / "b 2.mkv")
    assert videos[2].container == path
    assert tuple(videos[2].frames[:2]) == (f"{path}#0", f"{path}#1")
    assert videos[2].timestamps == read_timestamps(path)


def test_names_and_times_of_frames_take_no_memory(library: Path) -> None:
    """However long the video is; a set of thousands of hours lies in every worker."""
    path = str(library / "c.mkv")
    known = {path: range(0, 512 * 10_000_000, 512)}
    (library / "run").rename(library / ".run")
    (library / "walk").rename(library / ".walk")
    (video,) = find_videos(library, containers=True, timestamps=known)
    assert len(video.frames) == len(video.timestamps) == 10_000_000
    assert len(pickle.dumps(video)) < 1000
    frames = video.frames
    assert (frames[7], frames[-1]) == (f"{path}#7", f"{path}#9999999")
    assert list(frames[5:-1:4_000_000]) == [f"{path}#{n}" for n in (5, 4_000_005, 8_000_005)]
    assert len(frames[5:8]) == 3 and frames[5:8][1:][0] == f"{path}#6"
    with pytest.raises(IndexError):
        frames[10_000_000]
    assert pickle.loads(pickle.dumps(video)) == video
    assert hash(pickle.loads(pickle.dumps(video))) == hash(video)
    assert frames[:3] == frames[:-1][:3] != frames[1:4]
    assert Clip(0, video, 5, 2, (5, 7)).paths == (f"{path}#5", f"{path}#7")


@pytest.mark.parametrize(
    "times", [(7,), (0, 512), tuple(range(-1024, 9000, 40)), (0, 33, 67, 100), (5, 5), ()]
)
def test_compact_times_are_the_same_times(times: tuple[int, ...]) -> None:
    short = compact(list(times))
    assert tuple(short) == times
    assert isinstance(short, range) == (times not in ((0, 33, 67, 100), (5, 5), ()))
    assert compact(short) == short
    assert hash(short) == hash(compact(times))


def test_unreadable_video_files_are_named_and_left_out(
    library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (library / "run" / "b 2.mkv").write_bytes(b"")
    (library / "gone.mp4").symlink_to(library / "nowhere")
    with caplog.at_level(logging.WARNING, "smtc"):
        videos = find_videos(library, containers=True)
    assert [video.name for video in videos] == ["c", "run/b 10", "walk/ä"]
    assert [record.getMessage() for record in caplog.records] == [
        "library/gone.mp4: the file is missing; the video is left out",
        "run/b 2.mkv: the file is empty; the video is left out",
    ]
    for file in [file for file in library.rglob("*.*") if not file.is_dir()]:
        file.unlink()
        file.write_text("text")
    with pytest.raises(UserError, match=r"None of the 5 video files in .* one is library/c\.mkv: "):
        find_videos(library, containers=True)


def test_known_times_are_not_read_again(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = find_videos(library, containers=True)
    known = {str(video.container): video.timestamps for video in videos}
    del known[str(library / "c.mkv")]
    read: list[str] = []

    def reading(path: str) -> Sequence[int]:
        read.append(path)
        return read_timestamps(path)

    monkeypatch.setattr("smtc.pipelines.clips.read_timestamps", reading)
    assert find_videos(library, containers=True, timestamps=known) == videos
    assert read == [str(library / "c.mkv")]


def loader(root: Path, *, workers: int, config: DataConfig) -> TorchLoader:
    sampler = ClipSampler(
        find_videos(root, containers=True), frames=3, gap=4, random_gap=True, seed=1
    )
    schedule = Schedule(batch=2, steps=5)
    return TorchLoader(config, schedule, sampler, FileFrames(), Faults(config), size=(32, 32))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_delivers_the_same_clips_as_from_folders_of_frames(
    library: Path, tmp_path: Path, workers: int
) -> None:
    root = tmp_path / "frames"
    for video in find_videos(library, containers=True):
        # Flat names that sort like those of the files, for folders of frames are not nested.
        folder = root / video.name.replace("/", "-")
        folder.mkdir(parents=True)
        for position, frame in enumerate(read_frames(video.container or "", video.timestamps)):
            cv2.imwrite(str(folder / f"{position}.png"), frame[..., ::-1])
    augment = AugmentConfig(crop=(0.5, 1), flip=0.5, jitter_chance=0.8)
    config = DataConfig(root=str(root), frames=3, augment=augment, workers=workers)
    from_files = list(loader(library, workers=workers, config=config))
    from_folders = list(loader(root, workers=workers, config=config))
    assert len(from_files) == 5
    for one, other in zip(from_files, from_folders, strict=True):
        assert torch.equal(one.views, other.views)
        for a, b in zip(one.sources, other.sources, strict=True):
            assert (a.video.replace("/", "-"), a.start, a.gap) == (b.video, b.start, b.gap)
            assert [f.split("#")[1] for f in a.frames] == [Path(f).stem for f in b.frames]


def test_a_file_that_vanishes_is_replaced_by_another_clip(
    library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(root=str(library), frames=3, workers=0, max_bad_share=1.0)
    data = loader(library, workers=0, config=config)
    (library / "c.mkv").unlink()
    with caplog.at_level(logging.WARNING, "smtc"):
        batches = list(data)
    assert "c" not in {source.video for batch in batches for source in batch.sources}
    assert data.faults.replaced == 2 or data.faults.replaced == 3
    assert [r.getMessage() for r in caplog.records] == ["library/c.mkv: the file is missing"]
