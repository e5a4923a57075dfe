"""How fast is each operation? Forward, backward and both, for every provider of `providers.py`.

An operation whose parity check fails is not timed, nor one whose result at the timed size is far
from eager's in fp32. Two kinds of time: "launch" has the device idle when the call starts, so it
includes the host's share; "graph" (on a GPU) replays a CUDA graph and leaves it out.

The percentage of the roofline is of the ceilings measured in the same run. A floor counts the
matrix products of the cheapest known order (backward: two for each of the forward's) and every
input, output and gradient once.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from smtc.benchmarks import parity
from smtc.benchmarks.blocks import markdown
from smtc.benchmarks.cases import SETTINGS, Case, Inputs, at_size, parity_cases
from smtc.benchmarks.harness import (
    Report,
    captured,
    dense_bf16_rate,
    device_copy_bandwidth,
    interleaved,
    peak_memory,
    percent_of_roofline,
    pick_device,
    pick_operations,
)
from smtc.benchmarks.providers import (
    FARTHEST,
    PROVIDERS,
    Provider,
    distance,
    pick_providers,
    tensors,
    widened,
)
from smtc.benchmarks.tables import kernel_blocks
from smtc.errors import UserError
from smtc.progress import track

Row = dict[str, Any]
DIRECTIONS = ("forward", "backward", "both")
# What is measured first: the kernels and what they must beat, then these together, in turn.
TIERS = (("triton", "eager-bf16"), ("eager-fp32", "compile"), ("plain", "scipy", "pot"))
FIRST = ("correlation_projection", "transport_alignment", "masked_slot_attention")
CPU_SIZES, CPU_CLIPS, GPU_CLIPS = (64, 256), 1, 32


@dataclass(frozen=True)
class Job:
    """One operation at one size, by providers that are timed in turn."""

    op: str
    positions: int
    providers: tuple[Provider, ...]


def run(
    output: Path,
    *,
    ops: Sequence[str] = (),
    sizes: Sequence[int] = (),
    device: str = "auto",
    providers: Sequence[str] = (),
    clips: int | None = None,
    seconds: float = 0.2,
    deadline: float | None = None,
) -> int:
    """Time, print tables and write `output`/kernels.json, the most important rows first.

    Args:
        output: the folder.
        ops: operations; all where none is named.
        sizes: positions L; without any the paper's three, on a CPU 64 and 256.
        device: "cuda", "cpu" or "auto".
        providers: names of `PROVIDERS`; all that can run where none is named.
        clips: clips a batch; None: 32, on a CPU 1.
        seconds: about how long to repeat a call.
        deadline: a time of `time.monotonic` after which no operation is begun.

    Returns:
        an exit code: 1 where a wrong result was refused.
    """
    device = pick_device(device)
    chosen = pick_providers(tuple(providers), device)
    sizes = tuple(sizes) or (SETTINGS if device == "cuda" else CPU_SIZES)
    if min(sizes) < 1 or (clips is not None and clips < 1) or not 0 < seconds < math.inf:
        raise UserError(
            "--sizes and --clips are numbers of at least 1, --seconds is a positive number."
        )
    jobs = plan(pick_operations(ops), sizes, chosen)
    if not jobs:
        raise UserError("None of these --providers computes any of these --ops.")
    report = Report(output / "kernels.json")
    if device == "cpu":
        # Threads that wait for each other on shared cores make small calls many times slower.
        torch.set_num_threads(1)
        print("Timing plain torch on one thread; the kernels are timed on a CUDA device only.")
    bench = _Bench(report, device, clips or (GPU_CLIPS if device == "cuda" else CPU_CLIPS), seconds)
    with (
        torch.cuda.stream(bench.stream) if bench.stream else nullcontext(),
        # A compiled backward may otherwise run once only, since it reuses what was saved.
        functorch_config.patch(donated_buffer=False),
    ):
        bench.ceilings()
        for number, job in enumerate(track(jobs, title=f"kernels on {device}", unit="job")):
            if deadline is not None and time.monotonic() > deadline:
                print(f"Out of time: {len(jobs) - number} of {len(jobs)} jobs left, the first "
                      f"{job.op} at L = {job.positions}.")  # fmt: skip
                break
            bench.run(job)
            if bench.broken:
                print("The device stopped working; the last row's error says why.")
                return 1
    print(markdown(kernel_blocks(report.rows)))
    print(f"{len(report.rows)} rows in {report.path}")
    return 1 if bench.wrong else 0


def plan(ops: Sequence[str], sizes: Sequence[int], providers: Sequence[Provider]) -> list[Job]:
    """The jobs, the most important first: by tier of providers, then by size, then `FIRST`."""
    ranked = sorted(ops, key=lambda op: FIRST.index(op) if op in FIRST else len(FIRST))
    jobs = []
    for tier in TIERS:
        for positions in sizes:
            for op in ranked:
                group = tuple(p for p in providers if p.name in tier and p.computes(op))
                if group:
                    jobs.append(Job(op, positions, group))
    return jobs


class _Bench:
    """Runs jobs into a report."""

    def __init__(self, report: Report, device: str, clips: int, seconds: float) -> None:
        self.report, self.device, self.clips, self.seconds = report, device, clips, seconds
        # Forward and backward run where graphs are captured.
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.wrong = self.broken = False
        self._checked: dict[tuple[str, str, str], str | None] = {}

    def ceilings(self) -> None:
        """Rows of what the machine can do at most."""
        copy = {"case": "device copy", "unit": "GB/s"}
        self.report.add(copy | {"median": device_copy_bandwidth(self.device) / 1e9})
        product = {"case": "dense bf16 product", "unit": "TFLOP/s"}
        self.report.add(product | {"median": dense_bf16_rate(self.device) / 1e12})

    def run(self, job: Job) -> None:
        """Time every case of a job."""
        torch.manual_seed(0)
        for case in at_size(job.op, job.positions, self.device, torch.bfloat16, clips=self.clips):
            labels: Row = {"op": job.op, "case": case.name, "positions": job.positions}
            labels["clips"] = self.clips
            rows = {p.name: labels | {"provider": p.name, "dtype": p.dtype} for p in job.providers}
            try:
                self._case(case, rows)
            except Exception as error:  # the inputs may not fit
                for row in rows.values():
                    self._failed(row, error)
            gc.collect()
            if self.device == "cuda" and not self.broken:
                torch.cuda.empty_cache()

    def _case(self, case: Case, rows: Mapping[str, Row]) -> None:
        drawn = case.inputs()
        wide = widened(drawn)
        with torch.no_grad():
            expected = tensors(PROVIDERS["eager-fp32"].function(case)(*wide))
        ready: dict[str, Prepared] = {}
        for name, row in rows.items():
            provider = PROVIDERS[name]
            inputs = wide if provider.dtype == "float32" else drawn
            try:
                refused = self._refused(case.op, provider)
                if refused is None:
                    prepared = Prepared(provider, case, inputs)
                    far = distance(case.op, wide, prepared.outputs, expected)
                    if far > FARTHEST:
                        refused = f"is {far:.1e} from eager in fp32 at this size"
                if refused is not None:
                    self.wrong = True
                    self.report.add(row | {"error": f"not timed: {refused}"})
                    continue
                ready[name] = prepared
            except Exception as error:
                self._failed(row, error)
        for direction in DIRECTIONS if case.wanted else DIRECTIONS[:1]:
            self._direction(direction, ready, rows)

    def _refused(self, op: str, provider: Provider) -> str | None:
        """Why an operation must not be timed: its first parity case that fails."""
        if provider.impl is None:
            return None
        key = (op, provider.impl, provider.dtype)
        if key not in self._checked:
            self._checked[key] = None
            for case in parity_cases(op):
                row = parity.check(case, provider.dtype, provider.impl, self.device)
                if not row["passed"]:
                    self._checked[key] = f"parity of {case.name} fails: {parity.why(row)}"
                    break
        return self._checked[key]

    def _direction(
        self, direction: str, ready: Mapping[str, "Prepared"], rows: Mapping[str, Row]
    ) -> None:
        calls: dict[str, Callable[[], object]] = {}
        marked: dict[str, Row] = {}
        for name, prepared in ready.items():
            if direction != "forward" and PROVIDERS[name].only is not None:
                continue
            marked[name] = rows[name] | {"direction": direction} | prepared.floor(direction)
            try:
                call = prepared.call(direction)
                call()
                marked[name]["peak_mb"] = round(peak_memory(call, self.device), 3)
                calls[name] = call
            except Exception as error:
                self._failed(marked[name], error)
        self._timed("launch", calls, marked)
        if self.stream is None:
            return
        replays: dict[str, Callable[[], object]] = {}
        for name, call in calls.items():
            if PROVIDERS[name].captures:
                try:
                    replays[name] = captured(call, self.stream)
                except Exception as error:
                    self._failed(marked[name] | {"mode": "graph"}, error)
        self._timed("graph", replays, marked)

    def _timed(
        self, mode: str, calls: Mapping[str, Callable[[], object]], rows: Mapping[str, Row]
    ) -> None:
        if not calls or self.broken:
            return
        try:
            times = interleaved(calls, self.device, seconds=self.seconds)
        except Exception as error:
            for name in calls:
                self._failed(rows[name] | {"mode": mode}, error)
            return
        for name, found in times.items():
            row = rows[name] | {"mode": mode} | found.row()
            share = percent_of_roofline(row["flops"], row["bytes"], found.median, self.device)
            self.report.add(row | {"percent_of_roofline": round(share, 2)})

    def _failed(self, row: Row, error: Exception) -> None:
        text = parity.sentence(error)
        self.report.add(row | {"error": text})
        # After such an error every call on the device fails.
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        self.broken = self.broken or ("CUDA error" in text and not out_of_memory)


class Prepared:
    """One provider's function with its inputs, run once forward."""

    def __init__(
        self, provider: Provider, case: Case, inputs: Inputs, like: "Prepared | None" = None
    ) -> None:
        """`like`: another one whose cotangents are taken."""
        self._case = case
        self._function = provider.function(case)
        leaves: dict[int, Tensor] = {}
        for place in case.wanted if provider.only is None else ():
            value = inputs[place]
            assert value is not None
            leaves.setdefault(id(value), value.detach().requires_grad_())
        self._leaves = list(leaves.values())
        self._inputs = [leaves.get(id(value), value) for value in inputs]
        self.outputs = self.results()
        if like is None:
            floating = [output for output in self.outputs if output.is_floating_point()]
            self._cotangents = [torch.randn_like(output) for output in floating]
        else:
            self._cotangents = [
                given.to(output.dtype)
                for given, output in zip(like._cotangents, self.outputs, strict=False)
            ]

    def results(self) -> list[Tensor]:
        """The outputs, without a graph."""
        with torch.no_grad():
            return tensors(self._function(*self._inputs))

    def gradients(self) -> list[Tensor]:
        """Of the inputs that the case wants; none for an operation without."""
        return self._backward(self._graph()) if self._leaves else []

    def call(self, direction: str) -> Callable[[], object]:
        """What is timed."""
        if direction == "forward":
            return self.results
        if direction == "both":
            return self.gradients
        outputs = self._graph()
        return lambda: self._backward(outputs, retain=True)

    def _graph(self) -> list[Tensor]:
        return tensors(self._function(*self._inputs))

    def _backward(self, outputs: list[Tensor], retain: bool = False) -> list[Tensor]:
        found = torch.autograd.grad(outputs, self._leaves, self._cotangents, retain_graph=retain)
        return list(found)

    def floor(self, direction: str) -> Row:
        """The least arithmetic and traffic: `flops` and `bytes`."""
        flops = matrix_flops(self._case.op, self._inputs)
        read = _bytes([*self._inputs, *self._case.settings.values()])
        backward = read + _bytes(self._cotangents) + _bytes(self._leaves)
        return {
            "forward": {"flops": flops, "bytes": read + _bytes(self.outputs)},
            "backward": {"flops": 2 * flops, "bytes": backward},
            "both": {"flops": 3 * flops, "bytes": read + _bytes(self.outputs) + backward},
        }[direction]


def _bytes(values: Sequence[Any]) -> int:
    """Of the tensors among `values`, each once."""
    distinct = {id(value): value for value in values if isinstance(value, Tensor)}
    return sum(value.numel() * value.element_size() for value in distinct.values())


def matrix_flops(op: str, inputs: Inputs) -> int:
    """FLOP of the forward's matrix products; 0 for operations that have none to speak of."""
    sizes: list[Any] = [None if value is None else value.shape for value in inputs]
    if op == "correlation_projection":
        (batch, positions, width), (references, inner, _), (outputs, _) = sizes[:3]
        direct = batch * positions * inner * (width + outputs)
        reassociated = outputs * width * (references * inner + batch * positions)
        return 2 * min(direct, reassociated)
    if op == "masked_slot_attention":
        batch, groups, slots, width = sizes[0]
        return 4 * batch * groups * slots * sizes[1][1] * width
    if op == "transport_alignment":
        clips, frames, positions, width = sizes[0]
        return clips * frames * (frames - 1) * positions**2 * width
    if op == "instance_consistency":
        clips, frames, semantics, slots, width = sizes[0]
        return 2 * clips * semantics * (frames * slots) ** 2 * width
    return 0
