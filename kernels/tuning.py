"""The launch configurations: a committed table, so that every process gets the same bits.

Timing at run time would choose differently from process to process, and with it the order of
summation. `smtc bench tune` measures the candidates on a GPU and prints the table anew.

An architecture without rows uses those of the nearest older one, so the rows of sm_80 stay within
the 99 KiB of shared memory that sm_86, sm_89 and sm_120 have.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .launching import architecture

ANY = 2**62


class Row(NamedTuple):
    """Options for one architecture, the bits of the inputs' elements and sizes up to `largest`."""

    architecture: str
    bits: int
    largest: int
    options: Mapping[str, int]


def options(kernel: str, tensor: Tensor, size: int) -> dict[str, int]:
    """Block sizes, `num_warps` and `num_stages` of a kernel.

    Args:
        kernel: a key of `TABLE`.
        tensor: the input whose device and element size decide.
        size: what the size buckets of this kernel count: a number of positions, unless its section
            of the table says otherwise.
    """
    rows = TABLE[kernel]
    wanted = architecture(tensor)
    known = {row.architecture for row in rows}
    if wanted not in known:
        older = [name for name in known - {"interpreter"} if _number(name) <= _number(wanted)]
        wanted = max(older, key=_number)
    bits = 16 if tensor.dtype in (torch.bfloat16, torch.float16) else 32
    for row in rows:
        if row.architecture == wanted and row.bits == bits and size <= row.largest:
            return dict(row.options)
    raise LookupError(f"the launch table has no row for {kernel}, {wanted}, {bits} bits, {size}")


def _number(name: str) -> int:
    return int(name.removeprefix("sm_"))


def _rows(name: str, bits: int, *buckets: tuple[int, dict[str, int]]) -> list[Row]:
    return [Row(name, bits, largest, choice) for largest, choice in buckets]


def _interpreted(**choice: int) -> list[Row]:
    """One row for tests in the interpreter, whose cost follows the number of programs."""
    return [Row("interpreter", bits, ANY, choice) for bits in (16, 32)]


def _products(
    rows: int, inner: int, width: int, columns: int, *, warps: int, stages: int
) -> dict[str, int]:
    """Options of the chained products of correlation_projection."""
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_INNER": inner,
        "BLOCK_WIDTH": width,
        "BLOCK_COLUMNS": columns,
        "num_warps": warps,
        "num_stages": stages,
    }


def _slots(rows: int, block: int, width: int, *, warps: int, stages: int) -> dict[str, int]:
    """Options of masked_slot_attention: slots a program, positions a tile, width a product."""
    return {
        "ROWS": rows,
        "BLOCK": block,
        "WIDTH": width,
        "num_warps": warps,
        "num_stages": stages,
    }


TABLE: dict[str, list[Row]] = {
    # --- correlation_projection: size counts the rows of a result
    "correlation_projection": [
        *_interpreted(BLOCK_ROWS=128, BLOCK_INNER=128, BLOCK_WIDTH=128, BLOCK_COLUMNS=128),
        *_rows("sm_80", 16, (ANY, _products(64, 64, 64, 128, warps=8, stages=2))),
        *_rows("sm_80", 32, (ANY, _products(32, 32, 32, 128, warps=8, stages=2))),
        *_rows("sm_90", 16, (ANY, _products(64, 64, 64, 128, warps=8, stages=3))),
        *_rows("sm_90", 32, (ANY, _products(32, 32, 32, 128, warps=8, stages=2))),
        *_rows("sm_100", 16, (ANY, _products(128, 64, 64, 128, warps=8, stages=3))),
        *_rows("sm_100", 32, (ANY, _products(32, 32, 32, 128, warps=8, stages=2))),
    ],
    # --- masked_slot_attention: size counts the slots of all groups, padded
    "masked_slot_attention.forward": [
        *_interpreted(ROWS=64, BLOCK=128, WIDTH=128),
        *_rows("sm_80", 16, (ANY, _slots(64, 32, 128, warps=8, stages=2))),
        *_rows("sm_80", 32, (ANY, _slots(32, 32, 64, warps=8, stages=1))),
        *_rows("sm_90", 16, (ANY, _slots(64, 64, 128, warps=8, stages=2))),
        *_rows("sm_90", 32, (ANY, _slots(32, 32, 64, warps=8, stages=1))),
        *_rows("sm_100", 16, (ANY, _slots(64, 64, 128, warps=8, stages=2))),
        *_rows("sm_100", 32, (ANY, _slots(32, 32, 64, warps=8, stages=1))),
    ],
    "masked_slot_attention.backward": [
        *_interpreted(ROWS=64, BLOCK=128, WIDTH=128),
        *_rows("sm_80", 16, (ANY, _slots(128, 32, 128, warps=8, stages=1))),
        *_rows("sm_80", 32, (ANY, _slots(128, 32, 64, warps=8, stages=1))),
        *_rows("sm_90", 16, (ANY, _slots(128, 64, 128, warps=8, stages=2))),
        *_rows("sm_90", 32, (ANY, _slots(128, 32, 64, warps=8, stages=1))),
        *_rows("sm_100", 16, (ANY, _slots(128, 64, 128, warps=8, stages=2))),
        *_rows("sm_100", 32, (ANY, _slots(128, 32, 64, warps=8, stages=1))),
    ],
    # --- sinkhorn
    # --- transport_alignment
    # --- mask_losses
    # --- assignment, instance_consistency
    # assignment: size is P. Rows of larger P hold 2^P sums a problem.
    "assignment": [
        *(
            row
            for bits in (16, 32)
            for row in _rows("interpreter", bits, (4, {"BLOCK": 256}), (ANY, {"BLOCK": 64}))
        ),
        *(
            row
            for bits in (16, 32)
            for row in _rows(
                "sm_80",
                bits,
                (4, {"BLOCK": 64, "num_warps": 4}),
                (6, {"BLOCK": 16, "num_warps": 4}),
                (ANY, {"BLOCK": 4, "num_warps": 4}),
            )
        ),
    ],
}
