"""Batches do not depend on workers, ranks or resumption; bad files are replaced and counted."""

import gc
import logging
import multiprocessing
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from smtc.config import AugmentConfig, DataConfig
from smtc.errors import UserError
from smtc.pipelines import torch_loader
from smtc.pipelines.batch import Batch
from smtc.pipelines.clips import ClipSampler, Schedule, find_videos
from smtc.pipelines.images import read_image
from smtc.pipelines.loading import build_loader
from smtc.pipelines.torch_loader import TorchLoader, _Made
from smtc.pipelines.views import ViewParameters, apply_view, draw_views

AUGMENT = AugmentConfig(crop=(0.5, 1), flip=0.5, grayscale=0.2, jitter_chance=0.8, blur=0.3)


def loader(root: Path | None, **more: object) -> TorchLoader:
    """The torch loader over `root`; settings of the data, of the schedule and the rest by name."""
    settings: dict = {"workers": 0, "augment": AUGMENT, "batch": 3, "steps": 4, **more}
    parts = {
        kind: {name: settings.pop(name) for name in list(settings) if name in known}
        for kind, known in (
            ("data", DataConfig.__dataclass_fields__),
            ("schedule", Schedule.__dataclass_fields__),
        )
    }
    config = DataConfig(root=root and str(root), loader="torch", **parts["data"])
    made = build_loader(
        config, Schedule(**parts["schedule"]), **{"size": (32, 32), "seed": 2, **settings}
    )
    assert isinstance(made, TorchLoader)
    return made


def same(one: Batch, other: Batch) -> bool:
    spatial = (one.spatial is None and other.spatial is None) or (
        one.spatial is not None
        and other.spatial is not None
        and torch.equal(one.spatial, other.spatial)
    )
    views = torch.equal(one.views, other.views) and torch.equal(one.index, other.index)
    return spatial and views and one.sources == other.sources


def spoil(root: Path, videos: int, every_frame: bool = True) -> None:
    """Cut the frames of the first `videos` videos short."""
    for video in find_videos(root)[:videos]:
        for frame in video.frames if every_frame else video.frames[:1]:
            Path(frame).write_bytes(Path(frame).read_bytes()[:-50])


@pytest.fixture
def copied(videos: Path, tmp_path: Path) -> Path:
    """A set of videos that a test may spoil."""
    return Path(shutil.copytree(videos, tmp_path / "copied"))


def test_a_batch_is_what_sampler_and_views_say(videos: Path) -> None:
    batches = list(loader(videos))
    sampler = ClipSampler(find_videos(videos), frames=4, gap=4, random_gap=False, seed=2)
    config = DataConfig(augment=AUGMENT)
    assert [batch.index.tolist() for batch in batches] == [
        list(range(3 * step, 3 * step + 3)) for step in range(4)
    ]
    for batch in batches:
        assert (batch.views.shape, batch.views.dtype) == ((3, 2, 4, 3, 32, 32), torch.float32)
        assert batch.spatial is None
        for position, index in enumerate(batch.index.tolist()):
            clip, source = sampler.clip(index), batch.sources[position]
            assert (source.video, source.frames) == (clip.video.name, clip.paths)
            assert (source.start, source.gap) == (clip.start, clip.gap)
            frames = [read_image(path) for path in clip.paths]
            for number, view in enumerate(draw_views(config, 2, index)):
                expected = apply_view(frames, view, (32, 32))
                np.testing.assert_array_equal(batch.views[position, number].numpy(), expected)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_the_settings_of_resize_and_blur_are_used(
    videos: Path, resize: Literal["squash", "crop"]
) -> None:
    augment = AugmentConfig(blur=1, blur_sigma=(2, 2), blur_kernel=5)
    batch = next(iter(loader(videos, size=(32, 16), resize=resize, augment=augment)))
    source = batch.sources[0]
    frames = [read_image(path) for path in source.frames]
    view = ViewParameters(blur_sigma=2.0)
    expected = apply_view(frames, view, (32, 16), resize=resize, blur_kernel=5)
    np.testing.assert_array_equal(batch.views[0, 0].numpy(), expected)


def test_workers_change_nothing(videos: Path) -> None:
    own, others = loader(videos), loader(videos, workers=2)
    assert len(own) == len(others) == 4
    for one, other in zip(own, others, strict=True):
        assert same(one, other)
    assert multiprocessing.active_children() == []


def test_a_resumed_loader_goes_on_exactly(videos: Path) -> None:
    whole = list(loader(videos))
    resumed = loader(videos, start_step=2)
    assert len(resumed) == 2
    for one, other in zip(whole[2:], resumed, strict=True):
        assert same(one, other)
    assert list(loader(videos, start_step=4)) == []


def test_a_second_iteration_starts_over(videos: Path) -> None:
    data = loader(videos)
    first = next(iter(data))
    assert same(first, next(iter(data)))


