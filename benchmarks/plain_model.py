"""The network of the plain reference step (`plain.py`), as the specification writes it.

Attention matrices, correlations and slot weights are materialised; nothing is fused or reordered.
What no result depends on is left out, because a careful engineer would leave it out too. Parameter
names are those of the authors' checkpoint, so that a model's `state_dict` fits.

Letters: F frames, S tokens of a frame with CLS, L without, D width, N semantic slots, P instance
slots a semantic. Frames of another size than the training resolution are not catered for.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from smtc.backbones import PRETRAINING_SIDE, VIT_SIZES
from smtc.config import BackboneConfig, ModelConfig

SLOT_EPSILON = 1e-8


class Found(NamedTuple):
    """What the losses need of a view of B clips; logits are those of the last iteration."""

    features: Tensor
    """`[B,T,L,D]`"""
    semantic_slots: Tensor
    """`[B,T,N,D]`"""
    semantic_logits: Tensor
    """`[B,T,N,L]`"""
    instance_slots: Tensor
    """`[B,T,N,P,D]`"""
    embeddings: Tensor
    """`[B,T,N,P,D]`"""


class Attention(nn.Module):
    """Self-attention with its matrix of weights written out, or (`sdpa`) torch's fused one."""

    def __init__(self, width: int, heads: int, *, sdpa: bool) -> None:
        super().__init__()
        self.heads, self.sdpa = heads, sdpa
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[F,S,D]` to what they gather and to their keys, both `[F,S,D]`."""
        parts = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if self.sdpa:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        else:
            scores = query @ key.mT / math.sqrt(query.shape[-1])  # [F,heads,S,S]
            mixed = scores.softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2)), parts[1]

    def keys(self, x: Tensor) -> Tensor:
        """The keys alone: `[F,S,D]` to `[F,S,D]`."""
        of_keys = slice(x.shape[-1], 2 * x.shape[-1])
        return functional.linear(x, self.qkv.weight[of_keys], self.qkv.bias[of_keys])


class FeedForward(nn.Module):
    """D → 4D → D with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm block whose two branches may be dropped, frame by frame."""

    def __init__(self, width: int, heads: int, drop: float, *, sdpa: bool) -> None:
        super().__init__()
        self.drop = drop
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, sdpa=sdpa)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens `[F,S,D]` to tokens and the attention's keys; `drawn [F,2]`, one for a branch."""
        gathered, keys = self.attn(self.norm1(x))
        x = x + self._survive(gathered, drawn, 0)
        return x + self._survive(self.mlp(self.norm2(x)), drawn, 1), keys

    def _survive(self, branch: Tensor, drawn: Tensor | None, number: int) -> Tensor:
        """Stochastic depth: 0 for frames whose number is below the chance, the others scaled up."""
        if drawn is None or self.drop == 0:
            return branch
        survives = (drawn[:, number] >= self.drop).to(branch.dtype)
        return branch * (survives / (1 - self.drop)).view(-1, 1, 1)


class PatchEmbedding(nn.Module):
    """A linear map of each patch, as a convolution."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, frames: Tensor) -> Tensor:
        """`[F,3,H,W]` to `[F,L,D]`."""
        return self.proj(frames).flatten(2).mT


class Neck(nn.Module):
    """D → hidden → D with ReLU, behind the encoder of the tiny presets."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(self.fc1(features).relu())


class Encoder(nn.Module):
    """DINO's ViT up to the last block's keys (or tokens); `dead_block` computes its remainder too,
    for nothing.
    """

    def __init__(self, config: BackboneConfig, *, sdpa: bool, dead_block: bool) -> None:
        super().__init__()
        size = VIT_SIZES[config.architecture]
        width = size.width
        self.config, self.dead_block = config, dead_block
        self.side = max(PRETRAINING_SIDE // config.patch, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.position_embedding == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        self.patch_embed = PatchEmbedding(width, config.patch)
        self.blocks = nn.ModuleList(
            Block(width, size.heads, config.drop_path * i / max(size.depth - 1, 1), sdpa=sdpa)
            for i in range(size.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.neck = Neck(width, config.neck) if config.neck else None

    def forward(self, frames: Tensor, depth: Tensor | None) -> Tensor:
        """Frames `[F,3,H,W]` to features `[F,L,D]`; `depth [F,2·blocks]`, None: nothing dropped."""
        x = self._embed(frames)
        drawn = [None] * len(self.blocks) if depth is None else list(depth.split(2, dim=1))
        for block, numbers in zip(self.blocks[:-1], drawn, strict=False):
            x, _ = block(x, numbers)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        if self.config.feature == "keys" and not self.dead_block:
            features = last.attn.keys(last.norm1(x))
        else:
            x, keys = last(x, drawn[-1])
            features = keys if self.config.feature == "keys" else x
        features = features[:, 1:]
        return features if self.neck is None else self.neck(features)

    def _embed(self, frames: Tensor) -> Tensor:
        """CLS and patches, with their positions: `[F,S,D]`."""
        patches = self.patch_embed(frames)
        x = torch.cat([self.cls_token.expand(len(frames), -1, -1), patches], dim=1)
        if self.config.position_embedding == "none":
            return x
        rows, columns = (side // self.config.patch for side in frames.shape[-2:])
        return x + self._positions(rows, columns)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings `[1,S,D]`, resized when the grid is not that of the pretraining."""
        side = self.side
        if rows == columns == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (side, side))  # [1,D,side,side]
        if self.config.position_resize == "size":
            grid = functional.interpolate(grid, (rows, columns), mode="bicubic")
        else:  # the authors' scale, which falls at slightly other places
            scale = (rows + 0.1) / side, (columns + 0.1) / side
            grid = functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], dim=1)


class Slots(nn.Module):
    """Masked slot attention (Eq. 4–7), one set of weights for both stages."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.slots_mu = nn.Parameter(torch.zeros(1, config.slots, 1, width))
        self.slots_sigma = nn.Parameter(torch.zeros(1, config.slots, 1, width))
        self.norm_input = nn.LayerNorm(width)
        self.norm_slots = nn.LayerNorm(width)
        self.norm_pre_ff = nn.LayerNorm(width)
        self.project_q = nn.Linear(width, width)
        self.project_k = nn.Linear(width, width)
        self.project_v = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.gru = nn.GRUCell(width, width) if config.update == "gru" else None

    def forward(self, fused: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`fused [F,L,D]`, `noise [F,N,P,D]` to semantic slots `[F,N,D]`, their logits `[F,N,L]`
        and instance slots `[F,N,P,D]`.
        """
        x = self.norm_input(fused)
        keys, values = self.project_k(x), self.project_v(x)
        # The semantic stage is one group of N slots that see everything.
        start = self.slots_mu.transpose(1, 2).expand(len(fused), -1, -1, -1)  # [F,1,N,D]
        semantic, logits = self._refine(start, keys, values, None)
        mask = self._seen(logits[:, 0].detach())
        instances, _ = self._refine(self._sample(noise), keys, values, mask)
        return semantic[:, 0], logits[:, 0], instances

    def _seen(self, logits: Tensor) -> Tensor:
        """The binary mask of each semantic: `[F,N,L]` to `[F,N,L]` of 0 and 1."""
        if self.config.semantic_mask == "softmax>0.5":
            return (logits.softmax(dim=1) > 0.5).to(logits.dtype)
        return (logits > 0.3).to(logits.dtype)

    def _sample(self, noise: Tensor) -> Tensor:
        """`μ_n + σ_n z`, `[F,N,P,D]`."""
        samples = self.slots_mu + self.slots_sigma.exp() * noise
        return samples.detach() if self.config.sampling == "detached" else samples

    def _refine(
        self, start: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """All iterations on slots `[F,G,P,D]` in G groups; also the last one's logits `[F,G,P,L]`.

        Straight-through: only the last iteration and the initial slots get a gradient.
        """
        early = self.config.iterations - 1
        through = self.config.gradient == "full"
        slots = start
        with torch.set_grad_enabled(through and torch.is_grad_enabled()):
            for _ in range(early):
                slots, _ = self._iterate(slots, keys, values, mask)
        if not through:
            slots = slots.detach() - start.detach() + start
        return self._iterate(slots, keys, values, mask)

    def _iterate(
        self, slots: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        queries = self.project_q(self.norm_slots(slots))
        logits = torch.einsum("fgpd,fld->fgpl", queries, keys) / math.sqrt(slots.shape[-1])
        weights = logits.softmax(dim=2) + SLOT_EPSILON
        if mask is None:
            attention = weights / weights.sum(dim=-1, keepdim=True)
        else:  # ε comes before the mask, so that an empty mask gives a zero update
            weights = weights * mask.unsqueeze(2)
            attention = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
        update = torch.einsum("fgpl,fld->fgpd", attention, values)
        if self.gru is None:
            slots = slots + update
        else:
            slots = self.gru(update.flatten(0, 2), slots.flatten(0, 2)).view_as(slots)
        return slots + self.mlp(self.norm_pre_ff(slots)), logits


class Network(nn.Module):
    """Frames → features → correlation with a reference frame → slots → embeddings (Eq. 1–7)."""

    def __init__(
        self, config: ModelConfig, *, sdpa: bool = False, dead_block: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.backbone, sdpa=sdpa, dead_block=dead_block)
        width = VIT_SIZES[config.backbone.architecture].width
        self.fusion = nn.Linear(width, width) if config.fusion_head == "linear" else None
        self.transport_proj = nn.Conv1d(math.prod(config.grid), width, kernel_size=1)
        self.slot_attention = Slots(config, width)
        self.mlp_slot = None
        if config.embedding == "mlp":
            self.mlp_slot = nn.Sequential(
                nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
            )

    def forward(
        self, clip: Tensor, noise: Tensor, reference: Tensor, depth: Tensor | None = None
    ) -> Found:
        """Run B clips.

        `clip [B,T,3,H,W]`, `noise [B,T,N,P,D]`, `reference [B,T]` (int64), `depth [B,T,2·blocks]`
        (what stochastic depth is decided with; None: nothing is dropped).
        """
        shape = clip.shape[:2]
        drawn = None if depth is None else depth.flatten(0, 1)
        features = self.encoder(clip.flatten(0, 1), drawn).unflatten(0, shape)
        fused = self._fuse(features, reference)
        found = self.slot_attention(fused.flatten(0, 1), noise.flatten(0, 1))
        semantic_slots, semantic_logits, instance_slots = (f.unflatten(0, shape) for f in found)
        embeddings = instance_slots
        if self.mlp_slot is not None:
            embeddings = functional.normalize(self.mlp_slot(instance_slots), dim=-1)
        return Found(features, semantic_slots, semantic_logits, instance_slots, embeddings)

    def _fuse(self, features: Tensor, reference: Tensor) -> Tensor:
        """`R = h_f(F_t) + h_c(F_t F_jᵀ)`: `[B,T,L,D]`, with the correlation `[B,T,L,L]` in full."""
        clips = torch.arange(len(features), device=features.device).unsqueeze(1)
        correlation = features @ features[clips, reference].mT
        if self.config.correlation_scale != 1:
            correlation = correlation * self.config.correlation_scale
        # A linear layer in the shape of a 1×1 convolution over the reference's positions.
        weight, bias = self.transport_proj.weight.squeeze(-1), self.transport_proj.bias
        semantic = features if self.fusion is None else self.fusion(features)
        return semantic + functional.linear(correlation, weight, bias)
