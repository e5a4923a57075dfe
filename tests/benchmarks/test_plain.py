"""The plain reference step computes what the project computes: losses, weights, teacher.

What is compared over several updates is float64, with a larger ε in AdamW: with the usual one it
makes whole steps out of gradients that are zero but for rounding.
"""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from commands import changed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smtc import presets
from smtc.benchmarks import plain_losses
from smtc.benchmarks.plain import FAULTS, RELIEFS, PlainStep
from smtc.config import BackboneConfig, Config
from smtc.errors import UserError
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.training.optim import (
    Update,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)

PRESETS = ("fixed", "paper", "official_v2", "official_strict", "tiny")
CLIPS, FRAMES, SIDES, PATCH, STEPS, UNFREEZES = 2, 3, (32, 48), 8, 3, 1
LR = 1e-2
EVERY_INSTANCE = {"objective.area": 0.0, "objective.similarity": -1.0}
SOME_INSTANCES = {
    "objective.mask_threshold": 0.35,
    "objective.area": 0.15,
    "objective.similarity": 0.6,
}


def small(preset: str = "fixed", settings: dict[str, Any] | None = None) -> Config:
    """A preset on the smallest encoder, with a loss of some instances and rates at which three
    steps change something; the encoder is frozen in the first of them.
    """
    small = {
        "model.backbone.architecture": "vit_tiny",
        "model.backbone.patch": PATCH,
        "model.backbone.drop_path": 0.4,
        "model.resolution": SIDES,
        "model.slots": 4,
        "model.instances": 3,
        "objective.instance_from_step": 0,
        "optim.lr": LR,
        "optim.eps": 1e-5,
        "optim.warmup_steps": 1,
        "optim.encoder_lr": 0.5,
        "optim.encoder_from_step": UNFREEZES,
        "optim.clip_norm": 0.5,
        "teacher.momentum": 0.7,
        "train.steps": 5,
        "train.seed": 11,
    }
    return changed(presets.get(preset), small | SOME_INSTANCES | (settings or {}))


def batches(dtype: torch.dtype = torch.float64, block: int = PATCH) -> list[Batch]:
    """A batch a step, 4 by 6 blocks of colour, so that features and masks have some structure."""
    drawn = torch.Generator().manual_seed(1)
    made = []
    for step in range(STEPS):
        coarse = torch.randn(CLIPS, 2, FRAMES, 3, 4, 6, generator=drawn, dtype=torch.float64)
        views = coarse.repeat_interleave(block, -1).repeat_interleave(block, -2)
        views = views + 0.3 * torch.randn(views.shape, generator=drawn, dtype=torch.float64)
        index = torch.tensor([7 + step, 40_000_000_000 + step])
        made.append(Batch(views=views.to(dtype), sources=[], index=index))
    return made


def method_of(config: Config, dtype: torch.dtype = torch.float64) -> SMTCMethod:
    """The project's method, with sharper queries so that masks have several sizes."""
    torch.manual_seed(0)
    method = SMTCMethod(config).to(dtype).train()
    with torch.no_grad():
        for model in (method.student, method.teacher.model):
            model.slot_attention.project_q.weight.mul_(3)
    return method


def plain_of(method: SMTCMethod, **options: Any) -> PlainStep:
    """The plain step from the weights that `method` has now."""
    return PlainStep(method.config, method.student.state_dict(), **options)


