"""Frames of video files are found and read exactly, whatever codec and container do to them."""

import os
import shutil
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from written_videos import CASES, TEXTURE, Picture, av, drawn, number_of, remuxed, said, write

from smtc.errors import UserError
from smtc.pipelines import shards, video_files
from smtc.pipelines.clips import find_videos
from smtc.pipelines.images import BadFrame
from smtc.pipelines.video_files import iterate_frames, read_frames, read_timestamps


def shown(path: Path) -> list[Any]:
    """What PyAV shows when it simply decodes the file."""
    with av.open(str(path)) as file:
        stream = next(s for s in file.streams.video if s.codec_context.name != "mjpeg" or s.frames)
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: the name of a case to its file, written once and not to be changed."""
    files: dict[str, Path] = {}

    def file(name: str) -> Path:
        if name not in files:
            case = CASES[name]
            path = tmp_path_factory.mktemp("video") / case.file
            files[name] = write(path, case.codec, **case.more)
        return files[name]

    return file


@pytest.mark.parametrize("name", CASES)
def test_times_are_those_of_the_frames_that_decoding_shows(
    written: Callable[[str], Path], name: str
) -> None:
    path = written(name)
    times = read_timestamps(path)
    count = CASES[name].more.get("pictures", 40)
    assert len(times) == len(shown(path)) == count
    assert list(times) == sorted(set(times))
    frames = read_frames(path, times)
    assert [number_of(frame) for frame in frames] == list(range(count))
    width, height = CASES[name].more.get("size", (64, 48))
    assert {(f.shape, f.dtype.name, f.flags.c_contiguous) for f in frames} == {
        ((height, width, 3), "uint8", True)
    }


@pytest.mark.parametrize("name", CASES)
def test_some_frames_have_the_same_bits_as_in_the_whole_file(
    written: Callable[[str], Path], name: str
) -> None:
    path = written(name)
    times = read_timestamps(path)
    whole = read_frames(path, times)
    for first in range(len(times)):
        for frame, expected in zip(
            read_frames(path, times[first : first + 9 : 4]), whole[first::4], strict=False
        ):
            np.testing.assert_array_equal(frame, expected, err_msg=f"from frame {first}")


def test_threads_change_nothing(written: Callable[[str], Path]) -> None:
    path = written("B-frames")
    ours = read_frames(path, read_timestamps(path))
    with av.open(str(path)) as file:
        file.streams.video[0].thread_type = "AUTO"
        file.streams.video[0].thread_count = 4
        convert = av.video.reformatter.VideoReformatter()
        theirs = [video_files._pixels(frame, convert) for frame in file.decode(video=0)]
    np.testing.assert_array_equal(ours, theirs)


def test_times_are_read_without_decoding(
    written: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(video_files, "_decoded_times", fail)
    for name in ("B-frames", "open GOPs", "uneven times", "MPEG-2", "hidden frames of VP9"):
        assert len(read_timestamps(written(name))) == 40
    cut = remuxed(written("closed GOPs"), tmp_path / "cut.mp4", earlier=10)
    assert len(read_timestamps(cut)) == 30


def test_only_what_lies_around_the_frames_is_decoded(
    written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GOPs are of 12 frames, and a decoder holds up to 4 packets before it shows the first."""
    count = count_packets(monkeypatch)
    for name, most in (("closed GOPs", 12 + 4), ("open GOPs", 12 + 12 + 4)):
        times = read_timestamps(written(name))
        for first in range(len(times)):
            count.clear()
            read_frames(written(name), times[first : first + 2])
            assert 1 <= len(count) <= most + 1
    for time in (times[13] + 1, times[38] + 1):  # at which there is no frame
        count.clear()
        with pytest.raises(BadFrame):
            read_frames(written(name), [time])
        assert len(count) <= most


