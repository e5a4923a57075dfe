"""The folders install as one package, without the extras too, and name no machine."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("smtc", "kernels", "pipelines", "benchmarks")
EXTRAS = ("triton", "nvidia", "av", "matplotlib", "xformers")
MODULES = (
    "smtc",
    "smtc.model",
    "smtc.training.trainer",
    "smtc.inference",
    "smtc.evaluation.discovery",
    "smtc.cli",
    "smtc.kernels",
    "smtc.pipelines.torch_loader",
    "smtc.warm_start",
)

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extras!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
"""

STEP = """
import torch
from smtc import presets
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch

method = SMTCMethod(presets.tiny())
batch = Batch(torch.randn(1, 2, 4, 3, 96, 96), [], torch.arange(1))
method.training_step(batch, 500)["loss"].backward()
"""


def python(code: str, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def listed_files() -> list[Path]:
    """What is committed or would be."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_the_folders_are_one_package(tmp_path: Path) -> None:
    code = "import smtc.kernels, smtc.pipelines, smtc.benchmarks; print(smtc.kernels.__name__)"
    done = python(code, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("smtc.kernels\n", 0), done.stderr


def test_kernels_refuse_another_name() -> None:
    done = python("import kernels")
    assert done.returncode == 1
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert "smtc.kernels" in done.stderr and "pip install -e ." in done.stderr


def test_nothing_needs_the_extras(tmp_path: Path) -> None:
    imports = "\n".join(f"import {module}" for module in MODULES)
    found = f"assert not [m for m in sys.modules if m.partition('.')[0] in {EXTRAS!r}]"
    block = BLOCK.format(extras=EXTRAS)
    done = python(f"{block}\n{imports}\n{STEP}\n{found}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_block_blocks(tmp_path: Path) -> None:
    """So that the test above can fail."""
    done = python(BLOCK.format(extras=EXTRAS) + "\nimport av.video", cwd=tmp_path)
    assert "No module named 'av' (blocked)" in done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which a wheel of the checkout was installed."""
    assert int(version("setuptools").partition(".")[0]) >= 77, "update setuptools"
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # A copy, since the build writes beside its source.
    for path in listed_files():
        relative = path.relative_to(ROOT)
        if relative.parts[0] in PACKAGE or len(relative.parts) == 1:
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, source / relative)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    build = ["wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(folder), "-q"]
    subprocess.run([*pip, *build], check=True, cwd=folder)
    (wheel,) = folder.glob("smtc-*.whl")
    install = ["install", str(wheel), "--no-deps", "--target", str(folder / "site"), "-q"]
    subprocess.run([*pip, *install], check=True, cwd=folder)
    return folder / "site"


def test_a_wheel_holds_every_module(installed: Path) -> None:
    ours = {path.relative_to(ROOT) for path in listed_files() if path.suffix == ".py"}
    expected = set()
    for path in ours:
        if path.parts[0] in PACKAGE:
            expected.add(path if path.parts[0] == "smtc" else Path("smtc") / path)
    found = {path.relative_to(installed) for path in installed.rglob("*.py")}
    assert found == expected
    assert not (installed / "kernels").exists()


def test_an_installed_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import smtc, smtc.kernels, smtc.pipelines.clips, smtc.training.trainer, smtc.cli\n"
        f"assert smtc.kernels.__file__.startswith({str(installed)!r}), smtc.kernels.__file__\n"
        f"assert smtc.__file__.startswith({str(installed)!r}), smtc.__file__\n{STEP}"
    )
    done = python(code, "-I", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_wheel_says_what_it_needs(installed: Path) -> None:
    (info,) = installed.glob("smtc-*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    assert "Requires-Python: >=3.11" in metadata
    assert "smtc = smtc.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    core = " ".join(line for line in needs if "extra ==" not in line)
    for name in ("torch>=2.11", "numpy", "scipy", "opencv-python-headless", "safetensors", "tyro"):
        assert f"Requires-Dist: {name}" in core
    for name in (*EXTRAS, "nvidia-dali"):
        assert f"Requires-Dist: {name}" not in core
    assert not any("xformers" in line and 'extra == "all"' in line for line in needs)
    assert any("triton" in line and 'extra == "all"' in line for line in needs)


def test_the_command_is_installed(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("smtc")
    done = subprocess.run([command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "smtc train" in done.stdout


def test_no_file_names_a_place_on_one_machine() -> None:
    places = [os.sep.join(["", name, ""]) for name in ("work", "root", "home")]
    found = []
    for path in listed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{path.relative_to(ROOT)}: {place}" for place in places if place in text]
    assert found == []
