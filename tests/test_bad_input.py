"""A mistake ends in one sentence that names it, exit code 2, and nothing half-written.

Here: data and settings; test_bad_folders.py has outputs and weights.
"""

import logging
import os
import re
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, frames_of, train_flags

from smtc import cli as cli_module
from smtc import doctor
from smtc.cli_mistakes import _given
from smtc.errors import ToldElsewhereError, UserError, enough_memory
from smtc.training.telemetry import read_metrics

# Data.


def test_no_such_data_folder(safe: Command, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    said = safe(*train_flags(missing, tmp_path / "run"))
    assert f"smtc: The data folder {missing} does not exist;" in said


def test_a_file_in_place_of_a_data_folder(safe: Command, tmp_path: Path) -> None:
    file = tmp_path / "video.mp4"
    file.write_bytes(b"")
    assert f"{file} is no folder" in safe(*train_flags(file, tmp_path / "run"))


def test_a_folder_without_videos(safe: Command, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    (empty / "JPEGImages" / "480p" / "bear").mkdir(parents=True)
    assert f"smtc: No videos in {empty}" in safe(*train_flags(empty, tmp_path / "run"))


def test_all_videos_shorter_than_a_clip(
    safe: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--data.frames", 9))
    assert "All 6 videos have fewer than 9 frames" in said
    assert "data.frames" in said


def test_after_a_wrong_folder_the_right_one_works(
    cli: Command, refused: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    refused(*train_flags(tmp_path / "nowhere", tmp_path / "run"))
    assert cli(*train_flags(synthetic_data, tmp_path / "run")).code == 0


def test_no_data_and_no_output(safe: Command, synthetic_data: Path, tmp_path: Path) -> None:
    assert "Give --data" in safe("train", "--output", tmp_path / "run", "--train.device", "cpu")
    flags = ["train", "--preset", "tiny", "--data", synthetic_data, "--train.device", "cpu"]
    assert "Give --output" in safe(*flags)


def damage(data: Path) -> None:
    """Every clip of one of the six videos holds a frame that is cut short or one that is empty."""
    folder = frames_of(data, "00003")
    whole = (folder / "00002.jpg").read_bytes()
    (folder / "00002.jpg").write_bytes(whole[:-40])
    (folder / "00003.jpg").write_bytes(b"")


def test_unreadable_frames_are_named_once_replaced_and_counted(
    cli: Command, videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(videos)
    flags = ["--train.steps", 12, "--train.log-every", 4]
    with caplog.at_level(logging.WARNING, logger="smtc"):
        told = cli(*train_flags(videos, tmp_path / "run", *flags))
    assert told.code == 0
    named = Counter(record.message.partition(":")[0] for record in caplog.records)
    del named["The encoder starts from random weights, from which SMTC does not learn"]
    assert named == {"00003/00002.jpg": 1, "00003/00003.jpg": 1}
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # 24 clips are four epochs of six videos.
    assert [line["replaced_clips"] for line in lines][-1] == 4


def test_unreadable_frames_are_shown_on_the_terminal(videos: Path, tmp_path: Path) -> None:
    damage(videos)
    flags = train_flags(videos, tmp_path / "run", "--train.steps", 12, "--data.workers", 1)
    command = [sys.executable, "-m", "smtc", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("00003/00002.jpg: the file is cut short") == 1
    assert done.stderr.count("00003/00003.jpg: the file is empty") == 1
    assert "Traceback" not in done.stderr


def test_too_many_unreadable_frames_stop_the_run(
    refused: Command, videos: Path, tmp_path: Path
) -> None:
    damage(videos)
    flags = ["--train.steps", 30, "--data.max-bad-share", 0.1]
    said = refused(*train_flags(videos, tmp_path / "run", *flags))
    assert "more than data.max-bad-share (10%) allows" in said
    assert re.search(r"00003/0000[23]\.jpg", said)
    assert not (tmp_path / "run" / "model").exists()


def test_no_readable_frame_at_all(refused: Command, videos: Path, tmp_path: Path) -> None:
    for frame in videos.rglob("*.jpg"):
        frame.write_bytes(b"")
    said = refused(*train_flags(videos, tmp_path / "run"))
    assert "No readable clip" in said and ".jpg: the file is empty" in said
    assert not (tmp_path / "run" / "model").exists()


# Settings.


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--train.step", "--train.steps"),
        ("--model.slot", "--model.slots"),
        ("--outptu", "--output"),
    ],
)
def test_an_unknown_flag_shows_the_nearest(
    safe: Command, synthetic_data: Path, tmp_path: Path, flag: str, near: str
) -> None:
    said = safe(*train_flags(synthetic_data, tmp_path / "run", flag, 3))
    assert f"Unrecognized options: {flag}" in said
    assert near in said.partition("Perhaps you meant")[2]


def test_an_unknown_preset_shows_the_nearest(safe: Command) -> None:
    assert "did you mean 'official_v2'?" in safe("train", "--preset", "oficial_v2")
    assert "choose from paper, official_v2" in safe("train", "--preset", "xyzzy")


def test_a_stray_word(safe: Command) -> None:
    assert "videos" in safe("train", "videos")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--model.slots 0", "model.slots is 0"),
        ("--model.instances 9", "model.instances is 9"),
        ("--model.instances 0", "model.instances is 0"),
        ("--model.iterations 0", "model.iterations is 0"),
        ("--model.resolution 36 32", "model.resolution 36x32 is no multiple of the patch"),
        ("--model.resolution 0 32", "model.resolution 0x32"),
        ("--model.backbone.patch 0", "model.backbone.patch is 0"),
        ("--model.backbone.architecture resnet50", "model.backbone.patch to 16"),
        ("--train.steps -1", "train.steps is -1"),
        ("--train.batch 0", "train.batch is 0"),
        ("--train.seed -1", "seed"),
        ("--train.log-every 0", "train.log-every is 0"),
        ("--train.threads 0", "train.threads is 0"),
        ("--data.frames 1", "data.frames is 1"),
        ("--data.gap 0", "data.gap is 0"),
        ("--data.workers -1", "data.workers is -1"),
        ("--data.workers 99999", "data.workers is 99999; use 0 to the number of cores."),
        ("--data.max-bad-share 1.5", "data.max-bad-share is 1.5"),
        ("--data.augment.flip 2", "data.augment.flip is 2"),
        ("--data.augment.blur-kernel -1", "data.augment.blur-kernel"),
        ("--optim.lr 0", "optim.lr is 0"),
        ("--optim.lr nan", "optim.lr is nan"),
        ("--optim.betas 2 2", "optim.betas"),
        ("--optim.weight-decay -1", "optim.weight-decay"),
        ("--optim.eps -1", "optim.eps"),
        ("--objective.epsilon 0", "objective.epsilon is 0"),
        ("--teacher.momentum 1.5", "teacher.momentum is 1.5"),
        ("--train.steps 1.5", "--train.steps is '1.5'; it takes a whole number."),
        ("--train.steps 1e3", "--train.steps is '1e3'; it takes a whole number."),
        ("--train.threads many", "--train.threads is 'many'; it takes a whole number or None."),
        ("--optim.lr fast", "--optim.lr is 'fast'; it takes a number."),
        ("--optim.betas 0.9", "--optim.betas needs 2 values; see smtc train --help."),
        ("--data.augment.crop 0.5", "--data.augment.crop is '0.5'; it takes 2 numbers or None."),
        ("--train.steps", "--train.steps needs a value; see smtc train --help."),
        ("--model.update lstm", "--model.update is 'lstm'; choose from gru, residual."),
        ("--data.gap 99999999999999999999", "data.gap is 99999999999999999999; it must be a num"),
        ("--data.augment.blur-sigma 1 inf", "data.augment.blur-sigma is inf; it must be a num"),
        ("--train.device gpu", "train.device"),
        ("--train.precision fp8", "bf16"),
    ],
)
def test_impossible_values(
    safe: Command, synthetic_data: Path, tmp_path: Path, flags: str, told: str
) -> None:
    assert told in safe(*train_flags(synthetic_data, tmp_path / "run", *flags.split()))


def test_an_impossible_seed_with_workers(
    safe: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    flags = ["--train.seed", -1, "--data.workers", 1]
    assert "seed" in safe(*train_flags(synthetic_data, tmp_path / "run", *flags))


def test_cuda_that_is_absent(
    safe: Command,
    synthetic_data: Path,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    frames, output = frames_of(synthetic_data, "00000"), tmp_path / "out"
    told = "smtc: CUDA was asked for but this machine has none"
    assert told in safe(*train_flags(synthetic_data, output, "--train.device", "cuda"))
    weights = ["--checkpoint", tiny_run, "--output", output, "--device", "cuda"]
    assert told in safe("segment", frames, *weights)
    assert told in safe("evaluate", "discovery", "--data", synthetic_data, *weights)


# Segmenting and scoring.


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: None, "does not exist|There is no|is no folder"),
        (lambda folder: folder.mkdir(), "no frames|No videos|without|No frames"),
        (lambda folder: folder.write_text("x"), "neither a folder of frames"),
    ],
)
def test_frames_that_are_not_there(
    safe: Command, tiny_run: Path, tmp_path: Path, make: Callable[[Path], Any], told: str
) -> None:
    folder = tmp_path / "frames"
    make(folder)
    weights = ["--checkpoint", tiny_run, "--output", tmp_path / "out", "--device", "cpu"]
    said = safe("segment", folder, *weights)
    assert said.startswith("smtc: ") and str(folder) in said
    assert re.search(told, said), said


def test_several_videos_to_segment(
    safe: Command, tiny_run: Path, synthetic_data: Path, tmp_path: Path
) -> None:
    weights = ["--checkpoint", tiny_run, "--output", tmp_path / "out", "--device", "cpu"]
    assert str(synthetic_data) in safe("segment", synthetic_data, *weights)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8 cut short", b"no image"])
def test_an_unreadable_frame_is_refused_outside_training(
    safe: Command, tiny_run: Path, videos: Path, tmp_path: Path, content: bytes
) -> None:
    (frames_of(videos, "00003") / "00006.jpg").write_bytes(content)
    weights = ["--checkpoint", tiny_run, "--output", tmp_path / "out", "--device", "cpu"]
    assert "00003/00006.jpg" in safe("segment", frames_of(videos, "00003"), *weights)
    assert "00003/00006.jpg" in safe("evaluate", "discovery", "--data", videos, *weights)


def test_the_sentence_has_a_line_of_its_own(
    cli: Command, tiny_run: Path, videos: Path, tmp_path: Path
) -> None:
    """A progress bar stands in the way."""
    for frame in videos.rglob("00006.jpg"):
        frame.write_bytes(b"")
    weights = ["--checkpoint", tiny_run, "--output", tmp_path / "out", "--device", "cpu"]
    for command in (
        ["segment", frames_of(videos, "00003"), *weights],
        ["evaluate", "discovery", "--data", videos, *weights],
        train_flags(videos, tmp_path / "run", "--data.max-bad-share", 0, "--data.frames", 8),
    ):
        told = cli(*command)
        assert told.code == 2
        assert told.error.split("\n")[-2].startswith("smtc: "), told.error


def test_an_unreadable_annotation(
    safe: Command, tiny_run: Path, videos: Path, tmp_path: Path
) -> None:
    (videos / "Annotations" / "480p" / "00004" / "00001.png").write_bytes(b"")
    weights = ["--checkpoint", tiny_run, "--output", tmp_path / "out", "--device", "cpu"]
    assert "00004/00001.png" in safe("evaluate", "discovery", "--data", videos, *weights)


@pytest.mark.parametrize("dataset", ["synthetic", "davis2016"])
def test_data_that_is_no_data_set(
    safe: Command, tiny_run: Path, tmp_path: Path, dataset: str
) -> None:
    empty = tmp_path / "empty"
    weights = ["--checkpoint", tiny_run, "--output", tmp_path / "out", "--device", "cpu"]
    command = ["evaluate", "discovery", "--dataset", dataset, "--data", empty, *weights]
    assert str(empty) in safe(*command)
    empty.mkdir()
    assert str(empty) in safe(*command)


def test_what_to_score_has_to_be_said_once(
    safe: Command, tiny_run: Path, synthetic_data: Path, tmp_path: Path
) -> None:
    command = ["evaluate", "discovery", "--data", synthetic_data, "--output", tmp_path / "out"]
    assert "There is nothing to score; give --checkpoint FILE" in safe(*command)
    told = "Give only one of --checkpoint, --backbone and --untrained."
    assert told in safe(*command, "--checkpoint", tiny_run, "--untrained", "tiny")
    assert "did you mean 'tiny'?" in safe(*command, "--untrained", "tny")
    assert "davis2016" in safe(*command, "--dataset", "davis2015", "--untrained", "tiny")


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("segment", "VIDEO, --checkpoint, --output"),
        ("segment a.mp4 --output x", "--checkpoint"),
        ("evaluate discovery --data x", "--output"),
        ("data synthesize", "FOLDER"),
        ("convert", "FILE, FOLDER"),
        ("convert a.pth", "FOLDER"),
        ("bench step", "--output"),
    ],
)
def test_missing_arguments(safe: Command, command: str, missing: str) -> None:
    name = " ".join(command.split()[: 1 if command.startswith(("segment", "convert")) else 2])
    told = f"smtc: Required and not given: {missing}; see smtc {name} --help."
    assert safe(*command.split()) == told


