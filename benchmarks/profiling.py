"""Where does a step's time go? A Chrome trace of a few steps, what takes longest, and the gaps.

trace.json.gz opens in ui.perfetto.dev or chrome://tracing; the regions of `smtc.regions` are spans
named smtc/NAME. On a GPU the rows are of its kernels and of the time it idles between them. On a
CPU they are of operators, by their own time (that of operators within them left out), and of the
time that the main thread spends outside of any operator: in Python, mostly. All times include what
the profiler itself takes, which on a CPU is much for small operators. Never run on a GPU: there was
none.
"""

import statistics
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from smtc import presets
from smtc.benchmarks import harness
from smtc.benchmarks.blocks import Row, markdown
from smtc.benchmarks.harness import Report, pick_device
from smtc.benchmarks.quiet import untrained_allowed
from smtc.benchmarks.step_providers import PROVIDERS, Case, pick_providers
from smtc.benchmarks.step_tables import profile_blocks
from smtc.errors import UserError
from smtc.progress import bar
from smtc.regions import listening
from smtc.training.graphs import WARM_UP

PREFIX = "smtc/"
STEPS = f"{PREFIX}steps"
TRACE = "trace.json.gz"
CPU_NOTE = (
    "the main thread alone; threads of OpenMP are not recorded, nor is Python itself; within a "
    "compiled region the calls between its kernels count as operators"
)
GPU_NOTE = "all streams together, from the first kernel to the last"


@dataclass(frozen=True)
class Span:
    """Something that ran, in nanoseconds."""

    name: str
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Gap:
    """A time in which nothing ran, and what did before and after it."""

    start: int
    end: int
    before: str
    after: str

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Recorded:
    """What the profiler saw."""

    work: list[Span]
    """Kernels of the GPU, or operators of the main thread."""
    regions: list[Span]
    """Of the main thread."""
    window: tuple[int, int]
    """From the first step's start to the last one's end."""


def run(
    output: Path,
    *,
    preset: str = "fixed",
    size: int = 256,
    clips: int | None = None,
    provider: str | None = None,
    steps: int = 3,
    top: int = 20,
    device: str = "auto",
) -> int:
    """Record, print tables and write `output`/trace.json.gz and profile.json.

    Args:
        output: the folder.
        preset: whose settings a step has, but that its encoder learns and all losses count.
        size: positions L.
        clips: clips a batch; None: 32, on a CPU 1.
        provider: of a step; None: triton, on a CPU eager-bf16.
        steps: recorded, after those that warm up.
        top: kernels, and kinds of gaps, that get a row.
        device: "cuda", "cpu" or "auto".

    Returns:
        the exit code 0.
    """
    device = pick_device(device)
    on_gpu = device == "cuda"
    clips = (32 if on_gpu else 1) if clips is None else clips
    name = provider or ("triton" if on_gpu else "eager-bf16")
    if presets.get(preset).method != "smtc":
        raise UserError(f"--preset {preset} trains no SMTC; bench profile takes the others.")
    if min(clips, steps, top) < 1:
        raise UserError("--clips, --steps and --top are numbers of at least 1.")
    pick_providers((name,), device)
    case = Case(preset, size, clips)
    case.config()
    report = Report(output / "profile.json")
    recorded = record(case, name, steps, device, output / TRACE)
    same: Row = {"case": case.name, "provider": name}
    about: Row = {"device": device, "steps": steps, "trace": TRACE}
    about["times"] = "with the profiler's own"
    report.add({"kind": "settings", **about})
    for row in [*kernel_rows(recorded, top, nested=not on_gpu), *gap_rows(recorded, top, on_gpu)]:
        report.add({"kind": row["kind"], **same} | row)
    print(markdown(profile_blocks(report.rows)))
    print(f"{len(report.rows)} rows in {report.path}; the trace is in {output / TRACE}.")
    return 0


