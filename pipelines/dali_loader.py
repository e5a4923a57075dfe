"""Clips decoded and augmented by DALI, on a GPU or on a CPU."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smtc.config import DataConfig
from smtc.errors import UserError
from smtc.pipelines.batch import Batch, Source
from smtc.pipelines.cache import PackedFrames
from smtc.pipelines.clips import ClipSampler, Schedule
from smtc.pipelines.dali import DaliViews, Inputs, obstacle
from smtc.pipelines.dali_plans import Plan, Planner
from smtc.pipelines.faults import Faults

_PLANNERS = 4  # threads at least: a slow disk is asked for several steps at once


class DaliLoader:
    """The batches of a schedule, the same whatever the numbers of threads and of batches ahead.

    Views are of `size` (H, W) and of `dtype`. On a GPU they lie in one and the same tensor, which
    the current stream fills anew for each batch while the host goes on; on a CPU each batch is its
    own. Frames come from image files, decoded by DALI; from video files, decoded by DALI on a GPU
    and by PyAV for a CPU; or from `packed`. `known_bad` are files that are not to be read (path to
    reason).

    A clip with an unreadable file is replaced as by the torch loader. Before a step is given to
    DALI, the ends of its image files are looked at; what only shows when it is decoded costs one
    rebuilding of the graph, and then the file counts as bad. `UserError`: DALI cannot run here or
    fails for no fault of a file, no readable clip, more than `config.max_bad_share` of the clips
    replaced, or damaged packed frames.
    """

    def __init__(
        self,
        config: DataConfig,
        schedule: Schedule,
        sampler: ClipSampler,
        faults: Faults,
        *,
        size: tuple[int, int],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        known_bad: Mapping[str, str] | None = None,
        packed: PackedFrames | None = None,
    ) -> None:
        self._device = torch.device(device)
        if reason := obstacle(self._device):
            raise UserError(f"{reason}; use --data.loader torch.")
        if config.roi_decode and config.spatial == "independent":
            raise UserError(
                "data.roi-decode decodes one window of a frame, and data.spatial=independent "
                "wants two; switch one of them off."
            )
        self.faults = faults
        self._config, self._schedule, self._size, self._dtype = config, schedule, size, dtype
        self._packed = packed
        self._planner = Planner(
            *(config, schedule, sampler),
            device=self._device,
            known_bad=known_bad or {},
            packed=packed,
        )
        self._threads = max(_PLANNERS, config.workers)
        self._pool: ThreadPoolExecutor | None = None
        self._unplanned: Iterator[int] = iter(())
        self._planned: deque[Future[Plan]] = deque()
        self._running: deque[Plan] = deque()  # what the graph has been fed
        self._graph: DaliViews | None = None
        self._failed_at: int | None = None  # the step at which the graph failed for no known reason
        self._static: Tensor | None = None  # the batch tensor on a GPU
        self._resident: dict[str, Tensor] = {}  # all packed frames, on a GPU
        self._gathering: Any = None  # the stream that picks those of a batch

    def __len__(self) -> int:
        return len(self._schedule.remaining)

    def __iter__(self) -> Iterator[Batch]:
        """Start at the first step; an earlier iteration that was left midway ends."""
        self._stop()
        if self._planner.content == "gpu_frames" and not self._resident:
            self._fill_gpu()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="smtc-plan")
        self._plan_from(self._schedule.start_step)
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            raise StopIteration
        try:
            return self._next()
        except StopIteration:
            self._stop()
            raise
        except BaseException:
            # A disk that hangs may be why; what is to be saved then should not wait for it.
            self._stop(wait=False)
            raise

    def close(self) -> None:
        """End the threads and free the memory."""
        self._stop()
        self._static = self._gathering = None
        self._resident.clear()

    def _stop(self, *, wait: bool = True) -> None:
        self._graph = None
        self._running.clear()
        self._planned.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=True)
            self._pool = None

    def _next(self) -> Batch:
        while True:
            self._feed(wait=True)
            if not self._running:
                self._end()
            try:
                views = self._take()
                break
            except RuntimeError as error:
                self._recover(error)
        self._failed_at = None
        plan = self._running.popleft()
        self.faults.report(plan.step, plan.bad)
        self.faults.count(len(plan.clips), plan.replaced)
        self._feed(wait=False)
        sources = [Source.of(clip) for clip in plan.clips]
        index = torch.tensor([clip.index for clip in plan.clips])
        spatial = None if plan.spatial is None else self._moved(plan.spatial)
        return Batch(views, sources, self._moved(index), spatial)

    def _end(self) -> None:
        """Raise what there is to raise after the last batch."""
        if not self._planned:
            self.faults.finish()
            raise StopIteration
        plan = self._planned[0].result()  # or what planning it raised
        self.faults.report(plan.step, plan.bad)
        raise self.faults.none_readable()

    def _plan_from(self, step: int) -> None:
        """Plan anew from `step` on."""
        for future in self._planned:
            future.cancel()
        self._planned.clear()
        self._unplanned = iter(range(step, self._schedule.remaining.stop))
        self._plan_ahead()

    def _plan_ahead(self) -> None:
        assert self._pool is not None
        while len(self._planned) < self._config.prefetch + self._threads:
            step = next(self._unplanned, None)
            if step is None:
                break
            self._planned.append(self._pool.submit(self._planner.plan, step))

    def _next_plan(self, *, wait: bool) -> Plan | None:
        """The next step's plan; None where there is none yet, or where the run will end with it."""
        if not self._planned or not (wait or self._planned[0].done()):
            return None
        future = self._planned[0]
        if future.exception() is not None or not future.result().complete:
            return None
        self._planned.popleft()
        self._plan_ahead()
        return future.result()

    def _feed(self, *, wait: bool) -> None:
        """Give the graph the plans that there are; may `wait` for one if it has nothing to do."""
        gathering = torch.cuda.stream(self._gathering) if self._gathering else nullcontext()
        with gathering:
            if self._graph is None:
                self._start()
                return
            while len(self._running) < self._graph.depth:
                plan = self._next_plan(wait=wait and not self._running)
                if plan is None:
                    break
                self._graph.add(self._inputs(plan))
                self._running.append(plan)

    def _start(self) -> None:
        while len(self._running) < self._config.prefetch:
            plan = self._next_plan(wait=True)
            if plan is None:
                break
            self._running.append(plan)
        if self._running:
            frames = self._config.frames if self._planner.content == "images" else 1
            self._graph = DaliViews(
                *(self._config, self._planner.content),
                size=self._size,
                samples=self._schedule.batch * frames,
                device=self._device,
                depth=len(self._running),
            )
            self._graph.start([self._inputs(plan) for plan in self._running])

    def _take(self) -> Tensor:
        """The views of the next step."""
        assert self._graph is not None
        views = self._static
        if views is None:
            shape = (self._schedule.batch, 2, self._config.frames, 3, *self._size)
            views = torch.empty(shape, dtype=self._dtype, device=self._device)
            if self._device.type == "cuda":
                self._static = views
        self._graph.take(views)
        return views

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _recover(self, error: RuntimeError) -> None:
        """Find the files that the graph failed at, and start anew where it was."""
        step = self._running[0].step
        self._graph = None
        found = self._planner.find_bad_files(self._running)
        if not found and self._failed_at == step:
            reason = str(error).partition("encountered:")[2].strip() or str(error)
            raise UserError(
                f"DALI failed at step {step}, and no file is to blame: {reason.splitlines()[0]}. "
                "Use --data.loader torch."
            ) from error
        # With nothing found, it may have been a disk that failed for a moment: once more, then.
        self._failed_at = None if found else step
        self._running.clear()
        self._plan_from(step)

    def _fill_gpu(self) -> None:
        """Copy all packed frames to the GPU."""
        assert self._packed is not None
        try:
            for name, frames in self._packed.arrays():
                self._resident[name] = torch.from_numpy(np.array(frames)).to(self._device)
        except torch.OutOfMemoryError:
            self._resident.clear()
            raise UserError(
                f"The packed frames ({self._packed.total_bytes / 2**30:.1f} GiB) do not fit into "
                "the GPU's memory; use data.cache-memory=host."
            ) from None
        self._gathering = torch.cuda.Stream(self._device)

    def _inputs(self, plan: Plan) -> Inputs:
        """What the graph is fed."""
        if self._planner.content != "gpu_frames":
            return plan.inputs
        frames = [
            self._resident[clip.video.name][clip.start : clip.frames[-1] + 1 : clip.gap]
            for clip in plan.clips
        ]
        return plan.inputs | {"frames": [picked.contiguous() for picked in frames]}
