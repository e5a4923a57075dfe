"""A whole training step of the method against the written-out model and objectives."""

import dataclasses

import pytest
import torch
from torch import Tensor

from smtc import presets
from smtc.config import Config
from smtc.keyed_random import keyed_normal, keyed_other_frame
from smtc.method import REFERENCE_STREAM, STUDENT_NOISE_STREAM, TEACHER_NOISE_STREAM, SMTCMethod
from smtc.pipelines.batch import Batch

from . import objectives_by_loops as loops
from .smtc_by_loops import Weights
from .test_forward import (
    CLIPS,
    FRAMES,
    INSTANCES,
    SLOTS,
    TRAINED,
    by_loops,
    error,
    gradient_errors,
    small,
    weights_of,
)

SEED = 11


def build(preset: str) -> tuple[Config, SMTCMethod, Batch]:
    """A method whose teacher has its own weights, in double precision, and a batch."""
    made = presets.get(preset)
    # So that some instance slots are valid and some are not in every preset.
    objective = dataclasses.replace(made.objective, area=0.15, similarity=0.6, mask_threshold=0.4)
    config = dataclasses.replace(
        made,
        model=small(preset),
        objective=objective,
        train=dataclasses.replace(made.train, seed=SEED),
    )
    torch.manual_seed(0)
    method = SMTCMethod(config).double()
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(1)
    # Blocks of colour, so that features and masks have some structure.
    coarse = torch.randn(CLIPS, 2, FRAMES, 3, 3, 4, generator=generator)
    views = coarse.repeat_interleave(16, -1).repeat_interleave(16, -2).double()
    views = 2 * views + 0.5 * torch.randn(views.shape, generator=generator)
    batch = Batch(views=views, sources=[], index=torch.tensor([7, 40_000_000_000]))
    assert views.shape[-2:] == TRAINED
    return config, method, batch


def step_by_loops(
    config: Config, student: Weights, teacher: Weights, batch: Batch
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The losses, and the validity of the student's and the teacher's instances."""
    shape = (FRAMES, SLOTS, INSTANCES, 64)
    reference = None
    if config.model.reference == "random":
        reference = keyed_other_frame(SEED, batch.index, REFERENCE_STREAM, FRAMES)
    outputs = [
        by_loops(
            config.model,
            weights,
            batch.views[:, view],
            keyed_normal(SEED, batch.index, stream, shape).double(),
            reference,
        )
        for view, weights, stream in (
            (0, student, STUDENT_NOISE_STREAM),
            (1, teacher, TEACHER_NOISE_STREAM),
        )
    ]
    ours, theirs = outputs
    settings = config.objective
    valid = [
        loops.valid(
            out["semantic_logits"],
            out["semantic_slots"],
            out["instance_slots"],
            mask_threshold=settings.mask_threshold,
            area=settings.area,
            similarity=settings.similarity,
        )
        for out in outputs
    ]
    losses = {
        "alignment": loops.alignment(
            ours["semantic_logits"],
            theirs["semantic_logits"],
            theirs["features"],
            epsilon=settings.epsilon,
            iterations=settings.iterations,
            marginals=settings.marginals,
            cost=settings.cost,
            reduction=settings.reduction,
        ),
        "regularisation": loops.regularisation(
            ours["semantic_logits"], reduction=settings.reduction
        ),
        "instance": loops.instance_consistency(
            ours["embeddings"],
            theirs["embeddings"],
            *valid,
            form=settings.form,
            margin=settings.margin,
            normaliser=settings.normaliser,
        ),
    }
    return {**losses, "loss": torch.stack(list(losses.values())).sum()}, valid[0], valid[1]


@pytest.mark.parametrize("preset", ["official_v2", "paper", "fixed"])
def test_losses_and_every_gradient(preset: str) -> None:
    config, method, batch = build(preset)
    student, teacher = weights_of(method.student), weights_of(method.teacher.model)

    expected, student_valid, teacher_valid = step_by_loops(config, student, teacher, batch)
    for valid in (student_valid, teacher_valid):
        assert 0.1 < valid.float().mean() < 0.9, "the inputs do not exercise the gating"
    got = method.training_step(batch, step=config.optim.encoder_from_step)  # it learns
    for name, value in expected.items():
        assert error(got[name], value) < 2e-6, name

    expected["loss"].backward()
    got["loss"].backward()
    errors = gradient_errors(
        {name: parameter.grad for name, parameter in method.student.named_parameters()},
        {name: leaf.grad for name, leaf in student.items()},
    )
    assert max(errors.values()) < 1e-5, errors
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


def test_two_equal_crops_need_no_warp_and_two_different_ones_do() -> None:
    _, method, batch = build("fixed")
    method, batch = method.float(), dataclasses.replace(batch, views=batch.views.float())
    plain = method.training_step(batch, step=0)
    same, shifted = (
        torch.tensor([[[0.1, 0.2, 0.5, 0.6, 0.0], [x, 0.2, 0.5, 0.6, 0.0]]] * CLIPS)
        for x in (0.1, 0.35)
    )
    warped = method.training_step(dataclasses.replace(batch, spatial=same), step=0)
    other = method.training_step(dataclasses.replace(batch, spatial=shifted), step=0)
    for name, value in plain.items():
        torch.testing.assert_close(warped[name], value, rtol=1e-4, atol=1e-5)
    # The teacher sees half of what the student sees; the rest has no target.
    assert 0.3 < other["alignment"] / plain["alignment"] < 0.7


def test_the_instance_loss_waits_for_its_step() -> None:
    config, method, batch = build("fixed")
    method.config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, instance_from_step=5)
    )
    before, after = (method.training_step(batch, step) for step in (4, 5))
    assert before["instance"] == 0 and after["instance"] != 0


def test_active_negatives_are_told_for_the_margin_alone() -> None:
    scalars = {}
    for preset in ("paper", "fixed"):
        _, method, batch = build(preset)
        scalars[preset] = method.training_step(batch, step=0)
    assert 0 <= scalars["paper"]["active_negatives"] <= 1
    assert "active_negatives" not in scalars["fixed"]
