"""Which implementation runs, what is said about it, and the surroundings it runs in."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from cases import clustered_clip, normal, only_kernels, uniform, unit

from smtc import kernels
from smtc.kernels import dispatch, eager, launching

MARGINAL = torch.full((2, 6), 1 / 6)
VALID = uniform(2, 3, 2, 4) > 0.3
CALLS = {
    "correlation_projection": ([normal(2, 6, 8), normal(2, 6, 8, seed=1), normal(3, 6)], {}),
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


def test_the_kernels_are_announced_with_their_launch_table(caplog, monkeypatch):
    dispatch._announce.cache_clear()
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    with caplog.at_level(logging.INFO, logger="smtc"):
        dispatch._announce("triton", torch.device("cuda"))
    assert "runs the Triton kernels with the launch table for sm_90 on cuda" in caplog.text


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
def test_triton_runs_kernels_and_nothing_of_eager(op):
    with only_kernels() as launches:
        results = call(op, impl="triton")
    assert launches
    for actual, expected in zip(results, call(op, impl="eager"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("op", CALLS)
def test_triton_never_falls_back(op, monkeypatch):
    with pytest.raises(ValueError, match=rf"{op}: impl: \"triton\" .*float64; use \"eager\""):
        call(op, torch.float64, impl="triton")
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with pytest.raises(ValueError, match=rf"{op}: impl: .*needs a CUDA device.*got cpu; use"):
        call(op, impl="triton")
    monkeypatch.setattr(dispatch, "_fused", {})
    with pytest.raises(ValueError, match=rf"{op}: impl: .*needs Triton.*pip install triton"):
        call(op, impl="triton")


@pytest.mark.parametrize(
    ("op", "place", "shape", "most"),
    [
        ("mask_losses", (0, 1), (1, 2, 129, 3), 128),
        ("transport_alignment", (1,), (2, 3, 129, 6), 128),
        ("masked_slot_attention", (0,), (2, 1, 257, 4), 256),
    ],
)
def test_more_slots_than_a_program_has_room_for(op, place, shape, most):
    tensors, settings = CALLS[op]
    tensors = [torch.rand(shape) if k in place else t.float() for k, t in enumerate(tensors)]
    with pytest.raises(ValueError, match=rf'{op}: impl: "triton" takes at most {most} slots'):
        getattr(kernels, op)(*tensors, **settings, impl="triton")
    getattr(kernels, op)(*tensors, **settings)


def test_auto_takes_the_kernels_on_a_gpu_where_they_pay(monkeypatch):
    class OnGpu:
        device = torch.device("cuda")
        dtype = torch.bfloat16

        def __init__(self, elements):
            self.elements = elements

        def numel(self):
            return self.elements

    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    large, small = OnGpu(2**24), OnGpu(2**10)
    assert dispatch._chosen("sinkhorn", [small]) == "triton"
    assert dispatch._chosen("correlation_projection", [large]) == "triton"
    assert dispatch._chosen("correlation_projection", [small]) == "eager"
    monkeypatch.setattr(dispatch, "_capability", lambda device: (7, 5))
    assert dispatch._chosen("sinkhorn", [large]) == "eager"
    assert "8.0 or newer" in dispatch.obstacle(torch.device("cuda"))
    small.dtype = torch.float64
    assert dispatch._chosen("sinkhorn", [small]) == "eager"


def test_every_kernel_file_is_named_like_its_operation():
    assert {*dispatch.FUSED, *dispatch.FILES} == set(kernels.__all__)
    assert set(dispatch._fused) == set(kernels.__all__)
    for op in kernels.__all__:
        assert callable(getattr(kernels, op))  # and no module of that name hides it


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("op", CALLS)
def test_autocast_changes_nothing(op, impl):
    expected = call(op, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(op, impl=impl)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", sorted(set(CALLS) - {"assignment", "correlation_projection"}))
def test_results_are_float32_unless_an_input_is_float64(op):
    for impl in ("eager", "triton"):
        assert call(op, torch.bfloat16, impl=impl)[-1].dtype == torch.float32
        assert call(op, torch.float32, impl=impl)[-1].dtype == torch.float32
    assert call(op, torch.float64)[-1].dtype == torch.float64


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("op", CALLS)
def test_operations_compile_into_one_graph(op, impl):
    torch.compiler.reset()
    tensors, settings = CALLS[op]
    tensors = [t.float() if t.is_floating_point() else t for t in tensors]
    settings = settings | {"impl": impl}
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


def test_who_compiles_can_have_the_choice_said(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._announce.cache_clear()
    with caplog.at_level("INFO", logger="smtc"):
        dispatch.announce(torch.device("cpu"))
        dispatch.announce(torch.device("cpu"))
    assert caplog.messages == ["operations: impl=auto runs plain torch (eager) on cpu"]
