"""What the kernels become on GPUs that are not there: `smtc bench static`.

Every operation is called forward and backward on meta tensors of the paper's setting, its
launches are written down and compiled for each architecture, and what a program takes is held
against `static_budgets.py`.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smtc import kernels
from smtc.benchmarks.cases import SETTINGS, Case, at_size
from smtc.benchmarks.harness import Report, pick_operations
from smtc.errors import UserError
from smtc.progress import track

try:
    from smtc.benchmarks.static_budgets import Budget, budget
    from smtc.kernels.aot import (
        ARCHITECTURES,
        KIB,
        Compiled,
        Product,
        Source,
        compile_source,
        source_of,
    )
    from smtc.kernels.launching import INTERPRETED, Launch, recording
except ImportError as error:
    raise UserError(f"bench static needs Triton: pip install triton ({error}).") from error

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Arguments that choose other kernels, or other forms of them, than the usual ones: the log domain,
# the margin loss, log-softmax.
OTHER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "transport_alignment": {"epsilon": 0.01, "marginals": "l1"},
    "instance_consistency": {"form": "l2_margin", "margin": 2.0},
    "mask_losses": {"delta": 0.0},
}

# For the predicted time: an H200's device copy and dense bf16 products as measured on such a card.
# A product of float32 operands is three of TF32, whose rate is half of bf16's.
BYTES_PER_SECOND = 4.3e12
FLOP_PER_SECOND = {"bf16": 790e12, "fp32": 790e12 / 6}

HEAD = (
    "operation", "case", "pass", "kernel", "GPU", "registers", "spilled B", "shared KiB",
    "occupancy", "tensor-core instructions", "programs", "kB/program", "MFLOP/program",
    "floor µs", "over budget",
)  # fmt: skip
NOTES = """\
One row a kernel, setting and GPU. Compiled, not run: registers and spilled bytes are a thread's,
shared memory a program's, tensor-core instructions those in the machine code, occupancy the share
of a multiprocessor's warps that fit. Bytes count each tensor of a launch once, FLOP its matrix
products. The floor is a prediction, not a measurement: the larger of bytes / 4.3 TB/s and FLOP /
790 TFLOP/s (132 where all operands are float32), rates of an H200, whatever GPU the row is for.
"""


@dataclass(frozen=True)
class Planned:
    """Launches of one kernel that compile to the same code and do equally much."""

    case: Case
    dtype: str
    backward: bool
    architecture: str
    launch: Launch
    source: Source
    count: int


def run(
    output: Path, ops: tuple[str, ...] = (), architectures: tuple[str, ...] = ARCHITECTURES
) -> int:
    """Compile, print the table and write `static.json` and `static.md`.

    Args:
        output: the folder for both files.
        ops: names of operations; all where none is named.
        architectures: of "sm_80", "sm_90", "sm_100".

    Returns:
        the exit code: 1 when a kernel is over its budget, else 0.
    """
    if INTERPRETED:
        raise UserError(
            "Kernels cannot be compiled in Triton's interpreter; unset TRITON_INTERPRET."
        )
    for name in architectures:
        if name not in ARCHITECTURES:
            raise UserError(f"There is no {name!r} here; there are {', '.join(ARCHITECTURES)}.")
    chosen = pick_operations(ops)
    report = Report(output / "static.json")
    plans = [
        planned
        for architecture in architectures
        for op in chosen
        for planned in plan(op, architecture)
    ]
    for planned, found in zip(plans, _compiled([p.source for p in plans]), strict=True):
        report.add(_row(planned, found))
    text = markdown(report.rows)
    (output / "static.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if any(row["over"] for row in report.rows) else 0


def plan(op: str, architecture: str) -> list[Planned]:
    """The launches of one operation: bf16 at every setting, other arguments and float32, whose
    tiles are others, at all but the largest. What compiled already for a setting is left out.
    """
    found: list[Planned] = []
    seen: dict[str, set[Source]] = {}
    runs = [(positions, "bf16") for positions in SETTINGS]
    runs += [(positions, "fp32") for positions in SETTINGS[:-1]]
    for positions, dtype in runs:
        for usual in at_size(op, positions, "meta", DTYPES[dtype]):
            cases = [usual]
            if positions != SETTINGS[-1] and op in OTHER_ARGUMENTS:
                cases.append(_other(usual))
            known = seen.setdefault(usual.name, set())
            for case in cases:
                new = [
                    Planned(case, dtype, bool(backward), architecture, launch, source, count)
                    for backward, launches in enumerate(record(case, architecture))
                    for (source, _), (launch, count) in _grouped(launches, architecture).items()
                    if source not in known
                ]
                known.update(planned.source for planned in new)
                found += new
    return found


def _other(case: Case) -> Case:
    changed = OTHER_ARGUMENTS[case.op]
    name = " ".join([case.name, *(f"{key} {value}" for key, value in changed.items())])
    return replace(case, name=name, settings=case.settings | changed)


def record(case: Case, architecture: str) -> tuple[list[Launch], list[Launch]]:
    """The launches of a call on meta tensors, and those of its backward."""
    inputs = case.inputs()
    wanted = [value for place in case.wanted if (value := inputs[place]) is not None]
    with recording(architecture) as seen:
        for value in wanted:
            value.requires_grad_()
        result = getattr(kernels, case.op)(*inputs, impl="triton", **case.settings)
        forward = len(seen)
        outputs = result if isinstance(result, tuple) else (result,)
        graph = [o for o in outputs if o is not None and o.requires_grad]
        if graph:
            torch.autograd.grad(graph, wanted, [torch.ones_like(o) for o in graph])
    return seen[:forward], seen[forward:]


def _grouped(
    launches: list[Launch], architecture: str
) -> dict[tuple[Source, tuple[int, ...]], tuple[Launch, int]]:
    """One launch of each source and grid, and how many there are."""
    grouped: dict[tuple[Source, tuple[int, ...]], tuple[Launch, int]] = {}
    for launch in launches:
        key = source_of(launch, architecture), launch.grid
        first, count = grouped.get(key, (launch, 0))
        grouped[key] = first, count + 1
    return grouped


def _compiled(sources: list[Source]) -> Iterator[Compiled | str]:
    """The outcome of each source in order, equal ones compiled once, on all cores; a `str` says why
    a source does not compile.
    """
    distinct = list(dict.fromkeys(sources))
    workers = max(1, min(len(distinct), len(os.sched_getaffinity(0))))
    # Fresh processes: a fork of one in which torch has started threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        outcomes = pool.map(_outcome, distinct)
        found: dict[Source, Compiled | str] = {}
        awaited = track(zip(distinct, outcomes, strict=True), total=len(distinct), title="compile")
        for source in sources:
            while source not in found:
                done, outcome = next(awaited)
                found[done] = outcome
            yield found[source]
        next(awaited, None)


def _outcome(source: Source) -> Compiled | str:
    try:
        return compile_source(source)
    except RuntimeError as error:
        return str(error)


def _row(planned: Planned, found: Compiled | str) -> dict[str, Any]:
    """A row of the report; one of a kernel that does not compile has no measures."""
    launch, op = planned.launch, planned.case.op
    allowed = budget(op, launch.name, planned.architecture, planned.dtype)
    programs, moved = prod(launch.grid), unique_bytes(launch.arguments)
    row: dict[str, Any] = {
        "op": op,
        "kernel": launch.name,
        "case": f"{planned.case.name} {planned.dtype}",
        "arch": planned.architecture,
        "pass": "backward" if planned.backward else "forward",
        "launches": planned.count,
        "configuration": {name: launch.options[name] for name in sorted(launch.options)},
        "programs": programs,
        "bytes": moved,
        "flops": launch.flops,
        "bytes_per_program": round(moved / programs),
        "flops_per_program": round(launch.flops / programs),
        "budget_spill_bytes": allowed.spill_bytes,
        "budget_shared_bytes": allowed.shared_bytes,
        "budget_reason": allowed.reason,
    }
    if isinstance(found, str):
        return row | {"error": found, "over": ["does not compile"]}
    wanted = wanted_tensor_cores(found, planned.architecture)
    operands = {product.operand for product in found.products}
    rate = FLOP_PER_SECOND["fp32" if operands == {"f32"} else "bf16"]
    floor = max(moved / BYTES_PER_SECOND, launch.flops / rate)
    return row | {
        "warps": found.warps,
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "shared_bytes": found.shared_bytes,
        "occupancy": found.occupancy,
        "tensor_core_instructions": sum(found.tensor_cores.values()),
        "tensor_core_kinds": found.tensor_cores,
        "products": [str(product) for product in found.products],
        "narrow_loads": found.narrow_loads,
        "roofline_us": round(1e6 * floor, 2),
        "budget_tensor_core_kinds": sorted(wanted),
        "over": over(found, allowed, wanted),
    }


def over(found: Compiled, allowed: Budget, wanted: set[str]) -> list[str]:
    """What is beyond the budget, in words."""
    said = []
    if not found.programs_per_multiprocessor:
        said.append("no room on a multiprocessor")
    if found.spill_bytes > allowed.spill_bytes:
        said.append(f"spills {found.spill_bytes} B of {allowed.spill_bytes}")
    if found.shared_bytes > allowed.shared_bytes:
        said.append(f"shared {found.shared_bytes} B of {allowed.shared_bytes}")
    present = set(found.tensor_cores)
    # HMMA is the oldest kind: any other may stand for it.
    missing = {kind for kind in wanted - present if kind != "HMMA" or not present}
    said += [f"no {kind}" for kind in sorted(missing)]
    if "HMMA" in present - wanted:
        said.append("HMMA where a faster kind is possible")
    return said


def wanted_tensor_cores(found: Compiled, architecture: str) -> set[str]:
    """The fastest kind of instruction for each of a kernel's products."""
    return {_fastest(product, architecture, found.warps) for product in found.products}


