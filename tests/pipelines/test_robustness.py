"""What a long run lives through: kills, slow disks, vanishing files, hours of batches."""

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import frames_of, train_flags

from smtc.config import AugmentConfig, DataConfig
from smtc.pipelines import frames as frames_module
from smtc.pipelines.clips import ClipSampler, Schedule, Video, find_videos
from smtc.pipelines.images import read_image
from smtc.pipelines.loading import Loader, build_loader
from smtc.pipelines.packing import pack
from smtc.pipelines.views import draw_views
from smtc.progress import patient
from smtc.training import trainer
from smtc.training.telemetry import read_metrics

Command = Callable[..., Any]
KINDS = ["torch", "cache", "dali"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """On tensors this small, threads that wait for a busy core cost more than they save."""
    torch.set_num_threads(1)


# Processes.

TRAINER = "import sys; from smtc.cli import main; main(sys.argv[1:])"
STUCK = "import time, smtc.pipelines.frames as f; f.read_image = lambda _: time.sleep(600); "
ENDS = [
    ("busy", signal.SIGKILL),
    ("busy", signal.SIGINT),
    ("stuck", signal.SIGKILL),
    ("stuck", signal.SIGINT),
    ("stuck", signal.SIGTERM),
]


def status(pid: int) -> tuple[str, int] | None:
    """A process's state and parent, or None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1])


def children(pid: int) -> list[int]:
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [number for number in numbers if (status(number) or ("", 0))[1] == pid]


def alive(pid: int) -> bool:
    found = status(pid)
    return found is not None and found[0] != "Z"


def wait_for(what: Callable[[], Any], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def trainers(
    synthetic_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, int], subprocess.Popen[str]]]:
    """A running trainer with two workers for each of ENDS; the stuck ones read for ever."""
    started = {}
    folder = tmp_path_factory.mktemp("trainers")
    for number, (state, end) in enumerate(ENDS):
        output = folder / str(number)
        more = ["--data.workers", 2, "--train.steps", 99_999, "--output", output]
        flags = train_flags(synthetic_data, output, *more)
        command = [sys.executable, "-c", (STUCK if state == "stuck" else "") + TRAINER]
        with (folder / f"{number}.txt").open("w") as said:
            started[state, end] = subprocess.Popen(
                [*command, *map(str, flags)], stderr=said, start_new_session=True, text=True
            )
    yield started
    for process in started.values():
        for pid in [*children(process.pid), process.pid]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize(("state", "end"), ENDS)
def test_no_worker_outlives_its_trainer(
    trainers: dict[tuple[str, int], subprocess.Popen[str]], state: str, end: signal.Signals
) -> None:
    process = trainers[state, end]
    assert wait_for(lambda: len(children(process.pid)) == 2, 60)
    log = Path(process.args[-1]) / "metrics.jsonl"
    if state == "busy":
        assert wait_for(lambda: read_metrics(log), 60)
    time.sleep(0.5)
    workers = children(process.pid)
    assert len(workers) == 2 and process.poll() is None
    # Control-C reaches all processes of a terminal, a kill only the one that it names.
    (os.killpg if end == signal.SIGINT else os.kill)(process.pid, end)
    code = process.wait(25)  # torch gives a worker that is stuck five seconds
    gone = wait_for(lambda: not any(map(alive, workers)), 3)
    for worker in filter(alive, workers):
        os.kill(worker, signal.SIGKILL)
    assert gone
    assert code == (-end if end == signal.SIGKILL else 128 + end)


# Memory.


def make(
    kind: str, root: Path, cache: Path | None = None, *, schedule: Schedule, **data: Any
) -> Loader:
    """A loader of some kind for 32x32 views of the 48x48 videos; `cache` is where frames are
    packed.
    """
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    if kind == "cache":
        assert cache is not None
        if not cache.exists():
            pack(root, cache, size=48, workers=1)
        data["cache"] = str(cache)
    config = DataConfig(
        root=str(root), **{"frames": 2, "gap": 1, "workers": 0, "loader": kind, **data}
    )
    return build_loader(config, schedule, size=(32, 32), seed=4)


def resident() -> int:
    """MiB of memory that this process and its children hold."""
    gc.collect()
    pages = 0
    for pid in [os.getpid(), *children(os.getpid())]:
        pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="memory is looked up in /proc")
@pytest.mark.parametrize(
    ("kind", "workers"), [("torch", 0), ("torch", 1), ("cache", 0), ("dali", 1)]
)
def test_memory_does_not_grow(videos: Path, tmp_path: Path, kind: str, workers: int) -> None:
    """A batch is 0.19 MiB; one in ten left behind would be 7.5 MiB over 400 of them."""
    augment = AugmentConfig(crop=(0.5, 1), flip=0.5, jitter_chance=0.8, blur=0.3)
    schedule = Schedule(batch=4, steps=500)
    loader = make(
        kind, videos, tmp_path / "cache", schedule=schedule, workers=workers, augment=augment
    )
    held = []
    for number, batch in enumerate(loader):
        assert batch.views.mean().isfinite()  # what nobody reads is not resident
        if number % 100 == 99:
            held.append(resident())
    loader.close()
    assert len(held) == 5
    assert held[-1] - held[0] < 6, held


# What holds for every clip, whatever the settings.


def random_augment(rng: np.random.Generator) -> AugmentConfig:
    """Each part is on in two of three draws."""
    on = rng.random(5) < 0.67
    least, greatest = np.sort(rng.uniform(0.2, 1, 2))
    return AugmentConfig(
        crop=(float(least), float(greatest)) if on[0] else None,
        flip=0.5 * on[1],
        grayscale=0.5 * on[2],
        jitter=(0.4, 0.4, 0.4, 0.3),
        jitter_chance=0.9 * on[3],
        blur=0.7 * on[4],
        blur_sigma=(0.1, float(rng.uniform(0.2, 3))),
    )


@pytest.fixture
def still(videos: Path, tmp_path: Path) -> Path:
    """Videos in which nothing changes: one frame of each of `videos`, five times."""
    for video in find_videos(videos):
        folder = tmp_path / "still" / video.name
        folder.mkdir(parents=True)
        for number in range(5):
            shutil.copy(video.frames[0], folder / f"{number}.jpg")
    return tmp_path / "still"


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_of_a_clip_share_their_parameters(
    kind: str, still: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(11)
    for number in range(6):
        more: dict[str, Any] = {"frames": int(rng.integers(2, 6)), "augment": random_augment(rng)}
        more["spatial"] = ("shared", "independent")[number % 2]
        loader = make(kind, still, tmp_path / "cache", schedule=Schedule(batch=6, steps=2), **more)
        for batch in loader:
            first = batch.views[:, :, :1]
            assert torch.equal(batch.views, first.expand_as(batch.views)), more
            assert batch.views.flatten(1).std(1).min() > 0.01
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spatial", ["shared", "independent"])
def test_two_views_differ_in_look_and_only_on_demand_in_place(
    kind: str, spatial: str, still: Path, tmp_path: Path
) -> None:
    look = AugmentConfig(grayscale=0.5, jitter_chance=1, blur=0.5)
    place = AugmentConfig(crop=(0.3, 0.6), flip=0.5)
    for augment, differs in ((look, True), (place, spatial == "independent")):
        schedule = Schedule(batch=16, steps=1)
        more: dict[str, Any] = {"augment": augment, "spatial": spatial}
        loader = make(kind, still, tmp_path / "cache", schedule=schedule, **more)
        one, other = next(iter(loader)).views.float().unbind(1)
        loader.close()
        equal = [torch.equal(*pair) for pair in zip(one, other, strict=True)]
        assert equal == [not differs] * 16


def test_crops_and_flips_are_shared_unless_independent() -> None:
    rng = np.random.default_rng(5)
    for seed in range(40):
        augment = random_augment(rng)
        shared, apart = (
            [draw_views(DataConfig(augment=augment, spatial=how), seed, i) for i in range(8)]
            for how in ("shared", "independent")
        )
        assert all((one.crop, one.flip) == (other.crop, other.flip) for one, other in shared)
        if augment.crop is not None:
            assert all(one.crop != other.crop for one, other in apart)
        if augment.jitter_chance:
            assert any((one.colour != other.colour).any() for one, other in shared)


def test_nothing_repeats_within_an_epoch_whatever_the_ranks_and_stops() -> None:
    """Runs that stop at random and go on with another number of ranks and clips a step."""
    rng = np.random.default_rng(3)
    for trial in range(30):
        count = int(rng.integers(1, 25))
        names = [Video(f"v{number}", ("f",) * 9) for number in range(count)]
        sampler = ClipSampler(names, frames=2, gap=3, random_gap=True, seed=trial)
        drawn: list[int] = []
        step = 0
        for _ in range(int(rng.integers(1, 5))):
            world, batch, more = (int(rng.integers(1, high)) for high in (5, 7, 9))
            place: dict[str, int] = {"start_step": step, "start_sample": len(drawn)}
            for rank in range(world):
                schedule = Schedule(batch=batch, steps=step + more, rank=rank, world=world, **place)
                drawn += [index for at in schedule.remaining for index in schedule.samples(at)]
            step += more
        assert sorted(drawn) == list(range(len(drawn)))
        for epoch in range(len(drawn) // count):
            clips = map(sampler.clip, range(epoch * count, (epoch + 1) * count))
            assert len({clip.video.name for clip in clips}) == count


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_other_workers_to_the_same_bits(
    kind: str, videos: Path, tmp_path: Path
) -> None:
    """From the middle of an epoch of eight videos, in which one clip is replaced."""
    data = Path(shutil.copytree(videos, tmp_path / "data"))
    for frame in find_videos(data)[2].frames:
        Path(frame).write_bytes(b"")
    more: dict[str, Any] = {"augment": random_augment(np.random.default_rng(8)), "random_gap": True}
    straight = make(kind, data, tmp_path / "cache", schedule=Schedule(batch=3, steps=6), **more)
    whole = list(map(kept, straight))
    assert straight.faults.replaced > 0
    for start, workers, prefetch in ((1, 2, 1), (3, 1, 3)):
        loader = make(
            kind,
            data,
            tmp_path / "cache",
            schedule=Schedule(batch=3, steps=6, start_step=start),
            **more | {"workers": workers, "prefetch": prefetch},
        )
        resumed = list(map(kept, loader))
        assert len(resumed) == 6 - start
        for (views, sources), (other_views, other) in zip(whole[start:], resumed, strict=True):
            assert sources == other and torch.equal(views, other_views)


def kept(batch: Any) -> tuple[torch.Tensor, Any]:
    return batch.views.clone(), batch.sources


# Bad files and slow ones.


class StoppedError(Exception):
    """Stands for a kill."""


@pytest.fixture
def damaged(synthetic_data: Path, tmp_path: Path) -> Path:
    """The fixture's six videos, one of which has no readable frame."""
    data = Path(shutil.copytree(synthetic_data, tmp_path / "data"))
    for frame in frames_of(data, "00003").iterdir():
        frame.write_bytes(frame.read_bytes()[:-30])
    return data


def test_a_bad_file_is_recorded_once_over_a_stop_and_a_resume(
    cli: Command, damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = train_flags(damaged, tmp_path / "run", "--train.steps", 18)
    flags += ["--train.checkpoint-every", 3]
    whole = trainer.Trainer._step

    def step(self: trainer.Trainer, *arguments: Any) -> None:
        if self.step == 10:
            raise StoppedError
        whole(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(trainer.Trainer, "_step", step)
        cli(*flags)
    printed = [[r.getMessage() for r in caplog.records if "00003/" in r.getMessage()]]
    caplog.clear()
    assert cli(*flags, "--data.workers", 2).code == 0
    printed.append([r.getMessage() for r in caplog.records if "00003/" in r.getMessage()])
    log = tmp_path / "run" / "bad_files.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    files = [line["file"] for line in lines]
    assert len(files) == len(set(files)) > 1
    assert {Path(file).parent.name for file in files} == {"00003"}
    for line in lines:
        assert line["message"] == f"00003/{Path(line['file']).name}: the file is cut short"
    # Each process says once what it meets.
    assert all(len(said) == len(set(said)) > 0 for said in printed)
    assert {line["message"] for line in lines} == set(printed[0]) | set(printed[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_files_end_the_run_with_their_record(
    refused: Command, damaged: Path, tmp_path: Path, workers: int
) -> None:
    flags = ["--train.steps", 40, "--data.workers", workers, "--data.max-bad-share", 0.1]
    before = children(os.getpid())
    said = refused(*train_flags(damaged, tmp_path / "run", *flags))
    assert "of the clips drawn had unreadable files, more than data.max-bad-share (10%)" in said
    assert "00003/" in said and "the file is cut short" in said
    assert (tmp_path / "run" / "bad_files.jsonl").stat().st_size > 0
    assert not (tmp_path / "run" / "model").exists()
    assert children(os.getpid()) == before


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_a_video_that_vanishes_on_the_way_is_replaced(
    kind: str, videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(videos, tmp_path / "data"))
    schedule = Schedule(batch=4, steps=16)
    loader = make(kind, data, schedule=schedule, workers=1, prefetch=1)
    seen = []
    with caplog.at_level(logging.WARNING, "smtc"):
        for number, batch in enumerate(loader):
            if number == 2:
                shutil.rmtree(frames_of(data, "00005"))
            assert torch.isfinite(batch.views).all()
            seen.append({source.video for source in batch.sources})
    loader.close()
    assert len(seen) == 16
    assert "00005" in set.union(*seen[:2]) and "00005" not in set.union(*seen[8:])
    assert 4 <= loader.faults.replaced <= 8
    said = [r.getMessage() for r in caplog.records if "00005/" in r.getMessage()]
    assert len(said) == len(set(said)) == len(loader.faults.bad_files)
    assert all(line.startswith("00005/0") and "missing" in line for line in said)


def test_a_slow_disk_is_told_and_shown(
    cli: Command,
    synthetic_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def slowly(path: str) -> Any:
        time.sleep(0.04)
        return read_image(path)

    monkeypatch.setattr(frames_module, "read_image", slowly)
    monkeypatch.setattr(trainer, "patient", partial(patient, seconds=0.1))
    told = cli(*train_flags(synthetic_data, tmp_path / "run", "--train.steps", 3))
    assert told.code == 0
    lines = [r.getMessage() for r in caplog.records if "the next batch" in r.getMessage()]
    assert lines[0].startswith("Waiting for the next batch for 0.1 s now. Reading or decoding")
    assert "data.workers" in lines[0] and "smtc data pack" in lines[0]
    assert lines[-1].startswith("After 0.") and lines[-1].endswith("s, the next batch came.")
    shares = [line["data_wait_share"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert shares[-1] > 0.05
    assert f"waiting_for_data={shares[-1]:.0%}" in told.error


def test_a_short_wait_is_not_shown(
    cli: Command, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    monkeypatch.setattr(frames_module, "read_image", lambda _: picture)
    whole = trainer.Trainer._step

    def step(self: trainer.Trainer, *arguments: Any) -> None:
        time.sleep(0.1)
        whole(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    told = cli(*train_flags(synthetic_data, tmp_path / "run"))
    assert "clips_per_s" in told.error and "waiting_for_data" not in told.error
