"""What a method says it trains gets a gradient in every step, and nothing else does.

Many processes can wait for exactly these gradients only because of that.
"""

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from commands import changed
from torch import nn

from smtc import presets
from smtc.config import Config
from smtc.method import Method, SMTCMethod
from smtc.pipelines.batch import Batch
from smtc.training.trainer import build_method

SMTC_PRESETS = [name for name in presets.PRESETS if presets.get(name).method == "smtc"]
LATER = 5  # the step at which the instance loss or the encoder joins
FRAMES, SIDE = 3, 32


def small(preset: str, **settings: Any) -> Config:
    """A preset with the smallest encoder; `model__slots=2` for model.slots = 2."""
    config = presets.get(preset)
    least = {"model.backbone.architecture": "vit_tiny", "model.backbone.patch": 8}
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    return changed(config, least | {"model.resolution": (SIDE, SIDE), "model.slots": 3} | dotted)


def batch_of(config: Config) -> Batch:
    drawn = torch.Generator().manual_seed(0)
    views = torch.randn(2, 2, FRAMES, 3, SIDE, SIDE, generator=drawn)
    return Batch(views, [], torch.tensor([4, 9]))


def reached(method: Method, batch: Batch, step: int) -> set[str]:
    """The parameters that a training step gives a gradient to."""
    for parameter in method.parameters():
        parameter.grad = None
    method.train().training_step(batch, step)["loss"].backward()
    return {n for n, p in _learnable(method).items() if p.grad is not None}


def _learnable(method: Method) -> dict[str, nn.Parameter]:
    """By the names that `trainable` uses."""
    inner = method.student if isinstance(method, SMTCMethod) else method
    return dict(inner.named_parameters())


def assert_exact(config: Config, step: int, *, frozen: bool = False) -> None:
    """Whatever is not said to be trained would not get a gradient even if it asked for one, but for
    the frozen encoder.
    """
    method = build_method(config)
    said = method.trainable(step)
    for name, parameter in _learnable(method).items():
        parameter.requires_grad_(name in said or not (frozen and name.startswith("encoder.")))
    assert reached(method, batch_of(config), step) == set(said)
    assert any(name.startswith("encoder.") for name in said) != frozen


@pytest.mark.parametrize("gradient", ["full", "straight_through"])
@pytest.mark.parametrize("preset", SMTC_PRESETS)
def test_exactly_what_is_trained_gets_a_gradient(preset: str, gradient: str) -> None:
    for instances, encoder in product((0, LATER), (0, LATER, -1)):
        config = small(
            preset,
            model__gradient=gradient,
            objective__instance_from_step=instances,
            optim__encoder_from_step=encoder,
        )
        for step in (LATER - 1, LATER):
            assert_exact(config, step, frozen=encoder < 0 or step < encoder)


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 1},
        {"iterations": 1, "gradient": "full"},
        {"iterations": 2, "gradient": "full"},
        {"update": "gru"},
        {"update": "gru", "gradient": "full"},
        {"sampling": "detached"},
        {"sampling": "detached", "gradient": "full"},
        {"embedding": "raw"},
        {"fusion_head": "linear"},
        {"backbone.feature": "tokens"},
        {"backbone.position_embedding": "none"},
        {"backbone.neck": 8},
        {"instances": 1},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_other_models_too(settings: dict[str, Any]) -> None:
    named = {"model." + name: value for name, value in settings.items()}
    config = small("fixed", objective__instance_from_step=LATER, optim__encoder_from_step=0)
    for step in (0, LATER):
        assert_exact(changed(config, named), step)


def test_a_projected_resnet() -> None:
    resnet = {"architecture": "resnet50", "patch": 16, "feature": "tokens"}
    config = small("fixed", optim__encoder_from_step=0)
    backbone = dataclasses.replace(config.model.backbone, **resnet)
    assert_exact(changed(config, {"model.backbone": backbone}), 0)


def test_no_valid_instance_is_no_lack_of_gradients() -> None:
    """Nor are all of them valid, or a semantic without a place."""
    for similarity, area in ((2.0, 1.0), (-1.0, 0.0)):
        for preset in ("paper", "official_v2", "fixed"):
            config = small(preset, objective__similarity=similarity, objective__area=area)
            assert_exact(changed(config, {"optim.encoder_from_step": 0}), 0)


def test_a_frozen_encoder_may_get_gradients_by_request() -> None:
    config = small("official_v2", optim__encoder_from_step=LATER, optim__frozen_backward=True)
    assert_exact(config, 0)


def test_the_warm_start() -> None:
    for shift in (0, 1):
        config = small("tiny_encoder", warm_start__shift=shift)
        assert_exact(config, 0)
        assert_exact(config, 99)


def test_the_teacher_never_gets_one() -> None:
    method = build_method(small("fixed"))
    assert isinstance(method, SMTCMethod)
    reached(method, batch_of(method.config), 0)
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
