"""assignment against enumeration and SciPy, in plain torch and fused."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from cases import TRITON_DTYPES, compare, generator, normal, only_kernels, parity_cases
from scipy.optimize import linear_sum_assignment

from smtc import kernels
from smtc.kernels import eager, reference

fused = importlib.import_module("smtc.kernels.assignment")
SIZES = range(1, 9)


def plain(cost):
    return kernels.assignment(cost, impl="eager")


def triton(cost):
    if cost.dtype == torch.float64:
        cost = cost.float()
    with only_kernels() as launches:
        permutation = kernels.assignment(cost, impl="triton")
    assert launches
    return permutation


FORMS = [plain, triton, reference.assignment]


def integers(*shape, high=3, seed=0):
    return torch.randint(0, high, shape, generator=generator(seed)).float()


def first_best(cost):
    """The lexicographically first of the cheapest permutations, by plain enumeration."""
    rows = range(len(cost))
    return min(itertools.permutations(rows), key=lambda p: (sum(cost[r][p[r]] for r in rows), p))


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("case", parity_cases("assignment"), ids=str)
def test_the_kernel_agrees_with_the_oracle(case, dtype):
    compare("assignment", case.inputs(), case.wanted, dtype, impl="triton")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_scipy(size, form):
    cost = normal(8, size, size)
    permutation = form(cost)
    assert permutation.shape == (8, size)
    assert permutation.dtype == torch.int64
    for one, columns in zip(cost.numpy(), permutation.numpy(), strict=True):
        rows, best = linear_sum_assignment(one)
        assert np.array_equal(rows, np.arange(size))
        assert np.array_equal(best, columns)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", range(1, 6))
def test_ties_go_to_the_lexicographically_first(size, form):
    cost = integers(60, size, size)
    expected = [first_best(one) for one in cost.tolist()]
    assert form(cost).tolist() == [list(one) for one in expected]


@pytest.mark.parametrize("form", [plain, triton])
@pytest.mark.parametrize("size", [6, 7, 8])
def test_ties_of_many_slots(size, form):
    cost = integers(20, size, size)
    assert torch.equal(form(cost), reference.assignment(cost))
    assert form(torch.zeros(size, size)).tolist() == list(range(size))


def test_both_algorithms_agree(monkeypatch):
    cost = integers(50, 4, 4)
    enumerated = plain(cost)
    monkeypatch.setattr(eager, "LARGEST_ENUMERATED", 0)
    assert torch.equal(plain(cost), enumerated)


@pytest.mark.parametrize("form", [plain, triton])
@pytest.mark.parametrize("size", [3, 6])
def test_ties_in_decimal_fractions_are_broken_alike_in_every_order_of_summation(size, form):
    cost = (0.1 * integers(50, size, size, high=4)).float()
    assert torch.equal(form(cost), reference.assignment(cost))
    flipped = form(cost.flip(1)).flip(1)
    totals = [
        cost.double().gather(2, matching[..., None]).sum((1, 2))
        for matching in (form(cost), flipped)
    ]
    torch.testing.assert_close(*totals, rtol=0, atol=0)


@pytest.mark.parametrize("form", [plain, triton])
@pytest.mark.parametrize("size", [4, 6])
def test_sums_that_float32_cannot_tell_apart(size, form):
    """A large cost in every permutation: in float32 the small ones would vanish in its sum."""
    cost = normal(40, size, size).float()
    cost[:, 0] += 2.0**26
    cost[:, 0] = cost[:, 0, :1]
    assert torch.equal(form(cost), reference.assignment(cost))


@pytest.mark.parametrize("form", [plain, triton])
@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 1, 3), (300,)])
@pytest.mark.parametrize("size", [3, 5])
def test_any_leading_shape(batch, size, form, monkeypatch):
    cost = normal(*batch, size, size).float()
    if 0 in batch:
        assert fused._forward(cost).shape == (*batch, size)
        return
    permutation = form(cost)
    assert permutation.shape == (*batch, size)
    assert torch.equal(permutation, reference.assignment(cost))


@pytest.mark.parametrize("form", [plain, triton])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_costs(dtype, form):
    cost = normal(10, 5, 5).to(dtype)
    assert torch.equal(form(cost), reference.assignment(cost.double()))


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_costs_that_require_grad_are_taken_as_constants(impl):
    permutation = kernels.assignment(normal(2, 3, 3).float().requires_grad_(), impl=impl)
    assert not permutation.requires_grad


@pytest.mark.parametrize("form", [plain, triton])
@pytest.mark.parametrize("size", [3, 4, 7])
def test_infinite_costs_forbid_pairs(size, form):
    cost = normal(30, size, size).float()
    cost[torch.rand(cost.shape, generator=generator(1)) < 0.3] = torch.inf
    cost[0] = torch.inf
    assert torch.equal(form(cost), reference.assignment(cost))


@pytest.mark.parametrize("size", SIZES)
def test_costs_that_are_not_numbers_still_give_a_permutation(size):
    cost = normal(40, size, size).float()
    cost[torch.rand(cost.shape, generator=generator(2)) < 0.5] = torch.nan
    ordered = triton(cost).sort(-1).values
    assert torch.equal(ordered, torch.arange(size).expand(40, size))


@pytest.mark.parametrize("size", [3, 6])
def test_views_are_read_where_they_lie(size):
    cost = normal(4, 5, size, size).float()
    views = [
        cost.mT.contiguous().mT,
        cost.transpose(0, 1).contiguous().transpose(0, 1),  # axes that only a copy can merge
        torch.stack([cost, cost], -1)[..., 1],
        cost[:1].expand(4, -1, -1, -1),
    ]
    for view in views:
        assert not view.is_contiguous()
        actual = triton(view)
        assert actual.is_contiguous()
        assert torch.equal(actual, reference.assignment(view))


def test_offsets_past_two_to_the_31st():
    """Problems, and rows, 2³⁰ and more elements apart; only the pages that are touched exist."""
    storage = torch.empty(2**31 + 2**30 + 64, dtype=torch.float16)
    for strides in ((2**31, 4, 1), (16, 2**30, 1)):
        cost = normal(2, 3, 3).half()
        apart = storage.as_strided(cost.shape, strides)
        apart.copy_(cost)
        assert torch.equal(triton(apart), reference.assignment(cost))


def test_the_next_call_after_an_error_works():
    cost = normal(2, 4, 4).float()
    expected = triton(cost)
    with pytest.raises(ValueError, match="at most 8"):
        kernels.assignment(normal(2, 9, 9).float(), impl="triton")
    assert torch.equal(triton(cost), expected)


@pytest.mark.parametrize("size", [4, 5])
def test_opcheck(size):
    cost = normal(2, 3, size, size).float()
    torch.library.opcheck(torch.ops.smtc.assignment.default, (cost,))
