"""Which launch options are fastest? Times the neighbours of the committed table on a GPU.

For each row that a training step uses, one option at a time is changed a step (tiles halved or
doubled, warps and stages likewise one step), the fastest becomes the next start, until nothing
gains. An operation is timed as a whole, by replaying a CUDA graph of its forward and backward, with
the rest of the table as committed. A candidate whose results are further from plain torch in fp32
than the committed row's is not timed. The found rows are printed for `kernels/tuning.py`, after the
parity cases passed with all of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smtc.benchmarks import parity
from smtc.benchmarks.cases import SETTINGS, Case, Inputs, at_size, parity_cases
from smtc.benchmarks.harness import (
    Report,
    captured,
    measure,
    pick_device,
    pick_operations,
)
from smtc.benchmarks.kernels import GPU_CLIPS, Prepared
from smtc.benchmarks.providers import PROVIDERS, distance, pick_providers, widened
from smtc.errors import UserError
from smtc.kernels import launching, tuning
from smtc.kernels.tuning import Row
from smtc.progress import track

Options = dict[str, int]
DTYPES = {16: "bfloat16", 32: "float32"}
STEPS = 3
"""The most changes on the way from the committed row."""
WORTH = 0.98
"""A change is kept where the time falls below this part."""


class Asked(NamedTuple):
    """A question to the launch table."""

    kernel: str
    bits: int
    size: int


def run(
    output: Path,
    *,
    ops: Sequence[str] = (),
    sizes: Sequence[int] = (),
    clips: int | None = None,
    seconds: float = 0.05,
) -> int:
    """Search, write `output`/tune.json with all that was tried, print rows for the table.

    Args:
        output: the folder.
        ops: operations; all where none is named.
        sizes: positions L; without any the paper's three.
        clips: clips a batch; None: 32.
        seconds: about how long to repeat a candidate.

    Returns:
        an exit code: 1 where the found rows fail the parity cases.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "bench tune needs a CUDA device to time the kernels on; run it on a machine with a GPU."
        )
    device = pick_device("cuda")
    pick_providers(("triton",), device)
    tuner = Tuner(Report(output / "tune.json"), device, clips or GPU_CLIPS, seconds)
    jobs = [(op, positions) for op in pick_operations(ops) for positions in sizes or SETTINGS]
    with torch.cuda.stream(tuner.stream) if tuner.stream else nullcontext():
        for op, positions in track(jobs, title="tune", unit="job"):
            for bits in DTYPES:
                tuner.search(op, positions, bits)
        print(rows_as_python(tuner.found))
        missed = tuner.missed(pick_operations(ops))
    for line in missed:
        print(f"MISS {line}")
    print(f"All that was tried is in {tuner.report.path}.")
    return 1 if missed else 0


class Tuner:
    """Searches into a report; `found` holds the new rows by kernel."""

    def __init__(self, report: Report, device: str, clips: int, seconds: float) -> None:
        self.report, self.device, self.clips, self.seconds = report, device, clips, seconds
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.winners: dict[Asked, Options] = {}
        self.architecture = launching.architecture(torch.empty(0, device=device))

    @property
    def found(self) -> dict[str, list[Row]]:
        """The rows of this architecture, with the winners in their places."""
        kernels = dict.fromkeys(asked.kernel for asked in self.winners)
        return {
            kernel: [
                row
                for bits in DTYPES
                for row in merged(
                    committed(kernel, self.architecture, bits),
                    {a.size: o for a, o in self.winners.items() if a[:2] == (kernel, bits)},
                )
            ]
            for kernel in kernels
        }

    def search(self, op: str, positions: int, bits: int) -> None:
        """Find the options of every kernel that the operation starts at this size."""
        torch.manual_seed(0)
        for case in at_size(op, positions, self.device, torch.bfloat16, clips=self.clips):
            drawn = case.inputs()
            wide = widened(drawn)
            trial = _Trial(case, drawn if bits == 16 else wide, wide)
            with questions() as asked:
                trial.run()
            for question, start in asked.items():
                if question not in self.winners:
                    self.winners[question] = self._climb(case, trial, question, start)

    def _climb(self, case: Case, trial: "_Trial", asked: Asked, start: Options) -> Options:
        row = {"op": case.op, "case": case.name, "provider": "triton", "arch": self.architecture}
        row |= asked._asdict()
        limit = 2 * trial.error() + 1e-6

        def timed(options: Options) -> float:
            try:
                with forced(asked.kernel, self.architecture, options):
                    error = trial.error()
                    if not error <= limit:
                        raise ValueError(f"error {error:.1e}, where {limit:.1e} is allowed")
                    call = trial.run if self.stream is None else captured(trial.run, self.stream)
                    found = measure(call, self.device, seconds=self.seconds)
            except Exception as error:  # too large for the chip, or refused by the kernel
                text = parity.sentence(error)
                self.report.add(row | {"options": options, "chosen": False, "error": text})
                return math.inf
            self.report.add(row | {"options": options, "chosen": False} | found.row())
            return found.median

        best, milliseconds = climb(start, timed)
        self.report.add(row | {"options": best, "chosen": True, "median": milliseconds})
        return best

    def missed(self, ops: Sequence[str]) -> list[str]:
        """The parity cases that fail with all found rows in force."""
        before = dict(tuning.TABLE)
        try:
            for kernel, rows in self.found.items():
                tuning.TABLE[kernel] = rows
            return [
                f"{case} {dtype}"
                for op in ops
                for case in parity_cases(op)
                for dtype in DTYPES.values()
                if not parity.check(case, dtype, "triton", self.device)["passed"]
            ]
        finally:
            tuning.TABLE.update(before)


