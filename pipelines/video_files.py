"""Video files through PyAV: which frames one holds, and the pixels of some of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def read_timestamps(path: str | Path) -> tuple[int, ...]:
    """Presentation times of the frames of a video file, ascending, in its stream's time base."""
    raise NotImplementedError


def read_frames(path: str | Path, timestamps: Sequence[int]) -> list[NDArray[np.uint8]]:
    """The frames shown at `timestamps` (ascending), RGB uint8 `[h,w,3]` each."""
    raise NotImplementedError
