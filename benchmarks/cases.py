"""The inputs that tests and benchmarks share: small odd cases for parity, the paper's for speed.

Parity cases are float64 tensors on the CPU, drawn from fixed seeds. `at_size` gives the setting of
one training step (32 clips of 4 frames, D 384, N 16, P 4) at L positions on any device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Inputs = list[Tensor | None]


@dataclass(frozen=True)
class Case:
    """One call of an operation: `inputs()` in order, gradients of those in `wanted`, settings."""

    op: str
    name: str
    inputs: Callable[[], Inputs] = field(repr=False)
    wanted: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    factor: float = 1

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def generator(seed: int = 0) -> torch.Generator:
    """A generator with a fixed start."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Uniform float64 in 0…1."""
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Random directions along the last axis."""
    return functional.normalize(normal(*shape, seed=seed), dim=-1)


# B, L, R, M, D, E and the index
CORRELATION = [
    (2, 63, 2, 63, 24, 24, None),
    (2, 63, 2, 63, 72, 80, None),
    (2, 16, 2, 16, 40, 40, None),
    (1, 257, 1, 16, 8, 5, None),
    (3, 1, 2, 1, 1, 1, [1, 1, 0]),
    (4, 10, 3, 40, 5, 7, [2, 0, 2, 2]),
    (4, 9, 3, 4, 30, 31, [2, 0, 2, 2]),
    (2, 17, 1, 20, 70, 600, [0, 0]),
]
# B, G, P, L, D
SLOTS = [
    (2, 1, 16, 63, 24),
    (2, 5, 4, 257, 16),
    (1, 3, 1, 7, 5),
    (1, 1, 1, 1, 1),
    (1, 2, 3, 40, 72),
]
# B, L, M
TRANSPORT_MATRICES = [(2, 63, 63), (1, 257, 31), (3, 1, 5), (2, 4, 1), (1, 1, 1)]
# B, T, L, D, N
CLIPS = [(2, 4, 63, 24, 5), (1, 3, 257, 16, 1), (2, 2, 1, 3, 2), (1, 1, 6, 4, 3)]
# B, T, N, P, D
INSTANCES = [(2, 4, 3, 4, 24), (1, 3, 1, 5, 7), (2, 2, 3, 1, 4), (1, 1, 2, 3, 5), (1, 2, 1, 8, 6)]
INSTANCE_FORMS = [("cosine", "batch"), ("cosine", "clip"), ("l2_margin", "batch")]


def correlation_inputs(case: tuple[Any, ...]) -> Inputs:
    """Query, reference, weight and bias of a row of `CORRELATION`."""
    batch, positions, references, inner, width, outputs, _ = case
    return [
        normal(batch, positions, width),
        normal(references, inner, width, seed=1),
        normal(outputs, inner, seed=2),
        normal(outputs, seed=3),
    ]


def slot_inputs(case: tuple[int, ...], masked: bool = True) -> Inputs:
    """Queries, keys, values and mask of a row of `SLOTS`; one group of the mask is empty."""
    batch, groups, slots, positions, width = case
    mask = uniform(batch, groups, positions, seed=3) > 0.4 if masked else None
    if mask is not None:
        mask[0, 0] = False
    return [
        normal(batch, groups, slots, width),
        normal(batch, positions, width, seed=1),
        normal(batch, positions, width, seed=2),
        mask,
    ]


def sinkhorn_inputs(case: tuple[int, ...], scale: float = 1.0) -> Inputs:
    """Cost and marginals of a row of `TRANSPORT_MATRICES`."""
    batch, rows, columns = case
    row_marginal = uniform(batch, rows, seed=1) ** 2 + 0.01
    column_marginal = uniform(batch, columns, seed=2) ** 2 + 0.01
    return [
        scale * uniform(batch, rows, columns),
        row_marginal / row_marginal.sum(-1, keepdim=True),
        column_marginal / column_marginal.sum(-1, keepdim=True),
    ]


def clustered_clip(clips: int, frames: int, positions: int, width: int, slots: int) -> Inputs:
    """Features in three clusters, whose shares differ between frames, and masks that follow."""
    centres = normal(3, width, seed=1)
    shares = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6], [0.5, 0.45, 0.05]])
    labels = torch.stack(
        [
            torch.multinomial(shares[t % 4], positions, replacement=True, generator=generator(t))
            for t in range(clips * frames)
        ]
    ).view(clips, frames, positions)
    features = centres[labels] + 0.3 * normal(clips, frames, positions, width, seed=2)
    by_cluster = 3 * normal(3, slots, seed=3)
    masks = (by_cluster[labels] + normal(clips, frames, positions, slots, seed=4)).softmax(-1)
    return [features, masks.transpose(2, 3).contiguous()]


def mask_loss_inputs(case: tuple[int, ...]) -> Inputs:
    """Logits and targets of a row of `CLIPS`."""
    clips, frames, positions, _, slots = case
    logits = 2 * normal(clips, frames, slots, positions)
    return [logits, uniform(clips, frames, slots, positions, seed=1) / positions]


def instance_inputs(case: tuple[int, ...], form: str = "cosine", share: float = 0.6) -> Inputs:
    """Teacher slots near the student's in another order: matching, gates and margins matter.

    Unit norm in the cosine form; any length in the other, whose matching is by cosine all the same.
    """
    clips, frames, semantics, slots, _ = case
    student = unit(*case)
    order = torch.randperm(slots, generator=generator(1))
    teacher = student.roll(1, 1)[:, :, :, order] + 0.4 * normal(*case, seed=2)
    teacher = functional.normalize(teacher, dim=-1)
    if form == "l2_margin":
        student = student * 3 * uniform(*case[:-1], 1, seed=5)
        teacher = teacher * 3 * uniform(*case[:-1], 1, seed=6)
    student_valid = uniform(clips, frames, semantics, slots, seed=3) < share
    teacher_valid = uniform(clips, frames, semantics, slots, seed=4) < share
    return [student, teacher, student_valid, teacher_valid]


def _cases() -> list[Case]:
    """Every operation's parity cases."""
    found = []

    def add(op: str, name: str, make: Callable[[], Inputs], *wanted: int, **settings: Any) -> None:
        factor = settings.pop("factor", 1)
        found.append(Case(op, name, make, wanted, settings, factor))

    for row in CORRELATION:
        index = None if row[-1] is None else torch.tensor(row[-1])
        make = lambda row=row: correlation_inputs(row)  # noqa: E731
        add("correlation_projection", str(row), make, 0, 1, 2, 3, index=index)
    for row in SLOTS:
        for masked in (False, True):
            make = lambda row=row, masked=masked: slot_inputs(row, masked)  # noqa: E731
            name = f"{row}{' masked' if masked else ''}"
            add("masked_slot_attention", name, make, 0, 1, 2, scale=0.3, epsilon=1e-8)
    for row in TRANSPORT_MATRICES:
        for iterations in (1, 3):
            make = lambda row=row: sinkhorn_inputs(row)  # noqa: E731
            name = f"{row} {iterations} iterations"
            add("sinkhorn", name, make, 0, 1, 2, epsilon=0.1, iterations=iterations)
    for epsilon in (0.5, 0.05, 0.025, 0.005):
        for scale in (1, 100):
            # cost/ε is rounded to its dtype before it is exponentiated, in any form of the
            # algorithm.
            factor = max(1, 0.1 * scale / epsilon)
            make = lambda scale=scale: sinkhorn_inputs((2, 31, 40), scale)  # noqa: E731
            name = f"epsilon {epsilon} cost scale {scale}"
            settings = {"epsilon": epsilon, "iterations": 5, "factor": factor}
            add("sinkhorn", name, make, 0, 1, 2, **settings)
    for row in CLIPS:
        for cost in ("cosine", "dot"):
            for marginals in ("uniform", "l1"):
                make = lambda row=row: clustered_clip(*row)  # noqa: E731
                settings = {"cost": cost, "marginals": marginals, "epsilon": 0.1, "iterations": 3}
                add("transport_alignment", f"{row} {cost} {marginals}", make, **settings)
    for epsilon in (0.5, 0.05, 0.025, 0.02, 0.005):
        make = lambda: clustered_clip(2, 4, 40, 16, 5)  # noqa: E731
        settings = {"epsilon": epsilon, "iterations": 3, "marginals": "l1"}
        settings["factor"] = max(1, 0.5 / epsilon)
        add("transport_alignment", f"epsilon {epsilon}", make, **settings)
    for row in CLIPS:
        for delta in (0.0, 1e-8, 0.1):
            make = lambda row=row: mask_loss_inputs(row)  # noqa: E731
            add("mask_losses", f"{row} delta {delta}", make, 0, delta=delta)
    for size in range(1, 9):
        make = lambda size=size: [normal(8, size, size)]  # noqa: E731
        add("assignment", f"P {size}", make)
    for row in INSTANCES:
        for form, normaliser in INSTANCE_FORMS:
            make = lambda row=row, form=form: instance_inputs(row, form)  # noqa: E731
            margin = 2.0 if form == "l2_margin" else 0.3
            settings = {"form": form, "margin": margin, "normaliser": normaliser}
            add("instance_consistency", f"{row} {form} {normaliser}", make, 0, **settings)
    return found


