"""The encoders against written-out versions, and the names and shapes of the public files."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smtc.backbones import AS_EVALUATED, Encoder, Neck, VisionTransformer, build_encoder
from smtc.config import BackboneConfig
from smtc.errors import UserError


def tiny(**settings: object) -> VisionTransformer:
    torch.manual_seed(0)
    values: dict = {"architecture": "vit_tiny", "patch": 8, **settings}
    encoder = build_encoder(BackboneConfig(**values))
    assert isinstance(encoder, VisionTransformer)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def frames(height: int, width: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype
    )


def slow_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight + bias


def slow_vit(
    state: dict[str, Tensor], image: Tensor, patch: int, heads: int, depth: int
) -> tuple[Tensor, Tensor]:
    """One frame `[3,H,W]`, head by head: the last block's keys and output, without CLS."""
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    kernel = state["patch_embed.proj.weight"].flatten(1)
    tokens = [state["cls_token"][0, 0]]
    for row in range(rows):
        for column in range(columns):
            cut = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(kernel @ cut.flatten() + state["patch_embed.proj.bias"])
    x = torch.stack(tokens) + state.get("pos_embed", torch.zeros(1, 1, 1, dtype=image.dtype))[0]
    width = x.shape[1]
    size = width // heads
    for i in range(depth):
        part = {n[len(f"blocks.{i}.") :]: t for n, t in state.items() if f"blocks.{i}." in n}
        y = slow_norm(x, part["norm1.weight"], part["norm1.bias"])
        qkv = y @ part["attn.qkv.weight"].T + part["attn.qkv.bias"]
        query, key, value = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
        mixed = []
        for head in range(heads):
            mine = slice(head * size, (head + 1) * size)
            scores = query[:, mine] @ key[:, mine].T / math.sqrt(size)
            mixed.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ value[:, mine])
        x = x + torch.cat(mixed, 1) @ part["attn.proj.weight"].T + part["attn.proj.bias"]
        y = slow_norm(x, part["norm2.weight"], part["norm2.bias"])
        hidden = y @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + hidden @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"]
    return key[1:], x[1:]


@pytest.mark.parametrize("position_embedding", ["none", "learned"])
def test_vit_follows_the_written_out_version(position_embedding: str) -> None:
    # Patch 72 makes 3 x 3 the learned grid, so that nothing is resized.
    patch, height, width = (8, 24, 32) if position_embedding == "none" else (72, 216, 216)
    found = {}
    for feature in ("keys", "tokens"):
        encoder = tiny(patch=patch, feature=feature, position_embedding=position_embedding)
        images = frames(height, width, dtype=torch.float64)
        found[feature] = encoder.double()(images)
    for b, image in enumerate(images):
        keys, tokens = slow_vit(encoder.state_dict(), image, patch, heads=2, depth=3)
        torch.testing.assert_close(found["keys"][b], keys, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found["tokens"][b], tokens, rtol=1e-10, atol=1e-10)


def test_keys_are_the_middle_third_of_the_last_qkv() -> None:
    encoder = tiny(feature="tokens")
    seen: list[Tensor] = []
    encoder.blocks[-1].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out))
    images = frames(24, 40)
    encoder(images)
    keys = tiny(feature="keys")(images)
    assert keys.shape == (2, 15, 64)
    torch.testing.assert_close(keys, seen[0][:, 1:, 64:128])


def test_keys_compute_nothing_that_is_thrown_away() -> None:
    encoder = tiny(feature="keys")
    ran = []
    for name, module in encoder.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    encoder(frames(16, 16))
    assert [name for name in ran if name.startswith("blocks.2.")] == ["blocks.2.norm1"]
    assert "norm" not in ran
    assert "blocks.1.mlp.fc2" in ran


@pytest.mark.parametrize("feature", ["keys", "tokens"])
def test_unused_parameters_are_exactly_those_without_gradient(feature: str) -> None:
    encoder = tiny(feature=feature)
    encoder(frames(16, 24)).square().sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert encoder.unused_parameters() == without
    assert ("blocks.2.attn.proj.weight" in without) == (feature == "keys")


