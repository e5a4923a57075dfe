"""Without warnings that are meant for training and mean nothing to who measures time or memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

UNTRAINED = "The encoder starts from random weights"


@contextmanager
def untrained_allowed() -> Iterator[None]:
    """Within the block nothing is said of encoders that start from random weights."""
    logger = logging.getLogger("smtc")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(UNTRAINED)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
