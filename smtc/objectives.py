"""The losses of SMTC (Eq. 8–13) in terms of the operations of `smtc.kernels`.

The student's tensors carry no hat in the paper, the teacher's do; nothing flows back to the
teacher.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smtc import kernels
from smtc.config import ObjectiveConfig
from smtc.model import Output
from smtc.regions import region
from smtc.slots import slot_similarity

Impl = Literal["auto", "eager", "triton"]
Reduction = Literal["mean", "sum"]

MASK_DELTA = 1e-8


def semantic_alignment(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_features: Tensor,
    *,
    epsilon: float,
    iterations: int,
    marginals: Literal["uniform", "l1"],
    reduction: Reduction,
    cost: Literal["cosine", "dot"] = "cosine",
    impl: Impl = "auto",
) -> Tensor:
    """Semantic masks agree along the optimal transport between the teacher's frames (Eq. 8–9).

    Args:
        student_logits: `[B,T,N,L]`, before the softmax over N.
        teacher_logits: `[B,T,N,L]`.
        teacher_features: `[B,T,L,D]`.
        epsilon, iterations, marginals, cost: of the Sinkhorn iteration.
        reduction: "mean" over B and the T(T-1) ordered pairs, or "sum" over pairs and mean over B.

    Returns:
        A fp32 scalar, differentiable in `student_logits`.
    """
    targets = alignment_targets(
        teacher_logits,
        teacher_features,
        epsilon=epsilon,
        iterations=iterations,
        marginals=marginals,
        cost=cost,
        impl=impl,
    )
    alignment, _ = kernels.mask_losses(student_logits, targets, delta=MASK_DELTA, impl=impl)
    frames = student_logits.shape[1]
    return alignment * (frames * (frames - 1)) if reduction == "sum" else alignment


def alignment_targets(
    teacher_logits: Tensor,
    teacher_features: Tensor,
    *,
    epsilon: float,
    iterations: int,
    marginals: Literal["uniform", "l1"],
    cost: Literal["cosine", "dot"] = "cosine",
    sharpening: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """What every position of a frame should belong to according to the clip's other frames: fp32
    `[B,T,N,L]`.

    `sharpening` raises the teacher's masks to a power and renormalises them over N (ours).
    """
    # A power of a softmax, renormalised, is the softmax of the scaled logits.
    masks = (teacher_logits.detach().float() * sharpening).softmax(dim=2)
    return kernels.transport_alignment(
        teacher_features.detach(),
        masks,
        epsilon=epsilon,
        iterations=iterations,
        marginals=marginals,
        cost=cost,
        impl=impl,
    )


def mask_regularisation(
    student_logits: Tensor, *, reduction: Reduction = "mean", impl: Impl = "auto"
) -> Tensor:
    """Masks of different semantics overlap little: their cosine over ordered pairs n ≠ m (Eq. 10).

    `student_logits [B,T,N,L]`; "mean" over B, T and pairs, or "sum" over T and pairs and mean over
    B. A fp32 scalar.
    """
    _, regularisation = kernels.mask_losses(
        student_logits, torch.zeros_like(student_logits), delta=MASK_DELTA, impl=impl
    )
    return _reduce_regularisation(regularisation, student_logits.shape, reduction)


def _reduce_regularisation(mean: Tensor, shape: torch.Size, reduction: Reduction) -> Tensor:
    _, frames, slots, _ = shape
    return mean * (frames * slots * (slots - 1)) if reduction == "sum" else mean


def valid_instances(
    logits: Tensor,
    semantic_slots: Tensor,
    instance_slots: Tensor,
    *,
    mask_threshold: float,
    area: float,
    similarity: float,
) -> Tensor:
    """Which instance slots count (Eq. 11): bool `[B,T,N,P]`.

    The semantic covers at least `area` of the frame (share of positions whose softmax over N
    exceeds `mask_threshold`) and the instance slot's cosine with its semantic slot is at least
    `similarity`.

    Args:
        logits: semantic logits `[B,T,N,L]`.
        semantic_slots: `[B,T,N,D]`.
        instance_slots: `[B,T,N,P,D]`.
    """
    with torch.no_grad():
        covered = (logits.float().softmax(dim=2) > mask_threshold).float().mean(dim=-1)
        alike = slot_similarity(semantic_slots.float(), instance_slots.float())
        return (covered >= area).unsqueeze(-1) & (alike >= similarity)


def instance_consistency(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    *,
    form: Literal["cosine", "l2_margin"],
    margin: float,
    normaliser: Literal["batch", "clip"] = "batch",
    impl: Impl = "auto",
) -> Tensor:
    """Matched instances agree across frames, others keep a distance (Eq. 11–12): a fp32 scalar.

    Args:
        student_embeddings, teacher_embeddings: `[B,T,N,P,D]`; unit norm for the "cosine" form.
        student_valid, teacher_valid: bool `[B,T,N,P]`.
        form: "cosine" over all T² pairs (released code) or "l2_margin" over pairs of different
            frames (paper). margin: beyond which a negative counts: a cosine, or a distance.
            normaliser: of the "cosine" form: valid instances of the whole batch, or clip by clip.
    """
    return kernels.instance_consistency(
        student_embeddings,
        teacher_embeddings,
        student_valid,
        teacher_valid,
        form=form,
        margin=margin,
        normaliser=normaliser,
        impl=impl,
    )


class Losses(NamedTuple):
    """The weighted sum, its parts and what to watch; fp32 scalars."""

    loss: Tensor
    alignment: Tensor
    regularisation: Tensor
    instance: Tensor
    valid_share: Tensor
    """How many of the student's instances counted."""
    active_negatives: Tensor | None
    """Of the "l2_margin" form: the share of negatives nearer than the margin."""


