"""The kernels on a real GPU: run by `make gpu-check`, skipped where there is none.

`TRITON_INTERPRET=0` keeps the other tests' interpreter off.
"""

import functools
import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, OPERATIONS, TRITON_DTYPES, compare, parity_cases, run
from torch import Tensor

from smtc import kernels, presets
from smtc.benchmarks.cases import Case, at_size
from smtc.kernels import dispatch, launching
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or launching.INTERPRETED,
    reason="needs a CUDA device and TRITON_INTERPRET=0",
)
correlation = importlib.import_module("smtc.kernels.correlation_projection")


def starts_kernels(case: Case) -> bool:
    """Whether a parity case is none of the documented exceptions: plain products, one frame."""
    inputs: list[Any] = case.inputs()
    if case.op == "correlation_projection":
        return not correlation.reassociates(*inputs[:3])
    return case.op != "transport_alignment" or inputs[0].shape[1] > 1


@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, dtype: torch.dtype) -> None:
    compare(
        case.op,
        case.inputs(),
        case.wanted,
        dtype,
        case.factor,
        impl="triton",
        device="cuda",
        launches=starts_kernels(case),
        **case.settings,
    )


def prepared(op: str, positions: int = 256) -> list[tuple[Callable[..., Any], list[Any]]]:
    """The calls of `op` in a step of four clips, as functions of their differentiable inputs."""
    calls = []
    for case in at_size(op, positions, "cuda", torch.bfloat16, clips=4):
        inputs = case.inputs()
        leaves = {id(inputs[k]): inputs[k].detach().requires_grad_() for k in case.wanted}
        placed = [leaves.get(id(value), value) for value in inputs]
        function = functools.partial(getattr(kernels, op), impl="triton", **case.settings)
        calls.append((function, placed))
    return calls


def forward_backward(function: Callable[..., Any], inputs: list[Any]) -> list[Tensor]:
    """Outputs and gradients, by a sum that needs nothing from the host."""
    result = function(*inputs)
    outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o is not None]
    leaves = list({id(v): v for v in inputs if v is not None and v.requires_grad}.values())
    scalars = [o.float().square().sum() for o in outputs if o.requires_grad]
    gradients = torch.autograd.grad(sum(scalars), leaves) if leaves else ()
    return [*(o.detach() for o in outputs), *gradients]


@pytest.mark.parametrize("positions", [256, 1024, 1500])
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_paper_s_sizes_agree_with_eager_in_float32(op: str, positions: int) -> None:
    for call, inputs in prepared(op, positions):
        wide = [
            v.detach().float() if v is not None and v.is_floating_point() else v for v in inputs
        ]
        with torch.no_grad():
            actual, expected = call(*inputs), call(*wide, impl="eager")
        first, true = (v[0] if isinstance(v, tuple) else v for v in (actual, expected))
        error = (first.double() - true.double()).norm() / true.double().norm()
        assert float(error) < (0 if op == "assignment" else 2e-2) or torch.equal(first, true)


@pytest.mark.parametrize("op", OPERATIONS)
def test_nothing_waits_for_the_device(op: str) -> None:
    for call, inputs in prepared(op):
        forward_backward(call, inputs)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_backward(call, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPERATIONS)
def test_graphs_replay_on_new_inputs(op: str) -> None:
    for call, inputs in prepared(op):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                forward_backward(call, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward_backward(call, inputs)
        with torch.no_grad():
            inputs[0].copy_(inputs[0].flip(0))
        graph.replay()
        expected = forward_backward(call, inputs)
        for one, other in zip(captured, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("op", OPERATIONS)
def test_compiled_with_inductor(op: str) -> None:
    torch.compiler.reset()
    for call, inputs in prepared(op):
        expected = forward_backward(call, inputs)
        compiled = torch.compile(call, fullgraph=True)
        for one, other in zip(forward_backward(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(one, other)


def digest() -> str:
    """Of the bits of every operation's outputs and gradients on fixed inputs."""
    bits = hashlib.sha256()
    for op in OPERATIONS:
        for case in parity_cases(op):
            inputs = [
                v if v is None else v.to("cuda", torch.bfloat16 if v.is_floating_point() else None)
                for v in case.inputs()
            ]
            settings = {
                name: value.cuda() if isinstance(value, Tensor) else value
                for name, value in case.settings.items()
            }
            function = functools.partial(getattr(kernels, op), impl="triton")
            outputs, gradients = run(function, inputs, case.wanted, **settings)
            for value in (*outputs, *gradients):
                bits.update(value.float().cpu().numpy().tobytes())
    return bits.hexdigest()


def test_two_processes_get_the_same_bits() -> None:
    command = [sys.executable, "-c", "import test_on_gpu; print(test_on_gpu.digest())"]
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": here, "TRITON_INTERPRET": "0"}
    said = {
        subprocess.run(
            command, env=environment, cwd=here, check=True, capture_output=True, text=True
        ).stdout.strip()
        for _ in range(2)
    }
    assert said == {digest()}


@pytest.mark.parametrize("op", OPERATIONS)
def test_auto_runs_the_kernels(op: str) -> None:
    dispatch._announce.cache_clear()
    case = at_size(op, 256, "cuda", torch.bfloat16, clips=4)[0]
    with launching.watch() as launches:
        getattr(kernels, op)(*case.inputs(), **case.settings)
    assert launches


def test_a_training_step_waits_for_nothing() -> None:
    config = presets.tiny()
    config = replace(config, model=replace(config.model, impl="triton"))
    method = SMTCMethod(config).cuda().train()
    optimizer = torch.optim.AdamW(method.trainable(0).values(), fused=True)
    batch = Batch(
        views=torch.randn(4, 2, 4, 3, *config.model.resolution, device="cuda"),
        sources=[],
        index=torch.arange(4, device="cuda"),
    )

    def step(number: int) -> None:
        loss = method.training_step(batch, number)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(number)

    first = config.objective.instance_from_step
    step(first)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(first + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