def record(case: Case, provider: str, steps: int, device: str, trace: Path) -> Recorded:
    """Profile `steps` steps after a warm-up and write their trace."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device == "cuda" else []
    warm_up = WARM_UP + 2 if device == "cuda" else 2
    total = warm_up + steps
    with (
        untrained_allowed(),
        _kernels_named(device),
        bar(total=total, title=f"profile on {device}", unit="step") as shown,
    ):
        running, batch = PROVIDERS[provider].step(case, device), case.batch(device)
        for _ in range(warm_up):
            running(batch)
            shown.update()
        with (
            harness._quiet_profiler(),
            profile(activities=activities) as profiled,
            listening(lambda name: record_function(f"{PREFIX}{name}")),
            record_function(STEPS),
        ):
            for _ in range(steps):
                running(batch)
            if device == "cuda":
                torch.cuda.synchronize()
        shown.update(steps)
    partial = trace.with_name(f".partial.{trace.name}")
    profiled.export_chrome_trace(str(partial))
    partial.replace(trace)
    kineto: Any = profiled.profiler
    return sorted_out(kineto.kineto_results.events(), on_gpu=device == "cuda")


def _kernels_named(device: str) -> AbstractContextManager[object]:
    """Kernels that torch.compile makes for a CPU are in a trace only if they are told to."""
    if device == "cuda":
        return nullcontext()
    named: AbstractContextManager[object] = inductor_config.patch(
        {"cpp.enable_kernel_profile": True}
    )
    return named


def sorted_out(events: Iterable[Any], *, on_gpu: bool) -> Recorded:
    """Kineto's events by what they are."""
    work, regions, threads = [], [], {}
    everything = list(events)
    for event in everything:
        if event.name() == STEPS and event.device_type() == DeviceType.CPU:
            threads[event.start_thread_id()] = _span(event)
    if len(threads) != 1:
        raise RuntimeError(f"The profiler recorded {len(threads)} series of steps, not one.")
    ((thread, window),) = threads.items()
    for event in everything:
        of_device = event.device_type() != DeviceType.CPU
        in_thread = not of_device and event.start_thread_id() == thread
        if event.is_user_annotation():
            if in_thread and event.name().startswith(PREFIX):
                regions.append(_span(event))
        elif of_device if on_gpu else in_thread and event.name() != "[memory]":
            work.append(_span(event))
    work = [span for span in work if window.start <= span.start]
    if on_gpu and work:
        window = Span("", min(s.start for s in work), max(s.end for s in work))
    return Recorded(work, regions, (window.start, window.end))


def _span(event: Any) -> Span:
    return Span(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())


def own_times(spans: Iterable[Span]) -> list[tuple[Span, int]]:
    """Each span of one thread with its length less that of the spans directly within it."""
    ordered = sorted(spans, key=lambda span: (span.start, -span.end))
    own = [span.length for span in ordered]
    open_ones: list[int] = []
    for place, span in enumerate(ordered):
        while open_ones and ordered[open_ones[-1]].end <= span.start:
            open_ones.pop()
        if open_ones:
            own[open_ones[-1]] -= span.length
        open_ones.append(place)
    return list(zip(ordered, own, strict=True))


def gaps(spans: Iterable[Span], window: tuple[int, int]) -> list[Gap]:
    """The times of the window that no span covers."""
    found = []
    covered, before = window[0], "start"
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if span.start > covered:
            found.append(Gap(covered, min(span.start, window[1]), before, span.name))
        if span.end > covered:
            covered, before = span.end, span.name
    if covered < window[1]:
        found.append(Gap(covered, window[1], before, "end"))
    return [gap for gap in found if gap.length > 0]


def kernel_rows(recorded: Recorded, top: int, *, nested: bool) -> list[Row]:
    """The names that take most of the window, by their own time."""
    timed = own_times(recorded.work) if nested else [(s, s.length) for s in recorded.work]
    times: dict[str, list[int]] = {}
    for span, own in timed:
        times.setdefault(span.name, []).append(own)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [{"kind": "kernel", **_row(name, own, recorded)} for name, own in ranked[:top]]


def gap_rows(recorded: Recorded, top: int, on_gpu: bool) -> list[Row]:
    """All gaps together, then by the region in which they begin (on a CPU), then by what ran before
    and after.
    """
    found = gaps(recorded.work, recorded.window)
    what = "between kernels" if on_gpu else "outside of any operator"
    note = GPU_NOTE if on_gpu else CPU_NOTE
    rows = [_row(what, [gap.length for gap in found], recorded) | {"note": note}]
    if not on_gpu:
        by_region = _grouped(found, [region_at(gap.start, recorded.regions) for gap in found])
        rows += [_row(f"in {name}", lengths, recorded) for name, lengths in by_region]
    pairs = [f"{_short(gap.before)} → {_short(gap.after)}" for gap in found]
    rows += [_row(name, lengths, recorded) for name, lengths in _grouped(found, pairs)[:top]]
    return [{"kind": "gap", **row} for row in rows]


def _grouped(found: Sequence[Gap], names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Lengths by name, the most time first."""
    groups: dict[str, list[int]] = {}
    for gap, name in zip(found, names, strict=True):
        groups.setdefault(name, []).append(gap.length)
    return sorted(groups.items(), key=lambda item: -sum(item[1]))


def region_at(moment: int, regions: Sequence[Span]) -> str:
    """The innermost region at a moment."""
    around = [span for span in regions if span.start <= moment < span.end and span.name != STEPS]
    if not around:
        return "no region"
    return max(around, key=lambda span: span.start).name.removeprefix(PREFIX)


def _row(name: str, lengths: Sequence[int], recorded: Recorded) -> Row:
    """Times in nanoseconds as columns of a report."""
    whole = recorded.window[1] - recorded.window[0]
    return {
        "name": name,
        "calls": len(lengths),
        "total_ms": round(sum(lengths) / 1e6, 4),
        "share": round(sum(lengths) / whole, 5) if whole else 0.0,
        "median": round(statistics.median(lengths) / 1e3, 3) if lengths else 0.0,
        "unit": "us",
    }


def _short(name: str, letters: int = 60) -> str:
    name = name.removeprefix("autograd::engine::evaluate_function: ")
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
