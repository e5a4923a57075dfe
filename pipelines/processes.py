"""Worker processes that never outlive the work."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection


@contextmanager
def processes(count: int, prepare: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """`count` processes, each readied by `prepare`, that end with this block, or with this process
    however it ends.
    """
    context = multiprocessing.get_context()
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start, initargs=(theirs, ours, prepare)
    )
    try:
        yield pool
    except BaseException:
        ours.close()  # not to wait for what is on its way
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        ours.close()
        theirs.close()


def _start(lifeline: Connection, other_end: Connection, prepare: Callable[[], None]) -> None:
    """Runs in each process, which ends when nobody holds the lifeline's other end any more."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def end_with_parent() -> None:
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    prepare()
