"""metrics.jsonl and TensorBoard, over interruptions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smtc.training.telemetry import Telemetry, read_metrics


def record(folder: Path, start: int, stop: int, *, loss: float = 0.0) -> None:
    """Steps `start` to `stop` of a run whose loss at a step is `loss` plus its number."""
    telemetry = Telemetry(folder, steps=stop, start=start, title="test")
    for step in range(start + 1, stop + 1):
        telemetry.add({"loss": torch.tensor(loss + step)}, clips=4, waited=0.0)
        telemetry.log(step, {"lr": 0.5})
    telemetry.close()


def column(folder: Path, name: str) -> list[Any]:
    return [line[name] for line in read_metrics(folder / "metrics.jsonl")]


def board(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_a_line_holds_the_means_since_the_last_one(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, steps=4, start=0, title="test")
    for step, loss in enumerate([1.0, 3.0, 10.0, 20.0], start=1):
        scalars = {"loss": torch.tensor(loss, requires_grad=True), "instance": torch.tensor(loss)}
        telemetry.add(scalars, clips=8, waited=0.0)
        if step % 2 == 0:
            told = telemetry.log(step, {"lr": 0.5})
            assert told["loss"] == told["instance"]
    telemetry.close()
    assert column(tmp_path, "step") == [2, 4]
    assert column(tmp_path, "loss") == [2.0, 15.0]
    assert column(tmp_path, "lr") == [0.5, 0.5]
    assert all(value > 0 for value in column(tmp_path, "clips_per_s"))
    assert all(value == 0 for value in column(tmp_path, "data_wait_share"))


def test_the_share_of_time_spent_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 14.0, 14.0])
    monkeypatch.setattr("smtc.training.telemetry.time.perf_counter", lambda: next(clock))
    telemetry = Telemetry(tmp_path, steps=1, start=0, title="test")
    telemetry.add({"loss": torch.tensor(1.0)}, clips=8, waited=1.0)
    values = telemetry.log(1, {})
    telemetry.close()
    assert (values["data_wait_share"], values["clips_per_s"]) == (0.25, 2.0)


def test_a_line_is_in_the_file_before_the_run_ends(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, steps=2, start=0, title="test")
    telemetry.add({"loss": torch.tensor(1.0)}, clips=1, waited=0.0)
    telemetry.log(1, {})
    assert column(tmp_path, "step") == [1]
    telemetry.close()


def test_steps_done_again_after_a_resume_are_not_doubled(tmp_path: Path) -> None:
    record(tmp_path, 0, 5)
    record(tmp_path, 3, 6, loss=100.0)
    assert column(tmp_path, "step") == [1, 2, 3, 4, 5, 6]
    assert column(tmp_path, "loss") == [1, 2, 3, 104, 105, 106]


def test_tensorboard_shows_the_same_steps_after_a_resume(tmp_path: Path) -> None:
    record(tmp_path, 0, 5)
    record(tmp_path, 3, 6, loss=100.0)
    assert board(tmp_path) == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 105), (6, 106)]


def test_tensorboard_files_exist_from_the_start(tmp_path: Path) -> None:
    record(tmp_path, 0, 1)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    record(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-15], encoding="utf-8")
    assert column(tmp_path, "step") == [1, 2]
    record(tmp_path, 2, 4)
    assert column(tmp_path, "step") == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_reopening_leaves_no_partial_file(tmp_path: Path) -> None:
    record(tmp_path, 0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_the_bar_goes_on_where_the_run_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 3, 4)
    assert "4/4" in capsys.readouterr().err
