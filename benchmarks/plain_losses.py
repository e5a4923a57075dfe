"""The losses of the plain reference step (`plain.py`): Eq. 8–13 in loops over pairs of frames.

Every ordered pair gets its own cost, its own Sinkhorn iteration in the log domain and its own
`[B,N,L,L]` product; the instances of each pair are matched one problem at a time on the host.

Letters: B clips, T frames, L positions, D width, N semantic slots, P instance slots a semantic.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from smtc.benchmarks.plain_model import Found
from smtc.config import ObjectiveConfig
from smtc.kernels import eager
from smtc.regions import region

MASK_DELTA = 1e-8

Matching = Callable[[Tensor], Tensor]
"""Similarities `[B,N,P,P]` of student to teacher slots to each student slot's partner `[B,N,P]`."""


def losses(
    student: Found,
    teacher: Found,
    config: ObjectiveConfig,
    *,
    with_instances: bool,
    batched_pairs: bool = False,
    batched_assignment: bool = False,
) -> dict[str, Tensor]:
    """The weighted sum under `loss` and its three parts, scalars; nothing flows to the teacher.

    `with_instances=False` leaves the instance loss out. The switches are the reliefs of `plain.py`.
    """
    mask_losses = batched_mask_losses if batched_pairs else looped_mask_losses
    with region("alignment"):  # and, read from the same masks, the regularisation
        alignment, regularisation = mask_losses(
            student.semantic_logits, teacher_masks(teacher, config), teacher.features, config
        )
    instance = torch.zeros_like(alignment)
    if with_instances:
        with region("instance"):
            instance = instance_consistency(
                student.embeddings,
                teacher.embeddings,
                valid_instances(student, config),
                valid_instances(teacher, config),
                config,
                match_batched if batched_assignment else match_one_by_one,
            )
    loss = config.alignment_weight * alignment + config.regularisation_weight * regularisation
    loss = loss + config.instance_weight * instance
    return {
        "loss": loss,
        "alignment": alignment,
        "regularisation": regularisation,
        "instance": instance,
    }


def teacher_masks(teacher: Found, config: ObjectiveConfig) -> Tensor:
    """The teacher's semantic masks `[B,T,N,L]`, raised to a power and renormalised if asked for."""
    masks = teacher.semantic_logits.softmax(dim=2)
    if config.teacher_sharpening == 1:
        return masks
    masks = masks**config.teacher_sharpening
    return masks / masks.sum(dim=2, keepdim=True)


