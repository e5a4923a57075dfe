"""The three objectives against their written-out forms, on inputs that show the known mistakes."""

import pytest
import torch
from torch import Tensor

from smtc import objectives

from . import objectives_by_loops as loops

CLIPS, FRAMES, SLOTS, INSTANCES, WIDTH = 2, 3, 3, 4, 8
GRID = 4
SINKHORN = {"epsilon": 0.05, "iterations": 3}


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    difference = got.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())


def clustered_clip() -> tuple[Tensor, Tensor, Tensor]:
    """Teacher features [B,T,L,D] in clusters whose shares change from frame to frame (so uniform
    marginals cannot be met by moving mass inside clusters), logits [B,T,N,L] of student and teacher
    that follow the clusters loosely. float32.
    """
    generator = torch.Generator().manual_seed(0)
    positions = GRID * GRID
    centres = torch.randn(SLOTS, WIDTH, generator=generator)
    shares = torch.tensor([[12, 3, 1], [2, 12, 2], [4, 2, 10]])
    features, teacher = [], []
    for clip in range(CLIPS):
        for frame in range(FRAMES):
            counts = shares[(frame + clip) % len(shares)]
            label = torch.arange(SLOTS).repeat_interleave(counts)
            label = label[torch.randperm(positions, generator=generator)]
            noise = torch.randn(positions, WIDTH, generator=generator)
            features.append(centres[label] + 0.25 * noise)
            teacher.append(3 * torch.nn.functional.one_hot(label, SLOTS).float().T)
    features = torch.stack(features).unflatten(0, (CLIPS, FRAMES))
    teacher = torch.stack(teacher).unflatten(0, (CLIPS, FRAMES))
    teacher = teacher + 0.3 * torch.randn(teacher.shape, generator=generator)
    student = 0.5 * teacher + torch.randn(teacher.shape, generator=generator)
    return student, teacher, features


def alignments(fault: str | None = None, **settings: object) -> tuple[tuple[Tensor, Tensor], ...]:
    """(value, gradient) of the package, then of the written-out form with `fault`."""
    student, teacher, features = clustered_clip()
    ours = student.clone().requires_grad_()
    value = objectives.semantic_alignment(ours, teacher, features, **SINKHORN, **settings)
    (gradient,) = torch.autograd.grad(value, ours)
    theirs = student.double().requires_grad_()
    expected = loops.alignment(
        theirs, teacher.double(), features.double(), **SINKHORN, **settings, fault=fault
    )
    (expected_gradient,) = torch.autograd.grad(expected, theirs)
    return (value, gradient), (expected, expected_gradient)


