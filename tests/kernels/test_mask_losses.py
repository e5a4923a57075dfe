"""mask_losses against the oracle."""

import pytest
import torch
from cases import CLIPS, DTYPES, clustered_clip, compare, difference, normal, run, uniform

from smtc import kernels
from smtc.kernels import eager, reference


def inputs(case):
    clips, frames, positions, _, slots = case
    logits = 2 * normal(clips, frames, slots, positions)
    return [logits, uniform(clips, frames, slots, positions, seed=1) / positions]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", [0.0, 1e-8, 0.1])
@pytest.mark.parametrize("case", CLIPS, ids=str)
def test_agrees_with_the_oracle(case, delta, dtype):
    compare("mask_losses", inputs(case), [0], dtype, delta=delta)


@pytest.mark.parametrize("delta", [0.0, 1e-8])
@pytest.mark.parametrize("output", [0, 1])
def test_each_loss_has_its_own_gradient(output, delta):
    def one(module):
        return run(lambda *t: module.mask_losses(*t, delta=delta)[output], inputs(CLIPS[0]), [0])

    for actual, expected in zip(one(kernels), one(reference), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("delta", [0.0, 1e-8])
def test_saturated_logits_stay_finite(delta):
    logits, targets = (tensor.float() for tensor in inputs(CLIPS[0]))
    logits = 1000 * logits
    logits[:, :, 0] = -1e6
    outputs, gradients = run(kernels.mask_losses, [logits, targets], [0], delta=delta)
    assert all(torch.isfinite(value).all() for value in (*outputs, *gradients))


@pytest.mark.parametrize("module", [kernels, reference])
def test_one_slot_has_nothing_to_regularise(module):
    logits, targets = inputs((2, 3, 7, 1, 1))
    (_, regularisation), (gradient,) = run(module.mask_losses, [logits, targets], [0])
    assert regularisation == 0
    assert not gradient.any()


def test_targets_are_constants():
    logits, targets = (tensor.requires_grad_() for tensor in inputs(CLIPS[0]))
    alignment, _ = kernels.mask_losses(logits, targets)
    assert torch.autograd.grad(alignment, targets, allow_unused=True) == (None,)
    assert not kernels.mask_losses(logits.detach(), targets)[0].requires_grad


def test_backward_keeps_masks_and_targets_only():
    logits, targets = inputs(CLIPS[0])
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernels.mask_losses(logits.requires_grad_(), targets)
    assert sum(size >= logits.numel() for size in kept) == 2


def test_a_marginal_in_place_of_the_sum_of_targets_would_show():
    features, masks = clustered_clip(2, 4, 40, 16, 5)
    targets = kernels.transport_alignment(features, masks, epsilon=0.05, iterations=3)
    logits = normal(2, 4, 5, 40).requires_grad_()
    alignment, _ = kernels.mask_losses(logits, targets, delta=0.0)
    (gradient,) = torch.autograd.grad(alignment, logits)
    predicted = logits.softmax(2)
    share = 1 / (2 * 4 * 3)
    right = share * (predicted * targets.sum(2, keepdim=True) - targets)
    wrong = share * (predicted * 3 / 40 - targets)
    torch.testing.assert_close(gradient, right)
    assert difference(wrong, right) > 0.05


@pytest.mark.parametrize("delta", [0.0, 0.01])
@pytest.mark.parametrize("module", [eager, reference])
def test_gradcheck(module, delta):
    logits, targets = inputs((2, 3, 4, 1, 3))
    assert torch.autograd.gradcheck(
        lambda x: module.mask_losses(x, targets, delta=delta), [logits.requires_grad_()]
    )
