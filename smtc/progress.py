"""How everything that can be slow reports progress: a terminal, a notebook and a log file alike."""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm.auto import tqdm
from tqdm.notebook import tqdm as tqdm_notebook

_LOG = logging.getLogger("smtc")
_END: Any = object()  # what no iterable holds

Item = TypeVar("Item")


class BesideBars(logging.Handler):
    """Log lines on standard error that stand above a running bar and not in it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


def bar(
    *, total: int | None, title: str, unit: str = "it", initial: int = 0, shown: bool = True
) -> tqdm:
    """A progress bar with an ETA. Where standard error is no terminal (a log file), a line every 10
    s. Units of `B` are bytes, shown as MB.
    """
    live = sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        unit_scale=unit == "B",
        initial=initial,
        disable=not shown,
        dynamic_ncols=live,
        mininterval=0.1 if live else 10.0,
    )


def track(
    items: Iterable[Item], *, total: int | None = None, title: str, unit: str = "it"
) -> Iterator[Item]:
    """Yield `items` while a bar counts them."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(total=total, title=title, unit=unit) as shown:
        for item in items:
            yield item
            shown.update()


def patient(
    items: Iterable[Item], what: str, remedy: str, *, seconds: float = 10.0
) -> Iterator[Item]:
    """Yield `items`, and say so when one is long in coming.

    A line of the log says that `what` is waited for, and the `remedy`, after `seconds`, twice as
    many, four times as many and so on, and once more when it came. Errors of `items` pass through.
    """
    iterator = iter(items)
    watch = _Watch(what, remedy, seconds)
    try:
        while True:
            watch.begin()
            item = next(iterator, _END)
            if item is _END:
                return
            watch.end()
            yield item
    finally:
        watch.close()


class _Watch:
    """A thread that speaks up when a wait is long.

    It wakes at most every `seconds` and the waiting side never wakes it, so a wait costs nothing.
    """

    def __init__(self, what: str, remedy: str, seconds: float) -> None:
        self._what, self._remedy, self._seconds = what, remedy, seconds
        self._since: float | None = None
        self._due = seconds  # how long a wait may last until it is told
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="patient", daemon=True).start()

    def begin(self) -> None:
        with self._lock:
            self._since, self._due = time.monotonic(), self._seconds

    def end(self) -> None:
        with self._lock:
            if self._since is not None and self._due > self._seconds:
                waited = time.monotonic() - self._since
                _LOG.warning("After %s, %s came.", _duration(waited), self._what)
            self._since = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        pause = self._seconds
        while not self._closed.wait(pause):
            pause = self._speak()

    def _speak(self) -> float:
        """Say what is due; returns how long nothing else can be."""
        with self._lock:
            if self._since is None:
                return self._seconds
            waited = time.monotonic() - self._since
            if waited >= self._due and not self._closed.is_set():
                _LOG.warning(
                    "Waiting for %s for %s now. %s", self._what, _duration(waited), self._remedy
                )
                while self._due <= waited:
                    self._due *= 2
            return min(self._seconds, self._due - waited)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
