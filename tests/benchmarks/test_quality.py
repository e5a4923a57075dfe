"""`smtc bench quality`: intervals, rows that are kept, and a benchmark that goes on."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smtc import presets
from smtc.benchmarks import quality
from smtc.benchmarks.harness import Report, read_report
from smtc.benchmarks.quality import METRICS, interval, kept_runs, seconds
from smtc.benchmarks.step_providers import changed
from smtc.config import Config
from smtc.pipelines.synthetic import synthesize

SMALL = {"model.resolution": (32, 32), "train.batch": 2, "data.workers": 0}
FORMS = ("eager-bf16", "eager-fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos to train on and two to score."""
    folder = tmp_path_factory.mktemp("quality")
    synthesize(folder / "train", videos=4, size=32)
    synthesize(folder / "val", videos=2, size=32, seed=7)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets of milliseconds, and a form that compiles nothing."""
    for name in ("tiny", "tiny_encoder"):
        config = changed(presets.get(name), SMALL)
        monkeypatch.setattr(presets, name, lambda config=config: config)
    monkeypatch.setattr(quality, "fastest", lambda device: FORMS[0])


def run_of(provider: str, seed: int, **values: Any) -> dict[str, Any]:
    return {"kind": "run", "provider": provider, "seed": seed, **dict.fromkeys(METRICS, 0.5)} | (
        values
    )


def measured(output: Path, data: Path, seeds: int = 2) -> list[dict[str, Any]]:
    """The rows of a run of two steps."""
    assert quality.run(output, seeds=seeds, steps=2, warm_steps=2, data=data, device="cpu") == 0
    rows: list[dict[str, Any]] = read_report(output / "quality.json")["rows"]
    return rows


def test_an_interval_is_the_one_worked_out_by_hand() -> None:
    # Mean 0.02; deviations −0.02, −0.01, 0, 0.01, 0.02: variance 0.001 / 4, standard error
    # √0.00025 / √5 = 0.00707107; t of 4 degrees of freedom at 97.5 % is 2.776445.
    found = interval([0.0, 0.01, 0.02, 0.03, 0.04])
    assert found["mean"] == pytest.approx(0.02)
    assert found["low"] == pytest.approx(0.02 - 2.776445 * 0.00707107, abs=1e-8)
    assert found["high"] == pytest.approx(0.02 + 2.776445 * 0.00707107, abs=1e-8)
    # Two values: t is 12.706205, the standard error half their difference.
    assert interval([1.0, 3.0])["low"] == pytest.approx(2 - 12.706205, abs=1e-5)
    alone = interval([0.3])
    assert alone["mean"] == 0.3 and math.isnan(alone["low"]) and math.isnan(alone["high"])


def test_the_seconds_are_those_of_the_logged_steps(tmp_path: Path) -> None:
    config = changed(Config(), {"output": str(tmp_path), "train.batch": 4})
    # 10 steps of 4 clips at 8 a second, then 5 at 2 a second.
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 10, "clips_per_s": 8.0}\n{"step": 15, "clips_per_s": 2.0}\n'
    )
    assert seconds(config) == pytest.approx(5 + 10)


def test_only_whole_runs_of_the_same_settings_are_kept(tmp_path: Path) -> None:
    path, settings = tmp_path / "quality.json", {"kind": "settings", "steps": 2}
    assert kept_runs(path, settings) == []
    report = Report(path)
    cut = {k: v for k, v in run_of("eager-fp32", 1).items() if k != "fg_ari"}
    rows = [settings, run_of("eager-fp32", 0), cut, {"kind": "difference", "metric": "ari"}]
    for row in [*rows, run_of("eager-fp32", 2, ari=None)]:
        report.add(row)
    assert kept_runs(path, settings) == [run_of("eager-fp32", 0)]
    assert kept_runs(path, settings | {"steps": 3}) == []


def test_every_seed_is_run_in_both_forms(
    small: None, cli: Callable[..., Any], tmp_path: Path, data: Path
) -> None:
    told = cli(
        *("bench", "quality", "--device", "cpu", "--seeds", 2, "--steps", 2, "--warm-steps", 2),
        *("--data", data, "--output", tmp_path),
    )
    assert told.code == 0, told
    rows = read_report(tmp_path / "quality.json")["rows"]
    runs = [row for row in rows if row["kind"] == "run"]
    assert [(row["seed"], row["provider"]) for row in runs] == [
        (seed, form) for seed in (0, 1) for form in FORMS
    ]
    assert all(-1 <= row[metric] <= 1 for row in runs for metric in METRICS)
    assert all(row["seconds"] > 0 for row in runs)
    differences = [row for row in rows if row["kind"] == "difference"]
    assert [row["metric"] for row in differences] == list(METRICS)
    for row in differences:
        assert (row["a"], row["b"], row["n"]) == (*FORMS, 2)
        pairs = zip(runs[::2], runs[1::2], strict=True)
        each = [a[row["metric"]] - b[row["metric"]] for a, b in pairs]
        assert row["mean"] == pytest.approx(sum(each) / 2, abs=2e-5)
        assert row["low"] <= row["mean"] <= row["high"]
    assert "| ari | eager-bf16 | eager-fp32 |" in told.out


def test_both_forms_start_from_one_warm_start(small: None, tmp_path: Path, data: Path) -> None:
    bench = quality._Bench(tmp_path, "cpu", 2, 2, data)
    first, second = (bench._config(3, form) for form in FORMS)
    assert first.init == second.init and first.output != second.output
    assert first.init is not None and (Path(first.init) / "model").is_dir()
    assert first.train.seed == second.train.seed == 3
    assert (first.train.precision, second.train.precision) == ("bf16", "fp32")
    assert changed(first, {"output": None, "train.precision": "fp32"}) == changed(
        second, {"output": None}
    )


def test_a_benchmark_that_was_stopped_goes_on(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    train, trained = quality.train, []

    def stopping(config: Config) -> object:
        trained.append(Path(str(config.output)).name)
        if trained == ["warm start", *FORMS, "warm start", FORMS[0]]:
            raise KeyboardInterrupt
        return train(config)

    monkeypatch.setattr(quality, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, data)
    before = read_report(tmp_path / "quality.json")["rows"]
    assert [row["kind"] for row in before] == ["settings", "run", "run"]
    rows = measured(tmp_path, data)
    assert trained[5:] == list(FORMS)
    assert rows[:3] == before and len(rows) == 1 + 4 + len(METRICS)
    # A third time nothing is trained, and fewer seeds are a part of what is there.
    assert measured(tmp_path, data) == rows and len(trained) == 7
    assert [row["n"] for row in measured(tmp_path, data, seeds=1) if "n" in row] == [1] * 4


def test_mistakes_end_in_a_sentence(safe: Callable[..., str], tmp_path: Path, data: Path) -> None:
    start = ("bench", "quality", "--device", "cpu", "--output", tmp_path / "out", "--data", data)
    for flag in ("--seeds", "--steps", "--warm-steps"):
        assert "at least 1" in safe(*start, flag, 0)


def test_a_foreign_file_is_left_alone(safe: Callable[..., str], tmp_path: Path, data: Path) -> None:
    (tmp_path / "quality.json").write_text("[]")
    assert "is no benchmark report" in safe(
        *("bench", "quality", "--device", "cpu", "--output", tmp_path, "--data", data)
    )
    assert (tmp_path / "quality.json").read_text() == "[]"
