"""A wait that lasts is told in time; one that does not costs and says nothing."""

import logging
import threading
import time
from collections.abc import Iterator

import pytest

from smtc.progress import patient


def slowly(*pauses: float) -> Iterator[int]:
    """0, 1, 2, …, each after its pause."""
    for number, pause in enumerate(pauses):
        time.sleep(pause)
        yield number


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "patient"]


def none_left() -> bool:
    for thread in watchers():
        thread.join(timeout=5)
    return not watchers()


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    handler = Heard()
    logging.getLogger("smtc").addHandler(handler)
    yield handler.records
    logging.getLogger("smtc").removeHandler(handler)


def test_a_long_wait_is_told_again_after_twice_the_time(said: list[logging.LogRecord]) -> None:
    assert list(patient(slowly(0, 1.0, 0), "the next clip", "Hurry.", seconds=0.2)) == [0, 1, 2]
    lines = [record.getMessage() for record in said]
    assert len(lines) == 4, lines
    # After 0.2, 0.4 and 0.8 s, and once more after 1.0 s.
    assert all(line.startswith("Waiting for the next clip for 0.") for line in lines[:3])
    assert all(line.endswith(" s now. Hurry.") for line in lines[:3])
    assert lines[3] == "After 1 s, the next clip came."
    told = [record.created for record in said]
    for after, moment in zip((0.2, 0.6), told[1:], strict=False):
        assert after - 0.05 < moment - told[0] < after + 0.15
    assert none_left()


def test_each_wait_is_told_in_its_own_time(said: list[logging.LogRecord]) -> None:
    """A wait that starts while the thread sleeps for another one is not overlooked."""
    list(patient(slowly(0.45, 0.3, 0.1), "it", "", seconds=0.2))
    lines = [record.getMessage() for record in said]
    assert [line.startswith("After") for line in lines] == [False, False, True, False, True]
    assert lines[2].startswith("After 0.") and lines[4].startswith("After 0.3 s")


def test_a_wait_is_told_while_the_items_wait_in_a_system_call(
    said: list[logging.LogRecord],
) -> None:
    items = patient(slowly(0.5), "it", "", seconds=0.1)
    reader = threading.Thread(target=next, args=(items,))
    reader.start()
    time.sleep(0.35)
    assert len(said) >= 1
    reader.join()


def test_nothing_is_said_when_all_is_quick(said: list[logging.LogRecord]) -> None:
    """Nor about the time that the loop itself takes."""
    for _ in patient(slowly(*[0.01] * 5), "it", "", seconds=0.2):
        time.sleep(0.25)
    assert said == []
    assert none_left()


def test_no_items_at_all() -> None:
    assert list(patient([], "it", "")) == []
    assert none_left()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_errors_pass_through(error: type[BaseException], said: list[logging.LogRecord]) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise error("why")

    seen = []
    with pytest.raises(error, match="why"):
        seen.extend(patient(failing(), "it", "", seconds=0.1))
    assert none_left()
    time.sleep(0.2)
    assert said == []


def test_leaving_the_loop_ends_the_watch() -> None:
    for number in patient(slowly(*[0] * 9), "it", "", seconds=60):
        assert len(watchers()) == 1
        if number == 3:
            break
    assert none_left()


def test_watching_costs_little() -> None:
    started = time.process_time()
    assert sum(1 for _ in patient(range(20_000), "it", "")) == 20_000
    assert (time.process_time() - started) / 20_000 < 50e-6
