"""The TOML file of `--config`: read, laid over a preset, its mistakes told with their line."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smtc.config import Config, flatten, from_dict, to_dict
from smtc.errors import UserError

_PATHS = {"data.root", "data.cache", "eval.data", "init", "output", "model.backbone.weights"}
"""Settings in which a leading `~/` is the home folder."""

_KEY = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*\[{{1,2}}\s*({_DOTTED})\s*\]")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=")
_FAULT = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)
_NAMED_FIRST = re.compile(r"[a-z][\w.-]*(?= )")
_HINTS = {
    "invalid value": "; text stands in quotes",
    r"illegal character '\n'": "; a text has no quote at its end",
}


class SettingsFile:
    """The settings of a TOML file, whose keys may be written with dashes, as flags are.

    `preset` names the preset they are laid over; `data = "videos"` is short for `data.root`.
    Errors: `UserError` where the file cannot be read or is no TOML.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        text = _read(path)
        try:
            values = _underscored(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise UserError(_syntax(path, text, error)) from None
        if isinstance(values.get("data"), str):
            values["data"] = {"root": values["data"]}
        self._written = dict(_written(text))
        self.preset: str | None = None
        if "preset" in values:
            self.preset = str(values.pop("preset"))
        self._values = values

    def over(self, config: Config) -> Config:
        """`config` with the file's settings; `UserError` with the line of one that is wrong."""
        known = to_dict(config)
        self._check_names(self._values, known, "")
        values = _overlay(known, self._values)
        for name in _PATHS:
            _expand_home(values, name)
        try:
            return from_dict(Config, values)
        except UserError as error:
            raise UserError(self._placed(str(error))) from None

    def at(self, name: str, sentence: str) -> str:
        """`sentence` after the file and, where it is found, the line that sets `name`."""
        while name and name not in self._written:  # inside of an inline table
            name = name.rpartition(".")[0]
        line = self._written.get(name, (0, ""))[0]
        return f"{self._path}, line {line}: {sentence}" if line else f"{self._path}: {sentence}"

    def _placed(self, sentence: str) -> str:
        """`sentence` with the line of the setting it starts with, called as the file calls it."""
        first = _NAMED_FIRST.match(sentence)
        name = first[0].replace("-", "_") if first else ""
        if first is None or name not in self._written:
            return self.at(name, sentence)
        return self.at(name, self._written[name][1] + sentence[first.end() :])

    def _check_names(self, values: dict[str, Any], known: dict[str, Any], table: str) -> None:
        """Refuse names that are no settings, and tables in place of settings or the reverse."""
        for key, value in values.items():
            name = f"{table}.{key}" if table else key
            if key not in known:
                raise UserError(self.at(name, self._unknown(key, value, known, table)))
            if isinstance(known[key], dict) != isinstance(value, dict):
                raise UserError(self.at(name, _other_kind(table, key, value, known[key])))
            if isinstance(value, dict):
                self._check_names(value, known[key], name)

    def _unknown(self, key: str, value: Any, known: dict[str, Any], table: str) -> str:
        written = self._written.get(f"{table}.{key}" if table else key, (0, ""))[1] or key
        last = written.rpartition(".")[2]
        if isinstance(value, dict) and not table:
            tables = [f"[{name}]" for name, inner in known.items() if isinstance(inner, dict)]
            return f"there is no table [{last}]; {_near(f'[{key}]', tables)}"
        where = f"in [{table}]" if table else "outside of the tables"
        told = f"there is no setting {last} {where}; "
        # Forgetting the table's line is the commonest slip.
        elsewhere = [name for name in flatten(to_dict(Config())) if name.rpartition(".")[2] == key]
        if elsewhere and not difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            homes = " or ".join(f"[{name.rpartition('.')[0]}]" for name in elsewhere)
            return f"{told}it belongs in {homes}."
        return told + _near(key, list(known))


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no settings file {path}; check the path.") from None
    except OSError as error:
        raise UserError(
            f"The settings file {path} cannot be read ({error.strerror}); name a TOML file."
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"The settings file {path} is no UTF-8 text (line {line}); save it as such."
        ) from None
    if text.lstrip().startswith("{"):
        raise UserError(
            f"The settings file {path} is JSON; --config takes TOML, with lines such as [train] "
            "and steps = 100."
        )
    return text


def _syntax(path: Path, text: str, error: tomllib.TOMLDecodeError) -> str:
    """Where the fault is, what it is, and the line."""
    found = _FAULT.fullmatch(str(error))
    reason = (found[1] if found else str(error)).strip()
    reason = reason[:1].lower() + reason[1:]
    lines = text.splitlines() or [""]
    number = int(found[2]) if found and found[2] else len(lines)
    column = f", column {found[3]}" if found and found[3] else ""
    line = lines[min(number, len(lines)) - 1].strip()
    shown = "".join(sign if sign.isprintable() else "?" for sign in line)
    hint = _HINTS.get(reason, "")
    return f"{path}, line {number}{column} is no valid TOML ({reason}{hint}): {shown}"


def _written(text: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """Dotted name to line and spelling of what a TOML text sets, as far as lines tell."""
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = _parts(header[1])
            keys = table
        elif assignment := _ASSIGNMENT.match(line):
            keys = [*table, *_parts(assignment[1])]
        else:
            continue
        written = ".".join(keys)
        yield written.replace("-", "_"), (number, written)


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_KEY, dotted)]


def _underscored(values: dict[str, Any]) -> dict[str, Any]:
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


def _expand_home(values: dict[str, Any], name: str) -> None:
    *outer, last = name.split(".")
    for key in outer:
        values = values[key]
    if isinstance(values[last], str):
        values[last] = os.path.expanduser(values[last])


def _other_kind(table: str, key: str, value: Any, known: Any) -> str:
    name = f"{table}.{key}" if table else key
    if isinstance(known, dict):
        return (
            f"{name} is a table, not {value!r}; write [{name}] on a line of its own and its "
            "settings below."
        )
    home = f"in [{table}]" if table else "above the first table"
    return f"{name} is a setting and no table; write {key} = … {home}."


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}."
