"""mask_losses against the oracle, in plain torch and fused."""

import importlib

import pytest
import torch
from cases import (
    CLIPS,
    DTYPES,
    TRITON_DTYPES,
    clustered_clip,
    compare,
    difference,
    mask_loss_inputs,
    normal,
    only_kernels,
    parity_cases,
    poisoned_memory,
    run,
    uniform,
)

from smtc import kernels
from smtc.kernels import eager, launching, reference

fused = importlib.import_module("smtc.kernels.mask_losses")
OP = "mask_losses"
IMPLS = ["eager", "triton"]
SMALL = CLIPS[0]
# B, T, L, unused, N: several tiles, and slots that are padded to 16, 32 and 128
TILED = [(2, 2, 257, 0, 16), (1, 2, 300, 0, 20), (1, 2, 130, 0, 70), (1, 1, 5, 0, 128)]


def low(case, dtype):
    return [tensor.to(dtype) for tensor in mask_loss_inputs(case)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", parity_cases(OP), ids=str)
def test_agrees_with_the_oracle(case, dtype):
    compare(OP, case.inputs(), case.wanted, dtype, **case.settings)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("case", parity_cases(OP), ids=str)
def test_the_kernel_agrees_with_the_oracle(case, dtype):
    compare(OP, case.inputs(), case.wanted, dtype, case.factor, impl="triton", **case.settings)


@pytest.mark.parametrize("case", TILED, ids=str)
def test_tiles_and_padding_slots(case):
    compare(OP, mask_loss_inputs(case), [0], torch.float32, impl="triton")


def test_half_precision_logits_with_float32_targets():
    logits, targets = mask_loss_inputs(SMALL)
    logits, targets = logits.bfloat16(), targets.float()
    exact = run(reference.mask_losses, [logits.double(), targets.double()], [0])
    outputs, (gradient,) = run(kernels.mask_losses, [logits, targets], [0], impl="triton")
    assert [output.dtype for output in outputs] == [torch.float32] * 2
    torch.testing.assert_close(outputs, exact[0], check_dtype=False, rtol=1e-5, atol=0)
    assert gradient.dtype == torch.bfloat16
    assert difference(gradient, exact[1][0]) < 4e-3


@pytest.mark.parametrize("delta", [0.0, 1e-8])
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("impl", IMPLS)
def test_each_loss_has_its_own_gradient(output, delta, impl):
    tensors = mask_loss_inputs(SMALL)
    expected = run(lambda *t: reference.mask_losses(*t, delta=delta)[output], tensors, [0])
    if impl == "triton":
        tensors = [tensor.float() for tensor in tensors]
    with launching.watch() as launches:
        actual = run(
            lambda *t: kernels.mask_losses(*t, delta=delta, impl=impl)[output], tensors, [0]
        )
    tolerance = {"rtol": 1e-9, "atol": 1e-14} if impl == "eager" else {"rtol": 1e-4, "atol": 1e-8}
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, check_dtype=False, **tolerance)
    if impl == "triton":
        given = launches[-1].arguments[5:7]
        assert [grad is None for grad in given] == [output == 1, output == 0]


# Of lanes outside the tensor, which are not stored.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("delta", [0.0, 1e-8, 1e-40])
@pytest.mark.parametrize("impl", IMPLS)
def test_saturated_logits_stay_finite(delta, impl, dtype):
    logits, targets = low(SMALL, dtype)
    logits = 1000 * logits
    logits[:, :, 0] = -1e6 if dtype != torch.float16 else -6e4
    outputs, gradients = run(kernels.mask_losses, [logits, targets], [0], delta=delta, impl=impl)
    assert all(torch.isfinite(value).all() for value in (*outputs, *gradients))


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("delta", [0.0, 1e-8])
def test_extreme_logits_agree_with_the_oracle(delta, scale):
    logits, targets = mask_loss_inputs(SMALL)
    logits = scale * logits
    logits[:, :, 0] = -1e6
    compare(OP, [logits, targets], [0], torch.float32, delta=delta, impl="triton")


