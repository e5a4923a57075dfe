"""NVIDIA apex's FusedAdam in the place of torch's fused AdamW.

apex is built from its own sources (github.com/NVIDIA/apex); the package called `apex` on the
package index is another project. It counts steps by group where torch counts them by parameter.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from smtc.config import OptimConfig
from smtc.errors import UserError


def load_fused_adam() -> Any:
    """The class. Errors: `UserError` where apex is missing, or another package of that name is
    there.
    """
    try:
        found = importlib.import_module("apex.optimizers").FusedAdam
        importlib.import_module("amp_C")
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--optim.impl apex: NVIDIA's apex with its CUDA extensions cannot be imported "
            f"({error}); build it from github.com/NVIDIA/apex (the package of that name on the "
            "package index is another project), or use torch."
        ) from error
    return found


def fused_adam(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """FusedAdam as AdamW, with rates and step counts on the device."""
    for group in groups:  # else the first step would count even where it is left out
        group["step"] = torch.zeros(1, dtype=torch.int32, device=group["params"][0].device)
    made: torch.optim.Optimizer = load_fused_adam()(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        adam_w_mode=True,
        capturable=True,
    )
    return made


def counts_by_group(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `optimizer` is apex's."""
    return not isinstance(optimizer, torch.optim.AdamW)


class _Gate:
    """What apex asks a gradient scaler for: whether to leave the step out, and a scale of 1."""

    def __init__(self, skipped: Tensor) -> None:
        self._skipped = skipped.float().reshape(1)

    def _check_inf_per_device(self, _: object) -> dict[torch.device, Tensor]:
        return {self._skipped.device: self._skipped}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self._skipped)


def gated_step(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """`optimizer.step()`, which changes nothing where `skipped` (bool `[]`, read on the device)."""
    if not counts_by_group(optimizer):
        # The same switch that a scaler uses: a fused optimiser reads it on the device.
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        optimizer.step()
        return
    fused: Any = optimizer
    # apex looks at the flag of the step before when it counts this one.
    fused._dummy_overflow_buf.copy_(skipped)
    fused.step(grad_scaler=_Gate(skipped))
