"""Gradients that are not finite never reach the weights; collapse is told once."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy import Line, TinyConfig, assert_same, moments, weights, with_output

from smtc.config import ObjectiveConfig
from smtc.errors import UserError
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.training.trainer import train
from smtc.training.watches import CollapseWatch
from smtc.warm_start import WarmStart


class Poisoned(Line):
    """The gradient of some steps holds a NaN or an infinity; everything else is as in `Line`."""

    def __init__(self, steps: tuple[int, ...], value: float = float("nan")) -> None:
        super().__init__()
        self.steps, self.value = steps, value

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        found = super().training_step(batch, step)
        if step in self.steps:
            found["loss"] = found["loss"] * self.value
        return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_gradient_changes_nothing(
    tiny_config: TinyConfig, tmp_path: Path, value: float, clip: float | None
) -> None:
    """Weights and moments after the last step, a bad one, are those before it."""
    settings = {"optim__clip_norm": clip, "train__nonfinite": "skip", "optim__schedule": "cosine"}
    config = with_output(tiny_config, tmp_path / "a", train__steps=3, **settings)
    seen: list[dict[str, Tensor]] = []

    class Watched(Poisoned):
        def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
            seen.append(weights(self, ""))
            return super().training_step(batch, step)

    run = train(config, method=Watched((2,), value))
    for name, before in seen[-1].items():
        after = run.method.state_dict()[name]
        # The toy's slow copy follows by itself; SMTC's teacher is tested below.
        if not name.startswith("slow"):
            assert torch.equal(before, after), name
    steps = {float(state["step"]) for state in moments(run).values()}
    assert steps == {2.0}
    assert [line["skipped"] for line in run.metrics] == [0, 0, 1]


def test_the_run_goes_on_after_a_bad_step(
    tiny_config: TinyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_output(
        tiny_config,
        tmp_path / "run",
        train__steps=9,
        train__log_every=3,
        train__nonfinite="skip",
    )
    with caplog.at_level(logging.WARNING, "smtc"):
        run = train(config, method=Poisoned((1, 2, 4)))
    assert all(value.isfinite().all() for value in run.method.state_dict().values())
    said = [line for line in caplog.messages if "not finite" in line]
    assert len(said) == 2
    assert said[0].startswith("The gradient of step 1 was not finite (clips: 0000")
    assert said[0].endswith("2 steps were left out since the last log.")
    assert said[1].startswith("The gradient of step 4 ")


def test_the_run_stops_and_names_step_files_and_checkpoint(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = with_output(tiny_config, tmp_path / "run", train__steps=9, train__checkpoint_every=2)
    with pytest.raises(UserError) as refusal:
        train(config, method=Poisoned((5,)))
    told = str(refusal.value)
    assert "gradient of step 5 " in told
    assert told.count(" from frame ") == 2
    assert str(tmp_path / "run" / "checkpoints" / "step_00000004") in told
    assert "--train.nonfinite skip" in told
    config = with_output(
        tiny_config,
        tmp_path / "run",
        train__steps=9,
        train__checkpoint_every=2,
        train__nonfinite="skip",
    )
    assert train(config, method=Poisoned((5,))).metrics[-1]["step"] == 9


def test_smtcs_teacher_skips_the_step_too(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SMTCMethod.training_step

    def poisoned(self: SMTCMethod, batch: Batch, step: int) -> dict[str, Tensor]:
        found = whole(self, batch, step)
        return found | {"loss": found["loss"] * (float("nan") if step == 1 else 1)}

    monkeypatch.setattr(SMTCMethod, "training_step", poisoned)
    settings = {"train__nonfinite": "skip", "optim__schedule": "cosine", "optim__final_lr": 1.0}
    two = train(with_output(tiny_config, tmp_path / "two", train__steps=2, **settings))
    one = train(with_output(tiny_config, tmp_path / "one", train__steps=1, **settings))
    for name, value in one.method.state_dict().items():
        assert torch.equal(value, two.method.state_dict()[name]), name


def test_batch_statistics_skip_the_step_too(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WarmStart.training_step

    def poisoned(self: WarmStart, batch: Batch, step: int) -> dict[str, Tensor]:
        if step == 1:
            batch = replace(batch, views=batch.views * float("nan"))
        return whole(self, batch, step)

    monkeypatch.setattr(WarmStart, "training_step", poisoned)
    settings = {
        "preset": "tiny_encoder",
        "train__nonfinite": "skip",
        "optim__schedule": "cosine",
        "optim__final_lr": 1.0,
    }
    two = train(with_output(tiny_config, tmp_path / "two", train__steps=2, **settings))
    one = train(with_output(tiny_config, tmp_path / "one", train__steps=1, **settings))
    for name, value in one.method.state_dict().items():
        if name != "norm.num_batches_tracked":
            assert torch.equal(value, two.method.state_dict()[name]), name


def test_without_bad_steps_the_policy_changes_nothing(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    runs = [
        train(with_output(tiny_config, tmp_path / policy, train__nonfinite=policy))
        for policy in ("stop", "skip")
    ]
    assert_same(*runs)


def told_after(watch: CollapseWatch, shares: list[tuple[int, float]]) -> None:
    for step, share in shares:
        watch.look(step, {"valid_share": share})


def test_collapse_is_told_once_with_its_thresholds(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(ObjectiveConfig(area=0.2, similarity=0.5))
    told_after(watch, [(step, 0.0) for step in range(10, 510, 10)])
    assert caplog.messages == []
    told_after(watch, [(step, 0.0) for step in range(510, 1500, 10)])
    assert len(caplog.messages) == 1
    assert "No instance was valid for 500 steps" in caplog.text
    assert "objective.area (0.2)" in caplog.text and "objective.similarity (0.5)" in caplog.text


def test_one_valid_instance_starts_the_count_anew(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(ObjectiveConfig())
    told_after(watch, [(400, 0.0), (800, 0.01), (1200, 0.0), (1600, 0.0)])
    assert caplog.messages == []
    told_after(watch, [(1700, 0.0)])
    assert len(caplog.messages) == 1


def test_before_the_instance_loss_counts_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(ObjectiveConfig(instance_from_step=2000))
    told_after(watch, [(step, 0.0) for step in range(0, 2500, 100)])
    watch.look(9000, {"loss": 1.0})
    assert caplog.messages == []
