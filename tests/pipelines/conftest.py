"""A small set of videos and a picture that several tests read."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from smtc.pipelines.synthetic import synthesize


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of eight frames of 48x48 in the DAVIS layout; not to be changed."""
    return synthesize(tmp_path_factory.mktemp("data") / "set", videos=8, size=48, seed=5)


@pytest.fixture
def data(videos: Path, tmp_path: Path) -> Path:
    """Videos that a test may change."""
    return Path(shutil.copytree(videos, tmp_path / "data"))


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A JPEG file of 160x120."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
    pixels = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
