"""The cases of `smtc.benchmarks.cases` under test: comparison with the oracle, which path ran."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from smtc import kernels
from smtc.benchmarks.cases import (  # noqa: F401
    CASES,
    CLIPS,
    CORRELATION,
    INSTANCES,
    OPERATIONS,
    SLOTS,
    TRANSPORT_MATRICES,
    clustered_clip,
    correlation_inputs,
    generator,
    instance_inputs,
    mask_loss_inputs,
    normal,
    parity_cases,
    sinkhorn_inputs,
    slot_inputs,
    uniform,
    unit,
)
from smtc.benchmarks.comparison import (  # noqa: F401
    TOLERANCE,
    against_oracle,
    errors,
    poisoned_memory,
    run,
)
from smtc.kernels import eager, launching

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TRITON_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the L2 norm."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    """Hold `actual` against the oracle's `expected`, with `factor` times the tolerance."""
    found = errors("result", actual, expected, dtype, factor)
    assert found.of_tolerance <= 1, found


@contextmanager
def only_kernels() -> Iterator[list[launching.Launch]]:
    """Operations of `eager` and `reference` fail; yields the launches."""

    def refused(*args: Any, **settings: Any) -> None:
        raise AssertionError("a Triton path called an operation in plain torch")

    with pytest.MonkeyPatch.context() as patch, launching.watch() as launches:
        for op in (*OPERATIONS, "active_negatives"):
            patch.setattr(eager, op, refused)
        yield launches


def compare(
    op: str,
    inputs: list[Tensor | None],
    wanted: list[int] | tuple[int, ...],
    dtype: torch.dtype,
    factor: float = 1,
    *,
    impl: str = "eager",
    device: str = "cpu",
    launches: bool = True,
    **settings: Any,
) -> None:
    """`impl` in `dtype` against the oracle in float64 on the same numbers, forward and gradients.

    With "triton" fresh memory is poisoned, eager's operations are out of reach and a kernel must
    have started, unless `launches` is False (documented exceptions: nothing to do, plain products).
    """
    fused = impl == "triton"
    function = functools.partial(getattr(kernels, op), impl=impl)
    with (
        poisoned_memory() if fused else nullcontext(),
        only_kernels() if fused else launching.watch() as seen,
    ):
        found = against_oracle(
            function, op, inputs, wanted, dtype, factor=factor, device=device, **settings
        )
    assert bool(seen) == (fused and launches)
    for error in found:
        assert error.of_tolerance <= 1, error
