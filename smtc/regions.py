"""Named parts of a training step, for those who measure them (benchmarks, profiles)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

REGIONS = (
    *("data", "student", "teacher", "alignment", "mask losses", "instance"),
    *("backward", "optimiser", "ema"),
)
"""In the order of a step. The mask losses are what of alignment and regularisation is computed
together.
"""

Listener = Callable[[str], AbstractContextManager[object]]
_listener: Listener | None = None


def region(name: str) -> AbstractContextManager[object]:
    """The block is part `name` of the step; nothing happens where nobody listens."""
    # In this order: a compiled function does not depend on who listens.
    if torch.compiler.is_compiling() or _listener is None:
        return nullcontext()
    return _listener(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, each region runs inside `listener(name)`."""
    global _listener
    former, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = former
