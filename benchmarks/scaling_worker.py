"""One process of `bench scaling`: times steps together with those that were started with it."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from smtc.benchmarks.harness import FEWEST, MOST, write_whole
from smtc.benchmarks.step_providers import PROVIDERS, SEED, Case
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.training import distributed
from smtc.training.distributed import World, joined
from smtc.training.graphs import WARM_UP_PARALLEL
from smtc.training.step import Step

REDUCTIONS = 20
"""Repetitions of the communication alone."""


@dataclass(frozen=True)
class Job:
    """What every process does."""

    preset: str
    positions: int
    clips: int
    """Of each process."""
    provider: str
    device: str
    threads: int
    seconds: float
    output: str = ""
    """The file for what was found."""


Times = dict[str, list[float]]
"""Milliseconds by name: of each round, the slowest process's."""


def measure(job: Job, world: World) -> dict[str, Any]:
    """Milliseconds of steps `together` and, in turn with them, `alone`, without communication but
    at the same time in all processes; and of the communication by itself, `reduction`.
    """
    case = Case(job.preset, job.positions, job.clips)
    batch = case.batch(str(world.device))
    batch = replace(batch, index=batch.index + world.rank * job.clips)
    together = _step(case, job.provider, world)
    if world.size == 1:
        return {"times": _timed({"together": lambda: together(batch)}, job.seconds, world)}
    alone = _step(case, job.provider, World(world.device))
    calls = {"together": lambda: together(batch), "alone": lambda: alone(batch)}
    times = _timed(calls, job.seconds, world)
    sizes = bucket_bytes(together.step.forward)
    buckets = [torch.zeros(size // 4, device=world.device) for size in sizes]

    def reduce() -> None:
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            work.wait()

    reduction = [_once({"": reduce}, world)[""] for _ in range(REDUCTIONS)]
    return {"times": times | {"reduction": reduction}, "buckets": sizes}


class _Running:
    """A step of its own method, repeated."""

    def __init__(self, step: Step) -> None:
        self.step, self._number = step, 0

    def __call__(self, batch: Batch) -> None:
        self.step(iter([batch] * self.step.config.train.accumulate), self._number)
        self._number += 1


def _step(case: Case, provider: str, world: World) -> _Running:
    config = case.config(PROVIDERS[provider].settings)
    torch.manual_seed(SEED)
    return _Running(Step(SMTCMethod(config).to(world.device).train(), config, world))


def _timed(calls: Mapping[str, Callable[[], None]], seconds: float, world: World) -> Times:
    """Rounds of the calls after a warm-up, as many in each process."""
    for _ in range(WARM_UP_PARALLEL + 1 if world.device.type == "cuda" else 3):
        _once(calls, world)
    once = sum(_once(calls, world).values()) / 1000
    rounds = max(FEWEST, min(MOST, int(seconds * len(calls) / once)))
    found: Times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, value in _once(calls, world).items():
            found[name].append(value)
    return found


def _once(calls: Mapping[str, Callable[[], None]], world: World) -> dict[str, float]:
    """Milliseconds of a call of each, the slowest process's: the same in all of them."""
    mine = {}
    for name, call in calls.items():
        _settle(world)
        distributed.wait_for_all()
        start = time.perf_counter()
        call()
        _settle(world)
        mine[name] = 1000 * (time.perf_counter() - start)
    everyones = distributed.gather(mine)
    return {name: max(one[name] for one in everyones) for name in calls}


def _settle(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def bucket_bytes(module: torch.nn.Module) -> list[int]:
    """Sizes of the buckets in which the gradients of a step that has run are sent."""
    assert isinstance(module, DistributedDataParallel)
    told = module._get_ddp_logging_data()
    sizes = str(told.get("rebuilt_bucket_sizes") or told["bucket_sizes"])
    return [int(size) for size in sizes.split(",")]


def main(text: str) -> None:
    """Run the job that `text` describes in JSON; the main process writes what was found."""
    job = Job(**json.loads(text))
    torch.set_num_threads(job.threads)
    with joined(torch.device(job.device)) as world:
        found = measure(job, world)
        if world.main:
            write_whole(Path(job.output), json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
