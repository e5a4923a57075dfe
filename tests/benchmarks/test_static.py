"""`bench static`: its rows and budgets, in processes where kernels are not interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smtc.benchmarks import static
from smtc.benchmarks.cases import OPERATIONS, SETTINGS
from smtc.benchmarks.harness import read_report
from smtc.benchmarks.static_budgets import (
    MOST_SHARED_BYTES,
    MOST_SPILL_BYTES,
    SHARED_BYTES,
    SPILLS,
    Budget,
)
from smtc.errors import UserError
from smtc.kernels.aot import ARCHITECTURES, KIB, Compiled, Product

SMALL = "instance_consistency"
COLUMNS = {
    "op", "kernel", "case", "arch", "pass", "launches", "configuration", "programs", "warps",
    "registers", "spill_bytes", "shared_bytes", "occupancy", "tensor_core_instructions",
    "tensor_core_kinds", "products", "narrow_loads", "bytes", "flops", "bytes_per_program",
    "flops_per_program", "roofline_us", "budget_spill_bytes", "budget_shared_bytes",
    "budget_tensor_core_kinds", "budget_reason", "over",
}  # fmt: skip


def bench(output: Path, before: str = "", arguments: str = "") -> subprocess.CompletedProcess[str]:
    """`static.run(output, arguments)` without the interpreter, after the statements `before`."""
    code = f"""
import sys
from pathlib import Path
from smtc.benchmarks import static, static_budgets
{before}
if __name__ == "__main__":
    sys.exit(static.run(Path(sys.argv[1]), {arguments}))
