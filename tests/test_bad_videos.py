"""A video that `smtc segment` cannot read: one sentence, exit code 2, nothing half-written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from commands import Command, frames_of

from smtc.film import film


@pytest.fixture
def flags(tiny_run: Path, tmp_path: Path) -> list[object]:
    return ["--checkpoint", tiny_run, "--output", tmp_path / "out", "--device", "cpu"]


def write_film(path: Path) -> bytes:
    """Forty frames of noise."""
    rng = np.random.default_rng(0)
    with film(path, 25.0) as add:
        for _ in range(40):
            add(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8))
    return path.read_bytes()


def text(path: Path) -> None:
    path.write_text("no film\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    """Without the index, which comes last."""
    content = write_film(path)
    path.write_bytes(content[: len(content) * 2 // 3])


def shortened(path: Path) -> None:
    """A box that is shorter than it says, before the index."""
    content = write_film(path)
    index = content.rindex(b"moov") - 4
    path.write_bytes(content[: index // 2] + content[index:])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(5000))


def sound(path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (text, "it is no video file"),
        (empty, "the file is empty"),
        (cut, "it is no video file"),
        (shortened, "it is no video file"),
        (zeroed, "it is no video file"),
        (sound, "it has no video stream"),
    ],
)
def test_an_mp4_that_is_none(
    safe: Command,
    tmp_path: Path,
    flags: list[object],
    make: Callable[[Path], Any],
    told: str,
) -> None:
    path = tmp_path / "film.mp4"
    make(path)
    said = safe("segment", path, *flags)
    assert said.startswith("smtc: ") and f"/film.mp4: {told}" in said
    assert said.endswith("give a whole video file or its frames")


def test_a_file_of_another_kind(safe: Command, tmp_path: Path, flags: list[object]) -> None:
    (tmp_path / "notes.txt").write_text("no film\n")
    assert "neither a folder of frames, nor an image, nor a video file" in safe(
        "segment", tmp_path / "notes.txt", *flags
    )


def test_a_link_that_leads_nowhere(safe: Command, tmp_path: Path, flags: list[object]) -> None:
    (tmp_path / "film.mp4").symlink_to(tmp_path / "gone.mp4")
    assert "There is no" in safe("segment", tmp_path / "film.mp4", *flags)


def test_frames_of_mixed_sizes(
    safe: Command, videos: Path, tmp_path: Path, flags: list[object]
) -> None:
    folder = frames_of(videos, "00003")
    cv2.imwrite(str(folder / "00006.jpg"), np.zeros((40, 32, 3), np.uint8))
    said = safe("segment", folder, *flags)
    assert "00006.jpg is 32x40, the first frame 32x32; frames of a video must be of one" in said


def test_a_frame_that_is_called_jpeg_and_is_none(
    safe: Command, videos: Path, tmp_path: Path, flags: list[object]
) -> None:
    folder = frames_of(videos, "00003")
    (folder / "00002.jpg").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    assert "00003/00002.jpg: it is " in safe("segment", folder, *flags)


def test_the_output_would_replace_the_video(
    safe: Command, videos: Path, tiny_run: Path, tmp_path: Path
) -> None:
    folder = frames_of(videos, "00003")
    for output in (folder, folder.parent, videos, tmp_path):
        said = safe("segment", folder, "--checkpoint", tiny_run, "--output", output)
        assert f"The output {output} would replace the video" in said


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ("--score 2", "similarity (--score) is 2"),
        ("--area -1", "min_object (--area) is -1"),
        ("--max-objects 0", "max_objects is 0"),
        ("--max-objects 300", "max_objects is 300"),
        ("--resolution 30 32", "no multiple of the model's patch"),
        ("--seed -1", "seed is -1"),
        ("--fps 0", "fps is 0"),
        ("--batch 0", "batch is 0"),
        ("--maps objects", "semantic"),
        ("--precision int8", "bf16"),
        ("--preset ours", "official"),
    ],
)
def test_impossible_wishes(
    safe: Command, synthetic_data: Path, flags: list[object], wish: str, told: str
) -> None:
    assert told in safe("segment", frames_of(synthetic_data, "00000"), *flags, *wish.split())


def test_without_a_checkpoint(safe: Command, synthetic_data: Path, tmp_path: Path) -> None:
    command = ["segment", frames_of(synthetic_data, "00000"), "--output", tmp_path / "out"]
    assert "--checkpoint" in safe(*command)
    said = safe(*command, "--checkpoint", tmp_path / "gone.pth")
    assert "gone.pth" in said


@pytest.mark.parametrize("room", [8, 24])
def test_a_full_disk(
    refused: Command, synthetic_data: Path, tiny_run: Path, mounted: Any, room: int
) -> None:
    disk = mounted(f"size={room}k")
    frames = frames_of(synthetic_data, "00000")
    flags = ["--checkpoint", tiny_run, "--output", disk / "out", "--device", "cpu"]
    said = refused("segment", frames, *flags)
    assert "cannot be written" in said and "No space left" in said
    assert list(disk.iterdir()) == []


def test_a_read_only_disk(
    refused: Command, synthetic_data: Path, tiny_run: Path, read_only: Path
) -> None:
    flags = ["--checkpoint", tiny_run, "--output", read_only / "out", "--device", "cpu"]
    assert "cannot be written" in refused("segment", frames_of(synthetic_data, "00000"), *flags)


def test_after_a_mistake_the_right_command_works(
    cli: Command, tmp_path: Path, flags: list[object]
) -> None:
    path = tmp_path / "film.mp4"
    text(path)
    assert cli("segment", path, *flags).code == 2
    write_film(path)
    told = cli("segment", path, *flags)
    assert told.code == 0 and "in 40 frames" in told.out
