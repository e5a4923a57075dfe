"""Every command's help starts with a sentence and an example, and the example is right."""

import re
import shlex
from collections.abc import Iterator

import pytest
import tyro
from commands import Command

import smtc
from smtc.cli import _COMMANDS, _GROUPS
from smtc.cli_parsing import DESCRIBE, Described, parse_config
from smtc.completion import described


def kinds(command: str) -> tuple[type, ...]:
    with pytest.raises(Described) as answer:
        _COMMANDS[command]([DESCRIBE])
    return answer.value.kinds


def paragraphs(text: str) -> Iterator[str]:
    """Of a help, without the usage before and the boxes behind."""
    yield from (" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def sentence_and_example(text: str) -> tuple[str, str]:
    first, example, *_ = paragraphs(text)
    return first, example


def assert_one_sentence(text: str) -> None:
    assert re.fullmatch(r"[A-Z][^.!?]*(?:\.\w[^.!?]*)*\.", text), text


@pytest.mark.parametrize("command", list(_COMMANDS))
def test_help_starts_with_a_sentence_and_an_example(cli: Command, command: str) -> None:
    told = cli(*command.split(), "--help")
    assert told.code == 0
    usage, rest = told.out.split("\n\n", 1)
    assert usage.startswith(f"usage: smtc {command} ")
    sentence, example = sentence_and_example(rest)
    assert_one_sentence(sentence)
    assert example.startswith(f"For example: smtc {command}"), example


@pytest.mark.parametrize("command", list(_COMMANDS))
def test_the_example_can_be_typed(cli: Command, command: str) -> None:
    _, rest = cli(*command.split(), "--help").out.split("\n\n", 1)
    example = sentence_and_example(rest)[1].removeprefix(f"For example: smtc {command}")
    words = shlex.split(example.partition(" > ")[0])
    known = {name for flag in described(_COMMANDS[command]) for name in flag.names}
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= known
    if command == "train":
        assert parse_config(words)
    elif command == "data preview":
        assert parse_config(words[1:])  # what follows the folder
    else:
        (kind,) = kinds(command)
        assert tyro.cli(kind, args=words)


@pytest.mark.parametrize("group", list(_GROUPS))
@pytest.mark.parametrize("flags", [(), ("--help",)])
def test_help_of_a_group(cli: Command, group: str, flags: tuple[str, ...]) -> None:
    told = cli(group, *flags)
    assert told.code == 0
    sentence, example = sentence_and_example(told.out)
    assert_one_sentence(sentence)
    command = re.match(rf"For example: smtc ({group} \w+)", example)
    assert command and command[1] in _COMMANDS
    for name in _COMMANDS:
        assert (f"  smtc {name} " in told.out) == name.startswith(f"{group} ")


def test_the_overview_names_each_command_once(cli: Command) -> None:
    told = cli("--help")
    sentence, example = sentence_and_example(told.out)
    assert_one_sentence(sentence.removeprefix("smtc: ").capitalize())
    assert example.startswith("For example: smtc ")
    for name in _COMMANDS:
        assert len(re.findall(rf"^  smtc {name} +\w", told.out, re.MULTILINE)) == 1, name
    headings = re.findall(r"^([A-Z][\w ]+):$", told.out, re.MULTILINE)
    assert len(headings) >= 4


def test_version(cli: Command) -> None:
    assert cli("--version").out == f"smtc {smtc.__version__}\n"
