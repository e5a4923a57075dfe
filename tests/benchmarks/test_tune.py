"""`smtc bench tune`: the search, how options are forced, the rows it prints; no GPU is needed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smtc import kernels
from smtc.benchmarks import tune
from smtc.benchmarks.harness import Report, Timing, timing
from smtc.kernels import tuning
from smtc.kernels.tuning import ANY, Row

COST = torch.rand(3, 4, 4)


def test_without_a_gpu_it_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    said = refused("bench", "tune", "--output", tmp_path / "out")
    assert "needs a CUDA device" in said and not (tmp_path / "out").exists()


def test_neighbours_change_one_option_by_one_step() -> None:
    start = {"BLOCK": 64, "num_warps": 16, "num_stages": 1}
    assert tune.neighbours(start) == [
        start | {"BLOCK": 32},
        start | {"BLOCK": 128},
        start | {"num_warps": 8},
        start | {"num_stages": 2},
    ]


def test_the_climb_ends_at_the_fastest_and_measures_nothing_twice() -> None:
    measured = []

    def timed(options: dict[str, int]) -> float:
        measured.append(options["BLOCK"])
        return abs(options["BLOCK"] - 128) + 100.0

    assert tune.climb({"BLOCK": 32}, timed) == ({"BLOCK": 128}, 100.0)
    assert sorted(measured) == [16, 32, 64, 128, 256]


def test_a_gain_within_the_noise_changes_nothing() -> None:
    best, _ = tune.climb({"BLOCK": 32}, lambda options: 100 - 0.01 * options["BLOCK"])
    assert best == {"BLOCK": 32}


def test_questions_and_forced_options() -> None:
    with tune.questions() as asked:
        kernels.assignment(COST, impl="triton")
    ((question, answer),) = asked.items()
    assert question == ("assignment", 32, 4) and "BLOCK" in answer
    before = tuning.TABLE["assignment"]
    with pytest.raises(RuntimeError), tune.forced("assignment", "interpreter", {"BLOCK": 32}):
        assert tuning.options("assignment", COST, 10**9) == {"BLOCK": 32}
        assert tuning.options("assignment", COST.bfloat16(), 1) == {"BLOCK": 32}
        raise RuntimeError
    assert tuning.TABLE["assignment"] is before
    assert tuning.options.__module__ == "smtc.kernels.tuning"


def test_winners_fall_into_the_buckets_of_their_sizes() -> None:
    rows = [Row("sm_90", 16, 300, {"B": 1}), Row("sm_90", 16, ANY, {"B": 2})]
    found = tune.merged(rows, {256: {"B": 8}, 1024: {"B": 2}, 1500: {"B": 4}})
    assert [(row.largest, row.options) for row in found] == [
        (300, {"B": 8}),
        (1024, {"B": 2}),
        (ANY, {"B": 4}),
    ]
    assert tune.merged(rows, {}) == rows
    assert [row.largest for row in tune.merged(rows, {1024: {"B": 1}})] == [ANY]


def test_an_architecture_without_rows_starts_from_an_older_one() -> None:
    rows = tune.committed("correlation_projection", "sm_86", 16)
    older = tune.committed("correlation_projection", "sm_80", 16)
    assert [row.options for row in rows] == [row.options for row in older]
    assert {row.architecture for row in rows} == {"sm_86"}


def test_printed_rows_are_python_of_the_table() -> None:
    rows = {
        "some": [
            Row("sm_90", 16, 256, {"BLOCK": 64, "num_warps": 4}),
            Row("sm_90", 16, ANY, {"BLOCK": 128, "num_warps": 8}),
            Row("sm_90", 32, ANY, {"BLOCK": 32, "num_warps": 4}),
        ]
    }
    printed = "{" + tune.rows_as_python(rows) + "}"
    assert eval(printed, {"ANY": ANY, "_rows": tuning._rows}) == rows


class Clock:
    """Pretends that a tile of 128 is fastest, in place of `measure`."""

    def __call__(self, *arguments: object, **settings: object) -> Timing:
        block = tuning.TABLE["assignment"][0].options["BLOCK"]
        return timing([abs(block - 128) + 100.0])


def test_a_search_finds_the_fastest_that_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "measure", Clock())
    tuner = tune.Tuner(Report(tmp_path / "tune.json"), "cpu", 1, 0.01)
    tuner.search("assignment", 16, 32)
    (winner,) = tuner.winners.values()
    assert winner["BLOCK"] == 128
    assert tuner.report.rows[-1]["chosen"] and tuner.report.rows[-1]["options"] == winner
    assert all(row["kernel"] == "assignment" and row["size"] == 4 for row in tuner.report.rows)
    text = tune.rows_as_python(tuner.found)
    assert '*_rows("interpreter", 32, (4, {"BLOCK": 128, ' in text
    before = dict(tuning.TABLE)
    assert tuner.missed(["assignment"]) == []
    assert before == tuning.TABLE


def test_a_candidate_with_wrong_results_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tune._Trial.error

    def error(trial: tune._Trial) -> float:
        block = tuning.TABLE["assignment"][0].options["BLOCK"]
        return 1.0 if block == 128 else right(trial)

    monkeypatch.setattr(tune, "measure", Clock())
    monkeypatch.setattr(tune._Trial, "error", error)
    tuner = tune.Tuner(Report(tmp_path / "tune.json"), "cpu", 1, 0.01)
    tuner.search("assignment", 16, 32)
    (refused,) = (row for row in tuner.report.rows if "error" in row)
    assert refused["options"]["BLOCK"] == 128 and "allowed" in refused["error"]
    assert all(winner["BLOCK"] != 128 for winner in tuner.winners.values())


def test_found_rows_that_fail_the_cases_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = tune.Tuner(Report(tmp_path / "tune.json"), "cpu", 1, 0.01)
    for bits in (16, 32):
        tuner.winners[tune.Asked("assignment", bits, 4)] = {"BLOCK": 3}  # no power of two
    missed = tuner.missed(["assignment"])
    assert "assignment-P 4 float32" in missed and "assignment-P 8 float32" not in missed
