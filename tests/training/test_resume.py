"""Runs that stop and start again, and phases in which other parameters learn."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import (
    Line,
    StoppedError,
    TinyConfig,
    assert_same,
    interrupt,
    moments,
    same,
    weights,
    with_output,
)

from smtc.method import SMTCMethod
from smtc.training.checkpoint import latest_checkpoint
from smtc.training.trainer import Run, Trainer, train

# Stopping and starting again.

STRAIGHT = {"train__steps": 5, "train__checkpoint_every": 1, "optim__encoder_from_step": 3}


@pytest.fixture(scope="module")
def straight(
    tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """A function: preset to a run of five steps without a stop; SMTC's encoder unfreezes at 3."""
    runs: dict[str, Run] = {}

    def run(preset: str) -> Run:
        if preset not in runs:
            folder = tmp_path_factory.mktemp("straight") / preset
            runs[preset] = train(with_output(tiny_config, folder, **settings(preset)))
        return runs[preset]

    return run


def settings(preset: str) -> dict[str, Any]:
    """SMTC with all that is random: stochastic depth, references, flips, live instances."""
    if preset == "tiny_encoder":
        return {"preset": preset, "train__steps": 5, "train__checkpoint_every": 1}
    live = {"objective__instance_from_step": 0, "objective__area": 0.0, "objective__similarity": -1}
    return STRAIGHT | live | {"model__backbone__drop_path": 0.5, "data__augment__flip": 0.5}


@pytest.mark.parametrize(
    ("preset", "stop", "workers"),
    [
        ("tiny", 2, 0),
        ("tiny", 3, 0),
        ("tiny", 4, 0),
        ("tiny", 3, 1),
        ("tiny_encoder", 2, 0),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    straight: Callable[[str], Run],
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    stop: int,
    workers: int,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, stop)
        train(with_output(tiny_config, tmp_path / "run", **settings(preset)))
    state = latest_checkpoint(tmp_path / "run")
    assert state is not None and state["step"] == stop
    torch.manual_seed(987)
    again = {"data__workers": workers}
    resumed = train(with_output(tiny_config, tmp_path / "run", **settings(preset), **again))
    assert_same(straight(preset), resumed)


def test_the_teacher_resumes_too(straight: Callable[[str], Run]) -> None:
    """So that the comparison above is known to hold a teacher that has moved by itself."""
    method = straight("tiny").method
    student, teacher = weights(method, "student."), weights(method, "teacher.model.")
    renamed = {name.replace("teacher.model.", "student."): v for name, v in teacher.items()}
    assert renamed.keys() == student.keys()
    assert not same(student, renamed)


def test_steps_after_the_last_checkpoint_are_done_again(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rhythm = {"train__steps": 6, "train__checkpoint_every": 2}
    expected = train(with_output(tiny_config, tmp_path / "straight", **rhythm), method=Line())
    config = with_output(tiny_config, tmp_path / "run", **rhythm)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, 3)
        train(config, method=Line())
    method = Line()
    assert_same(expected, train(config, method=method))
    assert method.seen[0] == [4, 5]


def test_a_finished_run_started_again_does_nothing(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(tiny_config, tmp_path / "run")
    first = train(config)
    weights_file = first.model_folder / "model.safetensors"
    before = weights_file.read_bytes()
    again = train(config)
    assert_same(first, again)
    assert weights_file.read_bytes() == before
    assert len(again.metrics) == 4


def test_no_steps_write_the_initial_model(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = with_output(tiny_config, tmp_path / "run", train__steps=0)
    method = Line()
    before = weights(method, "")
    run = train(config, method=method)
    assert (method.seen, run.metrics) == ([], [])
    assert same(before, torch.load(run.model_folder / "line.pt"))
    train(config, method=Line())


# Phases.


def record(monkeypatch: pytest.MonkeyPatch, part: str) -> list[dict[str, Tensor]]:
    """Fills with the weights under `part` as they are after each step."""
    seen: list[dict[str, Tensor]] = []
    whole = Trainer._step

    def step(self: Trainer, *arguments: Any) -> None:
        whole(self, *arguments)
        seen.append(weights(self.method, part))

    monkeypatch.setattr(Trainer, "_step", step)
    return seen


def test_the_frozen_encoder_moves_only_from_its_step(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = record(monkeypatch, "student.encoder.")
    config = with_output(tiny_config, tmp_path / "run", optim__encoder_from_step=2)
    method = SMTCMethod(config)
    start = weights(method, "student.encoder.")
    train(config, method=method)
    assert same(start, seen[0]) and same(start, seen[1])
    assert not same(start, seen[2]) and not same(seen[2], seen[3])


def test_a_phase_change_is_told_once_and_marks_what_is_trained(
    tiny_config: TinyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_output(tiny_config, tmp_path / "run")
    method = Line(encoder_from=2)
    with caplog.at_level(logging.INFO, logger="smtc"):
        train(config, method=method)
    told = [r.message for r in caplog.records if "are trained from here" in r.message]
    assert told == ["Step 2: 4 tensors are trained from here."]
    marked = {name for name, p in method.named_parameters() if p.requires_grad}
    assert marked == {"encoder.weight", "encoder.bias", "head.weight", "head.bias"}


def test_what_is_frozen_gets_no_gradient(tiny_config: TinyConfig, tmp_path: Path) -> None:
    method = Line(encoder_from=99)
    train(with_output(tiny_config, tmp_path / "run"), method=method)
    assert method.encoder.weight.grad is None
    assert not method.encoder.weight.requires_grad
    assert method.head.weight.grad is not None


def test_a_phase_change_keeps_the_heads_moments(tiny_config: TinyConfig, tmp_path: Path) -> None:
    run = train(with_output(tiny_config, tmp_path / "run"), method=Line(encoder_from=3))
    counts = {name: float(state["step"]) for name, state in moments(run).items()}
    assert counts == {
        "encoder.weight": 1.0,
        "encoder.bias": 1.0,
        "head.weight": 4.0,
        "head.bias": 4.0,
    }


def test_a_frozen_backward_warms_moments_and_moves_nothing(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_output(
        tiny_config,
        tmp_path / "run",
        optim__encoder_from_step=3,
        optim__frozen_backward=True,
        train__steps=3,
    )
    method = SMTCMethod(config)
    start = weights(method, "student.encoder.")
    run = train(config, method=method)
    assert same(start, weights(method, "student.encoder."))
    warmed = {n: s for n, s in moments(run).items() if n.startswith("encoder.")}
    assert warmed.keys() == {n for n in method.trainable(0) if n.startswith("encoder.")} != set()
    assert all(float(state["step"]) == 3.0 for state in warmed.values())
    assert all(state["exp_avg_sq"].sum() > 0 for state in warmed.values())


def test_smtcs_encoder_starts_its_moments_when_it_unfreezes(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    run = train(with_output(tiny_config, tmp_path / "run", optim__encoder_from_step=3))
    counts = {name: float(state["step"]) for name, state in moments(run).items()}
    assert set(counts.values()) == {1.0, 4.0}
    assert all((count == 1.0) == name.startswith("encoder.") for name, count in counts.items())


def test_a_frozen_phase_leaves_no_moments_of_the_encoder(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    run = train(with_output(tiny_config, tmp_path / "run", optim__encoder_from_step=-1))
    assert moments(run)
    assert not any(name.startswith("encoder.") for name in moments(run))