def project_steps(method: SMTCMethod) -> list[dict[str, Tensor]]:
    """Three updates as the trainer makes them; returns the losses."""
    config = method.config
    update = Update(torch.device("cpu"), scaled=False, clip_norm=config.optim.clip_norm)
    trained: tuple[str, ...] = ()
    optimizer, scalars = None, []
    for step, batch in enumerate(batches()):
        trainable = method.trainable(step)
        if tuple(trainable) != trained:
            moments = optimizer_state(optimizer) if optimizer else {}
            method.requires_grad_(False)
            for parameter in trainable.values():
                parameter.requires_grad_(True)
            optimizer, trained = build_optimizer(trainable, config.optim), tuple(trainable)
            load_optimizer_state(optimizer, moments)
        set_learning_rate(optimizer, step, config.train.steps, config.optim)
        optimizer.zero_grad(set_to_none=True)
        found = method.training_step(batch, step)
        found["loss"].backward()
        _, skipped = update.step(optimizer)
        method.after_step(step, skipped)
        scalars.append({name: value.detach() for name, value in found.items()})
    return scalars


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float, atol: float
) -> None:
    """Every tensor of `got` is also in `expected`, and near."""
    for name, value in got.items():
        torch.testing.assert_close(
            value.detach(),
            expected[name].detach(),
            rtol=rtol,
            atol=atol,
            check_dtype=False,
            msg=name,
        )


def assert_follows(config: Config) -> None:
    """Three plain steps give the losses and both sets of weights of three of the project's, and a
    gradient to exactly what the project trains.
    """
    method = method_of(config)
    step = plain_of(method)
    start = {name: value.clone() for name, value in method.student.state_dict().items()}
    trained = [set(method.trainable(number)) for number in range(STEPS)]
    expected = project_steps(method)
    for number, batch in enumerate(batches()):
        got = step(batch, number)
        assert set(got) == {"loss", "alignment", "regularisation", "instance"}
        # Some of the project's losses are fp32 whatever comes in.
        assert_close(got, expected[number], rtol=2e-6, atol=1e-8)
        named = step.student_network.named_parameters()
        assert {name for name, value in named if value.grad is not None} == trained[number]
    student, teacher = method.student.state_dict(), method.teacher.model.state_dict()
    assert set(step.student_state()) == set(step.teacher_state()) == set(student)
    assert_close(step.student_state(), student, rtol=0, atol=1e-4 * LR)
    assert_close(step.teacher_state(), teacher, rtol=0, atol=1e-4 * LR)
    # Otherwise the comparison would say nothing.
    for state in (student, teacher):
        name = "slot_attention.project_k.weight"
        assert (state[name] - start[name]).abs().mean() > 0.1 * LR
    assert expected[-1]["instance"] != 0


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_in_fp32(preset: str) -> None:
    for settings in ({}, EVERY_INSTANCE):
        method = method_of(small(preset, settings), torch.float32)
        batch = batches(torch.float32)[0]
        expected = method.training_step(batch, step=1)
        share = float(expected["valid_share"])
        assert share == 1 if settings else 0.05 < share < 0.95
        assert expected["instance"] != 0
        step = plain_of(method)
        got = step.losses(step.student(batch, 1), step.teacher(batch), 1)
        assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_three_updates(preset: str) -> None:
    assert_follows(small(preset))


