"""The DALI loader delivers the clips of the torch loader, in any circumstances."""

import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smtc.config import AugmentConfig, DataConfig
from smtc.errors import UserError
from smtc.pipelines import dali_plans
from smtc.pipelines.batch import Batch
from smtc.pipelines.clips import Clip, ClipSampler, Schedule, find_videos
from smtc.pipelines.dali import DaliViews, obstacle
from smtc.pipelines.dali_loader import DaliLoader
from smtc.pipelines.faults import Faults
from smtc.pipelines.frames import FileFrames
from smtc.pipelines.images import BadFrame, read_image
from smtc.pipelines.torch_loader import TorchLoader

pytestmark = pytest.mark.skipif(obstacle("cpu") is not None, reason=str(obstacle("cpu")))

AUGMENT = AugmentConfig(crop=(0.5, 1), flip=0.5, grayscale=0.2, jitter_chance=0.8, blur=0.3)
CLOSE = 3 / 255 / 0.22
"""See TOLERANCE["chain"] in test_dali_graph.py, after normalising."""


def parts(root: Path, settings: dict[str, Any]) -> tuple[Any, ...]:
    """Config, schedule and sampler from settings of the data and of the schedule by name."""
    settings = {"workers": 2, "augment": AUGMENT, "batch": 3, "steps": 4, **settings}
    schedule = {
        name: settings.pop(name) for name in list(settings) if name in Schedule.__annotations__
    }
    sampler = settings.pop("sampler", None)
    config = DataConfig(root=str(root), **settings)
    if sampler is None:
        sampler = ClipSampler(
            find_videos(root, containers=True),
            frames=config.frames,
            gap=config.gap,
            random_gap=config.random_gap,
            seed=2,
        )
    return config, Schedule(**schedule), sampler


def loader(root: Path, size: tuple[int, int] = (32, 32), **settings: Any) -> DaliLoader:
    """The DALI loader over `root` on the CPU."""
    own = {
        name: settings.pop(name) for name in ("dtype", "known_bad", "packed") if name in settings
    }
    config, schedule, sampler = parts(root, settings)
    return DaliLoader(config, schedule, sampler, Faults(config), size=size, device="cpu", **own)


def oracle(root: Path, size: tuple[int, int] = (32, 32), **settings: Any) -> TorchLoader:
    """The torch loader over `root`."""
    known_bad = settings.pop("known_bad", None)
    config, schedule, sampler = parts(root, settings | {"workers": 0})
    frames = FileFrames(known_bad)
    return TorchLoader(config, schedule, sampler, frames, Faults(config), size=size)


def same(one: Batch, other: Batch) -> bool:
    """Bit for bit."""
    return torch.equal(one.views, other.views) and _same_but_views(one, other)


def alike(one: Batch, other: Batch) -> bool:
    """The same clips, and the same views to the tolerance."""
    return bool((one.views - other.views).abs().max() <= CLOSE) and _same_but_views(one, other)


def _same_but_views(one: Batch, other: Batch) -> bool:
    assert (one.spatial is None) == (other.spatial is None)
    spatial = one.spatial is None or torch.equal(one.spatial, other.spatial)  # type: ignore[arg-type]
    return spatial and torch.equal(one.index, other.index) and one.sources == other.sources


def all_alike(one: Any, other: Any) -> bool:
    return all(alike(*pair) for pair in zip(one, other, strict=True))


def all_same(one: Any, other: Any) -> bool:
    return all(same(*pair) for pair in zip(one, other, strict=True))


def planners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("smtc-plan")]


