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
        # sm_120 has the shared memory of sm_86, not that of sm_100.
        newest = 80 if _number(wanted) >= 120 else _number(wanted)
        older = [name for name in known - {"interpreter"} if _number(name) <= newest]
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


def _slots(
    rows: int, block: int, width: int, blocks: int, *, stages: int, **turned: bool
) -> dict[str, int]:
    """Options of masked_slot_attention: most slots a program, positions a tile, width of a product,
    most of these a program, which results are held transposed.
    """
    return {
        "ROWS": rows,
        "BLOCK": block,
        "WIDTH": width,
        "WIDTH_BLOCKS": blocks,
        "TURNED": False,
        "num_warps": 8,
        "num_stages": stages,
        **turned,
    }


def _masks(name: str, *buckets: tuple[int, ...]) -> list[Row]:
    """Rows of mask_losses, alike for 16 and 32 bits: most slots, positions a tile, warps, and
    forward the parts of a tile's product.
    """
    names = ("BLOCK", "num_warps", "PARTS")
    return [
        Row(name, bits, largest, dict(zip(names, choice, strict=False)) | {"num_stages": 3})
        for bits in (16, 32)
        for largest, *choice in buckets
    ]


def _streamed(*buckets: tuple[int, tuple[int, int, int]], **more: int) -> list[Row]:
    """Rows, columns and warps of a tile without products, alike for all architectures and bits."""
    return [
        Row(name, bits, largest, _tile(*tile) | more)
        for name in ("sm_80", "sm_90", "sm_100")
        for bits in (16, 32)
        for largest, tile in buckets
    ]


def _tile(rows: int, columns: int, warps: int) -> dict[str, int]:
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "num_warps": warps, "num_stages": 1}


def _lines(rows: int, width: int, *, warps: int) -> dict[str, int]:
    """Options of transport_alignment's kernels that read whole rows."""
    return {"BLOCK_ROWS": rows, "BLOCK_WIDTH": width, "num_warps": warps, "num_stages": 1}


def _gram(rows: int, columns: int, width: int, *, warps: int, stages: int) -> dict[str, int]:
    """Options of transport_alignment's Gram matrices."""
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": columns,
        "BLOCK_WIDTH": width,
        "num_warps": warps,
        "num_stages": stages,
    }


def _matching(name: str, *buckets: tuple[int, int]) -> list[Row]:
    """Rows of assignment, alike for 16 and 32 bits: largest P, problems a program."""
    return [
        Row(name, bits, largest, {"BLOCK": block, "num_warps": 4, "num_stages": 1})
        for bits in (16, 32)
        for largest, block in buckets
    ]


def _pairs(width: int, difference: int, count: int) -> dict[str, int]:
    """Options of instance_consistency: width of a product and of a difference, flags a step."""
    return {
        "BLOCK_ROWS": 16,
        "BLOCK_WIDTH": width,
        "BLOCK_DIFFERENCE": difference,
        "BLOCK_COUNT": count,
        "num_warps": 4,
        "num_stages": 3,
    }


def _pulls(rows: int, inner: int, width: int) -> dict[str, int]:
    """Options of instance_consistency's gradient."""
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_INNER": inner,
        "BLOCK_WIDTH": width,
        "num_warps": 4,
        "num_stages": 2,
    }


