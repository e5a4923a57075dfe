"""What all benchmarks share: the environment, the report's file, timing, peak memory, ceilings."""

import itertools
import json
import math
import os
import re
import socket
from pathlib import Path

import pytest
import torch

from smtc.benchmarks import harness
from smtc.benchmarks.cases import OPERATIONS
from smtc.errors import UserError


def test_the_environment_tells_the_machine_but_not_whose_it_is() -> None:
    found = harness.environment()
    assert {"python", "torch", "triton", "cpu", "cores", "amx", "gpu"} <= set(found)
    assert found["torch"] == torch.__version__ and found["amx"] in (True, False)
    text = json.dumps(found)
    assert os.getcwd() not in text and str(Path.home()) not in text
    assert socket.gethostname() not in text


def test_the_commit_is_named_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", harness.commit())
    monkeypatch.setattr(harness.manifest, "commit", lambda: None)
    assert harness.commit() == "unknown"


def test_a_report_is_whole_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "some.json"
    report = harness.Report(path)
    assert harness.read_report(path)["rows"] == []
    for number in range(3):
        report.add({"case": number, "median": math.nan if number == 1 else 0.5})
        written = json.loads(path.read_text(encoding="utf-8"))
        assert [row["case"] for row in written["rows"]] == list(range(number + 1))
    assert written["rows"][1]["median"] is None
    assert set(written) == {"environment", "commit", "rows"}
    assert os.listdir(path.parent) == ["some.json"]


def test_a_report_takes_the_place_of_a_report_only(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    harness.Report(path).add({"case": 1})
    again = harness.Report(path)
    assert again.rows == [] and harness.read_report(path)["rows"] == [{"case": 1}]
    again.add({"case": 2})  # only now is there something better
    assert harness.read_report(path)["rows"] == [{"case": 2}]
    for foreign in ("{}", "[1]", "not JSON"):
        path.write_text(foreign, encoding="utf-8")
        with pytest.raises(UserError, match=r"some\.json is no benchmark report"):
            harness.Report(path)
        assert path.read_text(encoding="utf-8") == foreign


def test_a_folder_that_cannot_be_written_is_refused(read_only: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        harness.Report(read_only / "some.json")


def test_percentiles() -> None:
    found = harness.timing([float(k) for k in (5, 1, 4, 2, 3, 6)])
    assert (found.p20, found.median, found.p80, found.repeats) == (2, 3.5, 5, 6)
    assert found.row() == {"median": 3.5, "p20": 2.0, "p80": 5.0, "unit": "ms", "repeats": 6}


def test_functions_are_timed_in_turn() -> None:
    calls: list[str] = []
    slow = torch.ones(200, 200)

    def first() -> None:
        calls.append("first")

    def second() -> None:
        calls.append("second")
        for _ in range(20):
            slow @ slow

    found = harness.interleaved({"first": first, "second": second}, seconds=0.01)
    assert calls == list(itertools.islice(itertools.cycle(["first", "second"]), len(calls)))
    assert found["first"].repeats == found["second"].repeats >= harness.FEWEST
    assert 0 < found["first"].median < found["second"].median
    assert all(t.p20 <= t.median <= t.p80 for t in found.values())


def test_peak_memory_counts_what_is_held_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.ones(1000, 250)  # a megabyte
    assert harness.peak_memory(lambda: x + 1) == pytest.approx(1, rel=0.01)
    assert harness.peak_memory(lambda: (x + 1) + (x + 2)) == pytest.approx(3, rel=0.01)

    def one_after_the_other() -> None:
        for _ in range(3):
            x.add(1)

    assert harness.peak_memory(one_after_the_other) == pytest.approx(1, rel=0.01)
    assert capfd.readouterr().err == ""


def test_the_roofline_is_the_larger_of_two_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "dense_bf16_rate", lambda device: 1e12)
    monkeypatch.setattr(harness, "device_copy_bandwidth", lambda device: 1e9)
    # 2 ms of arithmetic, 1 ms of traffic; then the other way round
    assert harness.percent_of_roofline(2e9, 1e6, 4.0, "cpu") == pytest.approx(50)
    assert harness.percent_of_roofline(1e8, 1e6, 4.0, "cpu") == pytest.approx(25)


def test_ceilings_are_measured() -> None:
    assert 1e8 < harness.device_copy_bandwidth("cpu") < 1e13
    assert 1e8 < harness.dense_bf16_rate("cpu") < 1e16


def test_operations_and_devices_are_checked() -> None:
    assert harness.pick_operations([]) == OPERATIONS
    assert harness.pick_operations(["assignment", "sinkhorn"]) == ("sinkhorn", "assignment")
    with pytest.raises(UserError, match="no operation 'sort'"):
        harness.pick_operations(["sort"])
    assert harness.pick_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        assert harness.pick_device("auto") == "cpu"
        with pytest.raises(UserError, match="--device cpu"):
            harness.pick_device("cuda")
