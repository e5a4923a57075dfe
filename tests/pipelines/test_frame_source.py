"""A video from its first frame to its last, from a folder, an image or a file."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from written_videos import drawn, number_of, write

from smtc.errors import UserError
from smtc.pipelines.frame_source import open_source


def folder_of(path: Path, count: int = 5, suffix: str = ".png") -> Path:
    path.mkdir(parents=True)
    for number in range(count):
        cv2.imwrite(str(path / f"{number}{suffix}"), drawn(number)[..., ::-1])
    return path


@pytest.mark.parametrize("count", [1, 12])
def test_a_folder_in_natural_order(tmp_path: Path, count: int) -> None:
    video = open_source(folder_of(tmp_path / "walk", count))
    assert (video.name, len(video), video.rate) == ("walk", count, None)
    for _ in range(2):
        assert [number_of(frame) for frame in video] == list(range(count))


def test_an_image_is_a_video_of_one_frame(tmp_path: Path) -> None:
    video = open_source(folder_of(tmp_path / "walk") / "3.png")
    assert (video.name, len(video)) == ("3", 1)
    assert [number_of(frame) for frame in video] == [3]


@pytest.mark.parametrize(
    ("name", "codec"), [("v.mp4", "libx264"), ("v.MKV", "ffv1"), ("v.avi", "mpeg4")]
)
def test_a_file_in_the_order_of_display(tmp_path: Path, name: str, codec: str) -> None:
    video = open_source(write(tmp_path / name, codec))
    assert (video.name, len(video), video.rate) == ("v", 40, 25.0)
    for _ in range(2):
        assert [number_of(frame) for frame in video] == list(range(40))


def test_files_are_opened_anew_and_closed(tmp_path: Path) -> None:
    video = open_source(write(tmp_path / "v.mp4"))
    first = iter(video)
    next(first)
    assert number_of(next(iter(video))) == 0
    assert number_of(next(first)) == 1
    first.close()  # type: ignore[attr-defined]


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(open_source(path))
    said = str(caught.value)
    assert path.name in said
    return said


def test_what_is_no_video(tmp_path: Path) -> None:
    assert "There is no " in refused(tmp_path / "absent.mp4")
    text = tmp_path / "notes.txt"
    text.write_text("not a film\n" * 100)
    assert "neither a folder of frames, nor an image, nor a video file (.mp4," in refused(text)
    # FFmpeg would draw the letters of a text file.
    film = text.rename(tmp_path / "notes.mp4")
    assert "it is no video file; give a whole video file or its frames" in refused(film)
    film.write_bytes(b"")
    assert "the file is empty" in refused(film)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "No videos in" in refused(empty)


def test_a_broken_file_is_found_before_any_frame_is_given(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.mp4: .*; give a whole video file or its frames"):
        open_source(cut)


def test_a_file_without_pictures(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert "it has no video stream; give a whole video file" in refused(path)


def test_frames_of_two_sizes_in_a_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "walk")
    cv2.imwrite(str(folder / "3.png"), drawn(3, 70, 48))
    said = refused(folder)
    assert "3.png is 70x48, the first frame 64x48; frames of a video must be of one size." in said


def test_frames_of_two_sizes_in_a_file(tmp_path: Path) -> None:
    """Motion JPEG in Matroska, whose second half is a second file's."""
    av = pytest.importorskip("av")
    parts = [
        write(tmp_path / f"{w}.mkv", "mjpeg", 6, pixels="yuvj420p", size=(w, 48)) for w in (64, 96)
    ]
    path = tmp_path / "both.mkv"
    with av.open(str(path), "w") as file:
        stream = None
        for part, source in enumerate(parts):
            with av.open(str(source)) as given:
                stream = stream or file.add_stream_from_template(given.streams.video[0])
                for packet in given.demux(video=0):
                    if packet.dts is None:
                        continue
                    packet.pts, packet.dts = (t + part * 240 for t in (packet.pts, packet.dts))
                    packet.stream = stream
                    file.mux(packet)
    said = refused(path)
    assert "is 96x48, the first frame 64x48; frames of a video must be of one size." in said
    assert said.startswith("frame 6 of ")


def test_a_folder_of_several_videos_or_of_files(tmp_path: Path) -> None:
    folder_of(tmp_path / "two" / "a"), folder_of(tmp_path / "two" / "b")
    assert f"holds 2 videos; give the folder of one, such as {tmp_path}/two/a" in refused(
        tmp_path / "two"
    )
    (tmp_path / "films").mkdir()
    write(tmp_path / "films" / "b.mp4", pictures=2), write(tmp_path / "films" / "a.mp4", pictures=2)
    assert "It holds 2 video files (a.mp4, b.mp4); name one, such as" in refused(tmp_path / "films")
