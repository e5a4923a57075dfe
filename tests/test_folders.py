import os
import signal
import subprocess
import sys

import pytest

from smtc.errors import UserError
from smtc.folders import whole_folder

HOLDS = ("a.txt", "b.txt")
WRITER = "smtc test"


def earlier(target):
    """A folder as an earlier run would have left it."""
    with whole_folder(target, HOLDS, writer=WRITER) as folder:
        (folder / "a.txt").write_text("old")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with whole_folder(target, HOLDS) as folder:
        (folder / "a.txt").write_text("one")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "one"
    assert names(target.parent) == ["out"]


def test_an_earlier_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    for name in HOLDS:
        with whole_folder(target, HOLDS, writer=WRITER) as folder:
            (folder / name).write_text(name)
    assert names(target) == [".smtc", "b.txt"]
    line = (target / ".smtc").read_text()
    assert line.startswith("Written by smtc test") and line.count("\n") == 1
    assert names(tmp_path) == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "out"
    earlier(target)
    with pytest.raises(RuntimeError), whole_folder(target, HOLDS) as folder:
        (folder / "a.txt").write_text("new")
        raise RuntimeError
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path):
    target = tmp_path / "out"
    earlier(target)
    with pytest.raises(UserError, match="out cannot be written"), whole_folder(target, HOLDS) as f:
        f.rename(tmp_path / "gone")
    assert (target / "a.txt").read_text() == "old"


@pytest.mark.parametrize("kind", ["file", "stranger", "namesake", "stranger in ours"])
def test_something_else_is_refused(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    elif kind == "stranger in ours":
        earlier(target)
        (target / "mine.txt").write_text("mine")
    else:
        target.mkdir()
        # A name that our own folders have too does not make the file ours.
        (target / ("a.txt" if kind == "namesake" else "mine.txt")).write_text("mine")
    entered = []
    refusal = pytest.raises(UserError, match="choose another output folder")
    with refusal, whole_folder(target, HOLDS):
        entered.append(1)
    assert not entered and names(tmp_path) == ["out"]
    if kind != "file":
        assert "mine" in [path.read_text() for path in target.iterdir()]


def test_an_empty_folder_may_be_used_and_the_marker_is_optional(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with whole_folder(target, ()) as folder:
        (folder / "anything.txt").write_text("one")
    assert names(target) == ["anything.txt"]


@pytest.mark.parametrize("present", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, present):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    if present:
        earlier(real)
    link.symlink_to(real)
    with whole_folder(link, HOLDS, writer=WRITER) as folder:
        (folder / "b.txt").write_text("new")
    assert link.is_symlink() and not real.is_symlink()
    assert names(real) == [".smtc", "b.txt"]
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["real"]


KILLED = """
import os, signal, sys
from pathlib import Path
from smtc.folders import whole_folder

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

rename = Path.rename
Path.rename = lambda path, to: die(rename(path, to))
with whole_folder(sys.argv[1], ("a.txt", "b.txt"), writer="smtc test") as folder:
    (folder / "a.txt").write_text("half")
    if sys.argv[2] == "writing":
        die()
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path, moment):
    target = tmp_path / "out"
    earlier(target)
    command = [sys.executable, "-c", KILLED, str(target), moment]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 3  # with the lock
    with pytest.raises(RuntimeError), whole_folder(target, HOLDS):
        raise RuntimeError
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_the_next_run_removes_what_was_already_replaced(tmp_path):
    target = tmp_path / "out"
    earlier(target)
    earlier(tmp_path / ".out.smtc-former")
    earlier(target)
    assert names(tmp_path) == ["out"]


def test_a_name_that_is_too_long_is_refused(tmp_path):
    refusal = pytest.raises(UserError, match=r"xxx cannot be written \(File name too long\)")
    with refusal, whole_folder(tmp_path / ("x" * 300), HOLDS):
        pass


def test_the_root_of_the_file_system_is_refused():
    with pytest.raises(UserError, match="/ is the root"), whole_folder("/", HOLDS):
        pass


def test_a_place_that_cannot_be_written_is_named(read_only):
    refusal = pytest.raises(UserError, match=r"out cannot be written \(Read-only file system\)")
    with refusal, whole_folder(read_only / "out", HOLDS):
        pass


def test_a_full_disk_is_named_and_nothing_stays(mounted):
    disk = mounted("size=64k")
    with pytest.raises(UserError, match="No space left"), whole_folder(disk / "out", HOLDS) as f:
        (f / "a.txt").write_bytes(os.urandom(1_000_000))
    assert names(disk) == []


def test_the_folder_has_ordinary_permissions(tmp_path):
    with whole_folder(tmp_path / "out", HOLDS):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_two_at_a_time_are_refused(tmp_path):
    with whole_folder(tmp_path / "out", ("a",), writer="me") as folder:
        (folder / "a").write_text("first")
        for goes_on in (None, lambda _: True):
            with (
                pytest.raises(UserError, match=r"out is being written by another command; wait"),
                whole_folder(tmp_path / "out", ("a",), writer="me", goes_on=goes_on),
            ):
                pytest.fail("two at a time")
        assert (folder / "a").read_text() == "first"
        with whole_folder(tmp_path / "other", ("a",)):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    assert (tmp_path / "out" / "a").read_text() == "first"


def test_a_lock_that_a_killed_run_left_is_none(tmp_path):
    (tmp_path / ".out.smtc-lock").touch()
    with whole_folder(tmp_path / "out", ()):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