def test_ranks_together_are_one_big_batch(videos: Path) -> None:
    whole = next(iter(loader(videos, batch=4)))
    parts = [next(iter(loader(videos, batch=2, rank=rank, world=2))) for rank in range(2)]
    assert torch.equal(whole.views, torch.cat([part.views for part in parts]))
    assert torch.equal(whole.index, torch.cat([part.index for part in parts]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_another_world_size_goes_on_at_the_same_sample(videos: Path, world: int) -> None:
    """Twelve samples by two ranks, then the rest by `world` ranks: none missing, none twice."""
    before = [loader(videos, batch=2, steps=3, rank=rank, world=2) for rank in range(2)]
    drawn = [i for data in before for batch in data for i in batch.index.tolist()]
    more: dict = {"batch": 2, "start_step": 3, "start_sample": 12, "steps": 5, "world": world}
    after = [list(loader(videos, rank=rank, **more)) for rank in range(world)]
    drawn += [i for batches in after for batch in batches for i in batch.index.tolist()]
    assert sorted(drawn) == list(range(12 + 4 * world))
    whole = loader(videos, batch=1, steps=12 + 4 * world)
    views = {int(batch.index): batch.views[0] for batch in whole}
    for batch in after[-1]:
        for index, view in zip(batch.index.tolist(), batch.views, strict=True):
            assert torch.equal(view, views[index])


def test_half_precision_views(videos: Path) -> None:
    full, half = (
        next(iter(loader(videos, dtype=dtype))) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.views.dtype == torch.bfloat16
    assert torch.equal(full.views.bfloat16(), half.views)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_worker_writes_where_the_trainer_reads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every batch would be copied into shared memory once more."""
    assert not torch_loader._empty((2, 3, 5), dtype).is_shared()
    monkeypatch.setattr(torch_loader, "get_worker_info", object)
    made = torch_loader._empty((2, 3, 5), dtype)
    assert made.is_shared() and made.is_contiguous()
    assert (made.shape, made.dtype, made.numel()) == ((2, 3, 5), dtype, 30)


def test_independent_views_say_where_they_lie(videos: Path) -> None:
    batch = next(iter(loader(videos, spatial="independent")))
    assert batch.spatial is not None
    assert (batch.spatial.shape, batch.spatial.dtype) == ((3, 2, 5), torch.float32)
    config = DataConfig(augment=AUGMENT, spatial="independent")
    for position, index in enumerate(batch.index.tolist()):
        for number, view in enumerate(draw_views(config, 2, index)):
            expected = [*view.crop, float(view.flip)]
            np.testing.assert_allclose(batch.spatial[position, number], expected, rtol=1e-6)


def test_a_batch_moves_with_all_its_tensors(videos: Path) -> None:
    moved = next(iter(loader(videos, spatial="independent"))).to("meta")
    assert moved.spatial is not None
    assert {t.device.type for t in (moved.views, moved.index, moved.spatial)} == {"meta"}
    assert next(iter(loader(videos))).to("cpu").spatial is None


def test_pinning_reaches_every_tensor(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = next(iter(loader(videos, spatial="independent")))
    assert batch.spatial is not None
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = _Made(0, batch, [], 0).pin_memory().batch
    assert pinned is not None
    expected = Batch(batch.views + 1, batch.sources, batch.index + 1, batch.spatial + 1)
    assert same(pinned, expected)
    assert _Made(0, None).pin_memory().batch is None


def test_an_iteration_left_midway_ends_its_workers(videos: Path) -> None:
    data = loader(videos, workers=2, steps=50)
    for _ in data:
        break
    assert len(multiprocessing.active_children()) == 2
    data.close()
    gc.collect()
    assert multiprocessing.active_children() == []
    with pytest.raises(StopIteration):
        next(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_clip_is_replaced_reported_once_and_counted(
    copied: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(copied, 1)
    data = loader(copied, workers=workers, steps=8)
    with caplog.at_level(logging.WARNING, "smtc"):
        batches = list(data)
    reported = [record.getMessage() for record in caplog.records]
    assert len(reported) == len(set(reported)) == len(data.faults.bad_files) > 0
    assert all(
        line.startswith("00000/") and line.endswith(".jpg: the file is cut short")
        for line in reported
    )
    assert set(data.faults.bad_files.values()) == set(reported)
    assert (data.faults.drawn, data.faults.replaced) == (24, 3)
    assert all(source.video != "00000" for batch in batches for source in batch.sources)
    for one, other in zip(batches, loader(copied, steps=8), strict=True):
        assert same(one, other)
    assert all(torch.isfinite(batch.views).all() for batch in batches)


def test_only_clips_with_bad_files_are_replaced(videos: Path, copied: Path) -> None:
    spoil(copied, 1, every_frame=False)
    settings: dict = {"gap": 1, "steps": 8, "max_bad_share": 1.0}
    changed = 0
    for good, bad in zip(loader(videos, **settings), loader(copied, **settings), strict=True):
        for position, (one, other) in enumerate(zip(good.sources, bad.sources, strict=True)):
            if one.video == "00000" and one.start == 0:
                changed += 1
                assert (other.video, other.start) != ("00000", 0)
            else:
                assert torch.equal(good.views[position], bad.views[position])
    assert changed > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_clips_stop(copied: Path, workers: int) -> None:
    spoil(copied, 4)
    data = loader(copied, workers=workers, steps=50)
    seen = []
    with pytest.raises(
        UserError, match=r"of the clips drawn .*max-bad-share \(20%\).*/0000\d\.jpg: .* Mend or"
    ):
        seen.extend(data)
    assert data.faults.drawn == 21
    assert len(seen) == 6
    assert data.faults.replaced / data.faults.drawn > 0.2
    assert multiprocessing.active_children() == []


def test_a_short_run_is_judged_at_its_end(copied: Path) -> None:
    spoil(copied, 6)
    data = loader(copied, steps=2)
    seen = []
    with pytest.raises(UserError, match="unreadable files"):
        seen.extend(data)
    assert (len(seen), data.faults.drawn) == (2, 6)


def test_the_limit_is_a_setting(copied: Path) -> None:
    spoil(copied, 4)
    assert len(list(loader(copied, steps=8, max_bad_share=0.8))) == 8


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_clip_at_all(copied: Path, workers: int) -> None:
    spoil(copied, 8)
    data = loader(copied, workers=workers, max_bad_share=1.0)
    with pytest.raises(UserError, match=r"No readable clip .* 100 attempts \(0000\d/0000\d\.jpg"):
        list(data)


def test_no_data_given() -> None:
    with pytest.raises(UserError, match="--data"):
        loader(None)
