"""correlation_projection against the oracle, in plain torch and fused."""

import importlib

import pytest
import torch
from cases import (
    CORRELATION,
    DTYPES,
    TRITON_DTYPES,
    compare,
    correlation_inputs,
    normal,
    only_kernels,
    parity_cases,
    poisoned_memory,
    run,
)

from smtc import kernels
from smtc.kernels import eager, launching, reference

fused = importlib.import_module("smtc.kernels.correlation_projection")
OP = "correlation_projection"
SMALL = (2, 20, 2, 20, 40, 24, None)


def index_of(case):
    return None if case[-1] is None else torch.tensor(case[-1])


def low(case, dtype):
    return [tensor.to(dtype) for tensor in correlation_inputs(case)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", parity_cases(OP), ids=str)
def test_agrees_with_the_oracle(case, dtype):
    compare(OP, case.inputs(), case.wanted, dtype, **case.settings)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("case", parity_cases(OP), ids=str)
def test_the_kernel_agrees_with_the_oracle(case, dtype):
    inputs = case.inputs()
    plain = fused.reassociates(*inputs[:3])
    compare(OP, inputs, case.wanted, dtype, impl="triton", launches=not plain, **case.settings)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("case", [SMALL, CORRELATION[2]], ids=str)
def test_without_bias(case, impl):
    tensors = [*correlation_inputs(case)[:3], None]
    compare(OP, tensors, [0, 1, 2], torch.float32, impl=impl)


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


@pytest.mark.parametrize(
    ("shape", "plain"), [((40, 40, 40), False), ((41, 41, 40), True), ((30, 30, 40), False)]
)
def test_plain_products_run_only_where_positions_outnumber_the_width(shape, plain):
    positions, inner, width = shape
    # One reference for three frames: the reassociated order would cost less in every row.
    tensors = [normal(3, positions, width), normal(1, inner, width), normal(width, inner)]
    index = torch.zeros(3, dtype=torch.int64)
    with only_kernels() as launches:
        run(
            kernels.correlation_projection,
            [t.float() for t in tensors],
            [0, 1, 2],
            index=index,
            impl="triton",
        )
    assert len(launches) == (0 if plain else 4)


def test_both_orders_are_the_same_function():
    tensors = correlation_inputs(SMALL)
    query, source, weight, bias = tensors
    exact = reference.correlation_projection(*tensors)
    torch.testing.assert_close(fused._reassociated(query, source, weight, bias, None), exact)
    torch.testing.assert_close(query @ source.mT @ weight.T + bias, exact)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_the_result_has_the_dtype_of_the_query(weight_dtype, impl):
    query, source, weight, bias = correlation_inputs(SMALL)
    out = kernels.correlation_projection(
        query.bfloat16(), source.bfloat16(), weight.to(weight_dtype), bias.float(), impl=impl
    )
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("case", [(2, 3, 2, 2, 2, 2, [1, 1]), (2, 2, 2, 2, 5, 5, None)], ids=str)
@pytest.mark.parametrize("module", [eager, reference])
def test_gradcheck(module, case):
    leaves = [tensor.requires_grad_() for tensor in correlation_inputs(case)]
    assert torch.autograd.gradcheck(
        lambda *t: module.correlation_projection(*t, index=index_of(case)), leaves
    )


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_nothing_of_the_size_of_the_correlation_is_made(dtype):
    """70 positions, 300 reference positions, width 80: no tensor made on the way has 2·70·300."""
    sizes = []

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else (result,):
                if isinstance(value, torch.Tensor):
                    sizes.append(value.untyped_storage().nbytes() // value.element_size())
            return result

    tensors = low((2, 70, 2, 300, 80, 8, None), dtype)
    with Made():
        run(kernels.correlation_projection, tensors, [0, 1, 2, 3], impl="triton")
    assert max(sizes) == tensors[1].numel() > 2 * 70 * 300
    assert sizes.count(max(sizes)) <= 3  # the input, its copy for this test and its gradient


def test_views_are_read_where_they_lie(monkeypatch):
    query, source, weight, bias = (t.float() for t in correlation_inputs(SMALL))
    expected = run(kernels.correlation_projection, [query, source, weight, bias], [], impl="eager")
    views = [
        query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([source, source], -1)[..., 0],
        weight.T.contiguous().T,
        bias,
    ]
    assert not any(view.is_contiguous() for view in views[:3])
    actual = kernels.correlation_projection(*views, impl="triton")
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected[0][0])


def test_bias_and_index_are_read_through_their_strides():
    tensors = [t.float() for t in correlation_inputs((3, 10, 7, 12, 20, 9, None))]
    index = torch.tensor([5, 9, 5, 9, 0, 9])[::2]
    for bias in (torch.randn(9, 2)[:, 0], torch.randn(1).expand(9)):
        actual, expected = (
            kernels.correlation_projection(*tensors[:3], bias, index=index, impl=impl)
            for impl in ("triton", "eager")
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_an_expanded_reference_gets_its_summed_gradient():
    query, source, weight, _ = (t.float() for t in correlation_inputs(SMALL))
    one = source[:1]

    def shared(impl):
        return run(
            lambda q, r: kernels.correlation_projection(q, r.expand(2, -1, -1), weight, impl=impl),
            [query, one],
            [0, 1],
        )

    for actual, expected in zip(shared("triton"), shared("eager"), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    tensors = [t.float() for t in correlation_inputs((batch, 6, 2, 5, 8, 7, None))]
    index = torch.zeros(batch, dtype=torch.int64)
    settings = {"index": index}
    expected = run(kernels.correlation_projection, tensors, [0, 1, 2, 3], impl="eager", **settings)
    with poisoned_memory():
        actual = run(
            kernels.correlation_projection, tensors, [0, 1, 2, 3], impl="triton", **settings
        )
    torch.testing.assert_close(actual, expected)


def test_two_runs_are_equal_to_the_bit():
    tensors = low((6, 20, 3, 20, 40, 24, None), torch.bfloat16)
    index = torch.tensor([2, 0, 2, 2, 0, 1])
    first, second = (
        run(kernels.correlation_projection, tensors, [0, 1, 2, 3], impl="triton", index=index)
        for _ in range(2)
    )
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


def test_offsets_past_two_to_the_31st():
    """Frames 2³¹ elements apart; only the pages that are touched exist."""
    tensors = low(SMALL, torch.float16)
    far = []
    for tensor in tensors[:2]:
        storage = torch.empty(2**31 + tensor[0].numel(), dtype=torch.float16)
        apart = storage.as_strided(tensor.shape, (2**31, tensor.shape[2], 1))
        apart.copy_(tensor)
        far.append(apart)
    near = kernels.correlation_projection(*tensors, impl="triton")
    assert torch.equal(kernels.correlation_projection(*far, *tensors[2:], impl="triton"), near)


def test_rows_past_two_to_the_31st():
    """Rows so far apart that a 32-bit product of row number and stride would wrap."""
    query = low((1, 3, 1, 3, 8, 8, None), torch.float16)[0]
    storage = torch.empty(2 * (2**30 + 64) + 8, dtype=torch.float16)
    apart = storage.as_strided((1, 3, 8), (0, 2**30 + 64, 1))
    apart.copy_(query)
    rest = low((1, 3, 1, 3, 8, 8, None), torch.float16)[1:]
    actual = kernels.correlation_projection(apart, *rest, impl="triton")
    assert torch.equal(actual, kernels.correlation_projection(query, *rest, impl="triton"))


def test_the_next_call_after_an_error_works():
    tensors = low(SMALL, torch.float32)
    expected = kernels.correlation_projection(*tensors, impl="triton")
    with pytest.raises(ValueError, match="index"):
        kernels.correlation_projection(*tensors, index=torch.tensor([0, 9]), impl="triton")
    assert torch.equal(kernels.correlation_projection(*tensors, impl="triton"), expected)


def test_backward_keeps_the_inputs_only():
    tensors = [t.requires_grad_() for t in low(SMALL, torch.float32)]
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()), lambda tensor: tensor
    )
    with hooks:
        kernels.correlation_projection(*tensors, impl="triton")
    assert set(kept) <= {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("case", [SMALL, (3, 9, 2, 4, 30, 31, [1, 0, 1])], ids=str)
def test_opcheck(case):
    tensors = [t.requires_grad_() for t in low(case, torch.float32)]
    torch.library.opcheck(torch.ops.smtc.correlation_projection.default, (*tensors, index_of(case)))
    grad = torch.randn(case[0], case[1], case[5])
    inputs = [t.detach() for t in tensors[:3]]
    torch.library.opcheck(
        torch.ops.smtc.correlation_projection_backward.default,
        (grad, *inputs, index_of(case), [True, False, False]),
    )


def test_the_forms_without_triton_agree():
    case = (4, 9, 3, 4, 30, 31, [2, 0, 2, 2])
    tensors = low(case, torch.float32)
    grad = torch.randn(4, 9, 31)
    for launcher, plain, arguments in (
        (fused._forward, fused._reassociated, (*tensors, index_of(case))),
        (
            fused._backward,
            fused._reassociated_backward,
            (grad, *tensors[:3], index_of(case), [True] * 3),
        ),
    ):
        with launching.watch() as seen:
            expected = plain(*arguments)
        assert not seen
        torch.testing.assert_close(launcher(*arguments), expected, rtol=1e-4, atol=1e-4)
