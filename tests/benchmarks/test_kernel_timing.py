"""`smtc bench kernels`: the rows, their order, and that nothing wrong is timed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smtc.benchmarks import kernels, providers
from smtc.benchmarks.cases import OPERATIONS, SETTINGS, at_size
from smtc.benchmarks.harness import read_report
from smtc.errors import UserError
from smtc.kernels import eager, reference

QUICK = ("--device", "cpu", "--sizes", 16, "--seconds", 0.005)
EAGER = ("eager-bf16", "eager-fp32")


def timed(cli: Callable[..., Any], output: Path, op: str, *names: str) -> Any:
    """`bench kernels` of one operation by providers, and its rows."""
    more = ["--providers", *names] if names else []
    told = cli("bench", "kernels", *QUICK, "--ops", op, *more, "--output", output)
    rows = read_report(output / "kernels.json")["rows"]
    return told, [row for row in rows if "op" in row], [row for row in rows if "op" not in row]


def test_all_directions_of_all_providers_are_timed(cli: Callable[..., Any], tmp_path: Path) -> None:
    told, rows, ceilings = timed(cli, tmp_path, "correlation_projection", *EAGER, "plain")
    assert told.code == 0, told
    assert {row["unit"] for row in ceilings} == {"GB/s", "TFLOP/s"}
    assert [(row["provider"], row["direction"]) for row in rows] == [
        (provider, direction)
        for tier in (EAGER[:1], EAGER[1:], ("plain",))
        for direction in ("forward", "backward", "both")
        for provider in tier
    ]
    for row in rows:
        assert row["case"] == "L16" and row["clips"] == 1 and row["mode"] == "launch"
        assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["unit"] == "ms"
        assert row["peak_mb"] >= 0 and row["percent_of_roofline"] > 0
    assert "| correlation_projection | L16 | both |" in told.out


def test_peers_solve_the_same_problem(cli: Callable[..., Any], tmp_path: Path) -> None:
    told, rows, _ = timed(cli, tmp_path, "assignment", "eager-fp32", "scipy")
    assert told.code == 0 and [row["provider"] for row in rows] == ["eager-fp32", "scipy"]
    assert all(row["direction"] == "forward" and "error" not in row for row in rows)
    if providers._unavailable(providers.PROVIDERS["pot"], "cpu") is None:
        _, rows, _ = timed(cli, tmp_path, "sinkhorn", "pot")
        assert [row["provider"] for row in rows] == ["pot"] and "error" not in rows[0]


def test_without_names_all_that_can_run_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [provider.name for provider in providers.pick_providers((), "cpu")]
    assert names[:4] == [*EAGER, "compile", "plain"] and "triton" not in names
    assert "scipy" in names
    missing = dataclasses.replace(providers.PROVIDERS["pot"], needs="no_such_package")
    monkeypatch.setitem(providers.PROVIDERS, "pot", missing)
    assert "pot" not in [provider.name for provider in providers.pick_providers((), "cpu")]
    with pytest.raises(UserError, match="no_such_package"):
        providers.pick_providers(("pot",), "cpu")


def test_a_wrong_implementation_is_not_timed(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = eager.mask_losses
    monkeypatch.setattr(
        eager, "mask_losses", lambda *a, **s: tuple(1.1 * loss for loss in right(*a, **s))
    )
    told, rows, _ = timed(cli, tmp_path, "mask_losses", *EAGER)
    assert told.code == 1 and [row["provider"] for row in rows] == list(EAGER)
    for row in rows:
        assert row["error"].startswith("not timed: parity of ") and "median" not in row
        assert f"{row['provider']} | {row['error']} |" in told.out


def test_a_result_that_is_wrong_at_the_timed_size_only_is_not_timed(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reference.sinkhorn

    def wrong(cost: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        plan = right(cost, *arguments, **settings)
        return plan.roll(1, 1) if cost.shape[1:] == (16, 16) else plan

    monkeypatch.setattr(reference, "sinkhorn", wrong)
    told, rows, _ = timed(cli, tmp_path, "sinkhorn", "eager-fp32", "plain")
    assert told.code == 1
    assert [row["provider"] for row in rows] == ["eager-fp32"] * 3 + ["plain"]
    assert "from eager in fp32 at this size" in rows[-1]["error"]


def test_a_provider_that_fails_leaves_a_row_and_the_others(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(cost: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    full = dataclasses.replace(providers.PROVIDERS["scipy"], function=lambda case: out_of_memory)
    monkeypatch.setitem(providers.PROVIDERS, "scipy", full)
    told, rows, _ = timed(cli, tmp_path, "assignment", "scipy", "plain")
    assert told.code == 0
    assert {row["provider"]: row.get("error") for row in rows} == {
        "plain": None,
        "scipy": "OutOfMemoryError: CUDA out of memory.",
    }


def test_the_most_important_rows_come_first() -> None:
    jobs = kernels.plan(OPERATIONS, SETTINGS, list(providers.PROVIDERS.values()))
    assert [(job.op, job.positions) for job in jobs[:3]] == [
        ("correlation_projection", 256),
        ("transport_alignment", 256),
        ("masked_slot_attention", 256),
    ]
    for job in jobs[: 3 * len(OPERATIONS)]:
        assert [provider.name for provider in job.providers] == ["triton", "eager-bf16"]
    assert {(job.op, job.positions) for job in jobs} == {
        (op, size) for op in OPERATIONS for size in SETTINGS
    }
    for peer, op in (("scipy", "assignment"), ("pot", "sinkhorn")):
        with_peer = {j.op for j in jobs if peer in [provider.name for provider in j.providers]}
        assert with_peer == {op}


@pytest.mark.parametrize(
    ("op", "flops", "megabytes"),
    [
        # Worked out by hand; query and reference of the correlation are one tensor.
        ("correlation_projection", (12.9e9, 77e9, 113e9), (51, 202, 296)),
        ("transport_alignment", (9.7e9, 155e9, 332e9), (29, 117, 172)),
        ("instance_consistency", (0.1e9,) * 3, (13,) * 3),
    ],
)
def test_the_floors_are_those_worked_out_by_hand(
    op: str, flops: tuple[float, ...], megabytes: tuple[float, ...]
) -> None:
    for positions, arithmetic, moved in zip(SETTINGS, flops, megabytes, strict=True):
        (case,) = at_size(op, positions, "meta", torch.bfloat16)
        inputs = case.inputs()
        assert kernels.matrix_flops(op, inputs) == pytest.approx(arithmetic, rel=0.03)
        like = {"correlation_projection": inputs[0], "transport_alignment": inputs[1]}
        output = [torch.empty_like(like[op])] if op in like else []
        found = kernels._bytes([*inputs, *output]) / 1e6
        assert found == pytest.approx(moved, rel=0.04)


def test_mistakes_end_in_a_sentence(refused: Callable[..., str], tmp_path: Path) -> None:
    start = ("bench", "kernels", "--device", "cpu", "--output", tmp_path / "out")
    assert "CUDA device" in refused(*start, "--providers", "triton")
    assert "no provider 'cublas'" in refused(*start, "--providers", "cublas")
    assert "computes any" in refused(*start, "--providers", "scipy", "--ops", "sinkhorn")
    assert "at least 1" in refused(*start, "--sizes", 0)
    assert "no operation" in refused(*start, "--ops", "sort")
    assert not (tmp_path / "out").exists()


def test_a_deadline_leaves_what_was_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.run(tmp_path, device="cpu", providers=["plain"], deadline=0.0) == 0
    assert "Out of time: 14 of 14 jobs left" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_and_plain_forms_of_everything_agree(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    told = cli("bench", "kernels", *QUICK, "--output", tmp_path)
    assert told.code == 0 and "error" not in told.out
    rows = read_report(tmp_path / "kernels.json")["rows"]
    assert {row["op"] for row in rows if row.get("provider") == "compile"} == set(OPERATIONS)
