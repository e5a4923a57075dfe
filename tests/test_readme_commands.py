"""What the README tells people to type: commands, flags, presets, and its Python example."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from smtc.cli import _COMMANDS
from smtc.completion import described
from smtc.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")


def blocks() -> list[str]:
    """The text of the code blocks without a language, which are commands."""
    parts = re.split(r"^```(\w*)$", README, flags=re.MULTILINE)
    # Text, fence, code, fence, text, …; the fence before the code names the language.
    return [code for fence, code in zip(parts[1::4], parts[2::4], strict=True) if not fence]


def typed() -> list[list[str]]:
    """The words of each `smtc` command in a block, joined over line ends, without comments."""
    found = []
    for block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for name in ("smtc", ".venv/bin/smtc"):
                if name in words:
                    found.append(words[words.index(name) + 1 :])
                    break
    return [words for words in found if words]


def command_of(words: list[str]) -> str:
    for count in (2, 1):
        if " ".join(words[:count]) in _COMMANDS:
            return " ".join(words[:count])
    raise AssertionError(f"smtc {' '.join(words)}")


def flags_of(command: str) -> set[str]:
    own = {name for flag in described(_COMMANDS[command]) for name in flag.names}
    return own | flags_of("train") if command == "data preview" else own


def test_commands_and_their_flags_exist() -> None:
    lines = typed()
    assert len(lines) > 20
    for words in lines:
        command = command_of(words)
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= flags_of(command) | {"--help"}, words


def test_all_commands_are_told() -> None:
    told = {command_of(words) for words in typed()} | set(re.findall(r"`smtc (\w+)", README))
    for command in _COMMANDS:
        assert command in told or command.split()[0] in told, command


def test_the_authors_flags_have_ours() -> None:
    table = README.split("<!-- authors' flags -->")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.strip().splitlines()[2:]]
    assert len(rows) > 10
    ours = [cell for _, cell in rows]
    used = {flag for cell in ours for flag in FLAG.findall(cell)}
    assert {"--data", "--model.slots", "--optim.encoder-from-step"} <= used
    assert used - {"--preset"} <= flags_of("train")
    presets = {name for cell in ours for name in re.findall(r"--preset (\w+)", cell)}
    assert presets == {"official_v2", "official_strict"} and presets <= set(PRESETS)


def test_every_flag_of_training_in_the_text_exists() -> None:
    dotted = {flag for flag in FLAG.findall(README) if "." in flag}
    assert len(dotted) > 15
    assert dotted <= flags_of("train"), dotted - flags_of("train")


def test_the_python_example_runs(tmp_path: Path) -> None:
    example = README.split("<!-- example -->")[1].split("```")[1].removeprefix("python\n")
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [str(frame) for frame in range(8)]
    assert sorted(path.name for path in (tmp_path / "example").iterdir()) == ["run", "videos"]


def test_links_within_the_page_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    places = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    wanted = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert wanted and wanted <= places


@pytest.mark.parametrize("file", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_files_that_are_linked_exist(file: str) -> None:
    assert (ROOT / file).exists()
