"""The named settings: what the paper says, what was released, what we recommend,
what is tiny.
"""

import difflib
from collections.abc import Callable

from smtc.config import (
    AugmentConfig,
    BackboneConfig,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TeacherConfig,
    TrainConfig,
    WarmStartConfig,
)
from smtc.errors import UserError

SYNTHETIC_TRAINING_SET = "data/synthetic/train"


def paper() -> Config:
    """The paper's text; where it is silent (steps, margin) our choice."""
    return Config(
        model=ModelConfig(
            reference="random",
            fusion_head="linear",
            update="gru",
            gradient="full",
            semantic_mask="softmax>0.5",
            sampling="reparameterised",
            embedding="raw",
        ),
        objective=ObjectiveConfig(
            marginals="uniform",
            reduction="sum",
            form="l2_margin",
            mask_threshold=0.5,
        ),
        data=DataConfig(
            augment=AugmentConfig(crop=(0.5, 1.0), flip=0.5, jitter_chance=0.8),
        ),
        optim=OptimConfig(
            lr=2e-4,
            decay_embeddings=True,
            schedule="cosine",
            warmup_steps=0,
            encoder_lr=1.0,
            encoder_from_step=0,
        ),
        train=TrainConfig(batch=128, steps=100_000),
    )


def official_v2() -> Config:
    """The authors' released efficient script, with its frozen phase of 3000 steps."""
    return Config(
        model=ModelConfig(
            reference="previous",
            fusion_head="identity",
            update="residual",
            gradient="straight_through",
            semantic_mask="logits>0.3",
            sampling="detached",
            embedding="mlp",
        ),
        objective=ObjectiveConfig(
            marginals="l1",
            reduction="mean",
            form="cosine",
            normaliser="batch",
            mask_threshold=0.3,
        ),
        data=DataConfig(
            augment=AugmentConfig(grayscale=0.2, jitter_chance=0.8, blur=0.5),
        ),
        optim=OptimConfig(
            lr=2e-5,
            decay_embeddings=True,
            schedule="cosine",
            warmup_steps=0,
            encoder_lr=0.01,
            encoder_from_step=3000,
        ),
        teacher=TeacherConfig(scope="head"),
        train=TrainConfig(batch=32, steps=10_000),
    )


def official_strict() -> Config:
    """The first command of the authors' README: a larger batch and rate, the encoder trained from
    the start.
    """
    base = official_v2()
    return Config(
        model=base.model,
        objective=base.objective,
        data=base.data,
        optim=OptimConfig(
            lr=1e-4,
            decay_embeddings=True,
            schedule="cosine",
            warmup_steps=0,
            encoder_lr=0.01,
            encoder_from_step=0,
        ),
        teacher=base.teacher,
        train=TrainConfig(batch=64, steps=10_000),
    )


def fixed() -> Config:
    """Our recommendation: the released settings where they work, the paper's where the release
    departs from it.
    """
    return Config(
        data=DataConfig(
            augment=AugmentConfig(
                crop=(0.5, 1.0), flip=0.5, grayscale=0.2, jitter_chance=0.8, blur=0.5
            ),
        ),
    )


def tiny_encoder() -> Config:
    """The label-free warm start of `tiny`'s encoder."""
    return Config(
        method="warm_start",
        model=_tiny_model(),
        warm_start=WarmStartConfig(covariance=8.0, grayscale=0.2),
        data=DataConfig(
            root=SYNTHETIC_TRAINING_SET,
            frames=2,
            gap=7,
            random_gap=True,
            workers=1,
            augment=AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.3), jitter_chance=0.8),
        ),
        optim=OptimConfig(
            lr=4e-3,
            weight_decay=0.04,
            warmup_steps=30,
            final_lr=0.0,
            clip_norm=10.0,
            encoder_lr=1.0,
            encoder_from_step=0,
        ),
        train=TrainConfig(steps=700, batch=16, threads=1, checkpoint_every=100),
    )


def tiny() -> Config:
    """Small, learns on a CPU in minutes when it starts from `tiny_encoder`."""
    return Config(
        model=_tiny_model(),
        objective=ObjectiveConfig(teacher_sharpening=2.0, instance_from_step=400),
        data=DataConfig(
            root=SYNTHETIC_TRAINING_SET,
            gap=2,
            workers=1,
            augment=AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.3), jitter_chance=0.8),
        ),
        optim=OptimConfig(
            lr=8e-3,
            weight_decay=0.01,
            warmup_steps=30,
            clip_norm=1.0,
            encoder_from_step=-1,
        ),
        teacher=TeacherConfig(momentum=0.97),
        train=TrainConfig(steps=500, batch=8, threads=1, checkpoint_every=100),
    )


def _tiny_model() -> ModelConfig:
    return ModelConfig(
        backbone=BackboneConfig(
            architecture="vit_tiny", patch=8, position_embedding="none", drop_path=0.0, neck=128
        ),
        resolution=(96, 96),
        slots=8,
        instances=4,
        correlation_scale=0.02,
        correlation_gain=0.2,
    )


PRESETS: dict[str, Callable[[], Config]] = {
    make.__name__: make for make in (paper, official_v2, official_strict, fixed, tiny, tiny_encoder)
}


def get(name: str) -> Config:
    """The preset called `name`. Errors: `UserError` with the nearest name."""
    if name in PRESETS:
        return PRESETS[name]()
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(PRESETS)}."
    raise UserError(f"There is no preset {name!r}; {hint}")
