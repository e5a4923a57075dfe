"""What is no video, is cut short or damaged is refused with its reason; the rest is read."""

from pathlib import Path

import numpy as np
import pytest
from written_videos import av, said, write

from smtc.pipelines.images import BadFrame
from smtc.pipelines.video_files import read_frames, read_timestamps


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    assert said(path) == said(path, [0]) == "the file is missing"
    path.touch()
    assert said(path) == said(path, [0]) == "the file is empty"
    path.write_text("a text\n" * 99)
    assert said(path) == said(path, [0]) == "it is no video file"
    path.unlink()
    path.mkdir()
    assert said(path) == "it cannot be read (Is a directory)"
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    assert said(path) == "it has no video stream"
    path = tmp_path / "silent.avi"
    write(path, "mpeg4", 3)
    path.write_bytes(path.read_bytes().replace(b"FMP4", b"ZZZZ"))
    assert said(path) == "there is no decoder for it"


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    """Its index comes first and promises all frames."""
    path = write(tmp_path / "v.mp4", container={"movflags": "faststart"}, g="12")
    times = list(read_timestamps(path))
    good = [read_frames(path, times[n : n + 1])[0] for n in range(12)]
    content = path.read_bytes()
    for share in (0.97, 0.6):
        path.write_bytes(content[: int(share * len(content))])
        assert said(path) == "the file is cut short or damaged"
        assert said(path, times[-1:]) == "the frame at 1.56 s is missing or damaged"
        assert said(path, [times[3], times[-1]]).endswith(" s is missing or damaged")
        np.testing.assert_array_equal(read_frames(path, times[:12]), good)
    path.write_bytes(content[:-1])
    assert said(path) == "the file is cut short or damaged"


def test_a_matroska_file_that_is_cut_short_ends_early(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mkv", g="12", bf="0")
    all_times = list(read_timestamps(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    times = read_timestamps(path)
    assert 5 < len(times) < 35
    assert list(times) == all_times[: len(times)]
    assert len(read_frames(path, times)) == len(times)
    assert said(path, all_times[-1:]) == "the frame at 1.56 s is missing or damaged"


@pytest.mark.parametrize(
    ("name", "codec", "detected"), [("v.mp4", "libx264", False), ("v.avi", "mpeg4", True)]
)
def test_damage_in_the_middle_stays_there(
    tmp_path: Path, name: str, codec: str, detected: bool
) -> None:
    """H.264 has no checksums: some of its damage shows as a wrong picture, as in every player."""
    path = write(tmp_path / name, codec, g="10")
    times = read_timestamps(path)
    whole = read_frames(path, times)
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][14]
    content = bytearray(path.read_bytes())
    middle = content.find(bytes(packet)) + packet.size // 3
    content[middle : middle + packet.size // 2] = bytes(packet.size // 2)
    path.write_bytes(content)
    assert read_timestamps(path) == times
    refused, wrong = set(), set()
    for number, time in enumerate(times):
        try:
            if not np.array_equal(read_frames(path, [time])[0], whole[number]):
                wrong.add(number)
        except BadFrame:
            refused.add(number)
    assert refused | wrong
    assert refused | wrong <= set(range(10, 20))
    assert not (wrong and detected)
