"""assignment against enumeration and SciPy."""

import itertools

import numpy as np
import pytest
import torch
from cases import generator, normal
from scipy.optimize import linear_sum_assignment

from smtc import kernels
from smtc.kernels import eager, reference

SIZES = range(1, 9)


def integers(*shape, high=3, seed=0):
    return torch.randint(0, high, shape, generator=generator(seed)).float()


def first_best(cost):
    """The lexicographically first of the cheapest permutations, by plain enumeration."""
    rows = range(len(cost))
    return min(itertools.permutations(rows), key=lambda p: (sum(cost[r][p[r]] for r in rows), p))


@pytest.mark.parametrize("module", [kernels, reference])
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_scipy(size, module):
    cost = normal(8, size, size)
    permutation = module.assignment(cost)
    assert permutation.shape == (8, size)
    assert permutation.dtype == torch.int64
    for one, columns in zip(cost.numpy(), permutation.numpy(), strict=True):
        rows, best = linear_sum_assignment(one)
        assert np.array_equal(rows, np.arange(size))
        assert np.array_equal(best, columns)


@pytest.mark.parametrize("module", [kernels, reference])
@pytest.mark.parametrize("size", range(1, 6))
def test_ties_go_to_the_lexicographically_first(size, module):
    cost = integers(60, size, size)
    expected = [first_best(one) for one in cost.tolist()]
    assert module.assignment(cost).tolist() == [list(one) for one in expected]


@pytest.mark.parametrize("size", [6, 7, 8])
def test_ties_of_many_slots(size):
    cost = integers(20, size, size)
    assert torch.equal(kernels.assignment(cost), reference.assignment(cost))
    assert kernels.assignment(torch.zeros(size, size)).tolist() == list(range(size))


def test_both_algorithms_agree(monkeypatch):
    cost = integers(50, 4, 4)
    enumerated = kernels.assignment(cost)
    monkeypatch.setattr(eager, "LARGEST_ENUMERATED", 0)
    assert torch.equal(kernels.assignment(cost), enumerated)


@pytest.mark.parametrize("size", [3, 6])
def test_ties_in_decimal_fractions_are_broken_alike_in_every_order_of_summation(size):
    cost = (0.1 * integers(50, size, size, high=4)).float()
    assert torch.equal(kernels.assignment(cost), reference.assignment(cost))
    flipped = kernels.assignment(cost.flip(1)).flip(1)
    totals = [
        cost.double().gather(2, matching[..., None]).sum((1, 2))
        for matching in (kernels.assignment(cost), flipped)
    ]
    torch.testing.assert_close(*totals, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 3)])
@pytest.mark.parametrize("size", [3, 5])
def test_any_leading_shape(batch, size):
    cost = normal(*batch, size, size)
    permutation = kernels.assignment(cost)
    assert permutation.shape == (*batch, size)
    assert torch.equal(permutation, reference.assignment(cost))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_costs(dtype):
    cost = normal(10, 5, 5).to(dtype)
    assert torch.equal(kernels.assignment(cost), reference.assignment(cost.double()))


def test_costs_that_require_grad_are_taken_as_constants():
    permutation = kernels.assignment(normal(2, 3, 3).requires_grad_())
    assert not permutation.requires_grad
