"""Arguments of `smtc` that several test files use."""

import dataclasses
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


def changed(config: Any, settings: dict[str, Any]) -> Any:
    """`config` with other values for dotted settings ("train.steps")."""
    for name, value in settings.items():
        first, _, rest = name.partition(".")
        if rest:
            value = changed(getattr(config, first), {rest: value})
        config = dataclasses.replace(config, **{first: value})
    return config


def tree(folder: Path) -> list[str]:
    """Everything under `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
