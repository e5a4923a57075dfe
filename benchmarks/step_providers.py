"""Who runs a whole training step in the benchmarks: the literal step, and ours in several forms.

| provider | what |
|---|---|
| plain | `benchmarks/plain.py`: the paper's equations, fp32, loops over pairs, SciPy |
| eager-fp32, eager-bf16 | the trainer's step on plain torch, in fp32 or under bf16 autocast |
| compile | eager-bf16 with `--train.compile model` |
| triton | bf16 with the fused kernels |
| triton+compile, triton+graphs | the same, compiled, or replayed as one CUDA graph |

All start from the same weights and see the same clips and the same draws, and all do the same
mathematics: encoder, slots and losses, backward, clipping, AdamW and teacher.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from smtc import SMTC, presets
from smtc.benchmarks.plain import PlainStep
from smtc.config import Config, from_dict, to_dict
from smtc.errors import UserError
from smtc.kernels.dispatch import obstacle
from smtc.method import SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.training.distributed import World
from smtc.training.step import Step, numerics

RESOLUTIONS = {
    64: (8, (64, 64)),
    256: (16, (256, 256)),
    1024: (8, (256, 256)),
    1500: (16, (480, 800)),
}
"""Patch and frame size for a number of positions L."""

SEED = 0


@dataclass(frozen=True)
class Case:
    """A preset at one size, with an encoder that learns and all losses counted from the start."""

    preset: str = "fixed"
    positions: int = 256
    clips: int = 2
    frames: int = 4
    slots: int = 16

    @property
    def name(self) -> str:
        """As it stands in reports; frames and slots only where they are not the paper's."""
        more = [f"T{self.frames}"] if self.frames != 4 else []
        more += [f"N{self.slots}"] if self.slots != 16 else []
        return " ".join([self.preset, f"L{self.positions}", f"B{self.clips}", *more])

    def config(self, changes: Mapping[str, Any] | None = None) -> Config:
        """The preset at this size; `changes` by dotted names win."""
        patch, resolution = _resolution(self.positions)
        settings: dict[str, Any] = {
            "model.backbone.patch": patch,
            "model.resolution": resolution,
            "model.slots": self.slots,
            "objective.instance_from_step": 0,
            # On noise no instance would be valid, and its loss nothing.
            "objective.area": 0.0,
            "objective.similarity": -1.0,
            "optim.encoder_from_step": 0,
            "optim.warmup_steps": 0,
            # Small enough that the losses of a second step can be compared across precisions.
            "optim.lr": 1e-4,
            "train.batch": self.clips,
            "train.seed": SEED,
        }
        return changed(presets.get(self.preset), settings | dict(changes or {}))

    def batch(self, device: str) -> Batch:
        """Clips of noise on `device`, the same each time."""
        _, (height, width) = _resolution(self.positions)
        drawn = torch.Generator().manual_seed(SEED)
        views = torch.randn(self.clips, 2, self.frames, 3, height, width, generator=drawn)
        return Batch(views, [], torch.arange(self.clips)).to(device)


def _resolution(positions: int) -> tuple[int, tuple[int, int]]:
    if positions in RESOLUTIONS:
        return RESOLUTIONS[positions]
    side = round(positions**0.5)
    if positions < 1 or side * side != positions:
        known = ", ".join(map(str, RESOLUTIONS))
        raise UserError(f"L = {positions} is no size of a step: use {known}, or a square.")
    return 16, (16 * side, 16 * side)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other values under dotted names."""
    values = to_dict(config)
    for name, value in changes.items():
        *tables, key = name.split(".")
        table = values
        for part in tables:
            table = table[part]
        table[key] = value
    made: Config = from_dict(Config, values)
    return made


@dataclass(frozen=True)
class Provider:
    """One way to run a step."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the preset, by dotted names."""
    faults: tuple[str, ...] = ()
    reliefs: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is the literal step."""
        return self.name == "plain"

    def with_changes(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        faults: tuple[str, ...] = (),
        reliefs: tuple[str, ...] = (),
    ) -> "Provider":
        """The same under other settings, or with faults or reliefs of the literal step."""
        return Provider(self.name, {**self.settings, **(settings or {})}, faults, reliefs)

    def step(self, case: Case, device: str) -> "Running":
        """Ready to run on `device`, from the same weights as all others."""
        config = case.config(self.settings)
        torch.manual_seed(SEED)
        if self.plain:
            weights = SMTC(config.model).state_dict()
            plain = PlainStep(config, weights, device, self.faults, self.reliefs)
            return Running(_literally(plain), plain.student_network.parameters())
        method = SMTCMethod(config).to(device).train()
        step = Step(method, config, World(torch.device(device)))
        parts = config.train.accumulate
        return Running(
            lambda batch, number: step(iter([batch] * parts), number).scalars, method.parameters()
        )


def _literally(plain: PlainStep) -> Callable[[Batch, int], dict[str, Tensor]]:
    """The literal step under the matrix precision of the settings, as ours has it."""
    arrived: dict[int, Batch] = {}  # frames on the host in float64, as that fault has them

    def update(batch: Batch, number: int) -> dict[str, Tensor]:
        if "float64_frames" in plain.faults:
            if id(batch) not in arrived:
                double = batch.views.to("cpu", torch.float64)
                arrived[id(batch)] = replace(batch, views=double)
            batch = arrived[id(batch)]
        with numerics(plain.config, plain.device):
            return plain(batch, number)

    return update


class Running:
    """A provider at work: each call is one more update."""

    def __init__(
        self, update: Callable[[Batch, int], dict[str, Tensor]], trained: Iterable[nn.Parameter]
    ) -> None:
        self._update = update
        self._trained = list(trained)
        self._count = itertools.count()

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One update on `batch`; its losses, on the device."""
        return self._update(batch, next(self._count))

    def forget_gradients(self) -> None:
        """Free what the last update left, so that the next one's memory is counted whole."""
        for parameter in self._trained:
            parameter.grad = None


_BF16 = {"train.precision": "bf16"}
_EAGER, _TRITON = {"model.impl": "eager"}, {"model.impl": "triton"}

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("plain"),
        Provider("eager-fp32", _EAGER),
        Provider("eager-bf16", _EAGER | _BF16),
        Provider("compile", _EAGER | _BF16 | {"train.compile": "model"}),
        Provider("triton", _TRITON | _BF16),
        Provider("triton+compile", _TRITON | _BF16 | {"train.compile": "model"}),
        Provider("triton+graphs", _TRITON | _BF16 | {"train.cuda_graphs": "on"}),
    )
}


def pick_providers(names: tuple[str, ...], device: str) -> list[Provider]:
    """Those of `names` (all that can run on `device` where none is named), in the order above.

    `UserError` for one that is unknown or cannot run.
    """
    for name in names:
        if name not in PROVIDERS:
            raise UserError(f"There is no provider {name!r}; there are {', '.join(PROVIDERS)}.")
        reason = _unavailable(name, device)
        if reason is not None:
            raise UserError(f"--providers {name} {reason}; leave it out.")
    return [
        provider
        for name, provider in PROVIDERS.items()
        if (name in names if names else _unavailable(name, device) is None)
    ]


def _unavailable(name: str, device: str) -> str | None:
    if not name.startswith("triton"):
        return None
    if device == "cpu":
        return "is timed on a CUDA device only"
    return obstacle(torch.device(device))


def fastest(device: str) -> str:
    """The provider that is meant to be the fastest on `device`."""
    return "triton+graphs" if device == "cuda" else "compile"
