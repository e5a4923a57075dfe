"""What every benchmark needs: where it ran, fair timing, peak memory, the machine's own ceilings.

Times are milliseconds. A report is one JSON file `{"environment", "commit", "rows"}`, whole after
every row, so that a run that is stopped leaves what it has measured.
"""

import functools
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from smtc.benchmarks.cases import OPERATIONS
from smtc.errors import UserError
from smtc.evaluation import manifest

MEGABYTE = 10**6
# More than the last cache of any GPU: written between repetitions, it leaves no input in there.
FLUSHED_BYTES = 2**28
FEWEST, MOST = 5, 200
"""Repetitions of a measurement: as many as its time allows, within these."""


def environment() -> dict[str, object]:
    """The machine and the versions that times depend on; nothing that names the machine."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx": bool(amx and amx()),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["gpu_memory_mb"] = properties.total_memory // MEGABYTE
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def commit() -> str:
    """The checkout's commit, `-dirty` after changes; "unknown" outside a checkout."""
    return manifest.commit() or "unknown"


def pick_device(name: str) -> str:
    """ "auto" is "cuda" where there is one. `UserError` where "cuda" is asked for in vain."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("CUDA was asked for but this machine has none; use --device cpu.")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def pick_operations(names: Sequence[str]) -> tuple[str, ...]:
    """The operations of those `names`, in the order of `OPERATIONS`; all where none is named."""
    for name in names:
        if name not in OPERATIONS:
            raise UserError(f"There is no operation {name!r}; there are {', '.join(OPERATIONS)}.")
    return tuple(op for op in OPERATIONS if not names or op in names)


class Report:
    """One benchmark's JSON file, written anew and whole with every row."""

    def __init__(self, path: Path) -> None:
        """Start an empty report at `path`. `UserError` where it cannot be written, or where the
        file that is there is no report.
        """
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._head = {"environment": environment(), "commit": commit()}
        if path.exists():
            read_report(path)  # what was measured before stays until there is something new
        else:
            self._write()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; numbers that are not finite become null."""
        self.rows.append({key: _strict(value) for key, value in row.items()})
        self._write()

    def _write(self) -> None:
        text = json.dumps({**self._head, "rows": self.rows}, indent=1, allow_nan=False)
        write_whole(self.path, text + "\n")


def write_whole(path: Path, text: str) -> None:
    """Put `text` in the file at once. `UserError` where that cannot be done."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is there already and no file; give another --output.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); give another --output."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _strict(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_report(path: Path) -> dict[str, Any]:
    """A report's contents. `UserError` where the file cannot be read or is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no benchmark report ({error}).") from error
    if not isinstance(found, dict) or not {"environment", "commit", "rows"} <= set(found):
        raise UserError(f"{path} is no benchmark report: environment, commit or rows is missing.")
    return found


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median and the 20th and 80th percentile of `repeats`."""

    median: float
    p20: float
    p80: float
    repeats: int

    def row(self) -> dict[str, Any]:
        """The columns of a report."""
        values = {"median": self.median, "p20": self.p20, "p80": self.p80}
        return {key: round(value, 6) for key, value in values.items()} | {
            "unit": "ms",
            "repeats": self.repeats,
        }


def timing(milliseconds: list[float]) -> Timing:
    """The percentiles of single times."""
    ordered = sorted(milliseconds)
    last = len(ordered) - 1
    p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Timing(statistics.median(ordered), p20, p80, len(ordered))


def measure(function: Callable[[], object], device: str = "cpu", *, seconds: float = 0.5) -> Timing:
    """The time of one call; see `interleaved`."""
    return interleaved({"": function}, device, seconds=seconds)[""]


def interleaved(
    functions: Mapping[str, Callable[[], object]], device: str = "cpu", *, seconds: float = 0.5
) -> dict[str, Timing]:
    """Time several functions in turn; see `interleaved_times`."""
    found = interleaved_times(functions, device, seconds=seconds)
    return {name: timing(times) for name, times in found.items()}


def interleaved_times(
    functions: Mapping[str, Callable[[], object]], device: str = "cpu", *, seconds: float = 0.5
) -> dict[str, list[float]]:
    """Milliseconds of calls of several functions, a call of each a round, so that drift of the
    machine meets all alike and times of one round may be compared.

    A first call of each is not counted. On a GPU the caches are flushed and the device is idle
    before each call, so the host's share (checks, launches) is part of the time; time a `captured`
    function to leave it out. On a CPU nothing is flushed.

    Args:
        functions: by name.
        device: "cpu" or "cuda".
        seconds: about how long to go on with each.
    """
    once = _once_on_gpu() if device == "cuda" else _once_on_cpu
    first = sum(once(function) for function in functions.values())
    again = sum(once(function) for function in functions.values())
    budget = 1000 * seconds * len(functions)
    rounds = max(FEWEST, min(MOST, int(budget / max(min(first, again), 1e-3))))
    found: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + 3 * seconds * len(functions)
    for done in range(rounds):
        if done >= FEWEST and time.perf_counter() > end:
            break
        for name, function in functions.items():
            found[name].append(once(function))
    return found


def _once_on_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def _once_on_gpu() -> Callable[[Callable[[], object]], float]:
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(function: Callable[[], object]) -> float:
        flushed.zero_()
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    return once


def captured(function: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], None]:
    """The replay of a CUDA graph of `function`, which has run on `stream` before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = function()

    def replay(kept: object = kept) -> None:
        graph.replay()

    return replay


def peak_memory(function: Callable[[], object], device: str = "cpu") -> float:
    """Megabytes that one call of `function` holds at most, beyond what was held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MEGABYTE
    with (
        _quiet_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        function()
    kineto: Any = profiled.profiler
    changes = [
        (event.start_ns(), event.nbytes())
        for event in kineto.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak / MEGABYTE


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Without the lines that torch's profiler writes to the error stream at start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@functools.cache
def device_copy_bandwidth(device: str = "cpu") -> float:
    """Bytes a second of a large copy, counting those read and those written; measured once."""
    size = 2**31 if device == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = measure(lambda: target.copy_(source), device).median
    return 2 * size / (best / 1000)


@functools.cache
def dense_bf16_rate(device: str = "cpu") -> float:
    """FLOP a second of a large bf16 matrix product on random numbers; measured once."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    best = measure(lambda: left @ right, device).median
    return 2 * size**3 / (best / 1000)


def percent_of_roofline(flops: float, moved: float, milliseconds: float, device: str) -> float:
    """How near a time is to the floor of `flops` and `moved` bytes at the measured ceilings."""
    floor = max(flops / dense_bf16_rate(device), moved / device_copy_bandwidth(device))
    return 100 * 1000 * floor / milliseconds
