"""Clips decoded and augmented by OpenCV in worker processes: the loader that runs anywhere."""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from smtc.config import DataConfig
from smtc.errors import UserError
from smtc.pipelines.batch import Batch, Source
from smtc.pipelines.clips import ClipSampler, Schedule
from smtc.pipelines.faults import Faults, first_readable
from smtc.pipelines.frames import Frames, Pixels
from smtc.pipelines.views import ViewParameters, cut_frames, draw_views, recolour

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


@dataclass(frozen=True)
class _Made:
    """What a worker hands over: a batch and what went wrong on the way, or no batch and why."""

    step: int
    batch: Batch | None
    bad: list[tuple[str, str]] = field(default_factory=list)  # path, message
    replaced: int = 0
    error: str | None = None  # what should end the run; torch would bury it in a traceback

    def pin_memory(self) -> "_Made":
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class _Batches(Dataset[_Made]):
    """Step to batch; runs in the workers."""

    def __init__(
        self,
        config: DataConfig,
        schedule: Schedule,
        sampler: ClipSampler,
        frames: Frames,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self.config, self.schedule, self.sampler, self.frames = config, schedule, sampler, frames
        self.size, self.dtype = size, dtype
        self.closing = multiprocessing.get_context().Event()  # the workers are to end

    def __getitem__(self, step: int) -> _Made:
        try:
            return self._make(step)
        except UserError as error:
            return _Made(step, None, error=str(error))

    def _make(self, step: int) -> _Made:
        config, indices = self.config, self.schedule.samples(step)
        views = _empty((len(indices), 2, config.frames, 3, *self.size), self.dtype)
        spatial = torch.empty(len(indices), 2, 5) if config.spatial == "independent" else None
        sources: list[Source] = []
        bad: list[tuple[str, str]] = []
        replaced = 0
        for position, index in enumerate(indices):
            found, errors = first_readable(self.sampler, index, self.frames.read)
            bad += [(error.path, str(error)) for error in errors]
            if found is None:
                return _Made(step, None, bad, replaced)
            clip, frames = found
            replaced += bool(errors)
            drawn = draw_views(config, self.sampler.seed, index)
            self._write(frames, drawn, views[position])
            if spatial is not None:
                spatial[position] = torch.tensor([[*view.crop, view.flip] for view in drawn])
            sources.append(Source.of(clip))
        return _Made(step, Batch(views, sources, torch.tensor(indices), spatial), bad, replaced)

    def _write(
        self, frames: Sequence[Pixels] | Pixels, drawn: Sequence[ViewParameters], views: Tensor
    ) -> None:
        """Both views of a clip into `views` `[2,T,3,H,W]`."""
        config = self.config
        for number, view in enumerate(drawn):
            if number == 0 or config.spatial == "independent":
                cut = cut_frames(
                    frames, view, self.size, resize=config.resize, antialias=config.antialias
                )
            there = views[number].numpy() if self.dtype == torch.float32 else None
            made = recolour(cut, view, blur_kernel=config.augment.blur_kernel, out=there)
            if there is None:
                views[number] = torch.from_numpy(made)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In a worker in shared memory, where the trainer finds it without another copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # As torch's own collation does it; `share_memory_()` would first copy what is not there yet.
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


@contextmanager
def worker_deaths_told() -> Iterator[None]:
    """A worker that was killed is a `UserError`.

    Torch raises its own error wherever the main thread is at that moment, so this belongs around
    whatever runs while a loader does.
    """
    try:
        yield
    except (ConnectionError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "A process that loads data was killed, perhaps for want of memory; use fewer "
            "--data.workers or a smaller --data.prefetch."
        ) from error


class TorchLoader:
    """The batches of a schedule, the same whatever the number of workers.

    Views are of `size` (H, W) and of `dtype`. A clip with an unreadable file is replaced by another
    one; each such file is reported once. `UserError`: no readable clip, more than
    `config.max_bad_share` of the clips replaced, or what `frames` raises.
    """

    def __init__(
        self,
        config: DataConfig,
        schedule: Schedule,
        sampler: ClipSampler,
        frames: Frames,
        faults: Faults,
        *,
        size: tuple[int, int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.faults = faults
        self._steps = schedule.remaining
        batches = _Batches(config, schedule, sampler, frames, size, dtype)
        self._closing = batches.closing
        weakref.finalize(self, self._closing.set)  # also where nobody calls `close`
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=self._steps,
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            worker_init_fn=_prepare_worker,
            pin_memory=torch.cuda.is_available(),
        )
        self._running: Iterator[_Made] | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        """Start at the first step; an earlier iteration that was left midway ends."""
        self.close()
        self._closing.clear()
        self._running = iter(self._loader)
        return self

    def __next__(self) -> Batch:
        if self._running is None:
            raise StopIteration
        try:
            with worker_deaths_told():
                made = next(self._running, None)
            return self._checked(made)
        except BaseException:
            self.close()
            raise

    def _checked(self, made: _Made | None) -> Batch:
        if made is None:
            self.faults.finish()
            raise StopIteration
        self.faults.report(made.step, made.bad)
        if made.error is not None:
            raise UserError(made.error)
        if made.batch is None:
            raise self.faults.none_readable()
        self.faults.count(len(made.batch.sources), made.replaced)
        return made.batch

    def close(self) -> None:
        """End the worker processes."""
        self._closing.set()
        self._running = None  # the last reference: torch's iterator stops its workers as it goes


def _prepare_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    _keep_freed_memory()
    _die_with_parent()
    _leave_signals_to_the_parent()


def _keep_freed_memory() -> None:
    """Without it glibc returns each decoded frame's memory to the kernel and asks for fresh, zeroed
    pages for the next, which takes a sixth of the time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**28)


def _die_with_parent() -> None:
    """Also in the middle of a read that never ends, where torch's own watch does not look."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave_signals_to_the_parent() -> None:
    """A terminal or a scheduler signals all processes at once, and the parent may want to end its
    step and to save first; torch terminates a worker that hangs when the loader closes.
    """
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, _Batches)
    closing = info.dataset.closing
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1) if closing.is_set() else None)
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