@pytest.mark.parametrize("marginals", ["uniform", "l1"])
@pytest.mark.parametrize("cost", ["cosine", "dot"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_alignment(marginals: str, cost: str, reduction: str) -> None:
    got, expected = alignments(marginals=marginals, cost=cost, reduction=reduction)
    assert error(got[0], expected[0]) < 2e-6
    assert error(got[1], expected[1]) < 5e-6


@pytest.mark.parametrize("marginals", ["uniform", "l1"])
@pytest.mark.parametrize("fault", ["transposed", "marginal"])
def test_a_known_mistake_in_alignment_shows(marginals: str, fault: str) -> None:
    got, wrong = alignments(fault, marginals=marginals, cost="cosine", reduction="mean")
    assert error(got[1], wrong[1]) > 0.05


def test_settings_of_alignment_are_told_apart() -> None:
    def gradient(**changes: object) -> Tensor:
        settings = {"marginals": "uniform", "cost": "cosine", "reduction": "mean", **SINKHORN}
        student, teacher, features = clustered_clip()
        student.requires_grad_()
        value = objectives.semantic_alignment(student, teacher, features, **(settings | changes))
        return torch.autograd.grad(value, student)[0]

    plain = gradient()
    for change in ({"cost": "dot"}, {"reduction": "sum"}, {"epsilon": 0.2}, {"iterations": 1}):
        assert error(gradient(**change), plain) > 0.05, change
    assert error(gradient(marginals="l1"), plain) > 0.005


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_regularisation(reduction: str) -> None:
    student, _, _ = clustered_clip()
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    value = objectives.mask_regularisation(ours, reduction=reduction)
    expected = loops.regularisation(theirs, reduction=reduction)
    assert error(value, expected) < 2e-6
    gradients = torch.autograd.grad(value, ours)[0], torch.autograd.grad(expected, theirs)[0]
    assert error(*gradients) < 5e-6


def instances(form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings [B,T,N,P,D] of student and teacher and their validity [B,T,N,P].

    The slots of a semantic lie close together, the teacher's are the student's in another order
    and blurred (so neither the identity nor the greedy matching is the best), and both validities
    are mixed and differ.
    """
    generator = torch.Generator().manual_seed(5)
    semantics = torch.randn(CLIPS, 1, SLOTS, 1, WIDTH, generator=generator)
    objects = semantics + 0.6 * torch.randn(CLIPS, 1, SLOTS, INSTANCES, WIDTH, generator=generator)
    shape = (CLIPS, FRAMES, SLOTS, INSTANCES, WIDTH)
    student = objects + 0.5 * torch.randn(shape, generator=generator)
    order = torch.rand(shape[:-1], generator=generator).argsort(-1)
    shuffled = objects.expand(shape).gather(3, order.unsqueeze(-1).expand(shape))
    teacher = shuffled + 0.5 * torch.randn(shape, generator=generator)
    if form == "cosine":
        student, teacher = (torch.nn.functional.normalize(x, dim=-1) for x in (student, teacher))
    student_valid = torch.rand(shape[:-1], generator=generator) < 0.6
    teacher_valid = torch.rand(shape[:-1], generator=generator) < 0.5
    student_valid[0, :, 0] = False
    return student, teacher, student_valid, teacher_valid


# A greater margin than the presets' for the distances, so that many negatives count.
FORMS = {
    "cosine, batch": {"form": "cosine", "margin": 0.5, "normaliser": "batch"},
    "cosine, clip": {"form": "cosine", "margin": 0.5, "normaliser": "clip"},
    "l2_margin": {"form": "l2_margin", "margin": 2.5},
}


def consistencies(settings: dict, fault: str | None = None) -> tuple[tuple[Tensor, Tensor], ...]:
    """(value, gradient) of the package, then of the written-out form with `fault`."""
    student, teacher, *valid = instances(settings["form"])
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    value = objectives.instance_consistency(ours, teacher, *valid, **settings)
    expected = loops.instance_consistency(theirs, teacher.double(), *valid, **settings, fault=fault)
    gradients = torch.autograd.grad(value, ours)[0], torch.autograd.grad(expected, theirs)[0]
    return (value, gradients[0]), (expected, gradients[1])


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_instance_consistency(settings: dict) -> None:
    got, expected = consistencies(settings)
    assert error(got[0], expected[0]) < 2e-6
    assert error(got[1], expected[1]) < 5e-6


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("fault", ["identity", "greedy", "student", "unmatched", "gated", "pairs"])
def test_a_known_mistake_in_instance_consistency_shows(settings: dict, fault: str) -> None:
    got, wrong = consistencies(settings, fault)
    assert error(got[1], wrong[1]) > 0.05


def test_one_clip_without_valid_instances_tells_the_normalisers_apart() -> None:
    student, teacher, student_valid, teacher_valid = instances("cosine")
    student_valid[0] = False
    values = {}
    for normaliser in ("batch", "clip"):
        settings = {"form": "cosine", "margin": 0.5, "normaliser": normaliser}
        valid = student_valid, teacher_valid
        values[normaliser] = objectives.instance_consistency(student, teacher, *valid, **settings)
        expected = loops.instance_consistency(
            student.double(), teacher.double(), *valid, **settings
        )
        assert error(values[normaliser], expected) < 2e-6
    assert values["clip"] == pytest.approx(0.5 * float(values["batch"]), rel=1e-5)


@pytest.mark.parametrize("form", ["cosine", "l2_margin"])
def test_a_single_instance_slot_has_no_negatives(form: str) -> None:
    student, teacher, student_valid, teacher_valid = (x[:, :, :, :1] for x in instances(form))
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    settings = {"form": form, "margin": 0.5, "normaliser": "batch"}
    value = objectives.instance_consistency(ours, teacher, student_valid, teacher_valid, **settings)
    expected = loops.instance_consistency(
        theirs, teacher.double(), student_valid, teacher_valid, **settings
    )
    assert error(value, expected) < 2e-6
    gradients = torch.autograd.grad(value, ours)[0], torch.autograd.grad(expected, theirs)[0]
    assert error(*gradients) < 5e-6


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_no_valid_instance_means_zero_loss_and_gradient(settings: dict) -> None:
    student, teacher, student_valid, teacher_valid = instances(settings["form"])
    student.requires_grad_()
    value = objectives.instance_consistency(
        student, teacher, torch.zeros_like(student_valid), teacher_valid, **settings
    )
    assert float(value.detach()) == 0
    (gradient,) = torch.autograd.grad(value, student)
    assert not gradient.any()


def test_valid_instances() -> None:
    generator = torch.Generator().manual_seed(7)
    logits, _, _ = clustered_clip()
    semantic = torch.randn(CLIPS, FRAMES, SLOTS, WIDTH, generator=generator)
    instance = semantic.unsqueeze(3) + 1.5 * torch.randn(
        CLIPS, FRAMES, SLOTS, INSTANCES, WIDTH, generator=generator
    )
    seen = []
    for threshold, area, similarity in ((0.3, 0.2, 0.5), (0.5, 0.2, 0.5), (0.3, 0.4, 0.7)):
        settings = {"mask_threshold": threshold, "area": area, "similarity": similarity}
        got = objectives.valid_instances(logits, semantic, instance, **settings)
        expected = loops.valid(logits.double(), semantic.double(), instance.double(), **settings)
        assert got.dtype == torch.bool
        assert torch.equal(got, expected)
        assert 0.05 < got.float().mean() < 0.95
        seen.append(got)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
