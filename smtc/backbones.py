"""The encoders: DINO's vision transformer and MoCo's ResNet-50, with the public files' names.

Letters: B frames, L = h·w tokens in row-major order, D features a token.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smtc.attention import attend
from smtc.config import BackboneConfig
from smtc.errors import UserError

PRETRAINING_SIDE = 224
"""Pixels on a side of DINO's training frames; fixes the grid of learned position embeddings."""
RESNET_WIDTH = 384
"""D of the projected ResNet-50, that of ViT-S."""
HEADS = ("neck.", "project.")
"""Parts of an encoder that are ours, so that no public file holds them."""
AS_EVALUATED = 1.0
"""A draw for stochastic depth that random ones never reach: the branch stays, as in evaluation."""


@dataclass(frozen=True, kw_only=True)
class ViTSize:
    """Width, depth and heads of a vision transformer."""

    width: int
    depth: int
    heads: int


VIT_SIZES = {
    "vit_small": ViTSize(width=384, depth=12, heads=6),
    "vit_tiny": ViTSize(width=64, depth=3, heads=2),
}


class Neck(nn.Module):
    """Two linear layers with a ReLU between them: `[..., D]` to `[..., D]`.

    The warm start trains it with a batch norm before the ReLU, which it owns, passes to `forward`
    and at the end folds into the first layer; a saved neck never has a norm.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, features: Tensor, norm: nn.Module | None = None) -> Tensor:
        """`features [..., D]` to the same shape.

        `norm`, when given, acts on the hidden values as rows `[tokens, hidden]`.
        """
        hidden = self.fc1(features)
        if norm is not None:
            hidden = norm(hidden.flatten(0, -2)).view_as(hidden)
        return self.fc2(F.relu(hidden))

    @torch.no_grad()
    def fold(self, norm: nn.BatchNorm1d) -> None:
        """Make the first layer do what it did followed by `norm` with its running statistics."""
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("norm keeps no running statistics, so it cannot be folded.")
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        self.fc1.weight.mul_(scale[:, None])
        self.fc1.bias.sub_(norm.running_mean).mul_(scale).add_(norm.bias)


class Encoder(nn.Module, ABC):
    """What every encoder offers: `config`, `width` (D), `patch` (pixels a token), `neck` (or None).

    Subclasses compute `features`; `forward` puts the neck behind them.
    """

    def __init__(self, config: BackboneConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.width = width
        self.patch = config.patch
        self.neck = Neck(width, config.neck) if config.neck else None
        self.recomputes = False
        """Whether a block's activations are computed again in the backward pass instead of kept."""

    @property
    def branches(self) -> int:
        """How many branches stochastic depth may drop."""
        return 0

    @abstractmethod
    def features(self, frames: Tensor, depth: Tensor | None = None) -> Tensor:
        """Features before the neck: frames `[B,3,H,W]`, normalised, to `[B,L,D]`."""

    def forward(
        self, frames: Tensor, depth: Tensor | None = None, norm: nn.Module | None = None
    ) -> Tensor:
        """Frames `[B,3,H,W]`, floating point and normalised, to features `[B,L,D]`, row by row.

        `depth [B,branches]` (uniform in [0, 1), or `AS_EVALUATED`) fixes which branches training
        drops; without it torch's generator does. `norm` goes to the neck. Raises `UserError` when H
        or W is no multiple of the patch.
        """
        features = self.features(frames, depth)
        return features if self.neck is None else self.neck(features, norm)

    def grid(self, frames: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens for frames `[..., H, W]`.

        Raises `UserError` when the patch does not divide both sides.
        """
        height, width = frames.shape[-2:]
        if min(height, width) < self.patch or height % self.patch or width % self.patch:
            raise UserError(
                f"Frames of {height}x{width} pixels cannot be cut into patches of {self.patch}; "
                f"resize both sides to multiples of {self.patch}."
            )
        return height // self.patch, width // self.patch

    def unused_parameters(self) -> list[str]:
        """Names of parameters that exist for the sake of the public files but get no gradient."""
        return []

    def repeated(self) -> list[nn.Module]:
        """The parts that make up the work, for a compiler: small ones that are alike."""
        return [self]


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int, impl: str) -> None:
        super().__init__()
        self.heads = heads
        self.impl = impl
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.unbind(dim=2)  # each [B, tokens, heads, D/heads]
        return self.proj(attend(query, key, value, self.impl).reshape(batch, tokens, width))

    def keys(self, x: Tensor) -> Tensor:
        """The keys alone, heads side by side: `[B,tokens,D]` to `[B,tokens,D]`."""
        _, weight, _ = self.qkv.weight.chunk(3)
        _, bias, _ = self.qkv.bias.chunk(3)
        return F.linear(x, weight, bias)


class MLP(nn.Module):
    """Linear, GELU, linear; four times wider inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, attention: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Tokens `[B,tokens,D]`; `scale [B,2]` multiplies the two branches of each frame."""
        if scale is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        first, second = scale.to(x.dtype)[:, :, None, None].unbind(dim=1)  # each [B,1,1]
        x = x + self.attn(self.norm1(x)) * first
        return x + self.mlp(self.norm2(x)) * second


class PatchEmbed(nn.Module):
    """Cuts frames into patches and embeds each."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, frames: Tensor) -> Tensor:
        return self.proj(frames).flatten(2).transpose(1, 2)  # [B,3,H,W] -> [B,L,D]


class VisionTransformer(Encoder):
    """DINO's ViT; features are the last block's keys or its output, without CLS and final norm.

    With keys, only the norm and the key third of the last block's qkv are computed. The rest of
    that block and the final norm are there so that public files load strictly. `qkv` is one tensor,
    so its query and value thirds cannot be frozen apart from the keys: their gradient is zero, and
    weight decay shrinks them.
    """

    def __init__(self, config: BackboneConfig, size: ViTSize, attention: str = "sdpa") -> None:
        super().__init__(config, size.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.width))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.drops: Tensor
        self.position_side = max(PRETRAINING_SIDE // config.patch, 1)
        if config.position_embedding == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.position_side**2, size.width))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = PatchEmbed(size.width, config.patch)
        self.blocks = nn.ModuleList(
            Block(size.width, size.heads, attention) for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        drops = [config.drop_path * i / max(size.depth - 1, 1) for i in range(size.depth)]
        # On the device, and no part of the weights: two branches a block.
        self.register_buffer("drops", torch.tensor(drops).repeat_interleave(2), persistent=False)

    @property
    def branches(self) -> int:
        return 2 * len(self.blocks)

    def features(self, frames: Tensor, depth: Tensor | None = None) -> Tensor:
        x = self.embed(frames)
        scales = self.branch_scales(x.shape[0], depth)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        for block, scale in zip(self.blocks[:-1], scales, strict=False):
            x = self.run(block, x, scale)
        if self.config.feature == "keys":
            return last.attn.keys(last.norm1(x[:, 1:]))
        return self.run(last, x, scales[-1])[:, 1:]

    def branch_scales(self, frames: int, depth: Tensor | None) -> list[Tensor | None]:
        """What each block's branches are multiplied with, `[B,2]`: stochastic depth drops those of
        some frames and scales up the others. None outside training.

        Dropped are branches whose draw is below their chance.
        """
        if not self.training or self.config.drop_path == 0:
            return [None] * len(self.blocks)
        if depth is None:
            depth = torch.rand(frames, self.branches, device=self.drops.device)
        kept = (depth >= self.drops) / (1 - self.drops)
        return list(torch.where(depth >= AS_EVALUATED, 1.0, kept).split(2, dim=1))

    def run(self, block: nn.Module, x: Tensor, scale: Tensor | None) -> Tensor:
        """`block` of `x`; where asked for, its activations are not kept for the backward pass."""
        if not (self.recomputes and torch.is_grad_enabled()):
            return block(x, scale)
        # Nothing in a block draws, so there is no random state to bring back.
        return checkpoint(block, x, scale, use_reentrant=False, preserve_rng_state=False)

    def embed(self, frames: Tensor) -> Tensor:
        """CLS and patch tokens with their positions: `[B,3,H,W]` to `[B,1+L,D]`."""
        rows, columns = self.grid(frames)
        patches = self.patch_embed(frames)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if self.config.position_embedding == "learned":
            x = x + self.positions(rows, columns)
        return x

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings `[1, 1 + rows·columns, D]`, resized bicubically to another grid.

        "scale_factor" passes (n + 0.1) / side to the interpolation, as the authors' code does; it
        samples at slightly other places than "size".
        """
        side = self.position_side
        if (rows, columns) == (side, side):
            return self.pos_embed
        cls_position, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        image = patches.view(1, side, side, -1).permute(0, 3, 1, 2)
        if self.config.position_resize == "size":
            resized = F.interpolate(image, size=(rows, columns), mode="bicubic")
        else:
            scale = ((rows + 0.1) / side, (columns + 0.1) / side)
            resized = F.interpolate(image, scale_factor=scale, mode="bicubic")
        return torch.cat([cls_position, resized.flatten(2).transpose(1, 2)], dim=1)

    def unused_parameters(self) -> list[str]:
        unused = ["norm."]
        if self.config.feature == "keys":
            last = f"blocks.{len(self.blocks) - 1}."
            unused += [last + part for part in ("attn.proj.", "norm2.", "mlp.")]
        return [name for name, _ in self.named_parameters() if name.startswith(tuple(unused))]

    def repeated(self) -> list[nn.Module]:
        return list(self.blocks[:-1] if self.config.feature == "keys" else self.blocks)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that uses and keeps its running statistics while its weight is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class Bottleneck(nn.Module):
    """ResNet's 1×1, 3×3, 1×1 block; the 3×3 convolution carries the stride."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        width_out = 4 * width
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = BatchNorm(width)
        self.conv3 = nn.Conv2d(width, width_out, 1, bias=False)
        self.bn3 = BatchNorm(width_out)
        self.downsample = None
        if stride > 1 or width_in != width_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False), BatchNorm(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + identity)


