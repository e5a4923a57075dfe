"""The model against its written-out form: values and the gradient of every parameter."""

import dataclasses
import statistics
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from smtc import presets
from smtc.config import BackboneConfig, ModelConfig
from smtc.model import SMTC, Output

from . import smtc_by_loops as loops

CLIPS, FRAMES, SLOTS, INSTANCES = 2, 3, 3, 2
TRAINED = (48, 64)
PATCH = 16
MU = "slot_attention.slots_mu"
HEADS = 2
SWITCHES = (
    "iterations",
    "fusion_head",
    "update",
    "gradient",
    "semantic_mask",
    "sampling",
    "embedding",
    "correlation_scale",
)
COMPARED = [name for name in Output._fields if name != "grid"]
EXACT = [name for name in COMPARED if name != "embeddings"]


def small(preset: str, **changes: object) -> ModelConfig:
    """The preset's switches on a tiny encoder and few slots."""
    made = presets.get(preset).model
    backbone = BackboneConfig(
        architecture="vit_tiny", patch=PATCH, feature=made.backbone.feature, drop_path=0.0
    )
    sizes = {"resolution": TRAINED, "slots": SLOTS, "instances": INSTANCES, "backbone": backbone}
    return dataclasses.replace(made, **(sizes | changes))


def build(config: ModelConfig, dtype: torch.dtype = torch.float64) -> SMTC:
    """A model whose weights are all of a size that matters, in training mode."""
    torch.manual_seed(0)
    model = SMTC(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("slots_sigma", "bias", "pos_embed", "cls_token")):
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.2 * draw.to(dtype))
    return model.train()


def inputs(size: tuple[int, int] = TRAINED, random_reference: bool = False) -> tuple:
    """Clip, noise and reference frames, drawn in float32 and promoted."""
    generator = torch.Generator().manual_seed(2)
    clip = torch.randn(CLIPS, FRAMES, 3, *size, generator=generator).double()
    noise = torch.randn(CLIPS, FRAMES, SLOTS, INSTANCES, 64, generator=generator).double()
    reference = torch.tensor([[2, 0, 1], [1, 2, 0]]) if random_reference else None
    return clip, noise, reference


def by_loops(
    config: ModelConfig,
    weights: loops.Weights,
    clip: Tensor,
    noise: Tensor,
    reference: Tensor | None,
) -> dict[str, Tensor]:
    """The written-out model on a clip, frame by frame."""
    backbone = config.backbone
    prefix = "encoder."
    encoder = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    frames = [
        loops.vit_features(
            frame,
            encoder,
            heads=HEADS,
            patch=PATCH,
            pretrained_grid=224 // PATCH,
            feature=backbone.feature,
        )
        for frame in clip.flatten(0, 1)
    ]
    features = torch.stack(frames).unflatten(0, clip.shape[:2])
    out = loops.forward(
        features,
        weights,
        grid=(clip.shape[-2] // PATCH, clip.shape[-1] // PATCH),
        training_grid=config.grid,
        noise=noise,
        reference=reference,
        **{name: getattr(config, name) for name in SWITCHES},
    )
    return {"features": features, **out}


def weights_of(model: SMTC) -> loops.Weights:
    """Float64 leaves with the model's values."""
    return {
        name: value.detach().double().clone().requires_grad_()
        for name, value in model.named_parameters()
    }


def error(got: Tensor, expected: Tensor) -> float:
    """Greatest difference as a share of the greatest expected value."""
    assert got.shape == expected.shape
    expected = expected.detach()
    return float((got.detach().double() - expected).abs().max() / expected.abs().max())


def gradient_errors(
    ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]
) -> dict[str, float]:
    """`error` of every gradient that the written-out form has; the others must be none or zero.

    Where a gradient vanishes by symmetry (the query's bias shifts the logits of all slots alike),
    the error is taken as a share of the other gradients.
    """
    has_gradient = {name: g for name, g in theirs.items() if g is not None and g.any()}
    sizes = {name: float(g.abs().max()) for name, g in has_gradient.items()}
    floor = 1e-3 * statistics.median(sizes.values())
    errors = {}
    for name, gradient in ours.items():
        if name in has_gradient:
            assert gradient is not None, name
            difference = (gradient.double() - has_gradient[name]).abs().max()
            errors[name] = float(difference) / max(sizes[name], floor)
        else:
            assert gradient is None or not gradient.any(), name
    return errors


