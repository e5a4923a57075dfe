"""Packed frames give the clips of the files, and refuse to give wrong ones."""

import json
import multiprocessing
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from smtc.config import AugmentConfig, DataConfig
from smtc.errors import UserError
from smtc.pipelines import cache, shards
from smtc.pipelines.batch import Batch
from smtc.pipelines.cache import PackedFrames, Unpacked, open_packed, read_index
from smtc.pipelines.clips import Clip, ClipSampler, Schedule, find_videos
from smtc.pipelines.faults import Faults
from smtc.pipelines.frames import FileFrames, Frames
from smtc.pipelines.images import BadFrame
from smtc.pipelines.packing import pack
from smtc.pipelines.torch_loader import TorchLoader
from smtc.pipelines.views import resize_frame

WHOLE = AugmentConfig(flip=0.5, grayscale=0.2, jitter_chance=0.8, blur=0.3)


@pytest.fixture
def data(videos: Path, tmp_path: Path) -> Path:
    """Videos that a test may change."""
    return Path(shutil.copytree(videos, tmp_path / "data"))


@pytest.fixture
def packed(data: Path, tmp_path: Path) -> Path:
    """The cache folder of `data`, packed at 32x32."""
    return pack(data, tmp_path / "cache", size=32)


def opened(
    root: Path, folder: Path, size: tuple[int, int] = (32, 32), **settings: Any
) -> PackedFrames:
    known_bad = settings.pop("known_bad", None)
    config = DataConfig(root=str(root), cache=str(folder), **settings)
    videos = find_videos(root, containers=True)
    return open_packed(folder, videos, config, size, known_bad=known_bad)


def sampler(root: Path, gap: int = 2) -> ClipSampler:
    videos = find_videos(root, containers=True)
    return ClipSampler(videos, frames=4, gap=gap, random_gap=False, seed=3)


def batches(
    root: Path, frames: Frames, size: tuple[int, int] = (32, 32), **more: Any
) -> list[Batch]:
    config = DataConfig(**{"root": str(root), "workers": 0, "max_bad_share": 1.0, **more})
    schedule = Schedule(batch=4, steps=4)
    return list(TorchLoader(config, schedule, sampler(root), frames, Faults(config), size=size))


def shard_of(folder: Path, video: str) -> Path:
    (path,) = (folder / "packed").glob(f"{video}-*.npy")
    return path


def spoil(path: Path, position: int) -> None:
    """Flip one bit."""
    with path.open("r+b") as file:
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ 4]))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_whole_frames_at_their_packed_size_are_the_same_bits(
    videos: Path, tmp_path: Path, antialias: bool, workers: int
) -> None:
    folder = pack(videos, tmp_path / "cache", size=32, antialias=antialias)
    frames = opened(videos, folder, antialias=antialias)
    settings = {"augment": WHOLE, "antialias": antialias, "workers": workers}
    expected = batches(videos, FileFrames(), **settings)
    for one, other in zip(expected, batches(videos, frames, **settings), strict=True):
        assert torch.equal(one.views, other.views)
        assert one.sources == other.sources


def smooth(root: Path) -> Path:
    """Four videos of slowly varying 120x180 pictures."""
    rng = np.random.default_rng(0)
    for video in range(4):
        (root / f"{video}").mkdir(parents=True)
        for number in range(4):
            coarse = rng.integers(0, 256, (6, 9, 3), np.uint8)
            picture = cv2.resize(coarse, (180, 120), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(root / f"{video}" / f"{number}.png"), picture)
    return root


@pytest.mark.parametrize(
    ("keep_aspect", "resize", "size"),
    [(False, "squash", (48, 48)), (True, "squash", (48, 48)), (True, "crop", (48, 32))],
)
def test_crops_differ_by_their_resampling_only(
    tmp_path: Path, keep_aspect: bool, resize: str, size: tuple[int, int]
) -> None:
    """Less than half of what one pixel beside would give; crops begin at whole pixels."""
    root = smooth(tmp_path / "data")
    folder = pack(root, tmp_path / "cache", size=80, keep_aspect=keep_aspect)
    settings: dict = {"augment": AugmentConfig(crop=(0.3, 1), flip=0.5), "resize": resize}
    frames = opened(root, folder, size, **settings)
    expected = batches(root, FileFrames(), size, **settings)
    for one, other in zip(expected, batches(root, frames, size, **settings), strict=True):
        difference = (one.views - other.views).abs().mean()
        pixel = (one.views[..., 1:] - one.views[..., :-1]).abs().mean()
        assert 0 < difference < 0.4 * pixel


