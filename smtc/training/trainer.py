"""The training loop, for any method: read top to bottom.

A step knows a global sample index for every clip, and everything random is keyed by it, so a run
that stops and starts again goes on as if it had not stopped, on as many processes as there are
then. Processes are started by torchrun; all of them run what is written here.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smtc import compatibility
from smtc.config import Config
from smtc.errors import UserError, enough_memory
from smtc.method import Method, SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.pipelines.clips import Schedule
from smtc.pipelines.loading import Loader, build_loader
from smtc.pipelines.torch_loader import worker_deaths_told
from smtc.progress import patient
from smtc.training import distributed
from smtc.training.checkpoint import Checkpoints, latest_checkpoint
from smtc.training.distributed import Agreement, Heartbeat, World, joined
from smtc.training.held_out import HeldOut
from smtc.training.pictures import mask_picture
from smtc.training.run_folder import check_run_folder, claim_run_folder, locked, writing
from smtc.training.step import Step, uncompiled
from smtc.training.stopping import DataOverdueError, StopRequest
from smtc.training.telemetry import Telemetry, read_metrics
from smtc.training.watches import CollapseWatch, FiniteWatch
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

    `method` replaces the one that `config.method` names. SIGINT, SIGTERM and SIGUSR1 end the run
    after the step under way, with a checkpoint: as `KeyboardInterrupt`, or `SystemExit` with 128
    plus the signal's number. Errors: `UserError` for a mistake in the settings, the data or the
    folder.
    """
    with joined(pick_device(config.train.device), config.train.timeout) as world, enough_memory():
        compatibility.check(config, world.device, world.size)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        folder = check_run_folder(config)
        torch.manual_seed(config.train.seed)
        method = method or build_method(config)
        trainer = Trainer(config, method.to(world.device).train(), folder, world)
        trainer.resume()
        loader = trainer.loader()
        # Only now, when all that was given has proved good, is something written.
        with writing(folder), locked(folder, wanted=world.main):
            if world.main:
                claim_run_folder(folder, config)
            distributed.wait_for_all()
            trainer.run(loader)
    return Run(folder=folder, method=method, metrics=read_metrics(folder / "metrics.jsonl"))


