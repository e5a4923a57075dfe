"""`smtc data …`: each command's flags and what it calls."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from smtc.cli_parsing import parse


@dataclass(frozen=True, kw_only=True)
class _Synthesize:
    """Write synthetic videos of textured moving objects with exact masks, in the DAVIS layout."""

    folder: tyro.conf.Positional[Path]
    videos: int = 256
    frames: int = 8
    size: int = 96
    """Pixels on a side."""
    seed: int = 0
    difficulty: Literal["standard", "instances", "hard"] = "standard"
    """standard: categories differ; instances: several of one category, occluding; hard: also
    changing light and a fast camera."""


@dataclass(frozen=True, kw_only=True)
class _Inspect:
    """Read every file of a data folder once and say what is there and what is broken.

    Writes a manifest that the loaders use; exits with 1 when a file is broken.
    """

    folder: tyro.conf.Positional[Path]
    """A folder of videos, as for --data."""
    output: Path | None = None
    """Where the manifest goes (give it to `smtc train` as --data.cache); a folder under
    $XDG_CACHE_HOME/smtc, where it is found, when not given."""
    frames: int = 4
    """A video with fewer frames is too short."""
    workers: int | None = None
    """Processes; one a core when not given."""


@dataclass(frozen=True, kw_only=True)
class _Pack:
    """Decode and resize every frame once, into files that train faster.

    Goes on where an earlier call stopped.
    """

    folder: tyro.conf.Positional[Path]
    """A folder of videos, as for --data."""
    output: Path | None = None
    """Where the frames go (give it to `smtc train` as --data.cache); a folder under
    $XDG_CACHE_HOME/smtc, where they are found, when not given."""
    size: int = 256
    """Pixels on a side."""
    keep_aspect: bool = False
    """Only the shorter side gets `size` pixels."""
    antialias: bool = False
    """Filter before shrinking, as data.antialias does."""
    workers: int | None = None
    """Processes; one a core when not given."""


def _data_synthesize(arguments: list[str]) -> None:
    """write synthetic videos with masks"""
    settings = parse(_Synthesize, "data synthesize", arguments)
    from smtc.pipelines.synthetic import synthesize

    synthesize(
        settings.folder,
        videos=settings.videos,
        frames=settings.frames,
        size=settings.size,
        seed=settings.seed,
        difficulty=settings.difficulty,
    )
    print(f"{settings.videos} videos are in {settings.folder}.")


def _data_inspect(arguments: list[str]) -> None:
    """verify every file of a data folder"""
    settings = parse(_Inspect, "data inspect", arguments)
    from smtc.pipelines.manifest import inspect_folder

    sys.exit(inspect_folder(**vars(settings)))


def _data_pack(arguments: list[str]) -> None:
    """decode every frame once, into files that train faster"""
    settings = parse(_Pack, "data pack", arguments)
    from smtc.pipelines.cache import pack

    pack(**vars(settings))


def _data_preview(arguments: list[str]) -> None:
    """a picture of the clips that a training run will see"""
    from smtc.pipelines.preview import preview

    preview(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "data synthesize": _data_synthesize,
    "data inspect": _data_inspect,
    "data preview": _data_preview,
    "data pack": _data_pack,
}
