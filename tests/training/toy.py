"""A toy method, and what the tests of the trainer share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smtc.config import Config
from smtc.method import Method
from smtc.pipelines.batch import Batch
from smtc.training.checkpoint import latest_checkpoint
from smtc.training.trainer import Run, Trainer

TinyConfig = Callable[..., Config]

CLOCKED = ("clips_per_s", "data_wait_share", "memory_mb")


class Line(Method):
    """Two linear layers on a clip's mean colour, and a slow copy of the second."""

    def __init__(self, encoder_from: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)
        self.slow = nn.Linear(4, 1).requires_grad_(False)
        self.encoder_from = encoder_from
        self.seen: list[list[int]] = []
        self.followed: list[int] = []

    def trainable(self, step: int) -> dict[str, nn.Parameter]:
        learns = ("encoder.", "head.") if step >= self.encoder_from else ("head.",)
        return {n: p for n, p in self.named_parameters() if n.startswith(learns)}

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        self.seen.append(batch.index.tolist())
        said = self.head(self.encoder(batch.views.mean(dim=(1, 2, 4, 5))))
        return {"loss": (said - 1).square().mean(), "said": said.mean()}

    def after_step(self, step: int, skipped: Tensor) -> None:
        self.followed.append(step)
        with torch.no_grad():
            self.slow.weight.lerp_(self.head.weight, 0.5)

    def save_model(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.state_dict(), folder / "line.pt")


class StoppedError(Exception):
    """Stands for a killed program."""


def with_output(tiny_config: TinyConfig, folder: Path, **settings: Any) -> Config:
    """The tiny config with `train__steps=3` for train.steps = 3."""
    preset = settings.pop("preset", "tiny")
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    return tiny_config({"output": str(folder)} | dotted, preset=preset)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let training die when `after` steps are done."""
    whole = Trainer._step

    def step(self: Trainer, *arguments: Any) -> None:
        if self.step == after:
            self.checkpoints.wait()
            raise StoppedError
        whole(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", step)


def logged(run: Run) -> list[dict[str, Any]]:
    """The metrics but for what a clock says."""
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in run.metrics]


def moments(run: Run) -> dict[str, dict[str, Tensor]]:
    state = latest_checkpoint(run.folder)
    assert state is not None
    return state["optimizer"]


def assert_same(first: Run, second: Run) -> None:
    """Both runs ended with the same bits."""
    torch.testing.assert_close(
        first.method.state_dict(), second.method.state_dict(), rtol=0, atol=0
    )
    torch.testing.assert_close(moments(first), moments(second), rtol=0, atol=0)
    assert logged(first) == logged(second)


def weights(method: nn.Module, part: str) -> dict[str, Tensor]:
    found = {n: v.clone() for n, v in method.state_dict().items() if n.startswith(part)}
    assert found
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())
