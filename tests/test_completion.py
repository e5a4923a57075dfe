"""`smtc completion`: what a real shell offers, and that its script knows every flag."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import Command

from smtc.cli import _COMMANDS
from smtc.completion import described

BASH = """
source {script}
cd {folder}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_smtc
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

# What zsh's own completion gives and takes; the rest of it would need a terminal.
ZSH = """
compdef() {{ }}
compset() {{ PREFIX=${{PREFIX#*=}} }}
compadd() {{ shift; for word in "$@"; do [[ $word == $PREFIX* ]] && print -r -- $word; done }}
_files() {{ print -r -- $PREFIX*(N) }}
source {script}
cd {folder}
words=({words}); CURRENT=$#words; PREFIX=$words[-1]
_smtc
"""

CASES = [
    (["tra"], ["train"]),
    (["data", ""], ["synthesize", "inspect", "preview", "pack"]),
    (["bench", "s"], ["static", "step", "scaling"]),
    (["train", "--model.up"], ["--model.update"]),
    (["train", "--model.update", ""], ["gru", "residual"]),
    (["train", "--model.update", "gru", "--model.gr"], ["--model.gradient"]),
    (["train", "--data.random-gap", "--data.ro"], ["--data.root", "--data.roi-decode"]),
    (["train", "--data.no-ra"], ["--data.no-random-gap"]),
    (["train", "--preset", "o"], ["official_v2", "official_strict"]),
    (["train", "--conf"], ["--config"]),
    (["train", "--train.steps", ""], []),
    (["train", "--data", "vi"], ["videos"]),
    (["train", "--data", "videos", "--outp"], ["--output"]),
    (["segment", "vi"], ["videos"]),
    (["segment", "videos", "--device", "c"], ["cpu", "cuda"]),
    (["data", "preview", "videos", "--cl"], ["--clips"]),
    (["data", "preview", "videos", "--model.update", "r"], ["residual"]),
    (["bench", "parity", "--ops", "sinkhorn", "--im"], ["--impl"]),
    (["completion", "b"], ["bash"]),
    (["nonsense", "--x"], []),
]


def offered(shell: str, told: str, words: list[str], tmp_path: Path) -> list[str]:
    folder, script = tmp_path / "here", tmp_path / "script"
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    script.write_text(told, encoding="utf-8")
    typed = " ".join(shlex.quote(word) for word in ["smtc", *words])
    form = BASH if shell == "bash" else ZSH
    program = form.format(script=script, folder=folder, words=typed)
    quiet = ["--norc"] if shell == "bash" else ["-f"]
    done = subprocess.run(
        [shell, *quiet, "-c", program], capture_output=True, text=True, check=False
    )
    assert not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_what_a_shell_offers(cli: Command, tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    told = cli("completion", shell).out
    for words, expected in CASES:
        assert offered(shell, told, words, tmp_path) == expected, words


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_values_that_a_shell_would_misread(cli: Command, tmp_path: Path) -> None:
    told = cli("completion", "bash").out
    flag = ["train", "--model.semantic-mask"]
    assert offered("bash", told, [*flag, "s"], tmp_path) == [r"softmax\>0.5"]
    assert offered("bash", told, [*flag, "=", "l"], tmp_path) == [r"logits\>0.3"]
    assert offered("bash", told, [*flag, "="], tmp_path) == [r"softmax\>0.5", r"logits\>0.3"]


@pytest.mark.parametrize("command", list(_COMMANDS))
def test_the_script_knows_each_flag_of_the_help(cli: Command, command: str) -> None:
    """And no other."""
    known = {name for flag in described(_COMMANDS[command]) for name in flag.names}
    shown = [cli(*command.split(), "--help").out]
    if command == "data preview":  # which says "any flag of `smtc train`"
        shown.append(cli("train", "--help").out)
    lines = [line[2:] for text in shown for line in text.splitlines() if line[2:3] == "-"]
    told = " ".join(line.partition("  ")[0] for line in lines)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", told))
    short = {"--preset", "--config", "--data"} if flags >= {"--data.root"} else set()
    assert known == flags | short


def test_another_shell(safe: Command) -> None:
    said = safe("completion", "powershell")
    assert "bash" in said and "zsh" in said
