"""`smtc bench scaling`: the arithmetic, two processes on gloo, and processes that fail."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from smtc.benchmarks import scaling, scaling_worker
from smtc.benchmarks.harness import FEWEST, read_report
from smtc.benchmarks.scaling import (
    communication,
    default_ranks,
    free_port,
    gradient_bytes,
    jobs,
    launched,
    ring_bytes,
)
from smtc.benchmarks.scaling_worker import REDUCTIONS, Job
from smtc.benchmarks.step_providers import Case
from smtc.errors import UserError
from smtc.method import SMTCMethod
from smtc.training.distributed import World, joined

QUICK = ("--device", "cpu", "--size", 4, "--clips", 2, "--seconds", 0.01)
TINY = Job("tiny", 4, 1, "eager-fp32", "cpu", 1, 0.01)


def test_the_bytes_of_a_ring_are_those_worked_out_by_hand() -> None:
    assert [ring_bytes(1000, ranks) for ranks in (1, 2, 4, 8)] == [0, 1000, 1500, 1750]


def test_a_frozen_encoder_sends_nothing() -> None:
    case = Case("tiny", 4, 1)
    trained, frozen = (gradient_bytes(case, start) for start in (0, -1))
    learns = SMTCMethod(case.config()).trainable(0)
    encoder = [value.numel() for name, value in learns.items() if name.startswith("encoder.")]
    assert trained - frozen == 4 * sum(encoder) > 0
    assert trained == 4 * sum(value.numel() for value in learns.values())


def test_communication_is_what_a_step_takes_longer() -> None:
    # 2 ms of 10 are exposed, of 8 in all: three quarters are hidden.
    times = {"together": [10.0, 10.0, 30.0], "alone": [8.0, 7.5, 28.0], "reduction": [8, 8, 9]}
    found = communication(times)
    assert found == {
        **{"communication_share": 0.2, "hidden_share": 0.75, "all_reduce_ms": 8},
        **{"exposed_ms_p20": 2.0, "exposed_ms_p80": 2.5},
    }
    noise = communication({"together": [9.0], "alone": [10.0], "reduction": [1.0]})
    assert noise["communication_share"] == 0 and "hidden_share" not in noise
    waits = communication({"together": [10.0], "alone": [5.0], "reduction": [1.0]})
    assert (waits["communication_share"], waits["hidden_share"]) == (0.5, 0)


def test_one_process_is_measured_once() -> None:
    assert jobs((1, 2, 4), 8) == [(1, 8), (2, 8), (4, 8), (2, 4), (4, 2)]
    assert default_ranks(2, False) == (2,) and default_ranks(64, False) == (2, 4, 8)
    assert default_ranks(6, True) == (2, 4, 6) and default_ranks(8, True)[-1] == 8


def test_efficiency_is_speed_over_that_of_as_many_times_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """100 ms alone; together 125 ms for as many clips each, 62.5 ms for half of them."""

    def found(job: Job, ranks: int) -> dict[str, Any]:
        step = 100.0 if ranks == 1 else 31.25 * job.clips
        times = {"together": [step] * 5, "alone": [0.8 * step] * 5, "reduction": [step]}
        return {"times": times}

    monkeypatch.setattr(scaling, "launched", found)
    assert scaling.run(tmp_path, device="cpu", ranks=[2], clips=4) == 0
    rows = read_report(tmp_path / "scaling.json")["rows"]
    timed = {(row["kind"], row["ranks"]): row for row in rows if "median" in row}
    assert [(kind, ranks, row["clips"]) for (kind, ranks), row in timed.items()] == [
        ("weak", 1, 4),
        ("strong", 1, 4),
        ("weak", 2, 8),
        ("strong", 2, 4),
    ]
    for kind, clips_per_s in (("weak", 64.0), ("strong", 64.0)):
        row = timed[kind, 2]
        assert row["clips_per_s"] == clips_per_s and row["efficiency"] == 0.8
        assert row["communication_share"] == pytest.approx(0.2) and row["hidden_share"] == 0.8
    assert timed["weak", 1]["clips_per_s"] == 40 and timed["weak", 1]["efficiency"] == 1
    sent = {row["phase"]: row["bytes_per_rank"] for row in rows if row["kind"] == "bytes"}
    assert timed["weak", 2]["bytes_per_rank"] == sent["encoder trained"] > sent["encoder frozen"]


def test_two_processes_are_timed(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything: list[dict[str, Any]] = []

    def kept(job: Job, ranks: int) -> dict[str, Any]:
        everything.append(launched(job, ranks))
        return everything[-1]

    monkeypatch.setattr(scaling, "launched", kept)
    told = cli("bench", "scaling", *QUICK, "--ranks", 2, "--output", tmp_path)
    assert told.code == 0, told
    cores = len(os.sched_getaffinity(0))
    assert f"2 processes shared {cores} cores of one machine" in told.out
    rows = [row for row in read_report(tmp_path / "scaling.json")["rows"] if "ranks" in row]
    timed = [row for row in rows if "median" in row]
    assert [(row["kind"], row["ranks"]) for row in timed] == [
        ("weak", 1),
        ("strong", 1),
        ("weak", 2),
        ("strong", 2),
    ]
    for row in timed:
        assert row["backend"] == "gloo" and row["threads"] == max(1, cores // 2)
        assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["unit"] == "ms"
        assert row["efficiency"] > 0 and 0 <= row["communication_share"] <= 1
        assert row["clips_per_s"] == pytest.approx(1000 * row["clips"] / row["median"], rel=1e-3)
    # Where noise hides what is hidden, nothing is said of it.
    assert all(0 <= row.get("hidden_share", 0) <= 1 for row in timed[2:])
    assert all(row["all_reduce_ms"] > 0 for row in timed[2:])
    whole = gradient_bytes(Case("tiny", 4, 1), 0)
    assert [sum(found.get("buckets", [])) for found in everything] == [0, whole, whole]


def test_the_step_alone_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that is told it is one of two."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    made: list[scaling_worker._Running] = []
    make = scaling_worker._step

    def kept(case: Case, provider: str, world: World) -> scaling_worker._Running:
        made.append(make(case, provider, world))
        return made[-1]

    monkeypatch.setattr(scaling_worker, "_step", kept)
    with joined(torch.device("cpu")) as world:
        found = scaling_worker.measure(TINY, World(world.device, 0, 2))
        sending = [isinstance(own.step.forward, DistributedDataParallel) for own in made]
    assert sending == [True, False]
    assert [len(times) for times in found["times"].values()] == [FEWEST, FEWEST, REDUCTIONS]
    first, second = (own.step.method.state_dict() for own in made)
    torch.testing.assert_close(first, second)


def test_a_process_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def recorded(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        # The first one waits for the second, which never joins.
        last = settings["env"]["RANK"] == "1"
        ending = ["-c", "raise SystemExit('no card')"]
        started.append(start([command[0], *ending] if last else command, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    with pytest.raises(UserError, match="Process 1 ended with 1: no card"):
        launched(TINY, 2)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_what_failed_is_a_row(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(job: Job, ranks: int) -> dict[str, Any]:
        if ranks == 2:
            raise UserError("Process 1 ended with -9: it said nothing")
        return {"times": {"together": [10.0] * 5}}

    monkeypatch.setattr(scaling, "launched", failing)
    told = cli("bench", "scaling", *QUICK, "--ranks", 2, "--output", tmp_path)
    assert told.code == 0 and "Process 1 ended with -9" in told.out
    rows = read_report(tmp_path / "scaling.json")["rows"]
    assert [(row["kind"], row["ranks"]) for row in rows if "error" in row] == [
        ("weak", 2),
        ("strong", 2),
    ]


def test_a_benchmark_that_is_stopped_leaves_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopping(job: Job, ranks: int) -> dict[str, Any]:
        if ranks == 2:
            raise KeyboardInterrupt
        return {"times": {"together": [10.0] * 5}}

    monkeypatch.setattr(scaling, "launched", stopping)
    with pytest.raises(KeyboardInterrupt):
        scaling.run(tmp_path, device="cpu", ranks=[2])
    rows = read_report(tmp_path / "scaling.json")["rows"]
    assert [row["kind"] for row in rows if "median" in row] == ["weak", "strong"]


def test_mistakes_end_in_a_sentence(safe: Callable[..., str], tmp_path: Path) -> None:
    start = ("bench", "scaling", "--device", "cpu", "--output", tmp_path / "out")
    assert "use a multiple" in safe(*start, "--clips", 3, "--ranks", 2)
    assert "from 1" in safe(*start, "--ranks", 0)
    assert "from 1" in safe(*start, "--clips", 0)
    assert "positive" in safe(*start, "--seconds", 0)
    assert "one process only" in safe(*start, "--provider", "plain")
    assert "CUDA device" in safe(*start, "--provider", "triton")
    assert "no provider" in safe(*start, "--provider", "nccl")
    assert "trains no SMTC" in safe(*start, "--preset", "tiny_encoder")
    for size in (0, 5):
        assert "or a square" in safe(*start, "--size", size)
