"""The plain reference step: one training step of SMTC as one would write it from the paper, in fp32
and with no thought of speed.

It is what the throughput benchmark measures the project against, so it has to be honest: the same
mathematics, random draws and updates as `smtc.method.SMTCMethod` (the tests hold it to that) and no
work that no result depends on. `FAULTS` add such work one by one, as straightforward code often
has it; `RELIEFS` each take one slow part away. All of them leave the results as they are.

Only what the comparison needs is there: a ViT, frames of the training resolution, views that share
their crops, one batch a step, and no guard against gradients that are not finite. The arithmetic is
that of the weights' dtype. Whether a GPU multiplies fp32 as TF32 is the caller's to say (cuDNN's
convolutions, here the patch embedding, do it by default).
"""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from smtc.benchmarks.plain_losses import losses
from smtc.benchmarks.plain_model import Found, Network
from smtc.config import Config, OptimConfig
from smtc.errors import UserError
from smtc.keyed_random import keyed_normal, keyed_other_frame, keyed_uniform
from smtc.method import (
    DEPTH_STREAM,
    REFERENCE_STREAM,
    STUDENT_NOISE_STREAM,
    TEACHER_NOISE_STREAM,
)
from smtc.pipelines.batch import Batch
from smtc.regions import region
from smtc.training.optim import learning_rate

FAULTS = {
    "anomaly": "Autograd's anomaly mode: a traceback for each operation, a NaN check for each "
    "gradient.",
    "float64_frames": "Frames arrive on the host as float64, are copied like that and then cast.",
    "teacher_graph": "The teacher's forward pass builds a graph, which is detached in the losses.",
    "dead_block": "The last block's attention, projection and MLP are computed and thrown away.",
    "frozen_backward": "The whole encoder gets a gradient while its learning rate is 0.",
}
"""Work for nothing, as straightforward code often has it."""

RELIEFS = {
    "sdpa": "The encoder calls F.scaled_dot_product_attention, which keeps no attention matrix.",
    "batched_assignment": "Instances are matched where they are, all clips and semantics at once.",
    "foreach_ema": "The teacher follows in two multi-tensor calls instead of a loop.",
    "fused_adamw": "AdamW updates all parameters of a group in one kernel.",
    "batched_pairs": "The pairs of frames are batched products, as in smtc.kernels.eager.",
}
"""Single changes that help."""

_EMBEDDINGS = ("slots_mu", "slots_sigma", "pos_embed", "cls_token")


