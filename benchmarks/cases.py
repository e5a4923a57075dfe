"""The inputs that tests and benchmarks share: small odd cases for parity, the paper's for speed.

Parity cases are float64 tensors on the CPU, drawn from fixed seeds. `at_size` gives the setting of
one training step (32 clips of 4 frames, D 384, N 16, P 4) at L positions on any device.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Inputs = list[Tensor | None]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of an operation: `inputs()` in order, gradients of those in `wanted`, settings."""

    op: str
    name: str
    inputs: Callable[[], Inputs] = field(repr=False)
    wanted: tuple[int, ...]
    settings: Settings = field(default_factory=dict)
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


def assignment_inputs(size: int) -> Inputs:
    """Eight costs."""
    return [normal(8, size, size)]


def _correlation() -> Iterator[Case]:
    for row in CORRELATION:
        index = None if row[-1] is None else torch.tensor(row[-1])
        inputs = partial(correlation_inputs, row)
        yield Case("correlation_projection", str(row), inputs, (0, 1, 2, 3), {"index": index})


def _slots() -> Iterator[Case]:
    for row, masked in product(SLOTS, (False, True)):
        name = f"{row}{' masked' if masked else ''}"
        settings = {"scale": 0.3, "epsilon": 1e-8}
        inputs = partial(slot_inputs, row, masked)
        yield Case("masked_slot_attention", name, inputs, (0, 1, 2), settings)


def _sinkhorn() -> Iterator[Case]:
    for shape, iterations in product(TRANSPORT_MATRICES, (1, 3)):
        settings: Settings = {"epsilon": 0.1, "iterations": iterations}
        inputs = partial(sinkhorn_inputs, shape)
        yield Case("sinkhorn", f"{shape} {iterations} iterations", inputs, (0, 1, 2), settings)
    for epsilon, scale in product((0.5, 0.05, 0.025, 0.005), (1, 100)):
        # cost/ε is rounded to its dtype before it is exponentiated, in any form of the algorithm.
        factor = max(1, 0.1 * scale / epsilon)
        settings = {"epsilon": epsilon, "iterations": 5}
        inputs = partial(sinkhorn_inputs, (2, 31, 40), scale)
        name = f"epsilon {epsilon} cost scale {scale}"
        yield Case("sinkhorn", name, inputs, (0, 1, 2), settings, factor)


def _transport() -> Iterator[Case]:
    for row, cost, marginals in product(CLIPS, ("cosine", "dot"), ("uniform", "l1")):
        settings: Settings = {"epsilon": 0.1, "iterations": 3, "cost": cost, "marginals": marginals}
        name = f"{row} {cost} {marginals}"
        yield Case("transport_alignment", name, partial(clustered_clip, *row), (), settings)
    for epsilon in (0.5, 0.05, 0.025, 0.02, 0.005):
        inputs = partial(clustered_clip, 2, 4, 40, 16, 5)
        settings = {"epsilon": epsilon, "iterations": 3, "marginals": "l1"}
        factor = max(1, 0.5 / epsilon)
        yield Case("transport_alignment", f"epsilon {epsilon}", inputs, (), settings, factor)


def _mask_losses() -> Iterator[Case]:
    for row, delta in product(CLIPS, (0.0, 1e-8, 0.1)):
        inputs = partial(mask_loss_inputs, row)
        yield Case("mask_losses", f"{row} delta {delta}", inputs, (0,), {"delta": delta})


def _assignment() -> Iterator[Case]:
    for size in range(1, 9):
        yield Case("assignment", f"P {size}", partial(assignment_inputs, size), ())


def _instances() -> Iterator[Case]:
    for row, (form, normaliser) in product(INSTANCES, INSTANCE_FORMS):
        margin = 2.0 if form == "l2_margin" else 0.3
        settings = {"form": form, "margin": margin, "normaliser": normaliser}
        name = f"{row} {form} {normaliser}"
        inputs = partial(instance_inputs, row, form)
        yield Case("instance_consistency", name, inputs, (0,), settings)


CASES = [
    *_correlation(),
    *_slots(),
    *_sinkhorn(),
    *_transport(),
    *_mask_losses(),
    *_assignment(),
    *_instances(),
]
OPERATIONS = tuple(dict.fromkeys(case.op for case in CASES))
SETTINGS = (256, 1024, 1500)
"""Positions: 256² at patch 16, 256² at stride 8, 480×800 at patch 16."""


