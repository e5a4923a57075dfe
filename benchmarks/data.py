"""How fast do clips come? Our loaders, beside a plain DataLoader with PIL or OpenCV.

All loaders of a number of workers stay open and are measured in turn, a short while each a round,
so that drift meets all alike. Before a measurement the batches made ahead are taken away; after it
the bench waits until the workers have made new ones and rest. The files lie in the page cache.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from smtc import presets
from smtc.benchmarks import data_videos, parity
from smtc.benchmarks.blocks import markdown
from smtc.benchmarks.data_baselines import BASELINES, PlainLoader
from smtc.benchmarks.harness import Report, pick_device, timing
from smtc.benchmarks.tables import data_blocks
from smtc.errors import UserError
from smtc.pipelines.batch import Batch
from smtc.pipelines.cache import open_packed
from smtc.pipelines.clips import ClipSampler, Schedule, find_videos
from smtc.pipelines.faults import Faults
from smtc.pipelines.frames import FileFrames
from smtc.pipelines.packing import pack
from smtc.pipelines.torch_loader import TorchLoader
from smtc.progress import track

Row = dict[str, Any]
Result = TypeVar("Result")
PROVIDERS = ("torch", "cache", "dali", *BASELINES)
CASES = {"720p": (720, 1280), "480p": (480, 854)}
"""Height and width of the frames that are written."""
PACKED, GIVEN = "packed", "given"
PACKED_SIZE = 256
SIZE = (224, 224)
ROUNDS = 5
CPU_CLIPS, GPU_CLIPS = 4, 32
TARGETS = {("torch", "pil"): 1.4, ("cache", "torch"): 2.5, ("dali", "torch"): 0.7}
"""Of 720p frames in two views by two workers on a CPU: how many times as many clips a second."""
RATIOS = (*TARGETS, ("torch", "opencv"))
_ENDLESS = 10**9
_PATIENCE = 20.0  # seconds for the workers to come to rest
_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Batches(Protocol):
    """What is measured."""

    def __next__(self) -> Batch | Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Setup:
    """One loader on one kind of frames; `device` is where it decodes and augments."""

    case: str
    provider: str
    device: str
    threads: int

    @property
    def name(self) -> str:
        """For a line on the screen."""
        where = f" on {self.device}" if self.device != "cpu" else ""
        return f"{self.provider} {self.case}{where}, {self.threads} workers"


@dataclass(frozen=True)
class Places:
    """The folders that are read."""

    videos: dict[str, Path]
    """By case, of frames as files; the first ones are also packed."""
    packed: Path | None
    """The cache folder with the packed frames."""

    @property
    def source(self) -> str:
        """The case whose frames were packed."""
        return next(iter(self.videos))

    def root(self, case: str) -> Path:
        """The data folder of a case."""
        return self.videos[self.source if case == PACKED else case]


@dataclass
class Open:
    """A loader with its measurements, one a round."""

    setup: Setup
    batches: Batches
    rates: list[float]
    cpu: list[float]


def run(
    output: Path,
    *,
    data: Path | None = None,
    providers: Sequence[str] = (),
    cases: Sequence[str] = (),
    threads: Sequence[int] = (),
    clips: int | None = None,
    seconds: float = 5.0,
    steps: int = 30,
    device: str = "auto",
    deadline: float | None = None,
) -> int:
    """Measure, print tables and write `output`/data.json.

    Args:
        output: the folder.
        data: a folder of videos to read a few of in place of written ones.
        providers: of `PROVIDERS`; all where none is named.
        cases: of `CASES` and "packed"; all where none is named.
        threads: numbers of workers; without any 1 and 2, with a GPU 4 and all cores.
        clips: clips a batch; None: 4, with a GPU 32.
        seconds: how long to measure each loader with each number of workers.
        steps: of a training run with each of our loaders; 0: none.
        device: "cuda", "cpu" or "auto".
        deadline: a time of `time.monotonic` after which nothing is begun.

    Returns:
        an exit code: 1 where nothing could be measured.
    """
    device = pick_device(device)
    cases = _cases(cases, data)
    providers = _known(providers, PROVIDERS, "provider")
    cores = os.cpu_count() or 1
    threads = tuple(threads) or ((min(4, cores), cores) if device == "cuda" else (1, 2))
    clips = (GPU_CLIPS if device == "cuda" else CPU_CLIPS) if clips is None else clips
    if min(*threads, clips) < 1 or seconds <= 0 or steps < 0:
        raise UserError("Give --threads and --clips from 1, --seconds above 0, --steps from 0.")
    plans = [plan(cases, providers, device, number) for number in dict.fromkeys(threads)]
    if not plans[0]:
        raise UserError("None of these --providers reads any of these --cases.")
    if data is not None:
        data_videos.usable_videos(data)  # before anything is written
    report = Report(output / "data.json")
    with tempfile.TemporaryDirectory(prefix="smtc-bench-") as folder:
        places = _prepare(Path(folder), cases, data)
        bench = _Bench(report, places, device, clips)
        bench.describe()
        for setups in plans:
            bench.measure(setups, seconds, deadline)
        for setup in plans[-1] if steps else ():
            if bench.trains(setup) and (deadline is None or time.monotonic() < deadline):
                bench.wait(setup, steps, Path(folder) / f"{setup.provider} {setup.device}")
    print(markdown(data_blocks(report.rows)))
    print(f"{len(report.rows)} rows in {report.path}")
    return 0 if any("median" in row for row in report.rows) else 1


def _cases(named: Sequence[str], data: Path | None) -> tuple[str, ...]:
    if data is not None:
        if set(named) & set(CASES):
            raise UserError("--data brings its own frames; of --cases only packed goes with it.")
        _known(named, (PACKED,), "case")
        return (PACKED,) if named else (GIVEN, PACKED)
    return _known(named, (*CASES, PACKED), "case")


def _known(named: Sequence[str], all_of_them: Sequence[str], what: str) -> tuple[str, ...]:
    for name in named:
        if name not in all_of_them:
            raise UserError(f"There is no {what} {name!r}; there are {', '.join(all_of_them)}.")
    return tuple(name for name in all_of_them if not named or name in named)


def plan(cases: Sequence[str], providers: Sequence[str], device: str, threads: int) -> list[Setup]:
    """The loaders to measure in turn: each on the frames that it reads, DALI on each device."""
    found = []
    for case in cases:
        for provider in providers:
            if (case == PACKED) != (provider == "cache"):
                continue
            found.append(Setup(case, provider, "cpu", threads))
            if device == "cuda" and provider in ("dali", "cache"):
                found.append(Setup(case, provider, "cuda", threads))
    return found


def _prepare(folder: Path, cases: Sequence[str], data: Path | None) -> Places:
    """Write or copy the videos, and pack those of the first case."""
    files = [case for case in cases if case != PACKED]
    if not files:
        files = [next(iter(CASES)) if data is None else GIVEN]
    videos = {case: folder / case for case in files}
    for case, root in videos.items():
        if data is None:
            data_videos.write_videos(root, *CASES[case])
        else:
            data_videos.copy_videos(data, root)
    packed = None
    if PACKED in cases:
        packed = pack(videos[files[0]], folder / PACKED, size=PACKED_SIZE)
    return Places(videos, packed)


class _Bench:
    """Measures into a report."""

    def __init__(self, report: Report, places: Places, device: str, clips: int) -> None:
        self.report, self.places, self.device, self.clips = report, places, device, clips
        self.config = presets.fixed().data  # every augmentation is on in it
        self.failed: set[Setup] = set()

    def describe(self) -> None:
        """A row of what all measurements have in common."""
        config = self.config
        self.report.add(
            {
                "case": "settings",
                "view": list(SIZE),
                "views": 2,
                "frames": config.frames,
                "clips": self.clips,
                "prefetch": config.prefetch,
                "packed_size": PACKED_SIZE,
                "page_cache": "warm",
                "delivered_to": self.device,
                "dtype": str(self._dtype).removeprefix("torch."),
                "augment": asdict(config.augment),
            }
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Of our loaders' views: what the trainer asks for."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def measure(self, setups: Sequence[Setup], seconds: float, deadline: float | None) -> None:
        """Rows of rates, and of their ratios round by round."""
        opened: list[Open] = []
        try:
            for setup in setups:
                batches = self._attempt(setup, partial(self._open, setup))
                if batches is not None:
                    opened.append(Open(setup, batches, [], []))
            title = f"{setups[0].threads} workers"
            for _ in track(range(ROUNDS), title=title, unit="round"):
                if deadline is not None and time.monotonic() > deadline:
                    print("Out of time: the remaining rounds are left out.")
                    break
                for one in list(opened):
                    go = partial(self._round, one.setup, one.batches, seconds / ROUNDS)
                    found = self._attempt(one.setup, go)
                    if found is None:
                        one.batches.close()
                        opened.remove(one)
                    else:
                        one.rates.append(found[0])
                        one.cpu.append(found[1])
        finally:
            for one in opened:
                one.batches.close()
        measured = [one for one in opened if one.rates]
        for one in measured:
            self.report.add(self._row(one))
        for row in ratios(measured, self.places.source):
            self.report.add(row)

    def _attempt(self, setup: Setup, function: Callable[[], Result]) -> Result | None:
        """The result; None, with a row and a line, after an error."""
        try:
            return function()
        except Exception as error:  # whatever a library that is half there raises
            text = str(error) if isinstance(error, UserError) else parity.sentence(error)
            print(f"Left out: {setup.name}: {text}")
            self.failed.add(setup)
            self.report.add(asdict(setup) | {"error": text})
            return None

    def _open(self, setup: Setup) -> Batches:
        """The loader with its first batches made."""
        root = self.places.root(setup.case)
        config = replace(self.config, root=str(root), workers=setup.threads)
        sampler = ClipSampler(
            find_videos(root),
            frames=config.frames,
            gap=config.gap,
            random_gap=config.random_gap,
            seed=0,
        )
        if setup.provider in BASELINES:
            plain = PlainLoader(setup.provider, sampler, config, clips=self.clips, size=SIZE)
            next(plain)
            _rest()
            return plain
        schedule = Schedule(batch=self.clips, steps=_ENDLESS)
        faults = Faults(config)
        packed = None
        if setup.case == PACKED:
            assert self.places.packed is not None
            packed = open_packed(self.places.packed, sampler.videos, config, SIZE)
        loader: Any
        if setup.provider == "dali" or setup.device == "cuda":
            from smtc.pipelines.dali_loader import DaliLoader

            loader = DaliLoader(
                *(config, schedule, sampler, faults),
                size=SIZE,
                device=setup.device,
                dtype=self._dtype,
                known_bad={},
                packed=packed,
            )
        else:
            frames = packed or FileFrames()
            loader = TorchLoader(
                config, schedule, sampler, frames, faults, size=SIZE, dtype=self._dtype
            )
        next(iter(loader))
        _rest()
        return loader

    def _round(self, setup: Setup, batches: Batches, seconds: float) -> tuple[float, float]:
        """Clips a second and milliseconds of CPU time a clip."""
        for _ in range(self.config.prefetch * setup.threads):
            self._next(batches)
        self._synchronise()
        taken = 0
        cpu, start = cpu_seconds(), time.perf_counter()
        while time.perf_counter() - start < seconds or not taken:
            for _ in range(setup.threads):  # the workers finish at about the same time
                self._next(batches)
            taken += self.clips * setup.threads
        self._synchronise()
        elapsed = time.perf_counter() - start
        cpu = cpu_seconds() - cpu
        _rest()
        return taken / elapsed, 1000 * cpu / taken

    def _next(self, batches: Batches) -> None:
        batch = next(batches)
        views = batch.views if isinstance(batch, Batch) else batch
        views.to(self.device, non_blocking=True)

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _row(self, one: Open) -> Row:
        rate, cpu = timing(one.rates), timing(one.cpu)
        packed = one.setup.case == PACKED
        files = self.places.root(one.setup.case)
        size = 3 * PACKED_SIZE**2 if packed else data_videos.bytes_per_frame(files)
        return {"kind": "rate", **asdict(one.setup), **rate.row(), "unit": "clips/s"} | {
            "frames_per_s": round(rate.median * self.config.frames, 1),
            "cpu_ms_per_clip": round(cpu.median, 3),
            "bytes_per_frame": size,
        }

    def trains(self, setup: Setup) -> bool:
        """Whether `wait` has a loader like this one: it worked, and a trainer would choose it."""
        ours = setup not in self.failed and setup.provider not in BASELINES
        first = setup.case in (self.places.source, PACKED)
        return ours and first and (setup.provider == "torch" or setup.device == self.device)

    def wait(self, setup: Setup, steps: int, folder: Path) -> None:
        """A row of the share of a training run that is spent waiting for data."""
        share = self._attempt(setup, partial(self._wait_share, setup, steps, folder))
        if share is not None:
            row = {"kind": "wait", **asdict(setup), "median": round(share, 4)}
            self.report.add(row | {"unit": "share of the time", "steps": steps})

    def _wait_share(self, setup: Setup, steps: int, folder: Path) -> float:
        from smtc.training.trainer import train

        tiny = presets.tiny()
        choices: dict[str, Any] = {"loader": setup.provider, "workers": setup.threads}
        root, cache = str(self.places.root(setup.case)), str(self.places.packed)
        data = replace(tiny.data, root=root, cache=cache, **choices)
        every = max(1, steps // 3)
        choices = {"steps": steps, "device": self.device, "log_every": every}
        loop = replace(tiny.train, **choices)
        done = train(replace(tiny, data=data, train=loop, output=str(folder)))
        shares = [line["data_wait_share"] for line in done.metrics]
        # The first steps wait for the workers to start.
        return statistics.fmean(shares[1:] or shares)


def ratios(measured: Sequence[Open], source: str) -> list[Row]:
    """How many times as many clips a second one provider makes as another, round by round.

    Packed frames are compared with the files of case `source`, which they came from.
    """
    found = []
    for one in measured:
        for other in measured:
            pair = (one.setup.provider, other.setup.provider)
            same = one.setup.case == other.setup.case
            same = same or (one.setup.case == PACKED and other.setup.case == source)
            if pair not in RATIOS or not same or one.setup.device != other.setup.device:
                continue
            quotients = [a / b for a, b in zip(one.rates, other.rates, strict=False)]
            row = {"kind": "ratio", **asdict(other.setup), "provider": " / ".join(pair)}
            row |= timing(quotients).row() | {"unit": "times"}
            # Other programs that run meanwhile disturb this one less.
            row["cpu_ratio"] = round(statistics.median(other.cpu) / statistics.median(one.cpu), 3)
            judged = (other.setup.case, other.setup.threads) == ("720p", 2)
            found.append(row | ({"target": TARGETS[pair]} if judged and pair in TARGETS else {}))
    return found


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its live children."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        with suppress(OSError):
            text = Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8")
            user, system = text.rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / _TICK
    return total


def _rest() -> None:
    """Wait until the workers have made their batches ahead."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        before = cpu_seconds()
        time.sleep(0.1)
        if cpu_seconds() - before < 0.015:
            return
