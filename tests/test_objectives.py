"""What the objectives promise beyond their formulas: reductions, sharpening, warping, the sum."""

import dataclasses

import pytest
import torch
from torch import Tensor

from smtc import objectives
from smtc.config import ObjectiveConfig
from smtc.model import Output

CLIPS, FRAMES, SLOTS, INSTANCES, WIDTH = 2, 3, 4, 3, 8
GRID = (4, 6)
SINKHORN = {"epsilon": 0.05, "iterations": 3, "marginals": "uniform"}


def output(seed: int, requires_grad: bool = False) -> Output:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(CLIPS, FRAMES, *shape, generator=generator)

    positions = GRID[0] * GRID[1]
    semantic = draw(SLOTS, WIDTH)
    instance = semantic.unsqueeze(3) + 0.8 * draw(SLOTS, INSTANCES, WIDTH)
    made = Output(
        features=draw(positions, WIDTH),
        semantic_slots=semantic,
        semantic_logits=2 * draw(SLOTS, positions),
        instance_slots=instance,
        instance_logits=draw(SLOTS, INSTANCES, positions),
        embeddings=torch.nn.functional.normalize(instance, dim=-1),
        grid=GRID,
    )
    if requires_grad:
        made = Output(*(part.requires_grad_() for part in made[:-1]), grid=GRID)
    return made


def test_alignment_reductions() -> None:
    student, teacher = output(0), output(1)
    arguments = student.semantic_logits, teacher.semantic_logits, teacher.features
    mean = objectives.semantic_alignment(*arguments, **SINKHORN, reduction="mean")
    total = objectives.semantic_alignment(*arguments, **SINKHORN, reduction="sum")
    torch.testing.assert_close(total, FRAMES * (FRAMES - 1) * mean)
    assert mean.dtype == torch.float32 and mean.shape == ()


def test_regularisation_reductions() -> None:
    logits = output(0).semantic_logits
    mean = objectives.mask_regularisation(logits)
    total = objectives.mask_regularisation(logits, reduction="sum")
    torch.testing.assert_close(total, FRAMES * SLOTS * (SLOTS - 1) * mean)


def test_regularisation_of_disjoint_equal_and_single_masks() -> None:
    disjoint = 50 * torch.eye(SLOTS).expand(CLIPS, FRAMES, -1, -1)
    assert float(objectives.mask_regularisation(disjoint)) < 1e-6
    equal = torch.zeros(CLIPS, FRAMES, SLOTS, 9)
    assert float(objectives.mask_regularisation(equal)) == pytest.approx(1, abs=1e-5)
    single = torch.randn(CLIPS, FRAMES, 1, 9)
    for reduction in ("mean", "sum"):
        assert float(objectives.mask_regularisation(single, reduction=reduction)) == 0


def test_nothing_flows_back_to_the_teacher() -> None:
    student, teacher = output(0, requires_grad=True), output(1, requires_grad=True)
    losses = objectives.smtc_losses(student, teacher, ObjectiveConfig())
    losses.loss.backward()
    assert student.semantic_logits.grad.any() and student.embeddings.grad.any()
    assert all(part.grad is None for part in teacher[:-1])


def targets_of(teacher: Output, sharpening: float) -> Tensor:
    return objectives.alignment_targets(
        teacher.semantic_logits, teacher.features, **SINKHORN, sharpening=sharpening
    )


def test_sharpening_by_two_squares_and_renormalises() -> None:
    teacher = output(1)
    squared = teacher.semantic_logits.softmax(2) ** 2
    renormalised = squared / squared.sum(2, keepdim=True)
    by_hand = teacher._replace(semantic_logits=renormalised.log())
    got, plain = targets_of(teacher, 2.0), targets_of(teacher, 1.0)
    torch.testing.assert_close(got, targets_of(by_hand, 1.0), rtol=1e-4, atol=1e-7)
    assert (got - plain).norm() > 0.05 * plain.norm()


PLACES = torch.arange(GRID[0] * GRID[1], dtype=torch.float32)
WHOLE = (0.0, 0.0, 1.0, 1.0, 0.0)


def warp(student: tuple[float, ...], teacher: tuple[float, ...], maps: Tensor) -> Tensor:
    """A warped map [rows, columns] of one clip, frame and slot."""
    spatial = torch.tensor([[student, teacher]])
    moved = objectives.warp_to_student(maps.reshape(1, 1, 1, -1), spatial, GRID)
    assert moved.shape == (1, 1, 1, GRID[0] * GRID[1])
    return moved.view(GRID)


@pytest.mark.parametrize(
    "view", [WHOLE, (0.2, 0.1, 0.5, 0.7, 0.0), (0.2, 0.1, 0.5, 0.7, 1.0)], ids=str
)
def test_two_equal_views_need_no_warp(view: tuple[float, ...]) -> None:
    torch.testing.assert_close(warp(view, view, PLACES), PLACES.view(GRID), rtol=0, atol=1e-4)


