"""An evaluation in several processes over gloo gives what one process gives, and ends as one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Command, frames_of, tree

from smtc.errors import UserError
from smtc.evaluation.shared_work import Tally, one_voice, together
from smtc.training.distributed import World

WATCHED = """
import os, sys
from pathlib import Path
from smtc import cli
from smtc.evaluation import discovery
from smtc.evaluation.kept_scores import KeptScores
write = KeptScores.write
def watched(self, key, record):
    write(self, key, record)
    with open(os.environ["SEEN"] + os.environ["RANK"], "a") as file:
        print(key, file=file)
KeptScores.write = watched
bar = discovery.bar
def told(**given):
    with Path(os.environ["SEEN"]).with_name("bars").open("a") as file:
        print(os.environ["RANK"], given["shown"], file=file)
    return bar(**given)
discovery.bar = told
if os.environ.get("CRASHES") == os.environ["RANK"]:
    def crash(self, key, record):
        raise RuntimeError("a fault of ours")
    KeptScores.write = crash
cli.main(sys.argv[1:])
"""


def in_processes(
    ranks: int, tmp_path: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`smtc` under torchrun; which records each rank wrote is in `tmp_path`/seen<rank>."""
    script = tmp_path / "watched.py"
    script.write_text(WATCHED, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={ranks}", "--monitor-interval=0.1", str(script)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "SEEN": str(tmp_path / "seen")} | environment
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=settings,
        check=False,
    )


def seen(tmp_path: Path) -> list[list[str]]:
    return [path.read_text().split() for path in sorted(tmp_path.glob("seen*"))]


def with_videos(data: Path, count: int) -> Path:
    """`data` without all but `count` of its six videos."""
    for video in range(count, 6):
        for kind in ("JPEGImages", "Annotations", "Categories"):
            shutil.rmtree(data / kind / "480p" / f"{video:05}")
    return data


@pytest.fixture
def two_videos(videos: Path) -> Path:
    return with_videos(videos, 2)


@pytest.mark.parametrize(
    ("ranks", "count"),
    [
        (2, 1),
        pytest.param(2, 6, marks=pytest.mark.slow),
        pytest.param(3, 2, marks=pytest.mark.slow),
    ],
)
def test_several_processes_write_what_one_writes(
    cli: Command, videos: Path, tiny_run: Path, tmp_path: Path, ranks: int, count: int
) -> None:
    """There may be more processes than videos."""
    command = ["evaluate", "discovery", "--data", with_videos(videos, count)]
    command += ["--checkpoint", tiny_run]
    command += ["--baselines", "all", "--seeds", 0, 1, "--device", "cpu"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    told = cli(*command, "--output", alone)
    done = in_processes(ranks, tmp_path, *command, "--output", shared)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.replace(str(shared), str(alone)) == told.out  # and told once
    bars = sorted((tmp_path / "bars").read_text().splitlines())
    assert bars == ["0 True", *(f"{rank} False" for rank in range(1, ranks))]
    assert f"{8 * count}/{8 * count}" in done.stderr.splitlines()[-1].replace("\r", "\n")
    for name in ("results.json", "results.csv", "sheet.png"):
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
    one, other = (json.loads((f / "manifest.json").read_text()) for f in (alone, shared))
    assert (one.pop("processes"), other.pop("processes")) == (1, ranks)
    assert one == other
    parts = seen(tmp_path)
    keys = [key for part in parts for key in part]
    assert len(keys) == len(set(keys)) == 8 * count and all(parts) and len(parts) > 1
    left = {"alone", "shared", "videos", "watched.py", "bars"}
    assert {path.name for path in tmp_path.iterdir() if "seen" not in path.name} == left


@pytest.mark.slow
def test_a_mistake_of_one_process_is_told_once_and_ends_all(
    two_videos: Path, tiny_run: Path, tmp_path: Path
) -> None:
    (frames_of(two_videos, "00001") / "00003.jpg").write_bytes(b"")
    before = tree(tmp_path)
    command = ["evaluate", "discovery", "--data", two_videos, "--checkpoint", tiny_run]
    command += ["--device", "cpu", "--output", tmp_path / "out"]
    done = in_processes(2, tmp_path, *command)
    assert done.returncode == 1  # torchrun's own, whatever its processes end with
    assert "exitcode  : 2" in done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("smtc: ")]
    assert told == ["smtc: 00001/00003.jpg: the file is empty"]
    ours = ("seen", "watched.py", "bars")
    made = {path for path in tree(tmp_path) if not path.startswith(ours)}
    assert made == set(before)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_fault_of_one_process_ends_all(
    cli: Command, two_videos: Path, tiny_run: Path, tmp_path: Path, rank: str
) -> None:
    """What the other scored is kept for the next call."""
    command = ["evaluate", "discovery", "--data", two_videos, "--checkpoint", tiny_run]
    command += ["--baselines", "all", "--device", "cpu", "--output", tmp_path / "out"]
    done = in_processes(2, tmp_path, *command, CRASHES=rank)
    assert done.returncode == 1 and "a fault of ours" in done.stderr
    assert not (tmp_path / "out").exists()
    kept = {path.stem for path in (tmp_path / ".out.smtc-scored").glob("*.json")}
    assert kept == {key for part in seen(tmp_path) for key in part}
    told = cli(*command)
    assert told.code == 0 and (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_a_mistake_before_the_work_is_told_once(two_videos: Path, tmp_path: Path) -> None:
    command = ["evaluate", "discovery", "--data", two_videos, "--device", "cpu"]
    command += ["--checkpoint", tmp_path / "absent", "--output", tmp_path / "out"]
    done = in_processes(3, tmp_path, *command)
    told = [line for line in done.stderr.splitlines() if line.startswith("smtc: ")]
    assert len(told) == 1 and "There is no file" in told[0]
    (tmp_path / "out").write_text("in the way")  # which the main process alone looks at
    command[-3:-2] = []
    done = in_processes(3, tmp_path, *command[:-3], "--untrained", "tiny", *command[-2:])
    told = [line for line in done.stderr.splitlines() if line.startswith("smtc: ")]
    assert len(told) == 1 and "is a file" in told[0]


# One process.


def test_alone_all_is_done_here() -> None:
    assert together(lambda: "x") == ["x"]
    with pytest.raises(UserError, match="mistake"), one_voice(World(torch.device("cpu"))):
        raise UserError("mistake")
    tally = Tally("name")
    assert [tally.take() for _ in range(3)] == [0, 1, 2]
    assert tally.done == 0 and not tally.failed
    tally.finish()
    tally.fail()
    tally.meet(1)
    assert tally.done == 1 and tally.failed
    assert Tally("name").take() == 0
