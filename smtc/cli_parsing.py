"""From arguments to typed settings: flags, presets and TOML files; mistakes become one sentence."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from smtc import presets
from smtc.cli_mistakes import sentence
from smtc.config import Config
from smtc.errors import UserError
from smtc.settings_file import SettingsFile

Settings = TypeVar("Settings")

_SHORT_NAMES = {"--data": "--data.root"}

DESCRIBE = "--describe-flags"
"""As a command's only argument: it raises `Described` instead of running."""


class Described(Exception):  # noqa: N818
    """The classes that a command reads its flags into."""

    def __init__(self, *kinds: type) -> None:
        super().__init__(kinds)
        self.kinds = kinds


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What `smtc train` takes besides the settings themselves."""

    preset: str
    config: Path
    data: Path


TRAINING = (_Start, Config)
"""What describes the flags of training."""


def parse(kind: type[Settings], command: str, arguments: list[str], **options: Any) -> Settings:
    """Typed settings from flags; what is wrong with them becomes one sentence."""
    if arguments == [DESCRIBE]:
        raise Described(kind)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, prog=f"smtc {command}", args=arguments, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(sentence(box.getvalue(), kind, arguments)) from None


def parse_config(arguments: list[str]) -> Config:
    """The config of `smtc train`'s arguments: a preset, then a TOML file, then flags."""
    if arguments == [DESCRIBE]:
        raise Described(*TRAINING)
    preset, arguments = take("--preset", arguments)
    file, arguments = take("--config", arguments)
    default = _default(preset, None if file is None else SettingsFile(Path(file)))
    arguments = [_long_name(argument) for argument in arguments]
    description = (
        "Train on a folder of videos, or go on with the run in the output folder.\n\n"
        "For example: smtc train --data videos --output runs/mine --model.backbone.weights dino\n\n"
        f"--preset NAME starts from a preset ({', '.join(presets.PRESETS)}; fixed when not given) "
        "and --config FILE.toml changes it; the flags below win over both. "
        "--data DIR is short for --data.root DIR."
    )
    return parse(Config, "train", arguments, description=description, default=default)


def _default(preset: str | None, file: SettingsFile | None) -> Config:
    """The settings that flags change: those of the preset, changed by the file."""
    if file is None:
        return presets.get(preset or "fixed")
    if preset is not None or file.preset is None:
        return file.over(presets.get(preset or "fixed"))
    try:
        start = presets.get(file.preset)
    except UserError as error:
        raise UserError(file.at("preset", str(error))) from None
    return file.over(start)


def take(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `flag` and the other arguments; the flag may be written `--flag=value`."""
    value, others, waiting = None, [], False
    for argument in arguments:
        if waiting:
            value, waiting = argument, False
        elif argument == flag:
            waiting = True
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
        else:
            others.append(argument)
    if waiting:
        raise UserError(f"{flag} needs a value.")
    return value, others


def _long_name(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return _SHORT_NAMES.get(name, name) + equals + value
