"""What the trainer knows of a method, and SMTC as one."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor, nn

from smtc.backbones import AS_EVALUATED, Encoder
from smtc.config import Config
from smtc.diagnostics import diagnose
from smtc.keyed_random import keyed_normal, keyed_other_frame, keyed_uniform
from smtc.model import SMTC
from smtc.objectives import smtc_losses
from smtc.pipelines.batch import Batch
from smtc.regions import region
from smtc.teacher import Teacher
from smtc.weights import load_encoder_weights, load_init, save_model

logger = logging.getLogger("smtc")

# Streams of `keyed_random`, one for each thing that is drawn for a sample.
STUDENT_NOISE_STREAM = 1
TEACHER_NOISE_STREAM = 2
REFERENCE_STREAM = 3
DEPTH_STREAM = 4

# What only the instance loss reaches, and what it alone reaches in the last iteration.
_INSTANCES_ONLY = ("slot_attention.slots_sigma", "mlp_slot.")
_AFTER_ATTENTION = tuple(
    f"slot_attention.{part}." for part in ("project_v", "norm_pre_ff", "mlp", "gru")
)


class Method(nn.Module, ABC):
    """A way of learning from clips. The trainer sees what is named here and nothing else of it.

    The state that a checkpoint holds is the module's own `state_dict`.
    """

    capturable = False
    """Whether a CUDA graph of one step is right for all steps of a stage: nothing in
    `training_step` and `after_step` is decided on the host but by `stage`.
    """

    @abstractmethod
    def trainable(self, step: int) -> dict[str, nn.Parameter]:
        """Parameters that learn at `step`, by name; a change of this set is a new phase.

        All of them get a gradient in every `training_step` of the phase, which is what keeps many
        processes together; nothing else requires one. Names that start with `encoder.` get the
        encoder's rate.
        """

    @abstractmethod
    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars of one step, the one to minimise under `loss`; no host synchronisation."""

    def after_step(self, step: int, skipped: Tensor) -> None:
        """What follows by momentum; not at all where `skipped` (bool `[]`, on the device), because
        the gradient of the step was not finite and nothing learned from it.
        """

    def stage(self, step: int) -> Hashable:
        """What `training_step` takes from `step`; a captured step serves one stage."""
        return None

    def encoders(self) -> list[Encoder]:
        """Those that take part in a step, whose blocks are compiled or recomputed on request."""
        return []

    def compile_rest(self) -> None:
        """Compile what follows the encoders, for `train.compile=model`."""

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """Write what people use after training, in the form that `smtc.load_model` or `--init`
        reads.
        """

    def segmenter(self) -> SMTC | None:
        """The model that finds masks, for scores and pictures while training; None where there is
        none.
        """
        return None


