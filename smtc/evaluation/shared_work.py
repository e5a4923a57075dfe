"""Work that several processes share: who does what, how far all are, and one voice for mistakes.

With one process every function does the same by itself.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from smtc.errors import UserError
from smtc.training import distributed
from smtc.training.distributed import World

Result = TypeVar("Result")

POLL = 0.2
"""Seconds between looks at how far the other processes are."""


class _Told(UserError):  # noqa: N818
    """A mistake that every process knows of."""


def together(work: Callable[[], Result]) -> list[Result]:
    """What each process makes of `work`, by rank, in all of them.

    Where it is a `UserError` in one of them it is one in all, so that none waits for another.
    """
    if not dist.is_initialized():
        return [work()]
    try:
        result, mistake = work(), None
    except UserError as error:
        result, mistake = None, str(error)
    told = distributed.gather((result, mistake))
    for _, said in told:
        if said is not None:
            raise _Told(said)
    return [value for value, _ in told]  # type: ignore[misc]


@contextmanager
def one_voice(world: World) -> Iterator[None]:
    """A `UserError` in the block, in whichever process, is one line of the main process and exit
    code 2 of all. A process alone just raises it.
    """
    if world.size == 1:
        yield
        return
    try:
        yield
        together(lambda: None)
    except UserError as error:
        if not isinstance(error, _Told):
            distributed.gather((None, str(error)))  # the others are in `together`, or come to it
        if world.main:
            print(f"smtc: {error}", file=sys.stderr, flush=True)
        # torchrun stops all processes when the first of them has gone.
        distributed.wait_for_all()
        sys.exit(2)


class Tally:
    """A queue of numbered pieces of work that all processes take from.

    `name` is that of this queue, the same in all processes, and of no other.
    """

    def __init__(self, name: str) -> None:
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            self._store: dist.Store = dist.PrefixStore(f"smtc/{name}", store)
        else:
            self._store = dist.HashStore()

    def take(self) -> int:
        """The number of the next piece, which no other process gets: 0, 1, 2, …"""
        return self._store.add("taken", 1) - 1

    def finish(self) -> None:
        """A piece is done."""
        self._store.add("done", 1)

    def fail(self) -> None:
        """Nothing that is left needs to be done."""
        self._store.add("failed", 1)

    def meet(self, size: int) -> None:
        """Wait, however long it takes, until all processes, `size` of them, are here."""
        self._store.add("here", 1)
        while self._store.add("here", 0) < size:
            time.sleep(POLL)

    @property
    def done(self) -> int:
        """Pieces that all processes have done."""
        return self._store.add("done", 0)

    @property
    def failed(self) -> bool:
        """Whether a process has failed."""
        return self._store.add("failed", 0) > 0
