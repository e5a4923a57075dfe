"""`smtc doctor`: what of the libraries is there and works, and what the absence of the rest costs.

Each is tried (`smtc.probes`) in a process of its own, `python -m smtc.doctor NAME`, so that what
crashes or hangs takes nothing else down. Nothing is imported here that could be broken. The report
holds no environment variables.
"""

import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from smtc import __version__, probes
from smtc.errors import UserError
from smtc.probes import Answer, State

_MARK = "smtc-doctor "  # begins the line with the answer; libraries print lines of their own
_MOST_AT_ONCE = 4
_LONGEST = 300  # letters of a reason
_COUNTED = {"works": "work", "limited": "limited", "missing": "missing", "broken": "broken"}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One thing to try."""

    name: str
    attempt: Callable[[], Answer]
    costs: str
    """What does not go without it."""
    remedy: str
    packages: tuple[str, ...] = ()
    """Import names; the thing is missing where one cannot be found."""
    distributions: tuple[str, ...] = ()
    """Patterns of names on the package index, for the version."""
    timeout: float = 30.0


TRAINING = Probe(
    name="training",
    attempt=probes.try_training,
    costs="nothing can be trained here",
    remedy="mend what the reason names; pip install -e '.[all]' -c constraints.txt in the "
    "checkout installs what was tested",
    timeout=180,
)

PROBES = (
    Probe(
        name="Python",
        attempt=probes.try_python,
        costs="nothing runs",
        remedy="install Python 3.11 or newer",
    ),
    Probe(
        name="torch",
        attempt=probes.try_torch,
        packages=("torch",),
        distributions=("torch",),
        costs="nothing runs",
        remedy="pip install torch (for a GPU in a build for its CUDA: pytorch.org)",
    ),
    Probe(
        name="CUDA",
        attempt=probes.try_cuda,
        costs="all runs on the CPU: the preset tiny trains in minutes, the paper's settings do not",
        remedy="an NVIDIA GPU of compute capability 8.0 or newer, its driver, and a torch built "
        "for CUDA",
        timeout=60,
    ),
    Probe(
        name="processes",
        attempt=probes.try_processes,
        costs="training runs in one process, on one GPU",
        remedy="pip install torch in a build with torch.distributed",
        timeout=60,
    ),
    Probe(
        name="Triton",
        attempt=probes.try_triton,
        packages=("triton",),
        distributions=("triton",),
        costs="a GPU runs the operations in plain torch (eager), slower and with more memory",
        remedy="pip install triton, on a machine with a CUDA device",
        timeout=120,
    ),
    Probe(
        name="operations",
        attempt=probes.try_operations,
        costs="the model cannot compute",
        remedy="mend torch or Triton above; --model.impl eager needs torch alone",
        timeout=120,
    ),
    Probe(
        name="DALI",
        attempt=probes.try_dali,
        packages=("nvidia", "nvidia.dali"),
        distributions=("nvidia-dali-cuda*",),
        costs="frames are decoded and augmented by OpenCV in worker processes, not on the GPU",
        remedy="pip install nvidia-dali-cuda130",
        timeout=60,
    ),
    Probe(
        name="PyAV",
        attempt=probes.try_pyav,
        packages=("av",),
        distributions=("av",),
        costs="video files, or those of some codecs, cannot be read: extract their frames; "
        "overlays are not written as H.264, which browsers play",
        remedy="pip install av",
    ),
    Probe(
        name="OpenCV",
        attempt=probes.try_opencv,
        packages=("cv2",),
        distributions=("opencv-*",),
        costs="frames cannot be read, masks and pictures cannot be written",
        remedy="pip install opencv-python-headless",
    ),
    Probe(
        name="xformers",
        attempt=probes.try_xformers,
        packages=("xformers",),
        distributions=("xformers",),
        costs="--model.attention xformers cannot be chosen; torch's own attention runs",
        remedy="pip install xformers in a version for this torch, on a machine with a CUDA device",
        timeout=60,
    ),
    Probe(
        name="apex",
        attempt=probes.try_apex,
        distributions=("apex",),
        costs="--optim.impl apex cannot be chosen; torch's fused AdamW runs",
        remedy="build it from github.com/NVIDIA/apex, on a machine with a CUDA device",
        timeout=60,
    ),
    Probe(
        name="safetensors",
        attempt=probes.try_safetensors,
        packages=("safetensors",),
        distributions=("safetensors",),
        costs="models can be neither saved nor loaded",
        remedy="pip install safetensors",
    ),
    Probe(
        name="checkpoints",
        attempt=probes.try_checkpoints,
        costs="a stopped training run cannot go on",
        remedy="pip install torch in a build with torch.distributed",
    ),
    Probe(
        name="TensorBoard",
        attempt=probes.try_tensorboard,
        packages=("tensorboard",),
        distributions=("tensorboard",),
        costs="training cannot write its curves and pictures",
        remedy="pip install tensorboard",
    ),
    Probe(
        name="matplotlib",
        attempt=probes.try_matplotlib,
        packages=("matplotlib",),
        distributions=("matplotlib",),
        costs="reports and benchmark pages have no charts",
        remedy="pip install matplotlib",
    ),
    Probe(
        name="C++ compiler",
        attempt=probes.try_compiler,
        costs="--train.compile cannot be chosen on a CPU",
        remedy="install g++, or name yours in the environment variable CXX",
    ),
    Probe(
        name="shared memory",
        attempt=probes.try_shared_memory,
        costs="data workers can die of a bus error when their batches do not fit",
        remedy="1 GiB or more (docker run --shm-size 8g), or --data.workers 0",
    ),
    Probe(
        name="open files",
        attempt=probes.try_open_files,
        costs="data workers can run out of file descriptors",
        remedy="ulimit -n 4096",
    ),
    Probe(
        name="disk",
        attempt=probes.try_disk,
        costs="runs, packed frames and downloaded weights may not fit",
        remedy="free some space, give --output another folder, or set XDG_CACHE_HOME",
    ),
    TRAINING,
)


def examine(probe: Probe) -> Answer:
    """Try it in this process; nothing that the library raises gets out."""
    try:
        return probe.attempt()
    except BaseException as error:  # a broken library may even raise SystemExit
        if isinstance(error, ModuleNotFoundError) and error.name in probe.packages:
            return Answer("missing", "not installed")
        return Answer("broken", _one_line(error))


def _one_line(error: BaseException) -> str:
    """An error's kind and the first line of its words; a sentence of ours as it is."""
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    shown = words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"
    if isinstance(error, UserError):
        return shown
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is known of one thing after it was tried."""

    name: str
    state: State
    version: str | None
    """Of the package, where there is one."""
    detail: str
    costs: str
    remedy: str
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.state:<9}{self.name:<15}{self.version or '':<11} {self.detail}".rstrip()]
        if self.state != "works":
            lines += [f"{'':<9}  without it: {self.costs}", f"{'':<9}  to get it:  {self.remedy}"]
        return "\n".join(lines)


def doctor(output: Path | None = None) -> int:
    """Try everything and print a line or three on each; `output` gets the same as JSON.

    Returns the exit code: 1 where a tiny training run fails, else 0. Errors: `UserError` where
    `output` cannot be written.
    """
    findings = []
    for finding in _tried(PROBES):
        print(finding, flush=True)
        findings.append(finding)
    trains = next(finding for finding in findings if finding.name == TRAINING.name)
    states = Counter(finding.state for finding in findings)
    print("\n" + ", ".join(f"{number} {_COUNTED[state]}" for state, number in states.items()))
    if output is not None:
        _write(output, {"smtc": __version__, "findings": [vars(f) for f in findings]})
    if trains.state == "works":
        print(f"SMTC can train here: {trains.detail}, in {trains.seconds:.0f} s.")
        return 0
    print(f"SMTC cannot train here: {trains.detail}")
    return 1


def _tried(wanted: tuple[Probe, ...]) -> Iterator[Finding]:
    """A finding for each, in order, as soon as it and those before it are there."""
    children = _Children()
    with (
        tempfile.TemporaryDirectory(prefix="smtc-doctor-") as folder,
        ThreadPoolExecutor(min(_MOST_AT_ONCE, os.cpu_count() or 1)) as pool,
    ):
        try:
            started = [pool.submit(_find, probe, folder, children) for probe in wanted]
            for future in started:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.end()
            raise


class _Children:
    """Processes that try something, which end with us."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def run(self, command: list[str], folder: str, timeout: float) -> tuple[int | None, str, str]:
        """Exit status (None after `timeout` seconds), standard output and standard error.

        What it leaves in the folder for temporary files, which is `folder`, the caller removes.
        """
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | {"TMPDIR": folder},
            start_new_session=True,  # so that what it starts can be ended with it
        )
        self._running.add(process)
        try:
            if self._ended:
                _kill(process)
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                _kill(process)
                out, err = process.communicate()
                return None, out, err
            return process.returncode, out, err
        finally:
            self._running.discard(process)

    def end(self) -> None:
        """Kill those that run, and those that start later."""
        self._ended = True
        for process in list(self._running):
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _find(probe: Probe, folder: str, children: _Children) -> Finding:
    command = [sys.executable, "-P", "-m", "smtc.doctor", probe.name]
    began = time.monotonic()
    answer = _understood(probe, *children.run(command, folder, probe.timeout))
    return Finding(
        name=probe.name,
        version=_version(probe.distributions),
        costs=probe.costs,
        remedy=probe.remedy,
        seconds=round(time.monotonic() - began, 2),
        **vars(answer),
    )


