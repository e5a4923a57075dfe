"""What a machine with a GPU is asked: `make gpu-check PART=tests|kernels|step|data`.

Runs as a plain script: it installs this package alone (no network) and starts each step as a
process with a time limit, so that a part ends within 8 minutes whatever hangs. Results go to the
folder in OUT (build/gpu-check when it is not set) row by row, and at the end into one tar there.
"""

import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 8 * 60
PACKING = 15
"""Seconds kept for the tar."""
LAST = 40
"""Seconds before a step is stopped at which it begins nothing new."""

BENCH = """
import sys, time
from pathlib import Path
from smtc.benchmarks import {module}
options = {options}
deadline = time.monotonic() + {seconds}
sys.exit({module}.run(Path(sys.argv[1]), device="cuda", deadline=deadline, **options))
"""
OPTIONS = {"step": {"sizes": (256, 1024, 1500), "ablation": True, "seconds": 3.0}}
"""Arguments of a part's benchmark, beside the folder."""
REPORT = """
import sys
from pathlib import Path
from smtc.benchmarks import report
sys.exit(report.run(Path(sys.argv[1])))
"""


@dataclass(frozen=True)
class Step:
    """A command, and the part of the time that is left when it starts which it may take."""

    name: str
    command: list[str]
    share: float


def steps(part: str, folder: Path) -> list[Step]:
    """The steps of a part, the most important first."""
    # The tests' common conftest imports the command line, whose packages may be missing there.
    pytest = ["-m", "pytest", "tests/kernels/test_on_gpu.py", "--confcutdir=tests/kernels", "-ra"]
    stepping = ["-m", "pytest", "tests/training/test_step_on_gpu.py", "-ra"]
    stepping += ["--confcutdir=tests/training", "-o", "pythonpath=tests"]
    clips = ["-m", "pytest", "tests/pipelines/test_dali_on_gpu.py", "-ra"]
    bench = ["-c", BENCH.replace("{options}", repr(OPTIONS.get(part, {}))), str(folder)]
    if part == "tests":
        # First what writes row by row; what it compiles the tests then find in Triton's cache.
        tests = [Step("tests", pytest, 0.6), Step("stepping", stepping, 1.0)]
        return [Step("parity", bench, 0.4), *tests]
    if part == "data":
        bench_and_tests = [Step("clips", clips, 0.3), Step(part, bench, 0.9)]
        return [*bench_and_tests, Step("report", ["-c", REPORT, str(folder)], 1.0)]
    return [Step(part, bench, 0.95), Step("report", ["-c", REPORT, str(folder)], 1.0)]


PARTS = ("tests", "kernels", "step", "data")


def main(arguments: list[str]) -> int:
    """Run a part; 1 where a step failed, 2 where nothing could be run."""
    end = time.monotonic() + LIMIT - PACKING
    if len(arguments) != 1 or arguments[0] not in PARTS:
        given = f"{' '.join(arguments)!r} is no part; " if arguments else ""
        print(f"{given}say make gpu-check PART={'|'.join(PARTS)}", file=sys.stderr)
        return 2
    part = arguments[0]
    if not has_gpu():
        print("torch finds no CUDA device here; run this on a machine with one.", file=sys.stderr)
        return 2
    if not install():
        print(f"The package cannot be installed for {sys.executable}; see above.", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
    folder = out / part
    folder.mkdir(parents=True, exist_ok=True)
    codes = {}
    for step in steps(part, folder):
        seconds = step.share * (end - time.monotonic())
        codes[step.name] = run(step, folder / f"{step.name}.log", seconds)
    with tarfile.open(out / f"{part}.tar", "w") as packed:
        packed.add(folder, arcname=part)
    said = ", ".join(f"{name}: {code if code else 'passed'}" for name, code in codes.items())
    print(f"{said}. All results: {out / part}.tar")
    return 1 if any(codes.values()) else 0


def has_gpu() -> bool:
    """Asked in a process of its own, which leaves no memory on the device."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


def install() -> bool:
    """Put this checkout where `import smtc` finds it."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    command = [sys.executable, "-m", "pip", "install", *options]
    return subprocess.run(command, check=False).returncode == 0


def run(step: Step, log: Path, seconds: float) -> int | str:
    """The exit code of a step, or what became of it; its output goes to the screen and a file."""
    if seconds < 1:
        return "no time left"
    patient = max(1.0, seconds - LAST)
    command = [word.replace("{seconds}", f"{patient:.0f}") for word in step.command]
    command = [word.replace("{module}", step.name) for word in command]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
    print(f"--- {step.name}, at most {seconds:.0f} s", flush=True)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    copying = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    copying.start()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
        copying.join(5)


def _copy(output: IO[bytes], log: Path) -> None:
    with log.open("wb") as file:
        for line in output:
            file.write(line)
            file.flush()
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
