"""What a run tells while it goes: a progress bar, JSON lines, TensorBoard scalars and pictures."""

import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from smtc.progress import bar
from smtc.training import distributed
from smtc.training.distributed import World
from smtc.visualize import Pixels

_NOTEWORTHY_WAIT = 0.05  # of the time: more is shown beside the loss
_MEGABYTE = 10**6


class Telemetry:
    """Collects the scalars of steps on the device and reads them only when a step is logged.

    Every process of `world` collects; what is read is the mean over them, and the main one writes.
    """

    def __init__(
        self, folder: Path, *, steps: int, start: int, title: str, world: World | None = None
    ) -> None:
        self._world = world or World(torch.device("cpu"))
        self._lines: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._thread_errors = threading.excepthook
        if self._world.main:
            threading.excepthook = self._tell_thread_error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
            try:
                self._lines = _reopen(folder / "metrics.jsonl", start)
            except OSError:
                self._board.close()
                raise
        self._bar = bar(
            total=steps, title=title, unit="step", initial=start, shown=self._world.main
        )
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._clips = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, scalars: dict[str, Tensor], *, clips: int, waited: float) -> None:
        """Count one step: its scalars (left on the device), the clips of this process, the seconds
        it waited for data.
        """
        for name, value in scalars.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._clips += clips
        self._waited += waited
        self._bar.update()

    def log(self, step: int, extra: dict[str, float]) -> dict[str, float]:
        """Write the means since the last log under `step`; returns them. This is where the host
        waits.
        """
        means = distributed.mean(torch.stack(list(self._sums.values())) / self._steps)
        values = dict(zip(self._sums, means.tolist(), strict=True))
        elapsed = time.perf_counter() - self._since
        values |= extra
        values |= {
            "clips_per_s": self._world.size * self._clips / elapsed,
            "data_wait_share": self._waited / elapsed,
            "memory_mb": _peak_memory(self._world.device),
        }
        self._write(step, values)
        self._sums, self._steps, self._clips, self._waited = {}, 0, 0, 0.0
        self._since = time.perf_counter()
        return values

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._lines is None or self._board is None:
            return
        known = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        self._lines.write(json.dumps({"step": step, **known}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        shown = {"loss": f"{values['loss']:.3f}", "clips_per_s": f"{values['clips_per_s']:.1f}"}
        if values["data_wait_share"] > _NOTEWORTHY_WAIT:
            shown["waiting_for_data"] = f"{values['data_wait_share']:.0%}"
        self._bar.set_postfix(shown, refresh=False)

    def picture(self, step: int, name: str, pixels: Pixels) -> None:
        """Show RGB uint8 `[h,w,3]` in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block does not count as training time."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)  # steps that are still under way do count
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def _tell_thread_error(self, error: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread prints a traceback when a disk is full, which our own files tell.
        if type(error.thread).__module__.startswith("tensorboard") and isinstance(
            error.exc_value, OSError
        ):
            return
        self._thread_errors(error)

    def close(self) -> None:
        """Finish the bar and the files."""
        threading.excepthook = self._thread_errors
        self._bar.close()
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()


def _peak_memory(device: torch.device) -> float:
    """The most memory held so far, in MB: of tensors on a GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MEGABYTE
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MEGABYTE


def _reopen(path: Path, start: int) -> TextIO:
    """The metrics file, without what an interrupted run wrote after step `start`."""
    kept = [line for line in read_metrics(path) if line["step"] <= start]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
    return path.open("a", encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a run; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        if not isinstance(values, dict) or "step" not in values:
            break
        lines.append(values)
    return lines
