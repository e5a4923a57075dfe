"""sinkhorn against the oracle, in plain torch and fused."""

import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import (
    DTYPES,
    TRANSPORT_MATRICES,
    TRITON_DTYPES,
    clustered_clip,
    compare,
    difference,
    normal,
    parity_cases,
    poisoned_memory,
    run,
    sinkhorn_inputs,
)
from torch.nn import functional

from smtc import kernels
from smtc.kernels import eager, launching, reference

fused = importlib.import_module("smtc.kernels.sinkhorn")
OP = "sinkhorn"
IMPLS = ["eager", "triton"]
SETTINGS = {"epsilon": 0.05, "iterations": 3}
# B, L, M: several tiles and programs down, several tiles across, a last one with one row or column
TILED = [(2, 70, 300), (1, 65, 129), (1, 33, 128), (1, 270, 3)]
# The logarithm of no sum at all, beyond the edge, is -inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


def low(case, dtype=torch.float32):
    return [tensor.to(dtype) for tensor in sinkhorn_inputs(case)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("case", TRANSPORT_MATRICES, ids=str)
def test_agrees_with_the_oracle(case, iterations, dtype):
    compare(OP, sinkhorn_inputs(case), [0, 1, 2], dtype, epsilon=0.1, iterations=iterations)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.025, 0.005])
def test_small_epsilon_and_large_costs(epsilon, scale, dtype):
    # cost/ε is rounded to its dtype before it is exponentiated, in any form of the algorithm.
    factor = max(1, 0.1 * scale / epsilon)
    tensors = sinkhorn_inputs((2, 31, 40), scale)
    compare(OP, tensors, [0, 1, 2], dtype, factor, epsilon=epsilon, iterations=5)


def test_marginals_need_not_sum_to_one():
    cost, rows, columns = sinkhorn_inputs((2, 7, 9))
    compare(
        OP,
        [cost, 5 * rows, 3 * columns],
        [0, 1, 2],
        torch.float64,
        epsilon=0.2,
        iterations=4,
    )


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("case", parity_cases(OP), ids=str)
def test_the_kernel_agrees_with_the_oracle(case, dtype):
    compare(OP, case.inputs(), case.wanted, dtype, case.factor, impl="triton", **case.settings)


@pytest.mark.parametrize("case", TILED, ids=str)
def test_the_kernel_agrees_over_several_tiles(case):
    settings = {"epsilon": 0.1, "iterations": 2, "impl": "triton"}
    compare(OP, sinkhorn_inputs(case), [0, 1, 2], torch.float32, **settings)


def clustered(rows, columns):
    """1 - cosine of two frames, whose clusters' shares differ, and marginals that follow them."""
    features, masks = clustered_clip(2, 2, max(rows, columns), 16, 3)
    unit = functional.normalize(features, dim=-1)
    weight = masks[:, :, 0] ** 2 + 1e-3
    cost = 1 - unit[:, 0, :rows] @ unit[:, 1, :columns].mT
    row_marginal, column_marginal = weight[:, 0, :rows], weight[:, 1, :columns]
    return [
        cost,
        row_marginal / row_marginal.sum(-1, keepdim=True),
        column_marginal / column_marginal.sum(-1, keepdim=True),
    ]


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.005])
def test_clustered_features_of_unbalanced_weight(epsilon, dtype):
    # As in the table of cases: what rounding cost/epsilon does to an exponential.
    factor = max(1, 0.1 / epsilon)
    settings = {"epsilon": epsilon, "iterations": 4, "impl": "triton"}
    compare(OP, clustered(70, 45), [0, 1, 2], dtype, factor, **settings)


@pytest.mark.parametrize("scale", [1, 1e4])
@pytest.mark.parametrize("epsilon", [1e-6, 1e6])
def test_any_epsilon_and_cost_stay_finite(epsilon, scale):
    cost, *marginals = low((2, 31, 40))
    found = run(
        kernels.sinkhorn,
        [scale * cost, *marginals],
        [0, 1, 2],
        epsilon=epsilon,
        iterations=3,
        impl="triton",
    )
    assert all(torch.isfinite(value).all() for value in itertools.chain(*found))


