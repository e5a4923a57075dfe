"""Starting Triton kernels: on a GPU, in Triton's interpreter, or on paper for `aot.py`.

Every kernel of the package starts through `launch`, so that one place knows what runs: a test can
`watch` it, and `recording` writes the launches of meta tensors down for ahead-of-time compilation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 was set when triton was first imported: kernels then run on a CPU."""


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as written down."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(repr=False)
    flops: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__


_watchers: list[Callable[[Launch], None]] = []
_recorded_architecture: str | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, flops: int = 0, **options: Any
) -> None:
    """Start `kernel` on `grid`; an empty grid starts nothing.

    Args:
        kernel: a `triton.jit` function.
        grid: one to three sizes.
        arguments: its tensors and numbers, in order; the first is a tensor, and the kernel runs on
            its device.
        flops: what its matrix products cost in all, for the roofline of `aot.py`.
        options: its constexpr arguments, `num_warps` and `num_stages`.
    """
    if 0 in grid:
        return
    for watcher in _watchers:
        watcher(Launch(kernel, grid, arguments, options, flops))
    if _recorded_architecture is not None:
        return
    if INTERPRETED:
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(arguments[0].device):
        kernel[grid](*arguments, **options)


@contextmanager
def watch() -> Iterator[list[Launch]]:
    """The launches of the block, filled as they happen."""
    seen: list[Launch] = []
    _watchers.append(seen.append)
    try:
        yield seen
    finally:
        _watchers.remove(seen.append)


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """As `watch`, but nothing runs, and the launch table answers for `architecture` ("sm_90")."""
    global _recorded_architecture
    _recorded_architecture = architecture
    try:
        with watch() as seen:
            yield seen
    finally:
        _recorded_architecture = None


def is_recording() -> bool:
    """Whether launches are only written down."""
    return _recorded_architecture is not None


def architecture(tensor: Tensor) -> str:
    """The key of the launch table for the device of `tensor`: "sm_90", or "interpreter"."""
    if _recorded_architecture is not None:
        return _recorded_architecture
    if INTERPRETED:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return f"sm_{major}{minor}"
