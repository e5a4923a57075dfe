"""Runs that are killed, stopped, damaged or out of space, and started again by the same command,
end with the bits of a run that nothing befell.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import train_flags
from toy import CLOCKED

from smtc.training.checkpoint import Checkpoints, _read, checkpoints, latest_checkpoint
from smtc.training.telemetry import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and mounts"),
]

KILLS, SEED = 20, 20
LONG, SHORT = 200, 48  # steps

# All that is random, all three losses, and the encoder joins in midway.
LIVELY = [
    *("--train.threads", 1, "--optim.lr", "1e-3", "--optim.encoder-from-step", 25),
    *("--model.backbone.drop-path", "0.3", "--data.augment.flip", "0.5"),
    *("--objective.area", 0, "--objective.similarity", "-1"),
    *("--objective.instance-from-step", 5),
]


@dataclass(frozen=True)
class Training:
    """One command that trains, started as often as it takes."""

    folder: Path
    flags: list[object]

    def start(self, *launcher: str) -> "Process":
        command = [sys.executable, *(launcher or ("-m", "smtc")), *map(str, self.flags)]
        # Not on the disk that is full or read-only.
        outside = self.folder.parents[1]
        log = outside / f"{self.folder.parent.name}-{self.folder.name}.log"
        cache = {"XDG_CACHE_HOME": str(outside / "cache")}
        settings = os.environ | {"OMP_NUM_THREADS": "1"} | cache
        with log.open("w", encoding="utf-8") as file:
            started = subprocess.Popen(
                command, stdout=file, stderr=file, env=settings, start_new_session=True
            )
        return Process(self, started, log)

    def finish(self) -> str:
        return self.start().ended(0)

    @property
    def logged(self) -> int:
        """The step of the last line of the metrics."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    @property
    def saved(self) -> list[Path]:
        return checkpoints(self.folder / "checkpoints")

    @property
    def newest(self) -> int:
        """The step of the newest checkpoint by its name."""
        return int(self.saved[-1].name.removeprefix("step_")) if self.saved else 0


@dataclass(frozen=True)
class Process:
    """One start of it, the leader of a group of processes."""

    training: Training
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def trains_until(self, step: int) -> None:
        deadline = time.monotonic() + 90
        while self.training.logged < step:
            assert self.popen.poll() is None and time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.002)

    def ended(self, code: int) -> str:
        """What it said; no process of the group may live on."""
        try:
            assert self.popen.wait(90) == code, self.said[-3000:]
            deadline = time.monotonic() + 5
            while group_lives(self.popen.pid):
                assert time.monotonic() < deadline, "processes are left behind"
                time.sleep(0.02)
        finally:
            if group_lives(self.popen.pid):
                os.killpg(self.popen.pid, signal.SIGKILL)
        # The data workers of a process that was killed may say that its end of a pipe is gone.
        assert code == -signal.SIGKILL or "Traceback" not in self.said, self.said[-3000:]
        return self.said


def group_lives(group: int) -> bool:
    """Whether a process of the group runs; one that only waits to be reaped does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state != "Z":
            return True
    return False


def a_run(data: Path, folder: Path, steps: int, *more: object) -> Training:
    every = ["--train.steps", steps, "--train.checkpoint-every", 1]
    return Training(folder, train_flags(data, folder, *LIVELY, *every, *more))


def scored(data: Path, folder: Path, *more: object) -> Training:
    """A short run that scores its own videos now and then."""
    return a_run(data, folder, SHORT, "--eval.every", 6, "--eval.data", data, *more)


@pytest.fixture(scope="module")
def long(synthetic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The longer run, uninterrupted."""
    training = a_run(synthetic_data, tmp_path_factory.mktemp("straight") / "long", LONG)
    training.finish()
    return training.folder


