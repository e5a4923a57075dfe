"""`smtc bench memory`: the law, what fits by it, and the rows of a real run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smtc.benchmarks import memory
from smtc.benchmarks.harness import read_report
from smtc.benchmarks.memory import FITTED, HELD_OUT, SMALLEST, Law, Size, fit, largest, worst_error
from smtc.benchmarks.step_providers import PROVIDERS, Case
from smtc.errors import UserError
from smtc.method import SMTCMethod

SQUARES = tuple(Size(side * side, 1) for side in (2, 4, 5, 6))
SMALL = (Size(1, 1, 2), *SQUARES, Size(16, 2), Size(16, 1, 3), Size(16, 1, slots=4))
KNOWN = Law(600.0, 400.0, {"B·T·L": 0.2, "B·T·N·L": 0.0, "B·T·L²": 3e-4, "B·T·(T−1)·L²": 2e-5})


def test_a_law_is_evaluated_by_its_formula() -> None:
    law = Law(10.0, 4.0, {"B·T·L": 0.5, "B·T·(T−1)·L²": 0.25, "B·N·L²": 0.125, "B·T·N·L": 1.0})
    # L = 2, B = 3, T = 4, N = 5: 24, 3·4·3·4 = 144, 3·5·4 = 60, 120.
    assert law(Size(2, 3, 4, 5)) == 4 + 12 + 36 + 7.5 + 120
    assert law(Size(1, 1, 2, 1)) == 10  # 4 + 1 + 0.5 + 0.125 + 2 lies below the floor


def test_the_fit_recovers_a_known_law() -> None:
    totals = {size: KNOWN(size) for size in FITTED}
    assert totals[SMALLEST] == 600 and KNOWN(Size(256, 1)) > 1.03 * 600
    found = fit(totals, list(KNOWN.slopes))
    assert found.floor == 600 and found.fixed == pytest.approx(400, rel=1e-6)
    for name, slope in KNOWN.slopes.items():
        assert found.slopes[name] == pytest.approx(slope, rel=1e-6, abs=1e-12)
    assert worst_error(found, {size: KNOWN(size) for size in HELD_OUT}) < 1e-9


def test_sizes_on_the_floor_do_not_bend_the_fit() -> None:
    totals = {size: KNOWN(size) for size in FITTED}
    on_floor = Size(100, 1, 2)
    assert KNOWN(on_floor) == 600
    found = fit(totals | {on_floor: 610.0}, list(KNOWN.slopes))
    assert found.fixed == pytest.approx(400, rel=1e-6)


def test_no_coefficient_is_negative() -> None:
    totals = {size: max(600.0, 700.0 - 1e-4 * size.positions**2) for size in FITTED[1:]}
    found = fit({SMALLEST: 100.0} | totals, ("B·T·L", "B·T·L²"))
    assert min(found.fixed, *found.slopes.values()) >= 0


def test_too_few_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="2 sizes above the floor"):
        fit({SMALLEST: 1.0, Size(256, 1): 5.0, Size(400, 1): 7.0}, ("B·T·L", "B·T·L²"))


def test_the_worst_error_is_the_largest_relative_one() -> None:
    law = Law(0.0, 100.0, {})
    assert worst_error(law, {Size(1, 1): 80.0, Size(2, 1): 110.0}) == pytest.approx(0.25)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 6, 7, 8, 100])
def test_the_largest_that_fits_is_exact(limit: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    assert largest(fits) == limit
    assert max(tried) <= 2 * max(1, limit) and len(tried) == len(set(tried))
    assert largest(lambda number: True, most=100) == 100


def test_what_is_held_is_what_training_keeps() -> None:
    """Student and teacher, and of what learns two moments; and the batch."""
    case, provider = Case("tiny", 16, 2), PROVIDERS["eager-fp32"]
    made = SMTCMethod(case.config())
    learns = sum(value.numel() for value in made.trainable(0).values())
    whole = sum(v.numel() * v.element_size() for v in [*made.parameters(), *made.buffers()])
    batch = case.batch("cpu")
    expected = whole + 4 * 2 * learns + batch.views.numel() * 4 + batch.index.numel() * 8
    held, peak = memory.held_and_peak(provider, case, "cpu")
    assert held == pytest.approx(expected / 1e6, rel=0.02)
    assert peak > 4 * learns / 1e6  # the gradients at least


def test_views_share_what_they_are_of() -> None:
    before = memory.held_memory("cpu")
    whole = torch.zeros(500, 1000)
    views = [whole[0], whole.t(), whole[:2, 3:]]
    assert memory.held_memory("cpu") - before == pytest.approx(2.0, abs=0.01)
    del views


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of milliseconds."""
    monkeypatch.setattr(memory, "SMALLEST", SMALL[0])
    monkeypatch.setattr(memory, "FITTED", SMALL)
    monkeypatch.setattr(memory, "HELD_OUT", (Size(16, 3, 2),))


