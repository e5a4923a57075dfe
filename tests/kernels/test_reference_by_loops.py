"""The oracle against loops over plain numbers, written from the method's description alone.

Everything in float64 on tiny, clustered, unbalanced clips; Sinkhorn here scales `exp(-cost/ε)`
where the oracle works on potentials.
"""

import itertools
import math

import pytest
import torch
from cases import clustered_clip, difference, normal, uniform

from smtc.kernels import reference

CLIPS, FRAMES, POSITIONS, WIDTH, SEMANTICS, SLOTS = 2, 3, 5, 4, 3, 3


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(a):
    return math.sqrt(dot(a, a))


def cosine(a, b):
    return dot(a, b) / (length(a) * length(b))


def transport_plan(cost, rows, columns, epsilon, iterations):
    """`diag(u) K diag(v)` after alternating scalings that start from v = 1."""
    kernel = [[math.exp(-value / epsilon) for value in line] for line in cost]
    v = [1.0] * len(columns)
    for _ in range(iterations):
        u = [mass / dot(line, v) for mass, line in zip(rows, kernel, strict=True)]
        v = [
            mass / sum(u[i] * kernel[i][k] for i in range(len(rows)))
            for k, mass in enumerate(columns)
        ]
    return [[u[i] * kernel[i][k] * v[k] for k in range(len(v))] for i in range(len(u))]


def frame_marginal(frame, marginals):
    if marginals == "uniform":
        return [1 / len(frame)] * len(frame)
    norms = [sum(abs(x) for x in point) / length(point) for point in frame]
    return [norm / sum(norms) for norm in norms]


def frame_cost(frame, other, cost):
    if cost == "cosine":
        return [[1 - cosine(a, b) for b in other] for a in frame]
    return [[-dot(a, b) / math.sqrt(len(a)) for b in other] for a in frame]


def all_plans(clip, epsilon, iterations, marginals, cost):
    """The plans of all ordered pairs (t,j) of one clip."""
    return {
        (t, j): transport_plan(
            frame_cost(clip[t], clip[j], cost),
            frame_marginal(clip[t], marginals),
            frame_marginal(clip[j], marginals),
            epsilon,
            iterations,
        )
        for t, j in itertools.permutations(range(len(clip)), 2)
    }


def softmax_over_slots(frame):
    """`[n][u]` logits to masks."""
    masks = [[0.0] * len(frame[0]) for _ in frame]
    for u in range(len(frame[0])):
        powers = [math.exp(line[u]) for line in frame]
        for n, power in enumerate(powers):
            masks[n][u] = power / sum(powers)
    return masks


def fixtures():
    features, teacher_masks = clustered_clip(CLIPS, FRAMES, POSITIONS, WIDTH, SEMANTICS)
    logits = 2 * normal(CLIPS, FRAMES, SEMANTICS, POSITIONS, seed=8)
    return features, teacher_masks, logits


SETTINGS = [("uniform", "cosine", 0.05), ("l1", "cosine", 0.1), ("uniform", "dot", 0.4)]


@pytest.mark.parametrize(("marginals", "cost", "epsilon"), SETTINGS)
def test_transport_plans(marginals, cost, epsilon):
    features, _, _ = fixtures()
    for clip in features.tolist():
        plans = all_plans(clip, epsilon, 3, marginals, cost)
        for (t, j), plan in plans.items():
            actual = reference.sinkhorn(
                torch.tensor([frame_cost(clip[t], clip[j], cost)], dtype=torch.float64),
                torch.tensor([frame_marginal(clip[t], marginals)], dtype=torch.float64),
                torch.tensor([frame_marginal(clip[j], marginals)], dtype=torch.float64),
                epsilon=epsilon,
                iterations=3,
            )
            torch.testing.assert_close(actual[0], torch.tensor(plan, dtype=torch.float64))


@pytest.mark.parametrize(("marginals", "cost", "epsilon"), SETTINGS)
def test_transport_targets(marginals, cost, epsilon):
    features, teacher_masks, _ = fixtures()
    expected = torch.zeros_like(teacher_masks)
    transposed = torch.zeros_like(teacher_masks)
    for b, clip in enumerate(features.tolist()):
        masks = teacher_masks[b].tolist()
        plans = all_plans(clip, epsilon, 3, marginals, cost)
        for (t, j), plan in plans.items():
            for n, u, v in itertools.product(range(SEMANTICS), range(POSITIONS), range(POSITIONS)):
                expected[b, t, n, u] += plan[u][v] * masks[j][n][v]
                transposed[b, t, n, u] += plans[j, t][v][u] * masks[j][n][v]
    settings = {"epsilon": epsilon, "iterations": 3, "marginals": marginals, "cost": cost}
    actual = reference.transport_alignment(features, teacher_masks, **settings)
    torch.testing.assert_close(actual, expected)
    assert difference(transposed, expected) > 0.05


