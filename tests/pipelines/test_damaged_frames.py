"""A thousand randomly damaged JPEG files in a training set: none ends the run, each that cannot be
read is named once.
"""

import json
import logging
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import Command, train_flags

from smtc.pipelines.images import BadFrame, read_image
from smtc.pipelines.manifest import load_manifest

COUNT = 1000
KINDS = ("cut", "bits", "header", "zeros", "gap", "junk", "empty", "swapped")


def damaged(picture: bytes, rng: random.Random, kind: str) -> bytes:
    """The file after one accident."""
    content, at = bytearray(picture), rng.randrange(len(picture))
    if kind == "cut":
        del content[at:]
    elif kind == "bits":
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "header":
        content[rng.randrange(min(600, len(content)))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    elif kind == "gap":
        del content[at : at + rng.randrange(1, 300)]
    elif kind == "junk":
        content += rng.randbytes(rng.randrange(1, 2000))
    elif kind == "empty":
        content.clear()
    else:
        content = bytearray(rng.choice([b"<html>404</html>", rng.randbytes(900), bytes(900)]))
    return bytes(content)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand videos of two frames, one of which is damaged: an epoch reads every file."""
    rng, folder = random.Random(7), tmp_path_factory.mktemp("fuzzed") / "data"
    noise = np.random.default_rng(7).integers(0, 256, (48, 64, 3), np.uint8)
    pixels = cv2.GaussianBlur(noise, (3, 3), 0)
    picture = cv2.imencode(".jpg", pixels)[1].tobytes()
    for number in range(COUNT):
        video = folder / f"{number:04}"
        video.mkdir(parents=True)
        frames = [picture, damaged(picture, rng, KINDS[number % len(KINDS)])]
        for frame, content in enumerate(reversed(frames) if number % 2 else frames):
            (video / f"{frame}.jpg").write_bytes(content)
    return folder


def unreadable(data: Path) -> dict[str, str]:
    """`<video>/<file>` to the message for it, by reading each file alone."""
    found = {}
    for file in sorted(data.rglob("*.jpg")):
        try:
            read_image(file)
        except BadFrame as error:
            found[f"{file.parent.name}/{file.name}"] = str(error)
    return found


def train(
    cli: Command, data: Path, run: Path, log: pytest.LogCaptureFixture, *more: object
) -> Counter[str]:
    """Train for an epoch; the messages of the log about files, which are those of the record."""
    flags = ["--data.frames", 2, "--train.batch", 100, "--train.steps", COUNT // 100]
    flags += ["--data.max-bad-share", 1, "--model.slots", 2, "--model.instances", 1, *more]
    log.clear()
    with log.at_level(logging.WARNING, "smtc"):
        assert cli(*train_flags(data, run, *flags)).code == 0
    said = Counter(r.getMessage() for r in log.records if ".jpg: " in r.getMessage())
    text = (run / "bad_files.jsonl").read_text(encoding="utf-8")
    assert Counter(json.loads(line)["message"] for line in text.splitlines()) == said
    return said


def test_training_names_each_that_cannot_be_read_once(
    cli: Command, fuzzed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = unreadable(fuzzed)
    assert len(expected) > 500
    assert train(cli, fuzzed, tmp_path / "run", caplog) == Counter(expected.values())


def test_inspection_finds_more_of_which_training_then_knows(
    cli: Command, fuzzed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Damage in the middle that decodes to noise, and nothing that is whole."""
    cache = tmp_path / "cache"
    command = ["data", "inspect", fuzzed, "--frames", 2, "--workers", 2, "--output", cache]
    assert cli(*command).code == 1
    manifest = load_manifest(cache, fuzzed)
    assert manifest is not None
    named = {
        f"{video.name}/{file}": found.reason
        for video in manifest.videos
        for file, found in video.broken.items()
    }
    expected = unreadable(fuzzed)
    assert set(expected) < set(named) and len(named) > 700
    assert all(damaged_frame(name) for name in named)
    flags = ["--data.cache", cache, "--data.workers", 2]
    said = train(cli, fuzzed, tmp_path / "run", caplog, *flags)
    assert said == Counter(f"{name}: {reason}" for name, reason in named.items())


@pytest.mark.slow
def test_dali_lives_on_what_an_inspection_leaves(
    cli: Command, fuzzed: Path, tmp_path: Path
) -> None:
    """Without one its decoder dies (segmentation fault in DALI 2.4) of some of these files."""
    pytest.importorskip("nvidia.dali")
    cli("data", "inspect", fuzzed, "--frames", 2, "--output", tmp_path / "cache")
    manifest = load_manifest(tmp_path / "cache", fuzzed)
    assert manifest is not None
    flags = ["--data.frames", 2, "--train.batch", 100, "--train.steps", COUNT // 100]
    flags += ["--data.max-bad-share", 1, "--data.loader", "dali", "--data.workers", 2]
    flags += ["--data.cache", tmp_path / "cache"]
    command = [sys.executable, "-m", "smtc", *train_flags(fuzzed, tmp_path / "run", *flags)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "run" / "bad_files.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == sum(len(video.broken) for video in manifest.videos)


def damaged_frame(name: str) -> bool:
    """Whether it is the damaged one of its video."""
    video, frame = name.removesuffix(".jpg").split("/")
    return int(frame) == 1 - int(video) % 2
