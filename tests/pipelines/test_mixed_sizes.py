"""Frames of mixed sizes in one video: each is resized by itself, and the inspection names them."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command, frames_of, train_flags
from PIL import Image

from smtc.config import DataConfig
from smtc.pipelines.clips import Schedule
from smtc.pipelines.images import read_image
from smtc.pipelines.loading import build_loader
from smtc.pipelines.packing import pack
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD, resize_frame
from smtc.training.telemetry import read_metrics

SIZES = [(48, 48), (60, 48), (24, 30), (96, 20)]


@pytest.fixture
def mixed(data: Path) -> Path:
    """Eight videos of which the frames of 00003 have four sizes in turn."""
    for number, frame in enumerate(sorted(frames_of(data, "00003").iterdir())):
        height, width = SIZES[number % 4]
        Image.fromarray(read_image(frame)).resize((width, height)).save(frame)
    return data


@pytest.mark.parametrize("kind", ["torch", "cache", "dali"])
def test_each_frame_is_resized_by_itself(kind: str, mixed: Path, tmp_path: Path) -> None:
    config = DataConfig(root=str(mixed), frames=2, gap=1, workers=0, loader="torch")
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
        config = DataConfig(root=str(mixed), frames=2, gap=1, workers=1, loader="dali")
    if kind == "cache":
        pack(mixed, tmp_path / "cache", size=32, workers=1)
        cache = str(tmp_path / "cache")
        config = DataConfig(
            root=str(mixed), frames=2, gap=1, workers=0, loader="cache", cache=cache
        )
    loader = build_loader(config, Schedule(batch=8, steps=4), size=(32, 32), seed=0)
    seen = 0
    for batch in loader:
        for source, views in zip(batch.sources, batch.views, strict=True):
            if source.video != "00003":
                continue
            for file, frame in zip(source.frames, views[0], strict=True):
                wanted = np.empty((32, 32, 3), np.uint8)
                resize_frame(read_image(file), (32, 32), antialias=False, out=wanted)
                pixels = frame.float().permute(1, 2, 0) * torch.tensor(IMAGENET_STD)
                pixels = 255 * (pixels + torch.tensor(IMAGENET_MEAN))
                assert (pixels - torch.from_numpy(wanted)).abs().mean() < 2
            seen += 1
    loader.close()
    assert seen == 4 and loader.faults.replaced == 0


def test_they_train_and_are_named(
    cli: Command, mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = cli("data", "inspect", mixed, "--output", tmp_path / "cache")
    assert told.code == 0
    assert "mixed in 1 video (00003); training resizes each frame by itself\n" in told.out
    sizes = [f"{width}x{height} in 2 frames" for height, width in SIZES]
    assert f"  00003: {', '.join(sizes)}\n" in told.out
    flags = ["--data.cache", tmp_path / "cache", "--train.steps", 8]
    with caplog.at_level(logging.WARNING, "smtc"):
        assert cli(*train_flags(mixed, tmp_path / "run", *flags)).code == 0
    said = [record.getMessage() for record in caplog.records]
    assert "Frames that differ in size are resized one by one: 00003." in said
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["replaced_clips"] == 0 and not (tmp_path / "run" / "bad_files.jsonl").exists()


def test_nothing_is_said_where_all_are_alike(
    cli: Command, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = frames_of(data, "00001")
    shutil.rmtree(other)
    other.mkdir()
    for number in range(4):  # another size than the other videos, but one
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(other / f"{number}.png")
    assert "mixed" not in cli("data", "inspect", data, "--output", tmp_path / "cache").out
    with caplog.at_level(logging.WARNING, "smtc"):
        flags = ["--data.cache", tmp_path / "cache"]
        assert cli(*train_flags(data, tmp_path / "run", *flags)).code == 0
    assert not [record for record in caplog.records if "differ in size" in record.getMessage()]
