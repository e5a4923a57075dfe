"""From arguments to typed settings: flags, presets and TOML files; mistakes become one sentence."""

import contextlib
import io
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import tyro

from smtc import presets
from smtc.config import Config, from_dict, to_dict
from smtc.errors import UserError

Settings = TypeVar("Settings")

_SHORT_NAMES = {"--data": "--data.root"}


def parse(kind: type[Settings], command: str, arguments: list[str], **options: Any) -> Settings:
    """Typed settings from flags; what is wrong with them becomes one sentence."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, prog=f"smtc {command}", args=arguments, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_unboxed(box.getvalue())) from None


def _unboxed(text: str) -> str:
    """The words of the frame that tyro draws around an error, on one line."""
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())
    return words.removeprefix("Value error ").removeprefix("Unrecognized options ")


def parse_config(arguments: list[str]) -> Config:
    """The config of `smtc train`'s arguments: a preset, then a TOML file, then flags."""
    preset, arguments = take("--preset", arguments)
    file, arguments = take("--config", arguments)
    changes = {} if file is None else _read_toml(Path(file))
    in_file = changes.pop("preset", "fixed")
    default = presets.get(str(in_file if preset is None else preset))
    default = from_dict(Config, _overlay(to_dict(default), changes))
    arguments = [_long_name(argument) for argument in arguments]
    description = (
        "Train on a folder of videos, or go on with the run in the output folder.\n\n"
        f"--preset NAME starts from a preset ({', '.join(presets.PRESETS)}; fixed when not given) "
        "and --config FILE.toml changes it; the flags below win over both. "
        "--data DIR is short for --data.root DIR."
    )
    return parse(Config, "train", arguments, description=description, default=default)


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


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = _underscored(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"The settings file {path} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The settings file {path} is no valid TOML: {error}.") from error
    if isinstance(values.get("data"), str):  # the short name, as on the command line
        values["data"] = {"root": values["data"]}
    return values


def _underscored(values: dict[str, Any]) -> dict[str, Any]:
    """Keys may be written as on the command line, with dashes."""
    return {
        key.replace("-", "_"): _underscored(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }


def _overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _overlay(merged[key], value)
        else:
            merged[key] = value
    return merged
