"""The objectives, written out with loops over clips, frames, slots and positions.

Plain differentiable torch, meant for float64. `fault` makes one of the known mistakes on purpose,
so that a test can prove that it would see it.
"""

import itertools
import math

import torch
from torch import Tensor

from .smtc_by_loops import norm, relu, softmax


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (norm(a) * norm(b))


def plan(
    at: Tensor,
    other: Tensor,
    *,
    epsilon: float,
    iterations: int,
    marginals: str,
    cost: str,
) -> Tensor:
    """The transport plan [L,L] of features [L,D] of frames t and j, in the linear domain."""
    unit_t = at / norm(at)[:, None]
    unit_j = other / norm(other)[:, None]
    costs = {
        "cosine": 1 - unit_t @ unit_j.T,
        "dot": -(at @ other.T) / math.sqrt(at.shape[-1]),
    }[cost]
    if marginals == "uniform":
        rows = torch.full_like(unit_t[:, 0], 1 / at.shape[0])
        columns = torch.full_like(unit_j[:, 0], 1 / other.shape[0])
    else:
        rows = unit_t.abs().sum(-1) / unit_t.abs().sum()
        columns = unit_j.abs().sum(-1) / unit_j.abs().sum()
    kernel = torch.exp(-costs / epsilon)
    v = torch.ones_like(columns)
    for _ in range(iterations):
        u = rows / (kernel @ v)
        v = columns / (kernel.T @ u)
    return u[:, None] * kernel * v[None, :]


def alignment(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_features: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    marginals: str,
    reduction: str,
    cost: str = "cosine",
    fault: str | None = None,
) -> Tensor:
    """Eq. 8-9 on student logits [B,T,N,L], teacher logits [B,T,N,L], teacher features [B,T,L,D].

    `fault` makes a known mistake: "transposed" takes plan(j,t) for the transpose of plan(t,j),
    "marginal" makes the targets of each position sum to its marginal.
    """
    clips, frames = student_logits.shape[:2]
    student = softmax(student_logits, 2)
    teacher = softmax(teacher_logits, 2).detach()
    features = teacher_features.detach()
    settings = {
        "epsilon": epsilon,
        "iterations": iterations,
        "marginals": marginals,
        "cost": cost,
    }
    total = torch.zeros((), dtype=student.dtype)
    for b in range(clips):
        for t, j in itertools.permutations(range(frames), 2):
            transport = plan(features[b, t], features[b, j], **settings)
            if fault == "transposed" and t > j:
                transport = plan(features[b, j], features[b, t], **settings).T
            if fault == "marginal":
                transport = transport / transport.sum(1, keepdim=True) / len(transport)
            for u in range(student.shape[-1]):
                for n in range(student.shape[2]):
                    target = (transport[u] * teacher[b, j, n]).sum()
                    total = total - target * torch.log(student[b, t, n, u] + 1e-8)
    pairs = frames * (frames - 1) if reduction == "mean" else 1
    return total / (clips * pairs)


def regularisation(student_logits: Tensor, *, reduction: str) -> Tensor:
    """Eq. 10."""
    clips, frames, slots = student_logits.shape[:3]
    masks = softmax(student_logits, 2)
    total = torch.zeros((), dtype=masks.dtype)
    for b, t in itertools.product(range(clips), range(frames)):
        for n, m in itertools.permutations(range(slots), 2):
            total = total + cosine(masks[b, t, n], masks[b, t, m])
    count = frames * slots * (slots - 1) if reduction == "mean" else 1
    return total / (clips * count)


def valid(
    logits: Tensor,
    semantic_slots: Tensor,
    instance_slots: Tensor,
    *,
    mask_threshold: float,
    area: float,
    similarity: float,
) -> Tensor:
    """Which instance slots count, bool [B,T,N,P]."""
    masks = softmax(logits, 2)
    out = torch.zeros(instance_slots.shape[:-1], dtype=torch.bool)
    for b, t, n, p in itertools.product(*(range(size) for size in out.shape)):
        share = (masks[b, t, n] > mask_threshold).double().mean()
        near = cosine(semantic_slots[b, t, n], instance_slots[b, t, n, p])
        out[b, t, n, p] = bool(share >= area) and bool(near >= similarity)
    return out


def best_matching(student: Tensor, teacher: Tensor) -> tuple[int, ...]:
    """The order of the teacher's slots [P,D] with the greatest summed cosine: all are tried."""
    count = student.shape[0]
    near = [[float(cosine(a, b)) for b in teacher] for a in student]
    return max(
        itertools.permutations(range(count)),
        key=lambda order: sum(near[p][order[p]] for p in range(count)),
    )


def greedy_matching(student: Tensor, teacher: Tensor) -> tuple[int, ...]:
    """The wrong matching that takes the nearest pair left, again and again."""
    count = student.shape[0]
    near = {
        (p, q): float(cosine(student[p], teacher[q])) for p in range(count) for q in range(count)
    }
    matched = {}
    while near:
        p, q = max(near, key=lambda pair: near[pair])
        matched[p] = q
        near = {pair: value for pair, value in near.items() if pair[0] != p and pair[1] != q}
    return tuple(matched[p] for p in range(count))


def instance_consistency(
    student: Tensor,
    teacher: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    *,
    form: str,
    margin: float,
    normaliser: str = "batch",
    fault: str | None = None,
) -> Tensor:
    """Eq. 11-12 on embeddings [B,T,N,P,D].

    `fault` makes a known mistake: "identity" or "greedy" matching, validity of the "student" used
    for the teacher's, validity read at p instead of its partner ("unmatched"), "gated" negatives,
    or the frame "pairs" of the other form.
    """
    clips, frames, slots, count, _ = student.shape
    teacher = teacher.detach()
    sums, counts = [], []
    for b in range(clips):
        total = torch.zeros((), dtype=student.dtype)
        terms = 0
        for t, j, n in itertools.product(range(frames), range(frames), range(slots)):
            if t == j and (form == "l2_margin") != (fault == "pairs"):
                continue
            ours, theirs = student[b, t, n], teacher[b, j, n]
            matched = best_matching(ours.detach(), theirs)
            if fault == "identity":
                matched = tuple(range(count))
            if fault == "greedy":
                matched = greedy_matching(ours.detach(), theirs)
            for p in range(count):
                if not student_valid[b, t, n, p]:
                    continue
                terms += 1
                partner_valid = float(teacher_valid[b, j, n, matched[p]])
                if fault == "student":
                    partner_valid = float(student_valid[b, j, n, matched[p]])
                if fault == "unmatched":
                    partner_valid = float(teacher_valid[b, j, n, p])
                others = [q for q in range(count) if q != matched[p]]
                if form == "l2_margin":
                    total = total + partner_valid * norm(ours[p] - theirs[matched[p]])
                    repelled = [relu(margin - norm(ours[p] - theirs[q])) for q in others]
                    scale = 1.0
                else:
                    total = total - partner_valid * (ours[p] * theirs[matched[p]]).sum()
                    repelled = [relu((ours[p] * theirs[q]).sum() - margin) for q in others]
                    scale = 1 / max(len(others), 1)
                for q, term in zip(others, repelled, strict=True):
                    gate = float(teacher_valid[b, j, n, q]) if fault == "gated" else 1.0
                    total = total + scale * gate * term
        sums.append(total)
        counts.append(terms)
    if form == "l2_margin":
        return torch.stack(sums).sum() / clips
    if normaliser == "batch":
        return torch.stack(sums).sum() / (sum(counts) + 1e-10)
    return torch.stack([s / max(c, 1) for s, c in zip(sums, counts, strict=True)]).mean()