TABLE: dict[str, list[Row]] = {
    # --- correlation_projection: size counts the rows of a result
    "correlation_projection": [
        *_interpreted(BLOCK_ROWS=128, BLOCK_INNER=128, BLOCK_WIDTH=128, BLOCK_COLUMNS=128),
        *_rows("sm_80", 16, (ANY, _products(64, 32, 64, 128, warps=8, stages=3))),
        *_rows("sm_80", 32, (ANY, _products(32, 32, 32, 128, warps=8, stages=2))),
        *_rows("sm_90", 16, (ANY, _products(64, 64, 64, 128, warps=8, stages=3))),
        *_rows("sm_90", 32, (ANY, _products(32, 32, 32, 128, warps=8, stages=2))),
        *_rows("sm_100", 16, (ANY, _products(64, 64, 64, 128, warps=8, stages=3))),
        *_rows("sm_100", 32, (ANY, _products(32, 32, 32, 128, warps=8, stages=3))),
    ],
    # --- masked_slot_attention: size counts the slots of all groups, padded
    "masked_slot_attention.forward": [
        *_interpreted(ROWS=64, BLOCK=128, WIDTH=128, WIDTH_BLOCKS=3, TURNED=False),
        *_rows("sm_80", 16, (ANY, _slots(64, 32, 128, 3, stages=2))),
        *_rows("sm_80", 32, (ANY, _slots(32, 16, 64, 1, stages=1))),
        *_rows(
            "sm_90",
            16,
            (32, _slots(64, 64, 128, 3, stages=3, TURNED=True)),
            (ANY, _slots(64, 32, 128, 3, stages=3, TURNED=True)),
        ),
        *_rows("sm_90", 32, (ANY, _slots(64, 32, 64, 1, stages=1))),
        *_rows(
            "sm_100",
            16,
            (32, _slots(64, 64, 128, 3, stages=3, TURNED=True)),
            (ANY, _slots(64, 32, 128, 3, stages=3, TURNED=True)),
        ),
        *_rows("sm_100", 32, (ANY, _slots(32, 16, 64, 1, stages=1))),
    ],
    "masked_slot_attention.backward": [
        *_interpreted(
            ROWS=64, BLOCK=128, WIDTH=128, WIDTH_BLOCKS=3, TURNED=False, TURNED_TILES=False
        ),
        *_rows(
            "sm_80",
            16,
            (32, _slots(128, 32, 128, 3, stages=2, TURNED_TILES=False)),
            (ANY, _slots(128, 16, 64, 3, stages=2, TURNED_TILES=False)),
        ),
        *_rows("sm_80", 32, (ANY, _slots(64, 16, 32, 1, stages=1, TURNED_TILES=False))),
        *_rows(
            "sm_90",
            16,
            (32, _slots(128, 64, 128, 3, stages=2, TURNED=True, TURNED_TILES=True)),
            (ANY, _slots(128, 32, 128, 3, stages=2, TURNED_TILES=True)),
        ),
        *_rows("sm_90", 32, (ANY, _slots(64, 16, 64, 1, stages=1, TURNED_TILES=False))),
        *_rows(
            "sm_100",
            16,
            (32, _slots(128, 64, 128, 3, stages=2, TURNED=True, TURNED_TILES=True)),
            (ANY, _slots(128, 32, 128, 3, stages=2, TURNED=True, TURNED_TILES=True)),
        ),
        *_rows("sm_100", 32, (ANY, _slots(64, 16, 32, 1, stages=1, TURNED_TILES=False))),
    ],
    # --- sinkhorn: size counts the columns of the cost
    "sinkhorn.rows": [
        *_interpreted(ROWS=64, BLOCK_ROWS=32, BLOCK_COLUMNS=128),
        *_streamed(
            (256, (16, 256, 4)),
            (1024, (8, 1024, 8)),
            (2048, (4, 2048, 16)),
            (ANY, (32, 256, 8)),
            ROWS=64,
        ),
    ],
    "sinkhorn.combine": [
        *_interpreted(BLOCK_ROWS=4, BLOCK_COLUMNS=512),
        *_streamed((ANY, (16, 128, 4))),
    ],
    "sinkhorn.sums": [
        *_interpreted(BLOCK_ROWS=64, BLOCK_COLUMNS=128),
        *_streamed((ANY, (32, 64, 8))),
    ],
    "sinkhorn.tiles": [
        *_interpreted(BLOCK_ROWS=128, BLOCK_COLUMNS=256),
        *_streamed((ANY, (8, 128, 4))),
    ],
    # --- transport_alignment: size counts positions; bits are the features' in measure and build,
    # else those of the pairs' matrix. HELD: elements of the matrix that a program holds at a time.
    "transport_alignment.chunk": [
        *_interpreted(MEBIBYTES=1024),
        *_rows("sm_80", 16, (ANY, {"MEBIBYTES": 512})),
        *_rows("sm_80", 32, (ANY, {"MEBIBYTES": 512})),
    ],
    "transport_alignment.measure": [
        *_interpreted(BLOCK_ROWS=128, BLOCK_WIDTH=16),
        *_rows("sm_80", 16, (ANY, _lines(64, 128, warps=8))),
        *_rows("sm_80", 32, (ANY, _lines(64, 128, warps=8))),
    ],
    "transport_alignment.whole": [
        *_interpreted(BLOCK_ROWS=64, BLOCK_COLUMNS=64, BLOCK_WIDTH=32, HELD=4096),
        *_rows("sm_80", 16, (ANY, _gram(64, 128, 64, warps=8, stages=2) | {"HELD": 8192})),
        *_rows("sm_80", 32, (ANY, _gram(64, 64, 32, warps=8, stages=2) | {"HELD": 4096})),
        *_rows("sm_90", 16, (ANY, _gram(128, 128, 64, warps=8, stages=3) | {"HELD": 8192})),
        *_rows("sm_90", 32, (ANY, _gram(64, 64, 32, warps=8, stages=2) | {"HELD": 4096})),
        *_rows("sm_100", 16, (ANY, _gram(64, 128, 64, warps=8, stages=2) | {"HELD": 8192})),
        *_rows("sm_100", 32, (ANY, _gram(64, 64, 32, warps=8, stages=2) | {"HELD": 4096})),
    ],
    "transport_alignment.build": [
        *_interpreted(BLOCK_ROWS=128, BLOCK_COLUMNS=256, BLOCK_WIDTH=32),
        *_rows("sm_80", 16, (ANY, _gram(128, 128, 64, warps=8, stages=3))),
        *_rows("sm_80", 32, (ANY, _gram(64, 64, 32, warps=8, stages=2))),
        *_rows("sm_90", 16, (ANY, _gram(128, 256, 64, warps=8, stages=3))),
        *_rows("sm_90", 32, (ANY, _gram(64, 64, 32, warps=8, stages=2))),
        *_rows("sm_100", 16, (ANY, _gram(128, 256, 64, warps=8, stages=3))),
        *_rows("sm_100", 32, (ANY, _gram(64, 64, 32, warps=8, stages=2))),
    ],
    "transport_alignment.combine": [
        *_interpreted(BLOCK_COLUMNS=512),
        *_rows("sm_80", 32, (ANY, {"BLOCK_COLUMNS": 256, "num_warps": 4, "num_stages": 1})),
    ],
    "transport_alignment.iterate": [
        *_interpreted(HELD=32768, SPAN=128),
        *_rows("sm_80", 16, (ANY, {"HELD": 8192, "SPAN": 128, "num_warps": 8, "num_stages": 1})),
        *_rows("sm_80", 32, (ANY, {"HELD": 4096, "SPAN": 128, "num_warps": 8, "num_stages": 1})),
    ],
    "transport_alignment.transport": [
        *_interpreted(BLOCK_ROWS=128, BLOCK_COLUMNS=256),
        *_rows("sm_80", 16, (ANY, _tile(128, 64, 8) | {"num_stages": 3})),
        *_rows("sm_80", 32, (ANY, _tile(64, 64, 8) | {"num_stages": 2})),
        *_rows("sm_90", 16, (ANY, _tile(256, 64, 8) | {"num_stages": 3})),
        *_rows("sm_90", 32, (ANY, _tile(64, 64, 8) | {"num_stages": 2})),
        *_rows("sm_100", 16, (ANY, _tile(256, 64, 8) | {"num_stages": 3})),
        *_rows("sm_100", 32, (ANY, _tile(64, 64, 8) | {"num_stages": 2})),
    ],
    "transport_alignment.collect": [
        *_interpreted(BLOCK_COLUMNS=512),
        *_rows("sm_80", 32, (ANY, {"BLOCK_COLUMNS": 64, "num_warps": 4, "num_stages": 1})),
    ],
    # --- mask_losses: size counts the slots; PARTS > 1 pays where a warp's part of a tile is small
    "mask_losses": [
        *_masks("interpreter", (16, 128, 4, 4), (ANY, 64, 4, 1)),
        *_masks("sm_80", (16, 256, 8, 8), (32, 128, 8, 8), (64, 32, 8, 1), (ANY, 16, 8, 1)),
        *_masks("sm_90", (16, 256, 8, 8), (32, 128, 8, 8), (64, 32, 8, 1), (ANY, 16, 8, 1)),
        *_masks("sm_100", (16, 256, 8, 8), (32, 128, 8, 8), (64, 32, 8, 1), (ANY, 16, 8, 1)),
    ],
    "mask_losses.backward": [
        *_interpreted(BLOCK=128),
        *_masks("sm_80", (16, 128, 4), (64, 64, 8), (ANY, 32, 8)),
        *_masks("sm_90", (16, 128, 4), (64, 64, 8), (ANY, 32, 8)),
        *_masks("sm_100", (16, 128, 4), (64, 64, 8), (ANY, 32, 8)),
    ],
    # --- assignment: size is P; instance_consistency: T·P
    "assignment": [
        *_matching("interpreter", (4, 256), (ANY, 64)),
        *_matching("sm_80", (4, 64), (6, 16), (ANY, 4)),
        *_matching("sm_90", (4, 64), (6, 16), (ANY, 4)),
        *_matching("sm_100", (4, 64), (6, 16), (ANY, 4)),
    ],
    "instance_consistency": [
        *_interpreted(**_pairs(128, 128, 32)),
        *_rows("sm_80", 16, (ANY, _pairs(128, 16, 512))),
        *_rows("sm_80", 32, (ANY, _pairs(64, 16, 512))),
        *_rows("sm_90", 16, (ANY, _pairs(128, 16, 512))),
        *_rows("sm_90", 32, (ANY, _pairs(64, 16, 512))),
        *_rows("sm_100", 16, (ANY, _pairs(128, 16, 512))),
        *_rows("sm_100", 32, (ANY, _pairs(64, 16, 512))),
    ],
    "instance_consistency.backward": [
        *_interpreted(**_pulls(16, 16, 128)),
        *_rows("sm_80", 16, (ANY, _pulls(16, 16, 128))),
        *_rows("sm_80", 32, (ANY, _pulls(16, 16, 128))),
        *_rows("sm_90", 16, (ANY, _pulls(16, 16, 128))),
        *_rows("sm_90", 32, (ANY, _pulls(16, 16, 128))),
        *_rows("sm_100", 16, (ANY, _pulls(16, 16, 128))),
        *_rows("sm_100", 32, (ANY, _pulls(16, 16, 128))),
    ],
}
