"""apex's FusedAdam in the place of torch's AdamW, by a stand-in that does what apex documents."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import train_flags
from recording import stand_in
from stepping import Trace, assert_alike, built, clips, settings, stepped
from test_graphs import PHASES, STEPS, ordinary
from torch import Tensor
from toy import StoppedError, TinyConfig, interrupt, moments, with_output

from smtc import compatibility
from smtc.compatibility import RULES
from smtc.errors import UserError
from smtc.training import optim
from smtc.training.apex import load_fused_adam
from smtc.training.trainer import Run, train

# What the curves go over: a step that is left out, then both changes of phase.
BROKEN, FIRST, SECOND = 3, 6, 11
# `eps`, because Adam turns the rounding of a gradient of all but zero into a whole step.
CURVE: dict[str, Any] = {
    "optim__lr": 2e-3,
    "optim__eps": 1e-5,
    "objective__instance_from_step": FIRST,
    "optim__encoder_from_step": SECOND,
    "optim__encoder_lr": 0.5,
    "optim__warmup_steps": 4,
    "optim__weight_decay": 0.1,
}


class FusedAdam(torch.optim.Optimizer):
    """AdamW that counts the steps of a group and asks a gradient scaler whether to do nothing."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and bias_correction and capturable
        rates = torch.tensor(lr)
        super().__init__(
            params, {"lr": rates, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        for group in self.param_groups:  # which on one and the same device is the same tensor
            group["lr"] = group["lr"].to(device=group["params"][0].device)
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)
        self._step_supports_amp_scaling = True

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None, *, grad_scaler: Any = None) -> None:  # type: ignore[override]
        flag = self._dummy_overflow_buf
        for group in self.param_groups:
            device = group["params"][0].device
            # By the flag that is there, which is that of the group or the step before.
            if "step" in group:
                group["step"] += (flag != 1).int()
            else:
                group["step"] = torch.ones(1, dtype=torch.int32, device=device)
            if grad_scaler is None:
                flag.zero_()
                inverse = torch.ones(1, device=device)
            else:
                flag.copy_(grad_scaler._check_inf_per_device(self)[device])
                inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, flag == 1, inverse)

    def _update(
        self, parameter: Tensor, group: dict[str, Any], left_out: Tensor, inverse: Tensor
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        gradient, (first, second) = parameter.grad * inverse, group["betas"]
        mean = first * state["exp_avg"] + (1 - first) * gradient
        square = second * state["exp_avg_sq"] + (1 - second) * gradient * gradient
        count = group["step"].double()
        height = mean / (1 - first**count).float()
        width = (square / (1 - second**count).float()).sqrt() + group["eps"]
        moved = parameter - group["lr"] * (height / width + group["weight_decay"] * parameter)
        for kept, new in (
            (parameter, moved),
            (state["exp_avg"], mean),
            (state["exp_avg_sq"], square),
        ):
            kept.copy_(torch.where(left_out, kept, new))


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in, where `import apex.optimizers` finds it; and no rule against it on a CPU."""
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    package.optimizers = optimizers  # type: ignore[attr-defined]
    for name, module in (
        ("apex", package),
        ("apex.optimizers", optimizers),
        ("amp_C", ModuleType("amp_C")),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    on_gpus_only(monkeypatch)
    return optimizers


def on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tuple(rule for rule in RULES if rule.one != ("optim.impl", "apex"))
    assert len(kept) == len(RULES) - 1
    monkeypatch.setattr(compatibility, "RULES", kept)


def curve(**more: Any) -> Trace:
    """Twenty steps, one of which has a clip that is no number."""
    trace = built(settings(**CURVE, **more))
    for step in range(20):
        batches = list(clips(trace.stepper.config, step))
        if step == BROKEN:
            batches[-1].views[0] = float("nan")
        trace.scalars.append(trace.stepper(iter(batches), step).scalars)
    return trace


def assert_same_curve(one: Trace, other: Trace, *, rtol: float = 1e-5) -> None:
    for step, (mine, theirs) in enumerate(zip(one.scalars, other.scalars, strict=True)):
        assert bool(mine["skipped"]) == bool(theirs["skipped"]) == (step == BROKEN)
        if step != BROKEN:
            torch.testing.assert_close(mine["loss"], theirs["loss"], rtol=rtol, atol=1e-6)
    counts = {name: float(state["step"]) for name, state in one.moments.items()}
    assert counts == {name: float(state["step"]) for name, state in other.moments.items()}
    assert set(counts.values()) == {19.0, 20.0 - FIRST, 20.0 - SECOND}


@pytest.mark.parametrize("more", [{}, {"train__accumulate": 2, "optim__clip_norm": None}])
def test_losses_are_those_of_torchs_adamw(apex: ModuleType, more: dict[str, Any]) -> None:
    fused = curve(optim__impl="apex", **more)
    assert isinstance(fused.stepper.optimizer, FusedAdam)
    assert_same_curve(fused, curve(**more))


def test_losses_are_those_of_torchs_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for torch's own fused one, without the step that only a fused one can leave out."""
    fused = stepped(settings(**CURVE), 20)
    whole = torch.optim.AdamW.__init__

    def by_loop(self: torch.optim.AdamW, *arguments: Any, **named: Any) -> None:
        whole(self, *arguments, **named | {"fused": False, "foreach": False})

    monkeypatch.setattr(torch.optim.AdamW, "__init__", by_loop)
    monkeypatch.setattr(optim, "gated_step", lambda optimizer, _: optimizer.step())
    loop = stepped(settings(**CURVE), 20)
    assert not loop.stepper.optimizer.defaults["fused"]
    for one, other in zip(fused.scalars, loop.scalars, strict=True):
        torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-5, atol=1e-6)


