"""Runs that are asked to stop save what they have and go on when they are started again."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import train_flags
from torch import Tensor
from toy import Line, TinyConfig, assert_same, with_output

from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.training.checkpoint import Checkpoints, latest_checkpoint
from smtc.training.stopping import StopRequest
from smtc.training.trainer import train

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


class Asked(Line):
    """Gets a signal in the middle of step 2."""

    def __init__(self, number: int, times: int = 1) -> None:
        super().__init__()
        self.number, self.times = number, times

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        if step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return super().training_step(batch, step)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_step_saves_and_leaves(
    tiny_config: TinyConfig, tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_output(tiny_config, tmp_path / "run", train__steps=6)
    method = Asked(number)
    with caplog.at_level(logging.INFO, "smtc"), pytest.raises(BaseException) as end:
        train(config, method=method)
    if number == signal.SIGINT:
        assert end.type is KeyboardInterrupt
    else:
        assert end.type is SystemExit and end.value.code == 128 + number
    assert len(method.seen) == 3
    state = latest_checkpoint(tmp_path / "run")
    assert state is not None and (state["step"], state["sample"]) == (3, 6)
    assert "Stopped at step 3; the same command goes on from there." in caplog.text
    resumed = train(config, method=Line())
    straight = with_output(tiny_config, tmp_path / "straight", train__steps=6)
    assert_same(train(straight, method=Line()), resumed)


def test_a_second_interrupt_does_not_wait(tiny_config: TinyConfig, tmp_path: Path) -> None:
    method = Asked(signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        train(with_output(tiny_config, tmp_path / "run", train__steps=6), method=method)
    assert len(method.seen) == 2
    assert latest_checkpoint(tmp_path / "run") is None


def test_a_signal_in_the_last_step_changes_nothing(tiny_config: TinyConfig, tmp_path: Path) -> None:
    run = train(
        with_output(tiny_config, tmp_path / "run", train__steps=3), method=Asked(signal.SIGTERM)
    )
    assert (run.model_folder / "line.pt").exists()


def test_former_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        assert all(signal.getsignal(number) == stop._note for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_another_thread_trains_without_handlers() -> None:
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            with StopRequest():
                pass
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failed == []


def test_the_command_says_how_to_go_on(
    cli: Callable[..., object],
    synthetic_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    whole = SMTCMethod.training_step

    def asked(self: SMTCMethod, batch: Batch, step: int) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, batch, step)

    monkeypatch.setattr(SMTCMethod, "training_step", asked)
    command = train_flags(synthetic_data, tmp_path / "run")
    told = cli(*command)
    assert told.code == 143
    monkeypatch.undo()
    assert cli(*command).code == 0


def test_a_signal_after_the_last_step_costs_nothing(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last checkpoint and the model are being written."""
    write, save = Checkpoints.close, Line.save_model

    def closing(self: Checkpoints) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(self)

    def saving(self: Line, folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, folder)

    # Should the signal get through, it ends this test and not the whole suite.
    monkeypatch.setattr(Checkpoints, "close", closing)
    monkeypatch.setattr(Line, "save_model", saving)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run = train(with_output(tiny_config, tmp_path / "run", train__steps=3), method=Line())
    finally:
        signal.signal(signal.SIGTERM, former)
    state = latest_checkpoint(run.folder)
    assert state is not None and state["step"] == 3
    assert (run.model_folder / "line.pt").exists()
