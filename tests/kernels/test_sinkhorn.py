"""sinkhorn against the oracle."""

import pytest
import torch
from cases import DTYPES, TRANSPORT_MATRICES, compare, difference, normal, uniform

from smtc import kernels
from smtc.kernels import eager, reference


def inputs(case, scale=1.0):
    batch, rows, columns = case
    row_marginal = uniform(batch, rows, seed=1) ** 2 + 0.01
    column_marginal = uniform(batch, columns, seed=2) ** 2 + 0.01
    return [
        scale * uniform(batch, rows, columns),
        row_marginal / row_marginal.sum(-1, keepdim=True),
        column_marginal / column_marginal.sum(-1, keepdim=True),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("case", TRANSPORT_MATRICES, ids=str)
def test_agrees_with_the_oracle(case, iterations, dtype):
    compare("sinkhorn", inputs(case), [0, 1, 2], dtype, epsilon=0.1, iterations=iterations)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.025, 0.005])
def test_small_epsilon_and_large_costs(epsilon, scale, dtype):
    # cost/ε is rounded to its dtype before it is exponentiated, in any form of the algorithm.
    factor = max(1, 0.1 * scale / epsilon)
    tensors = inputs((2, 31, 40), scale)
    compare("sinkhorn", tensors, [0, 1, 2], dtype, factor, epsilon=epsilon, iterations=5)


def test_marginals_need_not_sum_to_one():
    cost, rows, columns = inputs((2, 7, 9))
    compare(
        "sinkhorn",
        [cost, 5 * rows, 3 * columns],
        [0, 1, 2],
        torch.float64,
        epsilon=0.2,
        iterations=4,
    )


@pytest.mark.parametrize("module", [kernels, reference])
def test_columns_are_met_exactly_and_rows_in_the_limit(module):
    cost, rows, columns = inputs((2, 20, 30))
    plan = module.sinkhorn(cost, rows, columns, epsilon=0.05, iterations=3)
    torch.testing.assert_close(plan.sum(1), columns)
    assert difference(plan.sum(2), rows) > 1e-3
    plan = module.sinkhorn(cost, rows, columns, epsilon=0.05, iterations=500)
    torch.testing.assert_close(plan.sum(2), rows)


def test_the_plan_of_the_transposed_cost_is_another():
    cost, rows, columns = inputs((2, 20, 30))
    plan = kernels.sinkhorn(cost, rows, columns, epsilon=0.05, iterations=3)
    other = kernels.sinkhorn(cost.mT.contiguous(), columns, rows, epsilon=0.05, iterations=3)
    assert difference(other.mT, plan) > 0.05


def test_backward_keeps_one_matrix():
    tensors = [tensor.requires_grad_() for tensor in inputs((1, 30, 30))]
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernels.sinkhorn(*tensors, epsilon=0.1, iterations=5)
    assert sum(size >= 900 for size in kept) == 1


@pytest.mark.parametrize("module", [eager, reference])
def test_gradcheck(module):
    cost, rows, columns = inputs((2, 3, 4))
    leaves = [tensor.requires_grad_() for tensor in (normal(*cost.shape), rows, columns)]
    assert torch.autograd.gradcheck(
        lambda *t: module.sinkhorn(*t, epsilon=0.7, iterations=3), leaves
    )
