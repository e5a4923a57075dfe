"""`smtc completion`: a script that completes commands, flags and their values in bash or zsh.

It is made from the classes that the commands' flags are read into and holds all it needs, so that
no Python starts when a key is pressed. What may follow is decided by functions that both shells
run; a few lines for each shell hand over the words and take the answer.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from smtc import presets
from smtc.cli_parsing import DESCRIBE, Described

Command = Callable[[list[str]], None]

_MANY = 99  # more values than anyone gives


@dataclass(frozen=True)
class Flag:
    """A flag or, with no names, an argument without one."""

    names: tuple[str, ...]
    values: tuple[str, ...] = ()
    """What it may be set to, where that is a choice."""
    files: bool = False
    """Whether it is a path, or text that may be one."""
    count: int = 1
    """The most words that follow it."""


def described(run: Command) -> list[Flag]:
    """What a command takes, from the classes that it reads its flags into."""
    try:
        run([DESCRIBE])
    except Described as answer:
        flags = [flag for kind in answer.kinds for flag in _flags(kind, "")]
        return [*flags, Flag(("--help",), count=0)]
    raise AssertionError(f"{run.__name__} does not begin with parsing its arguments")


def _flags(kind: type, prefix: str) -> Iterator[Flag]:
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = hints[field.name], list[Any]()
        if typing.get_origin(hint) is Annotated:
            hint, *marks = typing.get_args(hint)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from _flags(typing.cast(type, hint), f"{name}.")
            continue
        names = [] if tyro.conf.Positional in marks else [f"--{name}"]
        for mark in marks:
            names += getattr(mark, "aliases", None) or ()
        if hint is bool:
            names.append(f"--{prefix}no-{field.name.replace('_', '-')}")
        yield _flag(tuple(names), hint, field.name)


def _flag(names: tuple[str, ...], hint: Any, field: str) -> Flag:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _flag(names, next(a for a in arguments if a is not type(None)), field)
    if origin is tuple:
        count = _MANY if Ellipsis in arguments else len(arguments)
        return dataclasses.replace(_flag(names, arguments[0], ""), files=False, count=count)
    if origin is Literal:
        return Flag(names, values=tuple(map(str, arguments)))
    if field in ("preset", "untrained"):
        return Flag(names, values=tuple(presets.PRESETS))
    return Flag(names, files=hint in (Path, str), count=0 if hint is bool else 1)


def script(shell: Literal["bash", "zsh"], commands: Mapping[str, Command]) -> str:
    """The script for `commands`, which may consist of two words."""
    known = {name: described(run) for name, run in commands.items()}
    first = list(dict.fromkeys(name.partition(" ")[0] for name in known))
    groups = {
        group: [name.split()[1] for name in known if name.startswith(f"{group} ")]
        for group in first
        if group not in known
    }
    head = f"# Completion of smtc in {shell}, written by `smtc completion {shell}`.\n"
    if shell == "zsh":
        head = "#compdef smtc\n" + head
    look = _LOOK.format(
        commands=" ".join([*first, "--help", "--version"]),
        groups="|".join(groups),
        members=_cases((group, _words(members)) for group, members in groups.items()),
        flags=_cases((name, _after(flags)) for name, flags in known.items()),
        values=_cases(_values(known)),
    )
    return head + look + (_BASH if shell == "bash" else _ZSH)


def _after(flags: list[Flag]) -> str:
    """What may come where no flag waits for a value."""
    names = [name for flag in flags for name in flag.names]
    bare = [flag for flag in flags if not flag.names]
    names += [value for flag in bare for value in flag.values]
    files = "_smtc_files=1 " if any(flag.files for flag in bare) else ""
    return files + _words(dict.fromkeys(names))


def _values(known: Mapping[str, list[Flag]]) -> Iterator[tuple[str, str]]:
    """Command and flag to what may be its values; nothing is said of numbers."""
    for command, flags in known.items():
        for flag in flags:
            told = "_smtc_files=1" if flag.files else ""
            told = _words(flag.values) if flag.values else told
            if flag.count != 1:
                told = f"count={flag.count} {told}".strip()
            if told:
                for name in flag.names:
                    yield f"{command} {name}", told


def _words(words: typing.Iterable[str]) -> str:
    return f"_smtc_words='{' '.join(words)}'"


def _cases(rows: typing.Iterable[tuple[str, str]]) -> str:
    """Branches of a `case`, one for all patterns with the same outcome."""
    patterns: dict[str, list[str]] = {}
    for pattern, outcome in rows:
        patterns.setdefault(outcome, []).append(f"'{pattern}'")
    return "\n".join(f"        {'|'.join(of)}) {outcome} ;;" for outcome, of in patterns.items())


_LOOK = """
# What the word "$1" may become behind the words that follow it here: one of _smtc_words, or a file
# where _smtc_files is set.
_smtc_look() {{
    local current="$1" command="${{2-}}" flag='' after=0 count=1 word
    _smtc_words='' _smtc_files=''
    shift
    if [ "$#" -eq 0 ]; then
        _smtc_words='{commands}'
        return
    fi
    shift
    case "$command" in {groups})
        if [ "$#" -eq 0 ]; then
            _smtc_members "$command"
            return
        fi
        command="$command $1"
        shift ;;
    esac
    for word in "$@"; do
        case "$word" in
            --*=*) flag='' ;;
            --*) flag="$word" after=0 ;;
            *) after=$((after + 1)) ;;
        esac
    done
    if [ -n "$flag" ] && [ "${{current#-}}" = "$current" ]; then
        _smtc_values "$command $flag"
        if [ "$after" -lt "$count" ]; then return; fi
        _smtc_words='' _smtc_files=''
    fi
    _smtc_flags "$command"
}}

_smtc_members() {{
    case "$1" in
{members}
    esac
}}

_smtc_flags() {{
    case "$1" in
{flags}
    esac
}}

_smtc_values() {{
    case "$1" in
{values}
    esac
}}
"""

_BASH = r"""
_smtc() {
    local _smtc_words _smtc_files word current="${COMP_WORDS[COMP_CWORD]}" IFS=$' \t\n'
    local -a before=()
    # bash takes --flag=value apart.
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        [ "$word" = "=" ] || before+=("$word")
    done
    [ "$current" = "=" ] && current=''
    _smtc_look "$current" "${before[@]}"
    COMPREPLY=($(compgen -W "$_smtc_words" -- "$current"))
    COMPREPLY=("${COMPREPLY[@]//>/\\>}")
    if [ -n "$_smtc_files" ] && [ "${current#-}" = "$current" ]; then
        compopt -o filenames 2> /dev/null
        IFS=$'\n'
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}
complete -F _smtc smtc
"""

_ZSH = r"""
_smtc() {
    local _smtc_words _smtc_files
    local -a before
    before=("${(@)words[2,CURRENT-1]}")
    if [[ $PREFIX == --*=* ]]; then
        before+=("${PREFIX%%=*}")
        compset -P '*='
    fi
    _smtc_look "$PREFIX" "${before[@]}"
    if [[ -n $_smtc_files && $PREFIX != -* ]]; then
        _files
    else
        compadd -- ${=_smtc_words}
    fi
}
if [[ ${funcstack[1]} == _smtc ]]; then
    _smtc "$@"
else
    compdef _smtc smtc
fi
"""
