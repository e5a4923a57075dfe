"""A stand-in for CUDA graphs on a CPU.

It freezes what a real one freezes: which operations run, the numbers among their arguments, and the
places of all tensors that they read and write. As in a real recording nothing that is recorded
changes a tensor that was there before, and what would make the host wait is refused.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smtc.training import graphs

WAITING = ("_local_scalar_dense", "nonzero", "equal", "unique", "masked_select", "lift_fresh")
"""Parts of the names of operations that copy between host and device, or wait."""


CPU_ONLY = {("model.py", "_check"), ("ops.py", "correlation_projection")}
"""Functions that look at a tensor's values where it lies on a CPU; test_no_sync.py watches them."""


class WaitsError(RuntimeError):
    """What CUDA says of an operation that a graph cannot hold."""


class Recording(TorchDispatchMode):
    """Notes all operations of a block, and brings the tensors back that they changed."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._made: set[int] = set()  # storages that the recording itself allocated
        self._former: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        named = named or {}
        if any(word in function.name() for word in WAITING) and not _on_a_cpu_alone():
            raise WaitsError(f"{function.name()} is not permitted when a stream is recording")
        given = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
        if function._schema.is_mutable:
            for tensor in given:
                if _place(tensor) not in self._made and _place(tensor) not in self._former:
                    whole = tensor.detach().clone()
                    self._former[_place(tensor)] = tensor.detach(), whole
        found = function(*arguments, **named)
        places = {_place(tensor) for tensor in given}
        new = [
            leaf
            for leaf in tree_leaves(found)
            if isinstance(leaf, Tensor) and _place(leaf) not in places
        ]
        self._made |= {_place(tensor) for tensor in new}
        if new or function._schema.is_mutable:
            self._operations.append((function, arguments, named, [t.detach() for t in new]))
        return found

    def undo(self) -> None:
        """As a recording changes nothing."""
        for tensor, whole in self._former.values():
            tensor.copy_(whole)

    @torch.no_grad()
    def replay(self) -> None:
        """Do the same operations on the same places."""
        for function, arguments, named, new in self._operations:
            found = [leaf for leaf in tree_leaves(function(*arguments, **named))]
            fresh = [leaf for leaf in found if isinstance(leaf, Tensor)][-len(new) :] if new else []
            for kept, value in zip(new, fresh, strict=True):
                kept.copy_(value)


def _on_a_cpu_alone() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if (Path(frame.f_code.co_filename).name, frame.f_code.co_name) in CPU_ONLY:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Streams:
    """Streams that only note who waited for whom and what ran where."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.current = "main"

    def make(self, name: str) -> Any:
        streams = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                streams.events.append(f"{name} waits for {other.name}")

        stream = Stream()
        stream.name = name  # type: ignore[attr-defined]
        return stream

    @contextlib.contextmanager
    def inside(self, stream: Any) -> Iterator[None]:
        former, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = former


def stand_in(monkeypatch: pytest.MonkeyPatch) -> tuple[Streams, list[Recording]]:
    """Put recordings and streams in the place of CUDA's; returns what fills as they are used."""
    streams, made = Streams(), []

    def record(compute: Callable[[], Tensor], stream: Any) -> Callable[[], Tensor]:
        recording = Recording()
        with streams.inside(stream), recording:
            kept = compute()
        recording.undo()
        kept.detach().fill_(float("nan"))
        made.append(recording)

        def replay() -> Tensor:
            streams.events.append(f"replay on {streams.current}")
            recording.replay()
            return kept

        return replay

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: streams.make("side"))
    monkeypatch.setattr(torch.cuda, "stream", streams.inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.make(streams.current))
    return streams, made
