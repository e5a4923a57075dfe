"""The operators in torch: compile, export, autocast, and machines without interpreter or Triton."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_dispatch import CALLS

from smtc import kernels
from smtc.benchmarks.comparison import run

HERE = Path(__file__).parent
DIFFERENTIABLE = {
    "correlation_projection": [0, 1, 2],
    "masked_slot_attention": [0, 1, 2],
    "sinkhorn": [0, 1],
    "mask_losses": [0],
    "instance_consistency": [0],
}


def single(op):
    tensors, settings = CALLS[op]
    tensors = [t.float() if t.is_floating_point() else t.clone() for t in tensors]
    return tensors, settings | {"impl": "triton"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiled_forward_and_backward(op, dynamic):
    torch.compiler.reset()
    tensors, settings = single(op)
    function = getattr(kernels, op)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected = run(function, tensors, DIFFERENTIABLE[op], **settings)
    actual = run(compiled, tensors, DIFFERENTIABLE[op], **settings)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", CALLS)
def test_exported(op):
    tensors, settings = single(op)

    class Module(torch.nn.Module):
        def forward(self, *given):
            return getattr(kernels, op)(*given, **settings)

    program = torch.export.export(Module(), tuple(tensors))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("smtc.") for name in called)
    torch.testing.assert_close(program.module()(*tensors), Module()(*tensors))


def test_an_operator_itself_ignores_autocast():
    (query, reference, weight), _ = single("correlation_projection")
    operator = torch.ops.smtc.correlation_projection
    expected = operator(query, reference, weight, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        actual = operator(query, reference, weight, None, None)
        assert (query @ query.mT).dtype == torch.bfloat16  # and it is on again afterwards
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_gradients_stop_after_the_first():
    (query, reference, weight), settings = single("correlation_projection")
    query.requires_grad_()
    out = kernels.correlation_projection(query, reference, weight, **settings)
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|differentiat"):
        torch.autograd.grad(gradient.sum(), query)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which Triton's interpreter is off."""
    import os

    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    variables["PYTHONPATH"] = str(HERE)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_operators_run_in_plain_torch_on_a_cpu_without_the_interpreter():
    """What an exported program needs on another machine: forward and backward operators."""
    done = python(
        """
        import torch
        from smtc import kernels
        from smtc.kernels import launching, dispatch
        from smtc.benchmarks.comparison import run
        from test_registration import DIFFERENTIABLE, single
        assert not launching.INTERPRETED
        # As if a GPU were asked for: the operators are reached, their CPU forms run.
        dispatch.obstacle = lambda device: None
        with launching.watch() as launches:
            for op in DIFFERENTIABLE | {"transport_alignment": [], "assignment": []}:
                tensors, settings = single(op)
                function = getattr(kernels, op)
                wanted = DIFFERENTIABLE.get(op, [])
                actual = run(function, tensors, wanted, **settings)
                expected = run(function, tensors, wanted, **settings | {"impl": "eager"})
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert not launches
        """
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_get_the_same_bits():
    code = """
        import hashlib
        from smtc import kernels
        from smtc.benchmarks.comparison import run
        from test_registration import CALLS, DIFFERENTIABLE, single
        bits = hashlib.sha256()
        for op in CALLS:
            tensors, settings = single(op)
            outputs, gradients = run(
                getattr(kernels, op), tensors, DIFFERENTIABLE.get(op, []), **settings
            )
            for value in (*outputs, *gradients):
                bits.update(value.numpy().tobytes())
        print(bits.hexdigest())
        """
    first, second = (python(code, TRITON_INTERPRET="1") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.strip()) == 64
    assert first.stdout == second.stdout


def test_without_triton_everything_but_the_kernels_works():
    done = python(
        """
        import sys
        sys.modules["triton"] = None
        import torch
        from smtc import kernels
        cost = torch.rand(1, 4, 4)
        assert kernels.assignment(cost).shape == (1, 4)
        try:
            kernels.assignment(cost, impl="triton")
        except ValueError as error:
            print(error)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "needs Triton, which is not installed (pip install triton)" in done.stdout


def test_every_operator_has_an_autocast_kernel():
    names = [name for name in dir(torch.ops.smtc) if not name.startswith("_") and name != "name"]
    assert set(CALLS) - {"active_negatives"} <= set(names)
    for name in names:
        for key in ("AutocastCPU", "AutocastCUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"smtc::{name}", key), name
