"""masked_slot_attention against the oracle, in plain torch and fused."""

import functools
import importlib
import math

import pytest
import torch
from cases import (
    DTYPES,
    SLOTS,
    TRITON_DTYPES,
    assert_close,
    compare,
    normal,
    parity_cases,
    poisoned_memory,
    run,
    slot_inputs,
    uniform,
)

from smtc import kernels
from smtc.kernels import eager, launching, reference, tuning

SETTINGS = {"scale": 0.3, "epsilon": 1e-8}
fused = importlib.import_module("smtc.kernels.masked_slot_attention")
triton = functools.partial(kernels.masked_slot_attention, impl="triton")


def single(case, dtype=torch.float32, masked=True):
    return [
        t.to(dtype) if t is not None and t.is_floating_point() else t
        for t in slot_inputs(case, masked)
    ]


@pytest.fixture
def small_blocks(monkeypatch):
    """A function: options so small that a frame takes several programs of several tiles."""

    def choose(*, turned=False, turned_tiles=False):
        options = {"ROWS": 16, "BLOCK": 16, "WIDTH": 16, "WIDTH_BLOCKS": 2, "TURNED": turned}
        for kernel, more in (("forward", {}), ("backward", {"TURNED_TILES": turned_tiles})):
            rows = [
                tuning.Row("interpreter", bits, tuning.ANY, options | more) for bits in (16, 32)
            ]
            monkeypatch.setitem(tuning.TABLE, f"masked_slot_attention.{kernel}", rows)

    return choose


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", SLOTS, ids=str)
def test_agrees_with_the_oracle(case, masked, dtype):
    compare("masked_slot_attention", slot_inputs(case, masked), [0, 1, 2], dtype, **SETTINGS)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("case", parity_cases("masked_slot_attention"), ids=str)
def test_the_kernels_agree_with_the_oracle(case, dtype):
    settings = case.settings
    compare(case.op, case.inputs(), case.wanted, dtype, case.factor, impl="triton", **settings)


@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_a_frame_in_many_programs(small_blocks, turned, dtype):
    small_blocks(turned=turned[0], turned_tiles=turned[1])
    case = (2, 7, 3, 20, 75)
    with launching.watch() as launches:
        compare(
            "masked_slot_attention", slot_inputs(case), [0, 1, 2], dtype, impl="triton", **SETTINGS
        )
    # Seven groups of four rows, five blocks of 16 columns.
    assert [launch.grid for launch in launches] == [(2, 2, 3), (2, 2, 3)]


def test_more_slots_than_a_program_is_made_for(small_blocks):
    small_blocks()
    inputs = slot_inputs((1, 2, 37, 20, 24))
    compare("masked_slot_attention", inputs, [0, 1, 2], torch.float32, impl="triton", **SETTINGS)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("epsilon", [1e-8, 0.1])