def test_tokens_come_row_by_row() -> None:
    encoder = tiny()
    images = frames(24, 32)
    wide = encoder.patch_embed(images)
    alone = encoder.patch_embed(images[:, :, 8:16, 24:32])  # row 1, column 3
    torch.testing.assert_close(wide[:, 1 * 4 + 3], alone[:, 0])


def test_native_grid_takes_the_learned_positions_untouched() -> None:
    encoder = tiny(patch=16)
    assert encoder.pos_embed.shape == (1, 197, 64)
    assert encoder.positions(14, 14) is encoder.pos_embed
    # As many tokens in another shape are no native grid.
    assert not torch.equal(encoder.positions(7, 28), encoder.pos_embed)


@pytest.mark.parametrize("grid", [(16, 16), (7, 28), (30, 50), (3, 14)])
@pytest.mark.parametrize("option", ["scale_factor", "size"])
def test_positions_are_resized_as_the_option_says(grid: tuple[int, int], option: str) -> None:
    encoder = tiny(patch=16, position_resize=option)
    image = encoder.pos_embed[:, 1:].reshape(1, 14, 14, 64).permute(0, 3, 1, 2)
    how: dict = (
        {"scale_factor": ((grid[0] + 0.1) / 14, (grid[1] + 0.1) / 14)}
        if option == "scale_factor"
        else {"size": grid}
    )
    wanted = F.interpolate(image, mode="bicubic", align_corners=False, **how)
    found = encoder.positions(*grid)
    assert torch.equal(found[:, 0], encoder.pos_embed[:, 0])
    assert torch.equal(found[:, 1:].reshape(1, *grid, 64).permute(0, 3, 1, 2), wanted)


def test_the_two_ways_to_resize_differ() -> None:
    exact, plain = tiny(patch=16), tiny(patch=16, position_resize="size")
    assert not torch.allclose(exact.positions(16, 16), plain.positions(16, 16), atol=1e-4)


@pytest.mark.parametrize("patch", [8, 16])
def test_scale_factor_gives_as_many_positions_as_tokens(patch: int) -> None:
    encoder = tiny(patch=patch)
    for tokens in range(1, 130):
        assert encoder.positions(1, tokens).shape[1] == 1 + tokens
        assert encoder.positions(tokens, 1).shape[1] == 1 + tokens


def test_no_position_embedding_has_no_tensor_for_it() -> None:
    assert "pos_embed" not in tiny(position_embedding="none").state_dict()


def test_stochastic_depth_drops_branches_of_frames_and_keeps_the_mean() -> None:
    encoder = tiny(drop_path=0.4).train()
    torch.manual_seed(3)
    first, second, third = encoder.branch_scales(20_000, None)
    assert first is not None and second is not None and third is not None
    assert first.shape == (20_000, 2) and torch.equal(first, torch.ones_like(first))
    for scale, chance in ((second, 0.2), (third, 0.4)):
        assert scale.unique().tolist() == pytest.approx([0, 1 / (1 - chance)])
        for branch in scale.unbind(dim=1):
            assert (branch == 0).float().mean().item() == pytest.approx(chance, abs=0.02)
        assert not torch.equal(scale[:, 0], scale[:, 1])


def test_draws_fix_which_branches_are_dropped() -> None:
    encoder = tiny(drop_path=0.4).train()
    drawn = torch.tensor([[0, 0, 0.19, 0.21, 0.39, 0.41], [AS_EVALUATED] * 6])
    scales = [scale for scale in encoder.branch_scales(2, drawn) if scale is not None]
    expected = [[1.0, 1.0, 0.0, 1 / 0.8, 0.0, 1 / 0.6], [1.0] * 6]
    torch.testing.assert_close(torch.cat(scales, dim=1), torch.tensor(expected))


