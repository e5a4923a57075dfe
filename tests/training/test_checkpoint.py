"""Checkpoints that are whole or absent, of which the newest and the best stay."""

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smtc.errors import UserError
from smtc.training import checkpoint
from smtc.training.checkpoint import Checkpoints, latest_checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, step: int, value: float = 0.0, **more: Any) -> Path:
    """A small checkpoint, when it is on the disk."""
    state = {"method": {"weight": torch.full((3,), value)}, "optimizer": {}}
    saving = Checkpoints(folder)
    saving.save(step, 10 * step, state, **more)
    saving.close()
    return folder / "checkpoints" / f"step_{step:08d}"


def newest(folder: Path) -> dict[str, Any]:
    state = latest_checkpoint(folder)
    assert state is not None
    return state


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    moments = {"a.weight": {"step": torch.tensor(7.0), "exp_avg": torch.randn(2, 3)}}
    state = {
        "method": {"a.weight": torch.randn(2, 3).bfloat16(), "count": torch.tensor(3)},
        "optimizer": moments,
        "scaler": {"scale": torch.tensor(0.1, dtype=torch.float64)},
    }
    saving = Checkpoints(tmp_path)
    saving.save(7, 93, state)
    saving.close()
    assert names(tmp_path / "checkpoints") == ["step_00000007"]
    loaded = newest(tmp_path)
    assert (loaded.pop("step"), loaded.pop("sample")) == (7, 93)
    torch.testing.assert_close(loaded, state, rtol=0, atol=0)


def test_what_is_saved_is_the_state_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write waits here until the tensor has changed."""
    changed, dump = threading.Event(), checkpoint._dump

    def late(*arguments: Any) -> None:
        assert changed.wait(10)
        dump(*arguments)

    monkeypatch.setattr(checkpoint, "_dump", late)
    weight = torch.zeros(3)
    saving = Checkpoints(tmp_path)
    saving.save(1, 1, {"method": {"weight": weight}})
    weight.add_(1)
    assert latest_checkpoint(tmp_path) is None
    changed.set()
    saving.wait()
    assert newest(tmp_path)["method"]["weight"].tolist() == [0, 0, 0]
    saving.close()


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert Checkpoints(tmp_path).newest() == "There is no checkpoint yet."


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    saving = Checkpoints(tmp_path, keep=keep)
    for step in (9, 10, 100, 1000):
        saving.save(step, step, {"method": {"weight": torch.zeros(1)}})
    saving.close()
    kept = [f"step_{step:08d}" for step in (10, 100, 1000)][-keep:]
    assert names(tmp_path / "checkpoints") == kept
    assert newest(tmp_path)["step"] == 1000
    assert saving.newest().endswith("step_00001000.")


def test_the_best_is_kept_too(tmp_path: Path) -> None:
    for step, score in ((1, 0.3), (2, 0.8), (3, 0.8), (4, None), (5, 0.1), (6, None)):
        save(tmp_path, step, score=score)
    kept = ["best.json", "step_00000002", "step_00000005", "step_00000006"]
    assert names(tmp_path / "checkpoints") == kept
    assert Checkpoints(tmp_path).best() == (2, 0.8)
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text(encoding="utf-8"))
    assert best == {"step": 2, "score": 0.8}


def test_a_damaged_note_of_the_best_is_no_best(tmp_path: Path) -> None:
    save(tmp_path, 1, score=0.5)
    (tmp_path / "checkpoints" / "best.json").write_text("{", encoding="utf-8")
    assert Checkpoints(tmp_path).best() is None


def test_a_failure_while_writing_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, value=1.0)

    def fail(state: Any, folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_dump", fail)
    with pytest.raises(UserError, match=r"step_00000002 could.*No space left on device"):
        save(tmp_path, 2)
    assert names(tmp_path / "checkpoints") == ["step_00000001"]
    assert newest(tmp_path)["method"]["weight"].tolist() == [1.0, 1.0, 1.0]


def test_a_failed_write_is_told_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(state: Any, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_dump", fail)
    saving = Checkpoints(tmp_path)
    saving.save(1, 1, {"method": {"weight": torch.zeros(1)}})
    with pytest.raises(UserError, match="step_00000001 could not be written"):
        saving.save(2, 2, {"method": {"weight": torch.zeros(1)}})


def test_a_program_that_died_while_writing_leaves_nothing_that_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    partial = tmp_path / "checkpoints" / ".step_00000002.partial"
    partial.mkdir()
    (partial / "half").write_bytes(b"half")
    assert newest(tmp_path)["step"] == 1
    save(tmp_path, 3)
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000003"]


def test_a_full_disk_leaves_the_previous_one(mounted: Callable[[str], Path]) -> None:
    folder = mounted("size=256k")
    save(folder, 1)
    saving = Checkpoints(folder)
    saving.save(2, 2, {"method": {"weight": torch.randn(200, 1000)}})
    with pytest.raises(UserError, match=r"step_00000002 could not be written \(No space left"):
        saving.close()
    assert names(folder / "checkpoints") == ["step_00000001"]
    assert newest(folder)["step"] == 1
    save(folder, 3)
    assert newest(folder)["step"] == 3


def test_a_read_only_folder_cannot_take_a_checkpoint(read_only: Path) -> None:
    with pytest.raises(UserError, match=r"could not be written .Read-only file system"):
        save(read_only, 1)
    assert names(read_only) == []


def damage(folder: Path, how: str) -> None:
    """Spoil a checkpoint as a disk or a person would."""
    data = next(folder.glob("*.distcp"))
    if how == "cut short":
        data.write_bytes(data.read_bytes()[:-20])
    elif how == "a part missing":
        data.unlink()
    elif how == "no metadata":
        (folder / ".metadata").write_bytes(b"")
    else:
        (folder / "state.json").write_text(how, encoding="utf-8")


DAMAGES = ["cut short", "a part missing", "no metadata", "{", "[]", '{"step": "x"}']


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, how: str) -> None:
    damage(save(tmp_path, 1), how)
    with pytest.raises(UserError, match="step_00000001 is damaged, and so is every") as refusal:
        latest_checkpoint(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2), how)
    assert newest(tmp_path)["step"] == 1
    assert "step_00000002 is damaged" in caplog.text