def test_with_a_loss_scale_it_divides_once(apex: ModuleType) -> None:
    """A second division would leave gradients so small that `eps` counts."""
    low = {"train__precision": "fp16"}
    fused, plain = curve(optim__impl="apex", **low), curve(**low)
    assert_same_curve(fused, plain, rtol=1e-3)
    for update in (fused.stepper.update, plain.stepper.update):
        assert update.scaler.get_scale() == 2.0**15
    sizes = [
        torch.cat([state["exp_avg"].flatten() for state in trace.moments.values()]).norm()
        for trace in (fused, plain)
    ]
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.05, atol=0)


def test_a_step_left_out_counts_nowhere(apex: ModuleType) -> None:
    trace = built(settings(**CURVE, optim__impl="apex"))
    expected = [1.0, 1.0, 1.0, 2.0, 2.0, 3.0]
    for step, broken in enumerate([False, True, True, False, True, False]):
        batches = list(clips(trace.stepper.config, step))
        if broken:
            batches[0].views[0] = float("inf")
        before = trace.weights
        trace.stepper(iter(batches), step)
        if broken:
            torch.testing.assert_close(trace.weights, before, rtol=0, atol=0)
        assert {float(state["step"]) for state in trace.moments.values()} == {expected[step]}


def test_the_first_step_may_be_left_out(apex: ModuleType) -> None:
    trace = built(settings(**CURVE, optim__impl="apex"))
    for step in range(2):
        batches = list(clips(trace.stepper.config, step))
        if step == 0:
            batches[0].views[0] = float("nan")
        trace.stepper(iter(batches), step)
        assert {float(state["step"]) for state in trace.moments.values()} == {float(step)}


def test_groups_have_rates_of_their_own(apex: ModuleType) -> None:
    config = settings(**CURVE, optim__impl="apex")
    trace = built(config)
    trace.stepper(clips(config, SECOND), SECOND)
    groups = trace.stepper.optimizer.param_groups
    rates = {group["encoder"]: float(group["lr"]) for group in groups}
    assert rates[True] == pytest.approx(rates[False] / 2) and rates[False] > 0


def test_a_recorded_step_with_it(apex: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    _, recordings = stand_in(monkeypatch)
    config = settings(**PHASES, optim__impl="apex")
    trace = stepped(config, STEPS)
    assert len(recordings) == 3
    assert_alike(trace, ordinary(config))


# Checkpoints.


def run(tiny_config: TinyConfig, folder: Path, impl: str) -> Run:
    return train(
        with_output(
            tiny_config,
            folder,
            optim__impl=impl,
            optim__encoder_from_step=2,
            optim__encoder_lr=0.5,
            objective__instance_from_step=1,
            objective__area=0.0,
            objective__similarity=-1.0,
            train__steps=7,
            train__checkpoint_every=1,
        )
    )


@pytest.mark.parametrize(
    ("before", "after", "stop"),
    [("torch", "apex", 4), ("apex", "torch", 4), ("apex", "apex", 4), ("torch", "apex", 2)],
)
def test_checkpoints_interchange(
    apex: ModuleType,
    tiny_config: TinyConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    after: str,
    stop: int,
) -> None:
    straight = run(tiny_config, tmp_path / "straight", "torch")
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, stop)
        run(tiny_config, tmp_path / "run", before)
    resumed = run(tiny_config, tmp_path / "run", after)
    losses = [[line["loss"] for line in found.metrics] for found in (straight, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, other = moments(straight), moments(resumed)
    assert one.keys() == other.keys()
    for name, state in one.items():
        assert state.keys() == other[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == other[name]["step"]
        torch.testing.assert_close(other[name], state, rtol=2e-2, atol=1e-5)


# Packages that will not do.


def test_no_apex_is_one_sentence(
    safe: Callable[..., str],
    synthetic_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpus_only(monkeypatch)
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--optim.impl", "apex"))
    assert "--optim.impl apex: NVIDIA's apex with its CUDA extensions cannot be imported" in said
    assert "build it from github.com/NVIDIA/apex" in said and said.endswith("or use torch.")


def test_the_other_package_of_that_name_is_told_apart(
    safe: Callable[..., str],
    apex: ModuleType,
    synthetic_data: Path,
    tmp_path: Path,
) -> None:
    del apex.FusedAdam
    said = safe(*train_flags(synthetic_data, tmp_path / "run", "--optim.impl", "apex"))
    assert "has no attribute 'FusedAdam'" in said and "is another project" in said


def test_apex_without_its_extensions_is_refused(
    apex: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(UserError, match="amp_C"):
        load_fused_adam()
