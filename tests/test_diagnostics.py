"""The numbers that show a collapse, against plain loops."""

import math

import pytest
import torch
from torch import Tensor

from smtc.diagnostics import diagnose
from smtc.model import Output


def output(logits: Tensor) -> Output:
    """An output of which only the semantic logits `[B,T,N,L]` count."""
    nothing = torch.zeros(0)
    return Output(nothing, nothing, logits, nothing, nothing, nothing, grid=(1, logits.shape[-1]))


def told(student: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
    found = diagnose(output(student), output(student if teacher is None else teacher))
    assert all(value.shape == () and value.dtype == torch.float32 for value in found.values())
    return {name: float(value) for name, value in found.items()}


def random(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_loops(student: Tensor, teacher: Tensor) -> dict[str, float]:
    batch, frames, slots, positions = student.shape
    used = agreeing = 0
    entropy = 0.0
    for clip in range(batch):
        winners = set()
        for frame in range(frames):
            for place in range(positions):
                mine, theirs = (x[clip, frame, :, place].tolist() for x in (student, teacher))
                winners.add(mine.index(max(mine)))
                agreeing += mine.index(max(mine)) == theirs.index(max(theirs))
                whole = sum(math.exp(value) for value in mine)
                shares = [math.exp(value) / whole for value in mine]
                entropy -= sum(share * math.log(share) for share in shares)
        used += len(winners)
    places = batch * frames * positions
    return {
        "slots_used": used / (batch * slots),
        "mask_entropy": entropy / places / math.log(slots),
        "agreement": agreeing / places,
    }


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 3, 5, 7), (3, 2, 16, 4)])
def test_they_are_what_loops_say(shape: tuple[int, ...]) -> None:
    student, teacher = random(*shape), random(*shape, seed=1)
    assert told(student, teacher) == pytest.approx(by_loops(student, teacher), rel=1e-5)


def test_a_clip_uses_a_slot_that_wins_anywhere_in_it() -> None:
    """Slot 0 wins all of clip 0, slots 1 and 2 a position each of clip 1."""
    logits = torch.zeros(2, 2, 4, 1)
    logits[0, :, 0] = 5.0
    logits[1, 0, 1] = logits[1, 1, 2] = 5.0
    assert told(logits)["slots_used"] == (1 + 2) / 8


def test_entropy_lies_between_certainty_and_indifference() -> None:
    assert told(torch.zeros(1, 2, 8, 3))["mask_entropy"] == pytest.approx(1.0)
    certain = torch.zeros(1, 2, 8, 3)
    certain[:, :, 5] = 1e4
    assert told(certain)["mask_entropy"] == 0.0
    assert 0.0 < told(random(2, 2, 8, 30))["mask_entropy"] < 1.0


def test_one_slot_alone() -> None:
    found = told(random(2, 3, 1, 4))
    assert found == {"slots_used": 1.0, "mask_entropy": 0.0, "agreement": 1.0}


def test_slots_that_tie_count_as_the_first() -> None:
    student, teacher = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    teacher[:, :, 0, :3] = 1.0
    teacher[:, :, 2, 3] = 1.0
    found = told(student, teacher)
    assert (found["slots_used"], found["agreement"]) == (pytest.approx(1 / 3), 0.75)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_masks_of_low_precision(kind: torch.dtype) -> None:
    logits = random(2, 2, 4, 9).to(kind)
    assert told(logits) == pytest.approx(by_loops(logits.float(), logits.float()), rel=1e-3)


def test_no_gradient_flows_and_nothing_changes() -> None:
    student = random(1, 2, 4, 6).requires_grad_()
    before = student.detach().clone()
    found = diagnose(output(student), output(student))
    assert not any(value.requires_grad for value in found.values())
    assert torch.equal(student, before)


def test_extreme_masks_stay_finite() -> None:
    for logits in (torch.full((1, 2, 3, 4), -1e30), 1e30 * random(1, 2, 3, 4)):
        assert all(math.isfinite(value) for value in told(logits).values())
