"""The model from frames to slots: shapes, draws, resolutions, precision, gradients."""

import dataclasses

import pytest
import torch
from torch import Tensor

from smtc import presets
from smtc.config import BackboneConfig, Config, ModelConfig
from smtc.errors import UserError
from smtc.method import SMTCMethod
from smtc.model import SMTC, Output

SLOTS, INSTANCES, WIDTH = 5, 2, 64
SIDE = 32
PATCH = 8


def small(preset: str = "fixed", **changes: object) -> ModelConfig:
    """The preset's switches on the tiny encoder, 4×4 tokens."""
    backbone = BackboneConfig(architecture="vit_tiny", patch=PATCH, drop_path=0.1)
    sizes = {
        "backbone": backbone,
        "resolution": (SIDE, SIDE),
        "slots": SLOTS,
        "instances": INSTANCES,
    }
    return dataclasses.replace(presets.get(preset).model, **(sizes | changes))


def build(config: ModelConfig | None = None) -> SMTC:
    torch.manual_seed(0)
    return SMTC(config or small())


def clips(count: int = 2, frames: int = 3, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    return torch.randn(count, frames, 3, *size, generator=torch.Generator().manual_seed(1))


def tensors(out: Output) -> dict[str, Tensor]:
    return {name: value for name, value in out._asdict().items() if name != "grid"}


def check_close(got: Output, expected: Output, **tolerance: float) -> None:
    for name, value in tensors(expected).items():
        torch.testing.assert_close(
            getattr(got, name), value, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@pytest.mark.parametrize("preset", ["paper", "official_v2", "fixed"])
@pytest.mark.parametrize("training", [True, False])
def test_shapes(preset: str, training: bool) -> None:
    model = build(small(preset)).train(training)
    assert model.width == WIDTH
    out = model(clips(2, 3))
    assert out.grid == (4, 4)
    assert {name: tuple(value.shape) for name, value in tensors(out).items()} == {
        "features": (2, 3, 16, WIDTH),
        "semantic_slots": (2, 3, SLOTS, WIDTH),
        "semantic_logits": (2, 3, SLOTS, 16),
        "instance_slots": (2, 3, SLOTS, INSTANCES, WIDTH),
        "instance_logits": (2, 3, SLOTS, INSTANCES, 16),
        "embeddings": (2, 3, SLOTS, INSTANCES, WIDTH),
    }
    assert all(value.dtype == torch.float32 for value in tensors(out).values())


def test_embeddings_are_raw_slots_or_of_unit_norm() -> None:
    raw = build(small("paper"))(clips())
    assert torch.equal(raw.embeddings, raw.instance_slots)
    norms = build(small("fixed"))(clips()).embeddings.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_encode_gives_the_features_of_forward() -> None:
    model = build().eval()
    features, grid = model.encode(clips())
    out = model(clips())
    assert torch.equal(features, out.features) and grid == out.grid


def test_evaluation_is_deterministic_and_each_clip_for_itself() -> None:
    model = build().eval()
    three = clips(3)
    together = model(three)
    check_close(model(three), together, rtol=0, atol=0)
    alone = model(three[2:])
    for name, value in tensors(together).items():
        torch.testing.assert_close(getattr(alone, name), value[2:], rtol=1e-4, atol=1e-5)


def test_evaluation_leaves_the_global_generator_alone() -> None:
    model = build().eval()
    state = torch.get_rng_state()
    model(clips())
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_correlates_with_the_previous_frame() -> None:
    for preset in ("fixed", "official_v2"):
        model = build(small(preset)).eval()
        previous = torch.tensor([[2, 0, 1]]).expand(2, -1)
        check_close(model(clips()), model(clips(), reference=previous), rtol=0, atol=0)


def test_training_draws_noise_and_reference_from_torchs_generator() -> None:
    model = build(small("fixed", backbone=BackboneConfig(architecture="vit_tiny", drop_path=0.0)))
    torch.manual_seed(3)
    first = model(clips(8))
    again = model(clips(8))
    assert not torch.equal(first.instance_slots, again.instance_slots)
    assert not torch.equal(first.semantic_logits, again.semantic_logits)
    torch.manual_seed(3)
    check_close(model(clips(8)), first, rtol=0, atol=0)


def test_a_random_reference_is_another_frame() -> None:
    model = build(
        small("fixed", backbone=BackboneConfig(architecture="vit_tiny", drop_path=0.0))
    ).train()
    clip = clips(16, 3)
    out = model(clip).semantic_logits
    matches = [
        (model(clip, reference=torch.full((16, 3), j)).semantic_logits - out).abs().amax((2, 3))
        < 1e-5
        for j in range(3)
    ]
    same = torch.stack(matches, dim=-1)  # [B,T,j]
    assert (same.sum(-1) == 1).all()
    chosen = same.int().argmax(-1)
    assert (chosen != torch.arange(3)).all()
    for t in range(3):
        assert len(chosen[:, t].unique()) == 2


def test_noise_and_reference_fix_the_draws() -> None:
    model = build(small("fixed", backbone=BackboneConfig(architecture="vit_tiny", drop_path=0.0)))
    noise = torch.randn(2, 3, SLOTS, INSTANCES, WIDTH)
    reference = torch.tensor([[1, 2, 0], [2, 0, 1]])
    check_close(model(clips(), noise, reference), model(clips(), noise, reference), rtol=0, atol=0)
    other = model(clips(), noise + 0.1, reference)
    assert not torch.allclose(
        other.instance_slots, model(clips(), noise, reference).instance_slots, atol=1e-3
    )


def test_a_frame_is_seen_by_itself_and_by_those_that_refer_to_it() -> None:
    model = build().eval()
    reference = torch.tensor([[1, 2, 0]])
    clip = clips(1)
    changed = clip.clone()
    changed[:, 2] += 1.0
    noise = torch.randn(1, 3, SLOTS, INSTANCES, WIDTH)
    before = model(clip, noise, reference).semantic_logits[0]
    after = model(changed, noise, reference).semantic_logits[0]
    moved = (before - after).abs().amax((1, 2))
    assert moved[0] < 1e-5 and moved[1] > 1e-3 and moved[2] > 1e-3


def test_a_clip_of_one_frame_refers_to_itself() -> None:
    for training in (False, True):
        model = build(
            small("fixed", backbone=BackboneConfig(architecture="vit_tiny", drop_path=0.0))
        ).train(training)
        clip = clips(2, 1)
        noise = torch.randn(2, 1, SLOTS, INSTANCES, WIDTH)
        itself = torch.zeros(2, 1, dtype=torch.int64)
        check_close(model(clip, noise), model(clip, noise, itself), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (40, 24), (16, 16)])
def test_other_resolutions(size: tuple[int, int]) -> None:
    model = build().eval()
    out = model(clips(1, 2, size))
    rows, columns = size[0] // PATCH, size[1] // PATCH
    assert out.grid == (rows, columns)
    assert out.semantic_logits.shape[-1] == out.features.shape[2] == rows * columns
    assert all(value.isfinite().all() for value in tensors(out).values())


def test_frames_that_the_patch_does_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="30x32"):
        build()(clips(size=(30, 32)))