@pytest.mark.parametrize("flags", [["--output", ""], ["--output="]])
def test_an_empty_argument(safe: Command, flags: list[str]) -> None:
    """Of a shell variable that is not set; as a path it would be the current folder."""
    assert "The value of --output is empty;" in safe("train", *flags)
    assert "An argument is empty" in safe("data", "pack", "")


def test_home_behind_an_equals_sign(
    cli: Command, synthetic_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "videos").symlink_to(synthetic_data)
    command = train_flags("~/videos", "~/a", "--output=~/run")
    assert cli(*command).code == 0
    assert (tmp_path / "run" / "model").is_dir() and not (tmp_path / "a").exists()


def test_a_file_to_write_that_is_none(safe: Command, tmp_path: Path) -> None:
    """It would be replaced, were it a device."""
    pipe = tmp_path / "pipe.html"
    os.mkfifo(pipe)
    said = safe("bench", "report", "--output", pipe)
    assert f"{pipe} is there already and no file;" in said
    with pytest.raises(UserError, match="is there already and no file"):
        doctor._write(pipe, {})  # which the command calls at its end
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_page_has_the_name_of_one(safe: Command, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("precious", encoding="utf-8")
    assert "choose a name that ends in .html" in safe("bench", "report", "--output", precious)
    assert precious.read_text(encoding="utf-8") == "precious"


def test_a_run_that_trained_nothing_may_get_other_settings(
    cli: Command, refused: Command, synthetic_data: Path, tmp_path: Path
) -> None:
    """As after a batch that did not fit into the memory."""
    command = train_flags(synthetic_data, tmp_path / "run")
    assert "memory" in refused(*command, "--train.batch", 10**12)
    assert cli(*command).code == 0
    assert "other settings: train.batch 2 (now 1)" in refused(*command, "--train.batch", 1)


def test_a_misspelt_flag_of_segment(safe: Command, tmp_path: Path) -> None:
    said = safe("segment", tmp_path, "--checkpoit", "a", "--output", tmp_path / "out")
    assert said.startswith("smtc: There is no flag --checkpoit; did you mean --checkpoint?")
    assert "not given: --output" in safe("segment", tmp_path, "--checkpoint", "a", "--xyzzy", "b")


# Synthesizing.


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--videos 0", "videos is 0"),
        ("--frames 0", "frames is 0"),
        ("--size 3", "size is 3"),
        ("--seed -1", "seed is -1"),
        ("--difficulty easy", "--difficulty is 'easy'; choose from standard, instances, hard."),
        ("--size 1000000", "size is 1000000; use at most 8192."),
    ],
)
def test_impossible_synthetic_sets(safe: Command, tmp_path: Path, flags: str, told: str) -> None:
    assert told in safe("data", "synthesize", tmp_path / "videos", *flags.split())