@pytest.fixture
def copied(videos: Path, tmp_path: Path) -> Path:
    """A set of videos that a test may spoil."""
    return Path(shutil.copytree(videos, tmp_path / "videos, cöpied"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resize": "crop", "size": (24, 40)},
        {"spatial": "independent"},
        {"roi_decode": True},
        {"augment": AugmentConfig(), "size": (33, 17)},
        {"augment": AugmentConfig(blur=1, blur_kernel=5)},
        {"augment": AugmentConfig(grayscale=1), "frames": 2, "random_gap": True},
        {"rank": 1, "world": 3, "start_step": 1},
    ],
)
def test_batches_are_those_of_the_torch_loader(videos: Path, settings: dict[str, Any]) -> None:
    assert all_alike(loader(videos, **settings), oracle(videos, **settings))


def test_real_frames(davis2016: Path) -> None:
    settings: dict[str, Any] = {"size": (96, 160), "steps": 2}
    assert all_alike(loader(davis2016, **settings), oracle(davis2016, **settings))


def test_antialiasing_is_a_setting(davis2016: Path) -> None:
    settings: dict[str, Any] = {"size": (32, 32), "batch": 1, "steps": 1, "antialias": True}
    one, other = (
        next(iter(loader(davis2016, **settings))),
        next(iter(oracle(davis2016, **settings))),
    )
    assert (one.views - other.views).abs().mean() < 0.02
    plain = next(iter(oracle(davis2016, **settings | {"antialias": False})))
    assert (one.views - plain.views).abs().mean() > 0.05


def test_threads_and_batches_ahead_change_nothing(videos: Path) -> None:
    batches = list(loader(videos, workers=0, prefetch=1))
    assert len(batches) == len(loader(videos)) == 4
    for workers, prefetch in ((1, 2), (3, 3), (2, 9)):
        assert all_same(batches, loader(videos, workers=workers, prefetch=prefetch))


def test_a_resumed_loader_goes_on_exactly(videos: Path) -> None:
    whole = list(loader(videos))
    for start in range(1, 5):
        assert all_same(whole[start:], loader(videos, start_step=start))


def test_a_second_iteration_starts_over(videos: Path) -> None:
    data = loader(videos)
    first = next(iter(data))
    assert all_same([first], [next(iter(data))])
    whole = list(data)
    assert same(whole[0], first)
    assert all_same(whole, data)
    with pytest.raises(StopIteration):
        next(data)


