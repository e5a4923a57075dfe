"""`smtc bench step`: what it measures, what it refuses, what it writes."""

import json
import math
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smtc import presets
from smtc.benchmarks import step, step_measures
from smtc.benchmarks.plain import FAULTS, RELIEFS
from smtc.benchmarks.step_ablations import ABLATIONS, Ablation
from smtc.benchmarks.step_measures import distance, first_losses, part_times, step_flops, syncs
from smtc.benchmarks.step_providers import (
    PROVIDERS,
    Case,
    Provider,
    Running,
    changed,
    pick_providers,
)
from smtc.errors import UserError
from smtc.pipelines.batch import Batch
from smtc.regions import region

SMALL = Case("tiny", positions=16, clips=1, frames=2, slots=3)
LOSSES = ("alignment", "regularisation", "instance")


@pytest.fixture(autouse=True)
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case has the smallest sizes, whatever was asked for."""
    monkeypatch.setattr(step, "Case", lambda preset, positions, clips: SMALL)
    monkeypatch.setattr(step, "PHASE_REPEATS", 1)


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = json.loads((folder / "step.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in found if row["kind"] == kind]


# Cases and providers.


def test_a_case_trains_everything_at_its_size() -> None:
    config = Case("fixed", positions=1500, clips=3).config({"train.precision": "bf16"})
    assert config.model.grid == (30, 50) and config.train.batch == 3
    assert config.train.precision == "bf16"
    assert config.optim.encoder_from_step == 0 == config.objective.instance_from_step
    batch = Case(positions=1024, clips=1).batch("cpu")
    assert batch.views.shape == (1, 2, 4, 3, 256, 256)
    assert Case(positions=1024).config().model.grid == (32, 32)
    assert Case(positions=400).config().model.grid == (20, 20)


def test_names_tell_cases_apart() -> None:
    assert Case("paper", 256, 8).name == "paper L256 B8"
    assert Case(frames=2, slots=8).name == "fixed L256 B2 T2 N8"


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="L = 257 is no size of a step"):
        Case(positions=257).config()


def test_settings_are_changed_by_dotted_names() -> None:
    config = changed(presets.tiny(), {"model.backbone.neck": 7, "train.steps": 3})
    assert config.model.backbone.neck == 7 and config.train.steps == 3
    assert config.model.slots == presets.tiny().model.slots


@pytest.mark.parametrize("name", ["plain", "eager-fp32", "eager-bf16"])
def test_all_providers_start_with_the_same_losses(name: str) -> None:
    batch = SMALL.batch("cpu")
    expected = first_losses(PROVIDERS["plain"].step(SMALL, "cpu"), batch)
    found = first_losses(PROVIDERS[name].step(SMALL, "cpu"), batch)
    assert all(math.isfinite(value) and value != 0 for value in expected.values())
    assert distance(found, expected) < step.FARTHEST["bf16" if "bf16" in name else "fp32"]


def test_providers_learn_alike() -> None:
    batch = SMALL.batch("cpu")
    pair = [PROVIDERS[name].step(SMALL, "cpu") for name in ("plain", "eager-fp32")]
    for _ in range(2):
        plain, ours = (first_losses(running, batch) for running in pair)
        assert distance(ours, plain) < 1e-4
        assert plain["alignment 1"] != plain["alignment 2"]


def test_each_loss_has_its_own_scale() -> None:
    expected = {"alignment 1": 100.0, "instance 1": 0.5, "regularisation 1": 0.01}
    assert distance(expected | {"alignment 1": 101.0}, expected) == pytest.approx(0.01)
    assert distance(expected | {"instance 1": 1.0}, expected) == pytest.approx(1.0)
    assert distance(expected | {"regularisation 1": 0.02}, expected) == pytest.approx(0.1)
    assert distance(expected | {"instance 1": math.nan}, expected) == math.inf


def test_triton_needs_a_gpu() -> None:
    assert [p.name for p in pick_providers((), "cpu")] == [
        *("plain", "eager-fp32", "eager-bf16", "compile")
    ]
    with pytest.raises(UserError, match=r"--providers triton\+graphs is timed on a CUDA device"):
        pick_providers(("triton+graphs",), "cpu")
    with pytest.raises(UserError, match="no provider 'apex'; there are plain, eager-fp32"):
        pick_providers(("apex",), "cpu")


def test_every_ablation_can_be_made() -> None:
    names = {name for group in ABLATIONS for name in group.changes}
    assert {f"fault {name}" for name in FAULTS if name != "frozen_backward"} <= names
    assert {f"relief {name}" for name in RELIEFS} <= names
    for group in ABLATIONS:
        for change in group.changes.values():
            provider = PROVIDERS[group.provider].with_changes(**change)
            assert provider.settings.items() >= PROVIDERS[group.provider].settings.items() or (
                set(change["settings"]) & set(PROVIDERS[group.provider].settings)
            )
            SMALL.config(provider.settings)


# What is measured.


def test_parts_of_a_step_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def wait(milliseconds: float) -> None:
        clock[0] += milliseconds

    def function() -> None:
        wait(1)
        with region("student"):
            wait(30)
            with region("backward"):
                wait(200)
            wait(4)
        wait(5)
        with region("student"):
            wait(1000)

    monkeypatch.setattr(step_measures._HostClock, "now", lambda self: clock[0])
    assert part_times(function, "cpu") == {"other": 6, "student": 1034, "backward": 200}


def test_every_part_of_our_step_is_seen() -> None:
    running, batch = PROVIDERS["eager-fp32"].step(SMALL, "cpu"), SMALL.batch("cpu")
    parts = part_times(lambda: running(batch), "cpu")
    assert parts.keys() >= {
        *("data", "student", "teacher", "alignment", "mask losses", "instance"),
        *("backward", "optimiser", "ema"),
    }
    literal = PROVIDERS["plain"].step(SMALL, "cpu")
    parts = part_times(lambda: literal(batch), "cpu")
    assert parts.keys() >= {*LOSSES[::2], "student", "teacher", "backward", "optimiser", "ema"}


def test_reads_of_the_host_are_counted_once() -> None:
    value = torch.tensor([3.0])

    def function() -> None:
        float(value)  # reads through another reader
        value.tolist()
        if value > 0:
            value.add(1)

    before = {name: getattr(Tensor, name) for name in ("item", "__float__", "tolist")}
    assert syncs(function, "cpu") == 3
    assert before == {name: getattr(Tensor, name) for name in before}


def test_our_step_reads_nothing_and_the_literal_one_much() -> None:
    batch = SMALL.batch("cpu")
    ours = PROVIDERS["eager-bf16"].step(SMALL, "cpu")
    literal = PROVIDERS["plain"].step(SMALL, "cpu")
    assert syncs(lambda: ours(batch), "cpu") == 0
    # At least both costs of each pair of frames.
    assert syncs(lambda: literal(batch), "cpu") >= SMALL.frames**2


def test_flops_are_those_of_the_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(8, 4, bias=False)

    def update(batch: Batch, number: int) -> dict[str, Tensor]:
        loss = layer(torch.ones(10, 8)).sum()
        loss.backward()
        return {"loss": loss}

    class Known:
        def step(self, case: Case, device: str) -> Running:
            assert case.clips == 1
            return Running(update, layer.parameters())

    monkeypatch.setitem(PROVIDERS, "eager-fp32", Known())
    # Forward and the gradient of the weights; the input asks for none. Two clips need twice that.
    case = Case("tiny", positions=16, clips=2, frames=2, slots=3)
    assert step_flops(case) == 2 * (2 * 2 * 10 * 8 * 4)


def test_attention_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step_flops(SMALL)
    monkeypatch.setattr(step_measures, "sdpa_kernel", lambda _: nullcontext())
    products = 2 * (2 * 17**2 * 64)  # of a frame in a block: 16 tokens and CLS, width 64
    passes = 3 + 1  # the student's forward and backward, the teacher's forward
    blocks, frames = 2, SMALL.frames  # the third block gives its keys only
    assert whole - step_flops(SMALL) == products * passes * blocks * frames


def test_gradients_are_forgotten_on_request() -> None:
    running, batch = PROVIDERS["plain"].step(SMALL, "cpu"), SMALL.batch("cpu")
    running(batch)
    assert any(parameter.grad is not None for parameter in running._trained)
    running.forget_gradients()
    assert all(parameter.grad is None for parameter in running._trained)


def test_recorded_steps_are_timed_last_beside_the_literal_one() -> None:
    def groups(*names: str) -> list[list[str]]:
        running = {name: Running(lambda batch, number: {}, []) for name in names}
        return step._groups({name: PROVIDERS[name] for name in names}, running)

    assert groups("plain", "triton", "triton+graphs") == [
        *(["plain", "triton"], ["plain", "triton+graphs"])
    ]
    assert groups("triton", "triton+graphs") == [["triton"], ["triton+graphs"]]
    assert groups("plain", "compile") == [["plain", "compile"]]
    assert groups() == []


# The command.


def test_the_report_of_two_providers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    chosen = ("plain", "eager-fp32")
    assert step.run(tmp_path, providers=chosen, clips=(1,), seconds=0.01, device="cpu") == 0
    plain, ours = rows(tmp_path, "provider")
    assert [plain["provider"], ours["provider"]] == list(chosen)
    assert plain["speedup"] == 1.0
    for row in (plain, ours):
        assert row["case"] == SMALL.name and row["unit"] == "ms" and row["repeats"] >= 5
        assert row["clips_per_s"] == pytest.approx(1000 / row["median"], rel=1e-3)
        assert row["p20"] <= row["median"] <= row["p80"]
        assert row["flops"] == plain["flops"] > 0 and row["utilisation"] > 0
        assert row["peak_mb"] > 0 and row["device"] == "cpu"
    assert ours["syncs"] == 0 < plain["syncs"]
    assert ours["speedup_p20"] <= ours["speedup"] <= ours["speedup_p80"]
    assert {row["provider"] for row in rows(tmp_path, "phase")} == set(chosen)
    said = capsys.readouterr().out
    assert "not yet measured" in said and SMALL.name in said


def _wrong(case: Case, device: str) -> Running:
    found = {name: torch.tensor(float(k)) for k, name in enumerate(LOSSES)}
    return Running(lambda batch, number: found, [])


def _failing(case: Case, device: str) -> Running:
    raise torch.OutOfMemoryError("no room\nfor more")


@pytest.mark.parametrize(
    ("made", "code", "told"),
    [(_wrong, 1, r"not timed: its first losses are .* from"), (_failing, 0, "Out.*: no room$")],
)
def test_what_is_wrong_or_fails_is_not_timed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: Callable[[Case, str], Running],
    code: int,
    told: str,
) -> None:
    class Bad(Provider):
        def step(self, case: Case, device: str) -> Running:
            return made(case, device)

    monkeypatch.setitem(PROVIDERS, "eager-fp32", Bad("eager-fp32"))
    monkeypatch.setattr(step, "step_flops", lambda *_: 1.0)
    chosen = ("plain", "eager-fp32")
    assert step.run(tmp_path, providers=chosen, seconds=0.01, device="cpu") == code
    bad, plain = rows(tmp_path, "provider")
    assert "median" in plain and "median" not in bad
    assert re.search(told, bad["error"])


def test_what_fails_after_it_was_timed_costs_its_own_row_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([torch.OutOfMemoryError("no room"), 5.0])

    def peak(function: Callable[[], object], device: str) -> float:
        found = next(peaks)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(step, "peak_memory", peak)
    chosen = ("plain", "eager-fp32")
    assert step.run(tmp_path, providers=chosen, seconds=0.01, device="cpu") == 0
    plain, ours = rows(tmp_path, "provider")
    assert "no room" in plain["error"] and "median" not in plain
    assert ours["peak_mb"] == 5.0 and ours["speedup"] > 0


def test_what_a_change_is_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Ablation(
        "eager-fp32",
        {"frozen encoder": {"settings": {"optim.encoder_from_step": -1}}},
        sizes=(SMALL.positions,),
    )
    elsewhere = Ablation("eager-fp32", {}, device="cuda", sizes=(SMALL.positions,))
    other_size = Ablation("eager-fp32", {}, sizes=(SMALL.positions + 1,))
    monkeypatch.setattr(step, "ABLATIONS", (group, elsewhere, other_size))
    times = {
        "eager-fp32": [1.0, 2.0, 3.0],
        "none": [10.0, 20.0, 60.0],
        "frozen encoder": [5.0, 5.0, 10.0],
    }

    def timed(calls: dict[str, Any], device: str, *, seconds: float) -> dict[str, list[float]]:
        return {name: times[name] for name in calls}

    monkeypatch.setattr(step, "interleaved_times", timed)
    chosen = ("eager-fp32",)
    step.run(tmp_path, providers=chosen, ablation=True, device="cpu")
    none, frozen = rows(tmp_path, "ablation")
    assert (none["change"], none["worth"], none["median"]) == ("none", 1.0, 20.0)
    assert (frozen["change"], frozen["worth"], frozen["median"]) == ("frozen encoder", 4.0, 5.0)
    assert frozen["peak_mb"] < none["peak_mb"]


def test_no_case_is_begun_too_late(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert step.run(tmp_path, device="cpu", deadline=time.monotonic() - 1) == 0
    assert "1 of 1 jobs left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"preset": "tiny_encoder"}, "tiny_encoder trains no SMTC"),
        ({"preset": "tinny"}, "did you mean 'tiny'"),
        ({"clips": (0,)}, "--clips are numbers of at least 1"),
        ({"seconds": 0.0}, "--seconds is a positive number"),
        ({"seconds": math.nan}, "--seconds is a positive number"),
        ({"seconds": math.inf}, "--seconds is a positive number"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        step.run(tmp_path / "new", device="cpu", **settings)
    assert not (tmp_path / "new").exists()
