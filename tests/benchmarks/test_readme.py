"""The README's tables: `smtc bench report --readme`, and that they are those of the recorded
results, from which its claims follow.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smtc.benchmarks import readme, report
from smtc.benchmarks.blocks import UNMEASURED
from smtc.benchmarks.cases import CASES
from smtc.benchmarks.comparison import TOLERANCE
from smtc.benchmarks.harness import Report
from smtc.kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDED = report.collect(ROOT / "benchmarks" / "results")

PAGE = """# Mine

<!-- table: parity -->
old | words
<!-- end -->
between
<!-- table: step --><!-- end -->
and `<!-- end -->` after
"""
CHECKED = {"op": "sinkhorn", "case": "small", "dtype": "float32", "forward": 1e-7}
ERRORS = (
    "| operation | dtype | forward | gradient | eager's forward | eager's gradient "
    "| of tolerance | worst case | result |\n" + "|---" * 9 + "|\n"
    "| sinkhorn | float32 | 1.0e-07 |  |  |  | 0.10 | small | 1 passed |\n"
)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file with marks, beside a folder of results."""
    written = Report(tmp_path / "results" / "parity.json")
    written.add(CHECKED | {"of_tolerance": 0.1, "passed": True})
    path = tmp_path / "MINE.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def test_what_lies_between_the_marks_is_written_and_nothing_else(
    cli: Callable[..., Any], mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smtc.benchmarks.report.SECTIONS", on_any_machine())
    folder = mine.parent / "results"
    told = cli("bench", "report", folder, "--readme", mine)
    assert told.code == 0 and "are new" in told.out
    expected = PAGE.replace("old | words\n", ERRORS)
    step = f"{UNMEASURED}: `smtc bench step --output build/bench`"
    expected = expected.replace("step --><!--", f"step -->\n{step}\n<!--")
    assert mine.read_text(encoding="utf-8") == expected
    assert [path.name for path in folder.iterdir()] == ["parity.json"]
    before = mine.stat()
    again = cli("bench", "report", folder, "--readme", mine)
    assert (mine.stat().st_ino, mine.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert again.code == 0 and "up to date" in again.out
    assert mine.read_text(encoding="utf-8") == expected


def on_any_machine() -> tuple[report.Section, ...]:
    """The sections without the line that depends on whether the machine has a GPU."""
    return tuple(
        report.Section(one.name, one.title, one.about, one.blocks, on_gpu=False)
        for one in report.SECTIONS
    )


def test_numbers_that_a_gpu_would_add_are_said_to_be_missing() -> None:
    made = {"environment": {"gpu": None}, "commit": "c", "rows": [CHECKED | {"passed": False}]}
    assert readme.content("parity", {"parity": made}).endswith(f"\n\nOn a GPU: {UNMEASURED}.")
    made["environment"] = {"gpu": "H200"}
    assert UNMEASURED not in readme.content("parity", {"parity": made})


@pytest.mark.parametrize("name", [*readme.TABLES, "kernels"])
def test_without_results_every_table_says_so(name: str) -> None:
    assert UNMEASURED in readme.content(name, {})


@pytest.mark.parametrize("name", [*readme.TABLES, "kernels"])
def test_every_mark_stands_in_the_readme(name: str) -> None:
    assert README.count(f"<!-- table: {name} -->") == (0 if name == "profile" else 1)


def test_wrong_marks_are_refused(safe: Callable[..., str], mine: Path) -> None:
    flags = ("bench", "report", mine.parent / "results", "--readme", mine)

    def said(text: str) -> str:
        mine.write_text(text, encoding="utf-8")
        return safe(*flags)

    assert "has no line <!-- table: NAME -->" in said("# Mine\n")
    missing = "after <!-- table: step --> <!-- end --> is missing"
    assert missing in said("<!-- table: step -->\n")
    assert missing in said("<!-- table: step -->\n<!-- table: data -->\n<!-- end -->\n")
    assert "there is no table 'speed'; there are ablations" in said(PAGE.replace("step", "speed"))
    assert "--output is for the page" in safe(*flags, "--output", mine.parent / "page.html")
    mine.unlink()
    assert "MINE.md cannot be read" in safe(*flags)


def test_the_readme_shows_the_recorded_tables() -> None:
    """After a change of results or tables: `smtc bench report --readme README.md`."""
    assert readme.filled(README, RECORDED) == README


def test_a_table_that_is_not_the_recorded_one_is_noticed() -> None:
    """What the test above would miss if marks were lost."""
    for name in ("learning", "parity", "data", "kernels"):
        text = readme.content(name, RECORDED)
        assert text in README and len(text) > 500
        changed = re.sub(r"\| 0\.\d\d |not yet measured \|", "| 9 ", README)
        assert readme.filled(changed, RECORDED) != changed


def test_the_parity_results_are_complete() -> None:
    rows = RECORDED["parity"]["rows"]
    found = {(row["op"], row["case"], row["dtype"]) for row in rows}
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TOLERANCE]
    dtypes.remove("float64")
    assert found == {(case.op, case.name, dtype) for case in CASES for dtype in dtypes}
    assert {row["provider"] for row in rows} == {"triton"}
    assert all(row["of_tolerance"] <= 1 for row in rows)


def test_what_the_readme_recommends_of_loaders_is_what_was_measured() -> None:
    rows = RECORDED["data"]["rows"]
    assert not [row for row in rows if "error" in row]
    ratios = [row for row in rows if row.get("kind") == "ratio" and row["threads"] == 2]
    found = {(row["case"], row["provider"]): row["median"] for row in ratios}
    assert found["720p", "torch / pil"] >= 1.4
    assert found["720p", "cache / torch"] > 2  # the target is 2.5, see the table
    assert found["720p", "dali / torch"] < 1  # so that `auto` takes OpenCV on a CPU


def test_every_kernel_is_named() -> None:
    assert all(f"`{op}`" in README for op in dispatch.FUSED)


def test_recorded_results_are_reports() -> None:
    names = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert names == set(RECORDED)
    for made in RECORDED.values():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", made["commit"]), made["commit"]
        assert json.dumps(made, allow_nan=False)


def test_the_recorded_page_is_that_of_the_results(tmp_path: Path) -> None:
    """`smtc bench report` was run after the last result."""
    report.run(ROOT / "benchmarks" / "results", output=tmp_path / "report.html")
    recorded = ROOT / "benchmarks" / "results" / "report.html"
    assert (tmp_path / "report.html").read_bytes() == recorded.read_bytes()
