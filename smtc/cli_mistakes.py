"""What tyro says of wrong arguments, in a box of several lines, as one sentence."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from typing import Annotated

import tyro

_HELP = re.compile(r" ?For full helptext, (?:see|run):? (smtc .*) --help$")
_OURS = re.compile(r"Error parsing [\w.-]*\w: (.*)")
_TYPE = re.compile(r"Error parsing (--[\w.-]+): .*Argument helptext: \S+(?:, --\S+)* (.*)")
_CHOICE = re.compile(r"invalid choice (.+) for argument '(.+)'\. Expected one of \((.*?),? ?\)")
_VALUES = re.compile(r"Missing value for argument '(.+)'\. Expected (\d+) values")
_UNKNOWN = re.compile(r"Unrecognized options: (.*?)(?: Perhaps you meant: (.*))?$")


def sentence(text: str, kind: type, arguments: Sequence[str]) -> str:
    """`text` of tyro about `arguments` for the settings `kind`, without its frame and titles."""
    words = " ".join(re.sub(r"[│╭╮╰╯─]|-{4,}", " ", text).split())
    command = found[1] if (found := _HELP.search(words)) else "smtc"
    words = _HELP.sub("", words).removeprefix("Value error ").removeprefix("Unrecognized options ")
    if "Missing from smtc" in words:
        # A flag that is not there may only be misspelt, which tyro does not say.
        misspelt = _misspelt(kind, arguments)
        return misspelt or f"{_required(words, kind)}; see {command} --help."
    if found := _VALUES.search(words):
        needed = "a value" if found[2] == "1" else f"{found[2]} values"
        return f"{found[1]} needs {needed}; see {command} --help."
    if found := _CHOICE.search(words):
        choices = found[3].replace("'", "")
        return f"{found[2]} is {found[1]}; choose from {choices}."
    if found := _TYPE.search(words):
        wanted = _wanted(found[2])
        words_given = _given(found[1], arguments)
        given = " ".join(words_given[:1] if wanted.startswith("a ") else words_given)
        return f"{found[1]} is {given!r}; it takes {wanted}."
    if found := _UNKNOWN.search(words):
        near = re.findall(r"--[a-z][\w.-]*", found[2] or "")
        if near:
            meant = " or ".join(dict.fromkeys(near))
            return f"Unrecognized options: {found[1]}. Perhaps you meant {meant}?"
        return f"Unrecognized options: {found[1]}; see {command} --help."
    if found := _OURS.search(words):
        return found[1]
    return f"{words} (see {command} --help)"


def _misspelt(kind: type, arguments: Sequence[str]) -> str | None:
    """The first flag that is none of the settings' and is like one of them."""
    known = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if not flag.startswith("--") or flag in known or flag.replace("--no-", "--") in known:
            continue
        if near := difflib.get_close_matches(flag, known, n=1):
            return f"There is no flag {flag}; did you mean {near[0]}?"
    return None


def _required(words: str, kind: type) -> str:
    """Which of the arguments without a default are not there."""
    hints = typing.get_type_hints(kind, include_extras=True)
    bare, flags = [], []
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            continue
        hint = hints[field.name]
        marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
        if tyro.conf.Positional in marks:
            bare.append(field.name.upper())
        elif f"--{field.name.replace('_', '-')} " in words:
            flags.append(f"--{field.name.replace('_', '-')}")
    missing = words.count("(required)") - len(flags)
    named = [*(bare[-missing:] if missing > 0 else []), *flags]
    return f"Required and not given: {', '.join(named)}"


def _given(flag: str, arguments: Sequence[str]) -> list[str]:
    """The words that were given to `flag`, the last time."""
    given: list[str] = []
    waiting = False
    for word in arguments:
        name, equals, value = word.partition("=")
        if name == flag:
            given, waiting = [value] if equals else [], not equals
        elif word.startswith("--"):
            waiting = False
        elif waiting:
            given.append(word)
    return given


def _wanted(helptext: str) -> str:
    """The kind of values that a help text begins with, such as `{None}|INT`."""
    kind = re.match(r"(?:[\[\]{}|.\s]|None|INT|FLOAT|STR|PATH)*", helptext)
    text = kind[0] if kind else ""
    word = "whole number" if "INT" in text else "number" if "FLOAT" in text else "text"
    count = len(re.findall(r"INT|FLOAT|STR|PATH", text))
    many = "..." in text
    told = f"{word}s" if many else f"{count} {word}s" if count > 1 else f"a {word}"
    return told + (" or None" if "None" in text else "")
