"""Which loader a run uses, and what all of them have in common."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from smtc.config import DataConfig
from smtc.errors import UserError
from smtc.pipelines.batch import Batch
from smtc.pipelines.clips import ClipSampler, Schedule, find_videos
from smtc.pipelines.faults import Faults
from smtc.pipelines.frames import FileFrames
from smtc.pipelines.torch_loader import TorchLoader

_LOG = logging.getLogger("smtc")


class Loader(Protocol):
    """Batches of a schedule's steps. Iterating starts at its first step, each time anew."""

    faults: Faults

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None:
        """End its processes and threads."""


def build_loader(
    config: DataConfig,
    schedule: Schedule,
    *,
    size: tuple[int, int],
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    bad_file_log: Path | None = None,
) -> Loader:
    """The loader that `config.loader` names, for views of `size` (H, W).

    Batches come in `dtype`; those of DALI lie on `device`, the others in page-locked memory where
    there is CUDA. Bad files are recorded in `bad_file_log`. `UserError`: no data, no usable videos,
    or a loader that cannot run here.
    """
    if config.root is None:
        raise UserError("Which videos should be loaded? Give --data FOLDER.")
    sampler = ClipSampler(
        find_videos(config.root),
        frames=config.frames,
        gap=config.gap,
        random_gap=config.random_gap,
        seed=seed,
    )
    faults = Faults(config, bad_file_log)
    return TorchLoader(config, schedule, sampler, FileFrames(), faults, size=size, dtype=dtype)
