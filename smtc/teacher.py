"""The momentum teacher: a copy of the student that follows it as a moving average and never learns
by gradient.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smtc.config import TeacherConfig


class Teacher(nn.Module):
    """`θ̂ ← m θ̂ + (1 − m) θ` over all parameters, or all but the encoder's (`scope="head"`)."""

    def __init__(self, student: nn.Module, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher":
        """The teacher stays in evaluation mode: no stochastic depth."""
        super().train(mode)
        self.model.eval()
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, without a graph."""
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def follow(self, student: nn.Module, skipped: Tensor | None = None) -> None:
        """One step of the moving average; buffers (batch statistics) are copied.

        Nothing changes where `skipped` (bool `[]`, on the device).
        """
        mine = self._followed(self.model.named_parameters())
        theirs = self._followed(student.named_parameters())
        if mine:
            share = torch.full((), 1 - self.config.momentum, device=mine[0].device)
            _lerp(mine, theirs, share if skipped is None else share * ~skipped)
        mine = self._followed(self.model.named_buffers())
        theirs = self._followed(student.named_buffers())
        for own, other in zip(mine, theirs, strict=True):
            own.copy_(other if skipped is None else torch.where(skipped, own, other))

    def _followed(self, named: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        everything = self.config.scope == "all"
        return [value for name, value in named if everything or not name.startswith("encoder.")]


def _lerp(mine: list[Tensor], theirs: list[Tensor], share: Tensor) -> None:
    """`mine += share · (theirs − mine)`; share is `[]`, on the device."""
    if share.device.type == "cpu":
        for own, other in zip(mine, theirs, strict=True):
            own.lerp_(other, share.to(own.dtype))  # one pass over memory, nothing between
        return
    # torch has no multi-tensor lerp whose weight is one number on the device.
    ahead = torch._foreach_sub(theirs, mine)
    torch._foreach_mul_(ahead, share)
    torch._foreach_add_(mine, ahead)
