"""The one exception that is meant for a person's eyes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_NO_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)


class UserError(ValueError):
    """A mistake its maker can mend: one sentence that names the thing and the remedy.

    The command line prints the sentence and exits with 2; a traceback means a fault of ours.
    """

    agreed = False
    """Whether the processes of a run have agreed that this one tells it."""


class ToldElsewhereError(UserError):
    """A mistake that another process of the run tells."""


@contextmanager
def enough_memory() -> Iterator[None]:
    """Inside the block, memory that does not suffice, on the host or a GPU, is a `UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        raise UserError(
            "The memory does not suffice; use smaller or fewer of what was asked for (in training "
            "--train.batch with --train.accumulate, or --train.checkpoint-activations)."
        ) from error