class ResNet50(Encoder):
    """ResNet-50 whose last stage keeps its resolution (features at 1/16), projected to D = 384."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config, RESNET_WIDTH)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(64)
        self.layer1 = self.stage(64, 64, blocks=3, stride=1)
        self.layer2 = self.stage(256, 128, blocks=4, stride=2)
        self.layer3 = self.stage(512, 256, blocks=6, stride=2)
        self.layer4 = self.stage(1024, 512, blocks=3, stride=1)
        self.project = nn.Linear(2048, RESNET_WIDTH)

    @staticmethod
    def stage(width_in: int, width: int, *, blocks: int, stride: int) -> nn.Sequential:
        first = Bottleneck(width_in, width, stride)
        return nn.Sequential(
            first, *(Bottleneck(4 * width, width, stride=1) for _ in range(1, blocks))
        )

    def features(self, frames: Tensor, depth: Tensor | None = None) -> Tensor:
        self.grid(frames)
        x = F.relu(self.bn1(self.conv1(frames)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B,2048,H/16,W/16]
        return self.project(x.flatten(2).transpose(1, 2))


def build_encoder(config: BackboneConfig, attention: str = "sdpa") -> Encoder:
    """The encoder of `config` with random weights (`config.weights` is read by `smtc.weights`).

    attention: of a vision transformer, see `smtc.attention`.
    """
    if config.architecture == "resnet50":
        return ResNet50(config)
    return VisionTransformer(config, VIT_SIZES[config.architecture], attention)