@pytest.mark.parametrize(
    "settings",
    [
        {"objective.cost": "dot", "objective.epsilon": 1.0, "objective.iterations": 2},
        {"objective.alignment_weight": 0.3, "objective.instance_weight": 3.0},
        {"objective.regularisation_weight": 2.0, "objective.reduction": "sum"},
        # Raw slots are so far apart that a smaller margin has no part in the loss.
        {"objective.form": "l2_margin", "objective.margin": 16.0, "model.embedding": "raw"},
        {"model.instances": 1, "optim.clip_norm": None, "optim.betas": (0.5, 0.7)},
        {"model.backbone.feature": "tokens", "model.backbone.position_resize": "size"},
        {"model.gradient": "full", "model.iterations": 4, "model.sampling": "detached"},
        {"optim.decay_embeddings": True, "optim.weight_decay": 2.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_settings(settings: dict[str, Any]) -> None:
    assert_follows(small("fixed", settings))


@pytest.mark.parametrize("preset", ["fixed", "paper"])
def test_the_instance_loss_waits_for_its_step(preset: str) -> None:
    config = small(preset, {"objective.instance_from_step": 2, "optim.encoder_from_step": 0})
    assert_follows(config)
    step = plain_of(method_of(config))
    assert [float(step(batch, n)["instance"]) == 0 for n, batch in enumerate(batches())] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("start", [-1, 2])
def test_frozen_encoder(start: int, released: bool) -> None:
    """With `frozen_backward` its moments warm up, without it there is no graph."""
    settings = {"optim.encoder_from_step": start, "optim.frozen_backward": released}
    config = small("fixed", settings)
    assert_follows(config)
    step = plain_of(method_of(config))
    before = {name: value.clone() for name, value in step.student_state().items()}
    assert step.student(batches()[0], 0).features.requires_grad == released
    for number, batch in enumerate(batches()[:2]):
        step(batch, number)
    for name, value in step.student_state().items():
        if name.startswith("encoder."):
            assert torch.equal(value, before[name])


def test_position_embedding_on_its_own_grid() -> None:
    # 224 pixels in patches of 112, two a side.
    config = small()
    backbone = dataclasses.replace(config.model.backbone, patch=112)
    model = dataclasses.replace(config.model, backbone=backbone, resolution=(224, 224))
    method = method_of(dataclasses.replace(config, model=model))
    made = batches(block=56)[0]
    batch = Batch(made.views[..., :224], [], made.index)
    step = plain_of(method)
    got = step.losses(step.student(batch, 1), step.teacher(batch), 1)
    assert_close(got, method.training_step(batch, 1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("preset", ["fixed", "paper"])
@pytest.mark.parametrize("name", [*FAULTS, *RELIEFS])
def test_faults_and_reliefs_change_no_result(name: str, preset: str) -> None:
    method = method_of(small(preset))
    kind = "faults" if name in FAULTS else "reliefs"
    one, other = plain_of(method), plain_of(method, **{kind: [name]})
    for number, batch in enumerate(batches()):
        assert_close(other(batch, number), one(batch, number), rtol=1e-6, atol=1e-8)
    assert_close(other.student_state(), one.student_state(), rtol=0, atol=1e-6 * LR)
    assert_close(other.teacher_state(), one.teacher_state(), rtol=0, atol=1e-6 * LR)


def test_all_of_them_at_once() -> None:
    method = method_of(small("official_v2"))
    one, other = plain_of(method), plain_of(method, faults=FAULTS, reliefs=RELIEFS)
    for number, batch in enumerate(batches()):
        assert_close(other(batch, number), one(batch, number), rtol=1e-6, atol=1e-8)
    assert_close(other.student_state(), one.student_state(), rtol=0, atol=1e-6 * LR)
    assert_close(other.teacher_state(), one.teacher_state(), rtol=0, atol=1e-6 * LR)


class Seen(TorchDispatchMode):
    """Counts operations by name, and which of them ran in anomaly mode; the largest float64."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest_double = 0
        self.watched: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        self.watched[name] += torch.is_anomaly_enabled()
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.largest_double = max(self.largest_double, result.numel())
        return result


def seen(**options: Any) -> Seen:
    """The first step of `fixed` in fp32, its encoder frozen."""
    step = plain_of(method_of(small(), torch.float32), **options)
    batch = batches(torch.float32)[0]
    with Seen() as mode:
        step(batch, 0)
    return mode


def test_each_fault_does_what_it_says() -> None:
    usual, one_view = seen(), CLIPS * FRAMES * 3 * SIDES[0] * SIDES[1]
    assert not usual.watched.total()
    watched = seen(faults=["anomaly"])
    for name in ("_softmax", "_softmax_backward_data", "logsumexp"):  # three phases
        assert watched.watched[name] == watched.calls[name] > 0, name
    assert usual.largest_double < one_view <= seen(faults=["float64_frames"]).largest_double
    # Of three blocks the last has no MLP, in the student's and the teacher's pass.
    assert usual.calls["gelu"] == 4 and seen(faults=["dead_block"]).calls["gelu"] == 6
    assert usual.calls["gelu_backward"] == 0
    assert seen(faults=["frozen_backward"]).calls["gelu_backward"] == 2
    method, batch = method_of(small()), batches()[0]
    assert not plain_of(method).teacher(batch).features.requires_grad
    assert plain_of(method, faults=["teacher_graph"]).teacher(batch).features.requires_grad


def test_each_relief_does_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    for name in ("linear_sum_assignment", "sinkhorn"):
        original = getattr(plain_losses, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
            calls[_name] += 1
            return _original(*args, **named)

        monkeypatch.setattr(plain_losses, name, counted)
    usual = seen()
    slots = small().model.slots
    assert calls == {
        "linear_sum_assignment": CLIPS * slots * FRAMES**2,
        "sinkhorn": FRAMES * (FRAMES - 1),
    }
    for name, peer in (
        ("batched_assignment", "linear_sum_assignment"),
        ("batched_pairs", "sinkhorn"),
    ):
        calls.clear()
        seen(reliefs=[name])
        assert calls[peer] == 0 and len(calls) == 1
    # Two blocks with attention, two networks; the rest are slots, masks and the like.
    assert usual.calls["_softmax"] - seen(reliefs=["sdpa"]).calls["_softmax"] == 4
    assert usual.calls["_foreach_add_"] == 0
    assert seen(reliefs=["foreach_ema"]).calls["_foreach_add_"] == 1
    assert usual.calls["_fused_adamw_"] == 0
    # On a GPU torch would choose the multi-tensor AdamW by itself.
    for group in plain_of(method_of(small())).optimizer.param_groups:
        assert group["foreach"] is None and group["fused"] is None
    assert seen(reliefs=["fused_adamw"]).calls["_fused_adamw_"] > 0


def test_phases_make_a_step_and_the_weights_given_are_copied() -> None:
    method = method_of(small())
    weights = method.student.state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    whole, phases = plain_of(method), plain_of(method)
    for number, batch in enumerate(batches()):
        expected = whole(batch, number)
        found = phases.losses(phases.student(batch, number), phases.teacher(batch), number)
        phases.backward(found)
        phases.optimiser(number)
        phases.ema()
        assert_close(found, expected, rtol=0, atol=0)
    assert_close(phases.student_state(), whole.student_state(), rtol=0, atol=0)
    assert_close(phases.teacher_state(), whole.teacher_state(), rtol=0, atol=0)
    assert_close(weights, before, rtol=0, atol=0)


def test_settings_that_it_does_not_know() -> None:
    resnet = BackboneConfig(architecture="resnet50", feature="tokens")
    for name, value, said in (
        ("model.backbone", resnet, "vision transformers only"),
        ("data.spatial", "independent", "cropped apart"),
        ("train.accumulate", 2, "one batch a step"),
        ("method", "warm_start", "must be"),
    ):
        with pytest.raises(UserError, match=said):
            PlainStep(changed(presets.fixed(), {name: value}), {})


def test_wrong_names_weights_and_batches() -> None:
    method, batch = method_of(small()), batches()[0]
    with pytest.raises(UserError, match="no fault 'sdpa'; there are anomaly, float64_frames"):
        plain_of(method, faults=["sdpa"])
    with pytest.raises(UserError, match="no relief 'anomaly'; there are sdpa, batched_ass"):
        plain_of(method, reliefs=["anomaly"])
    with pytest.raises(UserError, match="not those of a model with these settings"):
        PlainStep(small("paper"), method.student.state_dict())
    with pytest.raises(UserError, match="not those of a model with these settings"):
        PlainStep(small(), {})
    step = plain_of(method)
    with pytest.raises(UserError, match=r"of model\.resolution 32x48; the batch's are 32x40"):
        step(Batch(batch.views[..., :40], [], batch.index), 0)
    with pytest.raises(UserError, match="cropped apart"):
        step(Batch(batch.views, [], batch.index, spatial=torch.zeros(CLIPS, 2, 5)), 0)
