"""`smtc data …`: each command's flags and what it calls."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smtc.cli_parsing import DESCRIBE, TRAINING, Described, parse, parse_config, take


@dataclass(frozen=True, kw_only=True)
class _Synthesize:
    """Write synthetic videos of textured moving objects with exact masks, in the DAVIS layout.

    For example: smtc data synthesize data/videos --videos 64 --difficulty hard
    """

    folder: tyro.conf.Positional[Path]
    """Where they go; a set of the same settings that is there already is kept."""
    videos: int = 256
    frames: int = 8
    """Of each video."""
    size: int = 96
    """Pixels on a side."""
    seed: int = 0
    difficulty: Literal["standard", "instances", "hard"] = "standard"
    """standard: categories differ; instances: several of one category, occluding; hard: also
    changing light and a fast camera."""


@dataclass(frozen=True, kw_only=True)
class _Inspect:
    """Read every file of a data folder once and say what is there and what is broken.

    For example: smtc data inspect videos

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

    For example: smtc data pack videos --size 256

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


@dataclass(frozen=True, kw_only=True)
class _Preview:
    """Draw the clips that a training run would see: both views, all frames.

    For example: smtc data preview videos --preset paper --data.augment.crop 0.3 1

    After the folder comes any flag of `smtc train`, but for its --output.
    """

    folder: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = None
    """A folder of videos, as for --data; the preset's or the settings file's when not given."""
    output: Path = Path("preview.png")
    """The picture; one that an earlier preview wrote is replaced."""
    clips: int = 4
    """How many."""
    step: int = 0
    """Which step of the run, from 0."""


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
    from smtc.pipelines.inspection import inspect_folder

    sys.exit(inspect_folder(**vars(settings)))


def _data_pack(arguments: list[str]) -> None:
    """decode every frame once, into files that train faster"""
    settings = parse(_Pack, "data pack", arguments)
    from smtc.pipelines.packing import pack

    pack(**vars(settings))


def _data_preview(arguments: list[str]) -> None:
    """a picture of the clips that a training run will see"""
    if arguments == [DESCRIBE]:
        raise Described(_Preview, *TRAINING)
    if {"-h", "--help"} & set(arguments):
        arguments = ["--help"]
    own, arguments = _taken(("--output", "--clips", "--step"), arguments)
    of_training, arguments = _taken(("--preset", "--config"), arguments)
    if arguments and (arguments[0] == "--help" or not arguments[0].startswith("-")):
        own.append(arguments[0])
        arguments = arguments[1:]
    settings = parse(_Preview, "data preview", own)
    data = [] if settings.folder is None else ["--data", settings.folder]
    config = parse_config([*of_training, *arguments, *data])

    from smtc.pipelines.preview import augmentation, preview
    from smtc.training.trainer import pick_device

    device = pick_device(config.train.device)
    picture = preview(
        config, settings.output, clips=settings.clips, step=settings.step, device=device
    )
    print(augmentation(config.data))
    if config.method == "warm_start":
        print(f"Not shown: whole batches are grey at chance {config.warm_start.grayscale:g}.")
    print(f"What step {settings.step} sees is in {picture}.")


def _taken(flags: tuple[str, ...], arguments: list[str]) -> tuple[list[str], list[str]]:
    """Those of `flags` that are given, and the other arguments."""
    found = []
    for flag in flags:
        value, arguments = take(flag, arguments)
        found += [] if value is None else [f"{flag}={value}"]
    return found, arguments


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "data synthesize": _data_synthesize,
    "data inspect": _data_inspect,
    "data preview": _data_preview,
    "data pack": _data_pack,
}
