"""`smtc bench report`: tables and a picture from the JSON files of a folder."""

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smtc.benchmarks import report
from smtc.benchmarks.harness import Report

TIME = {"unit": "ms", "repeats": 5, "percent_of_roofline": 40.0, "peak_mb": 1.0}


def row(op: str, case: str, provider: str, median: float, **more: Any) -> dict[str, Any]:
    """A timed row of kernels.json."""
    found = {"op": op, "case": case, "provider": provider, "direction": "both", "mode": "launch"}
    return found | TIME | {"median": median, "p20": 0.9 * median, "p80": 1.1 * median} | more


ROWS = [
    {"case": "device copy", "median": 4300.0, "unit": "GB/s"},
    row("correlation_projection", "L256", "triton", 0.1),
    row("correlation_projection", "L256", "triton", 0.08, mode="graph"),
    row("correlation_projection", "L256", "eager-bf16", 0.15),
    row("correlation_projection", "L256", "eager-fp32", 0.4),
    row("correlation_projection", "L256", "plain", 0.5),
    row("masked_slot_attention", "L1024 semantic", "triton", 0.2),
    row("assignment", "L256", "triton", 0.01, direction="forward"),
    row("assignment", "L256", "scipy", 300.0, direction="forward"),
    row("sinkhorn", "L256", "eager-bf16", 3.0),
    {"op": "sinkhorn", "case": "L256", "provider": "plain", "error": "OutOfMemoryError: no room"},
]


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"| {start}")]


def test_the_summary_compares_with_the_best_eager_form() -> None:
    text = report.summary(ROWS)
    (correlation,) = lines_of(text, "correlation_projection")
    assert "| 0.1 ms, 1.5x eager, 5.0x plain | not yet measured | not yet measured |" in correlation
    assert correlation.endswith("| 1.3 / 1 / 1x eager |")
    semantic, instance = lines_of(text, "masked_slot_attention")
    assert "| not yet measured | 0.2 ms | not yet measured | 3x eager |" in semantic
    assert instance.count(report.UNMEASURED) == 3
    assert "| 0.01 ms |" in lines_of(text, "assignment")[0]
    assert lines_of(text, "sinkhorn")[0].count(report.UNMEASURED) == 3


def test_without_rows_nothing_is_claimed() -> None:
    text = report.summary([])
    assert text.count(report.UNMEASURED) == 3 * (len(text.splitlines()) - 2)


def test_the_tables_show_all_times_and_all_failures() -> None:
    text = report.kernel_tables(ROWS)
    assert "Measured ceilings: device copy 4300 GB/s." in text
    (line,) = lines_of(text, "correlation_projection")
    assert line.startswith(
        "| correlation_projection | L256 | both | 0.1 (0.08) | 0.15 | 0.4 | 0.5 |"
    )
    assert line.endswith("| 1.50x | 40 % |")
    assert "* sinkhorn L256  plain: OutOfMemoryError: no room" in text


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    written = Report(folder / f"{name}.json")
    for one in rows:
        written.add(one)


def test_a_folder_becomes_a_page_and_a_picture(cli: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path, "kernels", ROWS)
    checked = {"op": "sinkhorn", "case": "small", "dtype": "float32", "forward": 1e-7}
    write(tmp_path, "parity", [checked | {"of_tolerance": 0.1, "passed": True}])
    compiled = {"op": "sinkhorn", "kernel": "rows", "arch": "sm_90", "registers": 128}
    write(tmp_path, "static", [compiled | {"spill_bytes": 0, "shared_bytes": 4096}])
    tried = {"kernel": "rows", "arch": "sm_90", "bits": 16, "size": 256, "options": {"BLOCK": 64}}
    write(
        tmp_path,
        "tune",
        [tried | {"median": 1.5, "chosen": True}, tried | {"error": "too big", "chosen": False}],
    )
    told = cli("bench", "report", tmp_path)
    assert told.code == 0
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page in told.out
    for part in ("## kernels", "## parity", "## static", "## tune", "torch ", "commit "):
        assert part in page
    assert "| sinkhorn | sm_90 | 128 | 0 | 4096 |" in page
    assert "| rows | sm_90 | 16 | 256 | BLOCK 64 | 1.5 | chosen |" in page
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_still_a_page(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "kernels", ROWS)
    usual = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name == "matplotlib":
            raise ImportError
        return usual(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    told = cli("bench", "report", tmp_path)
    assert told.code == 0 and "pip install matplotlib" in told.out
    assert (tmp_path / "report.md").exists() and not (tmp_path / "kernels.png").exists()


def test_what_is_no_result_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "holds no kernels.json" in refused("bench", "report", tmp_path)
    (tmp_path / "parity.json").write_text("{}", encoding="utf-8")
    assert "parity.json is no benchmark report" in refused("bench", "report", tmp_path)
