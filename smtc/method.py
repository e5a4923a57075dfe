"""What the trainer knows of a method, and SMTC as one."""

import logging
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from smtc.config import Config
from smtc.keyed_random import keyed_normal, keyed_other_frame
from smtc.model import SMTC, Output
from smtc.objectives import smtc_losses
from smtc.pipelines.batch import Batch
from smtc.teacher import Teacher
from smtc.weights import load_encoder_weights, load_init, save_model

logger = logging.getLogger("smtc")

# Streams of `keyed_random`, one for each thing that is drawn for a sample.
STUDENT_NOISE_STREAM = 1
TEACHER_NOISE_STREAM = 2
REFERENCE_STREAM = 3


class Method(nn.Module, ABC):
    """A way of learning from clips. The trainer sees these four things and nothing else of it.

    The state that a checkpoint holds is the module's own `state_dict`.
    """

    @abstractmethod
    def trainable(self, step: int) -> dict[str, nn.Parameter]:
        """Parameters that learn at `step`, by name; a change of this set is a new phase.

        Everything else must not require a gradient. Names that start with `encoder.` get the
        encoder's rate.
        """

    @abstractmethod
    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars of one step, the one to minimise under `loss`; no host synchronisation."""

    def after_step(self, step: int) -> None:
        """What follows by momentum."""

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """Write what people use after training, in the form that `smtc.load_model` or `--init`
        reads.
        """


class SMTCMethod(Method):
    """Student, teacher and the three objectives."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = SMTC(config.model)
        self._initialise()
        self.teacher = Teacher(self.student, config.teacher)

    def _initialise(self) -> None:
        if self.config.model.backbone.weights is None and self.config.init is None:
            logger.warning(
                "The encoder starts from random weights, from which SMTC does not learn: give "
                "--model.backbone.weights FILE (DINO, MoCo) or --init RUN."
            )
        if self.config.model.backbone.weights is not None:
            report = load_encoder_weights(self.student.encoder, self.config.model.backbone.weights)
            logger.info("%s", report)
        if self.config.init is not None:
            logger.info("%s", load_init(self.student, self.config.init))

    def trainable(self, step: int) -> dict[str, nn.Parameter]:
        """All but the encoder in its frozen phase and the tensors that the settings leave without
        gradient.
        """
        optim = self.config.optim
        frozen = optim.encoder_from_step < 0 or step < optim.encoder_from_step
        dead = {f"encoder.{name}" for name in self.student.encoder.unused_parameters()}
        if self.config.model.sampling == "detached":
            dead.add("slot_attention.slots_sigma")
        if frozen and not optim.frozen_backward:
            dead |= {f"encoder.{name}" for name, _ in self.student.encoder.named_parameters()}
        return {
            name: parameter
            for name, parameter in self.student.named_parameters()
            if name not in dead
        }

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One forward pass of student (first view) and teacher (second view) and the losses between
        them.
        """
        objective = self.config.objective
        student_view, teacher_view = batch.views.unbind(dim=1)
        reference = self._references(batch.index, student_view.shape[1])
        student: Output = self.student(
            student_view, self._noise(batch, STUDENT_NOISE_STREAM), reference
        )
        teacher: Output = self.teacher(
            teacher_view, self._noise(batch, TEACHER_NOISE_STREAM), reference
        )
        losses = smtc_losses(
            student,
            teacher,
            objective,
            spatial=batch.spatial,
            with_instances=step >= objective.instance_from_step,
            impl=self.config.model.impl,
        )
        return {name: value for name, value in losses._asdict().items() if value is not None}

    def _noise(self, batch: Batch, stream: int) -> Tensor:
        """What instance slots are sampled with, keyed by the clips: `[B,T,N,P,D]`."""
        model = self.config.model
        shape = batch.views.shape[2], model.slots, model.instances, self.student.width
        return keyed_normal(self.config.train.seed, batch.index, stream, shape)

    def _references(self, index: Tensor, frames: int) -> Tensor:
        """The frame that each is correlated with, the same for student and teacher: `[B,T]`."""
        if self.config.model.reference == "random":
            return keyed_other_frame(self.config.train.seed, index, REFERENCE_STREAM, frames)
        previous = (torch.arange(frames, device=index.device) - 1) % frames
        return previous.expand(len(index), -1)

    def after_step(self, step: int) -> None:
        """The teacher follows the student."""
        self.teacher.follow(self.student)

    def save_model(self, folder: Path) -> None:
        """The student's weights and settings."""
        save_model(self.student, folder)