def looped_mask_losses(
    logits: Tensor, teacher: Tensor, features: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Alignment and regularisation of student logits `[B,T,N,L]` with the teacher's masks
    `[B,T,N,L]` and features `[B,T,L,D]`.
    """
    masks = logits.softmax(dim=2)
    alignment = semantic_alignment(masks, teacher, features, config)
    return alignment, mask_regularisation(masks, config)


def batched_mask_losses(
    logits: Tensor, teacher: Tensor, features: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """The same from the project's best plain-torch form, which batches the pairs."""
    targets = eager.transport_alignment(
        features,
        teacher,
        epsilon=config.epsilon,
        iterations=config.iterations,
        marginals=config.marginals,
        cost=config.cost,
    )
    alignment, regularisation = eager.mask_losses(logits, targets, delta=MASK_DELTA)
    if config.reduction == "sum":  # the operation gives means
        frames, slots = logits.shape[1:3]
        alignment = alignment * (frames * (frames - 1))
        regularisation = regularisation * (frames * slots * (slots - 1))
    return alignment, regularisation


def semantic_alignment(
    masks: Tensor, teacher: Tensor, features: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Eq. 8–9 for the student's masks, the teacher's masks (`[B,T,N,L]`) and features
    `[B,T,L,D]`.
    """
    clips, frames = masks.shape[:2]
    log_masks = torch.log(masks + MASK_DELTA)
    unit = functional.normalize(features, dim=-1)
    marginals = _marginals(unit, config)
    total = torch.zeros_like(log_masks[0, 0, 0, 0])
    for t, j in itertools.permutations(range(frames), 2):
        if config.cost == "cosine":
            cost = 1 - unit[:, t] @ unit[:, j].mT  # [B,L,L]
        else:
            cost = -features[:, t] @ features[:, j].mT / math.sqrt(features.shape[-1])
        plan = sinkhorn(cost, marginals[:, t], marginals[:, j], config)
        carried = (plan.unsqueeze(1) * teacher[:, j].unsqueeze(2)).sum(dim=-1)  # [B,N,L,L], summed
        total = total - (carried * log_masks[:, t]).sum()
    pairs = frames * (frames - 1) if config.reduction == "mean" else 1
    return total / (clips * pairs)


def _marginals(unit: Tensor, config: ObjectiveConfig) -> Tensor:
    """How much each position has to give and to take, `[B,T,L]`, from unit features."""
    if config.marginals == "uniform":
        return torch.full_like(unit[..., 0], 1 / unit.shape[2])
    norms = unit.abs().sum(dim=-1)
    return norms / norms.sum(dim=-1, keepdim=True)


def sinkhorn(cost: Tensor, rows: Tensor, columns: Tensor, config: ObjectiveConfig) -> Tensor:
    """The plan `[B,L,L]` of `cost` for marginals `[B,L]`: log domain, rows first, from v = 1."""
    scores = -cost / config.epsilon
    log_v = torch.zeros_like(columns)
    for _ in range(config.iterations):
        log_u = rows.log() - torch.logsumexp(scores + log_v.unsqueeze(1), dim=2)
        log_v = columns.log() - torch.logsumexp(scores + log_u.unsqueeze(2), dim=1)
    return torch.exp(log_u.unsqueeze(2) + scores + log_v.unsqueeze(1))


def mask_regularisation(masks: Tensor, config: ObjectiveConfig) -> Tensor:
    """Eq. 10: the cosine between masks `[B,T,N,L]` of different semantics."""
    clips, frames, slots = masks.shape[:3]
    unit = functional.normalize(masks, dim=-1)
    same = torch.eye(slots, dtype=torch.bool, device=masks.device)
    cosines = (unit @ unit.mT).masked_fill(same, 0)  # [B,T,N,N]
    pairs = frames * max(slots * (slots - 1), 1) if config.reduction == "mean" else 1
    return cosines.sum() / (clips * pairs)


@torch.no_grad()
def valid_instances(found: Found, config: ObjectiveConfig) -> Tensor:
    """Eq. 11: bool `[B,T,N,P]`; a large enough semantic, an instance near enough to it."""
    covered = found.semantic_logits.softmax(dim=2) > config.mask_threshold
    large = covered.to(found.features.dtype).mean(dim=-1) >= config.area  # [B,T,N]
    cosine = functional.cosine_similarity(
        found.semantic_slots.unsqueeze(3), found.instance_slots, dim=-1
    )
    return large.unsqueeze(-1) & (cosine >= config.similarity)


def match_one_by_one(similarity: Tensor) -> Tensor:
    """SciPy's assignment for each clip and semantic, on the host."""
    problems = similarity.double().cpu().numpy()
    clips, semantics, slots, _ = problems.shape
    partners = np.empty((clips, semantics, slots), dtype=np.int64)
    for b, n in itertools.product(range(clips), range(semantics)):
        _, partners[b, n] = linear_sum_assignment(problems[b, n], maximize=True)
    return torch.from_numpy(partners).to(similarity.device)


def match_batched(similarity: Tensor) -> Tensor:
    """All clips and semantics at once, where the similarities are."""
    return eager.assignment(-similarity)


def instance_consistency(
    student: Tensor,
    teacher: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    config: ObjectiveConfig,
    match: Matching,
) -> Tensor:
    """Eq. 12, or the released cosine form, of embeddings `[B,T,N,P,D]` and bool `[B,T,N,P]`."""
    clips, frames = student.shape[:2]
    term = _cosine_term if config.form == "cosine" else _margin_term
    total, count = student.new_zeros(clips), student.new_zeros(clips)
    for t, j in itertools.product(range(frames), repeat=2):
        if config.form == "l2_margin" and t == j:
            continue
        ours, theirs = student[:, t], teacher[:, j]  # [B,N,P,D]
        partner = match(_similarity(ours.detach(), theirs, config))  # [B,N,P]
        matched, others = _partner_and_others(theirs, partner)
        matched_valid = teacher_valid[:, j].gather(2, partner).to(ours.dtype)
        valid = student_valid[:, t].to(ours.dtype)
        values = valid * term(ours, matched, others, matched_valid, config.margin)
        total = total + values.sum(dim=(1, 2))
        count = count + valid.sum(dim=(1, 2))
    if config.form == "l2_margin":
        return total.sum() / clips
    if config.normaliser == "batch":
        return total.sum() / (count.sum() + 1e-10)
    return (total / count.clamp(min=1)).mean()


def _similarity(ours: Tensor, theirs: Tensor, config: ObjectiveConfig) -> Tensor:
    """Cosines of student with teacher slots, `[B,N,P,P]`; of the cosine form's unit embeddings the
    dot products.
    """
    if config.form == "l2_margin":
        ours, theirs = functional.normalize(ours, dim=-1), functional.normalize(theirs, dim=-1)
    return ours @ theirs.mT


def _partner_and_others(theirs: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Each student slot's teacher slot `[B,N,P,D]`, and the P-1 others `[B,N,P,P-1,D]`."""
    slots, width = theirs.shape[2:]
    matched = theirs.gather(2, partner.unsqueeze(-1).expand(-1, -1, -1, width))
    others = (partner.unsqueeze(-1) + torch.arange(1, slots, device=partner.device)) % slots
    everyone = theirs.unsqueeze(2).expand(-1, -1, slots, -1, -1)  # [B,N,P,P,D]
    return matched, everyone.gather(3, others.unsqueeze(-1).expand(-1, -1, -1, -1, width))


def _cosine_term(
    ours: Tensor, matched: Tensor, others: Tensor, matched_valid: Tensor, margin: float
) -> Tensor:
    """`mean_q relu(cos - margin) - valid · cos` of each student slot, `[B,N,P]`."""
    attraction = (ours * matched).sum(dim=-1)
    repulsion = torch.relu((ours.unsqueeze(3) * others).sum(dim=-1) - margin).sum(dim=-1)
    return repulsion / max(others.shape[3], 1) - matched_valid * attraction


def _margin_term(
    ours: Tensor, matched: Tensor, others: Tensor, matched_valid: Tensor, margin: float
) -> Tensor:
    """`valid · distance + Σ_q relu(margin - distance)` of each student slot, `[B,N,P]`."""
    attraction = torch.linalg.vector_norm(ours - matched, dim=-1)
    distances = torch.linalg.vector_norm(ours.unsqueeze(3) - others, dim=-1)
    return matched_valid * attraction + torch.relu(margin - distances).sum(dim=-1)