CASES = _cases()


def parity_cases(op: str) -> list[Case]:
    """The small cases of one operation."""
    return [case for case in CASES if case.op == op]


OPERATIONS = tuple(dict.fromkeys(case.op for case in CASES))
SETTINGS = (256, 1024, 1500)
"""Positions: 256² at patch 16, 256² at stride 8, 480×800 at patch 16."""


def at_size(
    op: str,
    positions: int,
    device: str,
    dtype: torch.dtype,
    *,
    clips: int = 32,
    frames: int = 4,
    width: int = 384,
    semantics: int = 16,
    slots: int = 4,
) -> list[Case]:
    """The calls of `op` in one training step: one case, or the two stages of slot attention."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def valid() -> Tensor:
        return torch.rand(clips, frames, semantics, slots, device=device) < 0.6

    batch, length = clips * frames, positions

    def case(name: str, make: Callable[[], Inputs], *wanted: int, **settings: Any) -> Case:
        return Case(op, f"L{positions}{name}", make, wanted, settings)

    if op == "correlation_projection":
        shared = (draw(width, length) / math.sqrt(length), draw(width))
        make = lambda: [draw(batch, length, width), draw(batch, length, width), *shared]  # noqa: E731
        index = torch.arange(batch, device=device).view(clips, frames).roll(1, 1).flatten()
        return [case("", make, 0, 1, 2, 3, index=index)]
    if op == "masked_slot_attention":
        scale = {"scale": 1 / math.sqrt(width), "epsilon": 1e-8}

        def stage(groups: int, members: int, masked: bool) -> Inputs:
            mask = torch.rand(batch, groups, length, device=device) > 0.7 if masked else None
            inputs = draw(batch, length, width)
            # Keys and values are one tensor: the projections are folded into the queries and
            # after the updates.
            return [draw(batch, groups, members, width), inputs, inputs, mask]

        return [
            case(" semantic", lambda: stage(1, semantics, False), 0, 1, **scale),
            case(" instance", lambda: stage(semantics, slots, True), 0, 1, **scale),
        ]
    if op == "sinkhorn":
        pairs = clips * frames * (frames - 1)

        def plan() -> Inputs:
            marginal = torch.full((pairs, length), 1 / length, device=device)
            return [torch.rand(pairs, length, length, device=device), marginal, marginal]

        return [case("", plan, 0, epsilon=0.05, iterations=3)]
    masks = (clips, frames, semantics, length)
    if op == "transport_alignment":

        def features_and_masks() -> Inputs:
            return [draw(clips, frames, length, width), draw(*masks).float().softmax(2)]

        return [case("", features_and_masks, epsilon=0.05, iterations=3)]
    if op == "mask_losses":
        make = lambda: [draw(*masks).float(), torch.rand(masks, device=device) / length]  # noqa: E731
        return [case("", make, 0)]
    matched = (clips, frames, semantics, slots)
    if op == "assignment":
        make = lambda: [draw(clips, semantics, frames, frames, slots, slots)]  # noqa: E731
        return [case("", make)]
    if op == "instance_consistency":
        embeddings = lambda: functional.normalize(draw(*matched, width), dim=-1)  # noqa: E731
        make = lambda: [embeddings(), embeddings(), valid(), valid()]  # noqa: E731
        return [case("", make, 0, form="cosine", margin=0.5, normaliser="clip")]
    raise ValueError(f"no operation {op!r}; there are {', '.join(OPERATIONS)}")
