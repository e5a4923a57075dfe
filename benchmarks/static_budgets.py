"""What `bench static` allows a kernel: the spills listed here, and the shared memory there is."""

from typing import NamedTuple

from smtc.kernels.aot import KIB, SHARED_PER_MULTIPROCESSOR

MOST_SPILL_BYTES = 256
MOST_SHARED_BYTES = {name: size - KIB for name, size in SHARED_PER_MULTIPROCESSOR.items()}
"""What a program can have: 163 KiB on sm_80, 227 KiB on sm_90 and sm_100."""

# sm_80's rows of the launch table also serve sm_86, sm_89 and sm_120, which have 99 KiB.
SHARED_BYTES = MOST_SHARED_BYTES | {"sm_80": 99 * KIB}

_ADDRESSES = "addresses and factors that stay the same, stored once before the loop over tiles"
_RARE = "float32 is made to be right rather than fast; stored once before the loop over tiles"
_ENDS = "stored and loaded once a program, outside loops"

SPILLS = {
    ("masked_slot_attention", "_attend_backward", "sm_90", "bf16"): (256, _ADDRESSES),
    ("masked_slot_attention", "_attend_backward", "sm_100", "bf16"): (256, _ADDRESSES),
    ("masked_slot_attention", "_attend", "sm_90", "fp32"): (256, _RARE),
    ("masked_slot_attention", "_attend_backward", "sm_90", "fp32"): (192, _RARE),
    ("transport_alignment", "whole", "sm_80", "bf16"): (32, _ADDRESSES),
    ("transport_alignment", "whole", "sm_80", "fp32"): (128, _RARE),
    ("transport_alignment", "whole", "sm_90", "bf16"): (32, _ADDRESSES),
    ("transport_alignment", "whole", "sm_90", "fp32"): (192, _RARE),
    ("mask_losses", "_frame_losses", "sm_100", "bf16"): (32, _ENDS),
    ("mask_losses", "_gradient", "sm_100", "bf16"): (32, _ENDS),
}
"""Bytes a thread, and why, by operation, kernel, architecture and dtype of the case. Somewhat more
than needed: releases of Triton differ by a few registers."""


class Budget(NamedTuple):
    """Bytes of spills a thread and of shared memory a program; `reason` of the spills."""

    spill_bytes: int
    shared_bytes: int
    reason: str = ""


def budget(op: str, kernel: str, architecture: str, dtype: str) -> Budget:
    """What a kernel may take."""
    spills, reason = SPILLS.get((op, kernel, architecture, dtype), (0, ""))
    return Budget(spills, SHARED_BYTES[architecture], reason)
