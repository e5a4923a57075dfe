"""correlation_projection as one fused kernel: the correlation never leaves the chip.

Forward and every gradient are one form, a chain of two products summed over some frames:

    out[o] = Σ_{b in segment o} (X_b Y_bᵀ) Z_b          X [rows,K]  Y [inner,K]  Z [inner,columns]

    out  [B,L,E]   X = query[b]         Y = reference[i_b]   Z = weightᵀ        segment {o}
    dQ   [B,L,D]   X = grad[b]          Y = weightᵀ          Z = reference[i_b] segment {o}
    dR   [R,M,D]   X = weightᵀ          Y = grad[b]          Z = query[b]       {b : i_b = o}
    dWᵀ  [M,E]     X = reference[i_b]   Y = query[b]         Z = grad[b]        all b, in parts

with i = index; the letters are those of `ops.py`. A program owns `BLOCK_ROWS` rows of one `out[o]`
and up to three column blocks. It walks over the inner dimension in tiles: a tile `X Yᵀ` is summed
over K in float32, rounded to the operands' dtype (as eager's correlation is), multiplied with Z's
tile and forgotten. So nothing of size L×M exists, the reference is read where it lies (no gathered
copy), and sums have one order on every run: dR walks over the frames of its reference in ascending
order, dW over SPLITS parts of the batch, then added.

At B 128, L = M = 256, D = E = 384, bf16, with 64 rows and 64 inner positions a tile (32 on sm_80):
* accumulators 64 x 384 fp32 = 98 KB of registers, 96 a thread with 8 warps; the tile 64 x 64 adds
  16. D = 384 is three blocks of 128, not 512. 128 rows spill on every architecture.
* 512 programs, 4 tiles each. A tile reads X, Y and Z, 49 KB each, from L2: 302 MB in all, 55 µs at
  5.5 TB/s of L2, where the 12.9 GFLOP need 16 µs at 790 TFLOP/s.
* device memory: frames (query and reference are one tensor), out and weight once, 51 MB, 12 µs.
Backward recomputes: 6 products of 2·B·L·M·D FLOP where storing the correlation would need 4.

Where `projects_reference_first` says that `Q (W R)ᵀ` costs less (L > D), forward and backward are
plain matrix products, which have nothing of size L×M either and which cuBLAS does best.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .eager import projects_reference_first
from .launching import launch
from .registration import register
from .triton_helpers import dot, rounded

# Column blocks whose accumulators one program holds: three and a tile fill sm_100's tensor memory.
# Wider results take more programs, each of which computes the correlation anew.
COLUMN_BLOCKS = 3
# Parts of the batch whose weight gradients are summed apart, so that enough programs run.
SPLITS = 32


@triton.jit
def _frame(KIND: tl.constexpr, own, referred):
    """The number of an operand's frame."""
    if KIND == "own":
        return own
    elif KIND == "reference":
        return referred
    else:
        return own * 0  # in the type of a frame's number


