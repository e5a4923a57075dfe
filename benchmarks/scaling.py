"""How do steps scale over processes? Weak scaling (as many clips for each) and strong (in all).

Each process has its own GPU (NCCL), or an equal share of the cores (gloo): as many threads whatever
the number of processes, so that two do the work of two, as GPUs would. On one machine they share
its caches and memory, and gloo's threads share the cores with the computation. With NCCL it was
never run: there was no GPU.

A process times its step in turn with the same step that sends nothing (no DistributedDataParallel),
at the same time as all others; the slowest of them counts. What the first takes longer is exposed
communication, waiting for the others included. The buckets of a step, all-reduced by themselves,
say how long the communication takes in all; the rest of that is hidden behind the backward pass:

    communication_share = exposed / step          hidden_share = 1 − exposed / all-reduce alone

Efficiency is clips a second over those of as many times one process. The bytes a process sends
are those of a ring: 2 (n − 1)/n times the gradient's.
"""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from smtc import presets
from smtc.benchmarks.blocks import Row, markdown
from smtc.benchmarks.harness import MEGABYTE, Report, pick_device, timing
from smtc.benchmarks.quiet import untrained_allowed
from smtc.benchmarks.scaling_worker import Job
from smtc.benchmarks.step_providers import Case, pick_providers
from smtc.benchmarks.step_tables import scaling_blocks
from smtc.errors import UserError
from smtc.method import SMTCMethod
from smtc.progress import track

PHASES = {"encoder trained": 0, "encoder frozen": -1}
"""`optim.encoder_from_step` by phase; what is timed is the first."""
MOST_DEFAULT = 8
"""Processes on a CPU, where none are named."""
PATIENCE = 600.0
"""Seconds for the processes of a job beyond its measuring."""


def run(
    output: Path,
    *,
    preset: str | None = None,
    size: int | None = None,
    provider: str | None = None,
    ranks: Sequence[int] = (),
    clips: int | None = None,
    seconds: float = 5.0,
    device: str = "auto",
) -> int:
    """Time, print tables and write `output`/scaling.json.

    Args:
        output: the folder.
        preset: whose settings a step has; None: fixed, on a CPU tiny.
        size: positions L; None: 256, on a CPU 64.
        provider: of a step, but plain; None: triton, on a CPU eager-fp32.
        ranks: numbers of processes, beside 1; without any 2, 4, … up to the GPUs or cores.
        clips: of one process alone; None: 32, on a CPU 8.
        seconds: about how long to repeat a step.
        device: "cuda", "cpu" or "auto".

    Returns:
        an exit code: 1 where nothing could be measured.
    """
    device = pick_device(device)
    on_gpu = device == "cuda"
    case = Case(
        preset or ("fixed" if on_gpu else "tiny"),
        (256 if on_gpu else 64) if size is None else size,
        (32 if on_gpu else 8) if clips is None else clips,
    )
    provider = provider or ("triton" if on_gpu else "eager-fp32")
    places = torch.cuda.device_count() if on_gpu else _cores()
    usual = [n for n in default_ranks(places, on_gpu) if case.clips % n == 0]
    ranks = tuple(sorted({1, *(ranks or usual)}))
    _check(case, provider, device, ranks, places, seconds)
    bench = _Bench(Report(output / "scaling.json"), case, provider, device, ranks, places, seconds)
    bench.describe()
    for number, one in track(jobs(ranks, case.clips), title=f"scaling on {device}", unit="job"):
        bench.measure(number, one)
    bench.conclude()
    print(markdown(scaling_blocks(bench.report.rows)))
    print(f"{len(bench.report.rows)} rows in {bench.report.path}")
    return 0 if any("median" in row for row in bench.report.rows) else 1


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_ranks(places: int, on_gpu: bool) -> tuple[int, ...]:
    """2, 4, 8, … and all GPUs, or up to 8 processes on a CPU."""
    most = places if on_gpu else min(places, MOST_DEFAULT)
    doubled = [2**power for power in range(1, 20) if 2**power <= most]
    return (*doubled, most) if on_gpu else tuple(doubled)


def _check(
    case: Case, provider: str, device: str, ranks: Sequence[int], places: int, seconds: float
) -> None:
    """Raise `UserError` for what cannot be measured."""
    if presets.get(case.preset).method != "smtc":
        raise UserError(f"--preset {case.preset} trains no SMTC; bench scaling takes the others.")
    if provider == "plain":
        raise UserError("--provider plain knows one process only; choose another one.")
    pick_providers((provider,), device)
    if min(ranks) < 1 or case.clips < 1 or not 0 < seconds < math.inf:
        raise UserError("Give --ranks and --clips from 1 and a positive number of --seconds.")
    if device == "cuda" and ranks[-1] > places:
        raise UserError(f"--ranks {ranks[-1]} needs as many GPUs; there are {places}.")
    for number in ranks:
        if case.clips % number:
            raise UserError(
                f"--clips {case.clips} are not the same for each of --ranks {number}; "
                f"use a multiple."
            )
    case.config()


