"""masked_slot_attention against the oracle."""

import pytest
import torch
from cases import DTYPES, SLOTS, compare, normal, run, uniform

from smtc import kernels
from smtc.kernels import eager, reference

SETTINGS = {"scale": 0.3, "epsilon": 1e-8}


def inputs(case, masked=True):
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", SLOTS, ids=str)
def test_agrees_with_the_oracle(case, masked, dtype):
    compare("masked_slot_attention", inputs(case, masked), [0, 1, 2], dtype, **SETTINGS)


@pytest.mark.parametrize("epsilon", [1e-8, 0.1])
def test_bias_is_unscaled_and_differentiable(epsilon):
    tensors = inputs(SLOTS[1])
    bias = normal(*tensors[0].shape[:3], seed=5)

    def with_bias(module, **extra):
        def function(queries, keys, values, mask, bias):
            return module.masked_slot_attention(
                queries, keys, values, mask, scale=0.3, epsilon=epsilon, logit_bias=bias, **extra
            )

        return run(function, [*tensors, bias], [0, 1, 2, 4])

    for actual, expected in zip(with_bias(kernels), with_bias(reference), strict=True):
        torch.testing.assert_close(actual, expected)


def test_keys_may_be_the_values():
    queries, keys, _, mask = inputs(SLOTS[1])

    def shared(module):
        return run(
            lambda q, x: module.masked_slot_attention(q, x, x, mask, **SETTINGS),
            [queries, keys],
            [0, 1],
        )

    for actual, expected in zip(shared(kernels), shared(reference), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("module", [kernels, reference])
def test_an_empty_mask_gives_zero_updates_and_finite_gradients(module):
    tensors = [
        t.float() if t.is_floating_point() else torch.zeros_like(t) for t in inputs(SLOTS[1])
    ]
    function = module.masked_slot_attention
    (updates, _), gradients = run(function, tensors, [0, 1, 2], **SETTINGS)
    assert torch.equal(updates, torch.zeros_like(updates))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    (updates,), gradients = run(function, tensors, [0, 1, 2], **SETTINGS, return_logits=False)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_of_zeros_and_ones_is_a_mask(kind):
    queries, keys, values, mask = inputs(SLOTS[1])
    expected = kernels.masked_slot_attention(queries, keys, values, mask, **SETTINGS)
    actual = kernels.masked_slot_attention(queries, keys, values, mask.to(kind), **SETTINGS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_logits_are_full_precision_and_only_on_request():
    tensors = [t.bfloat16() if t.is_floating_point() else t for t in inputs(SLOTS[1])]
    updates, logits = kernels.masked_slot_attention(*tensors, **SETTINGS)
    assert updates.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    exact = 0.3 * torch.einsum("bgpd,bld->bgpl", tensors[0].double(), tensors[1].double())
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    alone, none = kernels.masked_slot_attention(*tensors, **SETTINGS, return_logits=False)
    assert none is None
    assert torch.equal(alone, updates)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("module", [eager, reference])
def test_gradcheck(module, masked):
    *leaves, mask = inputs((2, 2, 2, 3, 2), masked)
    bias = normal(2, 2, 2, seed=7)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: module.masked_slot_attention(
            q, k, v, mask, scale=0.7, epsilon=0.01, logit_bias=b
        ),
        [leaf.requires_grad_() for leaf in (*leaves, bias)],
    )
