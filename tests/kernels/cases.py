"""Cases, tolerances and the comparison with the oracle that all tests of the operations share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smtc import kernels
from smtc.kernels import reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative error in the L2 norm; of the largest value, the largest error may be 5 times it."""

DTYPES = list(TOLERANCE)

# B, L, R, M, D, E and the index
CORRELATION = [
    (2, 63, 2, 63, 24, 24, None),
    (2, 16, 2, 16, 40, 40, None),
    (1, 257, 1, 16, 8, 5, None),
    (3, 1, 2, 1, 1, 1, [1, 1, 0]),
    (4, 10, 3, 40, 5, 7, [2, 0, 2, 2]),
    (4, 9, 3, 4, 30, 31, [2, 0, 2, 2]),
]
# B, G, P, L, D
SLOTS = [(2, 1, 16, 63, 24), (2, 5, 4, 257, 16), (1, 3, 1, 7, 5), (1, 1, 1, 1, 1)]
# B, L, M
TRANSPORT_MATRICES = [(2, 63, 63), (1, 257, 31), (3, 1, 5), (2, 4, 1), (1, 1, 1)]
# B, T, L, D, N
CLIPS = [(2, 4, 63, 24, 5), (1, 3, 257, 16, 1), (2, 2, 1, 3, 2), (1, 1, 6, 4, 3)]
# B, T, N, P, D
INSTANCES = [(2, 4, 3, 4, 24), (1, 3, 1, 5, 7), (2, 2, 3, 1, 4), (1, 1, 2, 3, 5), (1, 2, 1, 8, 6)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def clustered_clip(clips: int, frames: int, positions: int, width: int, slots: int) -> list[Tensor]:
    """Features in three clusters, whose shares differ between frames, and masks that follow."""
    centres = normal(3, width, seed=1)
    shares = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6], [0.5, 0.45, 0.05]])
    labels = torch.stack(
        [
            torch.multinomial(shares[t % 4], positions, replacement=True, generator=generator(t))
            for t in range(clips * frames)
        ]
    ).view(clips, frames, positions)
    features = centres[labels] + 0.3 * normal(clips, frames, positions, width, seed=2)
    by_cluster = 3 * normal(3, slots, seed=3)
    masks = (by_cluster[labels] + normal(clips, frames, positions, slots, seed=4)).softmax(-1)
    return [features, masks.transpose(2, 3).contiguous()]


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the L2 norm."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    """Hold `actual` against the oracle's `expected`, with `factor` times the tolerance."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    tolerance = factor * TOLERANCE[dtype]
    # Where the exact answer is zero (one slot, one frame) rounding of terms of size 1 may remain.
    floor = 1e-6 if dtype != torch.float64 else 1e-14
    error = (actual.double() - expected.double()).abs()
    norm = float(expected.double().norm())
    assert float(error.norm()) <= tolerance * norm + floor
    assert float(error.max()) <= 5 * tolerance * float(expected.abs().max()) + floor


def run(
    function: Callable[..., Any], inputs: list[Tensor | None], wanted: list[int], **settings: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of the inputs numbered in `wanted` for a fixed random cotangent."""
    leaves = [None if value is None else value.detach().clone() for value in inputs]
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
    cotangents = [
        normal(*output.shape, seed=90 + k).bfloat16().to(output.dtype)
        for k, output in enumerate(graph)
    ]
    chosen = [leaf for place, leaf in enumerate(leaves) if place in wanted and leaf is not None]
    gradients = (
        torch.autograd.grad(graph, chosen, cotangents, allow_unused=True, materialize_grads=True)
        if graph
        else [torch.zeros_like(leaf) for leaf in chosen]
    )
    return [output.detach() for output in outputs], list(gradients)


def compare(
    op: str,
    inputs: list[Tensor | None],
    wanted: list[int],
    dtype: torch.dtype,
    factor: float = 1,
    **settings: Any,
) -> None:
    """Eager in `dtype` against the oracle in float64 on the same numbers, forward and gradients."""
    low = [v.to(dtype) if v is not None and v.is_floating_point() else v for v in inputs]
    exact = [v.double() if v is not None and v.is_floating_point() else v for v in low]
    outputs, gradients = run(getattr(kernels, op), low, wanted, impl="eager", **settings)
    true_outputs, true_gradients = run(getattr(reference, op), exact, wanted, **settings)
    for actual, expected in zip(outputs, true_outputs, strict=True):
        assert_close(actual, expected, dtype, factor)
    for actual, expected in zip(gradients, true_gradients, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, dtype, factor)
