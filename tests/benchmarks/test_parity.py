"""`smtc bench parity` as a user calls it: right numbers pass, wrong ones are told."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smtc.benchmarks import parity
from smtc.benchmarks.cases import parity_cases
from smtc.benchmarks.harness import read_report
from smtc.kernels import eager

COLUMNS = {"op", "case", "dtype", "provider", "device", "forward", "gradient", "of_tolerance"}


def test_eager_passes(cli: Callable[..., Any], tmp_path: Path) -> None:
    ops = ("--ops", "correlation_projection", "transport_alignment", "assignment")
    told = cli("bench", "parity", "--impl", "eager", *ops, "--device", "cpu", "--output", tmp_path)
    assert told.code == 0, told
    rows = read_report(tmp_path / "parity.json")["rows"]
    assert all(row["passed"] and set(row) >= COLUMNS for row in rows)
    for op in {row["op"] for row in rows}:
        dtypes = {row["dtype"] for row in rows if row["op"] == op}
        assert dtypes == {"float32", "bfloat16", "float16"}
        assert sum(row["op"] == op for row in rows) == 3 * len(parity_cases(op))
        assert f"| {op} | bfloat16 |" in told.out
    assert f"{len(rows)} of {len(rows)} cases passed" in told.out


def test_the_kernels_pass_in_the_interpreter(cli: Callable[..., Any], tmp_path: Path) -> None:
    said = cli("bench", "parity", "--ops", "assignment", "--device", "cpu", "--output", tmp_path)
    assert said.code == 0 and "Checking --impl triton." in said.out
    rows = read_report(tmp_path / "parity.json")["rows"]
    assert {row["provider"] for row in rows} == {"triton"}
    assert all(row["eager_forward"] >= 0 for row in rows)


def run_one(cli: Callable[..., Any], output: Path, op: str) -> Any:
    return cli("bench", "parity", "--impl", "eager", "--ops", op, "--output", output)


def test_a_wrong_result_is_a_miss(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = eager.assignment
    monkeypatch.setattr(eager, "assignment", lambda cost: right(cost).roll(1, -1))
    told = run_one(cli, tmp_path, "assignment")
    assert told.code == 1 and "MISS assignment float32 P 2" in told.out
    rows = read_report(tmp_path / "parity.json")["rows"]
    assert [row["passed"] for row in rows if row["case"] == "P 1"] == [True] * 3
    assert not any(row["passed"] for row in rows if row["case"] != "P 1")


@pytest.mark.parametrize("fault", ["gradient", "nan", "shape", "failure"])
def test_every_kind_of_fault_is_a_miss(
    fault: str, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = eager.correlation_projection

    def wrong(query: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        out = right(query, *arguments, **settings)
        if fault == "gradient":
            return out + 0.1 * (query.sum() - query.detach().sum())
        if fault == "nan":
            return torch.where(torch.arange(out.numel()).view(out.shape) == 0, torch.nan, out)
        if fault == "shape":
            return out[:, :-1]
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(eager, "correlation_projection", wrong)
    told = run_one(cli, tmp_path, "correlation_projection")
    assert told.code == 1 and "MISS correlation_projection float32" in told.out
    said = {"gradient": "times its tolerance", "nan": "infinitely", "shape": "shape ["}
    assert said.get(fault, "RuntimeError: no such luck\n") in told.out


def test_memory_that_was_not_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = parity_cases("mask_losses")[0]
    monkeypatch.setattr(eager, "mask_losses", lambda logits, *_, **__: (torch.empty(()),) * 2)
    row = parity.check(case, "float32", "eager", "cpu")
    assert not row["passed"] and row["forward"] is not None and row["forward"] == float("inf")


def test_the_kernels_need_a_gpu_or_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "smtc", "bench", "parity", "--impl", "triton"]
    command += ["--device", "cpu", "--output", str(tmp_path / "out")]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (sentence,) = done.stderr.strip().splitlines()
    assert "TRITON_INTERPRET=1" in sentence and "--impl eager" in sentence
    assert not (tmp_path / "out").exists()


def test_mistakes_end_in_a_sentence(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no operation 'sort'" in refused(
        "bench", "parity", "--ops", "sort", "--output", tmp_path
    )
    assert "--output" in refused("bench", "parity")
    (tmp_path / "parity.json").write_text("mine", encoding="utf-8")
    said = refused("bench", "parity", "--impl", "eager", "--output", tmp_path)
    assert "parity.json is no benchmark report" in said
    assert (tmp_path / "parity.json").read_text(encoding="utf-8") == "mine"


def test_a_deadline_leaves_what_was_checked(tmp_path: Path) -> None:
    assert parity.run(tmp_path, impl="eager", device="cpu", deadline=0.0) == 1
    assert read_report(tmp_path / "parity.json")["rows"] == []
