"""The command line: `smtc <command> …`. A mistake ends in one sentence and exit code 2."""

import difflib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import tyro

from smtc import __version__, cli_bench, cli_data, cli_doctor, cli_evaluate, cli_models, cli_segment
from smtc.cli_parsing import parse, parse_config
from smtc.errors import ToldElsewhereError, UserError, enough_memory
from smtc.progress import BesideBars

_OTHERS_NEED = 5.0  # seconds to tell and to leave


def main(argv: list[str] | None = None) -> None:
    """Run one command; exits with 2 after a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[BesideBars()])
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            with enough_memory():
                _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        if _speaks(error):
            print(f"smtc: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            _STOPPED.get(next(iter(arguments), ""), "smtc: stopped."),
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`smtc … | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _speaks(error: UserError) -> bool:
    """Whether this process tells `error`: under torchrun all of them may have met it, and one tells
    it. While the others wait here it leaves, and torchrun ends them.
    """
    if isinstance(error, ToldElsewhereError):
        time.sleep(_OTHERS_NEED)
        return False
    if not error.agreed and os.environ.get("RANK", "0") != "0":
        time.sleep(_OTHERS_NEED)  # what it alone has met it tells then
    return True


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if arguments[0] == "--version":
        print(f"smtc {__version__}")
        return
    arguments = [_checked(*pair) for pair in zip(["", *arguments], arguments, strict=False)]
    command, rest = arguments[0], arguments[1:]
    if command in _GROUPS:
        if not rest or rest[0] in ("-h", "--help"):
            print(_group_help(command))
            return
        command, rest = f"{command} {rest[0]}", rest[1:]
    if command not in _COMMANDS:
        raise UserError(f"There is no command {command!r}; {_nearest(command, list(_COMMANDS))}")
    _COMMANDS[command](rest)


def _checked(before: str, argument: str) -> str:
    """`argument` with a leading ~ expanded, which shells leave as it is behind an equals sign."""
    flag, equals, value = argument.partition("=")
    if not equals or not flag.startswith("--"):
        flag, equals, value = "", "", argument
    if not value:
        flag = flag or (before if before.startswith("--") else "")
        what = f"The value of {flag}" if flag else "An argument"
        raise UserError(f"{what} is empty; give a value, or leave it out.")
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser(value)
    return flag + equals + value


def _overview() -> str:
    lines = ["smtc: self-supervised object-centric learning in video.", ""]
    lines += ["For example: smtc segment holiday.mp4 --checkpoint runs/mine --output found"]
    left = dict(_COMMANDS)
    for title, first in _TITLES.items():
        names = [name for name in left if name.partition(" ")[0] in first]
        lines += ["", title]
        lines += [f"  smtc {name:<22}{left.pop(name).__doc__}" for name in names]
    return "\n".join(
        [*lines, "", "Each command has --help. `smtc --version` says which one this is."]
    )


def _group_help(group: str) -> str:
    commands = {name: run for name, run in _COMMANDS.items() if name.startswith(f"{group} ")}
    lines = [f"  smtc {name:<22}{run.__doc__}" for name, run in commands.items()]
    sentence, example = _GROUPS[group]
    return "\n".join([sentence, "", f"For example: {example}", "", *lines, "", "Each has --help."])


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."


def _train(arguments: list[str]) -> None:
    """train on a folder of videos"""
    config = parse_config(arguments)
    from smtc.training.trainer import train

    run = train(config)
    print(f"The run is in {run.folder}, its model in {run.model_folder}.")


@dataclass(frozen=True, kw_only=True)
class _Completion:
    """Print a script that completes commands, flags and values in a shell.

    For example: smtc completion bash > ~/.local/share/bash-completion/completions/smtc

    For zsh: smtc completion zsh > a folder of $fpath, as a file called _smtc. Either can also be
    read at once, as by: source <(smtc completion bash)
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]


def _completion(arguments: list[str]) -> None:
    """a script that completes commands and flags in bash or zsh"""
    settings = parse(_Completion, "completion", arguments)
    from smtc.completion import script

    print(script(settings.shell, _COMMANDS), end="")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    **cli_segment.COMMANDS,
    **cli_evaluate.COMMANDS,
    **cli_data.COMMANDS,
    **cli_models.COMMANDS,
    **cli_doctor.COMMANDS,
    "completion": _completion,
    **cli_bench.COMMANDS,
}
_TITLES = {
    "Learn and find:": ("train", "segment", "evaluate"),
    "Data:": ("data",),
    "Models:": ("convert", "export"),
    "This machine:": ("doctor", "completion"),
    "Benchmarks:": ("bench",),
}
"""Headings of the overview, and the first words of the commands under each."""
_STOPPED = {
    "train": "smtc: stopped. The same command goes on from its last checkpoint, if any.",
    "segment": "smtc: stopped. The same command goes on where it stopped.",
    "data": "smtc: stopped. The same command goes on with what is left.",
    "evaluate": "smtc: stopped. The same command goes on with what is left.",
    "bench": "smtc: stopped. What was finished is in the --output folder.",
}
_GROUPS = {
    "evaluate": (
        "Score what a model finds against true masks.",
        "smtc evaluate discovery --data data/synthetic/val --checkpoint runs/tiny --output scores",
    ),
    "data": ("Look at, check and prepare videos for training.", "smtc data inspect videos"),
    "bench": (
        "Measure operations, loaders and training steps on this machine.",
        "smtc bench parity --output build/bench",
    ),
}
"""First words of commands of two: what they are for, and an example."""