def parity_cases(op: str) -> list[Case]:
    """The small cases of one operation."""
    return [case for case in CASES if case.op == op]


@dataclass(frozen=True)
class Step:
    """The sizes of one training step, and where and in which dtype its tensors are drawn."""

    positions: int
    device: str
    dtype: torch.dtype
    clips: int = 32
    frames: int = 4
    width: int = 384
    semantics: int = 16
    slots: int = 4

    def draw(self, *shape: int) -> Tensor:
        """Standard normal in the step's dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform float32 in 0…1."""
        return torch.rand(shape, device=self.device)

    def correlation_projection(self) -> Inputs:
        """Each frame with the one before it: features, the same features, weight, bias."""
        features = self.draw(self.clips * self.frames, self.positions, self.width)
        weight = self.draw(self.width, self.positions) / math.sqrt(self.positions)
        return [features, features, weight, self.draw(self.width)]

    def previous_frames(self) -> Tensor:
        """`[B·T]`: the reference of each frame."""
        frames = torch.arange(self.clips * self.frames, device=self.device)
        return frames.view(self.clips, self.frames).roll(1, 1).flatten()

    def masked_slot_attention(self, groups: int, members: int, masked: bool) -> Inputs:
        """Keys and values are one tensor: the projections are folded into the queries and follow
        the updates.
        """
        batch = self.clips * self.frames
        mask = self.uniform(batch, groups, self.positions) > 0.7 if masked else None
        inputs = self.draw(batch, self.positions, self.width)
        return [self.draw(batch, groups, members, self.width), inputs, inputs, mask]

    def sinkhorn(self) -> Inputs:
        """The cost of every ordered pair of frames of every clip, uniform marginals."""
        pairs, length = self.clips * self.frames * (self.frames - 1), self.positions
        marginal = torch.full((pairs, length), 1 / length, device=self.device)
        return [self.uniform(pairs, length, length), marginal, marginal]

    def transport_alignment(self) -> Inputs:
        """Features and float32 masks."""
        features = self.draw(self.clips, self.frames, self.positions, self.width)
        return [features, self.masks().softmax(2)]

    def mask_losses(self) -> Inputs:
        """Float32 logits and targets."""
        logits = self.masks()
        return [logits, self.uniform(*logits.shape) / self.positions]

    def masks(self) -> Tensor:
        """`[B,T,N,L]` float32."""
        shape = (self.clips, self.frames, self.semantics, self.positions)
        return torch.randn(shape, device=self.device)

    def assignment(self) -> Inputs:
        """A cost for every semantic and every pair of frames."""
        pairs = (self.clips, self.semantics, self.frames, self.frames)
        return [self.draw(*pairs, self.slots, self.slots)]

    def instance_consistency(self) -> Inputs:
        """Unit embeddings, six of ten valid."""
        shape = (self.clips, self.frames, self.semantics, self.slots)
        embeddings = [functional.normalize(self.draw(*shape, self.width), dim=-1) for _ in range(2)]
        return [*embeddings, *(self.uniform(*shape) < 0.6 for _ in range(2))]


def at_size(op: str, positions: int, device: str, dtype: torch.dtype, **sizes: int) -> list[Case]:
    """The calls of `op` in one training step: one case, or the two stages of slot attention.

    `sizes` are fields of `Step`.
    """
    step = Step(positions, device, dtype, **sizes)
    name = f"L{positions}"
    if op == "masked_slot_attention":
        settings: Settings = {"scale": 1 / math.sqrt(step.width), "epsilon": 1e-8}
        semantic = partial(step.masked_slot_attention, 1, step.semantics, False)
        instance = partial(step.masked_slot_attention, step.semantics, step.slots, True)
        return [
            Case(op, f"{name} semantic", semantic, (0, 1), settings),
            Case(op, f"{name} instance", instance, (0, 1), settings),
        ]
    inputs: Callable[[], Inputs] = getattr(step, op)
    calls: dict[str, tuple[tuple[int, ...], Settings]] = {
        "correlation_projection": ((0, 2, 3), {"index": step.previous_frames()}),
        "sinkhorn": ((0,), {"epsilon": 0.05, "iterations": 3}),
        "transport_alignment": ((), {"epsilon": 0.05, "iterations": 3}),
        "mask_losses": ((0,), {}),
        "assignment": ((), {}),
        "instance_consistency": ((0,), {"form": "cosine", "margin": 0.5, "normaliser": "clip"}),
    }
    wanted, settings = calls[op]
    return [Case(op, name, inputs, wanted, settings)]
