"""The presets hold the values of the table below, and every one can be built."""

from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import torch

from smtc import presets
from smtc.config import AugmentConfig, Config, ModelConfig
from smtc.errors import UserError
from smtc.model import SMTC
from smtc.slots import SlotAttention

NAMES = ("paper", "official_v2", "official_strict", "fixed")
OFFICIAL_AUGMENTATION = AugmentConfig(
    grayscale=0.2,
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_chance=0.8,
    blur=0.5,
    blur_kernel=25,
    blur_sigma=(0.1, 2.0),
)

# A row of the table: setting → its value in the four presets, in the order of NAMES.
TABLE: dict[str, tuple[Any, Any, Any, Any]] = {
    "train.batch": (128, 32, 64, 32),
    "optim.lr": (2e-4, 2e-5, 1e-4, 2e-5),
    "train.steps": (100_000, 10_000, 10_000, 10_000),
    "optim.encoder_lr": (1.0, 0.01, 0.01, 0.01),
    "optim.encoder_from_step": (0, 3000, 0, 3000),
    "optim.frozen_backward": (False,) * 4,
    "model.backbone.architecture": ("vit_small",) * 4,
    "model.backbone.patch": (16,) * 4,
    "model.backbone.feature": ("keys",) * 4,
    "model.reference": ("random", "previous", "previous", "random"),
    "model.fusion_head": ("linear", "identity", "identity", "identity"),
    "model.update": ("gru", "residual", "residual", "residual"),
    "model.gradient": ("full", "straight_through", "straight_through", "straight_through"),
    "model.semantic_mask": ("softmax>0.5", "logits>0.3", "logits>0.3", "softmax>0.5"),
    "model.sampling": ("reparameterised", "detached", "detached", "reparameterised"),
    "model.embedding": ("raw", "mlp", "mlp", "mlp"),
    "objective.mask_threshold": (0.5, 0.3, 0.3, 0.3),
    "objective.area": (0.2,) * 4,
    "objective.similarity": (0.5,) * 4,
    "objective.marginals": ("uniform", "l1", "l1", "uniform"),
    "objective.cost": ("cosine",) * 4,
    "objective.reduction": ("sum", "mean", "mean", "mean"),
    "objective.form": ("l2_margin", "cosine", "cosine", "cosine"),
    "objective.margin": (0.5,) * 4,
    "teacher.scope": ("all", "head", "head", "all"),
    "optim.schedule": ("cosine", "cosine", "cosine", "warmup_cosine"),
    "optim.final_lr": (0.1,) * 4,
    "optim.decay_embeddings": (True, True, True, False),
}

# What the text of the spec fixes for all four, the switches of `tiny` at their neutral values.
COMMON = {
    "method": "smtc",
    "model.resolution": (256, 256),
    "model.slots": 16,
    "model.instances": 4,
    "model.iterations": 3,
    "model.correlation_scale": 1.0,
    "model.correlation_gain": 1.0,
    "model.backbone.position_embedding": "learned",
    "model.backbone.position_resize": "scale_factor",
    "model.backbone.drop_path": 0.1,
    "model.backbone.neck": 0,
    "objective.epsilon": 0.05,
    "objective.iterations": 3,
    "objective.alignment_weight": 1.0,
    "objective.regularisation_weight": 1.0,
    "objective.instance_weight": 1.0,
    "objective.instance_from_step": 0,
    "objective.teacher_sharpening": 1.0,
    "data.frames": 4,
    "data.gap": 4,
    "data.resize": "squash",
    "data.spatial": "shared",
    "optim.betas": (0.9, 0.999),
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.1,
    "optim.clip_norm": None,
    "teacher.momentum": 0.999,
}


@pytest.mark.parametrize("setting", TABLE)
def test_the_table(setting: str) -> None:
    assert tuple(attrgetter(setting)(presets.get(name)) for name in NAMES) == TABLE[setting]


@pytest.mark.parametrize("setting", COMMON)
def test_what_all_four_share(setting: str) -> None:
    assert {attrgetter(setting)(presets.get(name)) for name in NAMES} == {COMMON[setting]}