def test_a_norm_below_the_smallest_counts_as_a_constant():
    """Masks of about 1e-13: their norm is held at 1e-12, which has no gradient."""
    logits, targets = mask_loss_inputs((1, 2, 40, 0, 3))
    share = 6e-13 / 40**0.5 * (1 + 0.3 * uniform(1, 2, 40, seed=2))
    logits[:, :, 0] = logits[:, :, 1:].logsumexp(2) + share.log()
    norms = logits.softmax(2).norm(dim=-1)[:, :, 0]
    assert ((norms > 5e-13) & (norms < 1e-12)).all()
    exact = run(lambda *t: reference.mask_losses(*t)[1], [logits, targets], [0])
    assert exact[1][0][:, :, 0].norm() > 0.01 * exact[1][0].norm()
    actual = run(
        lambda *t: kernels.mask_losses(*t, impl="triton")[1],
        [logits.float(), targets.float()],
        [0],
    )
    torch.testing.assert_close(actual, exact, check_dtype=False, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("case", [(2, 3, 7, 1, 1), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("function", [*IMPLS, "reference"])
def test_one_slot_has_nothing_to_regularise(function, case):
    settings = {"impl": function} if function in IMPLS else {}
    module = kernels if settings else reference
    tensors = low(case, torch.float32)
    (_, regularisation), (gradient,) = run(module.mask_losses, tensors, [0], **settings)
    assert regularisation == 0
    assert not gradient.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_are_constants(impl):
    logits, targets = (tensor.requires_grad_() for tensor in low(SMALL, torch.float32))
    alignment, _ = kernels.mask_losses(logits, targets, impl=impl)
    assert torch.autograd.grad(alignment, targets, allow_unused=True) == (None,)
    assert not kernels.mask_losses(logits.detach(), targets, impl=impl)[0].requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl):
    logits, targets = low(SMALL, torch.float32)
    alignment, _ = kernels.mask_losses(logits.requires_grad_(), targets, impl=impl)
    (gradient,) = torch.autograd.grad(alignment, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_backward_keeps_masks_and_targets_only():
    logits, targets = mask_loss_inputs(SMALL)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernels.mask_losses(logits.requires_grad_(), targets)
    assert sum(size >= logits.numel() for size in kept) == 2


def test_the_kernels_backward_keeps_the_inputs_and_two_numbers_a_slot():
    logits, targets = low(SMALL, torch.float32)
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.data_ptr(): tensor.numel()}), lambda tensor: tensor
    )
    with hooks:
        kernels.mask_losses(logits.requires_grad_(), targets, impl="triton")
    own = {tensor.data_ptr(): tensor.numel() for tensor in (logits, targets)}
    assert own.items() <= kept.items()
    clips, frames, slots, _ = logits.shape
    assert [size for place, size in kept.items() if place not in own] == [
        clips * frames * slots
    ] * 2


@pytest.mark.parametrize("impl", IMPLS)
def test_a_marginal_in_place_of_the_sum_of_targets_would_show(impl):
    features, masks = (tensor.float() for tensor in clustered_clip(2, 4, 40, 16, 5))
    targets = kernels.transport_alignment(features, masks, epsilon=0.05, iterations=3, impl="eager")
    logits = normal(2, 4, 5, 40).float().requires_grad_()
    alignment, _ = kernels.mask_losses(logits, targets, delta=0.0, impl=impl)
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
    logits, targets = mask_loss_inputs((2, 3, 4, 1, 3))
    assert torch.autograd.gradcheck(
        lambda x: module.mask_losses(x, targets, delta=delta), [logits.requires_grad_()]
    )


def test_views_are_read_where_they_lie():
    logits, targets = low((2, 3, 40, 0, 5), torch.float32)
    expected = run(kernels.mask_losses, [logits, targets], [0], impl="eager")
    view = logits.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0).requires_grad_()
    other = torch.stack([targets, targets], -1)[..., 0]
    assert not view.is_contiguous() and not other.is_contiguous()
    outputs = kernels.mask_losses(view, other, impl="triton")
    torch.testing.assert_close(list(outputs), expected[0])
    cotangents = [normal(seed=90 + k).bfloat16().float() for k in range(2)]
    (gradient,) = torch.autograd.grad(outputs, view, cotangents)
    _, (right,) = run(kernels.mask_losses, [logits, targets], [0], impl="triton")
    assert difference(gradient, _gradient_of(logits, targets, cotangents)) < 1e-6
    assert gradient.shape == right.shape


def _gradient_of(logits, targets, cotangents, impl="eager"):
    leaf = logits.detach().clone().requires_grad_()
    outputs = kernels.mask_losses(leaf, targets, impl=impl)
    return torch.autograd.grad(outputs, leaf, cotangents)[0]