"""
    script = output.parent / "bench.py"
    script.write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(script), str(output)],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_operation_on_one_architecture(tmp_path: Path) -> None:
    done = bench(tmp_path / "out", arguments=f"[{SMALL!r}], ('sm_90',)")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_report(tmp_path / "out" / "static.json")["rows"]
    assert {row["op"] for row in rows} == {SMALL} and {row["arch"] for row in rows} == {"sm_90"}
    for positions in SETTINGS:
        assert any(row["case"] == f"L{positions} bf16" for row in rows)
    for row in rows:
        assert set(row) >= COLUMNS
        assert row["over"] == [] and row["registers"] > 0 and row["bytes"] > 0
        assert 0 < row["occupancy"] <= 1 and row["roofline_us"] > 0
        # Every product is on tensor cores, and the launch tells what the products cost.
        assert bool(row["products"]) == bool(row["tensor_core_instructions"]) == (row["flops"] > 0)
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    table = (tmp_path / "out" / "static.md").read_text(encoding="utf-8")
    assert table.strip() == done.stdout.strip()
    assert table.count(f"| {SMALL} |") == len(rows)
    assert f"{len(rows)} rows, 0 over their budget." in table


def test_a_kernel_over_its_budget_ends_with_1(tmp_path: Path) -> None:
    before = "static_budgets.SHARED_BYTES['sm_90'] = 1"
    before += "\nstatic._compiled = lambda sources: [static._outcome(one) for one in sources]"
    done = bench(tmp_path / "out", before, f"[{SMALL!r}], ('sm_90',)")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "static.json").read_text(encoding="utf-8"))["rows"]
    assert all(row["over"] == [f"shared {row['shared_bytes']} B of 1"] for row in rows)
    assert f"{len(rows)} over their budget" in done.stdout


def test_a_kernel_that_does_not_compile_ends_with_1(tmp_path: Path) -> None:
    before = "static._compiled = lambda sources: ['the reason'] * len(sources)"
    done = bench(tmp_path / "out", before, f"[{SMALL!r}], ('sm_90',)")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "static.json").read_text(encoding="utf-8"))["rows"]
    assert all(row["error"] == "the reason" for row in rows)
    assert "does not compile" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_kernel_is_within_its_budget(tmp_path: Path) -> None:
    done = bench(tmp_path / "out")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    rows = read_report(tmp_path / "out" / "static.json")["rows"]
    assert {(row["op"], row["arch"]) for row in rows} == {
        (op, name) for op in OPERATIONS for name in ARCHITECTURES
    }
    for row in rows:
        assert row["spill_bytes"] <= MOST_SPILL_BYTES
        assert row["shared_bytes"] <= MOST_SHARED_BYTES[row["arch"]]
        assert bool(row["products"]) == (row["flops"] > 0), row
    spilling = {
        (row["op"], row["kernel"], row["arch"], row["case"].split()[-1])
        for row in rows
        if row["spill_bytes"]
    }
    assert spilling == set(SPILLS), "a budget that no kernel needs"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_wider_features_fit_every_architecture(tmp_path: Path) -> None:
    """D 768, where the tiles were chosen for 384: slower perhaps, but it must start."""
    before = "import functools\nstatic.SETTINGS = (256, 256)"
    before += "\nstatic.at_size = functools.partial(static.at_size, width=768)"
    done = bench(tmp_path / "out", before)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    for row in read_report(tmp_path / "out" / "static.json")["rows"]:
        assert "error" not in row and row["occupancy"] > 0, row
        assert row["shared_bytes"] <= MOST_SHARED_BYTES[row["arch"]], row


def test_budgets_stay_below_the_ceilings_and_say_why() -> None:
    assert {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB} == MOST_SHARED_BYTES
    assert all(SHARED_BYTES[name] <= MOST_SHARED_BYTES[name] for name in ARCHITECTURES)
    assert MOST_SPILL_BYTES == 256
    for (op, _, architecture, dtype), (most, reason) in SPILLS.items():
        assert op in OPERATIONS and architecture in ARCHITECTURES and dtype in static.DTYPES
        assert 0 < most <= MOST_SPILL_BYTES and len(reason) > 20


def compiled(**changes: object) -> Compiled:
    values = {
        "registers": 100, "spill_bytes": 0, "shared_bytes": 1000, "warps": 8,
        "tensor_cores": {"HGMMA": 4}, "products": (Product(64, 64, 64, "bf16"),),
        "narrow_loads": 0, "programs_per_multiprocessor": 2,
    }  # fmt: skip
    return Compiled(**values | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"spill_bytes": 1}, ["spills 1 B of 0"]),
        ({"shared_bytes": 1001}, ["shared 1001 B of 1000"]),
        ({"programs_per_multiprocessor": 0}, ["no room on a multiprocessor"]),
        ({"tensor_cores": {}}, ["no HGMMA"]),
        ({"tensor_cores": {"HMMA": 4}}, ["no HGMMA", "HMMA where a faster kind is possible"]),
        (
            {"tensor_cores": {"HMMA": 4, "HGMMA": 4}},
            ["HMMA where a faster kind is possible"],
        ),
        ({"tensor_cores": {}, "products": (Product(16, 64, 64, "bf16"),)}, ["no HMMA"]),
        ({"tensor_cores": {}, "products": ()}, []),
        ({"products": (Product(64, 64, 32, "f32"),)}, []),
    ],
)
def test_what_is_over_the_budget_is_said(changes: dict, said: list[str]) -> None:
    found = compiled(**changes)
    wanted = static.wanted_tensor_cores(found, "sm_90")
    assert static.over(found, Budget(0, 1000), wanted) == said


@pytest.mark.parametrize(
    ("architecture", "rows", "operand", "warps", "kind"),
    [
        ("sm_80", 128, "bf16", 8, "HMMA"),
        ("sm_90", 64, "f16", 4, "HGMMA"),
        ("sm_90", 32, "bf16", 4, "HMMA"),
        ("sm_90", 64, "bf16", 2, "HMMA"),
        ("sm_90", 64, "f32", 4, "HMMA"),
        ("sm_100", 64, "bf16", 8, "UTCHMMA"),
        ("sm_100", 64, "bf16", 16, "HMMA"),
    ],
)
def test_the_fastest_instruction_follows_the_tile(
    architecture: str, rows: int, operand: str, warps: int, kind: str
) -> None:
    found = compiled(products=(Product(rows, 64, 64, operand),), warps=warps)
    assert static.wanted_tensor_cores(found, architecture) == {kind}


def test_bytes_count_every_tensor_once() -> None:
    x = torch.empty(4, 8, device="meta")
    assert static.unique_bytes([x, None, 3]) == 128
    assert static.unique_bytes([x, x, x.T]) == 128
    assert static.unique_bytes([x[:2], x[2:]]) == 128
    assert static.unique_bytes([x[:2], x[1:3]]) == 128, "at most the storage"
    assert static.unique_bytes([x[:1]]) == 32
    assert static.unique_bytes([x, torch.empty(4, 8, device="meta")]) == 256
    assert static.unique_bytes([x[:1].expand(100, 8)]) == 32
    assert static.unique_bytes([x[:0]]) == 0


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unset TRITON_INTERPRET"):
        static.run(tmp_path / "out")
    monkeypatch.setattr(static, "INTERPRETED", False)
    with pytest.raises(UserError, match="no operation 'nothing'"):
        static.run(tmp_path / "out", ["nothing"])
    with pytest.raises(UserError, match="no 'sm_70' here; there are sm_80, sm_90, sm_100"):
        static.run(tmp_path / "out", architectures=("sm_70",))
    assert not (tmp_path / "out").exists()