FUNCTIONS = {
    "eager": lambda *given, **settings: kernels.sinkhorn(*given, impl="eager", **settings),
    "triton": lambda *given, **settings: kernels.sinkhorn(
        *(tensor.float() for tensor in given), impl="triton", **settings
    ).double(),
    "reference": reference.sinkhorn,
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_columns_are_met_exactly_and_rows_in_the_limit(function):
    tolerance = {"rtol": 2e-5, "atol": 1e-8} if function == "triton" else {}
    cost, rows, columns = sinkhorn_inputs((2, 20, 30))
    plan = FUNCTIONS[function](cost, rows, columns, epsilon=0.05, iterations=3)
    torch.testing.assert_close(plan.sum(1), columns, **tolerance)
    assert difference(plan.sum(2), rows) > 1e-3
    many = 40 if function == "triton" else 500
    plan = FUNCTIONS[function](cost, rows, columns, epsilon=0.05, iterations=many)
    torch.testing.assert_close(plan.sum(2), rows, **tolerance)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_plan_of_the_transposed_cost_is_another(function):
    cost, rows, columns = sinkhorn_inputs((2, 20, 30))
    plan = FUNCTIONS[function](cost, rows, columns, **SETTINGS)
    other = FUNCTIONS[function](cost.mT, columns, rows, **SETTINGS)
    assert difference(other.mT, plan) > 0.05
    expected = reference.sinkhorn(cost.mT.contiguous(), columns, rows, **SETTINGS)
    assert difference(other, expected) < 1e-5


def test_backward_keeps_one_matrix():
    tensors = [tensor.requires_grad_() for tensor in sinkhorn_inputs((1, 30, 30))]
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernels.sinkhorn(*tensors, epsilon=0.1, iterations=5)
    assert sum(size >= 900 for size in kept) == 1


@pytest.mark.parametrize("module", [eager, reference])
def test_gradcheck(module):
    cost, rows, columns = sinkhorn_inputs((2, 3, 4))
    leaves = [tensor.requires_grad_() for tensor in (normal(*cost.shape), rows, columns)]
    assert torch.autograd.gradcheck(
        lambda *t: module.sinkhorn(*t, epsilon=0.7, iterations=3), leaves
    )


def test_the_kernels_backward_keeps_the_inputs_and_vectors():
    tensors = low((2, 40, 50))
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.data_ptr(): tensor.numel()}), lambda tensor: tensor
    )
    with hooks:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        kernels.sinkhorn(*leaves, impl="triton", **SETTINGS)
    own = {tensor.data_ptr() for tensor in tensors}
    assert own <= set(kept)
    others = sorted(size for place, size in kept.items() if place not in own)
    assert others == [3 * 2 * 40, 3 * 2 * 50]


def test_no_temporary_has_the_size_of_the_cost():
    tensors = low((1, 70, 150))
    with launching.watch() as launches:
        run(kernels.sinkhorn, tensors, [0], impl="triton", **SETTINGS)
    large = {
        argument.data_ptr(): tuple(argument.shape)
        for launch in launches
        for argument in launch.arguments
        if isinstance(argument, torch.Tensor) and argument.numel() >= tensors[0].numel()
    }
    assert list(large.values()) == 4 * [(1, 70, 150)]  # cost, plan, and their gradients


def test_views_are_read_where_they_lie():
    cost, rows, columns = low((2, 40, 150))
    expected = run(kernels.sinkhorn, [cost, rows, columns], [0, 1, 2], impl="eager", **SETTINGS)

    def awkward(cost, rows, columns):
        rows = rows.repeat_interleave(2, 1)[:, ::2]
        plan = kernels.sinkhorn(
            cost.mT.contiguous().mT, rows, columns.mT.contiguous().mT, impl="triton", **SETTINGS
        )
        return plan.mT.contiguous().mT

    actual = run(awkward, [cost, rows, columns], [0, 1, 2])
    for one, other in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert difference(one, other) < 1e-5


def test_expanded_inputs_and_gradients():
    cost, rows, columns = low((1, 30, 40))
    weight = normal(30, 1).float()

    def shared(impl):
        def function(cost, rows, columns):
            plan = kernels.sinkhorn(
                cost.expand(3, -1, -1),
                rows.expand(3, -1),
                columns[:, :1].expand(3, 40),
                impl=impl,
                **SETTINGS,
            )
            return (plan * weight).sum()

        return run(function, [cost, rows, columns], [0, 1, 2])

    actual, expected = shared("triton"), shared("eager")
    for one, other in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert difference(one, other) < 2e-5


def test_dtypes_may_differ():
    cost, rows, columns = sinkhorn_inputs((2, 31, 40))
    tensors = [cost.bfloat16(), rows.float(), columns.half()]
    exact = run(reference.sinkhorn, [t.double() for t in tensors], [0, 1, 2], **SETTINGS)
    outputs, gradients = run(kernels.sinkhorn, tensors, [0, 1, 2], impl="triton", **SETTINGS)
    assert outputs[0].dtype == torch.float32
    assert difference(outputs[0], exact[0][0]) < 1e-5
    for tensor, gradient, expected in zip(tensors, gradients, exact[1], strict=True):
        assert gradient.dtype == tensor.dtype
        assert difference(gradient, expected) < 4 * torch.finfo(tensor.dtype).eps + 1e-5