def test_expanded_logits_get_their_summed_gradient():
    logits, targets = low((1, 1, 40, 0, 5), torch.float32)

    def shared(impl):
        return run(
            lambda x, y: kernels.mask_losses(
                x.expand(2, 3, -1, -1), y.expand(2, 3, -1, -1), impl=impl
            ),
            [logits, targets],
            [0],
        )

    for actual, expected in zip(shared("triton"), shared("eager"), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("clips", [0, 1])
def test_small_batches(clips):
    tensors = low((clips, 3, 6, 0, 4), torch.float32)
    expected = run(kernels.mask_losses, tensors, [0], impl="eager")
    with poisoned_memory():
        actual = run(kernels.mask_losses, tensors, [0], impl="triton")
    torch.testing.assert_close(actual, expected)
    assert clips or [float(loss) for loss in actual[0]] == [0, 0]


def test_more_frames_than_one_block_of_the_last_sum(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK_FRAMES", 4)
    compare(OP, mask_loss_inputs((3, 3, 4, 0, 2)), [0], torch.float32, impl="triton")


def test_two_runs_are_equal_to_the_bit():
    tensors = low(TILED[0], torch.bfloat16)
    first, second = (run(kernels.mask_losses, tensors, [0], impl="triton") for _ in range(2))
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_offsets_past_two_to_the_31st(axis):
    """Neighbours on one axis so far apart that 32 bits would wrap; only touched pages exist."""
    tensors = low((3, 3, 3, 0, 3), torch.float16)
    distance = 2**30 + 2**10
    far = []
    for tensor in tensors:
        strides = list(tensor.stride())
        strides[axis] = distance
        storage = torch.empty(2 * sum(strides) + 1, dtype=torch.float16)
        apart = storage.as_strided(tensor.shape, strides)
        apart.copy_(tensor)
        far.append(apart.requires_grad_(not far))
    near = [tensors[0].requires_grad_(), tensors[1]]
    results = []
    for logits, targets in (near, far):
        outputs = kernels.mask_losses(logits, targets, impl="triton")
        results.append([*outputs, *torch.autograd.grad(sum(outputs), logits)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_next_call_after_an_error_works():
    tensors = low(SMALL, torch.float32)
    expected = kernels.mask_losses(*tensors, impl="triton")
    with pytest.raises(ValueError, match=r"mask_losses: impl: .*at most 128 .*got 129; use"):
        kernels.mask_losses(torch.zeros(1, 1, 129, 2), torch.zeros(1, 1, 129, 2), impl="triton")
    for one, other in zip(kernels.mask_losses(*tensors, impl="triton"), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_mask_is_stored(dtype):
    """Nothing of the logits' size is made but the gradient."""
    sizes = []

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else (result,):
                if isinstance(value, torch.Tensor):
                    sizes.append(value.untyped_storage().nbytes() // value.element_size())
            return result

    logits, targets = low(TILED[0], dtype)
    logits.requires_grad_()
    with Made(), only_kernels() as launches:
        sum(kernels.mask_losses(logits, targets, impl="triton")).backward()
    assert [launch.name for launch in launches] == ["_frame_losses", "_total", "_gradient"]
    large = [size for size in sizes if size >= logits.numel()]
    # The gradient as it is made and as it is handed on, and the detached targets.
    assert len(large) <= 4, sizes


@pytest.mark.parametrize("delta", [0.0, 1e-8])
def test_opcheck(delta):
    logits, targets = low((2, 2, 20, 0, 3), torch.float32)
    forward = torch.ops.smtc.mask_losses.default
    torch.library.opcheck(forward, (logits.clone().requires_grad_(), targets, delta))
    _, _, *vectors = forward(logits, targets, delta)
    backward = torch.ops.smtc.mask_losses_backward.default
    one = torch.tensor(0.7)
    for grads in ((one, one), (None, one), (one, None)):
        torch.library.opcheck(backward, (*grads, logits, targets, *vectors, delta))


def test_compiled_equals_not_compiled():
    tensors = low(SMALL, torch.float32)

    def losses(logits, targets):
        return kernels.mask_losses(logits, targets, impl="triton")

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        run(compiled, tensors, [0]), run(losses, tensors, [0]), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("delta", [0.0, 1e-8, 0.1])
def test_the_forms_without_triton_agree(delta):
    tensors = low(SMALL, torch.float32)
    with launching.watch() as seen:
        plain = fused._plain(*tensors, delta)
    assert not seen
    torch.testing.assert_close(plain, fused._forward(*tensors, delta), rtol=1e-5, atol=1e-6)
    one, other = uniform(1, seed=5)[0].float(), uniform(1, seed=6)[0].float()
    for grads in ((one, other), (None, other), (one, None)):
        arguments = (*grads, *tensors, *plain[2:], delta)
        expected = fused._plain_backward(*arguments)
        torch.testing.assert_close(fused._backward(*arguments), expected, rtol=1e-4, atol=1e-8)
