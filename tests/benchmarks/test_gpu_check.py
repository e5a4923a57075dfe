"""`make gpu-check`: parts, time limits, the tar; and that it needs little of the machine."""

import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from smtc.benchmarks import gpu_check
from smtc.benchmarks.gpu_check import Step

ROOT = Path(__file__).resolve().parents[2]


def test_an_unknown_part_ends_in_a_sentence() -> None:
    command = ["make", "--silent", "gpu-check", "PART=stop", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'stop' is no part; say make gpu-check PART=tests|kernels|step|data" in done.stderr


def test_without_a_gpu_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: False)
    monkeypatch.setattr(gpu_check, "install", lambda: pytest.fail("installed"))
    assert gpu_check.main(["tests"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has all it needs, and the folder of the results."""
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_check, "install", lambda: True)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return tmp_path / "out"


def test_results_are_packed_whatever_happens(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    write = "import os; assert os.environ['TRITON_INTERPRET'] == '0'; open(r'{}/a.json', 'w')"
    monkeypatch.setattr(gpu_check, "LIMIT", gpu_check.PACKING + 6)
    monkeypatch.setattr(
        gpu_check,
        "steps",
        lambda part, folder: [
            Step("writes", ["-c", write.format(folder)], 1.0),
            Step("fails", ["-c", "raise SystemExit(3)"], 1.0),
            Step("hangs", ["-c", hangs], 0.5),
        ],
    )
    start = time.monotonic()
    assert gpu_check.main(["kernels"]) == 1
    assert time.monotonic() - start < 15
    assert "writes: passed, fails: 3, hangs: stopped after" in capsys.readouterr().out
    with tarfile.open(ready / "kernels.tar") as packed:
        names = set(packed.getnames())
    logs = {f"kernels/{name}.log" for name in ("writes", "fails", "hangs")}
    assert names == {"kernels", "kernels/a.json", *logs}
    assert (ready / "kernels" / "hangs.log").read_text() == "begun\n"


@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_the_steps_are_commands_that_exist(part: str, tmp_path: Path) -> None:
    for step in gpu_check.steps(part, tmp_path):
        if step.command[0] == "-c":
            code = step.command[1].replace("{module}", step.name).replace("{seconds}", "60")
            compile(code, step.name, "exec")
            assert (ROOT / "benchmarks" / f"{step.name}.py").exists()
        else:
            files = [word for word in step.command if word.endswith(".py")]
            assert files and all((ROOT / file).exists() for file in files)


def test_a_machine_without_the_command_line_s_packages_will_do() -> None:
    """None of tyro, DALI, PyAV or TensorBoard is needed to check and time kernels and loaders."""
    code = """
import sys
for name in ("tyro", "nvidia.dali", "av", "timm", "tensorboard", "torch.utils.tensorboard"):
    sys.modules[name] = None
from smtc import presets
from smtc.benchmarks import data, kernels, parity, report, step
from smtc.method import SMTCMethod
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
