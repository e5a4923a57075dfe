"""The command line: `smtc <command> …`. A mistake ends in one sentence and exit code 2."""

import difflib
import logging
import os
import sys
import time
from collections.abc import Callable

from smtc import cli_bench, cli_data, cli_doctor, cli_evaluate, cli_models, cli_segment
from smtc.cli_parsing import parse_config
from smtc.errors import ToldElsewhereError, UserError
from smtc.progress import BesideBars

_OTHERS_NEED = 5.0  # seconds to tell and to leave


def main(argv: list[str] | None = None) -> None:
    """Run one command; exits with 2 after a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[BesideBars()])
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
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
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    command, rest = arguments[0], arguments[1:]
    group = _GROUPS.get(command)
    if group is not None:
        if not rest or rest[0] in ("-h", "--help"):
            print(f"smtc {command} " + "|".join(group) + "   (each has --help)")
            return
        command, rest = f"{command} {rest[0]}", rest[1:]
    if command not in _COMMANDS:
        raise UserError(f"There is no command {command!r}; {_nearest(command, list(_COMMANDS))}")
    _COMMANDS[command](rest)


def _overview() -> str:
    lines = ["smtc: self-supervised object-centric learning in video", ""]
    lines += [f"  smtc {name:<22}{run.__doc__}" for name, run in _COMMANDS.items()]
    return "\n".join([*lines, "", "Each command has --help."])


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."


def _train(arguments: list[str]) -> None:
    """train on a folder of videos"""
    config = parse_config(arguments)
    from smtc.training.trainer import train

    run = train(config)
    print(f"The run is in {run.folder}, its model in {run.model_folder}.")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    **cli_segment.COMMANDS,
    **cli_evaluate.COMMANDS,
    **cli_data.COMMANDS,
    **cli_models.COMMANDS,
    **cli_doctor.COMMANDS,
    **cli_bench.COMMANDS,
}
_STOPPED = {
    "train": "smtc: stopped. The same command goes on from its last checkpoint, if any.",
    "data": "smtc: stopped. The same command goes on with what is left.",
    "evaluate": "smtc: stopped. The same command goes on with what is left.",
    "bench": "smtc: stopped. What was finished is in the --output folder.",
}
_GROUPS = {
    group: tuple(name.split()[1] for name in _COMMANDS if name.startswith(group + " "))
    for group in ("evaluate", "data", "bench")
}
