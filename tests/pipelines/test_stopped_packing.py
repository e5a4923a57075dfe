"""`smtc data pack` loses nothing and goes on, whatever stops it on its way."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from packed_frames import expect_whole, noise, stamps, write

from smtc.errors import UserError
from smtc.pipelines import packing, shards
from smtc.pipelines.packing import pack


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# A process that packs four videos, 30 ms a frame, and comes to no end with the fifth.
_SLOW = """
import sys, time
from smtc.pipelines import shards
read_image = shards.read_image
shards.read_image = lambda path: time.sleep(99 if "/00004/" in path else 0.03) or read_image(path)
from smtc.cli import main
main(["data", "pack", *sys.argv[1:], "--size", "16", "--workers", "2"])
"""


def processes_of(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                told = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(told[2]) == group and told[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_call_leaves_no_process_and_can_go_on(
    data: Path, tmp_path: Path, how: signal.Signals
) -> None:
    folder = tmp_path / "out"
    record = folder / "packed" / "finished.jsonl"
    command = [sys.executable, "-c", _SLOW, str(data), "--output", str(folder)]
    running = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not record.exists() or record.read_text().count("\n") < 3:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert len(processes_of(running.pid)) == 3
    (os.killpg if how == signal.SIGINT else os.kill)(running.pid, how)
    _, said = running.communicate(timeout=20)
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert said.splitlines()[-1].startswith("smtc: stopped. The same command goes on")
        assert "Traceback" not in said and "rror" not in said
    while processes_of(running.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (folder / "packed" / "index.json").exists()
    done = {json.loads(line)["file"] for line in record.read_text().splitlines()[1:]}
    before = stamps(folder)
    assert 2 <= len(done) < 8
    pack(data, folder, size=16)
    expect_whole(data, folder)
    after = stamps(folder)
    assert all(after[name] == before[name] for name in done)


class Dead(BaseException):
    """Stands for a kill: nothing that is written afterwards reaches the disk."""


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A function: let the process die before the n-th change of a file's name."""
    left = [10**9]

    def until_death(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Dead
            return real(*arguments, **more)

        return call

    for name in ("rename", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, until_death(getattr(Path, name)))

    def die_at(moment: int) -> None:
        left[0] = moment

    yield die_at
    left[0] = 10**9


def test_whenever_it_is_killed_the_next_call_mends_it(
    tmp_path: Path, dying: Callable[[int], None]
) -> None:
    """First packing two videos, then packing after one changed, one vanished and one came."""
    root, folder = tmp_path / "data", tmp_path / "out"
    for moment in range(100):
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        write(root, "a", noise(8, 8, 3))
        write(root, "b", noise(8, 8, 3))
        survived = 0
        for change in (False, True):
            if change:
                shutil.rmtree(root / "a")
                cv2.imwrite(str(root / "b" / "000.png"), noise(8, 8, 3, seed=moment + 1))
                os.utime(root / "b" / "000.png", (moment, moment))
                write(root, "c", noise(8, 8, 3, seed=1))
            dying(moment)
            try:
                pack(root, folder, size=16, workers=1)
                survived += 1
            except Dead:
                pass
            dying(10**9)
            pack(root, folder, size=16, workers=1)
            expect_whole(root, folder)
        if survived == 2:
            assert moment > 6
            return
    raise AssertionError("it never came to an end")


def test_a_torn_record_counts_up_to_its_tear(data: Path) -> None:
    folder = pack(data, size=16)
    index = folder / "packed" / "index.json"
    told = json.loads(index.read_text())
    whole = told.pop("videos")
    lines = [json.dumps(entry) + "\n" for entry in [told, *whole]]
    index.unlink()
    record = folder / "packed" / "finished.jsonl"
    for cut in (0, 1, len(lines[4]) // 2, len(lines[4]) - 2):
        record.write_text("".join(lines[:4]) + lines[4][:cut])
        found = packing._finished(folder / "packed", packing.PackSettings(size=16, root=str(data)))
        assert [shard.video for shard in found] == ["00000", "00001", "00002"]
    for text in ("", "[]\n", "{}\n", "half"):
        record.write_text(text)
        with pytest.raises(UserError, match=r"finished\.jsonl is damaged; delete"):
            pack(data, size=16)
    record.write_bytes("".join(lines[:4]).encode() + b"\0" * 512 + b"\xff")
    before = stamps(folder)
    pack(data, size=16)
    expect_whole(data, folder)
    after = stamps(folder)
    assert sum(after[name] == before[name] for name in after) == 3


def test_a_disk_that_gets_full_is_one_sentence_and_no_loss(
    data: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mounted("size=300k")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(180_000))
    real = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10**9))
        with pytest.raises(UserError, match=r"\(No space left on device\); mend that and run the"):
            pack(data, disk, size=32, workers=1)
    packed = disk / "packed"
    assert not (packed / "index.json").exists()
    before = stamps(disk)
    assert 1 <= len(before) < 8
    assert not list(packed.glob("*.partial"))
    with pytest.raises(UserError, match="free some, choose another"):
        pack(data, disk, size=32)
    ballast.unlink()
    pack(data, disk, size=32)
    expect_whole(data, disk, size=32)
    after = stamps(disk)
    assert all(after[name] == before[name] for name in before)


def test_two_calls_do_not_write_at_once(videos: Path, tmp_path: Path) -> None:
    packed = tmp_path / "out" / "packed"
    packed.mkdir(parents=True)
    handle = os.open(packed, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="Another smtc data pack writes to"):
        pack(videos, tmp_path / "out")
    os.close(handle)
    assert os.listdir(packed) == []


def test_a_call_that_another_overtook_starts_over(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*_: object) -> None:
        monkeypatch.undo()
        pack(videos, tmp_path / "out", size=16)

    monkeypatch.setattr(packing, "_say_size", overtaken)
    with pytest.raises(UserError, match="Another smtc data pack has just written to"):
        pack(videos, tmp_path / "out", size=16)
    expect_whole(videos, tmp_path / "out")


def test_a_killed_decoder_is_one_sentence(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "read_image", lambda path: os._exit(1))
    with pytest.raises(UserError, match=r"decoding process was killed.*fewer --workers"):
        pack(videos, tmp_path / "out")
    monkeypatch.undo()
    expect_whole(videos, pack(videos, tmp_path / "out", size=256), size=256)
