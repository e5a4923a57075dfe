"""Are the numbers right? Every operation, dtype and case against the oracle in float64.

Errors are relative in the L2 norm; beside each stands plain torch's own error in the same dtype.
`of_tolerance` is the worst of a case's errors in units of its tolerance: above 1 is a miss.
"""

import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smtc import kernels
from smtc.benchmarks.blocks import Table, is_number, markdown, text
from smtc.benchmarks.cases import Case, parity_cases
from smtc.benchmarks.comparison import Errors, against_oracle, poisoned_memory
from smtc.benchmarks.harness import Report, pick_device, pick_operations
from smtc.errors import UserError
from smtc.kernels.dispatch import obstacle
from smtc.progress import track

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Row = dict[str, Any]


LEGEND = (
    "Relative errors in the L2 norm against the oracle in float64, the largest of an operation's "
    "cases (of an exact 0: absolute). Of tolerance: 1 is the limit. Worst case: its sizes, in the "
    "order of benchmarks/cases.py."
)


def run(
    output: Path,
    *,
    impl: str = "auto",
    device: str = "auto",
    ops: Sequence[str] = (),
    deadline: float | None = None,
) -> int:
    """Check, print a table and write `output`/parity.json.

    Args:
        output: the folder.
        impl: "triton", "eager", or "auto": the kernels where they can run, else plain torch.
        device: "cuda", "cpu" or "auto".
        ops: operations to check; all where none is named.
        deadline: a time of `time.monotonic` after which no case is begun.

    Returns:
        an exit code: 1 after a miss, or where the deadline left something unchecked.
    """
    device = pick_device(device)
    jobs = [
        (op, dtype, case)
        for op in pick_operations(ops)
        for dtype in DTYPES
        for case in parity_cases(op)
    ]
    impl = pick_impl(impl, device)
    report = Report(output / "parity.json")
    for op, dtype, case in track(jobs, title=f"parity of {impl} on {device}", unit="case"):
        if deadline is not None and time.monotonic() > deadline:
            print(f"Out of time before {op} {dtype}: {len(jobs) - len(report.rows)} cases left.")
            break
        report.add(check(case, dtype, impl, device))
    print(markdown([LEGEND, table(report.rows)]))
    missed = [row for row in report.rows if not row["passed"]]
    for row in missed[:10]:
        print(f"MISS {row['op']} {row['dtype']} {row['case']}: {why(row)}")
    print(f"{len(report.rows) - len(missed)} of {len(jobs)} cases passed; {report.path}")
    return 1 if missed or len(report.rows) < len(jobs) else 0


def pick_impl(impl: str, device: str) -> str:
    """What "auto" means here. `UserError` where the kernels are asked for and cannot run."""
    reason = obstacle(torch.device(device))
    if impl == "triton" and reason is not None:
        raise UserError(f"--impl triton {reason}; use --impl eager.")
    if impl == "auto":
        impl = "triton" if reason is None else "eager"
        print(f"Checking --impl {impl}" + (f": triton {reason}." if reason else "."))
    return impl


def check(case: Case, dtype: str, impl: str, device: str) -> Row:
    """The row of one case: errors of `impl` and of plain torch. A failure becomes its `error`."""
    row: Row = {"op": case.op, "case": case.name, "dtype": dtype, "provider": impl}
    row["device"] = device
    try:
        with poisoned_memory():
            found = _errors(case, dtype, impl, device)
        plain = found if impl == "eager" else _errors(case, dtype, "eager", device)
    except Exception as error:
        return row | {"passed": False, "error": sentence(error)}
    worst = max(error.of_tolerance for error in found)
    row |= {"forward": _largest(found, "output"), "gradient": _largest(found, "gradient")}
    row |= {"of_tolerance": worst, "unit": "relative L2"}
    row["eager_forward"] = _largest(plain, "output")
    row["eager_gradient"] = _largest(plain, "gradient")
    return row | {"passed": worst <= 1}


def _errors(case: Case, dtype: str, impl: str, device: str) -> list[Errors]:
    return against_oracle(
        functools.partial(getattr(kernels, case.op), impl=impl),
        case.op,
        case.inputs(),
        case.wanted,
        DTYPES[dtype],
        factor=case.factor,
        device=device,
        **case.settings,
    )


def _largest(found: list[Errors], what: str) -> float | None:
    values = [error.relative for error in found if error.what.startswith(what)]
    return max(values) if values else None


def sentence(error: BaseException) -> str:
    """The first line of an error, which may be long and name paths further down."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def why(row: Row) -> str:
    """What is wrong in a row that did not pass."""
    worst = _severity(row)
    far = "infinitely far" if math.isinf(worst) else f"{worst:.2g} times its tolerance"
    return str(row.get("error", far))


def table(rows: Sequence[Row]) -> Table:
    """The worst error of each operation and dtype over its cases."""
    columns = ("forward", "gradient", "eager_forward", "eager_gradient")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((text(row.get("op")), text(row.get("dtype"))), []).append(row)
    lines = []
    for key, group in groups.items():
        worst = max(group, key=_severity)
        cells = [_cell([row.get(column) for row in group]) for column in columns]
        missed = sum(not row.get("passed") for row in group)
        verdict = f"{missed} of {len(group)} missed" if missed else f"{len(group)} passed"
        of = "failed" if "error" in worst else format(_severity(worst), ".2f")
        lines.append([*key, *cells, of, text(worst.get("case")), verdict])
    heads = ["operation", "dtype", "forward", "gradient", "eager's forward", "eager's gradient"]
    return Table([*heads, "of tolerance", "worst case", "result"], lines)


def _severity(row: Row) -> float:
    value = row.get("of_tolerance")
    return float(value) if is_number(value) else math.inf


def _cell(values: list[Any]) -> str:
    known = [value for value in values if is_number(value)]
    return f"{max(known):.1e}" if known else ""
