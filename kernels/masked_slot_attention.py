"""masked_slot_attention fused: logits, softmax, mean and their gradients from one read of a frame.

A program owns one frame and a block of its groups, as many as fit in ROWS rows: row = group · SLOTS
+ slot, SLOTS the next power of two of P (missing slots have logit -∞). So the paper's semantic
stage is one program of 16 rows a frame, its instance stage one of 64. It walks over L in tiles:

    S = scale · q Kᵀ + bias    W = (softmax(S) + ε) · mask    s += Σ_L W    U += W V

and U / s at the end is the result, since the mean is linear in W. Where keys are values, `values`
is None and a tile of K serves both products: one read of the frame. Backward recomputes S; it keeps
the inputs, the result U and the row sums s, `[B,G,P]` float32:

    A = W/s    dA = dU Vᵀ    dw = mask · (dA - dU·U) / s
    dS = softmax · (dw - Σ_slots softmax · dw) + dlogits
    dq = scale · dS K    dbias = Σ_L dS    dK = scale · dSᵀ q    dV = Aᵀ dU

Where keys are values dK + dV is summed on the chip and written once. s holds the 1e-8 of masked
groups, so an empty group has A = dw = 0 exactly. All sums have one order on every run. Where the
groups need several programs, their dK and dV go to float32 buffers, which one sum adds.

With 128 frames, D 384, bf16, keys that are values, L = 256 / 1024 / 1500:
* device memory: a stage reads the frames, 25 / 101 / 147 MB, once forward, and reads and writes
  them once backward. At L 256 both stages write 10 MB of float32 logits, if asked for, and move 16
  MB of queries and updates: 76 MB forward, 18 µs at 4.3 TB/s.
* FLOP of both stages: 4 / 16 / 24 G forward, 10 / 40 / 59 G backward; at L 256 5 and 13 µs at
  790 TFLOP/s, less than the bytes need. So the next tile must be under way while one is worked on.
* registers with 64 rows and 8 warps: the accumulators 64 x 384 fp32 take 96 a thread, as three
  blocks of 128 (not 512). Hopper gives both warp groups all of a tile of S: 64 rows by 32 positions
  are 16 a thread, dA as many. Backward spills up to 248 bytes with 32 positions, mostly addresses
  that stay the same from tile to tile, stored once before the loop; with 64 it spills over 400.
* shared memory: q and dU 49 KB each, a tile of 32 positions 25 KB a stage.
* Hopper's warp group products need 64 rows on the left. Transposed (TURNED), U is `[128,rows]` and
  dK `[128,32]`, so they have these with 16 slots and tiles of 32 positions too; only S and dA of
  the semantic stage, 16 rows, are left to the older instruction. sm_80 keeps all upright: a tile
  that is read both ways is not loaded ahead there.
* 128 programs, one a multiprocessor of an H200 (132). Fewer frames leave some of it idle.

Wider frames than WIDTH_BLOCKS blocks take more programs, each of which computes S and dA anew, from
all of D. Products of two 16-bit tensors of one dtype run in it, which is exact up to the float32
accumulation; two dtypes meet in float32. W, A and dS become bfloat16 where they meet bfloat16: it
has float32's range. float16 would lose weights near ε = 1e-8 and small gradients: there these
products are float32, as three TF32 ones. float32 and float16 are made to be right rather than fast:
a gradient at D 384 takes 6 or 12 programs a frame.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import eager, tuning
from .launching import launch
from .registration import register
from .triton_helpers import dot, rounded

# Elements of all accumulators of one program: 96 registers a thread with 8 warps.
ACCUMULATED = 64 * 384


@triton.jit
def _product(a, b, accumulator):
    """`accumulator + a·b`; operands of two dtypes meet in float32."""
    if a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return dot(a, b, accumulator)


@triton.jit
def _operand(value, first, second):
    """The float32 `value` as a factor of tiles of `second`, which met those of `first`: bfloat16
    where both are. float16 has no room for ε, nor for small gradients: there it stays float32.
    """
    if first.dtype.element_ty == tl.bfloat16 and second.dtype.element_ty == tl.bfloat16:
        value = rounded(value, second)
    return value


@triton.jit
def _block(pointer, offset, exists, block, stride, width, WIDTH: tl.constexpr):
    """Column block `block` of the rows at `offset`, zero where there is none."""
    column = block * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
    return tl.load(
        pointer + offset[:, None] + column[None, :] * stride,
        mask=exists[:, None] & (column < width)[None, :],
        other=0.0,
    )


@triton.jit
def _blocks(
    pointer, offset, exists, first, stride, width, WIDTH: tl.constexpr, WIDTH_BLOCKS: tl.constexpr
):
    """A program's own column blocks, those from `first`."""
    blocks = ()
    for block in tl.static_range(WIDTH_BLOCKS):
        blocks += (_block(pointer, offset, exists, first + block, stride, width, WIDTH),)
    return blocks


