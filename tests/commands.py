"""Arguments of `smtc` that several test files use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from smtc.config import Config

TinyConfig = Callable[..., Config]
Command = Callable[..., Any]


def train_flags(data: object, output: object, *more: object) -> list[object]:
    """A run of two tiny steps; later flags win."""
    small = "--model.resolution 32 32 --train.steps 2 --train.batch 2 --data.workers 0"
    start = ["train", "--preset", "tiny", "--data", data, "--output", output]
    return [*start, *small.split(), "--train.device", "cpu", "--train.log-every", 1, *more]


def frames_of(data: Path, video: str) -> Path:
    """A video's folder in the DAVIS layout."""
    return data / "JPEGImages" / "480p" / video


def tree(folder: Path) -> list[str]:
    """Everything under `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
