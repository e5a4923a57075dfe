"""The README's table of the loaders is the committed one, and its claims follow from it."""

import json
from pathlib import Path

from smtc.benchmarks import report

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = json.loads((ROOT / "benchmarks" / "results" / "data.json").read_text(encoding="utf-8"))[
    "rows"
]


def ratio(case: str, provider: str) -> float:
    found = [row for row in ROWS if row.get("kind") == "ratio" and row["threads"] == 2]
    return next(r["median"] for r in found if (r["case"], r["provider"]) == (case, provider))


def test_the_table_is_the_recorded_one() -> None:
    assert report.data_table(ROWS).strip() in README
    assert not [row for row in ROWS if "error" in row]


def test_what_the_readme_recommends_is_what_was_measured() -> None:
    assert ratio("720p", "torch / pil") >= 1.4
    assert ratio("720p", "cache / torch") > 2  # the target is 2.5, see the table
    assert ratio("720p", "dali / torch") < 1  # so that `auto` takes OpenCV on a CPU
