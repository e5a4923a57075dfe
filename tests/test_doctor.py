"""`smtc doctor`: each probe as it is here, and with its library missing, broken, hanging, wrong."""

import builtins
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint
from commands import Command

from smtc import doctor, kernels
from smtc.attention import load_xformers
from smtc.doctor import PROBES, TRAINING, Finding, Probe, examine
from smtc.method import SMTCMethod
from smtc.probes import Answer

BY_NAME = {probe.name: probe for probe in PROBES}


def tried(name: str) -> Answer:
    return examine(BY_NAME[name])


def found(name: str, tmp_path: Path, timeout: float = 30.0) -> Finding:
    """As `smtc doctor` finds it, in a process of its own."""
    probe = dataclasses.replace(BY_NAME[name], timeout=timeout)
    return doctor._find(probe, str(tmp_path), doctor._Children())


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A function: a package's name and its code, found before the real one by new processes."""
    folder = tmp_path / "packages"
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    def install(name: str, code: str) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(code)

    return install


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    load_xformers.cache_clear()
    yield
    load_xformers.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Within the test, importing `package` finds nothing."""

    class Nothing:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in list(sys.modules):
        if name.split(".")[0] == package or name == "torch.utils.tensorboard":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nothing, *sys.meta_path])


# As things are here.


@pytest.mark.parametrize("name", BY_NAME)
def test_nothing_is_broken_here(name: str) -> None:
    answer = tried(name)
    assert answer.state != "broken", answer
    if name in (
        "Python",
        "torch",
        "operations",
        "OpenCV",
        "safetensors",
        "checkpoints",
        "training",
    ):
        assert answer.state == "works", answer


def test_every_probe_says_what_its_absence_costs_and_what_to_do() -> None:
    assert len(BY_NAME) == len(PROBES) and PROBES[-1] is TRAINING
    for probe in PROBES:
        assert probe.costs and probe.remedy and probe.timeout > 0


def test_a_process_gives_the_same_answer(tmp_path: Path) -> None:
    finding = found("OpenCV", tmp_path)
    assert Answer(finding.state, finding.detail) == tried("OpenCV")
    assert finding.version is not None and finding.version.startswith(cv2.__version__)
    assert 0 < finding.seconds < 30


# Missing and broken libraries.


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("Triton", "triton"),
        ("DALI", "nvidia"),
        ("PyAV", "av"),
        ("OpenCV", "cv2"),
        ("xformers", "xformers"),
        ("safetensors", "safetensors"),
        ("TensorBoard", "tensorboard"),
        ("matplotlib", "matplotlib"),
    ],
)
def test_a_library_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    without(monkeypatch, package)
    assert tried(name) == Answer("missing", "not installed")


def test_no_torch_at_all(installed: Callable[[str, str], None], tmp_path: Path) -> None:
    """The command line and the doctor themselves run without it."""
    installed("torch", "raise ModuleNotFoundError('No module named torch', name='torch')")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "smtc", "doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "missing  torch" in done.stdout and "works    OpenCV" in done.stdout
    assert "SMTC cannot train here: ModuleNotFoundError: No module named torch" in done.stdout


def test_a_part_of_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is there, so it is not missing but broken."""
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "cv2":
            raise ModuleNotFoundError("No module named 'numpy.core'", name="numpy.core")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert tried("OpenCV").state == "broken"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise OSError('libavcodec.so.62: no such file')", "OSError: libavcodec.so.62: no such"),
        ("raise ImportError('\\n\\n  built for NumPy 1\\nmore')", "ImportError: built for NumPy 1"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class Odd(BaseException): pass\nraise Odd('x' * 999)", "Odd: " + "x" * 299 + "…"),
        ("print('smtc-doctor nonsense')", "AttributeError: "),
        ("import os; os.abort()", "it crashes (SIGABRT)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashes (SIGSEGV)"),
        (
            "import os, sys; print('oh no', file=sys.stderr, flush=True); os._exit(7)",
            "it ends with status 7: oh no",
        ),
        ("import os; os._exit(0)", "it ends with status 0: it says nothing"),
    ],
)
def test_a_library_that_breaks(
    installed: Callable[[str, str], None], tmp_path: Path, code: str, said: str
) -> None:
    installed("av", code)
    finding = found("PyAV", tmp_path)
    assert finding.state == "broken" and finding.detail.startswith(said), finding
    assert "\n" not in finding.detail and len(finding.detail) < 320