def test_iterations_can_be_overridden() -> None:
    model = build(small(iterations=3)).eval()
    five = build(small(iterations=5)).eval()
    check_close(model(clips(), iterations=5), five(clips()), rtol=0, atol=0)
    assert not torch.allclose(model(clips()).semantic_slots, five(clips()).semantic_slots)


@pytest.mark.parametrize("preset", ["paper", "official_v2", "fixed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_trainable_parameter_gets_a_gradient(preset: str, precision: str) -> None:
    model = small(preset)
    config = Config(model=model, optim=presets.get("paper").optim)
    torch.manual_seed(0)
    method = SMTCMethod(config)
    trainable = method.trainable(0)
    # Without the cache: it would hand the last iteration the weights cast inside no_grad.
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        out = method.student(clips())
        total = sum((torch.randn_like(x) * x).float().sum() for x in tensors(out).values())
    total.backward()
    for name, parameter in method.student.named_parameters():
        if name in trainable:
            assert parameter.grad is not None and parameter.grad.any(), name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name
    assert len(trainable) > 20


def test_bf16_stays_close_and_returns_fp32_logits() -> None:
    model = build(small("official_v2")).eval()
    noise = torch.randn(2, 3, SLOTS, INSTANCES, WIDTH)
    expected = model(clips(), noise)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        got = model(clips(), noise)
    assert got.semantic_logits.dtype == got.instance_logits.dtype == torch.float32
    difference = (got.semantic_logits - expected.semantic_logits).norm()
    assert 0 < difference < 0.05 * expected.semantic_logits.norm()


def test_the_correlation_scale_acts_on_the_correlation_only() -> None:
    plain, scaled = build(small()).eval(), build(small(correlation_scale=0.25)).eval()
    noise = torch.randn(2, 3, SLOTS, INSTANCES, WIDTH)
    with torch.no_grad():
        plain.transport_proj.weight.mul_(0.25)
    check_close(scaled(clips(), noise), plain(clips(), noise), rtol=1e-5, atol=1e-5)


def test_parameter_names_of_the_optional_parts() -> None:
    names = {preset: set(build(small(preset)).state_dict()) for preset in ("paper", "fixed")}
    assert {"fusion.weight", "fusion.bias"} <= names["paper"]
    assert not any(name.startswith("mlp_slot") for name in names["paper"])
    assert not any(name.startswith("fusion") for name in names["fixed"])
    assert {"mlp_slot.0.weight", "mlp_slot.2.bias"} <= names["fixed"]


@pytest.mark.parametrize(
    ("draws", "said"),
    [
        ({"noise": torch.zeros(2, 3, SLOTS, 1, WIDTH)}, "noise: expected"),
        ({"reference": torch.zeros(2, 3)}, "reference: expected int64"),
        ({"reference": torch.full((2, 3), 3)}, "reference: expected frames 0 to 2"),
        ({"reference": torch.full((2, 3), -1)}, "reference: expected frames 0 to 2"),
        ({"iterations": 0}, "iterations: expected at least 1"),
    ],
)
def test_draws_that_do_not_fit_the_clip_are_refused(draws: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()(clips(), **draws)


def test_a_clip_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="clip: expected"):
        build()(clips()[0])
