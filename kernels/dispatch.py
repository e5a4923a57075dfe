"""Which implementation of an operation runs, and saying so."""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import eager

IMPLEMENTATIONS = ("auto", "eager", "triton")

OLDEST = (8, 0)
"""The compute capability that the kernels need."""

SMALLEST = {"correlation_projection": 2**20}
"""Elements of the first tensor below which `auto` stays with plain torch on a GPU. An estimate, not
yet measured: eager's two matrix products start as fast as one kernel; every other operation starts
far more kernels in eager, at any size."""

FUSED = (
    "assignment",
    "correlation_projection",
    "instance_consistency",
    "masked_slot_attention",
    "mask_losses",
    "sinkhorn",
    "transport_alignment",
)
"""The files of kernels, each named like its operation."""

MOST_SLOTS = {
    "masked_slot_attention": (0, 2, 256),
    "transport_alignment": (1, 2, 128),
    "mask_losses": (0, 2, 128),
}
"""The most slots that a program of a kernel has room for: which tensor, its axis, how many."""

# Operations whose kernels are in another one's file.
FILES = {"active_negatives": "instance_consistency"}


# The kernels' functions by operation, filled when the package is imported: torch.compile should not
# have to trace an import.
_fused: dict[str, Callable[..., Any]] = {}


def register_operators() -> None:
    """Import the kernels' files where Triton is installed, so that torch knows `torch.ops.smtc`."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return
    for name in FUSED:
        # By path: the package's attribute of that name is the public function.
        module = importlib.import_module(f"smtc.kernels.{name}")
        for op in (name, *(other for other, file in FILES.items() if file == name)):
            _fused[op] = getattr(module, op)


def implementation(op: str, impl: str, *tensors: Tensor | None) -> Callable[..., Any]:
    """The function for `op` on `tensors`: an explicit choice never falls back, `auto` is logged."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    given = [tensor for tensor in tensors if tensor is not None]
    if impl == "triton":
        reason = _obstacle(op, given)
        if reason is not None:
            raise ValueError(f'{op}: impl: "triton" {reason}; use "eager" or "auto"')
        return _fused[op]
    if impl == "auto":
        chosen = _chosen(op, given)
        if not torch.compiler.is_compiling():
            _announce(chosen, given[0].device)
        if chosen == "triton":
            return _fused[op]
    function: Callable[..., Any] = getattr(eager, op)
    return function


def obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`: "needs …", or None where they can."""
    if not _fused:
        return "needs Triton, which is not installed (pip install triton)"
    if device.type == "cuda":
        # A compiler would have to trace the question; a GPU that is too old then fails in Triton.
        if not torch.compiler.is_compiling() and _capability(device) < OLDEST:
            return f"needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
        return None
    from .launching import INTERPRETED, is_recording

    if (device.type == "cpu" and INTERPRETED) or (device.type == "meta" and is_recording()):
        return None
    return f"needs a CUDA device (or, on a CPU, TRITON_INTERPRET=1), got {device.type}"


def _obstacle(op: str, tensors: list[Tensor]) -> str | None:
    place, axis, most = MOST_SLOTS.get(op, (0, 0, None))
    if most is not None and tensors[place].shape[axis] > most:
        return f"takes at most {most} slots, got {tensors[place].shape[axis]}"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "computes in float32, and an input is float64"
    return obstacle(tensors[0].device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _chosen(op: str, tensors: list[Tensor]) -> str:
    """What "auto" runs: the kernels on a GPU, where they pay; the interpreter is never chosen."""
    if tensors[0].device.type != "cuda" or _obstacle(op, tensors) is not None:
        return "eager"
    return "triton" if tensors[0].numel() >= SMALLEST.get(op, 0) else "eager"


def announce(device: torch.device) -> None:
    """Say once what "auto" runs on `device`, for callers that compile and so would say nothing."""
    kernels = device.type == "cuda" and obstacle(device) is None
    _announce("triton" if kernels else "eager", device)


@functools.cache
def _announce(chosen: str, device: torch.device) -> None:
    what = "plain torch (eager)"
    if chosen == "triton":
        major, minor = _capability(device)
        what = f"the Triton kernels with the launch table for sm_{major}{minor}"
    logging.getLogger("smtc").info("operations: impl=auto runs %s on %s", what, device.type)
