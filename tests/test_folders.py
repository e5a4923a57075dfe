import os

import pytest

from smtc.errors import UserError
from smtc.folders import whole_folder

HOLDS = ("a.txt", "b.txt")


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
        with whole_folder(target, HOLDS) as folder:
            (folder / name).write_text(name)
    assert names(target) == ["b.txt"]
    assert names(tmp_path) == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(target, HOLDS) as folder:
        (folder / "a.txt").write_text("new")
        raise RuntimeError
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "a.txt").write_text("old")
    with pytest.raises(UserError, match="out cannot be written"), whole_folder(target, HOLDS) as f:
        f.rename(tmp_path / "gone")
    assert (target / "a.txt").read_text() == "old"


@pytest.mark.parametrize("kind", ["file", "stranger"])
def test_something_else_is_refused(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    entered = []
    refusal = pytest.raises(UserError, match="choose another output folder")
    with refusal, whole_folder(target, HOLDS):
        entered.append(1)
    assert not entered and names(tmp_path) == ["out"]


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
