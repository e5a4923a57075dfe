"""Semantic-aware masked slot attention (Sec. 3.3): semantics first, then instances inside each
semantic.

Both stages are one operation with one set of weights: groups of slots compete for the positions
that a mask lets them see. The semantic stage is one group of N slots without a mask, the instance
stage N groups of P slots. Parameter names follow the authors' checkpoint.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smtc import kernels
from smtc.config import ModelConfig

ATTENTION_EPSILON = 1e-8
SOFTMAX_THRESHOLD = 0.5
LOGIT_THRESHOLD = 0.3


class SlotAttention(nn.Module):
    """Slots of width `width` that explain a frame's fused features `[B,L,D]`."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.slots_mu = nn.Parameter(torch.randn(1, config.slots, 1, width))
        self.slots_sigma = nn.Parameter(torch.empty(1, config.slots, 1, width))
        nn.init.xavier_uniform_(self.slots_sigma)
        self.norm_input = nn.LayerNorm(width)
        self.norm_slots = nn.LayerNorm(width)
        self.norm_pre_ff = nn.LayerNorm(width)
        self.project_q = nn.Linear(width, width)
        self.project_k = nn.Linear(width, width)
        self.project_v = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.gru = nn.GRUCell(width, width) if config.update == "gru" else None

    def forward(
        self, fused: Tensor, noise: Tensor, iterations: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the slots of frames.

        `fused [B,L,D]`, `noise [B,N,P,D]` standard normal. Returns semantic slots `[B,N,D]` and
        logits `[B,N,L]`, instance slots `[B,N,P,D]` and logits `[B,N,P,L]`; logits are scaled, of
        the last iteration, fp32.
        """
        inputs = self.norm_input(fused)
        keys, values = self.project_k(inputs), self.project_v(inputs)
        start = self.slots_mu.expand(fused.shape[0], -1, -1, -1).transpose(1, 2)  # [B,1,N,D]
        slots, logits = self._iterate(start, keys, values, None, iterations)
        semantic_slots, semantic_logits = slots[:, 0], logits[:, 0]

        seen = self.semantic_mask(semantic_logits)
        start = self._sample_instances(noise)
        instance_slots, instance_logits = self._iterate(start, keys, values, seen, iterations)
        return semantic_slots, semantic_logits, instance_slots, instance_logits

    def semantic_mask(self, logits: Tensor) -> Tensor:
        """Which positions the instances of each semantic see: logits `[B,N,L]` to bool."""
        if self.config.semantic_mask == "softmax>0.5":
            return logits.detach().softmax(dim=1) > SOFTMAX_THRESHOLD
        return logits.detach() > LOGIT_THRESHOLD

    def _sample_instances(self, noise: Tensor) -> Tensor:
        if self.config.sampling == "detached":
            return self.slots_mu.detach() + self.slots_sigma.detach().exp() * noise
        return self.slots_mu + self.slots_sigma.exp() * noise

    def _iterate(
        self, start: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, iterations: int
    ) -> tuple[Tensor, Tensor]:
        """Refine slots `[B,G,P,D]`; returns them and the last iteration's logits `[B,G,P,L]`."""
        if self.config.gradient == "full":
            slots = start
            for _ in range(iterations - 1):
                slots, _ = self._step(slots, keys, values, mask, return_logits=False)
        else:
            # Only the last iteration and the initial slots get gradients: no graph before it.
            with torch.no_grad():
                slots = start
                for _ in range(iterations - 1):
                    slots, _ = self._step(slots, keys, values, mask, return_logits=False)
                moved = slots - start
            slots = moved + start
        slots, logits = self._step(slots, keys, values, mask, return_logits=True)
        assert logits is not None
        return slots, logits

    def _step(
        self, slots: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, return_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        queries = self.project_q(self.norm_slots(slots))
        update, logits = kernels.masked_slot_attention(
            queries,
            keys,
            values,
            mask,
            scale=1 / math.sqrt(slots.shape[-1]),
            epsilon=ATTENTION_EPSILON,
            return_logits=return_logits,
            impl=self.config.impl,
        )
        if self.gru is None:
            slots = slots + update
        else:
            # On CUDA autocast would round the state to 16 bits in each iteration.
            with torch.autocast(slots.device.type, enabled=False):
                flat = self.gru(update.flatten(0, 2).to(slots.dtype), slots.flatten(0, 2))
            slots = flat.unflatten(0, slots.shape[:3])
        return slots + self.mlp(self.norm_pre_ff(slots)), logits


def slot_similarity(semantic_slots: Tensor, instance_slots: Tensor) -> Tensor:
    """Cosine between each instance slot `[B,T,N,P,D]` and its semantic slot `[B,T,N,D]`:
    `[B,T,N,P]`.
    """
    return F.cosine_similarity(semantic_slots.unsqueeze(3), instance_slots, dim=-1)