def build_method(config: Config) -> Method:
    """The method that `config.method` names, with initial weights."""
    return WarmStart(config) if config.method == "warm_start" else SMTCMethod(config)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Errors: `UserError` where there is no CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "CUDA was asked for but this machine has none; use the device cpu, or auto."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class Trainer:
    """One process with one device, alone or among others."""

    def __init__(self, config: Config, method: Method, folder: Path, world: World) -> None:
        self.config = config
        self.method = method
        self.folder = folder
        self.world = world
        self.step = 0
        self.sample = 0  # the first global sample that no step has seen
        self.learning_rate = 0.0
        self.stepper = Step(method, config, world)
        self.checkpoints = Checkpoints(folder, keep=config.train.keep_checkpoints)
        self.finite = FiniteWatch(config.train.nonfinite, config.train.log_every, world.device)
        self.collapse = CollapseWatch(config.objective)
        self.held_out = self._held_out()
        self.clip: Tensor | None = None  # the student's view `[T,3,H,W]` of the last pictured step
        self.stepper.enter(self.step)

    def resume(self) -> None:
        """Take over the newest checkpoint of the run folder, if there is one."""
        # Found before any process of this run can write another one.
        state = latest_checkpoint(self.folder)
        distributed.wait_for_all()
        if state is None:
            distributed.check_same_start(self.method)
            return
        self.method.load_state_dict(state["method"])
        self.step, self.sample = state["step"], state["sample"]
        self.stepper.load_state_dict(state, self.step)
        distributed.check_same_start(self.method)
        if not self.world.main:
            return
        if self.step == self.config.train.steps:
            logger.info("%s is finished; its model is written again.", self.folder)
        else:
            logger.info("Continuing %s at step %d.", self.folder, self.step)

    def loader(self) -> Loader:
        """The batches of the steps that are left, `train.accumulate` for each of them."""
        train, world = self.config.train, self.world
        low = world.device.type == "cuda" and train.precision == "bf16"
        return build_loader(
            self.config.data,
            Schedule(
                batch=train.batch,
                steps=train.steps * train.accumulate,
                start_step=self.step * train.accumulate,
                start_sample=self.sample,
                rank=world.rank,
                world=world.size,
            ),
            size=self.config.model.resolution,
            seed=train.seed,
            device=world.device,
            dtype=torch.bfloat16 if low else torch.float32,
            bad_file_log=self.folder / "bad_files.jsonl",
        )

    def run(self, loader: Loader) -> None:
        """All steps that are left, then the model."""
        with worker_deaths_told(), StopRequest() as stop:  # until all is written
            self._train(loader, stop)
            if self.world.main:
                self.method.save_model(self.folder / "model")
            distributed.wait_for_all()

    def _train(self, loader: Loader, stop: StopRequest) -> None:
        train, evaluation = self.config.train, self.config.eval
        with ExitStack() as ending:
            for part in (loader, self.checkpoints):
                ending.callback(part.close)
            telemetry, agreement = self._telemetry(), Agreement()
            ending.callback(telemetry.close)
            heartbeat = Heartbeat(self.world)
            ending.callback(heartbeat.close)
            batches = _Timed(patient(loader, "the next batch", SLOW_DATA), stop)
            while self.step < train.steps:
                try:
                    self._step(batches, telemetry)
                except DataOverdueError:
                    self._save({})
                    self._leave(stop)
                heartbeat.beat(self.step)
                stopping = agreement.ask(stop.signal is not None)
                last = self.step == train.steps
                scores = {}
                if self.held_out is not None and (self._due(evaluation.every) or last):
                    scores = self._evaluate(self.held_out, telemetry)
                if self._due(train.pictures_every):
                    self._draw(telemetry)
                if self._due(train.log_every) or last or scores:
                    self._log(telemetry, scores, loader)
                if self._due(train.checkpoint_every) or last or stopping or scores:
                    self._save(scores)
                if stopping and not last:
                    self._leave(stop)
            agreement.close()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _step(self, batches: "_Timed", telemetry: Telemetry) -> None:
        """One update; nothing here waits for the device."""
        train = self.config.train
        # A method that draws from torch's generator gets the same at this step of every run.
        torch.manual_seed((train.seed * 1_000_003 + self.step) * self.world.size + self.world.rank)
        done = self.stepper(batches, self.step)
        self.learning_rate = done.learning_rate
        # A scaled loss overflows now and then, and the scale adapts: only its own value counts.
        scaled = train.precision == "fp16"
        bad = ~done.scalars["loss"].isfinite() if scaled else done.skipped
        self.finite.note(self.step, bad, done.sources)
        self.step += 1
        self.sample += train.batch * train.accumulate * self.world.size
        if self._due(train.pictures_every):
            self.clip = done.views[0, 0].clone()  # a loader may write over its batch
        telemetry.add(done.scalars, clips=len(done.sources), waited=batches.take_wait())

    def _telemetry(self) -> Telemetry:
        return Telemetry(
            self.folder,
            steps=self.config.train.steps,
            start=self.step,
            title=self.config.method,
            world=self.world,
        )

    def _held_out(self) -> HeldOut | None:
        if not self.config.eval.every:
            return None
        if self.method.segmenter() is None:
            raise UserError("This method finds no masks to score; leave out eval.every.")
        return HeldOut(self.config.eval, self.world)

    def _evaluate(self, held_out: HeldOut, telemetry: Telemetry) -> dict[str, float]:
        """Scores on the held-out videos, the deciding one under `score` too."""
        model = self.method.segmenter()
        assert model is not None
        with telemetry.paused(), uncompiled():
            found = held_out.score(model)
        named = {f"eval/{name}": value for name, value in found.items()}
        return named | {"score": found[held_out.metric]}

    def _draw(self, telemetry: Telemetry) -> None:
        """What the student sees in a clip of this step, in TensorBoard."""
        model = self.method.segmenter()
        if model is None or self.clip is None or not self.world.main:
            return
        with telemetry.paused(), uncompiled():
            telemetry.picture(self.step, "masks", mask_picture(model, self.clip))

    def _log(self, telemetry: Telemetry, scores: dict[str, float], loader: Loader) -> None:
        extra = {"lr": self.learning_rate, "replaced_clips": loader.faults.replaced}
        if self.config.train.precision == "fp16":
            extra["loss_scale"] = self.stepper.update.scaler.get_scale()
        values = telemetry.log(self.step, extra | scores)
        self.finite.look(self.checkpoints.newest())
        self.collapse.look(self.step, values)

    def _save(self, scores: dict[str, float]) -> None:
        if not self.world.main:
            return
        state = {
            "method": self.method.state_dict(),
            **self.stepper.state_dict(),
        }
        self.checkpoints.save(self.step, self.sample, state, score=scores.get("score"))

    def _leave(self, stop: StopRequest) -> None:
        """End as the signal asks, once the checkpoint is on the disk."""
        self.checkpoints.wait()
        if self.world.main:
            logger.info("Stopped at step %d; the same command goes on from there.", self.step)
        stop.leave()


class _Timed:
    """Batches, and how long they kept the caller waiting."""

    def __init__(self, batches: Iterator[Batch], stop: StopRequest) -> None:
        self._batches, self._stop = batches, stop
        self._waited = 0.0

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self) -> Batch:
        asked = time.perf_counter()
        try:
            with self._stop.waiting_for_data():
                return next(self._batches)
        finally:
            self._waited += time.perf_counter() - asked

    def take_wait(self) -> float:
        """Seconds waited since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited
