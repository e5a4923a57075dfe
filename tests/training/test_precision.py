"""Loss scaling, clipping and the norms of gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Line, StoppedError, TinyConfig, assert_same, interrupt, moments, with_output

from smtc.config import OptimConfig
from smtc.errors import UserError
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.training.checkpoint import latest_checkpoint
from smtc.training.optim import Update, build_optimizer
from smtc.training.trainer import train

CPU = torch.device("cpu")
FIRST_SCALE = 2.0**16


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"encoder.a": (3, 4), "encoder.b": (4,), "head.a": (2, 2), "head.b": (5,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def with_gradients(scale: float = 1.0) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    given = parameters()
    torch.manual_seed(1)
    for parameter in given.values():
        parameter.grad = scale * torch.randn_like(parameter)
    return given, build_optimizer(given, OptimConfig(lr=0.1))


def gradients(given: dict[str, nn.Parameter]) -> list[Tensor]:
    return [p.grad.clone() for p in given.values() if p.grad is not None]


# The update.


@pytest.mark.parametrize("limit", [1e-3, 0.5, 3.0, 1e3])
def test_clipping_is_torchs(limit: float) -> None:
    given, optimizer = with_gradients()
    expected, _ = with_gradients()
    norm = nn.utils.clip_grad_norm_(expected.values(), limit, foreach=False)
    norms, skipped = Update(CPU, scaled=False, clip_norm=limit).step(optimizer)
    torch.testing.assert_close(gradients(given), gradients(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms["gradient_norm"], norm)
    assert not skipped


def test_small_gradients_are_never_raised() -> None:
    given, optimizer = with_gradients(1e-4)
    before = gradients(given)
    Update(CPU, scaled=False, clip_norm=5.0).step(optimizer)
    torch.testing.assert_close(gradients(given), before, rtol=0, atol=0)


def test_norms_are_what_loops_say() -> None:
    given, optimizer = with_gradients()
    norms, _ = Update(CPU, scaled=False, clip_norm=None).step(optimizer)

    def by_loop(part: str) -> float:
        named = [p.grad for name, p in given.items() if name.startswith(part)]
        values = [value for grad in named if grad is not None for value in grad.flatten().tolist()]
        return sum(value**2 for value in values) ** 0.5

    found = {name: float(norm) for name, norm in norms.items()}
    assert found == pytest.approx(
        {
            "gradient_norm": by_loop(""),
            "gradient_norm/encoder": by_loop("encoder."),
            "gradient_norm/head": by_loop("head."),
        }
    )


def test_a_frozen_encoder_has_no_norm() -> None:
    given = {name: p for name, p in parameters().items() if name.startswith("head.")}
    for parameter in given.values():
        parameter.grad = torch.ones_like(parameter)
    norms, _ = Update(CPU, scaled=False, clip_norm=None).step(build_optimizer(given, OptimConfig()))
    assert norms.keys() == {"gradient_norm", "gradient_norm/head"}
    assert float(norms["gradient_norm"]) == 3.0


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_scaled_update_is_the_plain_one(clip: float | None) -> None:
    """The scale is a power of two, so nothing is rounded."""
    plain, optimizer = with_gradients()
    norms, _ = Update(CPU, scaled=False, clip_norm=clip).step(optimizer)
    scaled, optimizer = with_gradients(FIRST_SCALE)
    update = Update(CPU, scaled=True, clip_norm=clip)
    update.scaler.scale(torch.zeros(()))
    same_norms, skipped = update.step(optimizer)
    torch.testing.assert_close(dict(scaled), dict(plain), rtol=0, atol=0)
    torch.testing.assert_close(same_norms, norms, rtol=0, atol=0)
    assert not skipped and update.scaler.get_scale() == FIRST_SCALE


@pytest.mark.parametrize("clip", [None, 0.5])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(clip: float | None) -> None:
    given, optimizer = with_gradients()
    before = {name: p.detach().clone() for name, p in given.items()}
    given["head.b"].grad = torch.full((5,), float("inf"))
    update = Update(CPU, scaled=True, clip_norm=clip)
    update.scaler.scale(torch.zeros(()))
    _, skipped = update.step(optimizer)
    assert skipped
    torch.testing.assert_close({n: p.detach() for n, p in given.items()}, before, rtol=0, atol=0)
    assert update.scaler.get_scale() == FIRST_SCALE / 2
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())
    optimizer.zero_grad()
    for parameter in given.values():
        parameter.grad = torch.ones_like(parameter)
    assert not update.step(optimizer)[1]
    assert not any(torch.equal(p.detach(), before[name]) for name, p in given.items())


def test_the_scale_comes_back_as_it_was() -> None:
    given, optimizer = with_gradients()
    update = Update(CPU, scaled=True, clip_norm=None)
    update.scaler.scale(torch.zeros(()))
    given["head.b"].grad = torch.full((5,), float("nan"))
    update.step(optimizer)
    given["head.b"].grad = torch.ones(5)
    update.step(optimizer)
    again = Update(CPU, scaled=True, clip_norm=None)
    again.load_state_dict(update.state_dict())
    again.scaler.scale(torch.zeros(()))
    assert again.scaler.state_dict() == update.scaler.state_dict()
    assert update.scaler.state_dict()["_growth_tracker"] == 1
    assert Update(CPU, scaled=False, clip_norm=None).state_dict() == {}


# Whole runs.


class Overflowing(Line):
    """The gradient of some steps is infinite though the loss is not, as a scaled one may be."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.left_out: list[bool] = []

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        found = super().training_step(batch, step)
        loss = found["loss"].float() * 1e-3  # so small that nothing else overflows
        if step in self.steps:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return found | {"loss": loss}

    def after_step(self, step: int, skipped: Tensor) -> None:
        self.left_out.append(bool(skipped))
        super().after_step(step, skipped)


def test_a_run_survives_overflows_and_does_not_count_them(
    tiny_config: TinyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = Overflowing(0, 3)
    config = with_output(tiny_config, tmp_path / "run", train__steps=5, train__precision="fp16")
    run = train(config, method=method)  # under nonfinite = "stop"
    assert method.left_out == [True, False, False, True, False]
    scales = [line["loss_scale"] / FIRST_SCALE for line in run.metrics]
    assert scales == [0.5, 0.5, 0.5, 0.25, 0.25]
    assert [line["skipped"] for line in run.metrics] == [1, 0, 0, 1, 0]
    assert all((line["gradient_norm"] is None) == line["skipped"] for line in run.metrics)
    assert {float(state["step"]) for state in moments(run).values()} == {3.0}
    assert "not finite" not in caplog.text


def test_a_loss_that_is_no_number_stops_fp16_too(tiny_config: TinyConfig, tmp_path: Path) -> None:
    class Broken(Line):
        def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
            found = super().training_step(batch, step)
            return found | {"loss": found["loss"] * (float("nan") if step == 2 else 1.0)}

    config = with_output(tiny_config, tmp_path / "run", train__steps=5, train__precision="fp16")
    with pytest.raises(UserError, match="step 2 was not finite"):
        train(config, method=Broken())


def test_the_scale_survives_a_stop(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rhythm: dict[str, Any] = {"train__steps": 6, "train__precision": "fp16"}
    rhythm["train__checkpoint_every"] = 1
    straight = train(with_output(tiny_config, tmp_path / "a", **rhythm), method=Overflowing(1, 4))
    config = with_output(tiny_config, tmp_path / "b", **rhythm)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, 3)
        train(config, method=Overflowing(1, 4))
    state = latest_checkpoint(tmp_path / "b")
    assert state is not None and float(state["scaler"]["scale"]) == FIRST_SCALE / 2
    assert int(state["scaler"]["_growth_tracker"]) == 1
    assert_same(straight, train(config, method=Overflowing(1, 4)))
    first, second = (latest_checkpoint(tmp_path / name) for name in ("a", "b"))
    assert first is not None and second is not None
    torch.testing.assert_close(first["scaler"], second["scaler"], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_smtc_learns_in_low_precision(
    tiny_config: TinyConfig, tmp_path: Path, precision: str
) -> None:
    config = with_output(
        tiny_config, tmp_path / "run", train__precision=precision, optim__encoder_from_step=1
    )
    method = SMTCMethod(config)
    before = {name: p.detach().clone() for name, p in method.student.named_parameters()}
    run = train(config, method=method)
    assert [line["skipped"] for line in run.metrics] == [0, 0, 0, 0]
    for name, parameter in method.trainable(3).items():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter.detach(), before[name]), name
    assert all(value.isfinite().all() for value in method.state_dict().values())
