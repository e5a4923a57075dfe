"""One step: compiled, with recomputed activations, with one pass for a frozen encoder; it computes
the same as the plain one.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import (
    CPU,
    LIVELY,
    assert_alike,
    built,
    clips,
    go_on,
    graphs_compiled,
    settings,
    stepped,
    trace_only,
)
from torch import Tensor, nn
from toy import Line, StoppedError, TinyConfig, assert_same, interrupt, with_output

from smtc.backbones import AS_EVALUATED, VIT_SIZES, VisionTransformer, ViTSize, build_encoder
from smtc.benchmarks.harness import peak_memory
from smtc.config import BackboneConfig
from smtc.errors import UserError
from smtc.method import SMTCMethod
from smtc.training import step as step_module
from smtc.training.distributed import World
from smtc.training.step import Step, numerics
from smtc.training.trainer import build_method, train

RESNET: dict[str, Any] = {
    "model__backbone__architecture": "resnet50",
    "model__backbone__patch": 16,
    "model__backbone__feature": "tokens",
}

ALL_AT_ONCE: dict[str, Any] = {"optim__encoder_from_step": 0, "objective__instance_from_step": 0}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """What one test compiles counts for no other."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Compiled.


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("encoder", {}),
        ("encoder", {"train__accumulate": 2, "train__checkpoint_activations": True}),
        ("encoder", {"train__precision": "bf16"}),
        ("model", {"train__accumulate": 2}),
    ],
)
def test_a_traced_step_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, kind: str, more: dict[str, Any]
) -> None:
    """Over both changes of phase, bit for bit."""
    plain = stepped(settings(**more))
    trace_only(monkeypatch)
    before = graphs_compiled()
    traced = stepped(settings(train__compile=kind, **more))
    assert graphs_compiled() > before
    assert_alike(traced, plain)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "more"),
    [("encoder", {}), ("encoder", {"train__checkpoint_activations": True}), ("model", ALL_AT_ONCE)],
)
def test_a_compiled_step_is_the_plain_one(kind: str, more: dict[str, Any]) -> None:
    """Generated code sums in another order. Slots and losses take minutes, so in one phase only."""
    config = settings(train__compile=kind, **more)
    compiled, plain = stepped(config, 3), stepped(settings(**more), 3)
    # Adam's first steps have the size of the rate whatever the gradient's, so its rounding shows
    # from the second step on.
    assert_alike(compiled, plain, rtol=2e-3, atol=2e-5)
    for one, other in zip(compiled.scalars[:1], plain.scalars, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for name, gradient in compiled.gradients[0].items():
        torch.testing.assert_close(gradient, plain.gradients[0][name], rtol=1e-4, atol=1e-6)


def compiled_parts(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if part._compiled_call_impl is not None]


def test_what_is_compiled() -> None:
    """The blocks that run, of student and teacher, and on request what follows them."""
    blocks = [
        f"{side}encoder.blocks.{i}" for side in ("student.", "teacher.model.") for i in (0, 1)
    ]
    for kind in ("none", "encoder", "model"):
        method = built(settings(train__compile=kind)).method
        assert compiled_parts(method) == (blocks if kind != "none" else [])
        assert (method._finish == method._losses) == (kind != "model")
    method = built(settings(train__compile="encoder", model__backbone__feature="tokens")).method
    assert compiled_parts(method.student) == [f"encoder.blocks.{i}" for i in range(3)]
    method = built(settings(train__compile="encoder", **RESNET)).method
    assert compiled_parts(method) == ["student.encoder", "teacher.model.encoder"]


@pytest.mark.parametrize("more", [{}, RESNET], ids=["vit", "resnet"])
def test_the_warm_start_is_compiled_too(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    def losses(kind: str) -> list[Tensor]:
        config = settings("tiny_encoder", train__compile=kind, **more)
        torch.manual_seed(0)
        stepper = Step(build_method(config).train(), config, World(CPU))
        return [stepper(clips(config, step), step).scalars["loss"] for step in range(2)]

    plain = losses("none")
    trace_only(monkeypatch)
    before = graphs_compiled()
    assert losses("encoder") == plain
    assert graphs_compiled() > before


def test_all_blocks_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep the encoder is; beyond a limit the compiler would give up without a word."""
    monkeypatch.setitem(VIT_SIZES, "vit_tiny", ViTSize(width=16, depth=14, heads=2))
    trace_only(monkeypatch)
    before = graphs_compiled()
    stepped(settings(train__compile="encoder"), 3)
    # One for the frozen phase, then one with gradients and one of the teacher, all 13 blocks.
    assert graphs_compiled() - before == 3


RHYTHM: dict[str, Any] = {name.replace(".", "__"): value for name, value in LIVELY.items()}
RHYTHM |= {"train__steps": 4, "train__checkpoint_every": 1, "train__compile": "encoder"}


def test_a_compiled_run_goes_on_as_if_it_had_not_stopped(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_only(monkeypatch)
    straight = train(with_output(tiny_config, tmp_path / "a", **RHYTHM))
    config = with_output(tiny_config, tmp_path / "b", **RHYTHM)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        interrupt(patch, 2)
        train(config)
    torch.compiler.reset()
    assert_same(straight, train(config))


def test_scores_and_pictures_compile_nothing(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic_data: Path
) -> None:
    trace_only(monkeypatch)
    counts = []
    for name, more in {
        "plain": {"train__pictures_every": 0},
        "shown": {
            "train__pictures_every": 1,
            "eval__data": str(synthetic_data),
            "eval__every": 1,
        },
    }.items():
        torch.compiler.reset()
        before = graphs_compiled()
        run = train(with_output(tiny_config, tmp_path / name, **RHYTHM, **more))
        counts.append(graphs_compiled() - before)
        assert ("eval/fg_iou" in run.metrics[-1]) == (name == "shown")
    assert counts[0] == counts[1] > 0


# Recomputed activations.


@pytest.mark.parametrize("more", [{}, {"model__backbone__feature": "tokens"}])
def test_recomputed_activations_give_the_same_bits(more: dict[str, Any]) -> None:
    """With stochastic depth, which has to drop the same branches again."""
    assert_alike(
        stepped(settings(train__checkpoint_activations=True, **more)), stepped(settings(**more))
    )


def test_the_warm_start_recomputes_too() -> None:
    config = settings("tiny_encoder", train__checkpoint_activations=True)
    method = build_method(config).train()
    Step(method, config, World(CPU))
    assert [encoder.recomputes for encoder in method.encoders()] == [True]


def peak(*, recomputes: bool) -> float:
    torch.manual_seed(0)
    config = BackboneConfig(patch=8, drop_path=0.3, feature="keys")
    encoder = VisionTransformer(config, ViTSize(width=64, depth=9, heads=2)).train()
    encoder.recomputes = recomputes
    frames, depth = torch.randn(4, 3, 96, 96), torch.rand(4, encoder.branches)
    return peak_memory(lambda: encoder(frames, depth).square().sum().backward())


def test_recomputed_activations_need_less_memory() -> None:
    assert peak(recomputes=True) < 0.5 * peak(recomputes=False)


def test_a_whole_step_needs_less_memory_with_them() -> None:
    found = {}
    for wanted in (False, True):
        config = settings(
            optim__encoder_from_step=0,
            train__checkpoint_activations=wanted,
            model__resolution=(96, 96),
            model__slots=2,
            model__iterations=1,
        )
        trace = go_on(built(config), range(2))
        batch = list(clips(config, 2))
        found[wanted] = peak_memory(lambda t=trace, b=batch: t.stepper(iter(b), 2))  # type: ignore[misc]
    assert found[True] < 0.8 * found[False]


def test_blocks_run_again_only_where_asked_and_only_under_grad() -> None:
    ran: list[nn.Module] = []
    for wanted, expected in ((False, [1, 2, 2]), (True, [1, 3, 3])):
        trace = built(settings(train__checkpoint_activations=wanted))
        for encoder in trace.method.encoders():
            encoder.repeated()[0].register_forward_pre_hook(lambda module, _: ran.append(module))
        counts = []
        for step in range(3):
            ran.clear()
            go_on(trace, range(step, step + 1))
            counts.append(len(ran))
        assert counts == expected


# The frozen phase.


class Calls:
    """How often encoders ran, under which names, and whether under grad."""

    def __init__(self, method: SMTCMethod) -> None:
        self.made: list[tuple[str, bool, int]] = []
        student, teacher = method.encoders()
        student.register_forward_hook(self._noting("student"))
        teacher.register_forward_hook(self._noting("teacher"))

    def _noting(self, who: str) -> Callable[..., None]:
        def note(module: nn.Module, given: tuple[Tensor, ...], features: Tensor) -> None:
            under_grad = torch.is_grad_enabled() or features.requires_grad
            self.made.append((who, under_grad, len(given[0])))

        return note


def test_a_frozen_encoder_runs_once_a_step_and_never_under_grad() -> None:
    config = settings(optim__encoder_from_step=2, objective__instance_from_step=0)
    trace = built(config)
    calls, frames = Calls(trace.method), config.train.batch * config.data.frames
    go_on(trace, range(4))
    frozen = [("student", False, 2 * frames)]
    learning = [("student", True, frames), ("teacher", False, frames)]
    assert calls.made == frozen * 2 + learning * 2


@pytest.mark.parametrize("more", [{}, RESNET], ids=["vit", "resnet"])
def test_one_pass_for_both_views_is_two_passes(more: dict[str, Any]) -> None:
    """Stochastic depth drops branches of the student's frames alone."""
    trace = built(settings(optim__encoder_from_step=-1, **more))
    method, (batch,) = trace.method, clips(trace.stepper.config, 0)
    trace.stepper.enter(0)
    student, teacher = method._encode(batch, 0)
    view, other = batch.views.unbind(dim=1)
    with torch.no_grad():
        alone, _ = method.student.encode(view, method._depth(batch))
        beside, _ = method._teacher_model().encode(other)
        whole, _ = method.student.encode(view, torch.full_like(method._depth(batch), AS_EVALUATED))
    torch.testing.assert_close(student, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher, beside, rtol=1e-5, atol=1e-5)
    assert torch.allclose(student, whole, rtol=1e-3, atol=1e-3) == bool(more)  # a ResNet has none


def test_a_frozen_phase_has_the_losses_of_the_long_way() -> None:
    """That with a backward pass through the encoder and one pass a view, at a rate of 0."""
    frozen = {"optim__encoder_from_step": -1, "objective__instance_from_step": 1}
    short = stepped(settings(**frozen), 3)
    long = stepped(settings(**frozen, optim__frozen_backward=True, optim__clip_norm=None), 3)
    short_free = stepped(settings(**frozen, optim__clip_norm=None), 3)
    assert "gradient_norm/encoder" in long.scalars[0]
    for one, other in zip(short_free.scalars, long.scalars, strict=True):
        for name in ("loss", "alignment", "instance", "gradient_norm/head", "slots_used"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(short.scalars[0]["loss"], long.scalars[0]["loss"])


# What holds for every step.


def test_numerics_hold_within_the_block_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with numerics(settings(train__matmul="medium"), CPU):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(StoppedError), numerics(settings(train__matmul="high"), CPU):
        raise StoppedError
    assert torch.get_float32_matmul_precision() == before


def test_a_step_computes_within_its_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = SMTCMethod.training_step

    def noting(self: SMTCMethod, *arguments: Any) -> dict[str, Tensor]:
        seen.append(torch.get_float32_matmul_precision())
        return whole(self, *arguments)

    monkeypatch.setattr(SMTCMethod, "training_step", noting)
    stepped(settings(train__matmul="high"), 1)
    assert seen == ["high"]


@pytest.mark.parametrize("scope", ["all", "head"])
def test_the_teacher_follows_as_a_loop_over_values_says(scope: str) -> None:
    """At every step but the one that is left out."""
    config = settings(teacher__momentum=0.75, teacher__scope=scope, optim__encoder_lr=1.0)
    trace = built(config)
    student, teacher = trace.method.student, trace.method._teacher_model()
    expected = {n: p.detach().double().clone() for n, p in teacher.named_parameters()}
    for step in range(5):
        batches = list(clips(config, step))
        if step == 3:
            batches[0].views[0] = float("nan")
        assert bool(trace.stepper(iter(batches), step).skipped) == (step == 3)
        for name, parameter in student.named_parameters():
            if step != 3 and (scope == "all" or not name.startswith("encoder.")):
                expected[name] = 0.75 * expected[name] + 0.25 * parameter.detach().double()
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-7)
    moved = teacher.encoder.get_parameter(
        "patch_embed.proj.weight"
    ) - student.encoder.get_parameter("patch_embed.proj.weight")
    assert moved.abs().max() > 0


def test_parts_of_a_step_add_up_to_one_big_batch() -> None:
    whole, parts = stepped(settings(), 4), stepped(settings(train__batch=1, train__accumulate=2), 4)
    # Before Adam, whose first steps have the size of the rate whatever the gradient's, diverges.
    torch.testing.assert_close(parts.gradients[0], whole.gradients[0], rtol=1e-4, atol=1e-7)
    for one, other in zip(parts.scalars, whole.scalars, strict=True):
        for name in ("loss", "alignment", "instance", "valid_share", "gradient_norm"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def test_a_step_left_out_leaves_batch_statistics_too() -> None:
    config = settings(**RESNET, **ALL_AT_ONCE)
    trace = go_on(built(config), range(1))
    before, (batch,) = trace.weights, clips(config, 1)
    batch.views[0] = float("nan")
    assert trace.stepper(iter([batch]), 1).skipped
    for name, value in trace.weights.items():
        assert torch.equal(value, before[name]) or name.endswith("num_batches_tracked"), name
    go_on(trace, range(2, 3))
    assert not torch.equal(
        trace.weights["student.encoder.bn1.running_mean"],
        before["student.encoder.bn1.running_mean"],
    )


def test_graphs_need_a_method_that_decides_nothing_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_module.torch.cuda, "Stream", lambda device: None)
    with pytest.raises(UserError, match="Line decides something on the host"):
        Step(Line(), settings(train__cuda_graphs="on"), World(CPU))


def test_every_encoder_says_what_of_it_is_compiled() -> None:
    ran: list[nn.Module] = []
    for more in ({}, RESNET, {"model__backbone__feature": "tokens"}):
        encoder = build_encoder(settings(**more).model.backbone)
        ran.clear()
        for part in encoder.repeated():
            part.register_forward_hook(lambda module, *_: ran.append(module))
        encoder(torch.randn(1, 3, 32, 32))
        assert ran == encoder.repeated() != []
