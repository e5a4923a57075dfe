"""Many processes as one trainer: each function does nothing where there is only one."""

import datetime
import itertools
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from smtc.errors import ToldElsewhereError, UserError

logger = logging.getLogger("smtc")

Item = TypeVar("Item")

_MISTAKES = "smtc/mistakes"
_LAGGING_AFTER = 30.0  # seconds without a step of the slowest rank before it is named
_ONCE = itertools.count()  # calls of `once_a_machine`; all processes count alike
_ONCE_POLL = 0.1  # seconds


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


@contextmanager
def joined(device: torch.device, timeout: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started (NCCL on CUDA, gloo on CPUs) while the block runs.

    `device` is "cpu" or "cuda"; each process takes the GPU of its local rank. A collective that
    waits for more than `timeout` seconds fails.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield World(device)
        return
    if device.type == "cuda":
        local, present = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= present:
            raise UserError(
                f"Process {local} of this machine has no GPU of its own (there are {present}); "
                f"use torchrun --nproc-per-node={present}."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    patience = datetime.timedelta(seconds=timeout)
    store, rank, size = next(iter(rendezvous("env://", timeout=patience)))
    # torchrun keeps its store when it restarts a process, and gloo would find addresses of the dead
    # ones in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"smtc/{attempt}", store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=patience,
        device_id=device if device.type == "cuda" else None,
    )
    smtc, world = logging.getLogger("smtc"), World(device, dist.get_rank(), dist.get_world_size())
    level = smtc.level
    if not world.main:
        smtc.setLevel(logging.WARNING)  # what all would say, the main process says
    try:
        with _mistakes_shared(store):
            yield world
    finally:
        smtc.setLevel(level)
        dist.destroy_process_group()


@contextmanager
def _mistakes_shared(store: dist.Store) -> Iterator[None]:
    """A mistake that several processes meet is told by the first of them; those whose collectives
    fail because it has left end as it does.
    """
    try:
        yield
    except UserError as error:
        try:
            error.agreed = store.add(_MISTAKES, 1) == 1
        except RuntimeError:  # whoever keeps the store is gone
            raise error from None
        if error.agreed:
            raise
        raise ToldElsewhereError(str(error)) from error
    except RuntimeError as error:
        met = False
        with suppress(RuntimeError):
            met = store.check([_MISTAKES])
        if not met:
            raise
        raise ToldElsewhereError("Another process met a mistake.") from error


def mean(values: Tensor) -> Tensor:
    """The mean over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def wait_for_all() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: Item) -> list[Item]:
    """What each process gives, by rank, in all of them."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def once_a_machine(work: Callable[[], str]) -> str:
    """What `work` gives in the first process of this machine, in all of its processes.

    All of them have to call; those that do not work wait, however long it takes. An error of `work`
    is a `UserError` in the others.
    """
    if not dist.is_initialized():
        return work()
    store = dist.distributed_c10d._get_default_store()
    key = f"smtc/once/{os.environ.get('GROUP_RANK', 0)}/{next(_ONCE)}"
    if int(os.environ.get("LOCAL_RANK", 0)):
        while not store.check([key]):
            time.sleep(_ONCE_POLL)
        outcome = json.loads(store.get(key))
        if outcome["error"] is not None:
            raise UserError(outcome["error"])
        return str(outcome["result"])
    outcome = {"error": None, "result": None}
    try:
        outcome["result"] = result = work()
    except Exception as error:
        outcome["error"] = str(error)
        raise
    finally:
        store.set(key, json.dumps(outcome))
    return result


def check_same_start(module: nn.Module) -> None:
    """`UserError` where the processes start from different weights, which nothing would mend."""
    if not dist.is_initialized():
        return
    sums = [p.detach().double().sum() for p in module.parameters()]
    mine = torch.stack(sums) if sums else torch.zeros(1)
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise UserError("The processes start from different weights; give all the same files.")


def parallel(module: nn.Module, *, static: bool) -> DistributedDataParallel:
    """`module` with gradients that are the mean over all processes, sent while the backward pass
    goes on.

    All of them start alike and no buffer is shared, so nothing but gradients is ever sent; what
    needs no gradient, such as a teacher, is no part of it. `static` says that every step sends all
    of them, so that torch need not look; parts of an accumulated step do not.
    """
    with warnings.catch_warnings():
        # What torch recommends instead does send the buffers once.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(
            module,
            init_sync=False,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=static,
        )


def apart(module: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Where `wanted`, gradients of the block stay in this process until a block without."""
    if wanted and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


class Agreement:
    """A yes or no that all processes come to know one call after the first of them said yes.

    The answer travels on the CPU while the step runs, so that asking costs no wait.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._said = torch.zeros(1)
        self._under_way: dist.Work | None = None

    def ask(self, mine: bool) -> bool:
        """Whether anyone had said yes by the previous call; `mine` goes out with this one."""
        if self._group is None:
            return mine
        answer = self.close()
        self._said.fill_(float(mine or answer))
        self._under_way = dist.all_reduce(self._said, group=self._group, async_op=True)
        return answer

    def close(self) -> bool:
        """Wait for what is under way; whether anyone had said yes."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
        return bool(self._said > 0)


class Heartbeat:
    """Tells the other processes which step this one is at; the main one names who lags behind."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self._store is not None:
            self.beat(0)
            if world.main:
                self._watcher.start()

    def beat(self, step: int) -> None:
        """This process has done `step` steps."""
        if self._store is not None:
            self._store.set(f"smtc/step/{self._world.rank}", str(step))

    def laggards(self) -> dict[int, int]:
        """Rank to steps done of the processes behind the first."""
        if self._store is None:
            return {}
        ranks = range(self._world.size)
        steps = {rank: int(self._store.get(f"smtc/step/{rank}")) for rank in ranks}
        return {rank: step for rank, step in steps.items() if step < max(steps.values())}

    def close(self) -> None:
        """End the watch."""
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def _watch(self) -> None:
        seen: dict[int, int] = {}
        since = time.monotonic()
        while not self._ended.wait(_LAGGING_AFTER / 10):
            lagging = self.laggards()
            if lagging != seen:
                seen, since = lagging, time.monotonic()
            elif lagging and time.monotonic() - since > _LAGGING_AFTER:
                since = time.monotonic()
                named = ", ".join(f"rank {rank} at step {step}" for rank, step in lagging.items())
                logger.warning("Waiting for %s; the others are further.", named)
