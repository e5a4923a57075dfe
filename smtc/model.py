"""SMTC: frames → features → correlation with a reference frame → semantic and
instance slots.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smtc import kernels
from smtc.backbones import build_encoder
from smtc.config import ModelConfig
from smtc.keyed_random import keyed_normal
from smtc.slots import SlotAttention


class Output(NamedTuple):
    """What the model says of a clip; logits are scaled, of the last iteration, before softmax,
    fp32.
    """

    features: Tensor
    """`[B,T,L,D]`, L row-major over `grid`."""
    semantic_slots: Tensor
    """`[B,T,N,D]`"""
    semantic_logits: Tensor
    """`[B,T,N,L]`: masks are their softmax over N."""
    instance_slots: Tensor
    """`[B,T,N,P,D]`"""
    instance_logits: Tensor
    """`[B,T,N,P,L]`: a softmax over P divides a semantic among its instances."""
    embeddings: Tensor
    """`[B,T,N,P,D]`: what the instance loss compares."""
    grid: tuple[int, int]
    """Rows and columns of tokens."""


class SMTC(nn.Module):
    """The student or the teacher; parameter names are those of the authors' checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.backbone, config.attention)
        width = self.encoder.width
        positions = config.grid[0] * config.grid[1]
        self.fusion = nn.Linear(width, width) if config.fusion_head == "linear" else None
        # A 1x1 convolution in the checkpoint's shape: its input channels are the reference
        # positions.
        self.transport_proj = nn.Conv1d(positions, width, kernel_size=1)
        with torch.no_grad():
            self.transport_proj.weight.mul_(config.correlation_gain)
        self.slot_attention = SlotAttention(config, width)
        self.mlp_slot = (
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            if config.embedding == "mlp"
            else None
        )

    @property
    def width(self) -> int:
        """D."""
        return self.encoder.width

    def forward(
        self,
        clip: Tensor,
        noise: Tensor | None = None,
        reference: Tensor | None = None,
        *,
        depth: Tensor | None = None,
        iterations: int | None = None,
        features: Tensor | None = None,
    ) -> Output:
        """Find semantics and instances in `clip [B,T,3,H,W]` (normalised frames).

        `noise [B,T,N,P,D]` (standard normal), `reference [B,T]` (int64, another frame of the clip)
        and `depth [B,T,branches]` (uniform, stochastic depth) fix the draws. Without them, training
        mode draws from torch's generator, evaluation mode takes fixed noise and the previous frame.
        `features [B,T,L,D]` are what `encode` makes of `clip`, where the caller has them.
        """
        batch, frames = clip.shape[:2]
        if iterations is None:
            iterations = self.config.iterations
        if noise is None:
            noise = self._draw_noise(batch, frames, clip.device)
        if reference is None:
            reference = self._draw_reference(batch, frames, clip.device)
        self._check(clip, noise, reference, iterations)
        grid = self.encoder.grid(clip)
        if features is None:
            features, _ = self.encode(clip, depth)
        fused = self._fuse(features, reference, grid)
        slots = self.slot_attention(fused.flatten(0, 1), noise.flatten(0, 1), iterations)
        split = [part.unflatten(0, (batch, frames)) for part in slots]
        semantic_slots, semantic_logits, instance_slots, instance_logits = split
        return Output(
            features=features,
            semantic_slots=semantic_slots,
            semantic_logits=semantic_logits,
            instance_slots=instance_slots,
            instance_logits=instance_logits,
            embeddings=self._embed(instance_slots),
            grid=grid,
        )

    def _check(self, clip: Tensor, noise: Tensor, reference: Tensor, iterations: int) -> None:
        if clip.ndim != 5 or clip.shape[2] != 3:
            raise ValueError(f"clip: expected [B,T,3,H,W], got {list(clip.shape)}")
        batch, frames = clip.shape[:2]
        drawn = batch, frames, self.config.slots, self.config.instances, self.width
        if noise.shape != drawn:
            raise ValueError(f"noise: expected {list(drawn)}, got {list(noise.shape)}")
        if reference.shape != (batch, frames) or reference.dtype != torch.int64:
            raise ValueError(
                f"reference: expected int64 [{batch},{frames}], "
                f"got {reference.dtype} {list(reference.shape)}"
            )
        if iterations < 1:
            raise ValueError(f"iterations: expected at least 1, got {iterations}")
        # Only where looking does not make the device wait, nor break a compiled graph.
        if reference.is_cuda or torch.compiler.is_compiling():
            return
        if not ((reference >= 0) & (reference < frames)).all():
            raise ValueError(f"reference: expected frames 0 to {frames - 1} of the clip")

    def encode(self, clip: Tensor, depth: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Features `[B,T,L,D]` of `clip [B,T,3,H,W]`, and the grid (rows, columns)."""
        drawn = None if depth is None else depth.flatten(0, 1)
        features = self.encoder(clip.flatten(0, 1), drawn).unflatten(0, clip.shape[:2])
        return features, self.encoder.grid(clip)

    def _fuse(self, features: Tensor, reference: Tensor, grid: tuple[int, int]) -> Tensor:
        """Semantics plus correspondence: `h_f(F_t) + h_c(F_t F_jᵀ)`, `[B,T,L,D]` (Eq. 1–3)."""
        batch, frames, positions, width = features.shape
        offset = torch.arange(batch, device=features.device)[:, None] * frames
        correlation = kernels.correlation_projection(
            features.flatten(0, 1),
            self._to_training_grid(features, grid).flatten(0, 1),
            self.transport_proj.weight[..., 0] * self.config.correlation_scale,
            self.transport_proj.bias,
            index=(offset + reference).flatten(),
            impl=self.config.impl,
        )
        semantic = features if self.fusion is None else self.fusion(features)
        return semantic + correlation.view(batch, frames, positions, width)

    def _to_training_grid(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Reference features on the grid that the correlation's projection was made for."""
        if grid == self.config.grid:
            return features
        batch, frames, _, width = features.shape
        maps = features.flatten(0, 1).transpose(1, 2).reshape(batch * frames, width, *grid)
        maps = F.interpolate(maps, self.config.grid, mode="bilinear", align_corners=False)
        return maps.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))

    def _embed(self, instance_slots: Tensor) -> Tensor:
        if self.mlp_slot is None:
            return instance_slots
        return F.normalize(self.mlp_slot(instance_slots).float(), dim=-1)

    def _draw_noise(self, batch: int, frames: int, device: torch.device) -> Tensor:
        if self.training:
            shape = self.config.slots, self.config.instances, self.width
            return torch.randn(batch, frames, *shape, device=device)
        return self.inference_noise(device).expand(batch, frames, -1, -1, -1)

    def inference_noise(self, device: torch.device, seed: int = 0) -> Tensor:
        """The noise that evaluation takes, with seed 0 unless told otherwise: `[N,P,D]`, float32.

        The same for every frame of every clip: a clip's result does not depend on the batch it sits
        in, and an instance slot starts alike in all frames, so that its number stays.
        """
        shape = self.config.slots, self.config.instances, self.width
        index = torch.zeros(1, dtype=torch.int64, device=device)
        return keyed_normal(seed, index, 0, shape)[0]

    def _draw_reference(self, batch: int, frames: int, device: torch.device) -> Tensor:
        """For each frame the frame it is correlated with: int64 `[B,T]`."""
        here = torch.arange(frames, device=device).expand(batch, -1)
        if self.training and self.config.reference == "random" and frames > 1:
            return (here + torch.randint(1, frames, (batch, frames), device=device)) % frames
        return (here - 1) % frames
