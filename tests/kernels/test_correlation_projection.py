"""correlation_projection against the oracle."""

import pytest
import torch
from cases import CORRELATION, DTYPES, compare, normal

from smtc import kernels
from smtc.kernels import eager, reference


def inputs(case):
    batch, positions, references, inner, width, outputs, index = case
    tensors = [
        normal(batch, positions, width),
        normal(references, inner, width, seed=1),
        normal(outputs, inner, seed=2),
        normal(outputs, seed=3),
    ]
    return tensors, None if index is None else torch.tensor(index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CORRELATION, ids=str)
def test_agrees_with_the_oracle(case, dtype):
    tensors, index = inputs(case)
    compare("correlation_projection", tensors, [0, 1, 2, 3], dtype, index=index)


def test_without_bias():
    tensors, index = inputs(CORRELATION[0])
    compare("correlation_projection", [*tensors[:3], None], [0, 1, 2], torch.float64, index=index)
    tensors, index = inputs(CORRELATION[1])
    compare("correlation_projection", [*tensors[:3], None], [0, 1, 2], torch.float64, index=index)


def test_the_cheaper_order_is_chosen():
    def first(case):
        return eager.projects_reference_first(*case)

    # B, L, R, M, D, E: the paper's setting, more positions, fewer positions, one shared reference
    assert not first((128, 256, 128, 256, 384, 384))
    assert first((128, 1024, 128, 1024, 384, 384))
    assert not first((1, 8, 1, 8, 9, 9))
    assert first((1, 10, 1, 10, 9, 9))
    assert first((128, 256, 1, 256, 384, 384))
    chosen = [first((b, length, r, m, d, e)) for b, length, r, m, d, e, _ in CORRELATION]
    assert True in chosen and False in chosen


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_dtype_of_the_query(weight_dtype):
    (query, source, weight, bias), _ = inputs(CORRELATION[0])
    out = kernels.correlation_projection(
        query.bfloat16(), source.bfloat16(), weight.to(weight_dtype), bias.float()
    )
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("case", [(2, 3, 2, 2, 2, 2, [1, 1]), (2, 2, 2, 2, 5, 5, None)], ids=str)
@pytest.mark.parametrize("module", [eager, reference])
def test_gradcheck(module, case):
    tensors, index = inputs(case)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(
        lambda *t: module.correlation_projection(*t, index=index), leaves
    )
