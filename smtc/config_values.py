"""Settings as plain values and back: dataclasses to nested tables, and tables, checked, to
dataclasses.
"""

import dataclasses
import types
import typing
from typing import Any, Literal

from smtc.errors import UserError


def require(holds: bool, sentence: str) -> None:
    """A `UserError` that says `sentence`, unless it holds."""
    if not holds:
        raise UserError(sentence)


_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text in quotes",
}


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def from_dict(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """The config of class `kind` that `to_dict` wrote; an unknown key or a wrong type is a
    `UserError`.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{where or kind.__name__} should be a table of settings, not {type(values).__name__}."
        )
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(
            f"Unknown setting {where}{unknown[0]!r}; known there: {', '.join(sorted(hints))}."
        )
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            made[name] = from_dict(typing.cast(type, hints[name]), value, f"{where}{name}.")
        else:
            made[name] = _typed(hints[name], value, f"{where}{name}")
    return kind(**made)


def _typed(hint: Any, value: Any, name: str) -> Any:
    """`value` as JSON or TOML gave it, checked against one of the annotations used above."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, name)
    if origin is Literal:
        require(
            value in arguments,
            f"{name} is {value!r}; choose from {', '.join(map(repr, arguments))}.",
        )
        return value
    if origin is tuple:
        require(
            isinstance(value, list | tuple) and len(value) == len(arguments),
            f"{name} is {value!r}; it needs a list of {len(arguments)} values.",
        )
        return tuple(_typed(a, v, name) for a, v in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(type(value) is hint, f"{name} is {value!r}; it should be {_TYPES[hint]}.")
    return value
