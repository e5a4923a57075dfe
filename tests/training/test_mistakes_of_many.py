"""A mistake under torchrun is told once, whoever meets it, and all processes end."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import frames_of, train_flags, tree


def told(ranks: int, *arguments: object, script: Path | None = None) -> str:
    """What `smtc` says in several processes, which have to fail soon."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["-m", "smtc"] if script is None else [str(script)]
    command = [*launcher, f"--nproc-per-node={ranks}", "--monitor-interval=0.1", *program]
    began = time.monotonic()
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert time.monotonic() - began < 60
    assert "exitcode  : 2" in done.stderr, (
        done.stderr
    )  # of our processes; torchrun's own is always 1
    return done.stderr


def said_once(text: str, sentence: str) -> bool:
    lines = [line for line in text.splitlines() if line.startswith("smtc: ")]
    lines = [line for line in lines if "%|" not in line]  # which is a bar
    return len(lines) == 1 and sentence in lines[0]


def test_more_processes_than_videos(synthetic_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(synthetic_data, tmp_path / "data"))
    for video in range(2, 6):
        shutil.rmtree(frames_of(data, f"{video:05}"))
    said = told(3, *train_flags(data, tmp_path / "run"))
    assert said_once(said, f"There are 3 processes for 2 usable videos in {data}, and each ")
    assert "start at most 2 processes" in said
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_flags(tmp_path: Path) -> None:
    said = told(2, *train_flags(tmp_path / "none", tmp_path / "run", "--train.step", 3))
    assert said_once(said, "Unrecognized options: --train.step")


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_first_process(
    mounted: Callable[[str], Path], synthetic_data: Path
) -> None:
    """The others wait for it in a collective."""
    output = mounted("size=1m") / "run"
    said = told(2, *train_flags(synthetic_data, output, "--train.steps", 3))
    assert said_once(said, "No space left")
    assert not [path for path in tree(output) if "partial" in path or path.startswith("model")]


ALONE = """
import os, sys
from smtc import cli, errors
from smtc.training import trainer
whole = trainer.check_run_folder
def check(config):
    if os.environ["RANK"] == "1":
        raise errors.UserError("The disk of the second is gone; mount it.")
    return whole(config)
trainer.check_run_folder = check
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_mistake_that_one_process_alone_meets(synthetic_data: Path, tmp_path: Path) -> None:
    script = tmp_path / "alone.py"
    script.write_text(ALONE, encoding="utf-8")
    said = told(2, *train_flags(synthetic_data, tmp_path / "run"), script=script)
    assert said_once(said, "The disk of the second is gone; mount it.")
    assert not (tmp_path / "run").exists()