@triton.jit
def _chain(
    x, y, z, out, bias, order, segments, index, frames, per_segment, rows, inner, width, columns,
    x_batch, x_row, x_column, y_batch, y_row, y_column, z_batch, z_row, z_column,
    out_batch, out_row,
    X_FRAME: tl.constexpr, Y_FRAME: tl.constexpr, Z_FRAME: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """A block of rows of a result, `program_id(0)`, and column blocks `program_id(1)`.

    Its segment is `order[segments[result] : segments[result + 1]]`, or without them `per_segment`
    frames in a row. {X,Y,Z}_FRAME tell which frame of an operand belongs to frame b: "own" is b,
    "reference" is index[b], "shared" is the only one.
    """
    row = tl.program_id(0) % ROW_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    result = (tl.program_id(0) // ROW_BLOCKS).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_COLUMNS * COLUMN_BLOCKS
    if segments is not None:
        begin = tl.load(segments + result)
        end = tl.load(segments + result + 1)
    else:
        begin = result * per_segment
        end = tl.minimum(begin + per_segment, frames)
    # A tuple, since Triton has no arrays of tiles: each block keeps its own registers.
    sums = ()
    for _ in tl.static_range(COLUMN_BLOCKS):
        sums = sums + (tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32),)
    for place in range(begin, end):
        own = place
        if order is not None:
            own = tl.load(order + place)
        referred = own
        if index is not None:
            referred = tl.load(index + own)
        x_frame = x + _frame(X_FRAME, own, referred) * x_batch
        y_frame = y + _frame(Y_FRAME, own, referred) * y_batch
        z_frame = z + _frame(Z_FRAME, own, referred) * z_batch
        for start in range(0, inner, BLOCK_INNER):
            position = start + tl.arange(0, BLOCK_INNER).to(tl.int64)
            tile = tl.zeros([BLOCK_ROWS, BLOCK_INNER], tl.float32)
            for depth in range(0, width, BLOCK_WIDTH):
                k = depth + tl.arange(0, BLOCK_WIDTH).to(tl.int64)
                left = tl.load(
                    x_frame + row[:, None] * x_row + k[None, :] * x_column,
                    mask=(row < rows)[:, None] & (k < width)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    y_frame + k[:, None] * y_column + position[None, :] * y_row,
                    mask=(k < width)[:, None] & (position < inner)[None, :],
                    other=0.0,
                )
                tile = dot(left, right, tile)
            tile = rounded(tile, z)
            updated = ()
            for block in tl.static_range(COLUMN_BLOCKS):
                column = first_column + block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
                factor = tl.load(
                    z_frame + position[:, None] * z_row + column.to(tl.int64)[None, :] * z_column,
                    mask=(position < inner)[:, None] & (column < columns)[None, :],
                    other=0.0,
                )
                updated = updated + (dot(tile, factor, sums[block]),)
            sums = updated
    target = out + result * out_batch + row[:, None] * out_row
    for block in tl.static_range(COLUMN_BLOCKS):
        column = first_column + block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        total = sums[block]
        if bias is not None:
            total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        tl.store(
            target + column[None, :],
            rounded(total, out),
            mask=(row < rows)[:, None] & (column < columns)[None, :],
        )


class _Operand(NamedTuple):
    """A tensor `[frames, rows, columns]` of the chain, and which of its frames belongs to b."""

    tensor: Tensor
    frame: str


def _start(
    x: _Operand,
    y: _Operand,
    z: _Operand,
    out: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    frames: int,
    segments: tuple[Tensor, Tensor] | int = 1,
) -> Tensor:
    """Fill `out [results, rows, columns]`, contiguous.

    `segments`: frames a result, or the frames in order and where each result's begin.
    """
    results, rows, columns = out.shape
    inner, width = y.tensor.shape[1:]
    chosen = tuning.options("correlation_projection", x.tensor, rows)
    block = min(chosen["BLOCK_COLUMNS"], max(16, triton.next_power_of_2(columns)))
    blocks = min(COLUMN_BLOCKS, triton.cdiv(columns, block))
    # Programs of one result are neighbours: they read the same tiles, from L2.
    row_blocks = triton.cdiv(rows, chosen["BLOCK_ROWS"])
    grid = (results * row_blocks, triton.cdiv(columns, blocks * block))
    order, bounds = (None, None) if isinstance(segments, int) else segments
    # The kernel walks these two without a stride.
    bias, index = (None if given is None else given.contiguous() for given in (bias, index))
    launch(
        _chain, grid, x.tensor, y.tensor, z.tensor, out, bias, order, bounds, index, frames,
        segments if isinstance(segments, int) else 0, rows, inner, width, columns,
        *x.tensor.stride(), *y.tensor.stride(), *z.tensor.stride(), *out.stride()[:2],
        X_FRAME=x.frame, Y_FRAME=y.frame, Z_FRAME=z.frame, ROW_BLOCKS=row_blocks,
        **chosen | {"BLOCK_COLUMNS": block, "COLUMN_BLOCKS": blocks},
        flops=2 * frames * rows * inner * (width * grid[1] + columns),
    )  # fmt: skip
    return out


def reassociates(query: Tensor, reference: Tensor, weight: Tensor) -> bool:
    """Whether plain products in the order `Q (W R)ᵀ` run: above L = D, where they cost less."""
    (batch, positions, width), (references, inner, _) = query.shape, reference.shape
    return positions > width and projects_reference_first(
        batch, positions, references, inner, width, len(weight)
    )


def _forward(
    query: Tensor, reference: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None
) -> Tensor:
    """`[B,L,E]`; all in one dtype."""
    if reassociates(query, reference, weight):
        return _reassociated(query, reference, weight, bias, index)
    out = query.new_empty(*query.shape[:2], len(weight))
    own, source = _Operand(query, "own"), _Operand(reference, "reference")
    shared = _Operand(weight.mT[None], "shared")
    return _start(own, source, shared, out, bias, index, len(query))


def _backward(
    grad: Tensor,
    query: Tensor,
    reference: Tensor,
    weight: Tensor,
    index: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, reference and weight; those not `wanted` are empty."""
    if reassociates(query, reference, weight):
        return _reassociated_backward(grad, query, reference, weight, index, wanted)
    batch = len(query)
    given, own = _Operand(grad, "own"), _Operand(query, "own")
    source, shared = _Operand(reference, "reference"), _Operand(weight.mT[None], "shared")
    grad_query, grad_reference, grad_weight = (query.new_empty(0) for _ in range(3))
    if wanted[0]:
        out = query.new_empty(query.shape)
        grad_query = _start(given, shared, source, out, None, index, batch)
    if wanted[1]:
        out = query.new_empty(reference.shape)
        segments = 1 if index is None else _frames_of_each(index, len(reference))
        grad_reference = _start(shared, given, own, out, None, None, batch, segments)
    if wanted[2]:
        frames = max(1, triton.cdiv(batch, SPLITS))
        parts = query.new_empty(triton.cdiv(batch, frames), *weight.mT.shape, dtype=torch.float32)
        _start(source, own, given, parts, None, index, batch, frames)
        grad_weight = parts.sum(0).to(weight.dtype).mT.contiguous()
    return grad_query, grad_reference, grad_weight


def _frames_of_each(index: Tensor, references: int) -> tuple[Tensor, Tensor]:
    """The frames `[B]` ordered by their reference, and where each reference's begin `[R+1]`."""
    ordered, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(references + 1, device=index.device))


def _reassociated(
    query: Tensor, reference: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None
) -> Tensor:
    """`Q (W R)ᵀ + b`."""
    projection = weight @ reference  # [R,E,D]
    projection = projection if index is None else projection[index]
    out = query @ projection.mT
    return out if bias is None else out.add_(bias)


def _reassociated_backward(
    grad: Tensor,
    query: Tensor,
    reference: Tensor,
    weight: Tensor,
    index: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`, through the gradient of `W R`."""
    grad_query, grad_reference, grad_weight = (query.new_empty(0) for _ in range(3))
    if wanted[0]:
        projection = weight @ reference
        grad_query = grad @ (projection if index is None else projection[index])
    if wanted[1] or wanted[2]:
        grad_projection = grad.mT @ query  # [B,E,D]
        if index is not None:
            # A product instead of scattered additions, whose order would change from run to run.
            owner = torch.arange(len(reference), device=index.device)[:, None] == index  # [R,B]
            flat = owner.to(query.dtype) @ grad_projection.flatten(1)
            grad_projection = flat.unflatten(1, grad_projection.shape[1:])
        if wanted[1]:
            grad_reference = weight.mT @ grad_projection
        if wanted[2]:
            grad_weight = torch.einsum("red,rmd->em", grad_projection, reference)
    return grad_query, grad_reference, grad_weight


def _fake(
    query: Tensor, reference: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None
) -> Tensor:
    return query.new_empty(*query.shape[:2], len(weight))


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    reference: Tensor,
    weight: Tensor,
    index: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (query.shape, reference.shape, weight.shape)
    first, second, third = (
        query.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )
    return first, second, third


# The reassociated order is also the form in plain torch.
_operator = register("correlation_projection", _forward, _reassociated, _fake)
_operator_backward = register(
    "correlation_projection_backward", _backward, _reassociated_backward, _fake_backward
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, reference, weight, _, index = inputs
    ctx.save_for_backward(query, reference, weight, index)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    grads = _operator_backward(grad, *ctx.saved_tensors, wanted)
    first, second, third = (
        value if want else None for value, want in zip(grads, wanted, strict=True)
    )
    grad_bias = grad.sum((0, 1)) if ctx.needs_input_grad[3] else None
    return first, second, third, grad_bias, None


_operator.register_autograd(_differentiate, setup_context=_save)


def correlation_projection(
    query: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
) -> Tensor:
    """The operation of `ops.py`, fused."""
    weight = weight.to(query.dtype)
    bias = None if bias is None else bias.to(query.dtype)
    out: Tensor = _operator(query, reference, weight, bias, index)
    return out
