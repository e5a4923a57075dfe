"""Numbers that show a collapse long before a score does; all stay on the device."""

import math

import torch
from torch import Tensor

from smtc.model import Output


@torch.no_grad()
def diagnose(student: Output, teacher: Output) -> dict[str, Tensor]:
    """Scalars float32 `[]` of one batch.

    `slots_used`: the share of semantic slots that win a position of a clip. `mask_entropy`: of the
    semantic masks at a position, 1 where all slots are equally likely. `agreement`: the share of
    positions where student and teacher have the same winner (views of one crop; by chance 1/N).
    """
    logits = student.semantic_logits.float()  # [B,T,N,L]
    slots = logits.shape[2]
    winners = logits.argmax(2)
    wins = torch.zeros(len(logits), slots, device=logits.device)
    wins.scatter_add_(1, winners.flatten(1), torch.ones_like(winners.flatten(1), dtype=wins.dtype))
    log_masks = logits.log_softmax(2)
    entropy = -(log_masks.exp() * log_masks).sum(2).mean()
    return {
        "slots_used": (wins > 0).float().mean(),
        "mask_entropy": entropy / math.log(slots) if slots > 1 else entropy,
        "agreement": (winners == teacher.semantic_logits.argmax(2)).float().mean(),
    }
