"""transport_alignment against the oracle, and against the mistakes that look almost right."""

import math

import pytest
import torch
from cases import CLIPS, DTYPES, clustered_clip, compare, difference

from smtc import kernels
from smtc.kernels import eager, reference

CLUSTERED = (2, 4, 40, 16, 5)


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
