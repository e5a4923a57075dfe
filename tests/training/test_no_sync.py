"""A step that does not log never makes the host wait for the device.

On a CPU nothing waits, so what would wait on a GPU is counted: every reading of a tensor by the
host, every operation whose result has a size that depends on values, and every blocking copy.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import trace_only
from torch import Tensor
from toy import Line, TinyConfig, with_output

from smtc.kernels import ops
from smtc.model import SMTC
from smtc.pipelines.batch import Batch
from smtc.training import trainer
from smtc.training.trainer import Trainer, train
from smtc.warm_start import WarmStart

READS = (
    *("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"),
    *("__array__", "nonzero", "unique", "masked_select", "equal", "allclose"),
)
FUNCTIONS = ("nonzero", "unique", "masked_select", "equal", "allclose", "argwhere")
# What reads a tensor that is known to lie in the host's memory.
ON_THE_HOST = {
    ("model.py", "_check"): "is_cuda",
    ("ops.py", "correlation_projection"): 'device.type == "cpu"',
    ("warm_start.py", "_grey"): "torch.tensor([step])",  # drawn on the host
}


class Waits:
    """Where the host waited in each step, but for the time in which it waits for data."""

    def __init__(self) -> None:
        self.by_step: dict[int, list[str]] = {}
        self._step: int | None = None
        self._away = 0
        self._thread = threading.current_thread()

    def begin(self, step: int) -> None:
        self._step = step
        self.by_step[step] = []

    def note(self, what: str) -> None:
        if self._step is None or self._away or threading.current_thread() is not self._thread:
            return
        code = sys._getframe(2).f_code
        caller = Path(code.co_filename).name, code.co_name
        if caller not in ON_THE_HOST:
            self.by_step[self._step].append(f"{what} in {caller}")

    def counted(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(*arguments: Any, **named: Any) -> Any:
            self.note(what)
            self._away += 1  # what calls another reading method is one wait
            try:
                return function(*arguments, **named)
            finally:
                self._away -= 1

        return counting

    def unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, within which nothing is counted."""

        @functools.wraps(function)
        def away(*arguments: Any, **named: Any) -> Any:
            self._away += 1
            try:
                return function(*arguments, **named)
            finally:
                self._away -= 1

        return away


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    found = Waits()
    for name in READS:
        patched = found.counted(f"Tensor.{name}", getattr(Tensor, name))
        monkeypatch.setattr(Tensor, name, patched, raising=False)
    for name in FUNCTIONS:
        monkeypatch.setattr(torch, name, found.counted(f"torch.{name}", getattr(torch, name)))
    monkeypatch.setattr(torch.cuda, "synchronize", found.counted("synchronize", lambda *_: None))
    make = torch.tensor

    def tensor(data: Any, *arguments: Any, device: Any = None, **named: Any) -> Tensor:
        if device is not None:
            found.note("a copy by torch.tensor")
        return make(data, *arguments, device=device, **named)

    monkeypatch.setattr(torch, "tensor", tensor)
    next_batch = trainer._Timed.__next__
    monkeypatch.setattr(trainer._Timed, "__next__", found.unseen(next_batch))
    whole = Trainer._step

    def step(self: Trainer, *arguments: Any) -> None:
        found.begin(self.step + 1)
        whole(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", step)
    yield found


def settings(**more: Any) -> dict[str, Any]:
    return {"train__steps": 12, "train__log_every": 5, "train__pictures_every": 4} | more


def assert_free(waits: Waits, waiting: set[int]) -> None:
    """Each step of `waiting` waited, with all that follows it; no other did."""
    assert sorted(waits.by_step) == list(range(1, 13))
    for step, places in waits.by_step.items():
        assert bool(places) == (step in waiting), (step, places)


LIVE = {"objective__instance_from_step": 3, "objective__area": 0.0, "objective__similarity": -1.0}


@pytest.mark.parametrize(
    "more",
    [
        {},
        LIVE | {"optim__encoder_from_step": 6, "model__backbone__drop_path": 0.5},
        LIVE | {"objective__form": "l2_margin", "model__gradient": "full", "model__update": "gru"},
        {"model__reference": "previous", "model__sampling": "detached", "teacher__scope": "head"},
        {"train__precision": "bf16", "train__accumulate": 2},
        {"train__precision": "fp16", "optim__clip_norm": None},
        {"data__spatial": "independent", "data__augment__crop": (0.5, 1.0)},
        LIVE | {"train__checkpoint_activations": True, "optim__encoder_from_step": 6},
        LIVE | {"train__compile": "encoder", "optim__encoder_from_step": 6},
    ],
    ids=[
        *("tiny", "live", "paper", "released", "bf16", "fp16", "independent"),
        *("recomputed", "compiled"),
    ],
)
def test_smtc(
    tiny_config: TinyConfig,
    tmp_path: Path,
    waits: Waits,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
) -> None:
    """Steps 4, 8 and 12 draw a picture, 5, 10 and the last are logged."""
    trace_only(monkeypatch)  # what is compiled, if anything
    train(with_output(tiny_config, tmp_path / "run", **settings(**more)))
    assert_free(waits, {4, 5, 8, 10, 12})


def test_the_warm_start(tiny_config: TinyConfig, tmp_path: Path, waits: Waits) -> None:
    train(with_output(tiny_config, tmp_path / "run", preset="tiny_encoder", **settings()))
    assert_free(waits, {5, 10, 12})


def test_a_wait_would_be_seen(tiny_config: TinyConfig, tmp_path: Path, waits: Waits) -> None:
    class Waiting(Line):
        def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
            found = super().training_step(batch, step)
            if step == 2:
                float(found["loss"].detach())
            if step == 6 and found["loss"] > 1e9:
                raise ValueError
            return found

    whole = Line.training_step
    Line.training_step = waits.unseen(whole)  # type: ignore[method-assign]  # it notes its samples
    try:
        train(with_output(tiny_config, tmp_path / "run", **settings()), method=Waiting())
    finally:
        Line.training_step = whole  # type: ignore[method-assign]
    assert_free(waits, {3, 5, 7, 10, 12})
    assert "__float__" in waits.by_step[3][0] and "__bool__" in waits.by_step[7][0]


def test_the_exceptions_are_guarded() -> None:
    """Each of them reads nothing that could lie on a GPU, by the words that it is listed with."""
    functions = (SMTC._check, ops.correlation_projection, WarmStart._grey)
    for function, guard in zip(functions, ON_THE_HOST.values(), strict=True):
        assert guard in inspect.getsource(function)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", ["tiny", "tiny_encoder"])
def test_on_a_gpu_torch_itself_sees_no_wait(
    tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    whole, fetch = Trainer._step, trainer._Timed.__next__

    def step(self: Trainer, *arguments: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if self.step > 1 else "default")
        try:
            whole(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def unwatched(self: trainer._Timed) -> Batch:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        batch = fetch(self)
        if batch.views.device.type == "cpu":
            batch = batch.to("cuda")
        torch.cuda.set_sync_debug_mode(mode)
        return batch

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(trainer._Timed, "__next__", unwatched)
    config = with_output(
        tiny_config, tmp_path / "run", preset=preset, train__device="cuda", **settings()
    )
    assert len(train(config).metrics) == 3
