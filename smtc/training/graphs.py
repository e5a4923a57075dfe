"""A whole step as one CUDA graph: recorded once, then replayed on new clips.

The first steps of a stage run as usual, on a side stream, so that whatever is made at a first call
(compiled kernels, optimiser states, buckets of gradients) is there before the recording. They are
steps of the training like any other. The recording itself changes nothing; its replay does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smtc.pipelines.batch import Batch

WARM_UP, WARM_UP_PARALLEL = 3, 11
"""Steps before the recording; DistributedDataParallel rebuilds its buckets within the first ten."""

Compute = Callable[[Iterator[Batch]], dict[str, Tensor]]


def record(compute: Callable[[], Tensor], stream: torch.cuda.Stream) -> Callable[[], Tensor]:
    """`compute` as a graph; each call of the result replays it and gives the same tensor anew."""
    graph = torch.cuda.CUDAGraph()
    # Loaders and communication go on in threads of their own while this one records.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        kept = compute()

    def replay() -> Tensor:
        graph.replay()
        return kept

    return replay


@dataclass
class _Recorded:
    names: list[str]
    replay: Callable[[], Tensor]


class Graphed:
    """`compute`, warmed up, recorded and replayed on `parts` batches that never move."""

    def __init__(
        self, compute: Compute, parts: int, stream: torch.cuda.Stream, *, parallel: bool
    ) -> None:
        self._compute, self._parts, self._stream = compute, parts, stream
        self._left = WARM_UP_PARALLEL if parallel else WARM_UP
        self._places: list[Batch] = []
        self._recorded: _Recorded | None = None

    def __call__(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Scalars of the step on the next `parts` of `batches`, in memory of their own."""
        self._take_in(batches)
        if self._recorded is None and self._left > 0:
            self._left -= 1
            return self._warm_up()
        if self._recorded is None:
            self._recorded = self._record()
        # The graph writes to the same place each time, and a log may add up many steps.
        return dict(zip(self._recorded.names, self._recorded.replay().clone(), strict=True))

    def _take_in(self, batches: Iterator[Batch]) -> None:
        """Copy the next batches to where the graph reads them."""
        for part in range(self._parts):
            batch = next(batches)
            if part == len(self._places):
                self._places.append(_like(batch))
            place = self._places[part]
            for name in ("views", "index", "spatial"):
                value = getattr(batch, name)
                if value is not None:
                    getattr(place, name).copy_(value, non_blocking=True)

    def _warm_up(self) -> dict[str, Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            found = self._compute(iter(self._places))
        torch.cuda.current_stream().wait_stream(self._stream)
        return found

    def _record(self) -> _Recorded:
        names: list[str] = []

        def computed() -> Tensor:
            found = self._compute(iter(self._places))
            names.extend(found)
            return torch.stack([value.float() for value in found.values()])

        return _Recorded(names, record(computed, self._stream))


def _like(batch: Batch) -> Batch:
    """Room for batches like this one."""
    spatial = None if batch.spatial is None else torch.empty_like(batch.spatial)
    return replace(
        batch,
        views=torch.empty_like(batch.views),
        index=torch.empty_like(batch.index),
        spatial=spatial,
        sources=[],
    )