def test_both_branches_of_a_block_are_scaled() -> None:
    block = tiny().blocks[-1]
    x = torch.randn(2, 5, 64)
    assert torch.equal(block(x, torch.zeros(2, 2)), x)
    first = x + 2 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x, torch.tensor([[2.0, 0.0]]).expand(2, 2)), first)
    torch.testing.assert_close(block(x, torch.ones(2, 2)), block(x))


def test_drop_path_acts_in_training_only() -> None:
    encoder = tiny(drop_path=0.5, feature="tokens")
    images = frames(16, 16, batch=8)
    assert torch.equal(encoder(images), encoder(images))
    still = encoder(images)
    encoder.train()
    assert not torch.allclose(encoder(images), still)
    assert torch.allclose(tiny(drop_path=0.0, feature="tokens").train()(images), still)


@pytest.mark.parametrize("shape", [(20, 16), (16, 20), (4, 16), (0, 16)])
@pytest.mark.parametrize("architecture", ["vit_tiny", "resnet50"])
def test_frames_that_the_patch_does_not_divide_are_refused(
    shape: tuple[int, int], architecture: str
) -> None:
    settings: dict = {"architecture": architecture, "feature": "tokens"}
    encoder = build_encoder(BackboneConfig(**settings))
    with pytest.raises(UserError, match=f"{shape[0]}x{shape[1]} pixels.*multiples of 16"):
        encoder(torch.zeros(1, 3, *shape))


def names_of_dino(depth: int) -> list[str]:
    pairs = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["patch_embed.proj", *(f"blocks.{i}.{p}" for i in range(depth) for p in pairs)]
    both = [f"{module}.{leaf}" for module in (*modules, "norm") for leaf in ("weight", "bias")]
    return ["cls_token", "pos_embed", *both]


@pytest.mark.parametrize("patch", [8, 16])
def test_vit_small_has_dinos_names_and_shapes(patch: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(BackboneConfig(patch=patch))
    shapes = {name: tuple(t.shape) for name, t in encoder.state_dict().items()}
    assert sorted(shapes) == sorted(names_of_dino(12))
    assert shapes["pos_embed"] == (1, (224 // patch) ** 2 + 1, 384)
    assert shapes["patch_embed.proj.weight"] == (384, 3, patch, patch)
    assert shapes["blocks.11.attn.qkv.weight"] == (1152, 384)
    assert shapes["blocks.0.mlp.fc1.weight"] == (1536, 384)
    assert (encoder.width, encoder.patch) == (384, patch)
    assert isinstance(encoder, VisionTransformer) and encoder.blocks[0].attn.heads == 6


@pytest.fixture(scope="module")
def resnet() -> Encoder:
    torch.manual_seed(0)
    return build_encoder(BackboneConfig(architecture="resnet50", feature="tokens")).eval()


def test_resnet_gives_projected_features_at_stride_16(resnet: Encoder) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    hooks = []
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        module = resnet.get_submodule(name)
        hooks.append(
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.update({name: tuple(out.shape[1:])})
            )
        )
    with torch.no_grad():
        assert resnet(frames(32, 64, batch=1)).shape == (1, 8, 384)
    for hook in hooks:
        hook.remove()
    assert seen == {
        "conv1": (64, 16, 32),
        "layer1": (256, 8, 16),
        "layer2": (512, 4, 8),
        "layer3": (1024, 2, 4),
        "layer4": (2048, 2, 4),
    }
    assert (resnet.width, resnet.patch, resnet.unused_parameters()) == (384, 16, [])


def test_resnet_has_torchvisions_names_and_size(resnet: Encoder) -> None:
    names = {n for n in resnet.state_dict() if not n.startswith("project.")}
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    wanted = {"conv1.weight", *(f"bn1.{leaf}" for leaf in norm)}
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            start = f"layer{layer}.{block}."
            for i in (1, 2, 3):
                wanted |= {f"{start}conv{i}.weight", *(f"{start}bn{i}.{leaf}" for leaf in norm)}
            if block == 0:
                wanted |= {f"{start}downsample.0.weight"}
                wanted |= {f"{start}downsample.1.{leaf}" for leaf in norm}
    assert names == wanted
    # What torchvision's ResNet-50 has without its classifier.
    trunk = [p for n, p in resnet.named_parameters() if not n.startswith("project.")]
    assert sum(p.numel() for p in trunk) == 23_508_032


def test_resnet_block_follows_the_written_out_version(resnet: Encoder) -> None:
    block = resnet.get_submodule("layer2")[0]
    torch.manual_seed(2)
    state = {n: t + torch.rand_like(t) / 5 - 0.1 for n, t in block.state_dict().items() if t.ndim}
    block.load_state_dict(state, strict=False)
    x = frames(16, 16)[:, :1].expand(-1, 256, -1, -1) * torch.linspace(-1, 1, 256)[:, None, None]

    def unit(y: Tensor, conv: str, norm: str, stride: int) -> Tensor:
        weight = state[f"{conv}.weight"]
        y = F.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2)
        scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-5)
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return y * scale[:, None, None] + shift[:, None, None]

    y = unit(x, "conv1", "bn1", 1).relu()
    y = unit(y, "conv2", "bn2", 2).relu()
    y = unit(y, "conv3", "bn3", 1)
    assert (y < 0).any() and (y > 0).any()
    y = y + unit(x, "downsample.0", "downsample.1", 2)
    with torch.no_grad():
        torch.testing.assert_close(block(x), y.relu(), rtol=1e-4, atol=1e-4)