@pytest.mark.parametrize("flipped", [0, 1], ids=["student", "teacher"])
def test_a_flip_of_one_view_flips_the_targets(flipped: int) -> None:
    views = [WHOLE, WHOLE]
    views[flipped] = (*WHOLE[:4], 1.0)
    expected = PLACES.view(GRID).flip(1)
    torch.testing.assert_close(warp(*views, PLACES), expected, rtol=0, atol=1e-4)


def test_what_the_teacher_does_not_see_is_zero() -> None:
    ones = torch.ones(GRID[0] * GRID[1])
    left, right = (0.0, 0.0, 0.4, 1.0, 0.0), (0.6, 0.0, 0.4, 1.0, 0.0)
    assert not warp(left, right, ones).any()
    # The teacher sees the frame's upper half, the student all of it.
    half = warp(WHOLE, (0.0, 0.0, 1.0, 0.5, 0.0), ones)
    assert half[:2].min() > 0.5 and not half[2:].any()


def test_a_crop_moves_targets_to_where_the_student_sees_them() -> None:
    # A map that grows linearly is interpolated without error away from the border.
    rows, columns = torch.meshgrid(*(torch.arange(n) + 0.5 for n in GRID), indexing="ij")
    for maps, axis in ((columns / GRID[1], 0), (rows / GRID[0], 1)):
        student = (0.25, 0.3, 0.5, 0.4, 0.0)
        moved = warp(student, WHOLE, maps)
        place = (columns / GRID[1], rows / GRID[0])[axis]
        expected = student[axis] + place * student[axis + 2]
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)
        # Mirrored, the student's first column shows the crop's right border.
        mirrored = warp((*student[:4], 1.0), WHOLE, maps)
        torch.testing.assert_close(mirrored, expected.flip(1), rtol=0, atol=1e-5)


def test_clips_and_slots_are_warped_on_their_own() -> None:
    targets = torch.rand(2, 3, 4, GRID[0] * GRID[1])
    flip = (*WHOLE[:4], 1.0)
    moved = objectives.warp_to_student(
        targets, torch.tensor([[WHOLE, WHOLE], [flip, WHOLE]]), GRID
    ).view(2, 3, 4, *GRID)
    expected = targets.view(2, 3, 4, *GRID)
    torch.testing.assert_close(moved[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[1], expected[1].flip(-1), rtol=0, atol=1e-5)


CONFIG = ObjectiveConfig(
    alignment_weight=2.0, regularisation_weight=3.0, instance_weight=5.0, reduction="sum"
)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, reduction="mean", marginals="l1", normaliser="batch"),
        dataclasses.replace(CONFIG, form="l2_margin", cost="dot", mask_threshold=0.5),
        dataclasses.replace(CONFIG, teacher_sharpening=2.0, area=0.1, similarity=0.7, margin=0.1),
    ],
)
def test_the_sum_is_made_of_its_parts(config: ObjectiveConfig) -> None:
    student, teacher = output(0), output(1)
    losses = objectives.smtc_losses(student, teacher, config)
    scale = FRAMES * (FRAMES - 1) if config.reduction == "sum" else 1
    targets = objectives.alignment_targets(
        teacher.semantic_logits,
        teacher.features,
        epsilon=config.epsilon,
        iterations=config.iterations,
        marginals=config.marginals,
        cost=config.cost,
        sharpening=config.teacher_sharpening,
    )
    masks = student.semantic_logits.softmax(2)
    alignment = -(targets * (masks + 1e-8).log()).sum() / (CLIPS * FRAMES * (FRAMES - 1)) * scale
    torch.testing.assert_close(losses.alignment, alignment, rtol=1e-5, atol=0)
    regularisation = objectives.mask_regularisation(
        student.semantic_logits, reduction=config.reduction
    )
    torch.testing.assert_close(losses.regularisation, regularisation)
    valid = [
        objectives.valid_instances(
            out.semantic_logits,
            out.semantic_slots,
            out.instance_slots,
            mask_threshold=config.mask_threshold,
            area=config.area,
            similarity=config.similarity,
        )
        for out in (student, teacher)
    ]
    instance = objectives.instance_consistency(
        student.embeddings,
        teacher.embeddings,
        *valid,
        form=config.form,
        margin=config.margin,
        normaliser=config.normaliser,
    )
    torch.testing.assert_close(losses.instance, instance)
    torch.testing.assert_close(losses.valid_share, valid[0].float().mean())
    assert 0 < losses.valid_share < 1 and valid[0].ne(valid[1]).any() and losses.instance != 0
    expected = 2 * losses.alignment + 3 * losses.regularisation + 5 * losses.instance
    torch.testing.assert_close(losses.loss, expected)


def test_without_instances_their_loss_is_zero_and_has_no_gradient() -> None:
    student, teacher = output(0, requires_grad=True), output(1)
    config = ObjectiveConfig(reduction="mean")
    losses = objectives.smtc_losses(student, teacher, config, with_instances=False)
    losses.loss.backward()
    assert float(losses.instance) == 0 and student.embeddings.grad is None
    torch.testing.assert_close(losses.loss, losses.alignment + losses.regularisation)
    assert student.semantic_logits.grad.any()