def test_the_rows_that_concern_some_presets_only() -> None:
    for name in ("official_v2", "official_strict"):
        assert presets.get(name).objective.normaliser == "batch"
        assert presets.get(name).data.augment == OFFICIAL_AUGMENTATION
    assert presets.fixed().objective.normaliser == "clip"
    assert presets.fixed().optim.warmup_steps == 500
    for name, parts in {
        "paper": {"crop", "flip", "jitter_chance"},
        "fixed": {"crop", "flip", "jitter_chance", "grayscale", "blur"},
    }.items():
        augment = presets.get(name).data.augment
        chances = ("crop", "flip", "jitter_chance", "grayscale", "blur")
        assert {part for part in chances if getattr(augment, part)} == parts


def test_tiny_follows_its_recipe() -> None:
    tiny, encoder = presets.tiny(), presets.tiny_encoder()
    assert encoder.method == "warm_start" and tiny.method == "smtc"
    assert tiny.model == encoder.model
    assert tiny.model.backbone.architecture == "vit_tiny"
    assert tiny.model.backbone.position_embedding == "none"
    assert tiny.model.grid == (12, 12)
    assert (tiny.model.slots, tiny.model.instances) == (8, 4)
    assert tiny.objective.teacher_sharpening == 2.0
    assert tiny.optim.encoder_from_step == -1


def test_every_name_gives_its_preset() -> None:
    assert set(presets.PRESETS) == {*NAMES, "tiny", "tiny_encoder"}
    for name, make in presets.PRESETS.items():
        assert isinstance(presets.get(name), Config)
        assert presets.get(name) == make()


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'oficial_v2'.*'official_v2'"):
        presets.get("oficial_v2")
    with pytest.raises(UserError, match=r"choose from paper, .*tiny"):
        presets.get("zzz")


def test_official_v2_has_the_tensors_of_the_released_checkpoint() -> None:
    with torch.device("meta"):
        state = SMTC(presets.official_v2().model).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert len(shapes) == 174
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 23_109_120
    assert shapes == released_shapes()


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Spec section 4, written out."""
    d = 384
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (d,)

    shapes["encoder.cls_token"] = (1, 1, d)
    shapes["encoder.pos_embed"] = (1, 197, d)
    shapes["encoder.patch_embed.proj.weight"] = (d, 3, 16, 16)
    shapes["encoder.patch_embed.proj.bias"] = (d,)
    norm("encoder.norm")
    for block in (f"encoder.blocks.{index}" for index in range(12)):
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 1152, d)
        linear(f"{block}.attn.proj", d, d)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", 1536, d)
        linear(f"{block}.mlp.fc2", d, 1536)
    shapes["transport_proj.weight"], shapes["transport_proj.bias"] = (d, 256, 1), (d,)
    linear("mlp_slot.0", 768, d)
    linear("mlp_slot.2", d, 768)
    for name in ("slots_mu", "slots_sigma"):
        shapes[f"slot_attention.{name}"] = (1, 16, 1, d)
    for name in ("norm_input", "norm_slots", "norm_pre_ff"):
        norm(f"slot_attention.{name}")
    for name in ("project_q", "project_k", "project_v", "mlp.0", "mlp.2"):
        linear(f"slot_attention.{name}", d, d)
    return shapes


def small(model: ModelConfig) -> ModelConfig:
    """The same switches at a quarter of the tokens or fewer."""
    side = 4 * model.backbone.patch
    return replace(model, resolution=(side, side))


@pytest.mark.parametrize("name", ["paper", "official_v2", "fixed", "tiny"])
def test_every_model_of_a_preset_runs(name: str) -> None:
    config = small(presets.get(name).model)
    torch.manual_seed(0)
    model = SMTC(config).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 2, 3, *config.resolution))
    assert out.semantic_logits.shape == (1, 2, config.slots, 16)
    assert all(part.isfinite().all() for part in out if isinstance(part, torch.Tensor))


def test_initial_slots() -> None:
    torch.manual_seed(0)
    attention = SlotAttention(presets.official_v2().model, 384)
    assert attention.slots_mu.mean().abs() < 0.05 and abs(attention.slots_mu.std() - 1) < 0.05
    bound = (6 / (384 + 16 * 384)) ** 0.5
    assert 0.9 * bound < attention.slots_sigma.abs().max() <= bound


def test_the_gain_scales_the_initial_projection_only() -> None:
    tiny = small(presets.tiny().model)
    torch.manual_seed(0)
    plain = SMTC(replace(tiny, correlation_gain=1.0))
    torch.manual_seed(0)
    scaled = SMTC(replace(tiny, correlation_gain=0.2))
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = 0.2 if name == "transport_proj.weight" else 1.0
        torch.testing.assert_close(b, factor * a)