def _understood(probe: Probe, status: int | None, out: str, err: str) -> Answer:
    """What a process said, or how it died."""
    for line in out.splitlines():
        if line.startswith(_MARK):
            return Answer(**json.loads(line.removeprefix(_MARK)))
    if status is None:
        return Answer("broken", f"no answer within {probe.timeout:g} s")
    if status < 0:
        return Answer("broken", f"it crashes ({signal.Signals(-status).name})")
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "it says nothing")
    return Answer("broken", f"it ends with status {status}: {last.strip()[:_LONGEST]}")


def _version(patterns: tuple[str, ...]) -> str | None:
    """Of the first installed distribution whose name fits one of `patterns`."""
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"] or ""
        if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns):
            return found.version
    return None


def _write(output: Path, content: object) -> None:
    if output.exists() and not output.is_file():
        raise UserError(f"{output} is there already and no file; choose another --output.")
    partial = output.with_name(output.name + ".partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}); choose another --output."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def main(name: str) -> None:
    """Try the probe called `name` in this process and print what came of it."""
    (probe,) = (probe for probe in PROBES if probe.name == name)
    with contextlib.redirect_stdout(sys.stderr):
        answer = examine(probe)
    print(_MARK + json.dumps(dataclasses.asdict(answer)), flush=True)
    os._exit(0)  # some libraries crash while they are unloaded, when all has been said


if __name__ == "__main__":
    main(sys.argv[1])
