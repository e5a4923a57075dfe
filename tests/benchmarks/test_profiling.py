"""`smtc bench profile`: own times and gaps by hand, the trace, and what is told of a CPU."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.autograd import DeviceType

from smtc.benchmarks import profiling
from smtc.benchmarks.harness import read_report
from smtc.benchmarks.profiling import (
    STEPS,
    Gap,
    Recorded,
    Span,
    gap_rows,
    gaps,
    kernel_rows,
    own_times,
    region_at,
    sorted_out,
)
from smtc.regions import REGIONS

QUICK = ("--device", "cpu", "--preset", "tiny", "--size", 4, "--clips", 1)
# outer 0–100 holds inner 10–40, which holds deep 20–30, and inner 50–60; then alone 150–160.
NESTED = [
    Span("outer", 0, 100),
    Span("inner", 10, 40),
    Span("deep", 20, 30),
    Span("inner", 50, 60),
    Span("alone", 150, 160),
]


@dataclass(frozen=True)
class Event:
    """As kineto's."""

    label: str
    start: int
    length: int
    thread: int = 1
    device: DeviceType = DeviceType.CPU
    annotation: bool = False

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.length

    def start_thread_id(self) -> int:
        return self.thread

    def device_type(self) -> DeviceType:
        return self.device

    def is_user_annotation(self) -> bool:
        return self.annotation


def test_own_times_leave_out_what_is_within() -> None:
    found = [(span.name, own) for span, own in own_times(reversed(NESTED))]
    assert found == [("outer", 60), ("inner", 20), ("deep", 10), ("inner", 10), ("alone", 10)]
    # A span that ends where another one starts does not hold it.
    touching = [Span("a", 0, 10), Span("b", 10, 20)]
    assert [own for _, own in own_times(touching)] == [10, 10]


def test_gaps_are_what_nothing_covers() -> None:
    overlapping = [*NESTED, Span("long", 155, 190)]
    assert gaps(overlapping, (-5, 200)) == [
        Gap(-5, 0, "start", "outer"),
        Gap(100, 150, "outer", "alone"),
        Gap(190, 200, "long", "end"),
    ]
    assert gaps(NESTED, (0, 160)) == [Gap(100, 150, "outer", "alone")]
    assert gaps([], (0, 5)) == [Gap(0, 5, "start", "end")]


def microseconds(*spans: Span) -> list[Span]:
    return [Span(span.name, 1000 * span.start, 1000 * span.end) for span in spans]


def test_rows_are_sums_by_name() -> None:
    regions = [Span(STEPS, 0, 200), Span("smtc/backward", 90, 120), Span("smtc/ema", 95, 110)]
    recorded = Recorded(microseconds(*NESTED), microseconds(*regions), (0, 200_000))
    rows = kernel_rows(recorded, 2, nested=True)
    assert [(row["name"], row["calls"], row["total_ms"], row["share"]) for row in rows] == [
        ("outer", 1, 0.06, 0.3),
        ("inner", 2, 0.03, 0.15),
    ]
    assert rows[1]["median"] == 15 and rows[1]["unit"] == "us"
    assert kernel_rows(recorded, 1, nested=False)[0]["total_ms"] == 0.1
    whole, *others = gap_rows(recorded, 5, on_gpu=False)
    assert (whole["calls"], whole["total_ms"], whole["share"]) == (2, 0.09, 0.45)
    assert "OpenMP" in whole["note"]
    assert [(row["name"], row["share"]) for row in others] == [
        ("in ema", 0.25),
        ("in no region", 0.2),
        ("outer → alone", 0.25),
        ("alone → end", 0.2),
    ]
    on_gpu = gap_rows(recorded, 1, on_gpu=True)
    assert [row["name"] for row in on_gpu] == ["between kernels", "outer → alone"]


def test_the_innermost_region_counts() -> None:
    regions = [Span(STEPS, 0, 100), Span("smtc/student", 10, 50), Span("smtc/data", 20, 30)]
    found = [region_at(moment, regions) for moment in (5, 10, 25, 30, 50)]
    assert found == ["no region", "student", "data", "student", "no region"]


