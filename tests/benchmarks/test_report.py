"""`smtc bench report`: tables, charts and a page from the JSON files of a folder."""

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from smtc.benchmarks import page, parity, report, step_tables, tables
from smtc.benchmarks.blocks import UNMEASURED, Bar, Block, Chart, Table, markdown, number
from smtc.benchmarks.charts import LONGEST, svg
from smtc.benchmarks.harness import Report

TIME = {"unit": "ms", "repeats": 5, "percent_of_roofline": 40.0, "peak_mb": 1.0}
VOID = ("meta", "br")
"""Elements of HTML that are not closed."""


def row(op: str, case: str, provider: str, median: float, **more: Any) -> dict[str, Any]:
    """A timed row of kernels.json."""
    found = {"op": op, "case": case, "provider": provider, "direction": "both", "mode": "launch"}
    return found | TIME | {"median": median, "p20": 0.9 * median, "p80": 1.1 * median} | more


def step(provider: str, median: float, **more: Any) -> dict[str, Any]:
    """A row of step.json about whole steps."""
    found = {"kind": "provider", "case": "L256 B2", "provider": provider, "device": "cpu"}
    found |= {"median": median, "p20": 0.8 * median, "p80": 1.25 * median, "unit": "ms"}
    found |= {"clips_per_s": 2000 / median, "speedup": 800 / median, "peak_mb": 1234.5}
    return found | {"flops": 2_400_000_000_000, "utilisation": None, "syncs": 3} | more


def phase(name: str, median: float) -> dict[str, Any]:
    found = {"kind": "phase", "case": "L256 B2", "provider": "plain", "phase": name}
    return found | {"median": median, "p20": median, "p80": median, "unit": "ms"}


def run_of(provider: str, seed: int, ari: float) -> dict[str, Any]:
    return {"kind": "run", "provider": provider, "seed": seed, "ari": ari, "miou": 0.5}


KERNELS = [
    {"case": "device copy", "median": 4300.0, "unit": "GB/s"},
    row("correlation_projection", "L256", "triton", 0.1),
    row("correlation_projection", "L256", "triton", 0.08, mode="graph"),
    row("correlation_projection", "L256", "triton", 0.04, direction="forward"),
    row("correlation_projection", "L256", "eager-bf16", 0.15),
    row("correlation_projection", "L256", "eager-fp32", 0.4),
    row("correlation_projection", "L256", "plain", 0.5),
    row("masked_slot_attention", "L1024 semantic", "triton", 0.2),
    row("assignment", "L256", "triton", 0.01, direction="forward"),
    row("assignment", "L256", "scipy", 300.0, direction="forward"),
    row("sinkhorn", "L256", "eager-bf16", 3.0),
    {"op": "sinkhorn", "case": "L256", "provider": "plain", "error": "OutOfMemoryError: no room"},
]
CHECKED = {"op": "sinkhorn", "case": "small", "dtype": "float32", "forward": 1e-7}
CHECKED |= {"provider": "triton", "device": "cpu"}
COMPILED = {"op": "sinkhorn", "kernel": "rows", "arch": "sm_90", "registers": 128, "case": "L256"}
TRIED = {"kernel": "rows", "arch": "sm_90", "bits": 16, "size": 256, "options": {"BLOCK": 64}}
LOADED = {"case": "720p", "provider": "torch", "device": "cpu", "threads": 2, "median": 98.64}
SCALED = {"ranks": 2, "clips": 4, "median": 1500.0, "p20": 1400.0, "p80": 1600.0, "unit": "ms"}
SCALED |= {"clips_per_s": 2.5, "efficiency": 0.9, "communication_share": 0.08}
FOLDER: dict[str, list[dict[str, Any]]] = {
    "step": [
        {"kind": "settings", "case": "L256 B2", "precision": "bf16"},
        step("plain", 800.0),
        step("eager-bf16", 160.0, utilisation=0.25),
        step("compile", 1.0, error="RuntimeError: <none> & never"),
        phase("student", 600.0),
        phase("ema", 200.0),
        {"kind": "ablation", "case": "L256 B2", "provider": "plain", "change": "anomaly"}
        | {"median": 400.0, "worth": 2.0},
    ],
    "memory": [
        {"kind": "peak", "provider": "plain", "L": 256, "B": 2, "T": 4, "N": 16, "peak_mb": 1500.0},
        {"kind": "law", "provider": "plain", "law": "a + b·B", "coefficients": {"a": 2, "b": 0.5}}
        | {"worst_error": 0.07},
        *(
            {"kind": "limit", "provider": "plain", "memory_mb": memory, "L": length, "B": clips}
            | {"by": "law", "law_of": "cpu"}
            for memory, length, clips in (
                *((141000, 256, 9), (80000, 256, 5)),
                *((141000, 1024, 2), (80000, 1024, 1)),
            )
        ),
    ],
    "scaling": [
        SCALED
        | {"kind": "weak", "backend": "gloo", "bytes_per_rank": 88e6}
        | {"hidden_share": 0.25, "threads": 1},
        {
            **{"kind": "bytes", "phase": "encoder frozen", "ranks": 2},
            **{"gradient_mb": 4.0, "bytes_per_rank": 4e6},
        },
    ],
    "profile": [
        {"kind": "kernel", "name": "add<float>|x", "calls": 3, "total_ms": 412.3, "share": 0.412},
        {"kind": "gap", "median": 0.012, "unit": "ms", "total_ms": 88.0, "share": 0.088},
    ],
    "kernels": KERNELS,
    "parity": [CHECKED | {"of_tolerance": 0.1, "passed": True}],
    "static": [COMPILED | {"spill_bytes": 8, "shared_bytes": 4096, "over": ["spills 8 B of 0"]}],
    "tune": [TRIED | {"median": 1.5, "chosen": True}, TRIED | {"error": "too big"}],
    "data": [
        {"case": "settings", "view": [224, 224]},
        LOADED | {"kind": "rate", "p20": 96.6, "p80": 100.4, "unit": "clips/s"}
        | {"frames_per_s": 394.6, "cpu_ms_per_clip": 20.07, "bytes_per_frame": 141428},
        LOADED | {"kind": "ratio", "provider": "torch / pil", "median": 3.2, "target": 1.4},
        LOADED | {"kind": "wait", "median": 0.03},
    ],
    "quality": [
        run_of("plain", 0, 0.5),
        run_of("plain", 1, 0.7),
        run_of("triton", 0, 0.65),
        {"kind": "difference", "metric": "ari", "mean": 0.003, "low": -0.02, "high": 0.027}
        | {"n": 2, "a": "plain", "b": "triton"},
    ],
}  # fmt: skip
BLOCKS = {section.name: section.blocks for section in report.SECTIONS}


