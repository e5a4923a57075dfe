"""`smtc bench compare`: which rows belong together, and what is a change. Worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smtc.benchmarks import compare

Row = dict[str, Any]
MACHINE = {"cpu": "Xeon", "cores": 2, "threads": 1, "torch": "2.13", "triton": "3.7", "gpu": None}


def timed(median: float, low: float, high: float, **more: Any) -> Row:
    found = {"op": "sinkhorn", "case": "L256", "provider": "plain", "median": median}
    return found | {"p20": low, "p80": high, "unit": "ms"} | more


def save(path: Path, rows: list[Row], **environment: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"environment": MACHINE | environment, "commit": "of-folder", "rows": rows}
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def verdict(old: Row, new: Row, threshold: float = 0.05) -> str:
    (found,), alone = compare.compare([old], [new], threshold)
    assert not +alone
    return found.verdict


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        # 10 % slower, 9.5–10.4 and 10.6–11.4 do not touch.
        ((10.0, 9.5, 10.4), (11.0, 10.6, 11.4), "slower"),
        # The same medians, but 10.6 lies in the first range.
        ((10.0, 9.5, 10.6), (11.0, 10.6, 11.4), "within noise"),
        # Ranges as narrow as can be: 4.9 % does not count, 5.1 % does.
        ((10.0, 10.0, 10.0), (10.49, 10.49, 10.49), "within noise"),
        ((10.0, 10.0, 10.0), (10.51, 10.51, 10.51), "slower"),
        ((10.0, 10.0, 10.0), (9.51, 9.51, 9.51), "within noise"),
        ((10.0, 10.0, 10.0), (9.49, 9.49, 9.49), "faster"),
        # Twice as slow in a run so unsteady that it says nothing.
        ((10.0, 9.0, 11.0), (20.0, 10.5, 40.0), "within noise"),
        ((10.0, 9.0, 11.0), (5.0, 4.0, 6.0), "faster"),
        ((10.0, 9.0, 11.0), (10.0, 9.0, 11.0), "within noise"),
    ],
)
def test_a_time_has_changed_where_it_moved_and_the_ranges_do_not_touch(
    old: tuple[float, float, float], new: tuple[float, float, float], said: str
) -> None:
    assert verdict(timed(*old), timed(*new)) == said


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        *(("ms", "slower"), ("s", "slower"), ("µs", "slower"), ("share of the time", "slower")),
        *(("clips/s", "faster"), ("GB/s", "faster"), ("TFLOP/s", "faster"), ("times", "faster")),
    ],
)
def test_the_unit_says_what_is_better(unit: str, said: str) -> None:
    old, new = {"case": "a", "median": 10.0, "unit": unit}, {"median": 12.0}
    assert verdict(old, old | new) == said
    other = {"slower": "faster", "faster": "slower"}[said]
    assert verdict(old | new, old) == other


def test_the_threshold_is_the_callers() -> None:
    old, new = timed(10.0, 10.0, 10.0), timed(11.5, 11.5, 11.5)
    assert verdict(old, new, 0.2) == "within noise"
    assert verdict(old, new, 0.1) == "slower"
    assert verdict(old, timed(10.01, 10.01, 10.01), 0.0) == "slower"


def test_more_memory_is_a_change_without_a_range() -> None:
    old = {"kind": "peak", "provider": "plain", "L": 256, "B": 2, "peak_mb": 100.0}
    assert verdict(old, old | {"peak_mb": 106.0}) == "more memory"
    assert verdict(old, old | {"peak_mb": 104.0}) == "within noise"
    assert verdict(old, old | {"peak_mb": 90.0}) == "less memory"
    (large,), _ = compare.compare([old | {"peak_mb": 17493.2}], [old], 0.05)
    assert (large.first, large.second, large.percent) == ("17493 MB", "100 MB", "-99.4 %")
    assert verdict(old | {"peak_mb": 0.0}, old) == "more memory"
    assert verdict(old | {"peak_mb": 0.0}, old | {"peak_mb": 0.0}) == "within noise"


def test_rows_are_joined_by_what_identifies_them() -> None:
    """Not by their place, their results, or how often they were repeated."""
    first = timed(10.0, 10.0, 10.0, clips=1, threads=1, repeats=5)
    second = timed(50.0, 50.0, 50.0, clips=2, threads=1, repeats=5)
    third = timed(90.0, 90.0, 90.0, clips=2, threads=2, repeats=5)
    moved = [third | {"repeats": 9}, first | {"percent_of_roofline": 1.0}, second]
    changes, alone = compare.compare([first, second, third], moved, 0.05)
    assert [change.verdict for change in changes] == ["within noise"] * 3 and not +alone
    for key, other in (("dtype", "float16"), ("direction", "both"), ("seed", 1), ("kind", "x")):
        changes, alone = compare.compare([first], [first | {key: other}], 0.05)
        assert not changes and alone == {"only in A": 1, "only in B": 1}


def test_equal_rows_are_joined_in_their_order() -> None:
    rows = [timed(value, value, value) for value in (1.0, 2.0)]
    changes, _ = compare.compare(rows, rows, 0.05)
    assert [change.verdict for change in changes] == ["within noise"] * 2


def test_launch_options_identify_a_row() -> None:
    small, large = {"options": {"BLOCK": 32}}, {"options": {"BLOCK": 64}}
    old = [timed(1.0, 1.0, 1.0, **small), timed(2.0, 2.0, 2.0, **large)]
    changes, _ = compare.compare(old, old[::-1], 0.05)
    assert [change.verdict for change in changes] == ["within noise"] * 2


def test_what_fails_now_is_a_change_for_the_worse() -> None:
    """A row that failed early does not say in which direction."""
    old = [timed(1.0, 1.0, 1.0, direction="both"), timed(1.0, 1.0, 1.0, direction="forward")]
    error = {"op": "sinkhorn", "case": "L256", "provider": "plain", "error": "OutOfMemoryError"}
    changes, alone = compare.compare(old, [error], 0.05)
    assert [change.verdict for change in changes] == ["fails now"] * 2 and not +alone
    changes, alone = compare.compare(old, [error | {"provider": "triton"}], 0.05)
    assert not changes and alone == {"only in A": 2, "only in B": 0}
    changes, alone = compare.compare([error], [error], 0.05)
    assert not changes and not +alone


def test_rows_without_a_common_unit_are_left_out() -> None:
    old = timed(1.0, 1.0, 1.0)
    for other in ({"unit": "s"}, {"unit": "parsecs"}, {"unit": None}):
        assert not compare.compare([old], [old | other], 0.05)[0]
    assert not compare.compare([old | {"unit": "parsecs"}], [old | {"unit": "parsecs"}], 0.05)[0]


def cells(text: str) -> list[list[str]]:
    """Of the printed table, without its heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines if "---" not in line}) == 1  # columns are straight
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_two_files(cli: Callable[..., Any], tmp_path: Path) -> None:
    old = [
        timed(10.0, 9.9, 10.1, case="same"),
        timed(10.0, 9.9, 10.1, case="worse", peak_mb=10.0),
        timed(10.0, 9.9, 10.1, case="better"),
        timed(10.0, 9.9, 10.1, case="worst"),
        timed(10.0, 9.9, 10.1, case="gone"),
    ]
    new = [
        timed(10.0, 9.9, 10.1, case="same"),
        timed(15.0, 14.9, 15.1, case="worse", peak_mb=10.0),
        timed(5.0, 4.9, 5.1, case="better"),
        timed(20.0, 19.9, 20.1, case="worst"),
    ]
    first, second = save(tmp_path / "a.json", old), save(tmp_path / "b.json", new)
    told = cli("bench", "compare", first, second)
    assert told.code == 1
    assert told.out.splitlines()[0] == "a: A is of commit of-folder, B of of-folder."
    assert "not comparable" not in told.out
    steady, slower = ["10 ms", "10 ms", "+0.0 %", "within noise"], ["10 ms", "15 ms", "+50.0 %"]
    assert cells(told.out) == [
        ["a sinkhorn better plain", "median", "10 ms", "5 ms", "-50.0 %", "faster"],
        ["a sinkhorn same plain", "median", *steady],
        ["a sinkhorn worse plain", "peak_mb", "10 MB", "10 MB", "+0.0 %", "within noise"],
        ["a sinkhorn worse plain", "median", *slower, "slower"],
        ["a sinkhorn worst plain", "median", "10 ms", "20 ms", "+100.0 %", "slower"],
    ]
    last = told.out.splitlines()[-1]
    assert last == "2 slower, 1 faster, 2 within noise, 1 only in A"
    back = cli("bench", "compare", second, first)
    assert back.code == 1
    assert back.out.splitlines()[-1] == "1 slower, 2 faster, 2 within noise, 1 only in B"
    assert cli("bench", "compare", first, first).code == 0
    assert cli("bench", "compare", first, second, "--threshold", 1.5).code == 0