def test_a_frozen_resnet_keeps_its_running_statistics(resnet: Encoder) -> None:
    resnet.train()
    norm = resnet.get_submodule("bn1")
    x = 3 + torch.randn(4, 64, 5, 5)
    before = norm.running_mean.clone()
    try:
        norm.requires_grad_(False)
        frozen = norm(x)
        assert torch.equal(norm.running_mean, before)
        assert torch.equal(frozen, norm.eval()(x))
        norm.train().requires_grad_(True)
        norm(x)
        assert not torch.equal(norm.running_mean, before)
    finally:
        norm.running_mean.copy_(before)
        resnet.requires_grad_(True).eval()


def test_the_neck_comes_after_the_features() -> None:
    encoder = tiny(neck=128, position_embedding="none")
    images = frames(16, 24)
    features = encoder.features(images)
    neck = encoder.neck
    assert neck is not None and neck.fc1.weight.shape == (128, 64)
    wanted = (features @ neck.fc1.weight.T + neck.fc1.bias).clamp(min=0) @ neck.fc2.weight.T
    torch.testing.assert_close(encoder(images), wanted + neck.fc2.bias)
    assert {n for n in encoder.state_dict() if n.startswith("neck.")} == {
        f"neck.fc{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")
    }
    assert tiny().neck is None


def test_a_folded_neck_does_what_the_neck_and_its_norm_did() -> None:
    torch.manual_seed(0)
    neck, norm = Neck(6, 10).double(), nn.BatchNorm1d(10).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    tokens = torch.randn(3, 7, 6, dtype=torch.float64)
    for _ in range(5):
        neck(tokens, norm)
    norm.eval()
    before = neck(tokens, norm)
    assert not torch.allclose(before, neck(tokens))
    neck.fold(norm)
    torch.testing.assert_close(neck(tokens), before)


def test_the_necks_norm_sees_all_tokens_of_the_batch() -> None:
    neck, norm = Neck(6, 10), nn.BatchNorm1d(10, momentum=1.0)
    tokens = torch.randn(3, 7, 6)
    neck(tokens, norm)
    torch.testing.assert_close(norm.running_mean, neck.fc1(tokens).mean(dim=(0, 1)))


def test_a_norm_without_statistics_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="no running statistics"):
        Neck(6, 10).fold(nn.BatchNorm1d(10, track_running_stats=False))
