"""Attention of the vision transformer: torch's, in a chosen order of backends, or xformers'."""

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smtc.errors import UserError

HOPPER = (9, 0)
ORDER = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""On Hopper; elsewhere torch's own order stands, which has cuDNN behind flash."""


def attend(query: Tensor, key: Tensor, value: Tensor, impl: str = "sdpa") -> Tensor:
    """`softmax(q·kᵀ/√d)·v` of `[B,tokens,heads,d]` each, in the same shape.

    impl: "sdpa" (torch) or "xformers", which needs the package and a CUDA device.
    """
    if impl == "xformers":
        return load_xformers()(query, key, value)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def backend_order(device: torch.device) -> AbstractContextManager[None]:
    """torch's attention takes the first of `ORDER` that can, within the block."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        return nullcontext()
    return sdpa_kernel(list(ORDER), set_priority=True)


def try_xformers(device: torch.device, dtype: torch.dtype) -> None:
    """One small call. Errors: `UserError` where the package cannot do it: it can be imported, with
    a warning, even if it was built for another torch and has no kernel at all.
    """
    attention = load_xformers()
    probe = torch.zeros(1, 16, 1, 64, device=device, dtype=dtype)
    try:
        attention(probe, probe, probe)
    except NotImplementedError as error:
        raise UserError(
            f"--model.attention xformers: the installed xformers has no kernel for {dtype} on "
            f"{device.type}; install one that was built for torch {torch.__version__}, or use sdpa."
        ) from error


@functools.cache
def load_xformers() -> Callable[..., Any]:
    """xformers' attention. Errors: `UserError` where the package is missing or broken."""
    try:
        return importlib.import_module("xformers.ops").memory_efficient_attention
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(
            f"--model.attention xformers: the package cannot be imported ({error}); "
            "pip install xformers in a version for this torch, or use sdpa."
        ) from error
