"""A small set of videos that several tests read."""

from pathlib import Path

import pytest

from smtc.pipelines.synthetic import synthesize


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of eight frames of 48x48 in the DAVIS layout; not to be changed."""
    return synthesize(tmp_path_factory.mktemp("data") / "set", videos=8, size=48, seed=5)
