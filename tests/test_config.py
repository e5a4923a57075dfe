"""Settings refuse impossible values by name and survive JSON."""

import dataclasses
import json
import re

import pytest

from smtc import presets
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
    from_dict,
    to_dict,
)
from smtc.errors import UserError

IMPOSSIBLE = [
    (BackboneConfig, "model.backbone.patch", {"patch": 0}),
    (BackboneConfig, "model.backbone.neck", {"neck": -1}),
    (BackboneConfig, "model.backbone.drop-path", {"drop_path": 1.0}),
    (BackboneConfig, "model.backbone.drop-path", {"drop_path": -0.1}),
    (
        BackboneConfig,
        "model.backbone.patch",
        {"architecture": "resnet50", "patch": 8, "feature": "tokens"},
    ),
    (BackboneConfig, "model.backbone.feature", {"architecture": "resnet50", "feature": "keys"}),
    (ModelConfig, "model.slots", {"slots": 0}),
    (ModelConfig, "model.instances", {"instances": 0}),
    (ModelConfig, "model.instances", {"instances": 9}),
    (ModelConfig, "model.iterations", {"iterations": 0}),
    (ModelConfig, "model.resolution", {"resolution": (250, 256)}),
    (ModelConfig, "model.resolution", {"resolution": (256, 250)}),
    (ModelConfig, "model.resolution", {"resolution": (0, 256)}),
    (ObjectiveConfig, "objective.epsilon", {"epsilon": 0.0}),
    (ObjectiveConfig, "objective.iterations", {"iterations": 0}),
    (ObjectiveConfig, "objective.teacher-sharpening", {"teacher_sharpening": 0.0}),
    (ObjectiveConfig, "objective.instance-from-step", {"instance_from_step": -1}),
    (WarmStartConfig, "warm-start.shift", {"shift": -1}),
    (AugmentConfig, "data.augment.flip", {"flip": 1.5}),
    (AugmentConfig, "data.augment.grayscale", {"grayscale": -0.5}),
    (AugmentConfig, "data.augment.jitter-chance", {"jitter_chance": 2.0}),
    (AugmentConfig, "data.augment.blur", {"blur": float("nan")}),
    (AugmentConfig, "data.augment.crop", {"crop": (0.0, 1.0)}),
    (AugmentConfig, "data.augment.crop", {"crop": (0.8, 0.5)}),
    (AugmentConfig, "data.augment.crop", {"crop": (0.5, 1.5)}),
    (AugmentConfig, "data.augment.blur-kernel", {"blur_kernel": 24}),
    (AugmentConfig, "data.augment.blur-kernel", {"blur_kernel": -1}),
    (DataConfig, "data.frames", {"frames": 1}),
    (DataConfig, "data.gap", {"gap": 0}),
    (DataConfig, "data.workers", {"workers": -1}),
    (DataConfig, "data.max-bad-share", {"max_bad_share": 1.1}),
    (OptimConfig, "optim.lr", {"lr": 0.0}),
    (OptimConfig, "optim.warmup-steps", {"warmup_steps": -1}),
    (OptimConfig, "optim.encoder-from-step", {"encoder_from_step": -2}),
    (OptimConfig, "optim.clip-norm", {"clip_norm": 0.0}),
    (OptimConfig, "optim.betas", {"betas": (1.5, 0.9)}),
    (OptimConfig, "optim.eps", {"eps": -1e-8}),
    (OptimConfig, "optim.weight-decay", {"weight_decay": -0.1}),
    (OptimConfig, "optim.encoder-lr", {"encoder_lr": -1.0}),
    (TeacherConfig, "teacher.momentum", {"momentum": 1.01}),
    (TrainConfig, "train.steps", {"steps": -1}),
    (TrainConfig, "train.batch", {"batch": 0}),
    (TrainConfig, "train.seed", {"seed": -1}),
    (TrainConfig, "train.log-every", {"log_every": 0}),
    (TrainConfig, "train.checkpoint-every", {"checkpoint_every": 0}),
    (TrainConfig, "train.threads", {"threads": 0}),
]


