"""transport_alignment against the oracle, and against the mistakes that look almost right."""

import importlib
import math

import pytest
import torch
from cases import (
    CLIPS,
    DTYPES,
    TRITON_DTYPES,
    clustered_clip,
    compare,
    difference,
    only_kernels,
    parity_cases,
    poisoned_memory,
)

from smtc import kernels
from smtc.kernels import eager, launching, reference, tuning

# The package's attribute of this name is the public function.
fused = importlib.import_module("smtc.kernels.transport_alignment")

CLUSTERED = (2, 4, 40, 16, 5)
ONE_LAUNCH = {"measure", "whole", "collect"}
PASSES = {"measure", "build", "iterate", "combine", "transport", "collect"}


@pytest.fixture
def in_passes(monkeypatch):
    """A launch a pass, at any size."""
    monkeypatch.setattr(fused, "MOST_POSITIONS_A_PROGRAM", 0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles of 16, so that few positions make many blocks, in either form."""
    chosen = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 16, "BLOCK_WIDTH": 16, "HELD": 1024, "SPAN": 16}
    original = tuning.options

    def small(kernel, tensor, size):
        found = original(kernel, tensor, size)
        return {name: chosen.get(name, value) for name, value in found.items()}

    monkeypatch.setattr(fused.tuning, "options", small)


def targets(tensors, dtype=torch.float32, impl="triton", **settings):
    settings = {"epsilon": 0.05, "iterations": 3} | settings
    tensors = [tensor.to(dtype) for tensor in tensors]
    return kernels.transport_alignment(*tensors, impl=impl, **settings)


def names(launches):
    return {launch.name for launch in launches}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("marginals", ["uniform", "l1"])
@pytest.mark.parametrize("cost", ["cosine", "dot"])
@pytest.mark.parametrize("case", CLIPS, ids=str)
def test_agrees_with_the_oracle(case, cost, marginals, dtype):
    settings = {"cost": cost, "marginals": marginals, "epsilon": 0.1, "iterations": 3}
    compare("transport_alignment", clustered_clip(*case), [], dtype, **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.025, 0.02, 0.005])
def test_both_forms_across_epsilon(epsilon, iterations, dtype):
    factor = max(1, 0.5 / epsilon)
    settings = {"epsilon": epsilon, "iterations": iterations, "marginals": "l1"}
    compare("transport_alignment", clustered_clip(*CLUSTERED), [], dtype, factor, **settings)


def test_the_scaling_form_survives_its_worst_costs():
    features, masks = clustered_clip(1, 2, 63, 8, 3)
    # Opposite directions: costs of 0 and 2 only, in frames with very different shares of each.
    axis = torch.zeros(8, dtype=torch.float64)
    axis[0] = 1
    signs = torch.ones(1, 2, 63, 1, dtype=torch.float64)
    signs[:, 0, 1:] = -1
    signs[:, 1, 60:] = -1
    compare(
        "transport_alignment",
        [signs * axis + 1e-3 * features, masks],
        [],
        torch.float32,
        20,
        epsilon=0.025,
        iterations=3,
    )


def test_the_scaling_form_runs_where_it_is_safe(monkeypatch):
    ran = []
    for name in ("_scaling_targets", "_log_targets"):
        original = getattr(eager, name)

        def spy(*args, name=name, original=original):
            ran.append(name)
            return original(*args)

        monkeypatch.setattr(eager, name, spy)

    def chosen(**settings):
        ran.clear()
        kernels.transport_alignment(*clustered_clip(1, 2, 5, 4, 2), iterations=1, **settings)
        return set(ran)

    assert chosen(epsilon=0.025) == {"_scaling_targets"}
    assert chosen(epsilon=0.0249) == {"_log_targets"}
    assert chosen(epsilon=1.0, cost="dot") == {"_log_targets"}


@pytest.mark.parametrize("kibibytes", [0, 30, 10**6])
def test_chunks_do_not_change_the_result(monkeypatch, kibibytes):
    tensors = clustered_clip(*CLUSTERED)
    expected = reference.transport_alignment(*tensors, epsilon=0.05, iterations=3)
    monkeypatch.setattr(eager, "PAIR_CHUNK_BYTES", {"cpu": 1024 * kibibytes})
    actual = kernels.transport_alignment(*tensors, epsilon=0.05, iterations=3)
    torch.testing.assert_close(actual, expected)


def plan_of(features, t, j):
    unit = torch.nn.functional.normalize(features, dim=-1)
    marginal = torch.full_like(unit[:, 0, :, 0], 1 / features.shape[2])
    return reference.sinkhorn(
        1 - unit[:, t] @ unit[:, j].mT, marginal, marginal, epsilon=0.05, iterations=3
    )


@pytest.mark.parametrize("module", [kernels, reference])
def test_a_transposed_plan_or_a_missing_direction_would_show(module):
    features, masks = clustered_clip(*CLUSTERED)
    targets = module.transport_alignment(features, masks, epsilon=0.05, iterations=3)
    right, transposed, one_way = (torch.zeros_like(targets) for _ in range(3))
    for t in range(4):
        for j in range(4):
            if t == j:
                continue
            plan = plan_of(features, t, j)
            right[:, t] += masks[:, j] @ plan.mT
            transposed[:, t] += masks[:, j] @ (plan if t < j else plan_of(features, j, t).mT).mT
            if t < j:
                one_way[:, t] += masks[:, j] @ plan.mT
    torch.testing.assert_close(targets, right)
    assert difference(transposed, right) > 0.05
    assert difference(one_way, right) > 0.05


def test_the_sum_over_slots_is_not_the_marginal():
    features, masks = clustered_clip(*CLUSTERED)
    targets = kernels.transport_alignment(features, masks, epsilon=0.05, iterations=3)
    total = targets.sum(2)
    assert difference(torch.full_like(total, 3 / features.shape[2]), total) > 0.05


def test_marginals_and_costs_differ():
    tensors = clustered_clip(*CLUSTERED)

    def targets(**settings):
        return kernels.transport_alignment(*tensors, epsilon=0.05, iterations=3, **settings)

    assert difference(targets(marginals="l1"), targets()) > 0.005
    assert difference(targets(cost="dot"), targets()) > 0.05


def test_dot_cost_is_scaled_by_the_width():
    features, masks = clustered_clip(1, 2, 9, 16, 2)
    cost = -features[:, 0] @ features[:, 1].mT / math.sqrt(16)
    marginal = torch.full_like(cost[:, 0], 1 / 9)
    plan = reference.sinkhorn(cost, marginal, marginal, epsilon=0.3, iterations=2)
    targets = kernels.transport_alignment(features, masks, epsilon=0.3, iterations=2, cost="dot")
    torch.testing.assert_close(targets[:, 0], masks[:, 1] @ plan.mT)


def test_inputs_that_require_grad_are_refused():
    features, masks = clustered_clip(1, 2, 5, 4, 2)
    for tensors in ([features.clone().requires_grad_(), masks], [features, masks.requires_grad_()]):
        with pytest.raises(ValueError, match=r"(features|masks).*requires_grad.*\.detach\(\)"):
            kernels.transport_alignment(*tensors, epsilon=0.05, iterations=3)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("case", parity_cases("transport_alignment"), ids=str)
def test_the_kernels_agree_with_the_oracle(case, dtype):
    inputs = case.inputs()
    alone = inputs[0].shape[1] == 1
    compare(
        case.op, inputs, case.wanted, dtype, case.factor,
        impl="triton", launches=not alone, **case.settings,
    )  # fmt: skip


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "epsilon", "cost"),
    [
        (torch.float32, 0.05, "cosine"),
        (torch.bfloat16, 0.05, "cosine"),
        (torch.float32, 0.5, "cosine"),
        (torch.float32, 0.01, "cosine"),
        (torch.float16, 0.3, "dot"),
    ],
)
@pytest.mark.parametrize("separate", [False, True])
def test_many_blocks(separate, dtype, epsilon, cost, iterations, small_blocks, request):
    """Blocks of rows, columns and width that do not divide the sizes, in one launch and in many."""
    if separate:
        request.getfixturevalue("in_passes")
    settings = {"epsilon": epsilon, "iterations": iterations, "marginals": "l1", "cost": cost}
    compare(
        "transport_alignment", clustered_clip(1, 2, 35, 20, 17), [], dtype, max(1, 0.5 / epsilon),
        impl="triton", **settings,
    )  # fmt: skip


def test_the_form_of_the_kernels_is_chosen_by_name(in_passes, monkeypatch):
    def forms(**settings):
        with only_kernels() as seen:
            targets(clustered_clip(1, 2, 5, 4, 2), iterations=2, **settings)
        assert names(seen) == PASSES
        return {launch.options["LOG"] for launch in seen if "LOG" in launch.options}

    assert forms(epsilon=0.025) == {False}
    assert forms(epsilon=0.0249) == {True}
    assert forms(epsilon=1.0, cost="dot") == {True}


def test_the_matrix_is_bf16_only_in_the_scaling_form():
    def stored(dtype, epsilon):
        with launching.watch() as seen:
            targets(clustered_clip(1, 2, 5, 4, 2), dtype, epsilon=epsilon)
        (whole,) = (launch for launch in seen if launch.name == "whole")
        return whole.arguments[4].dtype

    assert stored(torch.bfloat16, 0.05) == stored(torch.float16, 0.05) == torch.bfloat16
    assert stored(torch.float32, 0.05) == torch.float32
    assert stored(torch.bfloat16, 0.01) == torch.float32


def test_few_positions_are_one_program_a_pair():
    assert fused.one_program_a_pair(256, 64)
    assert not fused.one_program_a_pair(257, 64) and not fused.one_program_a_pair(256, 65)

    def launched(positions):
        with launching.watch() as seen:
            targets(clustered_clip(2, 3, positions, 4, 2), iterations=1)
        return names(seen), {launch.name: launch.grid for launch in seen}

    few, grids = launched(20)
    assert few == ONE_LAUNCH
    assert grids["whole"] == (2 * 3,)
    assert launched(257)[0] == PASSES


def test_both_ways_to_launch_agree(monkeypatch):
    tensors = clustered_clip(*CLUSTERED)
    together = targets(tensors)
    monkeypatch.setattr(fused, "MOST_POSITIONS_A_PROGRAM", 0)
    torch.testing.assert_close(together, targets(tensors), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_the_kernels_survive_the_worst_costs(dtype, in_passes):
    features, masks = clustered_clip(1, 2, 63, 8, 3)
    axis = torch.zeros(8, dtype=torch.float64)
    axis[0] = 1
    signs = torch.ones(1, 2, 63, 1, dtype=torch.float64)
    signs[:, 0, 1:] = -1
    signs[:, 1, 60:] = -1
    inputs = [signs * axis + 1e-3 * features, masks]
    for epsilon in (0.025, 0.005):
        compare(
            "transport_alignment", inputs, [], dtype, 20 * (0.025 / epsilon),
            impl="triton", epsilon=epsilon, iterations=3,
        )  # fmt: skip


def test_large_features_do_not_overflow_the_dot_cost(in_passes):
    features, masks = clustered_clip(1, 2, 33, 8, 3)
    settings = {"epsilon": 0.05, "iterations": 3, "cost": "dot"}
    compare(
        "transport_alignment", [10 * features, masks], [], torch.float32, 1000,
        impl="triton", **settings,
    )  # fmt: skip


@pytest.mark.parametrize("separate", [False, True])
def test_a_bf16_matrix_costs_little(separate, request):
    """Against plain torch in float32 on the same numbers: only the matrix was rounded."""
    if separate:
        request.getfixturevalue("in_passes")
    tensors = [tensor.bfloat16().float() for tensor in clustered_clip(1, 3, 100, 24, 5)]
    exact = targets(tensors, impl="eager")
    assert difference(targets(tensors, torch.bfloat16), exact) < 2**-9
    assert difference(targets(tensors), exact) < 1e-6


@pytest.mark.parametrize("separate", [False, True])
def test_the_masks_are_not_rounded_to_bf16(separate, request):
    """Equal features make the matrix exactly 1: what remains is the product with the masks."""
    if separate:
        request.getfixturevalue("in_passes")
    features = torch.ones(1, 2, 20, 8, dtype=torch.bfloat16)
    masks = clustered_clip(1, 2, 20, 8, 3)[1].float()
    settings = {"epsilon": 0.05, "iterations": 3}
    found = kernels.transport_alignment(features, masks, impl="triton", **settings)
    mean = masks.flip(1).mean(-1, keepdim=True) / 20
    assert difference(found, mean.expand_as(found)) < 2e-5


@pytest.mark.parametrize("positions", [40, 300])
def test_chunks_of_clips_do_not_change_a_bit(positions, monkeypatch):
    tensors = clustered_clip(3, 2, positions, 8, 3)
    whole = targets(tensors, torch.bfloat16)
    original = tuning.options

    def tight(kernel, tensor, size):
        return {"MEBIBYTES": 0} if kernel.endswith("chunk") else original(kernel, tensor, size)

    monkeypatch.setattr(fused.tuning, "options", tight)
    with launching.watch() as seen, poisoned_memory():
        assert torch.equal(targets(tensors, torch.bfloat16), whole)
    assert sum(launch.name == "collect" for launch in seen) == 3


@pytest.mark.parametrize("separate", [False, True])
def test_the_kernels_neither_transpose_plans_nor_lose_a_direction(separate, request):
    if separate:
        request.getfixturevalue("in_passes")
    features, masks = clustered_clip(*CLUSTERED)
    found = targets([features, masks])
    right = torch.zeros_like(masks)
    for t in range(4):
        for j in range(4):
            if t != j:
                right[:, t] += masks[:, j] @ plan_of(features, t, j).mT
    assert difference(found, right) < 1e-5
    total = found.sum(2)
    assert difference(torch.full_like(total, 3 / features.shape[2]), total) > 0.05


@pytest.mark.parametrize("separate", [False, True])
def test_strided_and_expanded_inputs(separate, request):
    if separate:
        request.getfixturevalue("in_passes")
    features, masks = (tensor.float() for tensor in clustered_clip(1, 3, 30, 12, 4))
    expected = targets([features, masks])
    strided = [
        features.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        masks.transpose(1, 3).contiguous().transpose(1, 3),
    ]
    assert torch.equal(targets(strided), expected)
    expanded = targets([features.expand(2, -1, -1, -1), masks.expand(2, -1, -1, -1)])
    assert torch.equal(expanded, expected.expand(2, -1, -1, -1))


@pytest.mark.parametrize("separate", [False, True])
def test_strides_past_32_bits(separate, request):
    if separate:
        request.getfixturevalue("in_passes")
    features, masks = (tensor.half() for tensor in clustered_clip(1, 3, 20, 6, 3))
    expected = targets([features, masks], torch.float16)
    # The stride fits 32 bits, twice the stride does not; only the pages in use exist.
    step = 2**30 + 8
    far = torch.empty(2 * step + 4096, dtype=torch.float16)
    there = far.as_strided(features.shape, (1, step, 6, 1))
    also = far[1024:].as_strided(masks.shape, (1, step, 20, 1))
    there.copy_(features)
    also.copy_(masks)
    assert torch.equal(targets([there, also], torch.float16), expected)


def test_no_clip_and_no_pair():
    for clips, frames in ((0, 3), (2, 1)):
        features, masks = torch.randn(clips, frames, 6, 4), torch.rand(clips, frames, 2, 6)
        with poisoned_memory(), launching.watch() as seen:
            found = fused.transport_alignment(features, masks, epsilon=0.05, iterations=3)
        assert torch.equal(found, torch.zeros(clips, frames, 2, 6))
        assert not seen


def test_the_same_bits_again_and_after_an_error():
    tensors = clustered_clip(1, 3, 50, 8, 3)
    first = targets(tensors)
    with pytest.raises(ValueError, match="epsilon"):
        targets(tensors, epsilon=-1.0)
    assert torch.equal(targets(tensors), first)


def test_features_of_zeros_move_nothing():
    """With marginals "l1" a position without direction has no mass."""
    features, masks = clustered_clip(1, 2, 20, 6, 3)
    features[:, :, 4] = 0
    for epsilon in (0.05, 0.01):
        found = targets([features, masks], epsilon=epsilon, marginals="l1")
        assert torch.isfinite(found).all()
        assert not found[..., 4].any()


def test_registered():
    features, masks = (tensor.float() for tensor in clustered_clip(1, 3, 20, 6, 3))
    arguments = (features, masks, 0.05, 2, "l1", "cosine")
    torch.library.opcheck(torch.ops.smtc.transport_alignment.default, arguments)

    def call(features, masks):
        return 2 * targets([features, masks], iterations=2)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, masks), call(features, masks))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(features, masks), 2 * targets([features, masks], iterations=2))


def test_plain_torch_has_the_same_schema():
    features, masks = (tensor.float() for tensor in clustered_clip(1, 3, 20, 6, 3))
    plain = fused._plain(features, masks, 0.05, 2, "l1", "cosine")
    torch.testing.assert_close(plain, targets([features, masks], iterations=2, marginals="l1"))
