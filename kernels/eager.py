"""The best plain-torch form of the operations: what a CPU runs, and what kernels must beat.

Arguments, shapes and switches as in `ops.py`, which has checked them and detached what takes no
gradient.
"""

import functools
import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .precision import compute_dtype, upcast, without_autocast

# Bytes of one intermediate of the pairs of frames that transport_alignment works on at a time: a
# CPU is fastest inside its cache, a GPU with many pairs a launch.
PAIR_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}
# The most slots whose matchings are enumerated (24 of them); above, dynamic programming is cheaper.
LARGEST_ENUMERATED = 4


def projects_reference_first(
    batch: int, positions: int, references: int, inputs: int, width: int, outputs: int
) -> bool:
    """Whether `Q (W R)ᵀ` is cheaper than `(Q Rᵀ) Wᵀ`: L > D where L = M, D = E and R = B."""
    reference_first = references * inputs * width * outputs + batch * positions * width * outputs
    correlation_first = batch * positions * inputs * (width + outputs)
    return reference_first < correlation_first


@without_autocast
def correlation_projection(
    query: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
) -> Tensor:
    """Two matrix products, in the order with fewer multiplications."""
    batch, positions, width = query.shape
    references, inputs, _ = reference.shape
    outputs = len(weight)
    weight = weight.to(query.dtype)
    bias = None if bias is None else bias.to(query.dtype)
    if projects_reference_first(batch, positions, references, inputs, width, outputs):
        projection = weight @ reference  # [R,E,D]
        out = query @ (projection if index is None else projection[index]).mT
        return out if bias is None else out + bias
    correlation = query @ (reference if index is None else reference[index]).mT  # [B,L,M]
    return functional.linear(correlation, weight, bias)


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
    """All groups in one product each way; the second one in the values' dtype."""
    groups, slots = queries.shape[1:3]
    dtype = compute_dtype(queries, keys, values)
    flat, keys = queries.flatten(1, 2).to(dtype), keys.to(dtype)
    if logit_bias is None:
        logits = (flat * scale) @ keys.mT
    else:
        bias = logit_bias.to(dtype).flatten(1, 2)[..., None]
        logits = torch.baddbmm(bias, flat, keys.mT, alpha=scale)
    logits = logits.unflatten(1, (groups, slots))
    weights = torch.softmax(logits, dim=2) + epsilon
    if mask is None:
        attention = weights / weights.sum(-1, keepdim=True)
    else:
        weights = weights * mask[:, :, None].to(dtype)
        attention = weights / (weights.sum(-1, keepdim=True) + 1e-8)
    updates = attention.flatten(1, 2).to(values.dtype) @ values
    return updates.unflatten(1, (groups, slots)), logits if return_logits else None


def _log_potentials(
    score: Tensor, log_rows: Tensor, log_columns: Tensor, iterations: int
) -> list[tuple[Tensor, Tensor]]:
    """Row and column potentials after each iteration on `score = -cost/ε`, from 0."""
    column = torch.zeros_like(log_columns)
    potentials = []
    for _ in range(iterations):
        row = log_rows - torch.logsumexp(score + column[:, None, :], dim=2)
        column = log_columns - torch.logsumexp(score + row[:, :, None], dim=1)
        potentials.append((row, column))
    return potentials


