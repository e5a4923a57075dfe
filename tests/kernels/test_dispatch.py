"""Which implementation runs, what is said about it, and the surroundings it runs in."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from cases import clustered_clip, normal, uniform, unit

from smtc import kernels
from smtc.kernels import dispatch, eager

MARGINAL = torch.full((2, 6), 1 / 6)
VALID = uniform(2, 3, 2, 4) > 0.3
CALLS = {
    "correlation_projection": ([normal(2, 6, 4), normal(2, 6, 4, seed=1), normal(3, 6)], {}),
    "masked_slot_attention": (
        [normal(2, 3, 2, 4), normal(2, 6, 4, seed=1), normal(2, 6, 4, seed=2)],
        {"scale": 0.5, "epsilon": 1e-8},
    ),
    "sinkhorn": ([uniform(2, 6, 6), MARGINAL, MARGINAL], {"epsilon": 0.1, "iterations": 2}),
    "transport_alignment": (clustered_clip(2, 3, 6, 4, 2), {"epsilon": 0.1, "iterations": 2}),
    "mask_losses": ([normal(2, 3, 4, 5), uniform(2, 3, 4, 5)], {}),
    "assignment": ([normal(3, 5, 5)], {}),
    "instance_consistency": (
        [unit(2, 3, 2, 4, 5), unit(2, 3, 2, 4, 5, seed=1), VALID, VALID],
        {"form": "cosine", "margin": 0.2},
    ),
    "active_negatives": (
        [unit(2, 3, 2, 4, 5), unit(2, 3, 2, 4, 5, seed=1), VALID],
        {"margin": 1.0},
    ),
}


def call(op, dtype=torch.float32, impl="auto"):
    tensors, settings = CALLS[op]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    result = getattr(kernels, op)(*tensors, **settings, impl=impl)
    return result if isinstance(result, tuple) else (result,)


def test_every_public_operation_is_covered_here():
    assert set(CALLS) == set(kernels.__all__)


def test_auto_is_eager_and_says_so_once(caplog):
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="smtc"):
        call("sinkhorn")
        call("assignment")
        assert [record.name for record in caplog.records] == ["smtc"]
        assert "eager" in caplog.text


def test_an_explicit_choice_says_nothing(caplog):
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="smtc"):
        call("sinkhorn", impl="eager")
    assert not caplog.records


@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize("op", CALLS)
def test_the_eager_form_runs(op, impl, monkeypatch):
    monkeypatch.setattr(eager, op, lambda *args, **settings: ("ran", op))
    assert call(op, impl=impl) == ("ran", op)


@pytest.mark.parametrize("op", CALLS)
def test_triton_never_falls_back(op):
    with pytest.raises(ValueError, match=rf"{op}: impl: .*no Triton implementation.*eager"):
        call(op, impl="triton")


@pytest.mark.parametrize("op", CALLS)
def test_autocast_changes_nothing(op):
    expected = call(op)
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(op)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", sorted(set(CALLS) - {"assignment", "correlation_projection"}))
def test_results_are_float32_unless_an_input_is_float64(op):
    assert call(op, torch.bfloat16)[-1].dtype == torch.float32
    assert call(op, torch.float32)[-1].dtype == torch.float32
    assert call(op, torch.float64)[-1].dtype == torch.float64


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("op", CALLS)
def test_operations_compile_into_one_graph(op):
    torch.compiler.reset()
    tensors, settings = CALLS[op]
    function = torch.compile(getattr(kernels, op), backend="aot_eager", fullgraph=True)
    if op in ("sinkhorn", "mask_losses", "instance_consistency", "masked_slot_attention"):
        tensors = [tensors[0].clone().requires_grad_(), *tensors[1:]]
    actual, expected = function(*tensors, **settings), getattr(kernels, op)(*tensors, **settings)
    torch.testing.assert_close(actual, expected)


def test_import_under_another_name_is_refused():
    place = Path(kernels.__file__)
    spec = importlib.util.spec_from_file_location("kernels", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=r"'kernels' is smtc\.kernels.*pip install -e \."):
        spec.loader.exec_module(module)