class _Trial:
    """An operation on fixed inputs, and what it should give."""

    def __init__(self, case: Case, inputs: Inputs, wide: Inputs) -> None:
        self._case, self._wide = case, wide
        self._prepared = Prepared(PROVIDERS["triton"], case, inputs)
        exact = Prepared(PROVIDERS["eager-fp32"], case, wide, like=self._prepared)
        self._outputs, self._gradients = exact.outputs, exact.gradients()
        self.run = self._prepared.call("both" if case.wanted else "forward")

    def error(self) -> float:
        """The distance of outputs and gradients from plain torch in fp32."""
        outputs = distance(self._case.op, self._wide, self._prepared.results(), self._outputs)
        gradients = self._prepared.gradients()
        return max(outputs, distance("", self._wide, gradients, self._gradients))


def climb(start: Options, timed: Callable[[Options], float]) -> tuple[Options, float]:
    """The fastest options on a way of single steps from `start`, and their time."""
    tried = {_key(start): (timed(start), start)}
    best = start
    for _ in range(STEPS):
        for candidate in neighbours(best):
            if _key(candidate) not in tried:
                tried[_key(candidate)] = (timed(candidate), candidate)
        time, fastest = min(tried.values(), key=lambda entry: entry[0])
        if time >= WORTH * tried[_key(best)][0]:
            break
        best = fastest
    return best, tried[_key(best)][0]


def _key(options: Options) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(options.items()))


def neighbours(options: Options) -> list[Options]:
    """Every change of one option by one step."""
    found = []
    for name, value in options.items():
        if name == "num_stages":
            steps = [step for step in (value - 1, value + 1) if 1 <= step <= 4]
        elif name == "num_warps":
            steps = [step for step in (value // 2, value * 2) if 1 <= step <= 16]
        else:
            steps = [step for step in (value // 2, value * 2) if step >= 1]
        found += [options | {name: step} for step in steps]
    return found


@contextmanager
def questions() -> Iterator[dict[Asked, Options]]:
    """What the block asks the launch table, and its answers."""
    seen: dict[Asked, Options] = {}
    answer = tuning.options

    def noted(kernel: str, tensor: Tensor, size: int) -> Options:
        found = answer(kernel, tensor, size)
        bits = 16 if tensor.dtype in (torch.bfloat16, torch.float16) else 32
        seen[Asked(kernel, bits, size)] = dict(found)
        return found

    tuning.options = noted
    try:
        yield seen
    finally:
        tuning.options = answer


@contextmanager
def forced(kernel: str, architecture: str, options: Options) -> Iterator[None]:
    """The launch table answers `options` for `kernel`, whatever the size."""
    before = tuning.TABLE[kernel]
    tuning.TABLE[kernel] = [Row(architecture, bits, tuning.ANY, options) for bits in DTYPES]
    try:
        yield
    finally:
        tuning.TABLE[kernel] = before


def committed(kernel: str, architecture: str, bits: int) -> list[Row]:
    """The table's rows for `architecture`, of the nearest older one where it has none."""
    rows = tuning.TABLE[kernel]
    names = {row.architecture for row in rows}
    if architecture not in names:
        older = [n for n in names - {"interpreter"} if _number(n) <= _number(architecture)]
        source = max(older, key=_number)
    else:
        source = architecture
    return [
        row._replace(architecture=architecture)
        for row in rows
        if (row.architecture, row.bits) == (source, bits)
    ]


def _number(name: str) -> int:
    return int(name.removeprefix("sm_"))


def merged(rows: Sequence[Row], winners: Mapping[int, Options]) -> list[Row]:
    """`rows` of one architecture and width with the winners by size in the buckets they fall in."""
    found: list[Row] = []
    smallest = 0
    for row in rows:
        sizes = sorted(size for size in winners if smallest < size <= row.largest)
        bounds = [*sizes[:-1], row.largest]
        choices = [winners[size] for size in sizes] or [dict(row.options)]
        for largest, options in zip(bounds, choices, strict=True):
            if found and dict(found[-1].options) == options:
                found.pop()
            found.append(row._replace(largest=largest, options=options))
        smallest = row.largest
    return found


def rows_as_python(found: Mapping[str, Sequence[Row]]) -> str:
    """The rows as they stand in `kernels/tuning.py`."""
    lines = []
    for kernel, rows in found.items():
        lines.append(f'    "{kernel}": [')
        for architecture, bits in dict.fromkeys((row.architecture, row.bits) for row in rows):
            buckets = ", ".join(
                f"({'ANY' if row.largest == tuning.ANY else row.largest}, {_literal(row.options)})"
                for row in rows
                if (row.architecture, row.bits) == (architecture, bits)
            )
            lines.append(f'        *_rows("{architecture}", {bits}, {buckets}),')
        lines.append("    ],")
    return "\n".join(lines)


def _literal(options: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in options.items()) + "}"