def test_a_library_that_hangs(installed: Callable[[str, str], None], tmp_path: Path) -> None:
    """So does what it started, which holds the pipes open; what they leave lies in our folder."""
    pid = tmp_path / "pid"
    installed(
        "av",
        "import pathlib, subprocess, tempfile, time\ntempfile.mkdtemp(prefix='left')\n"
        f"child = subprocess.Popen(['sleep', '60'])\npathlib.Path({str(pid)!r}).write_text("
        "str(child.pid))\ntime.sleep(60)",
    )
    began = time.monotonic()
    finding = found("PyAV", tmp_path, timeout=0.7)
    assert (finding.state, finding.detail) == ("broken", "no answer within 0.7 s")
    assert time.monotonic() - began < 10
    assert len(list(tmp_path.glob("left*"))) == 1
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until the system has buried it
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.05)


def test_the_other_package_called_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    answer = tried("apex")
    assert answer.state == "broken" and "is another project" in answer.detail


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, name, module)


def test_nvidias_apex_and_xformers_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stand_in(monkeypatch, "apex")
    stand_in(monkeypatch, "apex.optimizers", FusedAdam=object)
    stand_in(monkeypatch, "amp_C")
    stand_in(monkeypatch, "xformers")
    stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=lambda *_: None)
    for name in ("apex", "xformers"):
        answer = tried(name)
        assert answer.state == "limited" and "need a CUDA device" in answer.detail


def test_xformers_without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "xformers")
    stand_in(monkeypatch, "xformers.ops")
    assert "the package cannot be imported" in tried("xformers").detail


# Libraries that do something wrong.


def wrong_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.assignment

    def reversed_on_request(cost: Any, *, impl: Any) -> Any:
        return real(cost, impl=impl).flip(-1 if impl != "eager" else 0)

    monkeypatch.setattr(kernels, "assignment", reversed_on_request)


def forgetful_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed.checkpoint, "load", lambda *_, **__: None)


def forgetful_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors.torch, "load", lambda _: {"x": torch.zeros(2, 3)})


def black_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.zeros((48, 64, 3), np.uint8))


def black_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    real = av.VideoFrame
    black = SimpleNamespace(from_ndarray=lambda x, format: real.from_ndarray(x * 0, format=format))
    monkeypatch.setattr(av, "VideoFrame", black)


def turned_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cv2.imencode
    monkeypatch.setattr(cv2, "imencode", lambda suffix, x: real(suffix, x[::-1]))


def sum_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.zero_())


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)


def dead_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.figure

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *_, **__: None)


def failing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")


def failing_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(SMTCMethod, "training_step", fail)


def unlogged_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smtc.training.trainer.read_metrics", lambda _: [{"loss": 1.0}])


def unsaved_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SMTCMethod, "save_model", lambda *_: None)


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("operations", wrong_operation, "assignment computes something else"),
        ("Triton", wrong_operation, "assignment computes something else"),
        ("checkpoints", forgetful_checkpoint, "comes back changed"),
        ("safetensors", forgetful_tensors, "comes back changed"),
        ("OpenCV", black_pictures, ".jpg file gives back another picture"),
        ("PyAV", black_frames, "H.264 gives back other colours"),
        ("DALI", turned_pictures, "a JPEG decoded on cpu looks different"),
        ("processes", sum_of_nothing, "gloo adds up wrongly"),
        ("processes", no_network, "without torch.distributed"),
        ("matplotlib", dead_figure, "draws no PNG"),
        ("C++ compiler", failing_compiler, "false fails"),
        ("training", failing_step, "RuntimeError: the device is on fire"),
        ("training", unlogged_step, "the losses are [1.0]"),
        ("training", unsaved_model, "no model was written"),
    ],
)
def test_a_wrong_result_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: Callable[[pytest.MonkeyPatch], None],
    said: str,
) -> None:
    fault(monkeypatch)
    answer = tried(name)
    assert answer.state == "broken" and said in answer.detail, answer


# What is there only in part.


def test_video_without_some_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    def refuse(name: str, mode: str) -> bool:
        if name == "vp9":
            return True
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av, "Codec", refuse)
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    assert tried("PyAV") == Answer(
        "limited",
        "writes and reads MPEG-4; has decoders of VP9; writes no H.264; reads no HEVC; "
        "reads no AV1",
    )


def test_opencv_without_an_encoder_of_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cv2.VideoWriter

    class Closed:
        fourcc = staticmethod(real.fourcc)

        def __init__(self, *_: object) -> None: ...

        def write(self, _: object) -> None: ...

        def release(self) -> None: ...

    monkeypatch.setattr(cv2, "VideoWriter", Closed)
    answer = tried("OpenCV")
    assert answer.state == "limited" and "writes no MP4" in answer.detail


