"""What several test files share: a small data folder, a small config, the command line, awkward
file systems.
"""

import os

# Kernels run in Triton's interpreter, which has to be chosen before triton is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import changed, tree

from smtc import presets
from smtc.config import Config
from smtc.pipelines.synthetic import synthesize

ROOT = Path(__file__).resolve().parent.parent
TinyConfig = Callable[..., Config]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that parallel processes end together."""
    items.sort(key=lambda item: item.path.name != "test_implementations.py")


@pytest.fixture(autouse=True)
def _keep_thread_count() -> Iterator[None]:
    """Training sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def synthetic_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of eight 32x32 frames with masks, in the DAVIS layout; not to be changed."""
    folder = tmp_path_factory.mktemp("synthetic") / "videos"
    return synthesize(folder, videos=6, frames=8, size=32)


@pytest.fixture(scope="session")
def davis2016() -> Path:
    """Real DAVIS-2016 sequences: the folder in SMTC_DAVIS2016, or a sample beside the checkout."""
    folder = Path(os.environ.get("SMTC_DAVIS2016", ROOT.parent / "shared" / "davis2016"))
    if not (folder / "JPEGImages" / "480p").is_dir():
        pytest.skip(f"DAVIS-2016 is not in {folder}; name its folder in SMTC_DAVIS2016")
    return folder


@pytest.fixture(scope="session")
def tiny_config(synthetic_data: Path) -> TinyConfig:
    """A function: dotted settings to the preset `tiny` (or another) reduced to a fraction of a
    second.
    """
    small = {
        "data.root": str(synthetic_data),
        "data.workers": 0,
        "model.resolution": (32, 32),
        "train.steps": 4,
        "train.batch": 2,
        "train.device": "cpu",
        "train.threads": 1,
        "train.log_every": 1,
    }

    def make(settings: dict[str, Any] | None = None, *, preset: str = "tiny") -> Config:
        return changed(presets.get(preset), small | (settings or {}))

    return make


@pytest.fixture(scope="session")
def tiny_run(tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps; not to be changed."""
    from smtc.training.trainer import train

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return train(tiny_config({"train.steps": 2, "output": str(folder)})).folder


@dataclass(frozen=True)
class Told:
    """What a command line said."""

    code: int
    out: str
    error: str

    @property
    def sentence(self) -> str:
        """Standard error without the box that tyro draws, on one line."""
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", self.error).split())


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """A function that runs `smtc` with arguments in this process; a traceback fails the test."""

    from smtc.cli import main  # not at the top: the GPU tests run without what the CLI needs

    def run(*arguments: object) -> Told:
        capsys.readouterr()
        code: Any = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return Told(code, said.out, said.err)

    return run


@pytest.fixture
def refused(cli: Callable[..., Told]) -> Callable[..., str]:
    """A function that runs `smtc`, demands exit code 2 and returns what it said."""

    def run(*arguments: object) -> str:
        told = cli(*arguments)
        assert told.code == 2, told
        return told.sentence

    return run


@pytest.fixture
def videos(synthetic_data: Path, tmp_path: Path) -> Path:
    """A copy of the data that may be damaged."""
    return Path(shutil.copytree(synthetic_data, tmp_path / "videos"))


@pytest.fixture
def safe(refused: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """As `refused`, and nothing under the test's folder may appear or vanish."""

    def run(*arguments: object) -> str:
        before = tree(tmp_path)
        said = refused(*arguments)
        assert tree(tmp_path) == before
        return said

    return run


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function: mount options to a fresh folder in memory; skips where that is not allowed."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def read_only(mounted: Callable[[str], Path]) -> Path:
    """An empty folder in which even root cannot write."""
    return mounted("ro,size=64k")
