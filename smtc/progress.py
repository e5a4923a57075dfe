"""How everything that can be slow reports progress: a terminal, a notebook and a log file alike."""

import logging
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


class BesideBars(logging.Handler):
    """Log lines on standard error that stand above a running bar and not in it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


def bar(*, total: int | None, title: str, unit: str = "it", initial: int = 0) -> tqdm:
    """A progress bar with an ETA. Where standard error is no terminal (a log file), a line every 10
    s.
    """
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=title,
        unit=unit,
        initial=initial,
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