class SMTCMethod(Method):
    """Student, teacher and the three objectives."""

    capturable = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = SMTC(config.model)
        self._initialise()
        self.teacher = Teacher(self.student, config.teacher)
        self._finish = self._losses  # or compiled

    def _initialise(self) -> None:
        if self.config.model.backbone.weights is None and self.config.init is None:
            logger.warning(
                "The encoder starts from random weights, from which SMTC does not learn: give "
                "--model.backbone.weights dino (or moco, or a file) or --init RUN."
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
        dead = {f"encoder.{name}" for name in self.student.encoder.unused_parameters()}
        if self.config.model.sampling == "detached":
            dead.add("slot_attention.slots_sigma")
        if self._encoder_is_frozen(step):
            dead |= {f"encoder.{name}" for name, _ in self.student.encoder.named_parameters()}
        idle = self._idle_parts(step)
        return {
            name: parameter
            for name, parameter in self.student.named_parameters()
            if name not in dead and not name.startswith(idle)
        }

    def _idle_parts(self, step: int) -> tuple[str, ...]:
        """Beginnings of the names that get no gradient while the instance loss does not count."""
        if self._counts_instances(step):
            return ()
        model = self.config.model
        if model.gradient == "full" and model.iterations > 1:
            return _INSTANCES_ONLY
        # The mask losses see the logits of the last iteration, which end before the values.
        return (*_INSTANCES_ONLY, *_AFTER_ATTENTION)

    def _encoder_is_frozen(self, step: int) -> bool:
        """Whether it gets no gradient at `step`; until it does, the teacher's is its equal."""
        optim = self.config.optim
        waits = optim.encoder_from_step < 0 or step < optim.encoder_from_step
        return waits and not optim.frozen_backward

    def stage(self, step: int) -> Hashable:
        """Whether the encoder and the instance loss take part."""
        return self._encoder_is_frozen(step), self._counts_instances(step)

    def _counts_instances(self, step: int) -> bool:
        return step >= self.config.objective.instance_from_step

    def encoders(self) -> list[Encoder]:
        """The student's and the teacher's."""
        return [self.student.encoder, self._teacher_model().encoder]

    def _teacher_model(self) -> SMTC:
        """The teacher's model."""
        assert isinstance(self.teacher.model, SMTC)
        return self.teacher.model

    def compile_rest(self) -> None:
        """Slots and losses as one compiled function."""
        self._finish = torch.compile(self._losses, dynamic=False)

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One forward pass of student (first view) and teacher (second view) and the losses between
        them.
        """
        student_features, teacher_features = self._encode(batch, step)
        return self._finish(
            batch.views,
            student_features,
            teacher_features,
            batch.index,
            batch.spatial,
            self._counts_instances(step),
        )

    def _encode(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Features `[B,T,L,D]` of the student's and the teacher's view.

        While the encoder is frozen both models have the same one, which then takes both views at
        once, without a graph.
        """
        student_view, teacher_view = batch.views.unbind(dim=1)
        depth = self._depth(batch)
        if self._encoder_is_frozen(step):
            whole = torch.full_like(depth, AS_EVALUATED)
            with torch.no_grad(), region("student"):
                both, _ = self.student.encode(
                    torch.cat([student_view, teacher_view]), torch.cat([depth, whole])
                )
            student_features, teacher_features = both.chunk(2)
            return student_features, teacher_features
        with region("student"):
            student_features, _ = self.student.encode(student_view, depth)
        with torch.no_grad(), region("teacher"):
            teacher_features, _ = self._teacher_model().encode(teacher_view)
        return student_features, teacher_features

    def _losses(
        self,
        views: Tensor,
        student_features: Tensor,
        teacher_features: Tensor,
        index: Tensor,
        spatial: Tensor | None,
        with_instances: bool,
    ) -> dict[str, Tensor]:
        """All that follows the encoders: slots, losses and what the log shows."""
        student_view, teacher_view = views.unbind(dim=1)
        frames = views.shape[2]
        reference = self._references(index, frames)
        with region("student"):
            noise = self._noise(index, frames, STUDENT_NOISE_STREAM)
            student = self.student(student_view, noise, reference, features=student_features)
        with region("teacher"):
            noise = self._noise(index, frames, TEACHER_NOISE_STREAM)
            teacher = self.teacher(teacher_view, noise, reference, features=teacher_features)
        losses = smtc_losses(
            student,
            teacher,
            self.config.objective,
            spatial=spatial,
            with_instances=with_instances,
            impl=self.config.model.impl,
        )
        found = {name: value for name, value in losses._asdict().items() if value is not None}
        return found | diagnose(student, teacher)

    def _noise(self, index: Tensor, frames: int, stream: int) -> Tensor:
        """What instance slots are sampled with, keyed by the clips: `[B,T,N,P,D]`."""
        model = self.config.model
        shape = frames, model.slots, model.instances, self.student.width
        return keyed_normal(self.config.train.seed, index, stream, shape)

    def _depth(self, batch: Batch) -> Tensor:
        """What stochastic depth is decided with, keyed by the clips: `[B,T,branches]`."""
        frames, branches = batch.views.shape[2], self.student.encoder.branches
        drawn = keyed_uniform(self.config.train.seed, batch.index, DEPTH_STREAM, frames * branches)
        return drawn.view(len(batch.index), frames, branches)

    def _references(self, index: Tensor, frames: int) -> Tensor:
        """The frame that each is correlated with, the same for student and teacher: `[B,T]`."""
        if self.config.model.reference == "random":
            return keyed_other_frame(self.config.train.seed, index, REFERENCE_STREAM, frames)
        previous = (torch.arange(frames, device=index.device) - 1) % frames
        return previous.expand(len(index), -1)

    def after_step(self, step: int, skipped: Tensor) -> None:
        """The teacher follows the student."""
        self.teacher.follow(self.student, skipped)

    def save_model(self, folder: Path) -> None:
        """The student's weights and settings."""
        save_model(self.student, folder)

    def segmenter(self) -> SMTC:
        """The student."""
        return self.student