@pytest.mark.parametrize(("kind", "name", "values"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_name(kind: type, name: str, values: dict) -> None:
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        kind(**values)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")


def test_the_limits_themselves_are_allowed() -> None:
    BackboneConfig(patch=1, neck=0, drop_path=0.0)
    ModelConfig(slots=1, instances=8, iterations=1, resolution=(16, 16))
    ModelConfig(instances=1)
    AugmentConfig(crop=(1.0, 1.0), flip=1.0, blur_kernel=1)
    DataConfig(frames=2, gap=1, workers=0, max_bad_share=1.0)
    OptimConfig(warmup_steps=0, encoder_from_step=-1, clip_norm=None)
    TeacherConfig(momentum=0.0)
    TrainConfig(steps=0, batch=1, log_every=1, checkpoint_every=1, threads=1)


def test_a_resolution_that_the_patch_does_not_divide_names_the_next_below() -> None:
    with pytest.raises(UserError, match=r"100x96.*patch.*\(8\).*96"):
        ModelConfig(backbone=BackboneConfig(patch=8), resolution=(100, 96))


def test_grid_counts_rows_then_columns() -> None:
    assert ModelConfig(resolution=(64, 128)).grid == (4, 8)


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_a_config_survives_json(preset: str) -> None:
    config = presets.get(preset)
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_what_was_changed_survives_json() -> None:
    config = Config(
        model=ModelConfig(resolution=(32, 64), backbone=BackboneConfig(weights="dino.pth")),
        data=DataConfig(augment=AugmentConfig(crop=(0.25, 0.75))),
        optim=OptimConfig(clip_norm=2.0, betas=(0.5, 0.75)),
        train=TrainConfig(threads=3),
        output="runs/x",
    )
    restored = from_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert restored == config
    assert restored.model.resolution == (32, 64) and isinstance(restored.model.resolution, tuple)


def test_left_out_settings_take_their_defaults() -> None:
    made = from_dict(Config, {"train": {"steps": 7}})
    assert made == dataclasses.replace(Config(), train=TrainConfig(steps=7))


def test_a_whole_number_serves_as_a_float() -> None:
    lr = from_dict(OptimConfig, {"lr": 1}).lr
    assert lr == 1.0 and isinstance(lr, float)


MISTYPED = [
    ({"modle": {}}, "modle"),
    ({"model": {"slot": 3}}, "model.'slot'"),
    ({"model": {"backbone": {"patches": 3}}}, "model.backbone.'patches'"),
    ({"model": 3}, "model"),
    ({"model": {"slots": "many"}}, "model.slots"),
    ({"model": {"slots": 2.5}}, "model.slots"),
    ({"model": {"slots": True}}, "model.slots"),
    ({"model": {"update": "lstm"}}, "model.update"),
    ({"model": {"resolution": [64]}}, "model.resolution"),
    ({"model": {"resolution": [64, "x"]}}, "model.resolution"),
    ({"model": {"resolution": 64}}, "model.resolution"),
    ({"model": {"backbone": {"weights": 3}}}, "model.backbone.weights"),
    ({"data": {"augment": {"crop": [0.5]}}}, "data.augment.crop"),
    ({"data": {"random_gap": 1}}, "data.random_gap"),
    ({"optim": {"lr": "fast"}}, "optim.lr"),
    ({"optim": {"lr": True}}, "optim.lr"),
    ({"optim": {"clip_norm": "none"}}, "optim.clip_norm"),
    ({"optim": {"lr": None}}, "optim.lr"),
]


@pytest.mark.parametrize(("values", "name"), MISTYPED)
def test_a_wrong_key_or_type_is_refused_by_name(values: dict, name: str) -> None:
    with pytest.raises(UserError, match=re.escape(name)):
        from_dict(Config, values)


def test_an_unknown_setting_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"known there: .*momentum.*scope"):
        from_dict(TeacherConfig, {"momentun": 0.5})


def test_impossible_values_in_a_file_are_refused_too() -> None:
    with pytest.raises(UserError, match=r"model\.slots"):
        from_dict(Config, {"model": {"slots": 0}})
    with pytest.raises(UserError, match="Config"):
        from_dict(Config, [])


def test_settings_are_overridden_by_their_dotted_names() -> None:
    config = presets.tiny().override(
        {
            "train.steps": 7,
            "model.backbone.drop_path": 0,
            "output": "a",
            "model.resolution": [64, 32],
        }
    )
    assert (config.train.steps, config.output, config.model.resolution) == (7, "a", (64, 32))
    assert config.model.backbone.drop_path == 0.0
    assert config.optim == presets.tiny().optim and presets.tiny().train.steps != 7


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train.step": 7}, "no setting 'train.step'; did you mean 'train.steps'"),
        ({"train": 7}, "no setting 'train'"),
        ({"train.steps.more": 7}, "no setting 'train.steps.more'"),
        ({"xyzzy": 7}, "no setting 'xyzzy'; see smtc train --help"),
        ({"train.steps": -7}, "train.steps is -7"),
        ({"train.steps": "7"}, "train.steps is '7'; it should be a whole number"),
    ],
)
def test_impossible_overrides_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        presets.tiny().override(settings)
