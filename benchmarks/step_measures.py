"""What is measured of a step beside its time: parts, waits for the device, arithmetic, losses."""

import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smtc.benchmarks.step_providers import PROVIDERS, Case, Running
from smtc.pipelines.batch import Batch
from smtc.regions import listening

LOSSES = ("alignment", "regularisation", "instance")
LEAST = 0.1
"""A smaller loss is a difference of larger terms, whose rounding stays."""
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
"""Methods by which the host reads a tensor."""
ON_THE_HOST = {("model.py", "_check"), ("ops.py", "correlation_projection")}
"""Checks of indices that are made only where a tensor lies in the host's memory."""


def part_times(function: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of each region of `smtc.regions` in one call, and of what is in none as "other";
    a region within a region counts for the inner one alone.
    """
    clock = _EventClock() if device == "cuda" else _HostClock()
    inside = ["other"]
    marks = [("other", clock.now())]

    @contextmanager
    def listener(name: str) -> Iterator[None]:
        inside.append(name)
        marks.append((name, clock.now()))
        try:
            yield
        finally:
            inside.pop()
            marks.append((inside[-1], clock.now()))

    with listening(listener):
        function()
    marks.append(("", clock.now()))
    clock.settle()
    found: dict[str, float] = {}
    for (name, start), (_, end) in itertools.pairwise(marks):
        found[name] = found.get(name, 0.0) + clock.between(start, end)
    return found


class _HostClock:
    """Times of the host, in milliseconds."""

    def now(self) -> Any:
        return 1000 * time.perf_counter()

    def settle(self) -> None:
        """Nothing is under way."""

    def between(self, start: Any, end: Any) -> float:
        return float(end - start)


class _EventClock(_HostClock):
    """Times of the device's stream."""

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Until the device has come to the last mark."""
        torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))


def syncs(function: Callable[[], object], device: str) -> int:
    """How often the host waits for the device in one call.

    On a GPU torch counts; on a CPU, where nothing waits, what would: the host's reads of tensors.
    """
    return _waits(function) if device == "cuda" else _reads(function)


def _waits(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _reads(function: Callable[[], object]) -> int:
    count = depth = 0

    def counted(reader: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*arguments: Any, **named: Any) -> Any:
            nonlocal count, depth
            code = sys._getframe(1).f_code
            known = (Path(code.co_filename).name, code.co_name) in ON_THE_HOST
            count += depth == 0 and not known  # a reader that calls another one waits once
            depth += 1
            try:
                return reader(*arguments, **named)
            finally:
                depth -= 1

        return reading

    kept = {name: getattr(Tensor, name) for name in READS}
    inherited = {name for name in READS if name not in vars(Tensor)}
    try:
        for name, reader in kept.items():
            setattr(Tensor, name, counted(reader))
        function()
    finally:
        for name, reader in kept.items():
            if name in inherited:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, reader)
    return count


def step_flops(case: Case) -> float:
    """FLOP that a step of this case needs: those of plain torch's matrix products, forward and
    backward, each once; counted on one clip, on the CPU.
    """
    one = Case(case.preset, case.positions, 1, case.frames, case.slots)
    running, batch = PROVIDERS["eager-fp32"].step(one, "cpu"), one.batch("cpu")
    # As products: the counter does not know a CPU's attention, and of a GPU's it also counts what
    # the backward pass computes again.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        running(batch)
    return float(counter.get_total_flops() * case.clips)


def first_losses(running: Running, batch: Batch) -> dict[str, float]:
    """The losses of the first two steps: those of the second show what the first one learned."""
    found: dict[str, float] = {}
    for number in (1, 2):
        losses = running(batch)
        found |= {f"{name} {number}": float(losses[name]) for name in LOSSES}
    return found


def distance(found: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """The largest difference of a loss, relative to it or to `LEAST`, whichever is larger; infinite
    where one is NaN.
    """
    far = [abs(found[name] - value) / max(abs(value), LEAST) for name, value in expected.items()]
    return max(far) if all(value == value for value in far) else float("inf")


def in_short(error: Exception) -> str:
    """The kind of an error and its first line."""
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0][:200]}"