def test_a_run_has_peaks_a_law_and_limits(
    small: None, cli: Callable[..., Any], tmp_path: Path
) -> None:
    names = ("plain", "eager-bf16+recompute")
    told = cli(
        *("bench", "memory", "--device", "cpu", "--preset", "tiny"),
        *("--providers", *names, "--output", tmp_path),
    )
    assert told.code == 0, told
    assert "random weights" not in told.error
    rows = read_report(tmp_path / "memory.json")["rows"]
    peaks = [row for row in rows if row["kind"] == "peak"]
    assert len(peaks) == 2 * 9 and all(row["peak_mb"] > 0 < row["held_mb"] for row in peaks)
    assert [row["fitted"] for row in peaks[:9]] == [True] * 8 + [False]
    laws = [row for row in rows if row["kind"] == "law"]
    assert [row["provider"] for row in laws] == list(names)
    for row in laws:
        assert 0 <= row["worst_error"] < 0.5 and row["law"].startswith("held + peak = max(floor, ")
        assert list(row["coefficients"])[:2] == ["floor (MB)", "fixed (MB)"]
    limits = [row for row in rows if row["kind"] == "limit"]
    assert [(row["L"], row["memory_mb"]) for row in limits[:6]] == [
        (positions, size) for positions in (256, 1024, 1500) for size in (80_000, 141_000)
    ]
    for small_one, large in zip(limits[::2], limits[1::2], strict=True):
        assert small_one["by"] == "law" and small_one["law_of"] == "cpu"
        assert 0 < small_one["B"] < large["B"]
    assert "most clips within 80 / 141 GB" in told.out and f"| {limits[0]['B']} / " in told.out


def test_a_size_that_fails_is_a_row(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(provider: object, case: Case, device: str) -> tuple[float, float]:
        if case.positions == 36:
            raise torch.OutOfMemoryError("out of memory")
        tokens = case.positions * case.clips * case.frames
        # The size that is held out, with three clips, needs a quarter more than the law says.
        return 100.0, tokens if case.clips < 3 else 1.25 * (100 + tokens) - 100

    monkeypatch.setattr(memory, "held_and_peak", full)
    assert memory.run(tmp_path, providers=["eager-bf16"], device="cpu") == 0
    rows = read_report(tmp_path / "memory.json")["rows"]
    assert ["out of memory" in row["error"] for row in rows if "error" in row] == [True]
    (law,) = [row for row in rows if row["kind"] == "law"]
    assert law["coefficients"]["a (bytes)"] == pytest.approx(1e6, rel=1e-3)
    assert law["worst_error"] == pytest.approx(0.2, rel=1e-3)
    # 80 000 MB = 100 + B · 4 · 256
    assert next(row["B"] for row in rows if row["kind"] == "limit") == math.floor(79_900 / 1024)


def test_what_compiles_is_measured_on_request_only() -> None:
    names = [provider.name for provider in memory.chosen_providers((), "cpu")]
    assert names == ["plain", "eager-fp32", "eager-bf16", "eager-bf16+recompute"]
    assert [p.name for p in memory.chosen_providers(("compile",), "cpu")] == ["compile"]


def test_mistakes_end_in_a_sentence(safe: Callable[..., str], tmp_path: Path) -> None:
    start = ("bench", "memory", "--device", "cpu", "--output", tmp_path / "out")
    assert "no provider 'scipy'" in safe(*start, "--providers", "scipy")
    assert "CUDA device" in safe(*start, "--providers", "triton")
    assert "pool of its graph" in safe(*start, "--providers", "triton+graphs")
    assert "trains no SMTC" in safe(*start, "--preset", "tiny_encoder")
    assert "no preset" in safe(*start, "--preset", "huge")
