"""VICReg against a NumPy version, its keyed draws, and what it hands to SMTC."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smtc.config import Config
from smtc.errors import UserError
from smtc.model import SMTC
from smtc.pipelines.batch import Batch
from smtc.pipelines.clips import Schedule
from smtc.pipelines.loading import build_loader
from smtc.training.trainer import train
from smtc.warm_start import WarmStart
from smtc.weights import load_init

TinyConfig = Callable[..., Config]

# Batch norm removes any shift of what it normalises, so these see rounding only.
WITHOUT_EFFECT = {
    "encoder.neck.fc1.bias",
    "encoder.blocks.2.attn.qkv.bias",
    "encoder.blocks.2.norm1.bias",
}


def make(tiny_config: TinyConfig, **settings: float) -> WarmStart:
    """A warm start with `warm_start.*` settings."""
    torch.manual_seed(0)
    dotted = {f"warm_start.{name}": value for name, value in settings.items()}
    return WarmStart(tiny_config(dotted, preset="tiny_encoder"))


def first_batch(config: Config) -> Batch:
    schedule = Schedule(batch=config.train.batch, steps=1)
    return next(iter(build_loader(config.data, schedule, size=config.model.resolution, seed=0)))


def coloured(batch: int, frames: int = 2) -> Batch:
    """Noise in place of clips."""
    views = torch.randn(batch, 2, frames, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    return Batch(views, [], torch.arange(batch))


class Given(nn.Module):
    """An encoder that hands out given embeddings `[frames, L, D]`."""

    def __init__(self, embeddings: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embeddings, self.shape = embeddings, grid
        self.frames = torch.empty(0)

    def forward(self, frames: Tensor, norm: nn.Module) -> Tensor:
        self.frames = frames
        return self.embeddings

    def grid(self, frames: Tensor) -> tuple[int, int]:
        return self.shape


def test_the_losses_are_those_of_vicreg(tiny_config: TinyConfig) -> None:
    method = make(tiny_config, shift=0, grayscale=0.0, covariance=1.0)
    embeddings = torch.randn(6, 20, 5) * 0.4 + 0.3
    method.encoder = Given(embeddings, (4, 5))  # type: ignore[assignment]
    losses = method.training_step(coloured(3), 0)

    pairs = embeddings.double().numpy().reshape(3, 2, 20, 5)
    means = pairs.mean(axis=(1, 2), keepdims=True)
    first, second = (pairs - means).swapaxes(0, 1)
    covariance, variance = 0.0, 0.0
    for view in (first, second):
        rows = view.reshape(60, 5)
        matrix = np.cov(rows, rowvar=False)
        covariance += sum(matrix[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5 / 2
        deviation = np.sqrt(np.diag(matrix) + 1e-4)
        variance += np.maximum(0, 1 - deviation).mean() / 2
    expected = {
        "invariance": ((first - second) ** 2).mean(),
        "variance": variance,
        "covariance": covariance,
        "centring": (means**2).mean(),
    }
    assert {name: float(losses[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
    total = 25 * expected["invariance"] + 25 * variance + covariance + 5 * expected["centring"]
    assert float(losses["loss"]) == pytest.approx(total, rel=1e-4)


def test_the_pair_is_the_first_and_the_last_frame_of_different_views(
    tiny_config: TinyConfig,
) -> None:
    method = make(tiny_config, grayscale=0.0)
    encoder = Given(torch.randn(6, 20, 5), (4, 5))
    method.encoder = encoder  # type: ignore[assignment]
    batch = coloured(3, frames=4)
    method.training_step(batch, 0)
    assert torch.equal(encoder.frames[0::2], batch.views[:, 0, 0])
    assert torch.equal(encoder.frames[1::2], batch.views[:, 1, 3])


def test_all_trained_parameters_get_gradients(tiny_config: TinyConfig) -> None:
    method = make(tiny_config)
    method.requires_grad_(False)
    trainable = method.trainable(0)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    losses = method.train().training_step(first_batch(method.config), 0)
    losses["loss"].backward()
    for name, parameter in trainable.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert name in WITHOUT_EFFECT or parameter.grad.abs().max() > 1e-6, name


def test_all_but_the_encoders_unused_tensors_is_trained(tiny_config: TinyConfig) -> None:
    method = make(tiny_config)
    left = {name for name, _ in method.named_parameters()} - method.trainable(0).keys()
    assert left == {f"encoder.{name}" for name in method.encoder.unused_parameters()}
    assert left and {"norm.weight", "encoder.neck.fc2.bias"} <= method.trainable(0).keys()


def test_the_loss_falls(tiny_config: TinyConfig) -> None:
    method = make(tiny_config)
    batch = first_batch(method.config)
    optimizer = torch.optim.Adam(method.trainable(0).values(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = method.training_step(batch, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_is_the_same_whatever_was_drawn_before(tiny_config: TinyConfig) -> None:
    method = make(tiny_config)
    batch = coloured(4)
    first = method.training_step(batch, 5)
    torch.manual_seed(77)
    again = method.training_step(batch, 5)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_grey_goes_by_step(tiny_config: TinyConfig) -> None:
    method = make(tiny_config, grayscale=0.8)
    frames = coloured(2).views.flatten(0, 2)
    kinds = []
    for step in range(300):
        seen = method._grey(frames, step)
        assert torch.equal(seen, method._grey(frames, step))
        grey = torch.equal(seen[:, 0], seen[:, 2])
        assert grey or torch.equal(seen, frames)
        kinds.append(grey)
    assert 0.72 < sum(kinds) / 300 < 0.88
    luma = 0.299 * frames[:, 0] + 0.587 * frames[:, 1] + 0.114 * frames[:, 2]
    torch.testing.assert_close(method._grey(frames, kinds.index(True))[:, 1], luma)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_grey_never_and_always(tiny_config: TinyConfig, chance: float) -> None:
    method = make(tiny_config, grayscale=chance)
    frames = coloured(1).views.flatten(0, 2)
    changed = [not torch.equal(method._grey(frames, step), frames) for step in range(30)]
    assert changed == [bool(chance)] * 30


def test_the_shift_goes_by_sample_and_stays_near(tiny_config: TinyConfig) -> None:
    method = make(tiny_config, shift=1)
    index = torch.arange(200) * 7
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).flatten(0, 1).expand(200, 20, 2)
    kept, moved = method._pair_up(places, places, index, (4, 5))
    assert torch.equal(kept, places)

    shift = (moved - places).view(200, 4, 5, 2)[:, 1:3, 1:4]  # where no border is near
    offsets = shift[:, 0, 0]
    assert torch.equal(shift, offsets[:, None, None].expand_as(shift))
    assert {tuple(offset) for offset in offsets.tolist()} == {
        (dy, dx) for dy in (-1.0, 0.0, 1.0) for dx in (-1.0, 0.0, 1.0)
    }
    limits = torch.tensor([3.0, 4.0])
    clamped = (places + offsets[:, None]).clamp(min=torch.zeros(2), max=limits)
    assert torch.equal(moved, clamped)

    backwards = torch.arange(199, -1, -1)
    _, again = method._pair_up(places, places, index[backwards], (4, 5))
    assert torch.equal(again, moved[backwards])


def test_smtc_starts_with_the_features_that_were_trained(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    warm = train(tiny_config({"output": str(tmp_path / "warm")}, preset="tiny_encoder"))
    method = warm.method
    assert isinstance(method, WarmStart)
    assert float(method.norm.running_mean.abs().sum()) > 0  # type: ignore[union-attr]
    clip = coloured(2).views[:, 0]
    with torch.no_grad():
        method.eval()
        expected = method.encoder.neck(method.encoder.features(clip.flatten(0, 1)), method.norm)
        model = SMTC(tiny_config().model).eval()
        before, _ = model.encode(clip)
        load_init(model, warm.folder)
        features, grid = model.encode(clip)
    assert grid == (4, 4)
    torch.testing.assert_close(features.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, features, atol=0.1)

    settings = {"output": str(tmp_path / "smtc"), "init": str(warm.folder), "train.steps": 1}
    smtc = train(tiny_config(settings)).method.student.encoder.state_dict()  # type: ignore[union-attr]
    torch.testing.assert_close(smtc, model.encoder.state_dict(), rtol=0, atol=0)


def test_saving_leaves_the_method_as_it_was(tiny_config: TinyConfig, tmp_path: Path) -> None:
    method = make(tiny_config)
    method.train().training_step(coloured(2), 0)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.save_model(tmp_path / "model")
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
    assert method.training


def test_without_a_neck_there_is_nothing_to_fold(tiny_config: TinyConfig) -> None:
    with pytest.raises(UserError, match=r"set model\.backbone\.neck"):
        WarmStart(tiny_config({"model.backbone.neck": 0}, preset="tiny_encoder"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init": "runs/other"}, "random weights"),
        ({"model.backbone.weights": "dino.pth"}, "random weights"),
        ({"data.spatial": "independent"}, "data.spatial"),
        ({"optim.encoder_from_step": 5}, "encoder-from-step"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    tiny_config: TinyConfig, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        WarmStart(tiny_config(settings, preset="tiny_encoder"))