def tables_of(blocks: Sequence[Block]) -> list[Table]:
    return [block for block in blocks if isinstance(block, Table)]


def charts_of(blocks: Sequence[Block]) -> list[Chart]:
    return [block for block in blocks if isinstance(block, Chart)]


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"| {start}")]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    written = Report(folder / f"{name}.json")
    for one in rows:
        written.add(one)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A folder with a file of every kind."""
    for name, rows in FOLDER.items():
        write(tmp_path, name, rows)
    learned = {"commit": "c0ffee", "versions": {"torch": "2.13.0"}, "seeds": [0]}
    learned |= {"rows": {"trained": [{"ari": 0.5}, {"ari": 0.75}]}}
    (tmp_path / "learning.json").write_text(json.dumps(learned), encoding="utf-8")
    return tmp_path


def test_a_table_is_markdown_whatever_is_in_its_cells() -> None:
    table = Table(["a", "b"], [["x|y", "<!-- end -->"], ["two\nlines", ""]])
    assert table.markdown() == (
        "| a | b |\n|---|---|\n| x\\|y | \\<!-- end --> |\n| two lines |  |"
    )


def test_what_is_no_number_has_no_digits() -> None:
    assert [number(value) for value in (1, 0.12345, True, None, "2", [3])] == [
        *("1", "0.123", "", "", "", "")
    ]


def test_the_summary_compares_with_the_best_eager_form() -> None:
    text = tables.summary(KERNELS).markdown()
    (correlation,) = lines_of(text, "correlation_projection")
    assert "| 0.1 ms, 1.5x eager, 5.0x plain | not yet measured | not yet measured |" in correlation
    assert correlation.endswith("| 1.3 / 1 / 1x eager |")
    semantic, instance = lines_of(text, "masked_slot_attention")
    assert "| not yet measured | 0.2 ms | not yet measured | 3x eager |" in semantic
    assert instance.count(UNMEASURED) == 3
    assert "| 0.01 ms |" in lines_of(text, "assignment")[0]
    assert lines_of(text, "sinkhorn")[0].count(UNMEASURED) == 3


def test_without_rows_nothing_is_claimed() -> None:
    table = tables.summary([])
    assert all(line[1:4] == [UNMEASURED] * 3 for line in table.rows) and len(table.rows) == 8


def test_the_kernel_tables_show_all_times_and_all_failures() -> None:
    blocks = tables.kernel_blocks(KERNELS)
    assert "Measured ceilings: device copy 4300 GB/s." in blocks
    times, failed = tables_of(blocks)
    assert times.heads[3:7] == ["triton", "eager-bf16", "eager-fp32", "plain"]
    assert times.rows[0] == [
        *("correlation_projection", "L256", "both", "0.1 (0.08)", "0.15", "0.4", "0.5", ""),
        *("1.50x", "40 %"),
    ]
    assert failed.rows == [["sinkhorn L256 plain", "OutOfMemoryError: no room"]]


def test_step_tables() -> None:
    steps, phases, ablations, failed = tables_of(BLOCKS["step"](FOLDER["step"]))
    assert steps.heads == [
        *("case", "provider", "device", "ms a step (20 % – 80 %)", "clips/s", "times plain"),
        *("peak MB beyond what is held", "GFLOP", "of peak FLOP", "host syncs"),
    ]
    plain, eager, *missing = steps.rows
    assert plain[3:] == ["800 (640 – 1000)", "2.5", "1.00", "1234", "2,400", "", "3"]
    assert eager[3:] == ["160 (128 – 200)", "12.5", "5.00", "1234", "2,400", "25%", "3"]
    assert [line[:4] for line in missing] == [
        ["L256 B2", name, "cuda", UNMEASURED] for name in step_tables.ON_GPU
    ]
    assert phases.heads == ["phase", "L256 B2 plain, ms"]
    assert phases.rows == [["student", "600 (75%)"], ["ema", "200 (25%)"]]
    assert ablations.rows == [["L256 B2", "plain", "anomaly", "400", "2.00x"]]
    assert failed.rows == [["provider L256 B2 compile", "RuntimeError: <none> & never"]]


def test_a_measured_provider_is_not_missing() -> None:
    (table,) = step_tables.providers_tables([step("triton", 10.0, device="cuda")])
    assert [line[1] for line in table.rows] == ["triton", "triton+compile", "triton+graphs"]
    assert table.rows[0][3] == "10 (8 – 12.5)"


def test_memory_tables() -> None:
    laws, limits, peaks = tables_of(BLOCKS["memory"](FOLDER["memory"]))
    assert laws.rows == [["plain", "a + b·B", "a 2, b 0.5", "7%"]]
    assert limits.heads == ["most clips within 80 / 141 GB", "L = 256", "L = 1024", "found"]
    assert limits.rows == [
        ["plain", "5 / 9", "1 / 2", "extrapolated by the law of this CPU"],
    ]
    assert peaks.rows == [["plain", "256", "2", "4", "16", "1,500"]]


def test_quality_tables() -> None:
    means, differences, runs = tables_of(BLOCKS["quality"](FOLDER["quality"]))
    assert means.heads == ["provider", "seeds", "ari", "miou"]
    assert means.rows[0] == ["plain", "2", "0.600 (0.500 – 0.700)", "0.500 (0.500 – 0.500)"]
    assert means.rows[1][:2] == ["triton", "1"]
    assert differences.rows == [["ari", "plain", "triton", "+0.003", "-0.020 … +0.027", "2"]]
    assert runs.rows[1] == ["plain", "1", "0.700", "0.500"]


def test_other_tables() -> None:
    scaling, sent = tables_of(BLOCKS["scaling"](FOLDER["scaling"]))
    assert scaling.rows == [
        ["weak", "2", "4", "gloo", "1500 (1400 – 1600)", "2.5", "90%", "8%", "25%", "1", "88.0"]
    ]
    assert sent.rows == [["encoder frozen", "2", "4.00", "4.00"]]
    kernels, gaps = tables_of(BLOCKS["profile"](FOLDER["profile"]))
    assert kernels.rows == [["add<float>|x", "3", "412", "41.2%"]]
    assert gaps.rows == [["between kernels", "0.012 ms", "88", "8.8%"]]
    needs, over = tables_of(BLOCKS["static"](FOLDER["static"]))
    assert needs.rows == [["sinkhorn", "sm_90", "128", "8", "4096", ""]]
    assert over.rows == [["rows L256 sm_90", "spills 8 B of 0"]]
    assert BLOCKS["parity"](FOLDER["parity"])[0] == (
        "Checked: triton on cpu. On a CPU, triton runs in its interpreter."
    )
    (tuned,) = tables_of(BLOCKS["tune"](FOLDER["tune"]))
    assert tuned.rows[0] == ["rows", "sm_90", "16", "256", "BLOCK 64", "1.5", "chosen"]
    assert tuned.rows[1][5] == "too big"
    rates, ratios, waits = tables_of(BLOCKS["data"](FOLDER["data"]))
    assert rates.rows == [
        ["720p", "torch", "cpu", "2", "98.6 (96.6 – 100.4)", "395", "20.1", "141"]
    ]
    assert ratios.rows == [["720p", "torch / pil", "2", "3.20", "≥ 1.4"]]
    assert waits.rows == [["720p", "torch", "2", "3%"]]
    assert "Settings: view [224, 224]." in BLOCKS["data"](FOLDER["data"])


def test_seeds_stand_side_by_side() -> None:
    scored = dict.fromkeys(tables.SCORES, 0.5)
    table = tables.learning_table({"a": [scored, scored], "b": [scored, scored | {"ari": 0.25}]})
    assert table.rows[0][:3] == ["a", "0.50", "0.50"]
    assert table.rows[1][:3] == ["b", "0.50 / 0.25", "0.50"]


@pytest.mark.parametrize("name", FOLDER)
def test_rows_may_lack_anything(name: str) -> None:
    """Another version's files still become a page, even where a value is of another kind."""
    rows = FOLDER[name]
    for key in dict.fromkeys(key for row in rows for key in row):
        lacking = [{k: v for k, v in row.items() if k != key} for row in rows]
        emptied = [row | ({key: None} if key in row else {}) for row in rows]
        worded = [row | ({key: "none"} if key in row else {}) for row in rows]
        for changed in (lacking, emptied, worded):
            blocks = BLOCKS[name](changed)
            assert page.html("all", [page.Part(name, name, "", blocks)]).endswith("</html>\n")
            assert isinstance(markdown(blocks), str)
    assert isinstance(BLOCKS[name]([]), list)