def test_a_clip_is_a_copy_of_its_frames(data: Path, packed: Path) -> None:
    frames = opened(data, packed)
    clip = sampler(data).clip(5)
    pixels = frames.read(clip)
    assert (pixels.shape, pixels.dtype) == ((4, 32, 32, 3), np.uint8)
    assert pixels.flags.c_contiguous
    whole = np.load(shard_of(packed, clip.video.name))
    np.testing.assert_array_equal(pixels, whole[list(clip.frames)])
    pixels[:] = 0
    np.testing.assert_array_equal(frames.read(clip), whole[list(clip.frames)])


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_with_unreadable_frames_are_replaced_as_without_packing(
    data: Path, tmp_path: Path, workers: int
) -> None:
    for video in find_videos(data)[:3]:
        Path(video.frames[3]).write_bytes(b"")
        Path(video.frames[6]).write_bytes(b"neither")
    frames = opened(data, pack(data, tmp_path / "cache", size=32))
    config = DataConfig(root=str(data), workers=workers, augment=WHOLE, max_bad_share=1.0)
    told = []
    for source in (FileFrames(), frames):
        loader = TorchLoader(
            config, Schedule(batch=4, steps=6), sampler(data), source, Faults(config), size=(32, 32)
        )
        told.append((list(loader), loader.faults))
    (expected, by_files), (found, by_cache) = told
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.views, other.views)
    assert by_files.bad_files == by_cache.bad_files != {}
    assert by_files.replaced == by_cache.replaced > 0


def record(path: Path, frames: int) -> None:
    """A video file of moving noise whose keyframes are rare."""
    av = pytest.importorskip("av", exc_type=ImportError)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(frames).integers(0, 256, (48, 64, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 12
        for number in range(frames):
            shifted = np.roll(cv2.blur(picture, (9, 9)), number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shifted, format="rgb24")))
        container.mux(stream.encode(None))


