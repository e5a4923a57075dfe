"""Registering an operation with torch, so that compile, export and autograd know it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef, Library

from .launching import INTERPRETED, is_recording

_library = Library("smtc", "FRAGMENT")


def register(
    name: str, launcher: Callable[..., Any], plain: Callable[..., Any], fake: Callable[..., Any]
) -> CustomOpDef:
    """The operator `smtc::name`, with the schema of `launcher`'s annotations.

    Args:
        name: the operator's name.
        launcher: starts the Triton kernels. Returns new contiguous tensors: never an input, a view
            or None.
        plain: the same in plain torch, what a CPU runs when the interpreter is off.
        fake: the same shapes, dtypes and devices, without values.
    """
    operator = torch.library.custom_op(
        f"smtc::{name}", launcher, mutates_args=(), device_types="cuda"
    )
    operator.register_kernel("cpu")(launcher if INTERPRETED else plain)
    operator.register_fake(lambda *given: (launcher if is_recording() else fake)(*given))
    for device in ("cpu", "cuda"):
        _library.impl(name, _outside_autocast(name, device), f"Autocast{device.upper()}")
    return operator


def _outside_autocast(name: str, device: str) -> Callable[..., Any]:
    """The operator itself: its precision follows its inputs, whatever autocast says."""

    def kernel(*arguments: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.smtc, name)(*arguments)

    return kernel