def test_frames_come_as_they_are_decoded(
    written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the file is closed when no more of them are wanted."""
    opened: list[Any] = []
    real = av.open
    monkeypatch.setattr(
        av, "open", lambda *a, **more: opened.append(real(*a, **more)) or opened[-1]
    )
    count = count_packets(monkeypatch)
    for name in ("closed GOPs", "H.264 in AVI"):
        times = read_timestamps(written(name))
        opened.clear()
        count.clear()
        frames = iterate_frames(written(name), times)
        assert not opened
        for number in range(5):
            assert number_of(next(frames)) == number
        assert len(count) <= 5 + 4
        before = len(os.listdir("/proc/self/fd"))
        frames.close()  # type: ignore[attr-defined]
        assert len(os.listdir("/proc/self/fd")) == before - 1
        assert list(frames) == []


def count_packets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets an entry with every packet decoded from now on."""
    count: list[Any] = []
    packets = video_files._packets

    def counted(*given: Any) -> Iterable[Any]:
        for packet in packets(*given):
            count.append(None)
            yield packet

    monkeypatch.setattr(video_files, "_packets", counted)
    return count


def test_a_video_file_is_packed_in_one_pass(
    written: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frame by frame, none kept."""
    path = written("closed GOPs")
    (video,) = find_videos(path.parent, containers=True)
    writing = shards._Writing(video, (24, 32), tmp_path)
    monkeypatch.setattr(shards, "_PIECE", 7)
    writing.create()
    (piece,) = writing.pieces(False)
    count = count_packets(monkeypatch)
    alive: list[Any] = []
    real = shards.resize_frame

    def resize(frame: Picture, *given: Any, **more: Any) -> None:
        assert sum(reference() is not None for reference in alive) <= 1
        alive.append(weakref.ref(frame))
        real(frame, *given, **more)

    monkeypatch.setattr(shards, "resize_frame", resize)
    checksums, bad = shards._pack(piece)
    assert (len(checksums), bad, len(alive)) == (40, {}, 40)
    assert len(count) <= 40 + 1


@pytest.mark.parametrize(
    "name", ["MPEG-4", "MPEG-4 in AVI", "closed GOPs", "MPEG-2", "B-frames in AVI", "motion JPEG"]
)
def test_frames_of_a_damaged_file_are_packed_as_they_are_read_alone(
    written: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    path = Path(shutil.copy(written(name), tmp_path / written(name).name))
    (video,) = find_videos(tmp_path, containers=True)
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for packet in packets[9], packets[25]:
        middle = content.find(packet) + len(packet) // 3
        content[middle : middle + len(packet) // 2] = bytes(len(packet) // 2)
    path.write_bytes(content)
    refused = 0
    packed = list(shards._read(video))
    assert len(packed) == 40
    for position, frame in enumerate(packed):
        alone = shards._read_one(video, position)
        if isinstance(alone, BadFrame):
            refused += 1
            assert str(frame) == str(alone)
        elif name == "closed GOPs":  # what is painted over depends on the frames before it
            assert not isinstance(frame, BadFrame)
        else:
            np.testing.assert_array_equal(frame, alone, err_msg=f"frame {position}")
    assert 0 < refused < 40


def test_a_frame_that_fails_once_is_packed(
    written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a network drops for a moment."""
    path = written("closed GOPs")
    (video,) = find_videos(path.parent, containers=True)
    begun: list[int] = []

    def failing(path: str, times: Sequence[int]) -> Iterator[Picture]:
        begun.append(len(times))
        for number, frame in enumerate(iterate_frames(path, times)):
            if len(begun) == 1 and number == 17:
                raise BadFrame(path, "it cannot be read")
            yield frame

    monkeypatch.setattr(shards, "iterate_frames", failing)
    packed = list(shards._read(video))
    np.testing.assert_array_equal(packed, read_frames(path, video.timestamps))
    assert begun == [40, 40 - 17]


@pytest.mark.parametrize("name", ["hidden frames of VP9", "motion JPEG"])
def test_dali_counts_and_converts_frames_as_we_do(
    written: Callable[[str], Path], name: str
) -> None:
    """Of codecs that it decodes on a CPU, in files that name no colour matrix and no rotation."""
    dali = pytest.importorskip("nvidia.dali")
    path, positions = written(name), [1, 13, 20, 33]

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> Any:
        file = dali.fn.external_source(
            source=lambda: [np.frombuffer(path.read_bytes(), np.uint8)], dtype=dali.types.UINT8
        )
        return dali.fn.decoders.video(file, device="cpu", frames=positions)

    built = pipeline()
    built.build()
    times = read_timestamps(path)
    ours = read_frames(path, [times[position] for position in positions])
    np.testing.assert_array_equal(np.array(built.run()[0][0]), ours)


def test_frames_before_the_start_of_an_edit_list_do_not_count(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    path = remuxed(written("closed GOPs"), tmp_path / "cut.mp4", earlier=10)
    times = read_timestamps(path)
    assert len(shown(path)) == len(times) == 30
    frames = [read_frames(path, [time])[0] for time in times]
    assert [number_of(frame) for frame in frames] == list(range(10, 40))


@pytest.mark.parametrize(
    ("name", "file"),
    [("closed GOPs", "v.mp4"), ("closed GOPs", "v.mkv"), ("MPEG-4", "v.mp4"), ("MPEG-4", "v.mkv")],
)
def test_frames_before_the_first_keyframe_do_not_count(
    written: Callable[[str], Path], tmp_path: Path, name: str, file: str
) -> None:
    path = remuxed(written(name), tmp_path / file, drop=5, earlier=-50)
    times = read_timestamps(path)
    frames = [read_frames(path, [time])[0] for time in times]
    assert [number_of(frame) for frame in frames] == list(range(12, 40))


def test_packets_without_a_picture_do_not_count(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    """The file begins with a keyframe whose followers refer to frames before it."""
    path = remuxed(written("HEVC with open GOPs"), tmp_path / "v.mp4", drop=12, earlier=-50)
    times = read_timestamps(path)
    with av.open(str(path)) as file:
        assert len(times) == len(shown(path)) < file.streams.video[0].frames
    frames = [read_frames(path, [time])[0] for time in times]
    assert [number_of(frame) for frame in frames] == list(range(40 - len(times), 40))


def test_an_empty_packet_repeats_a_frame(tmp_path: Path) -> None:
    """A decoder would take it for the end of the video."""
    path = write(tmp_path / "v.mov", "mjpeg", 12, pixels="yuvj420p")
    content = bytearray(path.read_bytes())
    table = content.find(b"stsz") + 16  # sizes of the frames
    sizes = list(struct.unpack_from(">12I", content, table))
    sizes[4:6] = [sizes[4] + sizes[5], 0]
    struct.pack_into(">12I", content, table, *sizes)
    path.write_bytes(content)
    times = read_timestamps(path)
    numbers = [number_of(read_frames(path, [time])[0]) for time in times]
    assert numbers == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("beside", ["libx264", "aac"])
def test_a_cover_picture_is_no_video(tmp_path: Path, beside: str) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as file:
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        other = file.add_stream(beside, rate=25 if beside == "libx264" else 8000)
        given = [(cover, av.VideoFrame.from_ndarray(drawn(4000), format="rgb24"))]
        if beside == "libx264":
            other.width, other.height, other.pix_fmt = 64, 48, "yuv420p"
            pictures = [av.VideoFrame.from_ndarray(drawn(n), format="rgb24") for n in range(12)]
            given += [(other, picture) for picture in pictures]
        else:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.sample_rate = 8000
            given.append((other, sound))
        for position, (stream, frame) in enumerate(given):
            frame.pts = max(0, position - 1)
            file.mux(stream.encode(frame))
        for stream in (cover, other):
            file.mux(stream.encode(None))
    with av.open(str(path)) as file:
        assert cover_count(file) == 1
    if beside == "aac":
        assert said(path) == "it has no video stream"
    else:
        frames = read_frames(path, read_timestamps(path))
        assert [number_of(frame) for frame in frames] == list(range(12))


def cover_count(file: Any) -> int:
    return sum(stream.codec_context.name == "mjpeg" for stream in file.streams.video)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_frames_stand_upright(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    """A phone stores the picture of its sensor and by which turn it is to be shown."""
    stored = drawn(1234)
    path = write(
        tmp_path / "phone.mp4",
        "libx264rgb",
        [stored] * 2,
        pixels="rgb24",
        qp="0",
        set_up=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored),
    )
    frame = read_frames(path, read_timestamps(path)[:1])[0]
    expected = np.rot90(stored, degrees // 90)
    np.testing.assert_array_equal(frame, expected[:, ::-1] if mirrored else expected)
    assert frame.flags.c_contiguous


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "red", "blue"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114)])
def test_colours_follow_the_matrix_and_range_of_the_file(
    tmp_path: Path, matrix: int, red: float, blue: float, full: bool
) -> None:
    check_colours(tmp_path, matrix, red, blue, full)


def test_unnamed_colours_are_bt601(tmp_path: Path) -> None:
    check_colours(tmp_path, 2, 0.299, 0.114, False)


def check_colours(folder: Path, matrix: int, red: float, blue: float, full: bool) -> None:
    """Against the inverse of ITU-R BT.601 and BT.709 in float, chroma interpolated linearly."""
    smooth = cv2.GaussianBlur(TEXTURE[:96, :160], (0, 0), 3)

    def set_up(stream: Any) -> None:
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full else 1

    settings: dict[str, Any] = {"size": (160, 96), "set_up": set_up}
    for codec, more in (
        ("libx264", {"qp": "0"}),
        ("libvpx-vp9", {"pixels": "yuv444p", "lossless": "1"}),
    ):
        path = write(folder / "v.mkv", codec, [smooth] * 3, **settings, **more)
        with av.open(str(path)) as file:
            stored = next(file.decode(video=0))
        assert (stored.colorspace, stored.color_range) == (matrix, 2 if full else 1)
        y, u, v = (plane.astype(np.float32) for plane in planes(stored))
        if codec == "libx264":
            u, v = enlarged(u), enlarged(v)
        u, v = u - 128, v - 128
        y, u, v = (y / 255, u / 255, v / 255) if full else ((y - 16) / 219, u / 224, v / 224)
        r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
        g = (y - red * r - blue * b) / (1 - red - blue)
        expected = np.clip(np.stack([r, g, b], -1) * 255, 0, 255)
        ours = read_frames(path, read_timestamps(path)[:1])[0]
        assert np.abs(ours - expected).max() < 1.6, codec
        assert np.abs(ours - np.round(expected)).mean() < 0.05, codec


def enlarged(chroma: NDArray[np.float32]) -> NDArray[np.float32]:
    """A sample lies level with every other column of the picture and between two of its rows."""
    height, width = chroma.shape
    columns, rows = np.meshgrid(np.arange(2 * width) / 2, (np.arange(2 * height) + 0.5) / 2 - 0.5)
    where = columns.astype(np.float32), rows.astype(np.float32)
    return cv2.remap(chroma, *where, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def planes(frame: Any) -> list[Picture]:
    return [
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    ]


@pytest.mark.parametrize(("codec", "pixels"), [("libx264rgb", "rgb24"), ("ffv1", "bgr0")])
def test_lossless_rgb_comes_back_bit_by_bit(tmp_path: Path, codec: str, pixels: str) -> None:
    more = {"qp": "0"} if codec == "libx264rgb" else {}
    path = write(tmp_path / "v.mkv", codec, 9, pixels=pixels, size=(61, 43), **more)
    frames = read_frames(path, read_timestamps(path))
    np.testing.assert_array_equal(frames, [drawn(number, 61, 43) for number in range(9)])


def test_a_time_that_no_frame_has_is_refused(written: Callable[[str], Path]) -> None:
    path = written("closed GOPs")
    times = read_timestamps(path)
    assert said(path, [times[20] + 1]) == "the frame at 0.80 s is missing or damaged"
    assert said(path, [times[3], times[3] + 1]) == "the frame at 0.12 s is missing or damaged"
    assert said(path, [times[-1] + 512]) == "the frame at 1.60 s is missing or damaged"
    assert said(path, [-99999]).endswith("is missing or damaged")
    assert read_frames(path, []) == []


def test_odd_names_and_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(
        tmp_path / "v.mkv",
        pictures=4,
        set_up=lambda stream: stream.container.metadata.update(title="TITLE"),
    )
    content = source.read_bytes().replace(b"TITLE", b"caf\xe9!")
    assert b"caf\xe9" in content
    for name in ("http:a b.mkv", "%03d ü 漢#?.mkv", "\udcff.mkv"):
        Path(name).write_bytes(content)
        assert len(read_frames(name, read_timestamps(name))) == 4


def test_without_pyav_the_remedy_is_named(
    written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written("B-frames")
    monkeypatch.setitem(sys.modules, "av", None)
    for read in (read_timestamps, lambda path: read_frames(path, [0])):
        with pytest.raises(UserError, match=r"pip install av") as caught:
            read(path)
        assert not isinstance(caught.value, BadFrame)
    with pytest.raises(UserError, match=r"pip install av"):
        find_videos(path.parent, containers=True)


def test_a_long_video_takes_no_more_memory(tmp_path: Path) -> None:
    """Indexing 10 000 frames and reading from the end, in a process of its own."""
    picture = drawn(5, 32, 32)
    path = write(tmp_path / "v.mp4", "mpeg4", (picture for _ in range(10_000)), size=(32, 32))
    script = f"""
import resource
from smtc.pipelines.video_files import read_frames, read_timestamps
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_frames({str(path)!r}, [0])
before = peak()
times = read_timestamps({str(path)!r})
assert len(times) == 10_000
for start in range(0, 9000, 450):
    read_frames({str(path)!r}, times[start : start + 40 : 10])
print(peak() - before)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) < 8000  # KiB; the times themselves are about 700