def numbers(text: str, element: str, attribute: str) -> list[float]:
    return [
        float(found) for found in re.findall(rf'<{element}(?: [^>]*)? {attribute}="([\d.]+)', text)
    ]


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("a", 2.0, "2 ms", 1.0, 4.0), Bar("b", 1.0, "1 ms"), Bar("c", -1.0, "-1 ms")]
    text = svg(Chart("three", bars))
    # The range that ends at 4 is the longest thing.
    assert numbers(text, "rect", "width") == pytest.approx([LONGEST / 2, LONGEST / 4, 0.0])
    assert numbers(text, "line", "x1") == pytest.approx([LONGEST / 4])
    assert numbers(text, "line", "x2") == pytest.approx([LONGEST])
    assert numbers(text, 'text class="value"', "x") == pytest.approx([LONGEST, LONGEST / 4, 0.0])
    tops = numbers(text, "rect", "y")
    assert tops[1] - tops[0] == tops[2] - tops[1] > numbers(text, "rect", "height")[0]
    assert numbers(text, "svg", "height")[0] >= tops[2] + numbers(text, "rect", "height")[2]


def test_charts_show_what_the_tables_show() -> None:
    steps, phases = charts_of(BLOCKS["step"](FOLDER["step"]))
    assert [(bar.label, bar.value, bar.text) for bar in steps.bars] == [
        ("plain", 2.5, "2.5"),
        ("eager-bf16", 12.5, "12.5"),
    ]
    # A range of times turns into one of clips a second: 2.5 · 800 / 1000 and 2.5 · 800 / 640.
    assert (steps.bars[0].low, steps.bars[0].high) == pytest.approx((2.0, 3.125))
    assert [bar.text for bar in phases.bars] == ["600 (75%)", "200 (25%)"]
    first = charts_of(tables.kernel_blocks(KERNELS))[0]
    assert first.title == "correlation_projection L256, forward + backward, ms"
    assert [(bar.value, bar.colour) for bar in first.bars] == [
        *((0.1, "own"), (0.15, "eager"), (0.4, "eager"), (0.5, "other"))
    ]
    assert charts_of(tables.kernel_blocks(KERNELS))[3].title == "assignment L256, forward, ms"


