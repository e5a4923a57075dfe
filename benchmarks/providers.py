"""Who computes an operation in `bench kernels`: the kernels, plain torch, the oracle, peers.

| provider | what | inputs |
|---|---|---|
| triton | the fused kernels | bf16 |
| eager-bf16, eager-fp32 | the best plain-torch form | bf16, fp32 |
| compile | torch.compile of eager | bf16 |
| plain | the paper's equations, literally (`kernels/reference.py`) | fp32 |
| scipy | `linear_sum_assignment` in a loop, with the copies to the host and back | fp32 |
| pot | the batched log-domain Sinkhorn of POT (`pip install POT`) | fp32 |

All get the same numbers: what is drawn in bf16 is widened for fp32. What an operation always takes
in fp32 (costs, logits of the losses) stays fp32. GeomLoss is no provider: it anneals ε and returns
a loss, so it solves another problem.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smtc import kernels
from smtc.benchmarks.cases import Case, Inputs
from smtc.errors import UserError
from smtc.kernels import reference
from smtc.kernels.dispatch import obstacle

# The largest relative L2 distance from eager in fp32 at the timed size: bf16 stays under 1e-2.
FARTHEST = 2e-2


@dataclass(frozen=True)
class Provider:
    """One column of the comparison.

    `function` makes what is timed; `impl` names the implementation whose parity is checked before
    it (None for what is no implementation of ours); `only` the one operation of a peer.
    """

    name: str
    dtype: str
    function: Callable[[Case], Callable[..., Any]]
    impl: str | None = None
    only: str | None = None
    needs: str | None = None
    """A package that may be missing."""
    captures: bool = True
    """Whether a CUDA graph can hold it: nothing in it waits for the device."""

    def computes(self, op: str) -> bool:
        """Whether it has this operation."""
        return self.only in (None, op)


def _ours(impl: str) -> Callable[[Case], Callable[..., Any]]:
    def function(case: Case) -> Callable[..., Any]:
        return functools.partial(getattr(kernels, case.op), impl=impl, **case.settings)

    return function


def _compiled(case: Case) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(_ours("eager")(case), dynamic=False)
    return compiled


def _plain(case: Case) -> Callable[..., Any]:
    return functools.partial(getattr(reference, case.op), **case.settings)


def _scipy(case: Case) -> Callable[..., Any]:
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    def assign(cost: Tensor) -> Tensor:
        matrices = cost.detach().double().cpu().flatten(0, -3).numpy()
        columns = np.stack([linear_sum_assignment(matrix)[1] for matrix in matrices])
        return torch.from_numpy(columns).to(cost.device).view(cost.shape[:-1])

    return assign


def _pot(case: Case) -> Callable[..., Any]:
    solve = importlib.import_module("ot.batch").bregman_log_projection_batch
    epsilon, iterations = case.settings["epsilon"], case.settings["iterations"]

    def plan(cost: Tensor, rows: Tensor, columns: Tensor) -> Any:
        score = cost / -epsilon
        return solve(score, rows, columns, max_iter=iterations, tol=0.0)["T"]

    return plan


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("triton", "bfloat16", _ours("triton"), impl="triton"),
        Provider("eager-bf16", "bfloat16", _ours("eager"), impl="eager"),
        Provider("eager-fp32", "float32", _ours("eager"), impl="eager"),
        Provider("compile", "bfloat16", _compiled, impl="eager"),
        Provider("plain", "float32", _plain, captures=False),
        Provider("scipy", "float32", _scipy, only="assignment", needs="scipy", captures=False),
        Provider("pot", "float32", _pot, only="sinkhorn", needs="ot", captures=False),
    )
}


def pick_providers(names: tuple[str, ...], device: str) -> list[Provider]:
    """Those of `names` (all that can run on `device` where none is named), in the order above.

    `UserError` for one that is unknown or cannot run. Triton's interpreter is never timed.
    """
    for name in names:
        if name not in PROVIDERS:
            raise UserError(f"There is no provider {name!r}; there are {', '.join(PROVIDERS)}.")
        reason = _unavailable(PROVIDERS[name], device)
        if reason is not None:
            raise UserError(f"--providers {name} {reason}; leave it out.")
    return [
        provider
        for provider in PROVIDERS.values()
        if (provider.name in names if names else _unavailable(provider, device) is None)
    ]


def _unavailable(provider: Provider, device: str) -> str | None:
    if provider.needs is not None and importlib.util.find_spec(provider.needs) is None:
        return f"needs the package {provider.needs!r}, which is not installed"
    if provider.impl != "triton":
        return None
    if device == "cpu":
        return "is timed on a CUDA device only"
    reason = obstacle(torch.device(device))
    if reason is None:
        from smtc.kernels.launching import INTERPRETED

        reason = "cannot be timed in its interpreter (unset TRITON_INTERPRET)"
        return reason if INTERPRETED else None
    return reason


def widened(inputs: Inputs) -> Inputs:
    """`inputs` with bf16 as fp32; a tensor given twice stays one."""
    done = {id(v): v.float() if v.dtype == torch.bfloat16 else v for v in inputs if v is not None}
    return [None if value is None else done[id(value)] for value in inputs]


def tensors(result: Any) -> list[Tensor]:
    """The tensors that an operation returned."""
    given = result if isinstance(result, tuple) else (result,)
    return [value for value in given if value is not None]


def distance(op: str, inputs: Inputs, actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative L2 distance of outputs; of permutations that of their costs, since equal
    minima may be many."""
    if op == "assignment":
        cost = inputs[0]
        assert cost is not None
        actual, expected = (
            [cost.double().gather(-1, found[0][..., None]).sum((-1, -2))]
            for found in (actual, expected)
        )
    worst = 0.0
    for one, other in zip(actual, expected, strict=True):
        one, other = one.detach().double(), other.detach().double()
        error = float((one - other).norm() / other.norm().clamp_min(1e-12))
        worst = max(worst, error if error == error else float("inf"))
    return worst
