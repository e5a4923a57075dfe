"""The schedule, AdamW's groups, and moments that travel by name."""

import math

import pytest
import torch
from torch import nn

from smtc.config import OptimConfig
from smtc.training.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)

NAMES = {
    "encoder.pos_embed": (1, 3, 2),
    "encoder.cls_token": (1, 1, 2),
    "encoder.proj.weight": (2, 2),
    "encoder.proj.bias": (2,),
    "slot_attention.slots_mu": (1, 2, 1, 2),
    "slot_attention.slots_sigma": (1, 2, 1, 2),
    "slot_attention.mlp.weight": (2, 2),
    "slot_attention.mlp.bias": (2,),
}


def parameters(only: str = "") -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {n: nn.Parameter(torch.randn(s)) for n, s in NAMES.items() if n.startswith(only)}


def decay_by_name(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {name: g["weight_decay"] for g in optimizer.param_groups for name in g["names"]}


def update(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.5) + parameter.detach()
    optimizer.step()


def test_cosine_runs_over_exactly_the_steps() -> None:
    config = OptimConfig(lr=2.0, schedule="cosine", warmup_steps=500, final_lr=0.1)
    rates = [learning_rate(step, 40, config) for step in range(40)]
    # DINO's table: final + (base - final) (1 + cos(pi i / n)) / 2 for i in 0 .. n-1.
    table = [0.2 + 1.8 * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(40)]
    assert rates == pytest.approx(table)
    assert rates[0] == 2.0
    assert 0.2 < rates[-1] < 0.203
    assert learning_rate(40, 40, config) == pytest.approx(0.2)


def test_warm_up_rises_in_equal_parts_and_meets_the_cosine() -> None:
    config = OptimConfig(lr=1.0, schedule="warmup_cosine", warmup_steps=4, final_lr=0.0)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])


def test_warm_up_longer_than_the_run_stays_finite_and_rising() -> None:
    config = OptimConfig(lr=1.0, schedule="warmup_cosine", warmup_steps=500)
    rates = [learning_rate(step, 3, config) for step in range(3)]
    assert 0 < rates[0] < rates[1] < rates[2] < 1


def test_one_step_starts_at_the_full_rate() -> None:
    assert learning_rate(0, 1, OptimConfig(lr=3.0, schedule="cosine")) == 3.0


def test_matrices_decay_and_embeddings_and_vectors_do_not() -> None:
    optimizer = build_optimizer(parameters(), OptimConfig(weight_decay=0.25))
    matrices = {"encoder.proj.weight", "slot_attention.mlp.weight"}
    assert decay_by_name(optimizer) == {name: 0.25 * (name in matrices) for name in NAMES}


def test_the_released_code_decays_embeddings_too() -> None:
    config = OptimConfig(weight_decay=0.25, decay_embeddings=True)
    expected = {name: 0.25 * (len(shape) > 1) for name, shape in NAMES.items()}
    assert decay_by_name(build_optimizer(parameters(), config)) == expected


def test_every_parameter_is_in_one_group_and_the_encoder_is_marked() -> None:
    given = parameters()
    optimizer = build_optimizer(given, OptimConfig(betas=(0.5, 0.75), eps=1e-3))
    assert isinstance(optimizer, torch.optim.AdamW)
    seen = []
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.5, 0.75), 1e-3)
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is given[name]
            assert group["encoder"] == name.startswith("encoder.")
            seen.append(name)
    assert sorted(seen) == sorted(NAMES)


@pytest.mark.parametrize(
    ("from_step", "step", "share"),
    [(0, 0, 0.01), (3, 0, 0.0), (3, 2, 0.0), (3, 3, 0.01), (3, 9, 0.01), (-1, 0, 0.0), (-1, 9, 0)],
)
def test_the_encoder_has_its_own_rate_by_phase(from_step: int, step: int, share: float) -> None:
    config = OptimConfig(lr=2.0, schedule="cosine", encoder_lr=0.01, encoder_from_step=from_step)
    optimizer = build_optimizer(parameters(), config)
    rate = set_learning_rate(optimizer, step, 10, config)
    assert rate == learning_rate(step, 10, config)
    for group in optimizer.param_groups:
        assert group["lr"] == (rate * share if group["encoder"] else rate)


def test_rate_zero_moves_no_weight_but_warms_the_moments() -> None:
    config = OptimConfig(weight_decay=0.5, decay_embeddings=True, encoder_from_step=-1)
    given = parameters()
    before = {name: p.detach().clone() for name, p in given.items()}
    optimizer = build_optimizer(given, config)
    set_learning_rate(optimizer, 0, 10, config)
    update(optimizer)
    for name, parameter in given.items():
        assert torch.equal(parameter, before[name]) == name.startswith("encoder.")
        assert optimizer.state[parameter]["exp_avg"].abs().sum() > 0


def test_moments_go_over_by_name_to_another_grouping() -> None:
    config = OptimConfig()
    first = build_optimizer(parameters(), config)
    update(first)
    saved = optimizer_state(first)
    assert set(saved) == set(NAMES)

    turned = dict(reversed(parameters().items()))
    second = build_optimizer(turned, OptimConfig(decay_embeddings=True))
    load_optimizer_state(second, saved)
    for name, moments in optimizer_state(second).items():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in moments.items():
            assert torch.equal(value, saved[name][key])
            assert value.data_ptr() != saved[name][key].data_ptr()


def test_an_update_after_the_round_trip_is_the_same() -> None:
    config = OptimConfig(lr=0.1)
    straight, resumed = parameters(), parameters()
    first = build_optimizer(straight, config)
    update(first)
    for name, parameter in resumed.items():
        parameter.data.copy_(straight[name])
    second = build_optimizer(resumed, config)
    load_optimizer_state(second, optimizer_state(first))
    update(first)
    update(second)
    assert all(torch.equal(straight[name], resumed[name]) for name in NAMES)


def test_parameters_without_saved_moments_start_afresh() -> None:
    head = build_optimizer(parameters("slot_attention."), OptimConfig())
    update(head)
    whole = build_optimizer(parameters(), OptimConfig())
    load_optimizer_state(whole, optimizer_state(head))
    assert set(optimizer_state(whole)) == set(parameters("slot_attention."))


def test_an_optimizer_that_never_stepped_has_no_moments() -> None:
    assert optimizer_state(build_optimizer(parameters(), OptimConfig())) == {}