@triton.jit
def _add_others(
    scores, x, x_offset, x_exists, x_column, y, y_offset, y_exists, y_column, width, first,
    WIDTH: tl.constexpr, WIDTH_BLOCKS: tl.constexpr,
):  # fmt: skip
    """`scores + x·yᵀ` over the column blocks of other programs."""
    blocks = tl.cdiv(width, WIDTH)
    for place in range(0, blocks - tl.minimum(WIDTH_BLOCKS, blocks - first)):
        block = place + tl.where(place >= first, WIDTH_BLOCKS, 0)
        left = _block(x, x_offset, x_exists, block, x_column, width, WIDTH)
        right = _block(y, y_offset, y_exists, block, y_column, width, WIDTH)
        scores = _product(left, tl.trans(right), scores)
    return scores


@triton.jit
def _biased(scores, bias, frame, group, slot, exists, scale, b_batch, b_group, b_slot):
    """The logits of the products."""
    scores *= scale
    if bias is not None:
        place = bias + frame * b_batch + group * b_group + slot * b_slot
        scores += tl.load(place, mask=exists, other=0.0).to(tl.float32)[:, None]
    return scores


@triton.jit
def _nothing(ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    """Zeros for `_turned_product`."""
    if TURNED:
        return tl.zeros([COLUMNS, ROWS], tl.float32)
    else:
        return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _turned_product(a, b, accumulator, TURNED: tl.constexpr):
    """`accumulator + a·b`, and if TURNED the transpose of both."""
    if TURNED:
        return _product(tl.trans(b), tl.trans(a), accumulator)
    else:
        return _product(a, b, accumulator)


@triton.jit
def _upright(value, TURNED: tl.constexpr):
    """A result of `_turned_product` as it is stored."""
    if TURNED:
        return tl.trans(value)
    else:
        return value


@triton.jit
def _softmax(logits, slots, GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Softmax over the first `slots` of SLOTS rows a group: `[GROUPS,SLOTS,BLOCK]`."""
    logits = tl.reshape(logits, [GROUPS, SLOTS, BLOCK])
    slot = tl.arange(0, SLOTS)[None, :, None]
    logits = tl.where(slot < slots, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1, keep_dims=True))
    return weights / tl.sum(weights, 1, keep_dims=True)


@triton.jit
def _counted(
    mask, frame, position, groups, positions, m_batch, m_group, m_position, GROUPS: tl.constexpr
):
    """The mask's numbers at `position` as `[GROUPS,1,BLOCK]`; zero beyond the last position."""
    if mask is not None:
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS).to(tl.int64)
        counted = tl.load(
            mask + frame * m_batch + group[:, None] * m_group + position[None, :] * m_position,
            mask=(group < groups)[:, None] & (position < positions)[None, :],
            other=0,
        )
    else:
        counted = (position < positions)[None, :]
    return counted.to(tl.float32)[:, None, :]


@triton.jit
def _attend(
    queries, keys, values, mask, bias, updates, logits, sums,
    groups, slots, positions, width, scale, epsilon, floor,
    q_batch, q_group, q_slot, q_column, k_batch, k_position, k_column,
    v_batch, v_position, v_column, m_batch, m_group, m_position, b_batch, b_group, b_slot,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_BLOCKS: tl.constexpr, WHOLE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Frame `program_id(0)`, block `program_id(1)` of its groups; of the updates the column blocks
    `program_id(2)`, which are all of them if WHOLE. Without `values` the keys are the values.
    """
    frame = tl.program_id(0).to(tl.int64)
    first = tl.program_id(2) * WIDTH_BLOCKS
    row = tl.arange(0, GROUPS * SLOTS).to(tl.int64)
    group, slot = tl.program_id(1) * GROUPS + row // SLOTS, row % SLOTS
    exists = (group < groups) & (slot < slots)
    flat = (frame * groups + group) * slots + slot
    queries += frame * q_batch
    keys += frame * k_batch
    if values is not None:
        values += frame * v_batch
    q_offset = group * q_group + slot * q_slot
    query = _blocks(queries, q_offset, exists, first, q_column, width, WIDTH, WIDTH_BLOCKS)
    results = ()
    for _ in tl.static_range(WIDTH_BLOCKS):
        results += (_nothing(GROUPS * SLOTS, WIDTH, TURNED),)
    total = tl.zeros([GROUPS, SLOTS], tl.float32)
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = position < positions
        k_offset = position * k_position
        tiles = _blocks(keys, k_offset, inside, first, k_column, width, WIDTH, WIDTH_BLOCKS)
        score = tl.zeros([GROUPS * SLOTS, BLOCK], tl.float32)
        for block in tl.static_range(WIDTH_BLOCKS):
            score = _product(query[block], tl.trans(tiles[block]), score)
        if not WHOLE:
            score = _add_others(
                score, queries, q_offset, exists, q_column, keys, k_offset, inside, k_column,
                width, first, WIDTH, WIDTH_BLOCKS,
            )  # fmt: skip
        score = _biased(score, bias, frame, group, slot, exists, scale, b_batch, b_group, b_slot)
        if logits is not None:
            tl.store(
                logits + flat[:, None] * positions + position[None, :],
                score,
                mask=exists[:, None] & inside[None, :] & (first == 0),
            )
        counted = _counted(
            mask, frame, position, groups, positions, m_batch, m_group, m_position, GROUPS
        )
        weights = (_softmax(score, slots, GROUPS, SLOTS, BLOCK) + epsilon) * counted
        total += tl.sum(weights, 2)
        weights = tl.reshape(weights, [GROUPS * SLOTS, BLOCK])
        if values is not None:
            tiles = _blocks(
                values, position * v_position, inside, first, v_column, width, WIDTH, WIDTH_BLOCKS
            )
            weights = _operand(weights, values, values)
        else:
            weights = _operand(weights, keys, keys)
        updated = ()
        for block in tl.static_range(WIDTH_BLOCKS):
            updated += (_turned_product(weights, tiles[block], results[block], TURNED),)
        results = updated
    total = tl.reshape(total, [GROUPS * SLOTS]) + floor
    tl.store(sums + flat, total, mask=exists & (first == 0))
    for block in tl.static_range(WIDTH_BLOCKS):
        column = (first + block) * WIDTH + tl.arange(0, WIDTH)
        tl.store(
            updates + flat[:, None] * width + column[None, :],
            rounded(_upright(results[block], TURNED) / total[:, None], updates),
            mask=exists[:, None] & (column < width)[None, :],
        )


@triton.jit
def _attend_backward(
    queries, keys, values, mask, bias, updates, sums, grad, grad_logits,
    grad_queries, grad_keys, grad_values, grad_bias,
    groups, slots, positions, width, scale, epsilon,
    q_batch, q_group, q_slot, q_column, k_batch, k_position, k_column,
    v_batch, v_position, v_column, m_batch, m_group, m_position, b_batch, b_group, b_slot,
    l_batch, l_group, l_slot, l_position,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_BLOCKS: tl.constexpr, WHOLE: tl.constexpr, TURNED: tl.constexpr,
    TURNED_TILES: tl.constexpr,
):  # fmt: skip
    """Programs as in `_attend`. `grad_keys` and `grad_values` are `[group blocks,B,L,D]`; without
    `values` the first is the whole gradient. Gradients that are None are not wanted.
    """
    SHARED: tl.constexpr = values is None
    frame = tl.program_id(0).to(tl.int64)
    first = tl.program_id(2) * WIDTH_BLOCKS
    row = tl.arange(0, GROUPS * SLOTS).to(tl.int64)
    group, slot = tl.program_id(1) * GROUPS + row // SLOTS, row % SLOTS
    exists = (group < groups) & (slot < slots)
    flat = (frame * groups + group) * slots + slot
    part = tl.program_id(1) * tl.num_programs(0).to(tl.int64) + frame
    queries += frame * q_batch
    keys += frame * k_batch
    if SHARED:
        values = keys
    else:
        values += frame * v_batch
    q_offset = group * q_group + slot * q_slot
    g_offset = flat * width
    # The mean slope of a row, Σ_l A dA = grad · updates.
    mean = tl.zeros([GROUPS * SLOTS], tl.float32)
    for place in range(0, tl.cdiv(width, WIDTH)):
        given = _block(grad, g_offset, exists, place, 1, width, WIDTH).to(tl.float32)
        update = _block(updates, g_offset, exists, place, 1, width, WIDTH).to(tl.float32)
        mean += tl.sum(given * update, 1)
    total = tl.load(sums + flat, mask=exists, other=1.0)
    mean = tl.reshape(mean, [GROUPS, SLOTS, 1])
    share = tl.reshape(1 / total, [GROUPS, SLOTS, 1])
    query = _blocks(queries, q_offset, exists, first, q_column, width, WIDTH, WIDTH_BLOCKS)
    grads = _blocks(grad, g_offset, exists, first, 1, width, WIDTH, WIDTH_BLOCKS)
    results = ()
    for _ in tl.static_range(WIDTH_BLOCKS):
        results += (_nothing(GROUPS * SLOTS, WIDTH, TURNED),)
    bias_sum = tl.zeros([GROUPS * SLOTS], tl.float32)
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = position < positions
        k_offset = position * k_position
        tiles = _blocks(keys, k_offset, inside, first, k_column, width, WIDTH, WIDTH_BLOCKS)
        v_offset = position * v_position
        if SHARED:
            value_tiles = tiles
        else:
            value_tiles = _blocks(
                values, v_offset, inside, first, v_column, width, WIDTH, WIDTH_BLOCKS
            )
        score = tl.zeros([GROUPS * SLOTS, BLOCK], tl.float32)
        slope = tl.zeros([GROUPS * SLOTS, BLOCK], tl.float32)
        # In turn: two loops one after the other spill twice as many registers.
        for block in tl.static_range(WIDTH_BLOCKS):
            score = _product(query[block], tl.trans(tiles[block]), score)
            slope = _product(grads[block], tl.trans(value_tiles[block]), slope)
        if not WHOLE:
            score = _add_others(
                score, queries, q_offset, exists, q_column, keys, k_offset, inside, k_column,
                width, first, WIDTH, WIDTH_BLOCKS,
            )  # fmt: skip
            slope = _add_others(
                slope, grad, g_offset, exists, 1, values, v_offset, inside, v_column,
                width, first, WIDTH, WIDTH_BLOCKS,
            )  # fmt: skip
        score = _biased(score, bias, frame, group, slot, exists, scale, b_batch, b_group, b_slot)
        counted = _counted(
            mask, frame, position, groups, positions, m_batch, m_group, m_position, GROUPS
        )
        weights = _softmax(score, slots, GROUPS, SLOTS, BLOCK)
        slope = (tl.reshape(slope, [GROUPS, SLOTS, BLOCK]) - mean) * (share * counted)
        slope = weights * (slope - tl.sum(weights * slope, 1, keep_dims=True))
        slope = tl.reshape(slope, [GROUPS * SLOTS, BLOCK])
        attention = tl.reshape((weights + epsilon) * (share * counted), [GROUPS * SLOTS, BLOCK])
        if grad_logits is not None:
            from_logits = grad_logits + frame * l_batch + group * l_group + slot * l_slot
            slope += tl.load(
                from_logits[:, None] + position[None, :] * l_position,
                mask=exists[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
        bias_sum += tl.sum(slope, 1)
        slope = _operand(slope * scale, queries, keys)
        attention = _operand(attention, grad, values)
        updated = ()
        for block in tl.static_range(WIDTH_BLOCKS):
            if grad_queries is not None:
                updated += (_turned_product(slope, tiles[block], results[block], TURNED),)
            column = (first + block) * WIDTH + tl.arange(0, WIDTH)
            target = (part * positions + position)[:, None] * width + column[None, :]
            there = inside[:, None] & (column < width)[None, :]
            tile = _nothing(BLOCK, WIDTH, TURNED_TILES)
            if grad_values is not None or SHARED:
                tile = _turned_product(tl.trans(attention), grads[block], tile, TURNED_TILES)
            if grad_values is not None:
                value = _upright(tile, TURNED_TILES)
                tl.store(grad_values + target, rounded(value, grad_values), mask=there)
                tile = _nothing(BLOCK, WIDTH, TURNED_TILES)
            if grad_keys is not None:
                tile = _turned_product(tl.trans(slope), query[block], tile, TURNED_TILES)
                key = _upright(tile, TURNED_TILES)
                tl.store(grad_keys + target, rounded(key, grad_keys), mask=there)
        if grad_queries is not None:
            results = updated
    if grad_bias is not None:
        tl.store(grad_bias + flat, rounded(bias_sum, grad_bias), mask=exists & (first == 0))
    if grad_queries is not None:
        for block in tl.static_range(WIDTH_BLOCKS):
            column = (first + block) * WIDTH + tl.arange(0, WIDTH)
            tl.store(
                grad_queries + flat[:, None] * width + column[None, :],
                rounded(_upright(results[block], TURNED), grad_queries),
                mask=exists[:, None] & (column < width)[None, :],
            )


def _plan(
    kernel: str, queries: Tensor, keys: Tensor, values: Tensor | None, sums: Tensor
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and options of a kernel."""
    batch, groups, slots, width = queries.shape
    given = (queries, keys, keys if values is None else values)
    narrow = all(tensor.dtype == torch.bfloat16 for tensor in given)
    padded = triton.next_power_of_2(slots)
    # Anything but bfloat16 has float32 operands somewhere, as large as the float32 sums'.
    chosen = tuning.options(
        f"masked_slot_attention.{kernel}", keys if narrow else sums, groups * padded
    )
    most = chosen.pop("ROWS")
    together = max(1, 16 // padded, min(triton.next_power_of_2(groups), most // padded))
    rows = together * padded
    # Two tiles instead of one; more slots than a program is made for.
    shrunk = max(1, rows // most)
    block = max(16, chosen["BLOCK"] // (shrunk if values is None else 2 * shrunk))
    columns = max(16, min(chosen["WIDTH"] // shrunk, triton.next_power_of_2(width)))
    blocks = triton.cdiv(width, columns)
    fitting = min(chosen["WIDTH_BLOCKS"], ACCUMULATED // (rows * columns))
    programs = triton.cdiv(blocks, max(1, fitting))
    own = triton.cdiv(blocks, programs)
    programs = triton.cdiv(blocks, own)
    options = {
        "GROUPS": together, "SLOTS": padded, "BLOCK": block, "WIDTH": columns,
        "WIDTH_BLOCKS": own, "WHOLE": programs == 1,
    }  # fmt: skip
    return (batch, triton.cdiv(groups, together), programs), chosen | options


def _floor(mask: Tensor | None) -> float:
    """What is added to the row sums: an empty group divides by it."""
    return 0.0 if mask is None else 1e-8


def _strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if tensor is None else tensor.stride()


def _forward(
    queries: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None, bias: Tensor | None,
    scale: float, epsilon: float, return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Updates `[B,G,P,D]`, logits `[B,G,P,L]` (empty if not asked for), row sums `[B,G,P]`."""
    groups, slots, width = queries.shape[1:]
    positions = keys.shape[1]
    updates, logits, sums = _fake(queries, keys, values, mask, bias, scale, epsilon, return_logits)
    grid, options = _plan("forward", queries, keys, values, sums)
    launch(
        _attend, grid, queries, keys, values, mask, bias,
        updates, logits if return_logits else None, sums,
        groups, slots, positions, width, scale, epsilon, _floor(mask),
        *queries.stride(), *keys.stride(), *_strides(values, 3), *_strides(mask, 3),
        *_strides(bias, 3),
        **options,
        flops=2 * sums.numel() * positions * width * (1 + grid[2]),
    )  # fmt: skip
    return updates, logits, sums


def _backward(
    grad: Tensor, grad_logits: Tensor | None, queries: Tensor, keys: Tensor, values: Tensor | None,
    mask: Tensor | None, bias: Tensor | None, updates: Tensor, sums: Tensor, scale: float,
    epsilon: float, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys, values and bias; those not `wanted` are empty."""
    groups, slots, width = queries.shape[1:]
    positions = keys.shape[1]
    grads = _fake_backward(
        grad, grad_logits, queries, keys, values, mask, bias, updates, sums, scale, epsilon, wanted
    )
    grid, options = _plan("backward", queries, keys, values, sums)
    parts = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    if grid[1] > 1:
        for place in (1, 2):
            if wanted[place]:
                shape = (grid[1], *keys.shape)
                parts[place] = keys.new_empty(shape, dtype=torch.float32)
    launch(
        _attend_backward, grid, queries, keys, values, mask, bias, updates, sums, grad.contiguous(),
        grad_logits, *parts, groups, slots, positions, width, scale, epsilon,
        *queries.stride(), *keys.stride(), *(keys if values is None else values).stride(),
        *_strides(mask, 3), *_strides(bias, 3), *_strides(grad_logits, 4),
        **options,
        flops=2 * sums.numel() * positions * width * (3 + 2 * grid[2]),
    )  # fmt: skip
    for place in (1, 2):
        part = parts[place]
        if grid[1] > 1 and part is not None:
            grads[place].copy_(part.sum(0))
    return grads


def _plain(
    queries: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None, bias: Tensor | None,
    scale: float, epsilon: float, return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_forward`, in plain torch."""
    updates, logits = eager.masked_slot_attention(
        queries, keys, keys if values is None else values, mask,
        scale=scale, epsilon=epsilon, logit_bias=bias,
    )  # fmt: skip
    assert logits is not None
    weights = torch.softmax(logits, 2) + epsilon
    if mask is not None:
        weights = weights * mask[:, :, None]
    sums = weights.sum(-1) + _floor(mask)
    return updates, logits if return_logits else logits.new_empty(0), sums


def _plain_backward(
    grad: Tensor, grad_logits: Tensor | None, queries: Tensor, keys: Tensor, values: Tensor | None,
    mask: Tensor | None, bias: Tensor | None, updates: Tensor, sums: Tensor, scale: float,
    epsilon: float, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_backward`, in plain torch."""
    query, key, given = queries.float(), keys.float(), grad.float()
    value = key if values is None else values.float()
    logits = scale * torch.einsum("bgpd,bld->bgpl", query, key)
    if bias is not None:
        logits = logits + bias[..., None].float()
    weights = torch.softmax(logits, 2)
    share = 1 / sums[..., None]
    if mask is not None:
        share = share * mask[:, :, None].float()
    mean = (given * updates.float()).sum(-1, keepdim=True)
    slope = (torch.einsum("bgpd,bld->bgpl", given, value) - mean) * share
    slope = weights * (slope - (weights * slope).sum(2, keepdim=True))
    if grad_logits is not None:
        slope = slope + grad_logits.float()
    grad_value = torch.einsum("bgpl,bgpd->bld", (weights + epsilon) * share, given)
    grad_key = scale * torch.einsum("bgpl,bgpd->bld", slope, query)
    grads = _fake_backward(
        grad, grad_logits, queries, keys, values, mask, bias, updates, sums, scale, epsilon, wanted
    )
    if wanted[0]:
        grads[0].copy_(scale * torch.einsum("bgpl,bld->bgpd", slope, key))
    if wanted[1]:
        grads[1].copy_(grad_key + grad_value if values is None else grad_key)
    if wanted[2]:
        grads[2].copy_(grad_value)
    if wanted[3]:
        grads[3].copy_(slope.sum(-1))
    return grads


def _fake(
    queries: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None, bias: Tensor | None,
    scale: float, epsilon: float, return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, positions = queries.shape[:3], keys.shape[1]
    return (
        (keys if values is None else values).new_empty(queries.shape),
        queries.new_empty((*rows, positions) if return_logits else (0,), dtype=torch.float32),
        queries.new_empty(rows, dtype=torch.float32),
    )


def _fake_backward(
    grad: Tensor, grad_logits: Tensor | None, queries: Tensor, keys: Tensor, values: Tensor | None,
    mask: Tensor | None, bias: Tensor | None, updates: Tensor, sums: Tensor, scale: float,
    epsilon: float, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    first, second, third, fourth = (
        tensor.new_empty(tensor.shape) if want and tensor is not None else sums.new_empty(0)
        for tensor, want in zip((queries, keys, values, bias), wanted, strict=True)
    )
    return first, second, third, fourth


_operator = register("masked_slot_attention", _forward, _plain, _fake)
_operator_backward = register(
    "masked_slot_attention_backward", _backward, _plain_backward, _fake_backward
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values, mask, bias, ctx.scale, ctx.epsilon, _ = inputs
    updates, _, sums = output
    ctx.save_for_backward(queries, keys, values, mask, bias, updates, sums)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_logits: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    updates = ctx.saved_tensors[5]
    grad = torch.zeros_like(updates) if grad is None else grad
    needed = ctx.needs_input_grad
    wanted = [needed[0], needed[1], needed[2], needed[4]]
    grads = _operator_backward(
        grad, grad_logits, *ctx.saved_tensors, ctx.scale, ctx.epsilon, wanted
    )
    first, second, third, fourth = (
        value if want else None for value, want in zip(grads, wanted, strict=True)
    )
    return first, second, third, None, fourth, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


def masked_slot_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    epsilon: float,
    logit_bias: Tensor | None = None,
    return_logits: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The operation of `ops.py`, fused; `values` that are `keys` are read once."""
    mask = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
    updates, logits, _ = _operator(
        queries, keys, None if values is keys else values, mask, logit_bias,
        float(scale), float(epsilon), return_logits,
    )  # fmt: skip
    return updates, logits if return_logits else None