@pytest.mark.parametrize("delta", [0.0, 1e-8, 0.01])
def test_alignment(delta):
    """Eq. 9 as printed, four sums deep, against the oracle's two steps."""
    features, teacher_masks, logits = fixtures()
    loss = 0.0
    for b, clip in enumerate(features.tolist()):
        plans = all_plans(clip, 0.05, 3, "uniform", "cosine")
        for (t, j), plan in plans.items():
            masks = softmax_over_slots(logits[b, t].tolist())
            teacher = teacher_masks[b, j].tolist()
            for u, v, n in itertools.product(range(POSITIONS), range(POSITIONS), range(SEMANTICS)):
                loss -= plan[u][v] * teacher[n][v] * math.log(masks[n][u] + delta)
    targets = reference.transport_alignment(features, teacher_masks, epsilon=0.05, iterations=3)
    alignment, _ = reference.mask_losses(logits, targets, delta=delta)
    assert float(alignment) == pytest.approx(loss / (CLIPS * FRAMES * (FRAMES - 1)), rel=1e-9)


def test_regularisation():
    _, teacher_masks, logits = fixtures()
    cosines = []
    for b, t in itertools.product(range(CLIPS), range(FRAMES)):
        masks = softmax_over_slots(logits[b, t].tolist())
        cosines += [cosine(a, b) for a, b in itertools.permutations(masks, 2)]
    _, regularisation = reference.mask_losses(logits, teacher_masks)
    assert float(regularisation) == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)


def instances(unit_norm):
    """Student and teacher slots, partners in another order, of any length unless `unit_norm`."""
    student = normal(CLIPS, FRAMES, SEMANTICS, SLOTS, WIDTH, seed=5)
    teacher = student[:, :, :, [2, 0, 1]].roll(1, 1) + 0.5 * normal(*student.shape, seed=6)
    if unit_norm:
        student = torch.nn.functional.normalize(student, dim=-1)
        teacher = torch.nn.functional.normalize(teacher, dim=-1)
    valid = [uniform(*student.shape[:-1], seed=seed) > 0.4 for seed in (7, 8)]
    valid[0][0, :, 0] = False  # so that clips have unequal numbers of valid slots
    return student, teacher, *valid


def best_matching(student, teacher):
    """The permutation of greatest total cosine."""
    return max(
        itertools.permutations(range(len(student))),
        key=lambda order: sum(cosine(student[p], teacher[q]) for p, q in enumerate(order)),
    )


def margin_loss(tensors, margin, matching=best_matching, gated=True):
    student, teacher, valid, teacher_valid = (tensor.tolist() for tensor in tensors)
    loss = 0.0
    for b, n in itertools.product(range(CLIPS), range(SEMANTICS)):
        for t, j in itertools.permutations(range(FRAMES), 2):
            own, others = student[b][t][n], teacher[b][j][n]
            order = matching(own, others)
            for p, q in itertools.product(range(SLOTS), repeat=2):
                distance = math.dist(own[p], others[q])
                if not valid[b][t][n][p]:
                    continue
                if q != order[p]:
                    loss += max(margin - distance, 0)
                elif teacher_valid[b][j][n][q] or not gated:
                    loss += distance
    return loss / CLIPS


def cosine_loss(tensors, margin, normaliser, matching=best_matching, gated=True):
    student, teacher, valid, teacher_valid = (tensor.tolist() for tensor in tensors)
    sums, counts = [0.0] * CLIPS, [0] * CLIPS
    for b, n in itertools.product(range(CLIPS), range(SEMANTICS)):
        for t, j in itertools.product(range(FRAMES), repeat=2):
            own, others = student[b][t][n], teacher[b][j][n]
            order = matching(own, others)
            for p in range(SLOTS):
                if not valid[b][t][n][p]:
                    continue
                counts[b] += 1
                similar = [dot(own[p], other) for other in others]
                negatives = [max(s - margin, 0) for q, s in enumerate(similar) if q != order[p]]
                sums[b] += sum(negatives) / len(negatives)
                if teacher_valid[b][j][n][order[p]] or not gated:
                    sums[b] -= similar[order[p]]
    if normaliser == "batch":
        return sum(sums) / sum(counts)
    return sum(s / max(c, 1) for s, c in zip(sums, counts, strict=True)) / CLIPS


def in_place(student, teacher):
    """A wrong matching: slot p with slot p."""
    return range(len(student))


def test_margin_form():
    tensors = instances(unit_norm=False)
    expected = margin_loss(tensors, 1.5)
    actual = reference.instance_consistency(*tensors, form="l2_margin", margin=1.5)
    assert float(actual) == pytest.approx(expected, rel=1e-12)
    assert margin_loss(tensors, 1.5, matching=in_place) != pytest.approx(expected, rel=0.05)
    assert margin_loss(tensors, 1.5, gated=False) != pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("normaliser", ["batch", "clip"])
def test_cosine_form(normaliser):
    tensors = instances(unit_norm=True)
    expected = cosine_loss(tensors, 0.2, normaliser)
    actual = reference.instance_consistency(
        *tensors, form="cosine", margin=0.2, normaliser=normaliser
    )
    assert float(actual) == pytest.approx(expected, rel=1e-9)
    wrong = cosine_loss(tensors, 0.2, normaliser, matching=in_place)
    assert wrong != pytest.approx(expected, rel=0.05)
    ungated = cosine_loss(tensors, 0.2, normaliser, gated=False)
    assert ungated != pytest.approx(expected, rel=0.05)