def jobs(ranks: Sequence[int], clips: int) -> list[tuple[int, int]]:
    """Numbers of processes and of clips for each: weak scaling, then what strong scaling adds."""
    return list(dict.fromkeys([*((n, clips) for n in ranks), *((n, clips // n) for n in ranks)]))


class _Bench:
    """Runs jobs into a report."""

    def __init__(
        self,
        report: Report,
        case: Case,
        provider: str,
        device: str,
        ranks: Sequence[int],
        places: int,
        seconds: float,
    ) -> None:
        self.report, self.case, self.provider, self.device = report, case, provider, device
        self.ranks, self.places, self.seconds = ranks, places, seconds
        self.threads = max(1, (_cores() if device == "cuda" else places) // ranks[-1])
        self.gradients = {name: gradient_bytes(case, start) for name, start in PHASES.items()}
        self.backend = "nccl" if device == "cuda" else "gloo"
        self.base: float | None = None
        """Clips a second of one process."""

    def describe(self) -> None:
        """Rows of what all others have in common, and of what each phase has to send."""
        many = self.ranks[-1]
        share = f"{many} processes of {self.threads} threads on {self.places} cores, one machine"
        if self.device == "cuda":
            share = f"{many} processes with a GPU each, one machine"
        same: Row = {"preset": self.case.preset, "L": self.case.positions}
        same |= {"provider": self.provider, "device": self.device, "phase": next(iter(PHASES))}
        self.report.add({"kind": "settings", **same, "at most": share})
        for phase, size in self.gradients.items():
            for number in self.ranks[1:]:
                sent = ring_bytes(size, number)
                row = {"kind": "bytes", "phase": phase, "ranks": number}
                gradient = {"gradient_mb": round(size / MEGABYTE, 4)}
                self.report.add(row | gradient | {"bytes_per_rank": sent})

    def measure(self, ranks: int, clips: int) -> None:
        """A row of weak or strong scaling; of both for one process."""
        kinds = [("weak", self.case.clips), ("strong", self.case.clips // ranks)]
        labels: Row = {"ranks": ranks, "clips": ranks * clips, "backend": self.backend}
        labels["threads"] = self.threads
        try:
            found = launched(self._job(clips), ranks)
        except UserError as error:
            row = labels | {"error": str(error)}
        else:
            row = labels | self._row(ranks, ranks * clips, found["times"])
        for kind, expected in kinds:
            if clips == expected:
                self.report.add({"kind": kind} | row)

    def _job(self, clips: int) -> Job:
        return Job(
            preset=self.case.preset,
            positions=self.case.positions,
            clips=clips,
            provider=self.provider,
            device=self.device,
            threads=self.threads,
            seconds=self.seconds,
        )

    def _row(self, ranks: int, clips: int, times: Mapping[str, list[float]]) -> Row:
        steps = timing(times["together"])
        speed = 1000 * clips / steps.median
        if ranks == 1:
            self.base = speed
        sent = ring_bytes(self.gradients[next(iter(PHASES))], ranks)
        return {
            **steps.row(),
            "clips_per_s": round(speed, 3),
            "efficiency": None if self.base is None else round(speed / (ranks * self.base), 4),
            **(communication(times) if ranks > 1 else {"communication_share": 0.0}),
            "bytes_per_rank": sent,
        }

    def conclude(self) -> None:
        """Say what the numbers are of."""
        if self.device == "cpu" and self.ranks[-1] > 1:
            print(f"{self.ranks[-1]} processes shared {self.places} cores of one machine.\n")


def gradient_bytes(case: Case, encoder_from_step: int) -> int:
    """Of a step's gradient, which is fp32."""
    config = case.config({"optim.encoder_from_step": encoder_from_step})
    with untrained_allowed():
        trained = SMTCMethod(config).trainable(0)
    return 4 * sum(value.numel() for value in trained.values())


def ring_bytes(size: int, ranks: int) -> int:
    """What each of `ranks` processes sends to all-reduce `size` bytes in a ring."""
    return round(2 * size * (ranks - 1) / ranks)


def communication(times: Mapping[str, Sequence[float]]) -> Row:
    """What of a step is exposed communication, and what of all communication is not; both from 0
    to 1, where noise would put them outside.
    """
    pairs = zip(times["together"], times["alone"], strict=True)
    found = timing([one - other for one, other in pairs])
    exposed = max(0.0, found.median)
    alone = statistics.median(times["reduction"])
    shares: Row = {
        "communication_share": round(min(1.0, exposed / statistics.median(times["together"])), 4),
        "exposed_ms_p20": round(found.p20, 4),
        "exposed_ms_p80": round(found.p80, 4),
        "all_reduce_ms": round(alone, 4),
    }
    if found.p20 > 0:  # else noise hides it
        shares["hidden_share"] = round(max(0.0, 1 - exposed / alone), 4)
    return shares


def launched(job: Job, ranks: int) -> dict[str, Any]:
    """What `ranks` processes found together. `UserError` where one of them fails."""
    with tempfile.TemporaryDirectory(prefix="smtc-bench-") as folder:
        found = Path(folder) / "found.json"
        text = json.dumps(asdict(job) | {"output": str(found)})
        command = [sys.executable, "-m", "smtc.benchmarks.scaling_worker", text]
        together = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(job.threads),
        }
        logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with log.open("w") as file:
                    started = subprocess.Popen(
                        command, env=os.environ | together | own, stdout=file, stderr=file
                    )
                processes.append(started)
            _wait(processes, logs, PATIENCE + 4 * job.seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
        return result


def _wait(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], most: float) -> None:
    """Until all have ended well; the first that has not is a `UserError`."""
    waited = 0.0
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        if waited > most:
            raise UserError(f"The processes did not end within {most:.0f} s.")
        try:
            next(p for p in processes if p.poll() is None).wait(0.2)
        except subprocess.TimeoutExpired:
            waited += 0.2
    for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
        if process.poll():
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = said[-1][:200] if said else "it said nothing"
            raise UserError(f"Process {rank} ended with {process.returncode}: {last}")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