def test_more_memory_alone_is_reason_enough(cli: Callable[..., Any], tmp_path: Path) -> None:
    row = timed(10.0, 9.9, 10.1, peak_mb=10.0)
    first = save(tmp_path / "a.json", [row])
    second = save(tmp_path / "b.json", [row | {"peak_mb": 20.0}])
    told = cli("bench", "compare", first, second)
    assert told.code == 1
    assert told.out.splitlines()[-1] == "0 slower, 0 faster, 1 more memory, 1 within noise"
    assert cli("bench", "compare", second, first).code == 0


def test_a_rate_that_fell_is_the_worst(cli: Callable[..., Any], tmp_path: Path) -> None:
    rate = timed(100.0, 99.0, 101.0, case="rate", unit="clips/s")
    time = timed(10.0, 9.9, 10.1, case="time")
    first = save(tmp_path / "a.json", [rate, time])
    fell = rate | {"median": 25.0, "p20": 24.0, "p80": 26.0}
    second = save(tmp_path / "b.json", [fell, time | {"median": 30.0, "p20": 29.0, "p80": 31.0}])
    told = cli("bench", "compare", first, second)
    # A quarter of the clips is four times worse; three times the time is three times worse.
    time_row, rate_row = cells(told.out)
    assert time_row[0] == "a sinkhorn time plain"
    assert rate_row == [
        *("a sinkhorn rate plain", "median", "100 clips/s", "25 clips/s", "-75.0 %", "slower")
    ]