def _fastest(product: Product, architecture: str, warps: int) -> str:
    """Of 16-bit operands with 64 rows and more, in the numbers of warps that Triton's products on
    tensor memory take; float32 operands (TF32) and fewer rows stay with HMMA.
    """
    if product.operand in ("bf16", "f16") and product.rows >= 64:
        if architecture == "sm_90" and warps >= 4:
            return "HGMMA"
        if architecture == "sm_100" and warps in (4, 8):
            return "UTCHMMA"
    return "HMMA"


def unique_bytes(arguments: Iterable[Any]) -> int:
    """The bytes that a launch's tensors have, what is shared or repeated by a stride of 0 once."""
    views: dict[int, dict[Any, int]] = {}
    sizes: dict[int, int] = {}
    for tensor in arguments:
        if not isinstance(tensor, Tensor):
            continue
        axes = sorted((n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s)
        elements = prod(n for n, _ in axes) if tensor.numel() else 0
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        seen = views.setdefault(storage._cdata, {})
        seen[(tensor.storage_offset(), *axes)] = elements * tensor.element_size()
    return sum(min(sizes[key], sum(seen.values())) for key, seen in views.items())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of `static.md`."""
    lines = [HEAD, ["---"] * len(HEAD), *(_cells(row) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    missed = sum(bool(row["over"]) for row in rows)
    ending = f"{len(rows)} rows, {missed} over their budget."
    return f"# Kernels, compiled ahead of time\n\n{NOTES}\n{table}\n\n{ending}\n"


def _cells(row: dict[str, Any]) -> list[str]:
    variant = [value for value in row["configuration"].values() if isinstance(value, str)]
    kernel = " ".join([row["kernel"], *variant])
    start = [row["op"], row["case"], row["pass"], kernel, row["arch"]]
    work = [
        str(row["programs"]),
        f"{row['bytes_per_program'] / 1e3:.1f}",
        f"{row['flops_per_program'] / 1e6:.1f}",
    ]
    verdict = ", ".join(row["over"]) or "-"
    if "error" in row:
        return [*start, *["-"] * 5, *work, "-", verdict]
    kinds = " ".join(f"{n} {kind}" for kind, n in row["tensor_core_kinds"].items())
    measures = [
        str(row["registers"]),
        str(row["spill_bytes"]),
        f"{row['shared_bytes'] / KIB:.1f}",
        f"{row['occupancy']:.0%}",
        kinds or "-",
    ]
    return [*start, *measures, *work, f"{row['roofline_us']:.1f}", verdict]
