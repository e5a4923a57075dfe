"""Triton makes constants of integers that are 1, which the interpreter does not: so the smallest
sizes are compiled here, in a process whose interpreter is off.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smtc import kernels
from smtc.kernels import launching

# B, T, L, M, D, E, N, P
SIZES = [(1, 1, 1, 1, 1, 1, 1, 1), (1, 2, 1, 1, 1, 1, 1, 1), (1, 2, 17, 1, 33, 1, 1, 3)]
ARCHITECTURE = "sm_90"


def calls(dtype: torch.dtype, sizes: tuple[int, ...]) -> Iterator[Callable[[], Any]]:
    """Every operation on meta tensors, in each of its forms."""
    clips, frames, positions, inner, width, outputs, semantics, slots = sizes
    batch = clips * frames

    def drawn(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device="meta", dtype=kind)

    def learned(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return drawn(*shape, kind=kind).requires_grad_()

    embeddings = (clips, frames, semantics, slots, width)
    valid = drawn(*embeddings[:-1], kind=torch.bool)
    for index in (None, drawn(batch, kind=torch.int64)):
        yield lambda index=index: kernels.correlation_projection(
            learned(batch, positions, width),
            learned(batch, inner, width),
            learned(outputs, inner),
            learned(outputs),
            index=index,
            impl="triton",
        )
    for mask in (None, drawn(batch, semantics, positions, kind=torch.bool)):
        yield lambda mask=mask: kernels.masked_slot_attention(
            learned(batch, semantics, slots, width),
            learned(batch, positions, width),
            learned(batch, positions, width),
            mask,
            scale=1.0,
            epsilon=1e-8,
            logit_bias=learned(batch, semantics, slots, kind=torch.float32),
            impl="triton",
        )[0]
    yield lambda: kernels.sinkhorn(
        learned(clips, positions, inner),
        learned(clips, positions, kind=torch.float32),
        learned(clips, inner, kind=torch.float32),
        epsilon=0.1,
        iterations=1,
        impl="triton",
    )
    for epsilon in (0.1, 0.01):
        yield lambda epsilon=epsilon: kernels.transport_alignment(
            drawn(clips, frames, positions, width),
            drawn(clips, frames, semantics, positions),
            epsilon=epsilon,
            iterations=1,
            marginals="l1",
            impl="triton",
        )
    masks = (clips, frames, semantics, positions)
    yield lambda: sum(kernels.mask_losses(learned(*masks), drawn(*masks), impl="triton"))
    yield lambda: kernels.assignment(drawn(clips, slots, slots), impl="triton")
    for form in ("cosine", "l2_margin"):
        yield lambda form=form: kernels.instance_consistency(
            learned(*embeddings),
            drawn(*embeddings),
            valid,
            valid,
            form=form,
            margin=0.1,
            normaliser="clip",
            impl="triton",
        )


def main() -> None:
    """Compile all of them, forward and backward."""
    from smtc.kernels import aot

    compiled = 0
    for dtype in (torch.bfloat16, torch.float32):
        for sizes in SIZES:
            for call in calls(dtype, sizes):
                with launching.recording(ARCHITECTURE) as launches:
                    result = call()
                    if result.requires_grad:
                        result.sum().backward()
                for launch in launches:
                    aot.compile_for(launch, ARCHITECTURE)
                    compiled += 1
    print(compiled)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_at_sizes_of_one() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


if __name__ == "__main__":
    main()