def _exp_sum(score: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`exp(score[l,m] + row[l] + column[m])`, with one temporary."""
    return (score + row[:, :, None]).add_(column[:, None, :]).exp_()


class _Sinkhorn(torch.autograd.Function):
    """Autograd would keep two matrices an iteration; this keeps the cost and the potentials."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, rows: Tensor, columns: Tensor, epsilon: float, iterations: int
    ) -> Tensor:
        score = cost / -epsilon
        potentials = _log_potentials(score, rows.log(), columns.log(), iterations)
        ctx.save_for_backward(cost, rows, columns, *itertools.chain(*potentials))
        ctx.epsilon = epsilon
        return _exp_sum(score, *potentials[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_plan: Tensor) -> tuple[Tensor | None, ...]:
        cost, rows, columns, *potentials = ctx.saved_tensors
        score, log_rows, log_columns = cost / -ctx.epsilon, rows.log(), columns.log()
        grad_score = _exp_sum(score, *potentials[-2:]).mul_(grad_plan)
        grad_row, grad_column = grad_score.sum(2), grad_score.sum(1)
        grad_log_rows, grad_log_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for step in reversed(range(0, len(potentials), 2)):
            row, column = potentials[step : step + 2]
            # column = log_columns - logsumexp(score + row) over the rows
            share = _exp_sum(score, row, column - log_columns).mul_(grad_column[:, None, :])
            grad_log_columns += grad_column
            grad_score -= share
            grad_row = grad_row - share.sum(2)
            # row = log_rows - logsumexp(score + the previous column) over the columns
            previous = potentials[step - 1] if step else torch.zeros_like(column)
            share = _exp_sum(score, row - log_rows, previous).mul_(grad_row[:, :, None])
            grad_log_rows += grad_row
            grad_score -= share
            grad_column, grad_row = -share.sum(1), torch.zeros_like(row)
        grad_cost = grad_score.div_(-ctx.epsilon)
        return grad_cost, grad_log_rows / rows, grad_log_columns / columns, None, None


@without_autocast
def sinkhorn(
    cost: Tensor,
    row_marginal: Tensor,
    column_marginal: Tensor,
    *,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """Log domain, with an analytic gradient."""
    if column_marginal is row_marginal:
        column_marginal = column_marginal.clone()  # the compiler refuses one tensor given twice
    return _Sinkhorn.apply(*upcast(cost, row_marginal, column_marginal), epsilon, iterations)


def scaling_is_safe(cost: str, epsilon: float) -> bool:
    """Whether `K = exp(-cost/ε)` stays normal in float32: a cosine cost is at most 2."""
    return cost == "cosine" and epsilon >= 0.025


def _scaling_targets(
    kernel: Tensor, rows: Tensor, columns: Tensor, masks: Tensor, iterations: int
) -> Tensor:
    """`Σ_v π[u,v] masks[n,v]` `[C,N,L]` with `π = diag(x) K diag(y)`, which is never formed."""
    y = torch.ones_like(columns)[..., None]
    for _ in range(iterations):
        x = rows[..., None] / (kernel @ y)
        y = columns[..., None] / (kernel.mT @ x)
    return ((masks * y.mT) @ kernel.mT) * x.mT


def _log_targets(
    score: Tensor, rows: Tensor, columns: Tensor, masks: Tensor, iterations: int
) -> Tensor:
    """`Σ_v π[u,v] masks[n,v]` `[C,N,L]` in the log domain."""
    potentials = _log_potentials(score, rows.log(), columns.log(), iterations)
    return masks @ _exp_sum(score, *potentials[-1]).mT


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
    """One Gram matrix for both directions of a pair of frames, pairs batched in chunks.

    Only the cost is shared: (j,t) starts with its own rows, the columns of the shared matrix.
    """
    clips, frames, positions, width = features.shape
    features, masks = upcast(features, masks)
    points, masks = features.flatten(0, 1), masks.flatten(0, 1)  # [BT,L,D], [BT,N,L]
    unit = functional.normalize(points, dim=-1)
    marginal = torch.full_like(unit[..., 0], 1 / positions)
    if marginals == "l1":
        marginal = functional.normalize(unit.abs().sum(-1), p=1, dim=-1)
    if cost == "cosine":
        points, shift, slope = unit, 1.0, 1 / epsilon
    else:
        shift, slope = 0.0, 1 / (epsilon * math.sqrt(width))
    scaling = scaling_is_safe(cost, epsilon)
    contract = _scaling_targets if scaling else _log_targets

    earlier, later = torch.triu_indices(frames, frames, 1, device=points.device)
    offset = frames * torch.arange(clips, device=points.device)[:, None]
    first, second = (offset + earlier).flatten(), (offset + later).flatten()
    # A place for each ordered pair, so that the sum over j has one order on every device.
    parts = masks.new_zeros(clips * frames, frames, *masks.shape[1:])
    bytes_a_pair = positions * max(positions, width) * points.element_size()
    chunk = max(1, PAIR_CHUNK_BYTES.get(points.device.type, 2**25) // bytes_a_pair)
    for t, j in zip(first.split(chunk), second.split(chunk), strict=True):
        matrix = (points[t] @ points[j].mT).sub_(shift).mul_(slope)  # -cost/ε [C,L,L]
        if scaling:
            matrix.exp_()
        parts[t, j % frames] = contract(matrix, marginal[t], marginal[j], masks[j], iterations)
        parts[j, t % frames] = contract(matrix.mT, marginal[j], marginal[t], masks[t], iterations)
    return parts.sum(1).unflatten(0, (clips, frames))


class _MaskLosses(torch.autograd.Function):
    """Keeps the masks and the targets; autograd would keep six tensors of their size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, delta: float) -> tuple[Tensor, Tensor]:
        clips, frames, slots, _ = logits.shape
        masks = torch.softmax(logits, dim=2)
        log_masks = (masks + delta).log_() if delta > 0 else torch.log_softmax(logits, dim=2)
        ctx.save_for_backward(masks, targets)
        ctx.delta = delta
        ctx.pairs = max(clips, 1) * max(frames * (frames - 1), 1)
        ctx.slot_pairs = max(clips, 1) * frames * max(slots * (slots - 1), 1)
        unit = functional.normalize(masks, dim=-1)
        cosines = unit @ unit.mT  # [B,T,N,N]
        alignment = -(log_masks.mul_(targets)).sum() / ctx.pairs
        return alignment, 2 * cosines.triu_(1).sum() / ctx.slot_pairs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_alignment: Tensor, grad_regularisation: Tensor
    ) -> tuple[Tensor | None, ...]:
        masks, targets = ctx.saved_tensors
        pull = targets * masks / (masks + ctx.delta) if ctx.delta > 0 else targets
        grad = (masks * pull.sum(2, keepdim=True) - pull) * (grad_alignment / ctx.pairs)

        norms = torch.linalg.vector_norm(masks, dim=-1, keepdim=True).clamp_min(1e-12)
        unit = masks / norms
        # The sum need not leave out a slot's own mask: the projection removes it.
        total = unit.sum(2, keepdim=True)
        grad_masks = (total - unit * (unit * total).sum(-1, keepdim=True)) / norms
        grad_masks *= 2 * grad_regularisation / ctx.slot_pairs
        grad += masks * (grad_masks - (masks * grad_masks).sum(2, keepdim=True))
        return grad, None, None


@without_autocast
def mask_losses(logits: Tensor, targets: Tensor, *, delta: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Both losses from one softmax, with its gradient written out."""
    return _MaskLosses.apply(*upcast(logits, targets), delta)


@torch.compiler.assume_constant_result  # a compiler would make the table in each call
def _permutations(size: int, device: torch.device) -> Tensor:
    """All permutations `[P!,P]` in lexicographic order."""
    return _cached_permutations(size, device)


@functools.cache
def _cached_permutations(size: int, device: torch.device) -> Tensor:
    return torch.tensor(list(itertools.permutations(range(size))), device=device)


@torch.compiler.assume_constant_result
def _subset_steps(size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """A row's free columns `[S,P-r]` for each set of r taken ones, and the sets they lead to."""
    return _cached_subset_steps(size, device)


@functools.cache
def _cached_subset_steps(size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    steps = []
    for row in range(size):
        states = list(itertools.combinations(range(size), row))
        following = {
            state: place for place, state in enumerate(itertools.combinations(range(size), row + 1))
        }
        free = [[column for column in range(size) if column not in state] for state in states]
        leads = [
            [following[tuple(sorted((*state, column)))] for column in columns]
            for state, columns in zip(states, free, strict=True)
        ]
        steps.append((torch.tensor(free, device=device), torch.tensor(leads, device=device)))
    return steps


def assignment(cost: Tensor) -> Tensor:
    """Enumeration for few slots, else dynamic programming over sets of columns; no host copy."""
    size = cost.shape[-1]
    batch = cost.shape[:-2]
    # Sums of float32 costs are exact in float64: ties do not depend on the order of summation.
    cost = cost.detach().double().reshape(-1, size, size)
    if size <= LARGEST_ENUMERATED:
        table = _permutations(size, cost.device)
        totals = cost[:, torch.arange(size, device=cost.device), table].sum(-1)  # [C,P!]
        return table[totals.argmin(-1)].reshape(*batch, size)

    steps = _subset_steps(size, cost.device)
    best = cost.new_zeros(len(cost), 1)  # cost of the rows below, for every set of taken columns
    choices: list[Tensor] = []
    for row in reversed(range(size)):
        free, leads = steps[row]
        best, choice = (cost[:, row, free] + best[:, leads]).min(-1)  # [C,S]; the first of equals
        choices.insert(0, choice)
    state = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    columns = []
    for (free, leads), choice in zip(steps, choices, strict=True):
        chosen = choice.gather(1, state[:, None])[:, 0]
        columns.append(free[state, chosen])
        state = leads[state, chosen]
    return torch.stack(columns, -1).reshape(*batch, size)


def _instance_pairs(embeddings: Tensor) -> Tensor:
    """`[B,T,N,P,D]` -> `[B,N,TP,D]`."""
    return embeddings.transpose(1, 2).flatten(2, 3)


def _by_frames(pairwise: Tensor, frames: int) -> Tensor:
    """`[B,N,TP,TP]` -> `[B,N,T,T,P,P]`: student and teacher frame, student and teacher slot."""
    return pairwise.unflatten(3, (frames, -1)).unflatten(2, (frames, -1)).transpose(3, 4)


def _matched(similarity: Tensor) -> Tensor:
    """True where teacher slot q is the partner of student slot p, `[...,P,P]`."""
    columns = torch.arange(similarity.shape[-1], device=similarity.device)
    return assignment(-similarity)[..., None] == columns


def _distances(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of student to teacher slots, and which are matched: `[B,N,T,T,P,P]` each.

    cdist differences directly: the Gram form loses small distances, and at 0 cdist's gradient is 0.
    """
    frames = student.shape[1]
    student, teacher = _instance_pairs(student), _instance_pairs(teacher)
    distance = torch.cdist(student, teacher, compute_mode="donot_use_mm_for_euclid_dist")
    own = functional.normalize(student.detach(), dim=-1)
    cosine = own @ functional.normalize(teacher, dim=-1).mT
    return _by_frames(distance, frames), _matched(_by_frames(cosine, frames))


def _other_frames(valid: Tensor) -> Tensor:
    """`[B,T,N,P]` -> `[B,N,T,T,P,1]`: student slot valid and the teacher's frame another."""
    frames = valid.shape[1]
    others = ~torch.eye(frames, dtype=torch.bool, device=valid.device)
    return valid.transpose(1, 2)[:, :, :, None, :, None] & others[:, :, None, None]


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
    """All pairs of frames from one product or one cdist; the matching is a mask, not a gather."""
    student, teacher = upcast(student_embeddings, teacher_embeddings)
    frames, slots = student.shape[1], student.shape[3]
    partner_valid = teacher_valid.transpose(1, 2)[:, :, None, :, None, :]  # [B,N,1,T,1,P]
    if form == "l2_margin":
        distance, matched = _distances(student, teacher)
        term = torch.where(matched, distance * partner_valid, torch.relu(margin - distance))
        return (term * _other_frames(student_valid)).sum() / max(len(student), 1)

    similarity = _by_frames(_instance_pairs(student) @ _instance_pairs(teacher).mT, frames)
    matched = _matched(similarity)
    repulsion = torch.relu(similarity - margin) / max(slots - 1, 1)
    term = torch.where(matched, -similarity * partner_valid, repulsion)
    valid = student_valid.transpose(1, 2)[:, :, :, None, :, None]  # [B,N,T,1,P,1]
    total = (term * valid).flatten(1).sum(1)  # [B]
    count = frames * student_valid.flatten(1).sum(1).to(total.dtype)
    if normaliser == "batch":
        return total.sum() / (count.sum() + 1e-10)
    return (total / count.clamp_min(1)).sum() / max(len(student), 1)


@without_autocast
def active_negatives(
    student_embeddings: Tensor, teacher_embeddings: Tensor, student_valid: Tensor, *, margin: float
) -> Tensor:
    """The share of the margin form's negatives that are nearer than the margin."""
    distance, matched = _distances(*upcast(student_embeddings, teacher_embeddings))
    negative = ~matched & _other_frames(student_valid)
    active = negative & (distance < margin)
    return (active.sum() / negative.sum().clamp_min(1)).to(distance.dtype)