def test_bias_is_unscaled_and_differentiable(epsilon, impl):
    dtype = torch.float32 if impl == "triton" else torch.float64
    tensors = single(SLOTS[1], dtype)
    bias = normal(*tensors[0].shape[:3], seed=5).to(dtype)

    def with_bias(module, **extra):
        def function(queries, keys, values, mask, bias):
            return module.masked_slot_attention(
                queries, keys, values, mask, scale=0.3, epsilon=epsilon, logit_bias=bias, **extra
            )

        return run(function, [*tensors, bias], [0, 1, 2, 4])

    for actual, expected in zip(with_bias(kernels, impl=impl), with_bias(reference), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("small", [False, True])
def test_keys_may_be_the_values(dtype, small, small_blocks):
    if small:
        small_blocks()
    queries, keys, _, mask = slot_inputs((1, 5, 4, 20, 40))
    inputs = [queries, keys, keys, mask]
    compare("masked_slot_attention", inputs, [0, 1], torch.float64, **SETTINGS)
    with launching.watch() as launches:
        compare("masked_slot_attention", inputs, [0, 1], dtype, impl="triton", **SETTINGS)
    for launch in launches:
        assert launch.arguments[2] is None, "the values are read apart from the keys"


def test_projections_need_no_keys_and_values():
    """`q·k = (q W_k)·x + q·b_k` and `A v = (A x) W_vᵀ + b_v ΣA`."""
    batch, groups, slots, positions, width = 2, 3, 4, 50, 24
    queries, inputs = normal(batch, groups, slots, width), normal(batch, positions, width, seed=1)
    key_weight, value_weight = normal(width, width, seed=2) / 5, normal(width, width, seed=3) / 5
    key_bias, value_bias = normal(width, seed=4), normal(width, seed=5)
    mask = uniform(batch, groups, positions, seed=6) > 0.5
    mask[0, 0] = False
    scale = 1 / math.sqrt(width)
    leaves = [queries, inputs, key_weight, value_weight, key_bias, value_bias]

    def explicit(q, x, wk, wv, bk, bv):
        return reference.masked_slot_attention(
            q, x @ wk.T + bk, x @ wv.T + bv, mask, scale=scale, epsilon=1e-8
        )

    def folded(q, x, wk, wv, bk, bv):
        updates, logits = triton(
            q @ wk, x, x, mask, scale=scale, epsilon=1e-8, logit_bias=scale * (q @ bk)
        )
        # The weights of a group sum to 1 (less the 1e-8), those of an empty one to 0.
        share = mask.any(-1)[:, :, None, None]
        return updates @ wv.T + bv * share, logits

    outputs, gradients = run(folded, [t.float() for t in leaves], range(6))
    expected, true_gradients = run(explicit, leaves, range(6))
    for actual, exact in zip(outputs + gradients, expected + true_gradients, strict=True):
        assert_close(actual, exact, torch.float32, factor=2)


@pytest.mark.parametrize(
    "function", [kernels.masked_slot_attention, triton], ids=["auto", "triton"]
)
def test_an_empty_mask_gives_zero_updates_and_no_gradients(function):
    tensors = [t if t.is_floating_point() else torch.zeros_like(t) for t in single(SLOTS[1])]
    with poisoned_memory():
        (updates, _), gradients = run(function, tensors, [0, 1, 2], **SETTINGS)
        assert torch.equal(updates, torch.zeros_like(updates))
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        (updates,), gradients = run(function, tensors, [0, 1, 2], **SETTINGS, return_logits=False)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize(
    "kind", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float16]
)
def test_a_mask_of_zeros_and_ones_is_a_mask(kind, impl):
    queries, keys, values, mask = single(SLOTS[1])
    function = functools.partial(kernels.masked_slot_attention, impl=impl, **SETTINGS)
    for actual, expected in zip(
        function(queries, keys, values, mask.to(kind)),
        function(queries, keys, values, mask),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_logits_are_full_precision_and_only_on_request(impl):
    tensors = single(SLOTS[1], torch.bfloat16)
    function = functools.partial(kernels.masked_slot_attention, impl=impl, **SETTINGS)
    updates, logits = function(*tensors)
    assert updates.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    exact = 0.3 * torch.einsum("bgpd,bld->bgpl", tensors[0].double(), tensors[1].double())
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    alone, none = function(*tensors, return_logits=False)
    assert none is None
    assert torch.equal(alone, updates)


@pytest.mark.parametrize("which", ["updates", "logits"])
def test_a_loss_may_use_one_result(which):
    def only(module):
        def function(*inputs):
            return module(*inputs, **SETTINGS)[which == "logits"]

        return run(function, single(SLOTS[1]), [0, 1, 2])[1]

    for actual, expected in zip(only(triton), only(reference.masked_slot_attention), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2], [4], [1, 4]])
