"""Overlay videos: what is written can be read again, whatever the size and the encoder."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from smtc import film as film_module
from smtc.errors import UserError
from smtc.film import LONGEST, film, film_size
from smtc.pipelines.frame_source import open_source


def colours(count: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Frames of one colour each."""
    shades = np.linspace(20, 230, count).astype(np.uint8)
    return np.stack([np.full((*size, 3), (shade, 255 - shade, 90), np.uint8) for shade in shades])


def write(path: Path, frames: np.ndarray, rate: float = 25.0) -> Path:
    with film(path, rate) as add:
        for frame in frames:
            add(frame)
    return path


@pytest.mark.parametrize("rate", [25.0, 30000 / 1001, 7.5])
def test_a_film_is_h264_and_shows_its_frames_at_its_rate(tmp_path: Path, rate: float) -> None:
    av = pytest.importorskip("av")
    frames = colours(9)
    path = write(tmp_path / "film.mp4", frames, rate)
    video = open_source(path)
    assert len(video) == 9 and video.rate == pytest.approx(rate, rel=1e-4)
    for seen, wanted in zip(video, frames, strict=True):
        assert np.abs(seen.astype(int) - wanted).max() < 12
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.name == "h264"
        assert file.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_the_same_frames_are_the_same_bytes(tmp_path: Path) -> None:
    """Flat boxes on flat ground, with which x264 differed from run to run by its usual settings."""
    frames = np.full((100, 64, 96, 3), 128, np.uint8)
    frames[:, 24:48, 60:84] = (0, 255, 0)
    for index, frame in enumerate(frames):
        if index % 11 < 8:
            frame[16:40, 8 + index % 40 : 32 + index % 40] = (255, 0, 0)
    written = {write(tmp_path / "film.mp4", frames).read_bytes() for _ in range(20)}
    assert len(written) == 1


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [
        (480, 854, (480, 854)),
        (1, 1, (2, 2)),
        (63, 47, (64, 48)),
        (2160, 3840, (1080, LONGEST)),
        (3840, 2160, (LONGEST, 1080)),
        (5, 4000, (2, LONGEST)),
    ],
)
def test_sizes_are_even_and_not_too_large(
    tmp_path: Path, height: int, width: int, wanted: tuple[int, int]
) -> None:
    assert film_size(height, width) == wanted
    path = write(tmp_path / "film.mp4", colours(2, wanted))
    assert next(iter(open_source(path))).shape == (*wanted, 3)


def test_without_pyav_opencv_writes_mpeg4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    path = write(tmp_path / "film.mp4", colours(5), 12.0)
    shown = cv2.VideoCapture(str(path))
    assert (shown.get(cv2.CAP_PROP_FRAME_COUNT), shown.get(cv2.CAP_PROP_FPS)) == (5, 12)
    assert np.abs(shown.read()[1].astype(int) - colours(5)[0][..., ::-1]).max() < 12


def test_without_any_encoder_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoWriter:
        fourcc = staticmethod(lambda *_: 0)
        isOpened = staticmethod(lambda: False)  # noqa: N815

        def __init__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(film_module, "_has_h264", lambda: False)
    monkeypatch.setattr(film_module.cv2, "VideoWriter", NoWriter)
    with pytest.raises(UserError, match="no encoder for the overlay: install av"):
        write(tmp_path / "film.mp4", colours(1))


def test_an_error_on_the_way_is_told_and_no_frame_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with pytest.raises(RuntimeError, match="mine"), film(path, 10.0) as add:
        add(colours(1)[0])
        raise RuntimeError("mine")
    with film(tmp_path / "none.mp4", 10.0):
        pass
    assert not (tmp_path / "none.mp4").exists()
