"""The README's kernel tables are those of the committed results."""

import json
from pathlib import Path

from smtc.benchmarks import parity, report
from smtc.benchmarks.cases import CASES
from smtc.benchmarks.comparison import TOLERANCE
from smtc.kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_parity_table_is_the_recorded_one_and_complete() -> None:
    rows = json.loads((RESULTS / "parity.json").read_text(encoding="utf-8"))["rows"]
    assert parity.table(rows).strip() in README
    found = {(row["op"], row["case"], row["dtype"]) for row in rows}
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
    dtypes.remove("float64")
    assert found == {(case.op, case.name, dtype) for case in CASES for dtype in dtypes}
    assert {row["provider"] for row in rows} == {"triton"}
    assert all(row["of_tolerance"] <= 1 for row in rows)


def test_the_times_are_the_recorded_ones() -> None:
    """Without results of a GPU every cell says that it was not measured."""
    path = RESULTS / "kernels.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    assert report.summary(rows).strip() in README


def test_every_kernel_is_named() -> None:
    assert all(f"`{op}`" in README for op in dispatch.FUSED)