def smtc_losses(
    student: Output,
    teacher: Output,
    config: ObjectiveConfig,
    *,
    spatial: Tensor | None = None,
    with_instances: bool = True,
    impl: Impl = "auto",
) -> Losses:
    """All of Eq. 13 from the two outputs; one read of the student's logits serves both mask losses.

    `spatial [B,2,5]` tells how the two views were cropped where they differ (see
    `warp_to_student`). `with_instances=False` leaves the instance loss out of the sum (and at 0).
    """
    with region("alignment"):
        targets = alignment_targets(
            teacher.semantic_logits,
            teacher.features,
            epsilon=config.epsilon,
            iterations=config.iterations,
            marginals=config.marginals,
            cost=config.cost,
            sharpening=config.teacher_sharpening,
            impl=impl,
        )
        if spatial is not None:
            targets = warp_to_student(targets, spatial, teacher.grid)
    logits = student.semantic_logits
    with region("mask losses"):
        alignment, regularisation = kernels.mask_losses(
            logits, targets, delta=MASK_DELTA, impl=impl
        )
    if config.reduction == "sum":
        frames = logits.shape[1]
        alignment = alignment * (frames * (frames - 1))
    regularisation = _reduce_regularisation(regularisation, logits.shape, config.reduction)

    student_valid = _valid(student, config)
    instance, active = torch.zeros_like(alignment), None
    if with_instances:
        compared = student.embeddings, teacher.embeddings, student_valid
        with region("instance"):
            instance = instance_consistency(
                *compared,
                _valid(teacher, config),
                form=config.form,
                margin=config.margin,
                normaliser=config.normaliser,
                impl=impl,
            )
            if config.form == "l2_margin":
                active = kernels.active_negatives(*compared, margin=config.margin, impl=impl)
    loss = (
        config.alignment_weight * alignment
        + config.regularisation_weight * regularisation
        + config.instance_weight * instance
    )
    valid_share = student_valid.float().mean()
    return Losses(loss, alignment, regularisation, instance, valid_share, active)


def _valid(output: Output, config: ObjectiveConfig) -> Tensor:
    return valid_instances(
        output.semantic_logits,
        output.semantic_slots,
        output.instance_slots,
        mask_threshold=config.mask_threshold,
        area=config.area,
        similarity=config.similarity,
    )


def warp_to_student(targets: Tensor, spatial: Tensor, grid: tuple[int, int]) -> Tensor:
    """Targets in the teacher's view, moved to the student's grid where the two views were cropped
    independently.

    `targets [B,T,N,L]`; `spatial [B,2,5]` holds x, y, width, height (shares of the frame) and flip
    (0 or 1) of the student's and the teacher's view. Places that the teacher does not see get
    target 0, so they have no loss.
    """
    batch, frames, slots, _ = targets.shape
    maps = targets.reshape(batch, frames * slots, *grid)
    places = _teacher_places(spatial.float(), grid)
    moved = F.grid_sample(maps, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.view(batch, frames, slots, -1)


def _teacher_places(spatial: Tensor, grid: tuple[int, int]) -> Tensor:
    """The student's token centres in the teacher's view, in [-1, 1]: `[B,h,w,2]` (x, y)."""
    student, teacher = spatial.unbind(dim=1)
    axes = []
    for axis, count in ((0, grid[1]), (1, grid[0])):
        centre = (torch.arange(count, device=spatial.device) + 0.5) / count
        place = centre.expand(len(spatial), -1)
        if axis == 0:
            place = torch.where(student[:, 4:] > 0.5, 1 - place, place)
        place = student[:, axis, None] + place * student[:, axis + 2, None]
        place = (place - teacher[:, axis, None]) / teacher[:, axis + 2, None]
        if axis == 0:
            place = torch.where(teacher[:, 4:] > 0.5, 1 - place, place)
        axes.append(2 * place - 1)
    x = axes[0][:, None, :].expand(-1, grid[0], -1)
    y = axes[1][:, :, None].expand(-1, -1, grid[1])
    return torch.stack([x, y], dim=-1)
