"""Commands on models: each one's flags and what it calls."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from smtc.cli_parsing import parse


@dataclass(frozen=True, kw_only=True)
class _Convert:
    """Turn a DINO, MoCo or SMTC authors' checkpoint into a model folder of ours."""

    file: tyro.conf.Positional[Path]
    folder: tyro.conf.Positional[Path]


def _convert(arguments: list[str]) -> None:
    """a DINO, MoCo or authors' checkpoint to a model folder"""
    settings = parse(_Convert, "convert", arguments)
    from smtc.weights import convert

    print(convert(settings.file, settings.folder))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "convert": _convert,
}
