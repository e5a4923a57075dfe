"""Which implementation of an operation runs, and saying so."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from . import eager

IMPLEMENTATIONS = ("auto", "eager", "triton")


def implementation(op: str, impl: str) -> Callable[..., Any]:
    """The function for `op`: an explicit choice never falls back, `auto` is logged once."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "triton":
        raise ValueError(
            f'{op}: impl: this version has no Triton implementation; use "eager" or "auto"'
        )
    if impl == "auto" and not torch.compiler.is_compiling():
        _announce()
    return getattr(eager, op)


@functools.cache
def _announce() -> None:
    logging.getLogger("smtc").info("operations: impl=auto runs plain torch (eager) here")