@pytest.mark.parametrize("shared", [False, True])
def test_only_wanted_gradients(wanted, shared):
    queries, keys, values, mask = single(SLOTS[1])
    bias = normal(*queries.shape[:3], seed=5).float()
    inputs = [queries, keys, keys if shared else values, mask, bias]

    def gradients(module):
        def function(q, k, v, m, b):
            return module(q, k, v, m, logit_bias=b, **SETTINGS)

        return run(function, inputs, wanted)[1]

    for actual, expected in zip(
        gradients(triton), gradients(reference.masked_slot_attention), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes_lose_nothing(dtypes):
    queries, keys, values, mask = slot_inputs(SLOTS[1])
    low = [t.to(d) for t, d in zip((queries, keys, values), dtypes, strict=True)]
    outputs, gradients = run(triton, [*low, mask], [0, 1, 2], **SETTINGS)
    exact, true_gradients = run(
        reference.masked_slot_attention, [*(t.double() for t in low), mask], [0, 1, 2], **SETTINGS
    )
    assert outputs[0].dtype == dtypes[2]
    assert [gradient.dtype for gradient in gradients] == list(dtypes)
    assert_close(outputs[0], exact[0], dtypes[2])
    assert_close(outputs[1], exact[1], torch.float32)
    for gradient, expected, dtype in zip(gradients, true_gradients, dtypes, strict=True):
        # The gradient of a float32 tensor passes through that of the updates in the values' dtype.
        assert_close(gradient, expected, dtype if dtypes[2] == torch.float32 else dtypes[2])


def test_strided_and_expanded_inputs():
    batch, groups, slots, positions, width = 2, 3, 4, 20, 24
    queries = normal(batch, slots, width, groups).float().permute(0, 3, 1, 2)
    keys = normal(batch, width, 2 * positions, seed=1).float().mT[:, ::2]
    values = normal(1, positions, width, seed=2).float().expand(batch, -1, -1)
    mask = (uniform(1, positions, groups, seed=3) > 0.4).mT.expand(batch, -1, -1)
    bias = normal(1, 1, slots, seed=4).float().expand(batch, groups, slots)

    def results(*inputs):
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        q, k, v, m, b = leaves
        outputs = triton(q, k, v, m, logit_bias=b, **SETTINGS)
        given = [normal(*output.shape, seed=7).float() for output in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [q, k, v, b], given)]

    inputs = (queries, keys, values, mask, bias)
    for actual, expected in zip(
        results(*inputs), results(*(t.contiguous() for t in inputs)), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_32_bits(stride):
    frames = 2**31 // stride + 1
    queries, keys, values, mask = single((frames, 2, 4, 20, 16), torch.float16)
    storage = torch.empty(2**31 + keys[0].numel(), dtype=torch.float16)  # pages come when touched
    far = storage.as_strided(keys.shape, (stride, keys.shape[2], 1))
    far.copy_(keys)
    given = normal(*queries.shape, seed=5).half()

    def results(keys):
        leaves = [queries.clone().requires_grad_(), keys.detach().requires_grad_()]
        updates, logits = triton(*leaves, values, mask, **SETTINGS)
        return [updates, logits, *torch.autograd.grad(updates, leaves, given)]

    for actual, expected in zip(results(far), results(keys), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_extreme_logits(dtype):
    """One slot takes all; the others' weights are ε, which float16 cannot hold."""
    queries, keys, values, mask = slot_inputs((2, 2, 4, 40, 16))
    queries, keys[..., 0] = 100 * queries, 1
    queries[:, :, 0, 0] = -10000  # this slot is never the one
    inputs = [queries, keys, values, mask]
    factor = 1 if dtype == torch.float32 else 2
    compare(
        "masked_slot_attention", inputs, [2], dtype, factor, impl="triton", return_logits=False,
        **SETTINGS,
    )  # fmt: skip
    outputs, gradients = run(triton, [t.to(dtype) for t in inputs[:3]], [0, 1, 2], **SETTINGS)
    assert all(torch.isfinite(result).all() for result in outputs + gradients)


@pytest.mark.parametrize("shared", [False, True])
def test_no_frames(shared):
    queries, keys, values, mask = (t[:0] for t in single(SLOTS[1]))
    bias = queries.new_empty(queries.shape[:3])
    leaves = [queries.requires_grad_(), keys.requires_grad_(), bias.requires_grad_()]
    outputs = fused.masked_slot_attention(
        queries, keys, keys if shared else values, mask, logit_bias=bias, **SETTINGS
    )
    assert [list(o.shape) for o in outputs] == [[0, 5, 4, 16], [0, 5, 4, 257]]
    gradients = torch.autograd.grad(sum(o.sum() for o in outputs), leaves)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]


def test_equal_bits_also_after_an_error(small_blocks):
    small_blocks()
    inputs = single((1, 5, 4, 20, 40), torch.bfloat16)
    first = run(triton, inputs, [0, 1, 2], **SETTINGS)
    with pytest.raises(ValueError, match="keys"):
        triton(inputs[0], inputs[1][:, :, 1:], inputs[2], **SETTINGS)
    second = run(triton, inputs, [0, 1, 2], **SETTINGS)
    for results, again in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_the_backward_keeps_nothing_of_the_size_of_the_weights():
    queries, keys, values, mask = single((1, 5, 4, 257, 16))
    kept = []
    leaves = [t.requires_grad_() for t in (queries, keys, values)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        updates, logits = triton(*leaves, mask, **SETTINGS)
    assert kept
    given = {t.data_ptr() for t in (*leaves, mask)}
    for tensor in kept:
        small = tensor.numel() <= updates.numel()
        assert tensor.data_ptr() in given or small, list(tensor.shape)
    assert not any(tensor.data_ptr() == logits.data_ptr() for tensor in kept)


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared):
    queries, keys, values, mask = single((2, 2, 3, 10, 8))
    values = None if shared else values.requires_grad_()
    bias = normal(2, 2, 3, seed=5).float()
    leaves = [t.requires_grad_() for t in (queries, keys, bias)]
    arguments = (*leaves[:2], values, mask.view(torch.uint8), bias, 0.3, 1e-8, True)
    torch.library.opcheck(torch.ops.smtc.masked_slot_attention.default, arguments)
    with torch.no_grad():
        updates, logits, sums = torch.ops.smtc.masked_slot_attention(*arguments)
    inputs = [None if t is None else t.detach() for t in arguments[:5]]
    torch.library.opcheck(
        torch.ops.smtc.masked_slot_attention_backward.default,
        (
            torch.ones_like(updates), torch.ones_like(logits), *inputs, updates, sums, 0.3, 1e-8,
            [True, True, not shared, True],
        ),
    )  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
def test_compiled(shared):
    queries, keys, values, mask = single((2, 2, 3, 10, 8))
    leaves = [t.requires_grad_() for t in (queries, keys, values)]

    def loss(q, k, v):
        updates, logits = triton(q, k, k if shared else v, mask, **SETTINGS)
        return updates.square().sum() + logits.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted = leaves[: 2 if shared else 3]
    for actual, expected in zip(
        torch.autograd.grad(compiled(*leaves), wanted),
        torch.autograd.grad(loss(*leaves), wanted),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_plain_form_of_the_operators(shared, masked):
    queries, keys, values, mask = single((2, 2, 3, 10, 8), masked=masked)
    values = None if shared else values
    bias = normal(2, 2, 3, seed=5).float()
    arguments = (queries, keys, values, mask, bias, 0.3, 1e-8, True)
    with poisoned_memory():
        outputs = fused._plain(*arguments)
        for actual, expected in zip(outputs, fused._forward(*arguments), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        updates, logits, sums = outputs
        given = [normal(*t.shape, seed=6).float() for t in (updates, logits)]
        wanted = [True, True, not shared, True]
        more = (*given, *arguments[:5], updates, sums, 0.3, 1e-8, wanted)
        for actual, expected in zip(
            fused._plain_backward(*more), fused._backward(*more), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("module", [eager, reference])
def test_gradcheck(module, masked):
    *leaves, mask = slot_inputs((2, 2, 2, 3, 2), masked)
    bias = normal(2, 2, 2, seed=7)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: module.masked_slot_attention(
            q, k, v, mask, scale=0.7, epsilon=0.01, logit_bias=b
        ),
        [leaf.requires_grad_() for leaf in (*leaves, bias)],
    )
