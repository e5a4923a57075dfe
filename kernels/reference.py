"""The oracle: the equations of the method, literal and slow.

Arguments, shapes and switches as in `ops.py`. Every function computes and returns at least float32
(float64 where an input is), with autocast off, and is differentiated by autograd.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from .precision import upcast, without_autocast


@without_autocast
def correlation_projection(
    query: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
) -> Tensor:
    """Eq. 2-3: `C_tj = F_t F_jᵀ`, `h_c(C_tj) = C_tj Wᵀ + b`, with j = index[t]."""
    query, reference, weight = upcast(query, reference, weight)
    frames = range(len(query)) if index is None else index.tolist()
    projected = []
    for t, j in enumerate(frames):
        correlation = query[t] @ reference[j].T  # [L,M]
        projected.append(correlation @ weight.T)
    out = torch.stack(projected)
    return out if bias is None else out + bias.to(out.dtype)


@without_autocast
def masked_slot_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    epsilon: float,
    logit_bias: Tensor | None = None,
    return_logits: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Eq. 4-5 without a mask, Eq. 7 with one, ε where the authors' code has it."""
    queries, keys, values = upcast(queries, keys, values)
    logits = scale * torch.einsum("bgpd,bld->bgpl", queries, keys)
    if logit_bias is not None:
        logits = logits + logit_bias[..., None].to(logits.dtype)
    weights = torch.softmax(logits, dim=2) + epsilon  # over the slots of a group
    if mask is None:
        attention = weights / weights.sum(-1, keepdim=True)
    else:
        weights = weights * mask[:, :, None].to(weights.dtype)
        attention = weights / (weights.sum(-1, keepdim=True) + 1e-8)
    updates = torch.einsum("bgpl,bld->bgpd", attention, values)
    return updates, logits if return_logits else None


@without_autocast
def sinkhorn(
    cost: Tensor,
    row_marginal: Tensor,
    column_marginal: Tensor,
    *,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """Eq. 8 by Sinkhorn-Knopp on potentials: `π = exp(f + g - cost/ε)`, rows first, from g = 0."""
    cost, row_marginal, column_marginal = upcast(cost, row_marginal, column_marginal)
    score = -cost / epsilon
    column_potential = torch.zeros_like(column_marginal)
    for _ in range(iterations):
        rows = torch.logsumexp(score + column_potential[:, None, :], dim=2)
        row_potential = row_marginal.log() - rows
        columns = torch.logsumexp(score + row_potential[:, :, None], dim=1)
        column_potential = column_marginal.log() - columns
    return torch.exp(row_potential[:, :, None] + score + column_potential[:, None, :])


@without_autocast
def transport_alignment(
    features: Tensor,
    masks: Tensor,
    *,
    epsilon: float,
    iterations: int,
    marginals: str = "uniform",
    cost: str = "cosine",
) -> Tensor:
    """The targets of Eq. 9: `O_t[n,u] = Σ_{j≠t} Σ_v π_tj[u,v] M̂_j[n,v]`, each π_tj by Eq. 8."""
    features, masks = upcast(features, masks)
    frames, positions, width = features.shape[1:]
    unit = functional.normalize(features, dim=-1)
    if marginals == "uniform":
        marginal = torch.full_like(unit[..., 0], 1 / positions)
    else:
        marginal = unit.abs().sum(-1)
        marginal = marginal / marginal.sum(-1, keepdim=True)
    targets = torch.zeros_like(masks)
    for t, j in itertools.permutations(range(frames), 2):
        if cost == "cosine":
            pair_cost = 1 - unit[:, t] @ unit[:, j].mT
        else:
            pair_cost = -features[:, t] @ features[:, j].mT / math.sqrt(width)
        plan = sinkhorn(
            pair_cost, marginal[:, t], marginal[:, j], epsilon=epsilon, iterations=iterations
        )
        targets[:, t] += (plan[:, None] * masks[:, j, :, None, :]).sum(-1)  # [B,N,L,L] -> [B,N,L]
    return targets


@without_autocast
def mask_losses(logits: Tensor, targets: Tensor, *, delta: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Eq. 9 given its targets, and Eq. 10, both as means; `M = softmax_N(logits)`."""
    logits, targets = upcast(logits, targets)
    clips, frames, slots, _ = logits.shape
    masks = torch.softmax(logits, dim=2)
    log_masks = torch.log(masks + delta) if delta > 0 else torch.log_softmax(logits, dim=2)
    alignment = -(targets * log_masks).sum() / (clips * max(frames * (frames - 1), 1))

    regularisation = torch.zeros_like(alignment)
    unit = functional.normalize(masks, dim=-1)
    for n, m in itertools.permutations(range(slots), 2):
        cosine = (unit[:, :, n] * unit[:, :, m]).sum(-1)  # [B,T]
        regularisation = regularisation + cosine.mean() / (slots * (slots - 1))
    return alignment, regularisation


def assignment(cost: Tensor) -> Tensor:
    """The matching ε of Eq. 12: the lexicographically first permutation of least total cost."""
    size = cost.shape[-1]
    cost = cost.detach().double()
    permutations = torch.tensor(list(itertools.permutations(range(size))), device=cost.device)
    totals = sum(cost[..., row, permutations[:, row]] for row in range(size))  # [...,P!]
    assert isinstance(totals, Tensor)
    return permutations[totals.argmin(-1)]


@without_autocast
def instance_consistency(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    *,
    form: str,
    margin: float,
    normaliser: str = "batch",
) -> Tensor:
    """Eq. 12 (`l2_margin`), or the cosine form of the authors' code, over all pairs of frames."""
    student, teacher = upcast(student_embeddings, teacher_embeddings)
    clips, frames, _, slots, _ = student.shape
    total = student.new_zeros(clips)
    count = student.new_zeros(clips)
    for t, j in itertools.product(range(frames), repeat=2):
        if form == "l2_margin" and t == j:
            continue
        matching = assignment(-_similarity(student[:, t], teacher[:, j], form))  # [B,N,P]
        valid = student_valid[:, t].to(student.dtype)  # [B,N,P]
        partner_valid = teacher_valid[:, j].gather(-1, matching).to(student.dtype)
        for p, q in itertools.product(range(slots), repeat=2):
            matched = matching[..., p] == q  # [B,N]
            own, other = student[:, t, :, p], teacher[:, j, :, q]  # [B,N,D]
            if form == "cosine":
                cosine = (own * other).sum(-1)
                attraction = -partner_valid[..., p] * cosine
                repulsion = torch.relu(cosine - margin) / max(slots - 1, 1)
            else:
                distance = torch.linalg.vector_norm(own - other, dim=-1)
                attraction = partner_valid[..., p] * distance
                repulsion = torch.relu(margin - distance)
            term = torch.where(matched, attraction, repulsion)
            total = total + (valid[..., p] * term).sum(-1)
        count = count + valid.sum((1, 2))
    if form == "l2_margin":
        return total.mean()
    if normaliser == "batch":
        return total.sum() / (count.sum() + 1e-10)
    return (total / count.clamp_min(1)).mean()


def _similarity(student: Tensor, teacher: Tensor, form: str) -> Tensor:
    """Cosines `[B,N,P,P]`; embeddings of the cosine form arrive with unit norm."""
    if form == "l2_margin":
        student, teacher = (
            functional.normalize(student, dim=-1),
            functional.normalize(teacher, dim=-1),
        )
    return student @ teacher.mT