def test_torch_for_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tried("CUDA") == Answer("missing", "no device or no driver for CUDA 13.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert tried("CUDA") == Answer("missing", "this torch is built for CPUs only")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert tried("C++ compiler") == Answer("missing", "there is no g++")


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=2**26, used=0, free=2**26)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (usage.total, usage.used, usage.free))
    assert tried("shared memory") == Answer("limited", "/dev/shm: 0.1 of 0.1 GiB free")


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    assert tried("open files") == Answer("limited", "256 (may be raised to unlimited)")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("size=64k", "cache 0.0 GiB free; cache is nearly full"),
        ("ro,size=3g", "cache 3.0 GiB free; {} cannot be written (Read-only file system)"),
    ],
)
def test_a_disk_without_room(
    monkeypatch: pytest.MonkeyPatch, mounted: Callable[[str], Path], options: str, said: str
) -> None:
    folder = mounted(options)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    answer = tried("disk")
    assert answer.state == "limited" and answer.detail.endswith(said.format(folder)), answer


# The report.


def canned(**states: str) -> list[Finding]:
    return [
        Finding(
            name=name.replace("_", " "),
            state=state,  # type: ignore[arg-type]
            version="1.2" if name == "PyAV" else None,
            detail=f"detail of {name}",
            costs=f"cost of {name}",
            remedy=f"remedy of {name}",
            seconds=1.5,
        )
        for name, state in states.items()
    ]


def report(monkeypatch: pytest.MonkeyPatch, **states: str) -> None:
    monkeypatch.setattr(doctor, "_tried", lambda _: iter(canned(**states)))


def test_the_report(monkeypatch: pytest.MonkeyPatch, cli: Command, tmp_path: Path) -> None:
    report(monkeypatch, PyAV="missing", open_files="limited", torch="works", training="works")
    told = cli("doctor", "--output", tmp_path / "doctor.json")
    assert told.code == 0
    assert told.out.splitlines() == [
        "missing  PyAV           1.2         detail of PyAV",
        "           without it: cost of PyAV",
        "           to get it:  remedy of PyAV",
        "limited  open files                 detail of open_files",
        "           without it: cost of open_files",
        "           to get it:  remedy of open_files",
        "works    torch                      detail of torch",
        "works    training                   detail of training",
        "",
        "1 missing, 1 limited, 2 work",
        "SMTC can train here: detail of training, in 2 s.",
    ]
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert [finding["state"] for finding in written["findings"]] == [
        *("missing", "limited", "works", "works"),
    ]
    assert os.listdir(tmp_path) == ["doctor.json"]


def test_only_training_decides(monkeypatch: pytest.MonkeyPatch, cli: Command) -> None:
    report(monkeypatch, torch="works", training="broken")
    told = cli("doctor")
    assert told.code == 1
    assert told.out.splitlines()[-1] == "SMTC cannot train here: detail of training"


def test_a_report_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, safe: Command, tmp_path: Path
) -> None:
    report(monkeypatch, training="works")
    said = safe("doctor", "--output", tmp_path / "nowhere" / "doctor.json")
    assert "doctor.json cannot be written (No such file or directory)" in said


def some(monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[Probe, ...]:
    chosen = tuple(BY_NAME[name] for name in names)
    monkeypatch.setattr(doctor, "PROBES", chosen)
    return chosen


def test_a_broken_training_step_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch,
    cli: Command,
    installed: Callable[[str, str], None],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    installed("scipy", "raise ImportError('GLIBC_2.99 not found')")
    some(monkeypatch, "Python", "training")
    told = cli("doctor", "--output", tmp_path / "doctor.json")
    assert told.code == 1
    assert told.out.endswith("cannot train here: ImportError: GLIBC_2.99 not found\n")
    assert "hunter2" not in told.out + (tmp_path / "doctor.json").read_text()


def test_stopping_ends_all_that_was_started(
    installed: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    installed("torch", "import time; time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "smtc", "doctor"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and "Python" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait(timeout=30) == 130 and time.monotonic() - began < 10
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path) -> None:
    """Half a minute on two cores, which is also the most that it may take there."""
    began = time.monotonic()
    command = [sys.executable, "-m", "smtc", "doctor", "--output", str(tmp_path / "doctor.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("SMTC can train here: two steps on ")
    findings = json.loads((tmp_path / "doctor.json").read_text())["findings"]
    assert [finding["name"] for finding in findings] == list(BY_NAME)
    assert time.monotonic() - began < 60
