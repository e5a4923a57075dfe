"""Every setting of the system: frozen, keyword-only dataclasses that check themselves when they are
made.

The command line's flags, the TOML file of `--config` and a run's `config.json` all follow from
these classes. Letters in the comments as in the paper: T frames a clip, N semantic slots, P
instance slots a semantic, D width.
"""

import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from smtc.config_values import flatten, from_dict, require, to_dict
from smtc.errors import UserError
from smtc.public_weights import published


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The encoder: frames to features `[B,T,L,D]`."""

    architecture: Literal["vit_small", "vit_tiny", "resnet50"] = "vit_small"
    """vit_small: DINO ViT-S; vit_tiny: width 64, depth 3, for CPUs; resnet50: MoCo, stride 16,
    projected to D.
    """
    patch: int = 16
    """Pixels on a token's side (8 or 16 for DINO's weights; 16 for resnet50)."""
    weights: str | None = None
    """What the encoder starts from: dino (vit_small of patch 8 or 16) or moco (resnet50), which are
    downloaded once; a DINO, MoCo or converted encoder file (./dino is one); or none.
    """
    feature: Literal["keys", "tokens"] = "keys"
    """keys: the last block's keys, no final norm; tokens: the last block's output, no final norm.
    """
    position_embedding: Literal["learned", "none"] = "learned"
    position_resize: Literal["scale_factor", "size"] = "scale_factor"
    """How a learned position embedding meets another grid; scale_factor is the authors' code, bit
    for bit.
    """
    drop_path: float = 0.1
    """Stochastic depth of the last block in training; rises linearly from 0 over the blocks."""
    neck: int = 0
    """Hidden width of a two-layer head after the encoder (tiny presets); 0: none."""

    def __post_init__(self) -> None:
        require(self.patch >= 1, f"model.backbone.patch is {self.patch}; it must be at least 1.")
        require(
            self.neck >= 0,
            f"model.backbone.neck is {self.neck}; use 0 for no neck or a positive width.",
        )
        require(
            0 <= self.drop_path < 1,
            f"model.backbone.drop-path is {self.drop_path}; it must lie in [0, 1).",
        )
        if self.weights == "none":
            object.__setattr__(self, "weights", None)
        published(self.weights, self.architecture, self.patch)
        if self.architecture == "resnet50":
            require(
                self.patch == 16,
                "The resnet50 backbone has stride 16; set model.backbone.patch to 16.",
            )
            require(
                self.feature == "tokens",
                'The resnet50 backbone has no keys; set model.backbone.feature to "tokens".',
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: correlation fusion and semantic-aware masked slot attention."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    resolution: tuple[int, int] = (256, 256)
    """Height and width of training frames; fixes the reference grid of the correlation projection.
    """
    slots: int = 16
    """N, semantic slots."""
    instances: int = 4
    """P, instance slots a semantic slot (at most 8)."""
    iterations: int = 3
    reference: Literal["previous", "random"] = "random"
    """Which frame a frame is correlated with in training; evaluation always uses the previous one.
    """
    fusion_head: Literal["identity", "linear"] = "identity"
    correlation_scale: float = 1.0
    """Multiplies the raw correlation (ours; 1 elsewhere)."""
    correlation_gain: float = 1.0
    """Multiplies the initial weights of the correlation's projection (ours; 1 elsewhere)."""
    update: Literal["gru", "residual"] = "residual"
    gradient: Literal["full", "straight_through"] = "straight_through"
    semantic_mask: Literal["softmax>0.5", "logits>0.3"] = "softmax>0.5"
    """What of a frame the instance slots of a semantic see."""
    sampling: Literal["reparameterised", "detached"] = "reparameterised"
    embedding: Literal["raw", "mlp"] = "mlp"
    """The instance loss compares raw slots, or the unit-norm output of an MLP."""
    impl: Literal["auto", "eager", "triton"] = "auto"
    """Which implementation of the operations runs: plain torch, the fused kernels, or (auto, said
    once) the one that suits the device.
    """
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Of the vision transformer: torch's scaled_dot_product_attention, or xformers' (CUDA only)."""

    def __post_init__(self) -> None:
        require(self.slots >= 1, f"model.slots is {self.slots}; at least 1 slot is needed.")
        require(
            1 <= self.instances <= 8,
            f"model.instances is {self.instances}; the exact assignment handles 1 to 8.",
        )
        require(
            self.iterations >= 1, f"model.iterations is {self.iterations}; at least 1 is needed."
        )
        for side in self.resolution:
            require(
                side >= self.backbone.patch and side % self.backbone.patch == 0,
                f"model.resolution {self.resolution[0]}x{self.resolution[1]} is no multiple of the "
                f"patch ({self.backbone.patch}); use {side - side % self.backbone.patch}, say.",
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens at the training resolution."""
        return self.resolution[0] // self.backbone.patch, self.resolution[1] // self.backbone.patch


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The three losses (Eq. 8 to 13 of the paper) and their weights."""

    epsilon: float = 0.05
    """Sinkhorn's entropic regularisation."""
    iterations: int = 3
    """Sinkhorn iterations."""
    marginals: Literal["uniform", "l1"] = "uniform"
    cost: Literal["cosine", "dot"] = "cosine"
    reduction: Literal["mean", "sum"] = "mean"
    form: Literal["cosine", "l2_margin"] = "cosine"
    """Of the instance loss."""
    margin: float = 0.5
    normaliser: Literal["batch", "clip"] = "clip"
    mask_threshold: float = 0.3
    """tau: a position belongs to a semantic whose softmax exceeds it."""
    area: float = 0.2
    """tau_1: the least share of the frame that a valid semantic covers."""
    similarity: float = 0.5
    """tau_2: the least cosine between a valid instance slot and its semantic slot."""
    alignment_weight: float = 1.0
    regularisation_weight: float = 1.0
    instance_weight: float = 1.0
    instance_from_step: int = 0
    """The instance loss counts from this step on (ours; 0 elsewhere)."""
    teacher_sharpening: float = 1.0
    """Teacher masks are raised to this power and renormalised (ours; 1 elsewhere)."""

    def __post_init__(self) -> None:
        require(
            0 < self.epsilon < math.inf,
            f"objective.epsilon is {self.epsilon}; it must be positive.",
        )
        require(
            self.iterations >= 1,
            f"objective.iterations is {self.iterations}; at least 1 is needed.",
        )
        require(self.teacher_sharpening > 0, "objective.teacher-sharpening must be positive.")
        for name in ("mask_threshold", "area"):
            value = getattr(self, name)
            flag = name.replace("_", "-")
            require(0 <= value <= 1, f"objective.{flag} is {value}; it lies in [0, 1].")
        require(self.instance_from_step >= 0, "objective.instance-from-step must not be negative.")


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """The label-free warm start of a small encoder: VICReg between the same place in two frames of
    a clip.
    """

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    centring: float = 5.0
    """Weight of the squared clip mean, which the other terms do not see."""
    shift: int = 1
    """The positive lies up to this many tokens away in each direction."""
    grayscale: float = 0.8
    """Chance that a whole batch is grey."""

    def __post_init__(self) -> None:
        require(self.shift >= 0, f"warm-start.shift is {self.shift}; it must not be negative.")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What happens to a clip's frames; a chance of 0 switches a part off. Order: crop, flip, grey,
    jitter, blur.
    """

    crop: tuple[float, float] | None = None
    """Least and greatest share of the frame's area that a random crop keeps."""
    flip: float = 0.0
    grayscale: float = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of brightness, contrast and saturation; of hue in turns."""
    jitter_chance: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """In pixels."""
    blur_kernel: int = 25

    def __post_init__(self) -> None:
        for name in ("flip", "grayscale", "jitter_chance", "blur"):
            value = getattr(self, name)
            require(
                0 <= value <= 1,
                f"data.augment.{name.replace('_', '-')} is {value}; a chance lies in [0, 1].",
            )
        if self.crop is not None:
            low, high = self.crop
            require(
                0 < low <= high <= 1,
                f"data.augment.crop is {low} {high}; use 0 < least <= greatest <= 1.",
            )
        low, high = self.blur_sigma
        require(0 < low <= high, f"data.augment.blur-sigma is {low} {high}; use 0 < least <= most.")
        require(
            min(self.jitter) >= 0 and self.jitter[3] <= 0.5,
            f"data.augment.jitter is {self.jitter}; use values from 0, the last (hue) up to 0.5.",
        )
        require(
            self.blur_kernel >= 1 and self.blur_kernel % 2 == 1,
            f"data.augment.blur-kernel is {self.blur_kernel}; it must be odd.",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from and what is done to them."""

    root: str | None = None
    """A folder of videos, each a folder of JPEG or PNG frames or a video file; the DAVIS and
    YouTube-VOS layouts are found.
    """
    frames: int = 4
    """T, frames a clip."""
    gap: int = 4
    """Frames from one of a clip's frames to the next; shrinks for videos too short for it."""
    random_gap: bool = False
    """Draw the gap from 1 to `gap` for each clip."""
    resize: Literal["squash", "crop"] = "squash"
    """squash: the aspect ratio is not kept (released code); crop: the largest centred crop of the
    right shape.
    """
    antialias: bool = False
    """Filter before shrinking, as PIL's bilinear does; the released code does not."""
    spatial: Literal["shared", "independent"] = "shared"
    """independent: the two views get their own crop and flip, and the teacher's targets are warped
    back (ours).
    """
    loader: Literal["auto", "dali", "torch", "cache"] = "auto"
    """Who decodes and augments: DALI, OpenCV in worker processes, or either of them on the frames
    that `smtc data pack` wrote (cache). auto: the cache if packed, DALI if it can run and a GPU
    trains, else torch.
    """
    cache: str | None = None
    """The folder that `smtc data inspect` and `smtc data pack` wrote to; none: their default."""
    cache_memory: Literal["auto", "host", "gpu"] = "auto"
    """Where packed frames wait for a GPU; auto: in its memory if a quarter of what is free holds
    them.
    """
    workers: int = 2
    """Processes (torch) or threads (DALI) that decode and augment; 0: the trainer's own process,
    one thread.
    """
    prefetch: int = 2
    """Batches made ahead, by each process or by DALI."""
    roi_decode: bool = False
    """DALI decodes only the part of a JPEG that the crop keeps; for views that share it."""
    hardware_decoder: float = 0.65
    """Share of the JPEG files that DALI gives to a GPU's hardware decoder, where it has one."""
    max_bad_share: float = 0.2
    """Stop when more than this share of the clips drawn was replaced because of unreadable files.
    """
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        require(self.frames >= 2, f"data.frames is {self.frames}; a clip needs at least 2 frames.")
        require(self.gap >= 1, f"data.gap is {self.gap}; it must be at least 1.")
        require(
            0 <= self.workers <= 1024,
            f"data.workers is {self.workers}; use 0 to the number of cores.",
        )
        require(self.prefetch >= 1, f"data.prefetch is {self.prefetch}; it must be at least 1.")
        require(
            0 <= self.hardware_decoder <= 1,
            f"data.hardware-decoder is {self.hardware_decoder}; a share lies in [0, 1].",
        )
        require(
            0 <= self.max_bad_share <= 1,
            f"data.max-bad-share is {self.max_bad_share}; a share lies in [0, 1].",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule over exactly `train.steps` steps."""

    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    """Also decay the slots' mean and log sigma, the position embedding and the CLS token (released
    code).
    """
    schedule: Literal["cosine", "warmup_cosine"] = "warmup_cosine"
    warmup_steps: int = 500
    final_lr: float = 0.1
    """Share of `lr` that the cosine ends at."""
    clip_norm: float | None = None
    """Greatest gradient norm; none: no clipping."""
    encoder_lr: float = 0.01
    """The encoder's learning rate as a share of `lr`."""
    encoder_from_step: int = 3000
    """The encoder is frozen before this step; -1: for good."""
    frozen_backward: bool = False
    """Run the frozen encoder's backward and warm its moments, as the released script does."""
    impl: Literal["torch", "apex"] = "torch"
    """AdamW: torch's fused one, or NVIDIA apex's FusedAdam (CUDA only)."""

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, f"optim.lr is {self.lr}; it must be positive and finite.")
        require(
            self.warmup_steps >= 0,
            f"optim.warmup-steps is {self.warmup_steps}; it must not be negative.",
        )
        require(
            self.encoder_from_step >= -1,
            f"optim.encoder-from-step is {self.encoder_from_step}; use -1 for never.",
        )
        require(self.clip_norm is None or self.clip_norm > 0, "optim.clip-norm must be positive.")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas is {self.betas}; both lie in [0, 1).",
        )
        for name in ("eps", "weight_decay", "final_lr", "encoder_lr"):
            value = getattr(self, name)
            flag = name.replace("_", "-")
            require(value >= 0, f"optim.{flag} is {value}; it must not be negative.")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The momentum teacher."""

    momentum: float = 0.999
    scope: Literal["all", "head"] = "all"
    """head: the teacher's encoder stays as it was initialised (released code)."""

    def __post_init__(self) -> None:
        require(0 <= self.momentum <= 1, f"teacher.momentum is {self.momentum}; it lies in [0, 1].")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 10_000
    batch: int = 32
    """Clips a step and process."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16: autocast over master weights in fp32; slots, softmax and Sinkhorn stay in
    fp32; fp16 with a loss scale that adapts.
    """
    matmul: Literal["highest", "high", "medium"] = "highest"
    """What fp32 matrix products may be rounded to: nothing, TF32, or bf16
    (torch.set_float32_matmul_precision).
    """
    compile: Literal["none", "encoder", "model"] = "none"
    """torch.compile of the encoder's blocks, or also of all that follows: slots and losses."""
    cuda_graphs: Literal["off", "on"] = "off"
    """Capture a whole step (both forwards, backward, clipping, optimiser, teacher) as one CUDA
    graph and replay it.
    """
    checkpoint_activations: bool = False
    """Compute the activations of the encoder's blocks again in the backward pass instead of keeping
    them: less memory for a third more arithmetic; pays where L is 1024 or more.
    """
    accumulate: int = 1
    """Batches whose gradients are summed for one step."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """After a step whose gradient is not finite, which is never applied: stop the run, or go on and
    count.
    """
    threads: int | None = None
    """Torch's CPU threads in this process; none: torch's choice."""
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    """The newest so many, besides the best."""
    pictures_every: int = 500
    """Steps between pictures of masks in TensorBoard; 0: none."""
    timeout: float = 600.0
    """Seconds that a process waits for the others."""

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"train.steps is {self.steps}; it must not be negative.")
        require(0 <= self.seed < 2**31, f"train.seed is {self.seed}; it lies in [0, 2^31).")
        require(self.batch >= 1, f"train.batch is {self.batch}; at least 1 clip is needed.")
        require(self.log_every >= 1, f"train.log-every is {self.log_every}; it must be at least 1.")
        require(
            self.checkpoint_every >= 1,
            f"train.checkpoint-every is {self.checkpoint_every}; it must be at least 1.",
        )
        for name in ("accumulate", "keep_checkpoints"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name.replace('_', '-')} is {value}; use 1 or more.")
        require(
            self.pictures_every >= 0,
            f"train.pictures-every is {self.pictures_every}; use 0 for none.",
        )
        require(self.timeout > 0, f"train.timeout is {self.timeout}; it must be positive.")
        require(
            self.threads is None or 1 <= self.threads <= 1024,
            f"train.threads is {self.threads}; use 1 or more.",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scoring on held-out videos while training."""

    every: int = 0
    """Steps between two scores; 0: never."""
    data: str | None = None
    """The folder of the held-out videos, with masks."""
    dataset: Literal["synthetic", "davis2016"] = "synthetic"
    metric: str | None = None
    """What makes a checkpoint the best; none: fg_iou (synthetic), j_sequences (davis2016)."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval.every is {self.every}; use 0 for never.")
        require(
            not self.every or self.data is not None,
            "eval.every needs held-out videos with masks; name their folder with --eval.data.",
        )


_LARGEST = 1e15
"""No setting means anything beyond it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    method: Literal["smtc", "warm_start"] = "smtc"
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init: str | None = None
    """Weights to start from: a run folder, a model folder or a .safetensors file of ours."""
    output: str | None = None
    """The run folder."""

    def __post_init__(self) -> None:
        for name, value in flatten(to_dict(self)).items():
            require(value != "", f"{name.replace('_', '-')} is empty; leave it out instead.")
            for part in value if isinstance(value, tuple) else (value,):
                require(
                    not isinstance(part, int | float) or -_LARGEST < part < _LARGEST,
                    f"{name.replace('_', '-')} is {part}; it must be a number below {_LARGEST:g}.",
                )

    def override(self, settings: Mapping[str, Any]) -> "Config":
        """The same with other values for dotted settings, as in `{"train.steps": 100}`.

        Raises `UserError` for an unknown setting and an impossible value.
        """
        values = to_dict(self)
        for name, value in settings.items():
            *tables, last = name.split(".")
            table: Any = values
            for inner in tables:
                table = table.get(inner) if isinstance(table, dict) else None
            if not isinstance(table, dict) or last not in table or isinstance(table[last], dict):
                known = flatten(to_dict(self))
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "see smtc train --help."
                raise UserError(f"There is no setting {name!r}; {hint}")
            table[last] = value
        return typing.cast(Config, from_dict(Config, values))