@pytest.mark.parametrize("problems", [0, 1])
def test_small_batches(problems):
    tensors = low((max(problems, 1), 6, 9))
    tensors = [tensor[:problems] for tensor in tensors]
    with poisoned_memory():
        made = fused._forward(*tensors, 0.05, 3)
        gradients = fused._backward(made[0], *tensors, *made[1:], 0.05, [True] * 3)
    plain = fused._plain(*tensors, 0.05, 3)
    expected = fused._plain_backward(plain[0], *tensors, *plain[1:], 0.05, [True] * 3)
    torch.testing.assert_close((*made, *gradients), (*plain, *expected))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_the_plain_form_of_the_operators(wanted):
    tensors = low((2, 31, 40))
    made, plain = fused._forward(*tensors, 0.05, 3), fused._plain(*tensors, 0.05, 3)
    torch.testing.assert_close(made, plain)
    grad, asked = normal(2, 31, 40).float(), [place in wanted for place in range(3)]
    with launching.watch() as launches:
        gradients = fused._backward(grad, *tensors, *made[1:], 0.05, asked)
    expected = fused._plain_backward(grad, *tensors, *plain[1:], 0.05, asked)
    assert [gradient.numel() > 0 for gradient in gradients] == asked
    assert ("_cost_gradient" in {launch.name for launch in launches}) == asked[0]
    for one, other in zip(gradients, expected, strict=True):
        assert one.shape == other.shape
        assert difference(one, other) < 1e-5


def test_two_runs_are_equal_to_the_bit():
    tensors = low((1, 70, 150), torch.bfloat16)
    first, second = (
        run(kernels.sinkhorn, tensors, [0, 1, 2], impl="triton", **SETTINGS) for _ in range(2)
    )
    for one, other in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert torch.equal(one, other)


def test_a_second_use_after_an_error():
    cost, rows, columns = low((2, 6, 9))
    expected = kernels.sinkhorn(cost, rows, columns, impl="triton", **SETTINGS)
    with pytest.raises(ValueError, match="row_marginal"):
        kernels.sinkhorn(cost, columns, rows, impl="triton", **SETTINGS)
    with pytest.raises(ValueError, match="epsilon"):
        kernels.sinkhorn(cost, rows, columns, impl="triton", epsilon=0.0, iterations=3)
    again = kernels.sinkhorn(cost, rows, columns, impl="triton", **SETTINGS)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("strides", [(2**31 + 8, 5, 1), (15, 2**30 + 8, 1), (15, 1, 2**29 + 8)])
def test_strides_past_the_range_of_32_bits(strides):
    cost, rows, columns = low((2, 3, 5), torch.float16)
    # Memory that is never written is never there.
    far = torch.empty(2**31 + 128, dtype=torch.float16).as_strided(cost.shape, strides)
    far.copy_(cost)
    actual = kernels.sinkhorn(far.requires_grad_(), rows, columns, impl="triton", **SETTINGS)
    near = cost.requires_grad_()
    expected = kernels.sinkhorn(near, rows, columns, impl="triton", **SETTINGS)
    assert torch.equal(actual, expected)
    weight = normal(2, 3, 5).float()
    (one,) = torch.autograd.grad((actual * weight).sum(), far)
    (other,) = torch.autograd.grad((expected * weight).sum(), near)
    assert torch.equal(one, other)


def test_the_grid_has_one_axis():
    """The others end at 65535 problems."""
    with launching.watch() as launches:
        run(kernels.sinkhorn, low((2, 70, 9)), [0, 1, 2], impl="triton", **SETTINGS)
    assert {len(launch.grid) for launch in launches} == {1}
    names = [launch.name for launch in launches]
    assert [names.count(name) for name in ("_iterate", "_combine", "_pull_back")] == [3, 3, 3]


def test_opcheck():
    tensors = low((2, 6, 9), torch.bfloat16)
    made = fused._forward(*tensors, 0.05, 2)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.smtc.sinkhorn.default, (*leaves, 0.05, 2))
    arguments = (made[0], *tensors, *made[1:], 0.05)
    for wanted in ([True] * 3, [False, True, False]):
        torch.library.opcheck(torch.ops.smtc.sinkhorn_backward.default, (*arguments, wanted))


COMPILED = """
import torch
from smtc import kernels
from smtc.kernels import aot, launching

for size in ((1, 1, 1), (1, 40, 50), (2, 1, 50), (2, 40, 1)):
    with launching.recording("sm_90") as launches:
        cost = torch.empty(size, device="meta", requires_grad=True)
        plan = kernels.sinkhorn(
            cost, cost[:, :, 0], cost[:, 0], epsilon=0.1, iterations=size[0], impl="triton"
        )
        plan.sum().backward()
    for launch in launches:
        print(launch.name, aot.compile_for(launch, "sm_90").spill_bytes)
"""


@pytest.mark.slow
def test_sizes_of_one_compile():
    """Triton makes constants of arguments that are 1, which the interpreter does not."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert set(found.values()) == {"0"}
    assert len(found) == 6


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_an_epsilon_beyond_float32_gives_the_product_of_the_marginals(impl):
    rows, columns = torch.full((1, 4), 1 / 4), torch.full((1, 5), 1 / 5)
    plan = kernels.sinkhorn(
        torch.rand(1, 4, 5), rows, columns, epsilon=1e46, iterations=1, impl=impl
    )
    torch.testing.assert_close(plan, torch.full((1, 4, 5), 1 / 20))
