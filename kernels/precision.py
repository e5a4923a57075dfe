"""The precision that operations compute in: at least float32, whatever autocast says."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

A = ParamSpec("A")
R = TypeVar("R")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of `tensors` is float64, else float32."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def upcast(*tensors: Tensor) -> list[Tensor]:
    """`tensors` in their common compute dtype."""
    dtype = compute_dtype(*tensors)
    return [tensor.to(dtype) for tensor in tensors]


def without_autocast(function: Callable[A, R]) -> Callable[A, R]:
    """`function`, run with autocast off on the device of its first argument, a tensor."""

    @functools.wraps(function)
    def wrapped(*args: A.args, **kwargs: A.kwargs) -> R:
        tensor = args[0]
        assert isinstance(tensor, Tensor)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped
