"""instance_consistency and active_negatives against the oracle."""

import pytest
import torch
from cases import DTYPES, INSTANCES, compare, difference, normal, run, uniform, unit

from smtc import kernels
from smtc.kernels import eager, reference

FORMS = [("cosine", "batch"), ("cosine", "clip"), ("l2_margin", "batch")]


def inputs(case, share=0.6):
    """Teacher slots near the student's in another order: matching, gates and margins matter."""
    clips, frames, semantics, slots, _ = case
    student = unit(*case)
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(1))
    teacher = student.roll(1, 1)[:, :, :, order] + 0.4 * normal(*case, seed=2)
    teacher = torch.nn.functional.normalize(teacher, dim=-1)
    student_valid = uniform(clips, frames, semantics, slots, seed=3) < share
    teacher_valid = uniform(clips, frames, semantics, slots, seed=4) < share
    return [student, teacher, student_valid, teacher_valid]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "normaliser"), FORMS)
@pytest.mark.parametrize("case", INSTANCES, ids=str)
def test_agrees_with_the_oracle(case, form, normaliser, dtype):
    tensors = inputs(case)
    settings = {"form": form, "margin": 0.3, "normaliser": normaliser}
    if form == "l2_margin":
        # Raw slots have any length, and the matching is by cosine nevertheless.
        tensors[0] *= 3 * uniform(*case[:-1], 1, seed=5)
        tensors[1] *= 3 * uniform(*case[:-1], 1, seed=6)
        settings["margin"] = 2.0
    compare("instance_consistency", tensors, [0], dtype, **settings)


def test_margin_form_ignores_the_normaliser():
    tensors = inputs(INSTANCES[0])
    losses = [
        kernels.instance_consistency(*tensors, form="l2_margin", margin=1.0, normaliser=normaliser)
        for normaliser in ("batch", "clip")
    ]
    assert losses[0] == losses[1]


def test_normalisers_differ_when_clips_have_unequal_numbers_of_valid_slots():
    student, teacher, student_valid, teacher_valid = inputs(INSTANCES[0])
    student_valid[0, :, 1:] = False
    tensors = [student, teacher, student_valid, teacher_valid]

    def loss(normaliser):
        return kernels.instance_consistency(
            *tensors, form="cosine", margin=0.5, normaliser=normaliser
        )

    assert difference(loss("batch"), loss("clip")) > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "normaliser"), FORMS)
@pytest.mark.parametrize("module", [kernels, reference])
def test_no_valid_instance_gives_exactly_zero(module, form, normaliser, dtype):
    student, teacher, student_valid, teacher_valid = inputs(INSTANCES[0])
    tensors = [student.to(dtype), teacher.to(dtype), torch.zeros_like(student_valid), teacher_valid]
    settings = {"form": form, "margin": 0.5, "normaliser": normaliser}
    (loss,), (gradient,) = run(module.instance_consistency, tensors, [0], **settings)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("module", [kernels, reference])
def test_equal_embeddings_have_no_gradient_at_distance_zero(module):
    student = unit(1, 2, 2, 2, 6).float()
    student = student[:, :1].expand(-1, 2, -1, -1, -1).contiguous()
    valid = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    tensors = [student, student.clone(), valid, valid]
    settings = {"form": "l2_margin", "margin": 1e-3}
    (loss,), (gradient,) = run(module.instance_consistency, tensors, [0], **settings)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_small_distances_keep_their_precision():
    student = unit(1, 2, 1, 1, 32)
    student[:, 1] = student[:, 0]
    teacher = student + 1e-5 * unit(1, 2, 1, 1, 32, seed=1)
    valid = torch.ones(1, 2, 1, 1, dtype=torch.bool)
    compare(
        "instance_consistency",
        [student, teacher, valid, valid],
        [0],
        torch.float32,
        form="l2_margin",
        margin=0.5,
    )


@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
def test_teacher_gets_no_gradient(form):
    student, teacher, *valid = inputs(INSTANCES[0])
    teacher.requires_grad_()
    loss = kernels.instance_consistency(
        student.requires_grad_(), teacher, *valid, form=form, margin=0.5
    )
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_margin_form_matches_by_cosine_not_by_length():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, None, None]
    # By distance slot 0 would take the short vector, by cosine it takes the long one.
    teacher = torch.tensor([[9.0, 0.0], [0.3, 0.4]])[None, None, None]
    student, teacher = (t.expand(1, 2, 1, 2, 2).contiguous() for t in (student, teacher))
    valid = torch.ones(1, 2, 1, 2, dtype=torch.bool)
    loss = kernels.instance_consistency(
        student, teacher, valid, valid, form="l2_margin", margin=0.0
    )
    expected = 2 * (8.0 + (0.3**2 + 0.6**2) ** 0.5)
    assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize("module", [eager, reference])
@pytest.mark.parametrize(("form", "normaliser"), FORMS)
def test_gradcheck(module, form, normaliser):
    student, *rest = inputs((2, 2, 2, 3, 4))
    margin = 0.3 if form == "cosine" else 1.2
    assert torch.autograd.gradcheck(
        lambda x: module.instance_consistency(
            x, *rest, form=form, margin=margin, normaliser=normaliser
        ),
        [student.requires_grad_()],
    )


def test_active_negatives_are_counted():
    student, teacher, valid, _ = inputs(INSTANCES[0])
    active = total = 0
    for b, t, j, n in torch.cartesian_prod(*map(torch.arange, (2, 4, 4, 3))).tolist():
        if t == j:
            continue
        matching = reference.assignment(-student[b, t, n] @ teacher[b, j, n].T).tolist()
        for p in range(4):
            for q in range(4):
                if valid[b, t, n, p] and q != matching[p]:
                    total += 1
                    active += int((student[b, t, n, p] - teacher[b, j, n, q]).norm() < 1.3)
    assert 0 < active < total
    share = kernels.active_negatives(student.requires_grad_(), teacher, valid, margin=1.3)
    assert float(share) == pytest.approx(active / total)
    assert not share.requires_grad


@pytest.mark.parametrize("case", [INSTANCES[2], INSTANCES[3]], ids=["one slot", "one frame"])
def test_no_negatives_are_no_active_ones(case):
    student, teacher, valid, _ = inputs(case, share=1)
    assert kernels.active_negatives(student, teacher, valid, margin=9.0) == 0
