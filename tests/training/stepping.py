"""What the tests of a single step share: the smallest settings, clips, and steps one by one."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from commands import changed
from torch import Tensor

from smtc import presets
from smtc.config import Config
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.training.distributed import World
from smtc.training.step import Step

CPU = torch.device("cpu")
FRAMES, SIDE = 3, 32

# The encoder joins at step 1 and the instance loss at step 2; all that is random is on.
LIVELY: dict[str, Any] = {
    "optim.encoder_from_step": 1,
    "objective.instance_from_step": 2,
    "objective.area": 0.0,
    "objective.similarity": -1.0,
    "model.backbone.drop_path": 0.4,
}


def settings(preset: str = "tiny", **more: Any) -> Config:
    """A preset cut down, and lively unless `more` says otherwise (`train__steps=3`)."""
    small = {
        "model.resolution": (SIDE, SIDE),
        "model.slots": 3,
        "model.instances": 2,
        "train.device": "cpu",
        "train.steps": 20,
        "train.batch": 2,
        "data.frames": FRAMES,
    }
    lively = LIVELY if preset != "tiny_encoder" else {}
    dotted = small | lively | {name.replace("__", "."): value for name, value in more.items()}
    config = presets.get(preset)
    # Together, as a ResNet needs several of them.
    mine = {n.rpartition(".")[2]: dotted.pop(n) for n in list(dotted) if "backbone." in n}
    dotted["model.backbone"] = dataclasses.replace(config.model.backbone, **mine)
    return changed(config, dotted)


def clips(config: Config, step: int, device: torch.device = CPU) -> Iterator[Batch]:
    """The batches of step `step`, the same for every run."""
    size, parts = config.train.batch, config.train.accumulate
    height, width = config.model.resolution
    for part in range(parts):
        index = torch.arange(size) + (step * parts + part) * size
        drawn = [torch.Generator().manual_seed(int(sample)) for sample in index]
        shape = 2, config.data.frames, 3, height, width
        views = torch.stack([torch.randn(shape, generator=generator) for generator in drawn])
        crops = None
        if config.data.spatial == "independent":
            crops = torch.tensor([0.1, 0.2, 0.6, 0.5, 0.0]).repeat(size, 2, 1)
            shift = [torch.rand([], generator=generator) for generator in drawn]
            crops[:, 1, 0] += 0.3 * torch.stack(shift)
            crops[:, 1, 4] = 1.0
        yield Batch(views, [], index, crops).to(device)


@dataclass
class Trace:
    """What steps left behind."""

    stepper: Step
    scalars: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def method(self) -> SMTCMethod:
        assert isinstance(self.stepper.method, SMTCMethod)
        return self.stepper.method

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.method.state_dict().items()}

    @property
    def moments(self) -> dict[str, dict[str, Tensor]]:
        state: dict[str, dict[str, Tensor]] = self.stepper.state_dict()["optimizer"]
        return state


def built(config: Config, device: torch.device = CPU) -> Trace:
    """A step with the same initial weights each time, before its first."""
    torch.manual_seed(0)
    method = SMTCMethod(config).to(device).train()
    return Trace(Step(method, config, World(device)))


def go_on(trace: Trace, steps: range) -> Trace:
    """Do `steps`; keep the scalars and the gradients of each."""
    stepper = trace.stepper
    for step in steps:
        done = stepper(clips(stepper.config, step, stepper.world.device), step)
        trace.scalars.append(dict(done.scalars))
        trace.gradients.append(
            {n: p.grad.clone() for n, p in stepper.method.named_parameters() if p.grad is not None}
        )
    return trace


def stepped(config: Config, steps: int = 4, device: torch.device = CPU) -> Trace:
    """`steps` steps from the beginning."""
    return go_on(built(config, device), range(steps))


def assert_alike(one: Trace, other: Trace, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Scalars and gradients of every step, weights and moments at the end; bits unless said."""
    close = functools.partial(torch.testing.assert_close, rtol=rtol, atol=atol)
    for found in ("scalars", "gradients"):
        for mine, theirs in zip(getattr(one, found), getattr(other, found), strict=True):
            assert mine.keys() == theirs.keys()
            close(
                {k: v.float() for k, v in mine.items()}, {k: v.float() for k, v in theirs.items()}
            )
    if rtol == 0:
        close(one.weights, other.weights)
        close(one.moments, other.moments)


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler trace and differentiate but generate no code: seconds instead of minutes on
    a CPU, and the same bits.
    """
    torch.compiler.reset()
    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", backend)


def graphs_compiled() -> int:
    """How many functions the compiler has made since it was last reset."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
