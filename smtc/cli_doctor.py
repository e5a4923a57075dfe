"""`smtc doctor`: its flags and what it calls."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smtc.cli_parsing import parse


@dataclass(frozen=True, kw_only=True)
class _Doctor:
    """Try every library that SMTC can use: what works, what does not, and what that costs.

    For example: smtc doctor --output doctor.json

    Exits with 1 where a tiny training run, tried last, does not succeed.
    """

    output: Path | None = None
    """A JSON file with the same, for a bug report; it holds no environment variables."""


def _doctor(arguments: list[str]) -> None:
    """what is installed, what of it works, and what the rest costs"""
    settings = parse(_Doctor, "doctor", arguments)
    from smtc.doctor import doctor

    sys.exit(doctor(settings.output))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "doctor": _doctor,
}
