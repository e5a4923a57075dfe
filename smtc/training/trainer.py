"""The training loop, for any method: read top to bottom.

A step knows a global sample index for every clip, and everything random is keyed by it, so a run
that stops and starts again goes on as if it had not stopped.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smtc.config import Config
from smtc.errors import UserError
from smtc.kernels.dispatch import obstacle
from smtc.method import Method, SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.pipelines.clips import Schedule
from smtc.pipelines.loading import Loader, build_loader
from smtc.progress import patient
from smtc.training.checkpoint import (
    check_run_folder,
    claim_run_folder,
    latest_checkpoint,
    save_checkpoint,
    writing,
)
from smtc.training.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from smtc.training.telemetry import Telemetry, read_metrics
from smtc.warm_start import WarmStart

logger = logging.getLogger("smtc")

SLOW_DATA = (
    "Reading or decoding is slower than training: raise data.workers, move the data to a faster "
    "disk, or decode it once with `smtc data pack`."
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: its folder, its method and the logged steps."""

    folder: Path
    method: Method
    metrics: list[dict[str, Any]]

    @property
    def model_folder(self) -> Path:
        """What `smtc.load_model` and `--init` read."""
        return self.folder / "model"


def train(config: Config, method: Method | None = None) -> Run:
    """Train for exactly `config.train.steps` steps, or go on where the run in `config.output`
    stopped.

    `method` replaces the one that `config.method` names. Errors: `UserError` for a mistake in the
    settings, the data or the folder.
    """
    device = pick_device(config.train.device)
    check_implementation(config.model.impl, device)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    folder = check_run_folder(config)
    torch.manual_seed(config.train.seed)
    method = method or build_method(config)
    trainer = Trainer(config, method.to(device).train(), folder, device)
    trainer.resume()
    loader = trainer.loader()
    # Only now, when all that was given has proved good, is something written.
    claim_run_folder(folder, config)
    with writing(folder):
        trainer.run(loader)
    return Run(folder=folder, method=method, metrics=read_metrics(folder / "metrics.jsonl"))


def build_method(config: Config) -> Method:
    """The method that `config.method` names, with initial weights."""
    return WarmStart(config) if config.method == "warm_start" else SMTCMethod(config)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Errors: `UserError` where there is no CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("CUDA was asked for but this machine has none; use --train.device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check_implementation(impl: str, device: torch.device) -> None:
    """Whether `model.impl` can run on `device`. Errors: `UserError` where it cannot."""
    reason = obstacle(device) if impl == "triton" else None
    if reason is not None:
        raise UserError(f"--model.impl triton {reason}; use auto or eager.")


class Trainer:
    """One process, one device."""

    def __init__(self, config: Config, method: Method, folder: Path, device: torch.device) -> None:
        self.config = config
        self.method = method
        self.folder = folder
        self.device = device
        self.step = 0
        self.learning_rate = 0.0
        self.trained: tuple[str, ...] = ()
        self.optimizer: torch.optim.Optimizer
        self._enter_phase()

    def resume(self) -> None:
        """Take over the newest checkpoint of the run folder, if there is one."""
        state = latest_checkpoint(self.folder)
        if state is None:
            return
        self.method.load_state_dict(state["method"])
        self.step = state["step"]
        self._enter_phase()
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.step == self.config.train.steps:
            logger.info("%s is finished; its model is written again.", self.folder)
        else:
            logger.info("Continuing %s at step %d.", self.folder, self.step)

    def loader(self) -> Loader:
        """The batches of the steps that are left."""
        train = self.config.train
        on_gpu = self.device.type == "cuda"
        return build_loader(
            self.config.data,
            Schedule(batch=train.batch, steps=train.steps, start_step=self.step),
            size=self.config.model.resolution,
            seed=train.seed,
            device=self.device,
            dtype=torch.bfloat16 if on_gpu and train.precision == "bf16" else torch.float32,
            bad_file_log=self.folder / "bad_files.jsonl",
        )

    def run(self, loader: Loader) -> None:
        """All steps that are left, then the model."""
        train = self.config.train
        telemetry = Telemetry(
            self.folder, steps=train.steps, start=self.step, title=self.config.method
        )
        try:
            asked = time.perf_counter()
            for batch in patient(loader, "the next batch", SLOW_DATA):
                waited = time.perf_counter() - asked
                scalars = self._step(batch.to(self.device))
                telemetry.add(scalars, clips=len(batch.index), waited=waited)
                last = self.step == train.steps
                if self.step % train.log_every == 0 or last:
                    self._log(telemetry, loader)
                if self.step % train.checkpoint_every == 0 or last:
                    self._save()
                asked = time.perf_counter()
        finally:
            telemetry.close()
            loader.close()
        self.method.save_model(self.folder / "model")

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """One update; nothing here waits for the device."""
        config = self.config
        # Stochastic depth draws from torch's generator: the same at this step in every run.
        torch.manual_seed(config.train.seed * 1_000_003 + self.step)
        self._enter_phase()
        self.learning_rate = set_learning_rate(
            self.optimizer, self.step, config.train.steps, config.optim
        )
        with self._precision():
            scalars = self.method.training_step(batch, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        scalars["loss"].backward()
        if config.optim.clip_norm is not None:
            parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
            scalars["gradient_norm"] = torch.nn.utils.clip_grad_norm_(
                parameters, config.optim.clip_norm
            )
        self.optimizer.step()
        self.method.after_step(self.step)
        self.step += 1
        return scalars

    def _enter_phase(self) -> None:
        """Where the set of trained parameters changes, mark them and rebuild the optimiser's
        groups.
        """
        trainable = self.method.trainable(self.step)
        if tuple(trainable) == self.trained:
            return
        moments = optimizer_state(self.optimizer) if self.trained else {}
        self.method.requires_grad_(False)
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        self.optimizer = build_optimizer(trainable, self.config.optim)
        load_optimizer_state(self.optimizer, moments)
        if self.trained:
            logger.info("Step %d: %d tensors are trained from here.", self.step, len(trainable))
        self.trained = tuple(trainable)

    def _precision(self) -> torch.autocast:
        # No cache: a weight cast in the slots' graph-free iterations would come back without a
        # gradient.
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.config.train.precision == "bf16",
            cache_enabled=False,
        )

    def _log(self, telemetry: Telemetry, loader: Loader) -> None:
        extra = {"lr": self.learning_rate, "replaced_clips": loader.faults.replaced}
        values = telemetry.log(self.step, extra)
        self._require_finite(math.isfinite(values["loss"]))

    def _save(self) -> None:
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._require_finite(all(bool(weight.isfinite().all()) for weight in weights))
        state = {
            "method": self.method.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
        }
        save_checkpoint(self.folder, self.step, state)

    def _require_finite(self, finite: bool) -> None:
        if not finite:
            raise UserError(
                f"The loss or a weight is no finite number by step {self.step}; lower optim.lr or "
                f"look at the data. Earlier checkpoints are in {self.folder / 'checkpoints'}."
            )