def test_another_synthetic_set_is_there(safe: Command, synthetic_data: Path) -> None:
    said = safe("data", "synthesize", synthetic_data, "--videos", 7)
    assert str(synthetic_data) in said and "videos 6 instead of 7" in said


# Who speaks, and what is no mistake.


def test_only_memory_that_does_not_suffice_is_a_mistake() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to")):
        with pytest.raises(UserError, match="The memory does not suffice"), enough_memory():
            raise error
    with pytest.raises(RuntimeError, match="a fault of ours"), enough_memory():
        raise RuntimeError("a fault of ours")


def test_which_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    agreed = UserError("x")
    agreed.agreed = True
    assert cli_module._speaks(agreed) and not waited
    assert cli_module._speaks(UserError("x")) and len(waited) == 1
    assert not cli_module._speaks(ToldElsewhereError("x")) and len(waited) == 2
    monkeypatch.setenv("RANK", "0")
    assert cli_module._speaks(UserError("x")) and len(waited) == 2


def test_what_was_given_to_a_flag() -> None:
    words = ["--sizes", "1", "2", "--ops", "3", "--sizes=4", "5"]
    assert _given("--ops", words) == ["3"]
    assert _given("--sizes", words) == ["4"]
    assert _given("--sizes", words[:5]) == ["1", "2"]