class PlainStep:
    """Student, teacher and optimiser; a call is one update, made of phases that can be timed."""

    def __init__(
        self,
        config: Config,
        weights: dict[str, Tensor],
        device: str | torch.device = "cpu",
        faults: Collection[str] = (),
        reliefs: Collection[str] = (),
    ) -> None:
        """Copy the weights to `device`.

        Args:
            config: of a preset; `train.precision` has no part in it.
            weights: the `state_dict` of `smtc.SMTC(config.model)`; the teacher starts as a copy.
            device: where everything runs.
            faults, reliefs: names of `FAULTS` and `RELIEFS`.

        Raises:
            UserError: for settings that the plain step does not know, unknown names, or weights
                of another model.
        """
        self.faults = _known("fault", faults, FAULTS)
        self.reliefs = _known("relief", reliefs, RELIEFS)
        _check(config)
        self.config = config
        self.device = torch.device(device)
        self.student_network = self._network(weights)
        self.teacher_network = self._network(weights)
        self.teacher_network.requires_grad_("teacher_graph" in self.faults)
        self.optimizer = torch.optim.AdamW(
            _groups(self.student_network.named_parameters(), config.optim),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused="fused_adamw" in self.reliefs or None,
        )

    def _network(self, weights: dict[str, Tensor]) -> Network:
        network = Network(
            self.config.model,
            sdpa="sdpa" in self.reliefs,
            dead_block="dead_block" in self.faults,
        )
        network.to(self.device, next((w.dtype for w in weights.values()), torch.float32))
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                "The weights are not those of a model with these settings; give the state_dict of "
                "smtc.SMTC(config.model)."
            ) from error
        return network

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One whole update: the scalars loss, alignment, regularisation and instance."""
        with region("student"):
            student = self.student(batch, step)
        with region("teacher"):
            teacher = self.teacher(batch)
        found = self.losses(student, teacher, step)
        with region("backward"):
            self.backward(found)
        with region("optimiser"):
            self.optimiser(step)
        with region("ema"):
            self.ema()
        return {name: value.detach() for name, value in found.items()}

    def student(self, batch: Batch, step: int) -> Found:
        """The student's forward pass on the first view, with stochastic depth."""
        # A frozen encoder that asks for no gradient gets no graph either.
        self.student_network.encoder.requires_grad_(
            not self._encoder_is_frozen(step)
            or self.config.optim.frozen_backward
            or "frozen_backward" in self.faults
        )
        noise, reference = self._draws(batch, STUDENT_NOISE_STREAM)
        frames, branches = batch.views.shape[2], 2 * len(self.student_network.encoder.blocks)
        index = batch.index.to(self.device)
        depth = keyed_uniform(self.config.train.seed, index, DEPTH_STREAM, frames * branches)
        with self._watched():
            return self.student_network(
                self._view(batch, 0), noise, reference, depth.view(-1, frames, branches)
            )

    def teacher(self, batch: Batch) -> Found:
        """The teacher's forward pass on the second view: no graph, no stochastic depth."""
        noise, reference = self._draws(batch, TEACHER_NOISE_STREAM)
        with torch.set_grad_enabled("teacher_graph" in self.faults), self._watched():
            return self.teacher_network(self._view(batch, 1), noise, reference)

    def losses(self, student: Found, teacher: Found, step: int) -> dict[str, Tensor]:
        """The objective under `loss`, and its parts."""
        objective = self.config.objective
        with self._watched():
            return losses(
                student,
                Found(*(value.detach() for value in teacher)),
                objective,
                with_instances=step >= objective.instance_from_step,
                batched_pairs="batched_pairs" in self.reliefs,
                batched_assignment="batched_assignment" in self.reliefs,
            )

    def backward(self, found: dict[str, Tensor]) -> None:
        """New gradients of `loss`; a parameter that it does not reach has none."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._watched():
            found["loss"].backward()

    def optimiser(self, step: int) -> None:
        """Clip the gradients and update by AdamW, which leaves parameters without one alone."""
        optim = self.config.optim
        if self._encoder_is_frozen(step) and not optim.frozen_backward:
            # What the fault made for nothing must not warm the encoder's moments either.
            self.student_network.encoder.zero_grad(set_to_none=True)
        rate = learning_rate(step, self.config.train.steps, optim)
        encoder_rate = 0.0 if self._encoder_is_frozen(step) else rate * optim.encoder_lr
        for group in self.optimizer.param_groups:
            group["lr"] = encoder_rate if group["encoder"] else rate
        if optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.student_network.parameters(), optim.clip_norm)
        self.optimizer.step()

    @torch.no_grad()
    def ema(self) -> None:
        """The teacher follows: `θ̂ ← m θ̂ + (1 − m) θ`, one parameter after the other."""
        momentum = self.config.teacher.momentum
        ahead = dict(self.student_network.named_parameters())
        followed: dict[str, Tensor] = {
            name: value
            for name, value in self.teacher_network.named_parameters()
            if self.config.teacher.scope == "all" or not name.startswith("encoder.")
        }
        if "foreach_ema" in self.reliefs:
            mine = list(followed.values())
            torch._foreach_mul_(mine, momentum)
            torch._foreach_add_(mine, [ahead[name] for name in followed], alpha=1 - momentum)
            return
        for name, value in followed.items():
            value.mul_(momentum).add_(ahead[name], alpha=1 - momentum)

    def student_state(self) -> dict[str, Tensor]:
        """The student's weights by name, as they are: later updates change them."""
        return self.student_network.state_dict()

    def teacher_state(self) -> dict[str, Tensor]:
        """The teacher's weights by name, as they are."""
        return self.teacher_network.state_dict()

    def _encoder_is_frozen(self, step: int) -> bool:
        start = self.config.optim.encoder_from_step
        return start < 0 or step < start

    def _view(self, batch: Batch, number: int) -> Tensor:
        """The frames of a view, `[B,T,3,H,W]`, on the device and in the weights' dtype."""
        if batch.spatial is not None:
            raise UserError(
                "The plain step cannot warp views that were cropped apart; give a batch of "
                'data.spatial="shared".'
            )
        height, width = self.config.model.resolution
        if batch.views.shape[-2:] != (height, width):
            raise UserError(
                f"The plain step takes frames of model.resolution {height}x{width}; the batch's "
                f"are {batch.views.shape[-2]}x{batch.views.shape[-1]}."
            )
        view = batch.views[:, number]
        if "float64_frames" in self.faults:
            # Nothing happens to a batch that already arrives so: give one where this is timed.
            view = view.to("cpu", torch.float64)
        return view.to(self.device).to(self.student_network.transport_proj.weight.dtype)

    def _draws(self, batch: Batch, stream: int) -> tuple[Tensor, Tensor]:
        """The instance slots' noise `[B,T,N,P,D]`, and the frame that each is correlated with,
        `[B,T]`; the latter is the same for student and teacher.
        """
        model, seed = self.config.model, self.config.train.seed
        index, frames = batch.index.to(self.device), batch.views.shape[2]
        network = self.student_network
        width = network.slot_attention.slots_mu.shape[-1]
        noise = keyed_normal(seed, index, stream, (frames, model.slots, model.instances, width))
        if model.reference == "random":
            reference = keyed_other_frame(seed, index, REFERENCE_STREAM, frames)
        else:
            reference = (torch.arange(frames, device=self.device) - 1) % frames
            reference = reference.expand(len(index), -1)
        return noise.to(network.slot_attention.slots_mu.dtype), reference

    def _watched(self) -> AbstractContextManager[object]:
        if "anomaly" in self.faults:
            return torch.autograd.set_detect_anomaly(True)
        return nullcontext()


def _known(kind: str, names: Collection[str], table: dict[str, str]) -> frozenset[str]:
    for name in names:
        if name not in table:
            raise UserError(f"There is no {kind} {name!r}; there are {', '.join(table)}.")
    return frozenset(names)


def _check(config: Config) -> None:
    """Raise `UserError` for settings that the plain step does not know."""
    if config.method != "smtc":
        raise UserError(f'The plain step is one of SMTC; method {config.method!r} must be "smtc".')
    if config.model.backbone.architecture == "resnet50":
        raise UserError(
            "The plain step knows vision transformers only; set model.backbone.architecture to "
            "vit_small or vit_tiny."
        )
    if config.data.spatial == "independent":
        raise UserError(
            "The plain step cannot warp views that were cropped apart; set data.spatial to shared."
        )
    if config.train.accumulate != 1:
        raise UserError("The plain step takes one batch a step; set train.accumulate to 1.")


def _groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> list[dict[str, object]]:
    """AdamW's groups: matrices decay, the rest (and, unless told so, embeddings) does not; the
    encoder's are marked, for its rate.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        matrix = parameter.ndim >= 2 and (config.decay_embeddings or not name.endswith(_EMBEDDINGS))
        decay = config.weight_decay if matrix else 0.0
        groups.setdefault((name.startswith("encoder."), decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "encoder": encoder}
        for (encoder, decay), parameters in groups.items()
    ]
