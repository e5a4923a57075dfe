"""One update of a method, from clips to weights: what the trainer repeats and benchmarks time.

How fast it goes is decided here (precision, compiler, CUDA graph, many processes), what it computes
in the method. Nothing in a step waits for the device.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smtc.attention import backend_order
from smtc.config import Config
from smtc.errors import UserError
from smtc.kernels.dispatch import announce
from smtc.method import Method
from smtc.pipelines.batch import Batch, Source
from smtc.regions import region
from smtc.training import distributed
from smtc.training.distributed import World
from smtc.training.graphs import Graphed
from smtc.training.optim import (
    Update,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)

logger = logging.getLogger("smtc")


@dataclass(frozen=True)
class Done:
    """What became of a step; all tensors stay on the device."""

    scalars: dict[str, Tensor]
    """Losses, gradient norms and what the method watches, each `[]`."""
    skipped: Tensor
    """bool `[]`: the gradient was not finite, so nothing changed."""
    sources: list[Source]
    views: Tensor
    """`[B,2,T,3,H,W]` of the last batch; a loader may write over them."""
    learning_rate: float


class _Forward(nn.Module):
    """A method's training step as a forward pass, which is what DDP wraps."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.method.training_step(batch, step)


class Step:
    """The update of `method` under the settings of `config`, in one of the processes of `world`."""

    def __init__(self, method: Method, config: Config, world: World) -> None:
        self.method, self.config, self.world = method, config, world
        self.update = Update(
            world.device,
            scaled=config.train.precision == "fp16",
            clip_norm=config.optim.clip_norm,
        )
        graphs = config.train.cuda_graphs == "on"
        if graphs and not method.capturable:
            raise UserError(
                f"--train.cuda-graphs on: {type(method).__name__} decides something on the host in "
                "every step, which a recorded one would not do again; use off."
            )
        self._stream = torch.cuda.Stream(world.device) if graphs else None
        self._graphed: Graphed | None = None
        self._trained: tuple[str, ...] = ()
        self._stage: object = None
        self.optimizer: torch.optim.Optimizer
        self.forward: nn.Module
        self._prepare()

    def _prepare(self) -> None:
        """Compile and mark what the settings ask for; nothing is compiled before its first call."""
        train = self.config.train
        for encoder in self.method.encoders():
            encoder.recomputes = train.checkpoint_activations
            for part in encoder.repeated() if train.compile != "none" else ():
                part.compile(dynamic=False)
        if train.compile == "model":
            self.method.compile_rest()
            if self.config.model.impl == "auto":
                announce(self.world.device)
        if train.compile != "none" and self.world.main:
            logger.info("The first steps compile the %s, which takes a minute.", train.compile)

    def enter(self, step: int) -> None:
        """Where another set of parameters is trained from `step` on, mark them and rebuild what
        depends on it; where a step computes something else, record it anew.
        """
        trainable, stage = self.method.trainable(step), self.method.stage(step)
        if (tuple(trainable), stage) == (self._trained, self._stage):
            return
        self._graphed, self._stage = None, stage
        if tuple(trainable) == self._trained:
            return
        moments = optimizer_state(self.optimizer) if self._trained else {}
        self.method.requires_grad_(False)
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        self._rebuild(trainable, moments)
        if self._trained and self.world.main:
            logger.info("Step %d: %d tensors are trained from here.", step, len(trainable))
        self._trained = tuple(trainable)

    def _rebuild(
        self, trainable: dict[str, nn.Parameter], moments: dict[str, dict[str, Tensor]]
    ) -> None:
        self.optimizer = build_optimizer(
            trainable, self.config.optim, capturable=self._stream is not None, moments=moments
        )
        load_optimizer_state(self.optimizer, moments)
        self.forward = _Forward(self.method)
        if self.world.size > 1:
            # A graph can hold the communication only of what was made on a side stream.
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                self.forward = distributed.parallel(
                    self.forward, static=self.config.train.accumulate == 1
                )

    def state_dict(self) -> dict[str, Any]:
        """Moments by parameter name, and the loss scale."""
        return {
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.update.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on at `step` with what `state_dict` gave; the method has its weights already."""
        self.enter(step)
        self._graphed = None  # it would go on with the moments that it was recorded with
        moments = state.get("optimizer", {})
        if self.config.optim.impl == "apex":
            self._rebuild(self.method.trainable(step), moments)
        else:
            load_optimizer_state(self.optimizer, moments)
        self.update.load_state_dict(state.get("scaler", {}))

    def __call__(self, batches: Iterator[Batch], step: int) -> Done:
        """Step number `step` on the next `train.accumulate` of `batches`."""
        self.enter(step)
        rate = set_learning_rate(self.optimizer, step, self.config.train.steps, self.config.optim)
        fetched = _Fetched(batches, self.world.device, self.config.train.accumulate)
        with numerics(self.config, self.world.device):
            if self._stream is None:
                found = self._compute(fetched, step)
            else:
                found = self._replayed(fetched, step)
        skipped = found["skipped"] > 0
        assert fetched.last is not None
        return Done(found, skipped, fetched.sources, fetched.last.views, rate)

    def _replayed(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        if self._graphed is None:
            assert self._stream is not None
            self._graphed = Graphed(
                lambda parts: self._compute(parts, step),
                self.config.train.accumulate,
                self._stream,
                parallel=self.world.size > 1,
            )
        return self._graphed(batches)

    def _compute(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """The whole update on `batches`: forward, backward, clipping, optimiser, momentum."""
        parts = self.config.train.accumulate
        self.optimizer.zero_grad()  # apex's takes no argument; both set them to None
        statistics = _batch_statistics(self.method)
        former = [buffer.clone() for buffer in statistics]
        scalars: dict[str, Tensor] = {}
        for part, batch in enumerate(batches):
            # The processes add up their gradients once, after the last part.
            with distributed.apart(self.forward, part < parts - 1):
                with self._precision():
                    found = self.forward(batch, step)
                with region("backward"):
                    self.update.scaler.scale(found["loss"] / parts).backward()
            for name, value in found.items():
                scalars[name] = scalars.get(name, 0) + value.detach() / parts
        with region("optimiser"):
            norms, skipped = self.update.step(self.optimizer)
        for own, before in zip(statistics, former, strict=True):
            own.copy_(torch.where(skipped, before, own))
        with region("ema"):
            self.method.after_step(step, skipped)
        return scalars | norms | {"skipped": skipped}

    def _precision(self) -> AbstractContextManager[object]:
        # No cache: a weight cast in the slots' graph-free iterations would come back without a
        # gradient.
        precision = self.config.train.precision
        return torch.autocast(
            self.world.device.type,
            dtype=torch.float16 if precision == "fp16" else torch.bfloat16,
            enabled=precision != "fp32",
            cache_enabled=False,
        )


class _Fetched:
    """The next `count` of `batches`, on the device, one at a time: a loader may hand out one and
    the same tensor again and again.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, count: int) -> None:
        self._batches, self._device, self._left = batches, device, count
        self.sources: list[Source] = []
        self.last: Batch | None = None

    def __iter__(self) -> "_Fetched":
        return self

    def __next__(self) -> Batch:
        if not self._left:
            raise StopIteration
        self._left -= 1
        with region("data"):
            self.last = next(self._batches).to(self._device)
        self.sources += self.last.sources
        return self.last


def _batch_statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances that a step in training mode changes; a ViT has none."""
    return [
        statistic
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training
        for statistic in (part.running_mean, part.running_var)
        if statistic is not None
    ]


def uncompiled() -> AbstractContextManager[object]:
    """Within the block, frames of other sizes (held-out videos, pictures) compile nothing."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def numerics(config: Config, device: torch.device) -> Iterator[None]:
    """How fp32 products and convolutions round and which attention runs first, within the block."""
    former = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(config.train.matmul)
    # Convolutions have a switch of their own, which is on by default.
    torch.backends.cudnn.allow_tf32 = config.train.matmul != "highest"
    try:
        with backend_order(device):
            yield
    finally:
        torch.set_float32_matmul_precision(former[0])
        torch.backends.cudnn.allow_tf32 = former[1]
