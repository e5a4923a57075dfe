"""Holding an operation against the oracle: the same numbers, one in float64."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smtc.kernels import reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error in the L2 norm; of the largest value, the largest error may be 5 times it."""


@dataclass(frozen=True)
class Errors:
    """How far a tensor is from the oracle's: relative in L2, and at worst, in units of the
    tolerance (at most 1 passes)."""

    what: str
    relative: float
    of_tolerance: float


def errors(
    what: str,
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    factor: float,
    size: float = 1.0,
) -> Errors:
    """Compare with `factor` times the tolerance of `dtype`; not finite is infinitely far.

    size: of the terms that are summed, which may cancel.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, not {list(expected.shape)}")
    tolerance = factor * TOLERANCE[dtype]
    # Where the exact answer is zero (one slot, one frame) the terms' rounding may remain.
    floor = size * (1e-6 if dtype != torch.float64 else 1e-14)
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not torch.isfinite(actual).all():
        return Errors(what, float("inf"), float("inf"))
    if not expected.numel():
        return Errors(what, 0.0, 0.0)
    error = actual - expected
    norm, largest = float(expected.norm()), float(expected.abs().max())
    worst = max(
        float(error.norm()) / (tolerance * norm + floor),
        float(error.abs().max()) / (5 * tolerance * largest + floor),
    )
    # Where the exact answer is zero the absolute error is what can be said.
    return Errors(what, float(error.norm()) / (norm if norm > floor else 1.0), worst)


def run(
    function: Callable[..., Any],
    inputs: list[Tensor | None],
    wanted: tuple[int, ...] | list[int],
    **settings: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of the inputs numbered in `wanted` for a fixed random cotangent."""
    # A tensor that is given twice (keys that are the values) stays one.
    copies = {id(value): value.detach().clone() for value in inputs if value is not None}
    leaves = [None if value is None else copies[id(value)] for value in inputs]
    for place in wanted:
        leaf = leaves[place]
        assert leaf is not None
        leaf.requires_grad_()
    result = function(*leaves, **settings)
    outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o is not None]
    if not wanted:
        return outputs, []
    # An empty sum (one slot, one frame) may be a constant.
    graph = [output for output in outputs if output.requires_grad]
    cotangents = [_cotangent(output, 90 + k) for k, output in enumerate(graph)]
    chosen = [leaf for place, leaf in enumerate(leaves) if place in wanted and leaf is not None]
    gradients = (
        torch.autograd.grad(graph, chosen, cotangents, allow_unused=True, materialize_grads=True)
        if graph
        else [torch.zeros_like(leaf) for leaf in chosen]
    )
    return [output.detach() for output in outputs], list(gradients)


def _cotangent(output: Tensor, seed: int) -> Tensor:
    """The same in every dtype: numbers that bfloat16 holds."""
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().to(output.device, output.dtype)


def against_oracle(
    function: Callable[..., Any],
    op: str,
    inputs: list[Tensor | None],
    wanted: tuple[int, ...] | list[int],
    dtype: torch.dtype,
    *,
    factor: float = 1,
    device: str = "cpu",
    **settings: Any,
) -> list[Errors]:
    """`function` in `dtype` on `device` against the oracle of `op` in float64 on the CPU.

    `inputs` in float64 are rounded to `dtype` for both; `wanted` numbers those whose gradient is
    compared.
    """
    low = _converted(inputs, dtype)
    exact = _converted(low, torch.float64)
    index = settings.get("index")
    there = {"index": index.to(device)} if isinstance(index, Tensor) else {}
    placed = _converted(low, dtype, device)
    outputs, gradients = run(function, placed, wanted, **settings | there)
    true_outputs, true_gradients = run(getattr(reference, op), exact, wanted, **settings)
    for gradient in gradients:
        if gradient.dtype != dtype:
            raise AssertionError(f"a gradient has dtype {gradient.dtype}, not {dtype}")
    # A cost is divided by ε, and its gradient with it.
    size = max(1.0, 1 / settings["epsilon"]) if op == "sinkhorn" else 1.0
    return [
        errors(f"output {k}", actual, expected, dtype, factor)
        for k, (actual, expected) in enumerate(zip(outputs, true_outputs, strict=True))
    ] + [
        errors(f"gradient {k}", actual, expected, dtype, factor, size)
        for k, actual, expected in zip(wanted, gradients, true_gradients, strict=True)
    ]


def _converted(
    inputs: list[Tensor | None], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor | None]:
    """Floating-point inputs in `dtype`, all on `device`; a tensor given twice stays one."""
    done = {
        id(value): value.to(device, dtype if value.is_floating_point() else value.dtype)
        for value in inputs
        if value is not None
    }
    return [None if value is None else done[id(value)] for value in inputs]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that a result that was not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        # Of operations without a deterministic form, which are none of ours.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