def test_two_folders(cli: Callable[..., Any], tmp_path: Path) -> None:
    row = timed(10.0, 10.0, 10.0)
    for name, median in (("kernels", 10.0), ("step", 9.0)):
        save(tmp_path / "a" / f"{name}.json", [row])
        save(
            tmp_path / "b" / f"{name}.json", [row | dict.fromkeys(("median", "p20", "p80"), median)]
        )
    save(tmp_path / "a" / "tune.json", [row])
    (tmp_path / "a" / "learning.json").write_text("{}", encoding="utf-8")
    (tmp_path / "b" / "learning.json").write_text("{}", encoding="utf-8")
    told = cli("bench", "compare", tmp_path / "a", tmp_path / "b")
    assert told.code == 0 and "Only in A: tune.json." in told.out
    assert "step, kernels: A is of commit of-folder, B of of-folder." in told.out
    assert [line[0] for line in cells(told.out)] == [
        *("step sinkhorn L256 plain", "kernels sinkhorn L256 plain")
    ]
    assert told.out.splitlines()[-1] == "0 slower, 1 faster, 1 within noise"


def test_another_machine_is_told(cli: Callable[..., Any], tmp_path: Path) -> None:
    rows = [timed(10.0, 10.0, 10.0)]
    first = save(tmp_path / "a.json", rows)
    second = save(tmp_path / "b.json", rows, gpu="H200", torch="2.14")
    told = cli("bench", "compare", first, second)
    line = "a: times are not comparable: gpu none and H200; torch 2.13 and 2.14."
    assert told.code == 0 and line in told.out.splitlines()
    assert "0 slower, 0 faster, 1 within noise" in told.out


def test_mistakes_end_in_a_sentence(refused: Callable[..., str], tmp_path: Path) -> None:
    row = timed(10.0, 10.0, 10.0)
    good, other = save(tmp_path / "a.json", [row]), save(tmp_path / "b.json", [row | {"op": "x"}])
    assert "none.json does not exist" in refused("bench", "compare", good, tmp_path / "none.json")
    assert "no measured row in common" in refused("bench", "compare", good, other)
    assert "only one is a folder" in refused("bench", "compare", good, tmp_path)
    assert "have no report in common" in refused("bench", "compare", tmp_path, tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text("{}", encoding="utf-8")
    assert "bad.json is no benchmark report" in refused("bench", "compare", good, bad)
    bad.write_text(json.dumps({"environment": {}, "commit": "c", "rows": {}}), encoding="utf-8")
    assert "bad.json is no benchmark report" in refused("bench", "compare", good, bad)
    for threshold in (-0.1, "nan", "inf"):
        said = refused("bench", "compare", good, good, "--threshold", threshold)
        assert "--threshold is a relative change" in said