def projection(out: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """A scalar to which each of the outputs `names` contributes about equally."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        value = out[name].double()
        weight = torch.randn(value.shape, generator=generator).double() / value.detach().std()
        total = total + (weight * value).mean()
    return total


def projected_gradients(
    out: dict[str, Tensor], leaves: dict[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor | None]:
    """Of a random projection of the outputs `names`."""
    gradients = torch.autograd.grad(
        projection(out, names), list(leaves.values()), retain_graph=True, allow_unused=True
    )
    return dict(zip(leaves, gradients, strict=True))


CASES = {
    "official_v2": ("official_v2", {}),
    "official_v2, 5 iterations": ("official_v2", {"iterations": 5}),
    "official_strict": ("official_strict", {}),
    "paper": ("paper", {}),
    "fixed": ("fixed", {}),
    "fixed, full gradient": ("fixed", {"gradient": "full"}),
    "fixed, one iteration": ("fixed", {"iterations": 1}),
    "paper, straight through, detached": (
        "paper",
        {"gradient": "straight_through", "sampling": "detached"},
    ),
    "fixed, scaled correlation": ("fixed", {"correlation_scale": 0.02}),
    "fixed, tokens": (
        "fixed",
        {
            "backbone": BackboneConfig(
                architecture="vit_tiny", patch=PATCH, feature="tokens", drop_path=0.0
            )
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_every_gradient_in_double(case: str) -> None:
    preset, changes = CASES[case]
    config = small(preset, **changes)
    model = build(config)
    weights = weights_of(model)
    clip, noise, reference = inputs(random_reference=config.reference == "random")

    expected = by_loops(config, weights, clip, noise, reference)
    got = model(clip, noise, reference)._asdict()
    for name in EXACT:
        assert error(got[name], expected[name]) < 1e-9, name
    # Normalised embeddings are rounded to float32.
    assert error(got["embeddings"], expected["embeddings"]) < 2e-7

    parameters = dict(model.named_parameters())
    errors = {}
    for names, tolerance in ((EXACT, 1e-9), (["embeddings"], 1e-5)):
        found = gradient_errors(
            projected_gradients(got, parameters, names),
            projected_gradients(expected, weights, names),
        )
        assert max(found.values()) < tolerance, found
        errors |= found
    assert set(errors) == expected_to_learn(model)


def expected_to_learn(model: SMTC) -> set[str]:
    """Every parameter but those of the encoder that its feature leaves out, and log sigma where
    sampling is detached.
    """
    config = model.config
    left_out = ["encoder.norm."]
    if config.backbone.feature == "keys":
        left_out += [f"encoder.blocks.2.{part}." for part in ("attn.proj", "norm2", "mlp")]
    if config.sampling == "detached":
        left_out.append("slot_attention.slots_sigma")
    return {name for name, _ in model.named_parameters() if not name.startswith(tuple(left_out))}


@pytest.mark.parametrize("preset", ["official_v2", "paper"])
def test_values_at_another_resolution(preset: str) -> None:
    config = small(preset)
    model = build(config)
    clip, noise, reference = inputs((64, 48), random_reference=config.reference == "random")

    expected = by_loops(config, weights_of(model), clip, noise, reference)
    with torch.no_grad():
        got = model(clip, noise, reference)
    assert got.grid == (4, 3)
    for name in EXACT:
        assert error(getattr(got, name), expected[name]) < 1e-9, name
    assert error(got.embeddings, expected["embeddings"]) < 2e-7


@pytest.mark.parametrize("preset", ["official_v2", "paper", "fixed"])
def test_float32_rounds_and_nothing_more(preset: str) -> None:
    config = small(preset)
    model = build(config, torch.float32)
    weights = weights_of(model)
    clip, noise, reference = inputs(random_reference=config.reference == "random")

    expected = by_loops(config, weights, clip, noise, reference)
    distance = {
        "softmax>0.5": expected["semantic_logits"].softmax(2) - 0.5,
        "logits>0.3": expected["semantic_logits"] - 0.3,
    }[config.semantic_mask]
    assert float(distance.detach().abs().min()) > 1e-5, "a mask of these inputs hangs on rounding"
    got = model(clip.float(), noise.float(), reference)._asdict()
    for name in COMPARED:
        assert error(got[name], expected[name]) < 2e-6, name

    errors = gradient_errors(
        projected_gradients(got, dict(model.named_parameters()), COMPARED),
        projected_gradients(expected, weights, COMPARED),
    )
    assert max(errors.values()) < 2e-5, errors


OTHERWISE = {
    "fusion_head": ("paper", "identity"),
    "gradient": ("official_v2", "full"),
    "semantic_mask": ("official_v2", "softmax>0.5"),
    "sampling": ("fixed", "detached"),
    "correlation_scale": ("official_v2", 0.5),
    "iterations": ("official_v2", 2),
    "update": ("paper", "residual"),
    "embedding": ("official_v2", "raw"),
}


@pytest.mark.parametrize("switch", OTHERWISE)
def test_a_switch_in_the_wrong_position_shows(switch: str) -> None:
    preset, value = OTHERWISE[switch]
    config = small(preset)
    model = build(config)
    weights = weights_of(model)
    clip, noise, reference = inputs(random_reference=config.reference == "random")

    wrong = by_loops(
        dataclasses.replace(config, **{switch: value}), weights, clip, noise, reference
    )
    got = model(clip, noise, reference)._asdict()
    values = max(error(got[name], wrong[name]) for name in COMPARED)
    if switch in ("gradient", "sampling"):
        assert values < 1e-6
        errors = gradient_errors(
            projected_gradients(got, {MU: model.get_parameter(MU)}, COMPARED),
            projected_gradients(wrong, {MU: weights[MU]}, COMPARED),
        )
        assert errors[MU] > 0.05
    else:
        assert values > 0.05


def test_a_wrong_reference_frame_shows() -> None:
    config = small("official_v2")
    model = build(config)
    clip, noise, _ = inputs()
    following = torch.tensor([[1, 2, 0], [1, 2, 0]])
    wrong = by_loops(config, weights_of(model), clip, noise, following)
    got = model(clip, noise)
    assert error(got.semantic_logits, wrong["semantic_logits"]) > 0.05
