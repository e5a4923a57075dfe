"""The operations of SMTC: one public face (`ops.py`), the oracle, a plain-torch form, kernels."""

if __name__ != "smtc.kernels":
    raise ImportError(
        f"{__name__!r} is smtc.kernels; run `pip install -e .` and import it from smtc"
    )

from .dispatch import register_operators

# Before the public functions: importing a file sets the package's attribute of its name.
register_operators()

from .ops import (  # noqa: E402
    active_negatives,
    assignment,
    correlation_projection,
    instance_consistency,
    mask_losses,
    masked_slot_attention,
    sinkhorn,
    transport_alignment,
)

__all__ = [
    "active_negatives",
    "assignment",
    "correlation_projection",
    "instance_consistency",
    "mask_losses",
    "masked_slot_attention",
    "sinkhorn",
    "transport_alignment",
]