def test_video_files_are_packed_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_PIECE", 7)
    root = tmp_path / "data"
    for name, frames in (("one.mp4", 30), ("inner/ä b.mkv", 9)):
        record(root / name, frames)
    damaged = root / "damaged.mp4"
    record(damaged, 60)
    with damaged.open("r+b") as file:
        file.seek(damaged.stat().st_size // 3)
        file.write(bytes(400))
    frames = opened(root, pack(root, tmp_path / "cache", size=32))
    clips = sampler(root)
    assert {video.name for video in clips.videos} == {"one", "inner/ä b", "damaged"}
    refused = 0
    for index in range(60):
        clip = clips.clip(index)
        try:
            expected = FileFrames().read(clip)
        except BadFrame as error:
            refused += 1
            with pytest.raises(BadFrame) as said:
                frames.read(clip)
            assert str(said.value) == str(error)
            continue
        squashed = [resize_frame(frame, (32, 32)) for frame in expected]
        np.testing.assert_array_equal(frames.read(clip), squashed)
    assert 0 < refused < 20
    change(root / "one.mp4")
    with pytest.raises(UserError, match=r"1 of 3 videos \(one, say\)"):
        opened(root, tmp_path / "cache")


def test_files_known_to_be_bad_are_not_used(data: Path, packed: Path) -> None:
    clip = sampler(data).clip(0)
    frames = opened(data, packed, known_bad={clip.paths[2]: "it is odd"})
    by_files = FileFrames({clip.paths[2]: "it is odd"})
    for refusing in (frames, pickle.loads(pickle.dumps(frames)), by_files):
        with pytest.raises(BadFrame, match=f"/{Path(clip.paths[2]).name}: it is odd"):
            refusing.read(clip)
    with pytest.raises(BadFrame):
        frames.refuse_bad(clip)
    opened(data, packed).refuse_bad(clip)


def test_the_files_are_needed_to_open_but_not_to_read(data: Path, packed: Path) -> None:
    frames, clip = opened(data, packed), sampler(data).clip(0)
    expected = FileFrames().read(clip)
    shutil.rmtree(data)
    found = frames.read(clip)
    np.testing.assert_array_equal(found[0], cv2.resize(expected[0], (32, 32)))


def test_nothing_packed_is_told_from_something_unusable(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    with pytest.raises(Unpacked) as said:
        opened(data, folder, resize="crop", antialias=True)
    command = f"smtc data pack {data} --output '{folder}' --keep-aspect --antialias"
    assert str(said.value).endswith(f"run: {command}")
    pack(data, folder, size=32)
    (folder / "packed" / "index.json").unlink()
    with pytest.raises(Unpacked, match="No finished packed frames"):
        opened(data, folder)
    with pytest.raises(Unpacked, match=r"run: smtc data pack data$"):
        open_packed(folder, [], DataConfig(root="data"), (32, 32))


def change(frame: Path) -> None:
    os.utime(frame, (7, 7))


def replace(frame: Path) -> None:
    """By another of the same time."""
    time = frame.stat().st_mtime
    frame.write_bytes(frame.read_bytes() + b"\0")
    os.utime(frame, (time, time))


def rename(frame: Path) -> None:
    frame.rename(frame.with_name("00000a.jpg"))


def add(frame: Path) -> None:
    shutil.copytree(frame.parent, frame.parent.with_name("added"))


@pytest.mark.parametrize("harm", [change, replace, rename, Path.unlink, add])
def test_other_files_than_were_packed_are_refused_until_packed(
    data: Path, packed: Path, harm: Callable[[Path], None]
) -> None:
    harm(Path(find_videos(data)[2].frames[1]))
    with pytest.raises(
        UserError,
        match=r"^1 of \d videos \((00002|added), say\) .* pack them: smtc data .*32$",
    ):
        opened(data, packed)
    pack(data, packed, size=32)
    opened(data, packed)


def test_copied_data_keep_their_packed_frames(data: Path, packed: Path, tmp_path: Path) -> None:
    """`cp -p`, rsync and tar keep times, some of them in whole seconds."""
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    for frame in copy.rglob("*.jpg"):
        os.utime(frame, (0, int(frame.stat().st_mtime)))
    assert opened(copy, packed).read(sampler(copy).clip(0)).shape == (4, 32, 32, 3)


def test_fewer_videos_are_served(data: Path, packed: Path) -> None:
    assert opened(data, packed).total_bytes == 8 * 8 * 32 * 32 * 3
    shutil.rmtree(Path(find_videos(data)[0].frames[0]).parent)
    frames = opened(data, packed)
    assert frames.total_bytes == 7 * 8 * 32 * 32 * 3
    assert [name for name, _ in frames.arrays()] == [video.name for video in find_videos(data)]


def test_settings_that_do_not_suit_are_refused(data: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at 32x32, smaller .*\(16x33\); delete .*--size 33"):
        opened(data, packed, (16, 33))
    with pytest.raises(UserError, match=r"squashed, which data\.resize=crop .*--keep-aspect"):
        opened(data, packed, resize="crop")
    with pytest.raises(UserError, match=r"without --antialias .* delete that folder"):
        opened(data, packed, antialias=True)
    other = pack(data, tmp_path / "other", size=32, antialias=True, keep_aspect=True)
    with pytest.raises(UserError, match=r"with --antialias .* without it"):
        opened(data, other)
    opened(data, other, resize="crop", antialias=True)


def test_a_broken_index_is_refused(data: Path, packed: Path) -> None:
    index = packed / "packed" / "index.json"
    whole = index.read_text()
    for text in ("", whole[:-5], "[]", '{"version": 1}', whole.replace('"crc32"', '"sum"'), "\xff"):
        index.write_text(text)
        for use in (lambda: opened(data, packed), lambda: pack(data, packed, size=32)):
            with pytest.raises(UserError, match=r"index\.json is damaged; delete .*packed and"):
                use()
    index.write_text(json.dumps(json.loads(whole) | {"version": 99}))
    with pytest.raises(UserError, match="another version of smtc"):
        opened(data, packed)


def test_a_missing_or_short_shard_is_named_and_mended(data: Path, packed: Path) -> None:
    shard = shard_of(packed, "00003")
    for harm, said in (
        (lambda: shard.unlink(), "is missing"),
        (lambda: os.truncate(shard, 1000), "1000 bytes instead of"),
    ):
        harm()
        with pytest.raises(UserError, match=rf"{shard.name}, the packed frames of 00003, .*{said}"):
            opened(data, packed)
        pack(data, packed, size=32)
        assert opened(data, packed).total_bytes == 8 * 8 * 32 * 32 * 3


def test_a_shard_cut_short_after_opening_is_named(data: Path, packed: Path) -> None:
    """A map of a file that lost its end would kill the process."""
    frames = opened(data, packed)
    for shard in (packed / "packed").glob("*.npy"):
        os.truncate(shard, 500)
    with pytest.raises(UserError, match="500 bytes instead of"):
        frames.read(sampler(data).clip(0))


def test_a_flipped_bit_is_found_named_and_mended(data: Path, packed: Path) -> None:
    clip = sampler(data).clip(0)
    frames, shard = opened(data, packed), shard_of(packed, clip.video.name)
    expected = frames.read(clip)
    header = shard.stat().st_size - 8 * 32 * 32 * 3
    spoil(shard, header + clip.frames[1] * 32 * 32 * 3 + 1234)
    said = rf"{shard.name}, .* is damaged \(frame {clip.frames[1]} has another checksum\); delete"
    other = sampler(data).clip(1)  # of the same epoch, so of another video
    fresh = opened(data, packed)
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            fresh.read(clip)
    fresh.read(other)
    with pytest.raises(UserError, match="has another checksum"):
        list(fresh.arrays())
    with pytest.raises(UserError, match="has another checksum"):
        batches(data, opened(data, packed), workers=2)
    shard.unlink()
    pack(data, packed, size=32)
    np.testing.assert_array_equal(opened(data, packed).read(clip), expected)


def test_a_broken_header_is_named(data: Path, packed: Path) -> None:
    clip = sampler(data).clip(0)
    shard = shard_of(packed, clip.video.name)
    whole = shard.read_bytes()
    for damaged in (
        b"nothing" + whole[7:],
        whole.replace(b"(8, 32, 32, 3)", b"(8, 32, 96, 1)"),
        whole.replace(b"'|u1'", b"'|i1'"),
        whole.replace(b"(8, 32, 32, 3)", b"(8, 32, 32, 9)"),
        whole[:20] + bytes(60) + whole[80:],
    ):
        assert len(damaged) == len(whole) and damaged != whole
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{shard.name}, .* is damaged \(its header"):
            opened(data, packed).read(clip)


def test_a_frame_is_checked_when_it_is_first_read(
    data: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []

    def counting(frame: np.ndarray) -> int:
        checked.append(1)
        return zlib.crc32(frame)

    monkeypatch.setattr(cache, "zlib", type("zlib", (), {"crc32": staticmethod(counting)}))
    frames, video = opened(data, packed), find_videos(data)[0]
    for positions, count in (((0, 2, 4, 6), 4), ((0, 2, 4, 6), 4), ((1, 2, 3, 4), 6)):
        frames.read(Clip(0, video, positions[0], 1, positions))
        assert len(checked) == count


def test_arrays_are_read_only_maps(data: Path, packed: Path) -> None:
    frames = opened(data, packed)
    for name, array in frames.arrays():
        assert (array.shape, array.dtype) == ((8, 32, 32, 3), np.uint8)
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, np.load(shard_of(packed, name)))


def test_few_maps_are_open_at_a_time(
    data: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_OPEN_MAPS", 3)
    frames, clips = opened(data, packed), sampler(data)

    def open_files() -> int:
        names = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return sum(name.startswith(str(packed.resolve())) for name in names)

    seen = []
    for index in range(40):
        frames.read(clips.clip(index))
        seen.append(open_files())
    assert max(seen) == 3
    list(frames.arrays())
    assert open_files() == 3
    del frames
    assert open_files() == 0


def test_it_works_in_other_processes_and_threads(
    data: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_OPEN_MAPS", 2)
    frames, clips = opened(data, packed), [sampler(data).clip(index) for index in range(64)]
    expected = [zlib.crc32(frames.read(clip)) for clip in clips]
    with ThreadPoolExecutor(8) as threads:
        assert [zlib.crc32(pixels) for pixels in threads.map(frames.read, clips)] == expected
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.map(frames.read, clips[:8])
            assert [zlib.crc32(pixels) for pixels in found] == expected[:8]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("crc32", ""), ("crc32", "zz" * 32), ("crc32", 5), ("height", "32"), ("height", None)),
        *(("bad", [1]), ("bad", {"x": "y"}), ("bad", {"99": "y"}), ("frames", "6"), ("file", 3)),
        *(("file", "../00000.npy"), ("video", [1]), ("frames", 0)),
    ],
)
def test_an_index_edited_by_hand_is_one_sentence(
    videos: Path, tmp_path: Path, key: str, value: object
) -> None:
    folder = pack(videos, tmp_path / "out", size=16)
    index = folder / "packed" / "index.json"
    told = json.loads(index.read_text())
    told["videos"][1][key] = value
    index.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"index\.json is damaged; delete .* and pack again"):
        read_index(folder / "packed")


def test_an_endlessly_nested_index_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        read_index(tmp_path)