def test_batches_are_apart_from_dalis_memory(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer is overwritten as soon as DALI could use it again."""
    wanted = list(loader(videos))
    taken: list[Any] = []
    original = torch.from_dlpack

    def watched(tensor: Any) -> torch.Tensor:
        taken.append(original(tensor))
        return taken[-1]

    take = DaliViews.take

    def poisoned(graph: DaliViews, views: torch.Tensor) -> None:
        take(graph, views)
        for buffer in taken:
            buffer.fill_(torch.nan)
        taken.clear()

    monkeypatch.setattr(torch, "from_dlpack", watched)
    monkeypatch.setattr(DaliViews, "take", poisoned)
    assert all_same(wanted, list(loader(videos)))
    assert len({batch.views.data_ptr() for batch in wanted}) == 4


def test_every_value_is_copied_once(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = iter(loader(videos, dtype=torch.bfloat16))
    copied: list[int] = []
    copy = torch.Tensor.copy_

    def counted(into: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        copied.append(into.numel())
        return copy(into, source)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    assert sum(copied) == 0
    assert next(data).views.numel() == sum(copied)


def test_views_come_in_the_type_asked_for(videos: Path) -> None:
    whole, half = next(iter(loader(videos))), next(iter(loader(videos, dtype=torch.bfloat16)))
    assert half.views.dtype == torch.bfloat16
    assert torch.equal(half.views, whole.views.bfloat16())


def test_closing_ends_threads_and_graph(videos: Path) -> None:
    data = loader(videos, steps=50)
    next(iter(data))
    assert planners()
    before = threading.active_count()
    data.close()
    assert planners() == []
    assert threading.active_count() < before
    with pytest.raises(StopIteration):
        next(data)
    assert len(list(loader(videos))) == 4
    assert planners() == []


def spoil(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-50], "empty": b"", "text": b"no picture"}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "missing", "text"])
def test_bad_files_have_the_same_clips_replaced(
    copied: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = parts(copied, {})[2]  # made before, as that of a run is
    spoil(Path(sampler.clip(4).paths[2]), how)
    spoil(Path(sampler.clip(10).paths[0]), how)
    settings: dict[str, Any] = {"steps": 8, "max_bad_share": 1, "sampler": sampler}
    data, other = loader(copied, **settings), oracle(copied, **settings)
    with caplog.at_level(logging.WARNING, "smtc"):
        batches = list(data)
    said = [record.getMessage() for record in caplog.records]
    assert all_alike(batches, other)
    assert data.faults.bad_files == other.faults.bad_files != {}
    assert sorted(said) == sorted(data.faults.bad_files.values())
    assert (data.faults.drawn, data.faults.replaced) == (24, other.faults.replaced)


def hollow(path: str | Path) -> str:
    """Make a file look whole from outside."""
    Path(path).write_bytes(b"\xff\xd8 nothing \xff\xd9")
    return str(path)


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each graph that is built."""
    built: list[int] = []
    original = DaliViews.__init__

    def counted(self: DaliViews, *args: Any, **more: Any) -> None:
        built.append(more["depth"])
        original(self, *args, **more)

    monkeypatch.setattr(DaliViews, "__init__", counted)
    return built


@pytest.mark.parametrize("prefetch", [1, 3])
def test_files_that_only_dali_finds_bad_change_the_same_clips(
    copied: Path, prefetch: int, rebuilt: list[int]
) -> None:
    """The stream is that of a run which knew of them from the start."""
    sampler = parts(copied, {})[2]
    bad = {hollow(sampler.clip(index).paths[1]) for index in (0, 4, 5, 13)}
    settings: dict[str, Any] = {"steps": 8, "max_bad_share": 1}
    data = loader(copied, prefetch=prefetch, **settings)
    batches = list(data)
    assert 2 <= len(rebuilt) <= 5
    rebuilt.clear()
    knowing = loader(copied, known_bad=dict.fromkeys(bad, "it cannot be decoded"), **settings)
    assert all_same(batches, knowing)
    assert len(rebuilt) == 1
    other = oracle(copied, **settings)
    assert all_alike(batches, other)
    assert data.faults.bad_files == knowing.faults.bad_files == other.faults.bad_files
    assert set(data.faults.bad_files) == bad
    assert data.faults.replaced == other.faults.replaced


def test_a_file_may_vanish_after_it_was_looked_at(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = list(loader(copied))
    gone = parts(copied, {})[2].clip(7).paths[3]
    check = dali_plans.check_image

    def late(path: str) -> None:
        check(path)
        if path == gone:
            Path(path).unlink()

    monkeypatch.setattr(dali_plans, "check_image", late)
    data = loader(copied, max_bad_share=1)
    batches = list(data)
    assert all_same(batches[:2], wanted[:2])
    assert torch.equal(batches[2].views[[0, 2]], wanted[2].views[[0, 2]])
    assert gone not in batches[2].sources[1].frames
    name = "/".join(Path(gone).parts[-2:])
    assert data.faults.bad_files == {gone: f"{name}: the file is missing"}


def test_a_disk_that_fails_for_a_moment_changes_nothing(
    copied: Path, monkeypatch: pytest.MonkeyPatch, rebuilt: list[int]
) -> None:
    wanted = list(loader(copied))
    away = Path(parts(copied, {})[2].clip(4).paths[0])
    check, find = dali_plans.check_image, dali_plans.undecodable

    def late(path: str) -> None:
        check(path)
        if path == str(away) and len(rebuilt) <= 2:
            away.rename(away.with_suffix(".away"))

    def back(*more: Any) -> list[int]:
        away.with_suffix(".away").rename(away)
        return find(*more)

    monkeypatch.setattr(dali_plans, "check_image", late)
    monkeypatch.setattr(dali_plans, "undecodable", back)
    rebuilt.append(0)
    data = loader(copied)
    assert all_same(wanted, data)
    assert data.faults.bad_files == {}


def test_a_failure_that_is_no_files_fault_ends_the_run(
    videos: Path, monkeypatch: pytest.MonkeyPatch, rebuilt: list[int]
) -> None:
    data = loader(videos)
    next(iter(data))

    def fail(*_: Any) -> None:
        raise RuntimeError("Error in CPU operator, encountered:\n\nout of luck\nmore")

    monkeypatch.setattr(DaliViews, "take", fail)
    with pytest.raises(
        UserError, match=r"^DALI failed at step 1, .*: out of luck\. Use --data.loader torch\.$"
    ):
        list(iter(data.__next__, None))
    assert len(rebuilt) == 2
    assert planners() == []


def test_when_dali_decodes_nothing_files_are_not_blamed(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no decoder")

    monkeypatch.setattr(DaliViews, "take", fail)
    monkeypatch.setattr(
        dali_plans, "undecodable", lambda config, content, samples, device: range(len(samples))
    )
    with pytest.raises(UserError, match="no file is to blame: no decoder"):
        list(loader(videos))


def test_damage_in_the_middle_of_a_file_goes_unseen(copied: Path) -> None:
    """As with OpenCV: libjpeg makes pixels of anything. `smtc data inspect` finds such files."""
    sampler = parts(copied, {})[2]
    path = Path(sampler.clip(1).paths[0])
    Image.fromarray(read_image(path)).save(path, quality=95)
    data = bytearray(path.read_bytes())
    random.seed(0)
    for position in range(len(data) * 2 // 3, len(data) * 2 // 3 + 20):
        data[position] = random.randrange(1, 255)
    path.write_bytes(data)
    batches = list(loader(copied, sampler=sampler))
    assert torch.isfinite(batches[0].views).all()
    assert all_alike(batches, oracle(copied, sampler=sampler))


def test_too_many_bad_clips_stop(copied: Path) -> None:
    for video in find_videos(copied)[:4]:
        for path in video.frames:
            spoil(Path(path), "cut")
    told = []
    for make in (loader, oracle):
        data, seen = make(copied, steps=50), []
        with pytest.raises(UserError, match=r"max-bad-share \(20%\).*cut short") as caught:
            seen.extend(data)
        told.append((str(caught.value), len(seen), data.faults.drawn, data.faults.replaced))
    assert told[0] == told[1]
    assert planners() == []


def test_no_readable_clip_at_all(copied: Path) -> None:
    for video in find_videos(copied):
        for path in video.frames:
            hollow(path)
    with pytest.raises(UserError, match=r"No readable clip .*it cannot be decoded"):
        list(loader(copied, max_bad_share=1))


def test_known_bad_files_are_not_read(copied: Path) -> None:
    sampler = parts(copied, {})[2]
    known = {sampler.clip(2).paths[2]: "it looks odd"}
    settings: dict[str, Any] = {"known_bad": known, "max_bad_share": 1}
    data, other = loader(copied, **settings), oracle(copied, **settings)
    assert all_alike(data, other)
    assert data.faults.replaced == other.faults.replaced > 0
    assert next(iter(data.faults.bad_files.values())).endswith(": it looks odd")


def test_a_slow_disk_does_not_hold_up_what_is_ready(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = list(loader(videos, steps=6))
    disk = threading.Event()
    plan = dali_plans.Planner.plan

    def slow(self: dali_plans.Planner, step: int) -> dali_plans.Plan:
        if step >= 3:
            assert disk.wait(20)
        return plan(self, step)

    monkeypatch.setattr(dali_plans.Planner, "plan", slow)
    data = iter(loader(videos, steps=6, prefetch=2))
    ready = [next(data) for _ in range(3)]
    threading.Timer(0.2, disk.set).start()
    assert all_same(wanted, [*ready, *(next(data) for _ in range(3))])


class Packed:
    """Frames that were decoded before."""

    total_bytes = 1

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    def read(self, clip: Clip) -> np.ndarray:
        if clip.index == self.fails_at:
            raise UserError("00001.npy is damaged")
        if clip.video.name == "00001":
            raise BadFrame(clip.paths[0], "it was bad when packed")
        frames = np.stack([read_image(path) for path in clip.paths])
        return frames[:, : 30 + clip.index]  # videos of several sizes


def test_packed_frames_go_through_the_same_graph(videos: Path) -> None:
    config, schedule, sampler = parts(videos, {"max_bad_share": 1, "spatial": "independent"})
    packed: Any = Packed()
    data = DaliLoader(
        *(config, schedule, sampler, Faults(config)), size=(24, 32), device="cpu", packed=packed
    )
    other = TorchLoader(config, schedule, sampler, packed, Faults(config), size=(24, 32))
    assert all_alike(data, other)
    assert data.faults.bad_files == other.faults.bad_files != {}


def test_what_ends_the_run_comes_after_the_batches_before_it(videos: Path) -> None:
    for index, before in ((0, 0), (4, 1), (11, 3)):
        seen = []
        with pytest.raises(UserError, match="is damaged"):
            seen.extend(loader(videos, packed=Packed(index), max_bad_share=1, prefetch=3))
        assert len(seen) == before


def test_video_files_are_read_too(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    for number in range(3):
        with av.open(str(tmp_path / f"v {number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for position in range(12):
                pixels = np.full((48, 64, 3), 20 * position, np.uint8)
                picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    (tmp_path / "v 1.mp4").with_suffix(".txt").touch()
    settings: dict[str, Any] = {"gap": 2, "batch": 2}
    assert all_alike(loader(tmp_path, **settings), oracle(tmp_path, **settings))
    sampler = parts(tmp_path, settings)[2]
    (tmp_path / "v 1.mp4").write_bytes(b"")
    settings |= {"sampler": sampler, "max_bad_share": 1}
    data, other = loader(tmp_path, **settings), oracle(tmp_path, **settings)
    assert all_alike(data, other)
    assert data.faults.bad_files == other.faults.bad_files != {}


def test_names_that_are_no_text(videos: Path, tmp_path: Path) -> None:
    """Whatever bytes a file system allows."""
    folder = os.path.join(os.fsencode(tmp_path), b"odd \xff \xf0\x9f\x90\x8e")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    for number, path in enumerate(find_videos(videos)[0].frames):
        shutil.copy(path, os.path.join(folder, b"\xfe %02d.jpg" % number))
    settings: dict[str, Any] = {"batch": 1, "steps": 2, "gap": 2}
    assert all_alike(loader(tmp_path, **settings), oracle(tmp_path, **settings))


def test_frames_of_several_sizes(copied: Path) -> None:
    for video in find_videos(copied):
        for number, path in enumerate(video.frames[::3]):
            picture = Image.fromarray(read_image(path)).resize((37 + 5 * number, 61 - number))
            picture.save(path)
    assert all_alike(loader(copied), oracle(copied))


def test_what_cannot_be_is_refused(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"roi-decode .*independent wants two"):
        loader(videos, roi_decode=True, spatial="independent")
    monkeypatch.setattr("smtc.pipelines.dali_loader.obstacle", lambda device: "DALI is away")
    with pytest.raises(UserError, match=r"^DALI is away; use --data.loader torch\.$"):
        loader(videos)


def test_no_step_left(videos: Path) -> None:
    assert list(loader(videos, start_step=4)) == []


def test_dali_is_imported_only_where_it_is_used() -> None:
    code = "import sys, smtc.pipelines.dali_loader; assert 'nvidia.dali' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
