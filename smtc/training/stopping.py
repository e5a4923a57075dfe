"""Requests to stop, by a person or a scheduler: the step under way ends, then the run is saved."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger("smtc")

_DATA_MAY_TAKE = 3.0  # seconds, once the run is to stop
_ASKING = ("SIGINT", "SIGTERM", "SIGUSR1")


class DataOverdueError(Exception):
    """The run was to stop, and the data for the next step did not come."""


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `signal`, and the loop looks at that.

    Only where it waits for data for more than a few seconds after that, so that it might never
    look, `DataOverdueError` is raised. A second SIGINT interrupts at once. In a thread other than
    the main one nothing is caught.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _ASKING if hasattr(signal, name)):
                self._former[number] = signal.signal(number, self._note)
            self._former[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        if self._former:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        signal.setitimer(signal.ITIMER_REAL, _DATA_MAY_TAKE, _DATA_MAY_TAKE)
        logger.info("%s: stopping after this step.", self.signal.name)

    def _look(self, *_: object) -> None:
        if self._waiting:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise DataOverdueError

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The block may take for ever, and what it does may be given up."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def leave(self) -> None:
        """End the program as the signal asks, once everything is saved."""
        if self.signal is None or self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