@pytest.fixture(scope="module")
def short(synthetic_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short run, uninterrupted."""
    training = scored(synthetic_data, tmp_path_factory.mktemp("straight") / "short")
    training.finish()
    return training.folder


def told(folder: Path) -> list[dict[str, Any]]:
    """The metrics but for what a clock says."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(straight: Path, folder: Path) -> None:
    """Every bit that matters is the same, and nothing is left lying about."""
    model = Path("model", "model.safetensors")
    assert (straight / model).read_bytes() == (folder / model).read_bytes()
    torch.testing.assert_close(
        latest_checkpoint(folder), latest_checkpoint(straight), rtol=0, atol=0
    )
    assert told(folder) == told(straight)
    assert names(folder) == names(straight)
    assert names(folder / "checkpoints") == names(straight / "checkpoints")
    best = Path("checkpoints", "best.json")
    if (straight / best).exists():
        assert (folder / best).read_bytes() == (straight / best).read_bytes()


def assert_nothing_lost(training: Training, before: int, logged: int, every: int = 1) -> None:
    """The newest two checkpoints are whole, and of the progress at most what was under way is gone:
    one interval, and the one whose checkpoint was being written meanwhile.
    """
    for path in training.saved[-2:]:
        _read(path)
    assert training.newest >= max(before, logged - 2 * every)


@pytest.mark.timeout(400)
def test_a_run_survives_being_killed_at_random_moments(
    synthetic_data: Path, tmp_path: Path, long: Path
) -> None:
    draw = random.Random(SEED)
    training = a_run(synthetic_data, tmp_path / "run", LONG, "--data.workers", 1)
    for _ in range(KILLS):
        before = training.newest
        after, pause = draw.randint(1, 8), draw.uniform(0, 0.08)
        process = training.start()
        process.trains_until(max(training.logged, before) + after)
        time.sleep(pause)
        os.kill(process.popen.pid, signal.SIGKILL)
        logged = training.logged
        print(f"killed after step {logged}, {pause:.4f} s later")  # shown where the test fails
        said = process.ended(-signal.SIGKILL)
        assert f"at step {before}." in said or before == 0
        assert_nothing_lost(training, before, logged)
    assert training.logged < LONG
    training.finish()
    assert_equal(long, training.folder)


# Kills itself with SIGKILL when the place named first is reached for the n-th time.
SABOTAGE = """
import os, shutil, signal, sys
from smtc import cli
from smtc.training import checkpoint, run_folder

place, left = sys.argv[1], int(sys.argv[2])
dump, note, flush, remove = (
    checkpoint._dump, checkpoint.write_json, checkpoint._flush, shutil.rmtree
)

def reached(here):
    global left
    left -= here == place
    return here == place and left == 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()

def halve(path):
    os.truncate(path, path.stat().st_size // 2)
    die()

def dumping(state, folder):
    dump(state, folder)
    if reached("half the data"):
        halve(next(folder.glob("*.distcp")))

def noting(path, values):
    if path.name == "state.json" and reached("before the state"):
        die()
    if path.name in ("best.json", "config.json") and reached("half of " + path.name):
        partial = path.with_name(path.name + ".partial")
        partial.write_text("{", encoding="utf-8")
        die()
    note(path, values)
    if path.name == "best.json" and reached("after the best"):
        die()

def flushing(folder):
    if reached("before pruning"):
        die()
    flush(folder)

def removing(path, **settings):
    if path.name.startswith("step_") and path.is_dir() and reached("half pruned"):
        next(path.glob("*.distcp")).unlink()
        die()
    remove(path, **settings)

checkpoint._dump, checkpoint._flush, shutil.rmtree = dumping, flushing, removing
checkpoint.write_json = run_folder.write_json = noting
cli.main(sys.argv[3:])
"""


@pytest.mark.timeout(200)
def test_a_run_survives_being_killed_inside_a_save(
    synthetic_data: Path, tmp_path: Path, short: Path
) -> None:
    places = [
        ("half of config.json", 1),
        ("half the data", 1),
        ("half the data", 4),
        ("half of best.json", 1),
        ("after the best", 1),
        ("before the state", 2),
        ("before pruning", 3),
        ("half pruned", 2),
    ]
    training = scored(synthetic_data, tmp_path / "run")
    for place, count in places:
        before = training.newest
        process = training.start("-c", SABOTAGE, place, str(count))
        process.ended(-signal.SIGKILL)
        logged = training.logged if training.newest else 0
        print(f"killed at {place!r}, step {logged}")
        assert_nothing_lost(training, before, logged)
    training.finish()
    assert_equal(short, training.folder)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("workers", [0, 2], ids=["alone", "group"])
def test_a_run_that_is_asked_to_stop_loses_nothing(
    synthetic_data: Path, tmp_path: Path, short: Path, workers: int
) -> None:
    """With loader processes, all are signalled at once, as a scheduler does."""
    draw = random.Random(workers)
    training = scored(synthetic_data, tmp_path / "run", "--data.workers", workers)
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    for number in draw.sample(signals, len(signals)):
        process = training.start()
        process.trains_until(training.newest + draw.randint(1, 4))
        time.sleep(draw.uniform(0, 0.08))
        send = os.killpg if workers else os.kill
        send(process.popen.pid, number)
        said = process.ended(128 + number)
        print(f"{number.name} at step {training.logged}")
        assert training.newest == training.logged < SHORT
        assert f"{number.name}: stopping after this step." in said
        step = training.newest
        assert said.count(f"Stopped at step {step}; the same command goes on from there.") == 1
    assert f"Continuing {training.folder} at step {training.newest}." in training.finish()
    assert_equal(short, training.folder)


def fill(path: Path) -> None:
    """A file that takes all the space that is left."""
    size = 2**20
    with path.open("wb", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                size //= 2


@pytest.mark.timeout(100)
def test_a_run_goes_on_when_a_full_disk_has_space_again(
    synthetic_data: Path, tmp_path: Path, short: Path, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=24m")
    training = scored(synthetic_data, disk / "run")
    process = training.start()
    process.trains_until(9)
    fill(disk / "ballast")
    assert "could not be written (No space left" in process.ended(2) or (
        "cannot be written (No space left" in process.said
    )
    assert_nothing_lost(training, 7, training.logged)
    before = training.newest
    # Again, with all space taken from the start.
    (disk / "ballast").unlink()
    fill(disk / "ballast")
    assert "No space left on device); free some space" in training.start().ended(2)
    assert training.newest == before
    _read(training.saved[-1])
    (disk / "ballast").unlink()
    assert f"at step {before}." in training.finish()
    assert_equal(short, training.folder)


@pytest.mark.timeout(100)
def test_a_run_on_a_disk_too_small_goes_on_elsewhere(
    synthetic_data: Path, tmp_path: Path, short: Path, mounted: Callable[[str], Path]
) -> None:
    small = scored(synthetic_data, mounted("size=5m") / "run")
    assert "No space left on device); free some space" in small.start().ended(2)
    assert small.newest >= 1
    subprocess.run(["cp", "-r", small.folder, tmp_path / "run"], check=True)
    larger = scored(synthetic_data, tmp_path / "run")
    assert f"at step {small.newest}." in larger.finish()
    assert_equal(short, larger.folder)


@pytest.mark.timeout(100)
def test_a_run_goes_on_when_its_folder_can_be_written_again(
    synthetic_data: Path, tmp_path: Path, short: Path, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=24m")
    training = scored(synthetic_data, disk / "run")
    process = training.start()
    process.trains_until(5)
    os.kill(process.popen.pid, signal.SIGKILL)
    process.ended(-signal.SIGKILL)
    before = training.newest, names(training.folder), told(training.folder)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    said = training.start().ended(2)
    assert f"{training.folder} cannot be written (Read-only file system)" in said
    assert before == (training.newest, names(training.folder), told(training.folder))
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    training.finish()
    assert_equal(short, training.folder)


def cut_newest(training: Training) -> None:
    data = next(training.saved[-1].glob("*.distcp"))
    os.truncate(data, data.stat().st_size // 2)


def take_state_of_newest(training: Training) -> None:
    (training.saved[-1] / "state.json").unlink()


def take_all(training: Training) -> None:
    for folder in training.saved:
        shutil.rmtree(folder)


@pytest.mark.timeout(100)
def test_damaged_checkpoints_are_passed_over(
    synthetic_data: Path, tmp_path: Path, short: Path
) -> None:
    """The newest is cut, then its state.json deleted, then nothing is left."""
    training = scored(synthetic_data, tmp_path / "run")
    expected: list[str] = []
    for spoil in (cut_newest, take_state_of_newest, take_all):
        process = training.start()
        process.trains_until(training.logged + 9)
        os.kill(process.popen.pid, signal.SIGTERM)
        said = process.ended(143)
        assert all(sentence in said for sentence in expected)
        *_, before, newest = training.saved
        step = int(before.name.removeprefix("step_"))
        expected = [f"The checkpoint {newest} is damaged", f"at step {step}."]
        spoil(training)
    assert "Continuing" not in training.finish()
    assert_equal(short, training.folder)


def save(folder: Path, step: int, *, keep: int, score: float | None = None) -> Path:
    saving = Checkpoints(folder, keep=keep)
    saving.save(step, step, {"method": {"weight": torch.zeros(3)}}, score=score)
    saving.close()
    return folder / "checkpoints" / f"step_{step:08d}"


def test_what_is_written_after_a_damaged_one_stays(tmp_path: Path) -> None:
    """The only one to keep would be the damaged one, whose step is later."""
    save(tmp_path, 1, keep=1, score=0.5)
    (save(tmp_path, 5, keep=1) / "state.json").unlink()
    assert names(tmp_path / "checkpoints") == ["best.json", "step_00000001", "step_00000005"]
    save(tmp_path, 2, keep=1)
    assert names(tmp_path / "checkpoints") == ["best.json", "step_00000001", "step_00000002"]


def test_a_run_that_ends_where_it_started_leaves_its_checkpoint_alone(tmp_path: Path) -> None:
    """Written again it would be away for a moment, in which the run could be killed."""
    file = save(tmp_path, 3, keep=1) / "state.json"
    before = file.stat().st_ino
    save(tmp_path, 3, keep=1)
    assert file.stat().st_ino == before
    file.write_text("{", encoding="utf-8")
    save(tmp_path, 3, keep=1)
    assert _read(file.parent)["step"] == 3


@pytest.mark.timeout(100)
def test_a_second_start_beside_the_first_is_refused(
    synthetic_data: Path, tmp_path: Path, short: Path
) -> None:
    training = scored(synthetic_data, tmp_path / "run", "--data.workers", 1)
    first = training.start()
    first.trains_until(2)
    os.killpg(first.popen.pid, signal.SIGSTOP)
    beside = Training(tmp_path / "run", training.flags)
    before = names(training.folder)
    said = beside.start().ended(2)
    assert f"Another process trains in {training.folder}" in said
    assert names(training.folder) == before
    os.killpg(first.popen.pid, signal.SIGCONT)
    assert first.popen.wait(90) == 0
    assert_equal(short, training.folder)
