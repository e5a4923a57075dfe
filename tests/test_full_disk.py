"""A disk that fills up: one sentence, what is on it stays usable, the same command goes on."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Command, train_flags, tree

import smtc
from smtc import presets
from smtc.pipelines.clips import find_videos
from smtc.training.checkpoint import checkpoints, latest_checkpoint
from smtc.training.telemetry import read_metrics

Mount = Callable[[str], Path]


def make_room(disk: Path) -> None:
    command = ["mount", "-o", "remount,size=64m", str(disk)]
    subprocess.run(command, check=True, capture_output=True)


def assert_whole(disk: Path) -> None:
    assert not [path for path in tree(disk) if "partial" in path], tree(disk)


@pytest.mark.parametrize(
    ("size", "what", "kept"),
    [(700, "checkpoint", 0), (3200, "checkpoint", 1), (6700, "model", 3)],
)
def test_training_goes_on_once_there_is_room(
    cli: Command,
    refused: Command,
    mounted: Mount,
    synthetic_data: Path,
    size: int,
    what: str,
    kept: int,
) -> None:
    disk = mounted(f"size={size}k")
    flags = ["--train.steps", 6, "--train.checkpoint-every", 2, "--train.keep-checkpoints", 3]
    command = train_flags(synthetic_data, disk / "run", *flags)
    said = refused(*command)
    assert f"smtc: The {what} " in said and "No space left" in said and "free some space" in said
    assert_whole(disk)
    assert len(checkpoints(disk / "run" / "checkpoints")) == kept
    assert (latest_checkpoint(disk / "run") is None) == (kept == 0)
    make_room(disk)
    assert cli(*command).code == 0
    rows = read_metrics(disk / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert smtc.load_model(disk / "run").config.slots == 8


def test_the_metrics_fill_the_disk(
    cli: Command, refused: Command, mounted: Mount, synthetic_data: Path
) -> None:
    """What was logged can be read, and the same command starts again."""
    disk = mounted("size=48k")
    flags = ["--train.steps", 90, "--train.batch", 1, "--model.slots", 2]
    flags += ["--train.pictures-every", 0]
    command = train_flags(synthetic_data, disk / "run", *flags)
    said = refused(*command)
    assert f"smtc: The run folder {disk / 'run'} cannot be written (No space left" in said
    before = read_metrics(disk / "run" / "metrics.jsonl")
    assert 10 < len(before) < 90
    make_room(disk)
    assert cli(*command).code == 0
    assert len(read_metrics(disk / "run" / "metrics.jsonl")) == 90


def test_a_model_that_does_not_fit(
    cli: Command, refused: Command, mounted: Mount, tmp_path: Path
) -> None:
    disk, file = mounted("size=1m"), tmp_path / "authors.pth"
    state = smtc.SMTC(presets.official_v2().model).state_dict()
    torch.save({"iteration": 1, "model_state_dict": state}, file)
    said = refused("convert", file, disk / "model")
    assert str(disk / "model") in said and "No space left" in said and "free some space" in said
    assert tree(disk) == []
    subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    assert cli("convert", file, disk / "model").code == 0
    assert smtc.load_model(disk / "model")


def test_videos_and_packed_frames_that_do_not_fit(
    cli: Command, refused: Command, mounted: Mount, synthetic_data: Path
) -> None:
    disk = mounted("size=200k")
    command = ["data", "synthesize", disk / "videos", "--videos", 30, "--size", 64]
    said = refused(*command)
    assert str(disk / "videos") in said and "No space left" in said
    assert tree(disk) == []
    pack = ["data", "pack", synthetic_data, "--output", disk / "cache", "--size", 64]
    said = refused(*pack)
    assert str(disk / "cache") in said and "free some" in said, said
    assert tree(disk) == []
    make_room(disk)
    assert cli(*command).code == 0 and len(find_videos(disk / "videos")) == 30
    assert cli(*pack).code == 0
    assert cli(*train_flags(synthetic_data, disk / "run", "--data.cache", disk / "cache")).code == 0


def test_a_disk_that_fills_up_while_packing(
    cli: Command, refused: Command, mounted: Mount, synthetic_data: Path
) -> None:
    """There seemed to be room at first."""
    disk = mounted("size=580k")
    pack = ["data", "pack", synthetic_data, "--output", disk / "cache", "--size", 64]
    said = refused(*pack)
    assert "the same command again, which goes on where it stopped" in said, said
    make_room(disk)
    assert cli(*pack).code == 0
    flags = ["--data.cache", disk / "cache", "--data.loader", "cache"]
    assert cli(*train_flags(synthetic_data, disk / "run", *flags)).code == 0


def test_a_page_that_does_not_fit(cli: Command, refused: Command, mounted: Mount) -> None:
    disk = mounted("size=4k")
    command = ["bench", "report", "--output", disk / "report.html"]
    assert "No space left" in refused(*command)
    assert tree(disk) == []
    make_room(disk)
    assert cli(*command).code == 0