def test_events_of_a_cpu_are_those_of_the_main_thread() -> None:
    events = [
        Event(STEPS, 100, 900, annotation=True),
        Event("smtc/student", 150, 100, annotation=True),
        Event("Optimizer.step", 160, 50, annotation=True),
        Event("aten::mm", 170, 30),
        Event("aten::mm", 170, 30, thread=2),
        Event("aten::add", 20, 10),
        Event("[memory]", 180, 0),
    ]
    found = sorted_out(events, on_gpu=False)
    assert found.work == [Span("aten::mm", 170, 200)] and found.window == (100, 1000)
    assert [span.name for span in found.regions] == [STEPS, "smtc/student"]
    with pytest.raises(RuntimeError, match="0 series of steps"):
        sorted_out(events[1:], on_gpu=False)


def test_events_of_a_gpu_are_its_kernels() -> None:
    card: dict[str, Any] = {"device": DeviceType.CUDA, "thread": 7}
    events = [
        Event(STEPS, 100, 900, annotation=True),
        Event(STEPS, 200, 700, annotation=True, **card),
        Event("aten::mm", 170, 30),
        Event("gemm", 210, 40, **card),
        Event("Memcpy DtoH", 300, 100, **card),
    ]
    found = sorted_out(events, on_gpu=True)
    assert [span.name for span in found.work] == ["gemm", "Memcpy DtoH"]
    assert found.window == (210, 400)
    assert gaps(found.work, found.window) == [Gap(250, 300, "gemm", "Memcpy DtoH")]


def test_a_step_is_recorded(cli: Callable[..., Any], tmp_path: Path) -> None:
    told = cli("bench", "profile", *QUICK, "--steps", 2, "--top", 4, "--output", tmp_path)
    assert told.code == 0, told
    assert "random weights" not in told.error
    with gzip.open(tmp_path / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    spans = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    # Views and both models, losses, backward and the rest of each of two steps.
    assert {f"smtc/{name}" for name in REGIONS} <= set(spans)
    assert spans.count("smtc/backward") == 2 and spans.count(STEPS) == 1
    settings, *rows = read_report(tmp_path / "profile.json")["rows"]
    assert settings["trace"] == "trace.json.gz" and settings["steps"] == 2
    kernels = [row for row in rows if row["kind"] == "kernel"]
    assert len(kernels) == 4 and all(row["name"].startswith("aten::") for row in kernels)
    assert [row["total_ms"] for row in kernels] == sorted(
        (row["total_ms"] for row in kernels), reverse=True
    )
    found = {row["name"]: row for row in rows if row["kind"] == "gap"}
    whole = found["outside of any operator"]
    assert 0 < whole["share"] < 1 and whole["note"] == profiling.CPU_NOTE
    parts = [row["total_ms"] for name, row in found.items() if name.startswith("in ")]
    assert sum(parts) == pytest.approx(whole["total_ms"], rel=1e-2)
    assert all(row["case"] == "tiny L4 B1" and row["provider"] == "eager-bf16" for row in rows)
    assert "| tiny L4 B1 | eager-bf16 | aten::" in told.out and "trace.json.gz" in told.out


def test_a_run_that_is_stopped_leaves_valid_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*arguments: object) -> object:
        raise KeyboardInterrupt

    assert profiling.run(tmp_path, preset="tiny", size=4, steps=1, top=1, device="cpu") == 0
    trace = (tmp_path / "trace.json.gz").read_bytes()
    rows = read_report(tmp_path / "profile.json")["rows"]
    monkeypatch.setattr(profiling, "record", stopped)
    with pytest.raises(KeyboardInterrupt):
        profiling.run(tmp_path, preset="tiny", size=4, device="cpu")
    assert read_report(tmp_path / "profile.json")["rows"] == rows != []
    assert (tmp_path / "trace.json.gz").read_bytes() == trace
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json", "trace.json.gz"]


@pytest.mark.slow
def test_compiled_kernels_have_names(tmp_path: Path) -> None:
    assert profiling.run(tmp_path, preset="tiny", size=4, provider="compile", device="cpu") == 0
    rows = read_report(tmp_path / "profile.json")["rows"]
    assert any("cpp_fused" in row["name"] for row in rows if row["kind"] == "kernel")


def test_mistakes_end_in_a_sentence(safe: Callable[..., str], tmp_path: Path) -> None:
    start = ("bench", "profile", "--device", "cpu", "--output", tmp_path / "out")
    for flag in ("--clips", "--steps", "--top"):
        assert "at least 1" in safe(*start, flag, 0)
    assert "CUDA device" in safe(*start, "--provider", "triton")
    assert "no provider" in safe(*start, "--provider", "cublas")
    assert "trains no SMTC" in safe(*start, "--preset", "tiny_encoder")
    assert "or a square" in safe(*start, "--size", 5)
