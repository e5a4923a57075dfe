"""The learning report: its rows and files on a run of two steps, and what is published of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from smtc.benchmarks import learning
from smtc.config import Config
from smtc.errors import UserError
from smtc.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "benchmarks" / "results" / "learning.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Config]) -> Path:
    """A run folder of the preset `tiny` on a warm start, two steps each."""
    folder = tmp_path_factory.mktemp("learning")
    encoder, run = str(folder / "encoder"), str(folder / "run")
    train(tiny_config({"train.steps": 2, "output": encoder}, preset="tiny_encoder"))
    return train(tiny_config({"train.steps": 2, "output": run, "init": encoder})).folder


def test_a_report_has_every_row_and_file(
    finished: Path, synthetic_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = learning.report(finished, synthetic_data)
    names = [row["model"] for row in rows]
    assert names[-1] == "trained" and "untrained" in names and "warm start + k-means" in names
    assert sum("warm" in name for name in names) == 2
    assert any(name.startswith("colour k-means") for name in names)
    assert any(name.startswith("fixed grid") for name in names)
    written = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in written["rows"]] == names
    for row in written["rows"]:
        assert all(-1 <= row[score] <= 1 for score in ("ari", "fg_iou", "miou"))
    assert (finished / "report.png").stat().st_size > 10_000
    told = capsys.readouterr().out
    assert str(finished / "report.png") in told and "| trained |" in told


def test_the_untrained_row_is_what_training_started_from(
    finished: Path, synthetic_data: Path
) -> None:
    """Trained and untrained rows differ by the training alone."""
    rows = {row["model"]: row for row in learning.report(finished, synthetic_data)}
    assert rows["untrained"]["ari"] != rows["warm start, untrained slots"]["ari"]
    assert rows["trained"] != rows["warm start, untrained slots"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no"):
        learning.report(tmp_path / "nothing", tmp_path)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recorded_runs_learned(seed: int) -> None:
    """The margins that training must reach over everything that has not seen it."""
    rows = json.loads(PUBLISHED.read_text(encoding="utf-8"))["rows"]
    trained = rows["trained"][seed]
    assert trained["ari"] >= 0.5 and trained["fg_iou"] >= 0.5 and trained["miou"] >= 0.45
    for name, found in rows.items():
        other = found[seed]
        if name == "trained":
            continue
        margins = (-0.02, -0.02, -1.0) if "warm" in name else (0.2, 0.02, 0.02)
        for score, margin in zip(("ari", "fg_iou", "miou"), margins, strict=True):
            assert trained[score] >= other[score] + margin, (name, score)