class Read(HTMLParser):
    """Checks that what is opened is closed, and collects texts, ids and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_folder_becomes_one_page(cli: Callable[..., Any], full: Path) -> None:
    told = cli("bench", "report", full)
    assert told.code == 0 and str(full / "report.html") in told.out
    text = (full / "report.html").read_text(encoding="utf-8")
    seen = Read()
    seen.feed(text)
    seen.close()
    assert not seen.open
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not {"script", "link", "img", "iframe"} & set(seen.tags)
    names = [section.name for section in report.SECTIONS]
    assert seen.ids == names and seen.links == [f"#{name}" for name in names]
    assert "add<float>|x" in seen.texts and "<float>" not in text
    assert "RuntimeError: <none> & never" in seen.texts
    titles = [section.title for section in report.SECTIONS]
    assert [text for text in seen.texts if text in titles] == titles * 2  # contents, then heads
    for section in report.SECTIONS:
        assert section.command in seen.texts
    assert "c0ffee" in text and "prefers-color-scheme: dark" in text and "viewport" in text
    # The same cells stand on the screen, in markdown.
    assert BLOCKS["kernels"](KERNELS)[0].markdown() in told.out  # type: ignore[union-attr]
    assert "| add\\<float>\\|x | 3 | 412 | 41.2% |" in told.out


def test_where_the_numbers_are_from() -> None:
    cpu = {"cpu": "Xeon", "cores": 2, "threads": 1, "amx": True, "torch": "2.13", "gpu": None}
    made = {"environment": cpu | {"triton": "3.7", "python": "3.11"}, "commit": "a" * 40}
    assert report.machine(made) == (
        "Xeon, 2 cores, 1 threads, with AMX; torch 2.13, Triton 3.7, Python 3.11; commit "
        + "a" * 12
    )
    card = {"gpu": "H200", "driver": "570", "cuda": "12.8"}
    made = {"environment": cpu | card, "commit": "b" * 40 + "-dirty"}
    assert report.machine(made).startswith("H200, driver 570, CUDA 12.8; Xeon, 2 cores")
    assert report.machine(made).endswith("commit " + "b" * 12 + "-dirty")
    assert report.machine({"environment": {}, "commit": "unknown"}) == (
        "a machine that was not recorded; commit unknown"
    )


def test_what_is_missing_is_said(full: Path) -> None:
    (full / "tune.json").unlink()
    found = report.collect(full)
    shown = {part.name: part for part in report.parts(found)}
    assert UNMEASURED in shown["tune"].blocks
    assert shown["tune"].where == "`smtc bench tune --output build/bench` writes this."
    line = f"On a GPU: {UNMEASURED}."
    assert line in shown["data"].blocks and line in shown["step"].blocks
    assert line not in shown["static"].blocks and line not in shown["quality"].blocks
    found["data"]["environment"]["gpu"] = "H200"
    shown = {part.name: part for part in report.parts(found)}
    assert line not in shown["data"].blocks


def test_long_tables_are_folded_and_numbers_stand_right() -> None:
    cells = [
        ["720p", "2.20x", "1.0e-07", UNMEASURED if n else "3 (1 – 5)"]
        for n in range(page.FOLDED + 1)
    ]
    part = page.Part("a", "A", "", [Table(["case", "worth", "error", "ms"], cells)])
    text = page.html("all", [part])
    assert "<details><summary>All 26 rows</summary>" in text
    numbers = [f'<td class="number">{cell}</td>' for cell in ("2.20x", "1.0e-07", "3 (1 – 5)")]
    assert f"<td>720p</td>{''.join(numbers)}" in text
    assert f'<td class="number no">{UNMEASURED}</td>' in text
    few = page.Part("a", "A", "", [Table(["x"], [["y"]] * page.FOLDED)])
    assert "details" not in page.html("all", [few])


def test_without_a_folder_the_recorded_results_are_taken(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = cli("bench", "report", "--output", tmp_path / "page.html")
    assert told.code == 0 and [path.name for path in tmp_path.iterdir()] == ["page.html"]
    recorded = report.read(report.RESULTS / "parity.json")["rows"]
    assert parity.table(recorded).markdown() in told.out
    monkeypatch.setattr(report, "RESULTS", tmp_path / "none")
    assert "Name the folder" in cli("bench", "report").error


def test_what_is_no_result_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "holds none of step.json" in refused("bench", "report", tmp_path)
    (tmp_path / "learning.json").write_text('{"rows": [1]}', encoding="utf-8")
    assert "learning.json is no table of learning" in refused("bench", "report", tmp_path)
    (tmp_path / "learning.json").unlink()
    (tmp_path / "parity.json").write_text("{}", encoding="utf-8")
    assert "parity.json is no benchmark report" in refused("bench", "report", tmp_path)
    strange = {"environment": {}, "commit": "c", "rows": ["a"]}
    (tmp_path / "parity.json").write_text(json.dumps(strange), encoding="utf-8")
    assert "parity.json is no benchmark report" in refused("bench", "report", tmp_path)
    assert not (tmp_path / "report.html").exists()
