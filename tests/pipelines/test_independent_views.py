"""Views with their own crops: targets warped to the student's grid are what the student sees."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smtc.config import AugmentConfig, DataConfig
from smtc.objectives import warp_to_student
from smtc.pipelines.batch import Batch
from smtc.pipelines.clips import Schedule
from smtc.pipelines.loading import build_loader
from smtc.pipelines.views import IMAGENET_MEAN, IMAGENET_STD

SIZE, GRID = (96, 64), (24, 16)
GEOMETRY = AugmentConfig(crop=(0.4, 0.8), flip=0.5)


def batch_of(root: Path, augment: AugmentConfig = GEOMETRY, clips: int = 16) -> Batch:
    config = DataConfig(
        root=str(root), spatial="independent", workers=0, loader="torch", gap=1, augment=augment
    )
    schedule = Schedule(batch=clips, steps=1)
    loader = build_loader(config, schedule, size=SIZE, seed=3)
    batch = next(iter(loader))
    loader.close()
    return batch


def on_the_grid(views: Tensor) -> Tensor:
    """Normalised views `[B,T,3,H,W]` as colours in [0, 1] of the tokens, `[B,T,3,L]`."""
    colours = views * torch.tensor(IMAGENET_STD)[:, None, None]
    colours = colours + torch.tensor(IMAGENET_MEAN)[:, None, None]
    pooled = F.adaptive_avg_pool2d(colours.flatten(0, 1), GRID)
    return pooled.view(*views.shape[:3], -1)


def compared(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's warped picture, the student's, and where `[B,1,1,L]` the teacher sees."""
    assert batch.spatial is not None
    student, teacher = (on_the_grid(view) for view in batch.views.unbind(1))
    warped = warp_to_student(teacher, batch.spatial, GRID)
    seen = warp_to_student(torch.ones_like(teacher[:, :1, :1]), batch.spatial, GRID)
    return warped, student, seen > 0.999


@pytest.fixture
def ramps(tmp_path: Path) -> Path:
    """Frames whose red grows from left to right and whose green from top to bottom."""
    rows, columns = np.mgrid[:200, :240]
    frame = np.stack([rows * 0, rows * 255 // 199, columns * 255 // 239], -1)  # blue first
    for video in ("a", "b"):
        (tmp_path / video).mkdir()
        for number in range(4):
            cv2.imwrite(str(tmp_path / video / f"{number}.png"), frame.astype(np.uint8))
    return tmp_path


def test_the_warped_place_is_right_to_a_fraction_of_a_token(ramps: Path) -> None:
    """On a ramp, a colour is a place: its error is divided by what one token of the view spans."""
    batch = batch_of(ramps)
    warped, student, seen = compared(batch)
    assert batch.spatial is not None
    assert 0 < batch.spatial[:, :, 4].mean() < 1
    assert (batch.spatial[:, 0, 4] != batch.spatial[:, 1, 4]).any()
    assert seen.float().mean() > 0.3
    for channel, extent, tokens in ((0, 2, GRID[1]), (1, 3, GRID[0])):
        span = batch.spatial[:, 0, extent] / tokens
        error = (warped - student)[:, :, channel] / span[:, None, None]
        worst = (error.abs() * seen[:, :, 0]).max()
        assert worst < 0.25, (channel, float(worst))


def test_real_content_agrees_where_the_teacher_sees_it(videos: Path) -> None:
    batch = batch_of(videos)
    warped, student, seen = compared(batch)
    difference = ((warped - student).abs() * seen).sum() / seen.expand_as(student).sum()
    # Of a teacher that is taken as it is, without a warp, for comparison.
    _, teacher = (on_the_grid(view) for view in batch.views.unbind(1))
    unwarped = ((teacher - student).abs() * seen).sum() / seen.expand_as(student).sum()
    # Crops end at whole pixels of these small frames, so some difference stays.
    assert difference < 0.06
    assert unwarped > 3 * difference


def test_views_with_one_crop_for_both_are_warped_onto_themselves(videos: Path) -> None:
    whole = AugmentConfig(crop=(1, 1))
    warped, student, seen = compared(batch_of(videos, whole, clips=2))
    assert seen.all()
    torch.testing.assert_close(warped, student, rtol=0, atol=1e-5)
