"""The kernels of transport_alignment: its file says what they are for and their order."""

import triton
import triton.language as tl

from .triton_helpers import dot, rounded

# The score of a place outside the matrix: finite, so that no difference of two is undefined.
NOWHERE = tl.constexpr(-1e30)


@triton.jit
def _place(blocks, frames):
    """What this program works on: a pair's number, one of its `blocks`, its clip and two frames.

    A clip's pairs are (0,1), (0,2), (1,2), (0,3), …: pair t<j has number j(j-1)/2 + t.
    """
    program = tl.program_id(0)
    pair = program // blocks
    pairs = frames * (frames - 1) // 2
    clip = pair // pairs
    earlier = pair % pairs
    later = earlier * 0 + 1
    while earlier >= later:
        earlier -= later
        later += 1
    pair, clip = pair.to(tl.int64), clip.to(tl.int64)
    return pair, program % blocks, clip, earlier.to(tl.int64), later.to(tl.int64)


@triton.jit
def _marginal(marginals, frame, position, positions, LOG: tl.constexpr):
    """The marginal of a frame at `position`, or its logarithm; beyond the end 0, or -inf."""
    inside = position < positions
    share = tl.load(marginals + frame * positions + position, mask=inside, other=0.0)
    if LOG:
        share = tl.log(tl.where(inside, share, 1.0))
        share = tl.where(inside, share, float("-inf"))
    return share


@triton.jit
def _accumulate(most, total, tile, vector, AXIS: tl.constexpr, LOG: tl.constexpr):
    """`total + Σ tile·vector` over an axis; of logarithms, `total` counts from `most`.

    `vector` has the shape of the tile, with size 1 where it does not vary.
    """
    if LOG:
        shifted = tile + vector
        higher = tl.maximum(most, tl.max(shifted, AXIS))
        total = total * tl.exp(most - higher)
        total += tl.sum(tl.exp(shifted - tl.expand_dims(higher, AXIS)), AXIS)
        most = higher
    else:
        total += tl.sum(tile * vector, AXIS)
    return most, total


@triton.jit
def _balanced(marginal, most, total, LOG: tl.constexpr):
    """The factors that give sums `total` their `marginal`; of logarithms, the potentials."""
    if LOG:
        return marginal - (most + tl.log(total))
    else:
        # A marginal of 0, as beyond the end, leaves nothing, whatever the sum.
        return marginal / tl.where(marginal > 0, total, 1.0)


@triton.jit
def _weighed(tile, weight, accumulator, like):
    """`accumulator + tile·weight` of float32 weights and a tile in the dtype of `like`.

    To a bf16 tile the weights are split in two bf16 numbers, which keeps 16 bits of the mantissa.
    """
    if tile.dtype == tl.float32:
        return dot(tile, weight, accumulator)
    else:
        high = rounded(weight, like)
        low = rounded(weight - high.to(tl.float32), like)
        return dot(tile, high, dot(tile, low, accumulator))


@triton.jit
def _moved(tile, own, source, mask, total, like, LOG: tl.constexpr):
    """`total + plan·mask` for a tile of the matrix with the factors of its rows and columns.

    Without logarithms the factors of the rows, `own`, are left to the caller: they come out of the
    sum.
    """
    if LOG:
        return dot(tl.exp(tile + own[:, None] + source[None, :]), mask, total)
    else:
        return _weighed(tile, mask * source[:, None], total, like)


@triton.jit
def _masks(
    masks, clip, frame, position, positions, slots, by_clip, by_frame, by_slot, by_position,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """The masks of a frame `[position, SLOTS]` in float32, 0 beyond either end."""
    position = position.to(tl.int64)
    slot = tl.arange(0, SLOTS).to(tl.int64)
    return tl.load(
        masks + clip * by_clip + frame * by_frame
        + position[:, None] * by_position + slot[None, :] * by_slot,
        mask=(position < positions)[:, None] & (slot < slots)[None, :],
        other=0.0,
    ).to(tl.float32)  # fmt: skip


@triton.jit
def _score(
    features, inverses, clip, earlier, later, row, column, frames, positions, width,
    by_clip, by_frame, by_position, by_width, shift, slope,
    BLOCK_WIDTH: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """-cost/ε of rows of the earlier and columns of the later frame; `NOWHERE` beyond either."""
    score = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    left = features + clip * by_clip + earlier * by_frame
    right = features + clip * by_clip + later * by_frame
    far_row, far_column = row.to(tl.int64), column.to(tl.int64)
    for depth in range(0, width, BLOCK_WIDTH):
        k = depth + tl.arange(0, BLOCK_WIDTH).to(tl.int64)
        score = dot(
            tl.load(
                left + far_row[:, None] * by_position + k[None, :] * by_width,
                mask=(row < positions)[:, None] & (k < width)[None, :],
                other=0.0,
            ),
            tl.load(
                right + k[:, None] * by_width + far_column[None, :] * by_position,
                mask=(k < width)[:, None] & (column < positions)[None, :],
                other=0.0,
            ),
            score,
        )
    inside = (row < positions)[:, None] & (column < positions)[None, :]
    if COSINE:
        own = inverses + (clip * frames + earlier) * positions
        other = inverses + (clip * frames + later) * positions
        score *= tl.load(own + row, mask=row < positions, other=0.0)[:, None]
        score *= tl.load(other + column, mask=column < positions, other=0.0)[None, :]
    return tl.where(inside, (score - shift) * slope, NOWHERE)


@triton.jit
def measure(
    features, inverses, weights, frames, positions, width, blocks,
    by_clip, by_frame, by_position, by_width,
    UNIFORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    WIDTH_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of a block of a frame's positions: 1/|F|, and 1/L or the L1 norm of F/|F|."""
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    own = features + frame // frames * by_clip + frame % frames * by_frame
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    sizes = tl.zeros([BLOCK_ROWS], tl.float32)
    for block in tl.static_range(WIDTH_BLOCKS):
        k = block * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH).to(tl.int64)
        tile = tl.load(
            own + row[:, None] * by_position + k[None, :] * by_width,
            mask=(row < positions)[:, None] & (k < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        squares += tl.sum(tile * tile, 1)
        sizes += tl.sum(tl.abs(tile), 1)
    inverse = 1.0 / tl.maximum(tl.sqrt(squares), 1e-12)
    weight = tl.zeros([BLOCK_ROWS], tl.float32) + 1.0 / positions
    if not UNIFORM:
        weight = sizes * inverse
    tl.store(inverses + frame * positions + row, inverse, mask=row < positions)
    tl.store(weights + frame * positions + row, weight, mask=row < positions)


@triton.jit
def _sweep(
    kernel, marginals, rows, pair, own, begin, end, positions, pitch, first, second, fresh,
    LOG: tl.constexpr, BLOCK_ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """From one read of rows begin…end of a pair's matrix: both directions' row factors, from the
    column factors `first` and `second`, and with them the columns' sums.

    In a `fresh` start (t,j) has factors 1, and (j,t) begins with its own rows, which are the
    columns here: it needs their plain sums.
    """
    column = tl.arange(0, PADDED)
    empty = tl.full([BLOCK_ROWS], NOWHERE, tl.float32)
    none = tl.zeros([BLOCK_ROWS], tl.float32)
    first_most = tl.full([PADDED], NOWHERE, tl.float32)
    second_most = tl.full([PADDED], NOWHERE, tl.float32)
    first_total = tl.zeros([PADDED], tl.float32)
    second_total = tl.zeros([PADDED], tl.float32)
    for start in range(begin, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        place = kernel + (pair * positions + start) * pitch
        tile = tl.load(
            place + (tl.arange(0, BLOCK_ROWS) * pitch)[:, None] + column[None, :],
            mask=(row < positions)[:, None] & (column < pitch)[None, :],
            other=NOWHERE if LOG else 0.0,
        ).to(tl.float32)
        marginal = _marginal(marginals, own, row, positions, LOG)
        most, total = _accumulate(empty, none, tile, first[None, :], 1, LOG)
        x = _balanced(marginal, most, total, LOG)
        tl.store(rows + pair * positions + row, x, mask=row < positions)
        first_most, first_total = _accumulate(first_most, first_total, tile, x[:, None], 0, LOG)
        most, total = _accumulate(empty, none, tile, second[None, :], 1, LOG)
        y = _balanced(marginal, most, total, LOG)
        y = tl.where(fresh, 0.0 if LOG else 1.0, y)
        second_most, second_total = _accumulate(second_most, second_total, tile, y[:, None], 0, LOG)
    return first_most, first_total, second_most, second_total


@triton.jit
def build(
    features, inverses, kernel,
    frames, positions, width, pitch, blocks, column_blocks, shift, slope,
    by_clip, by_frame, by_position, by_width,
    COSINE: tl.constexpr, LOG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of a pair's matrix: `exp(-cost/ε)`, or with `LOG` the exponent."""
    pair, block, clip, earlier, later = _place(blocks, frames)
    _store_tile(
        features, inverses, kernel, pair, clip, earlier, later,
        block // column_blocks * BLOCK_ROWS, block % column_blocks * BLOCK_COLUMNS,
        frames, positions, width, pitch, shift, slope,
        by_clip, by_frame, by_position, by_width,
        COSINE, LOG, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
    )  # fmt: skip


@triton.jit
def _store_tile(
    features, inverses, kernel, pair, clip, earlier, later, first_row, first_column,
    frames, positions, width, pitch, shift, slope,
    by_clip, by_frame, by_position, by_width,
    COSINE: tl.constexpr, LOG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Write a tile of a pair's matrix; up to the pitch, `NOWHERE` or 0 beyond the end."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    tile = _score(
        features, inverses, clip, earlier, later, row, column, frames, positions, width,
        by_clip, by_frame, by_position, by_width, shift, slope, BLOCK_WIDTH, COSINE,
    )  # fmt: skip
    place = kernel + (pair * positions + first_row) * pitch
    tl.store(
        place + (tl.arange(0, BLOCK_ROWS) * pitch)[:, None] + column[None, :],
        rounded(tile if LOG else tl.exp(tile), kernel),
        mask=(row < positions)[:, None] & (column < pitch)[None, :],
    )


@triton.jit
def combine(
    partial, marginals, columns, frames, positions, pitch, blocks, spans,
    LOG: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The column factors of both directions, from the sums of all row blocks in their order."""
    pair, block, clip, _, later = _place(blocks, frames)
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    marginal = _marginal(marginals, clip * frames + later, column, positions, LOG)
    planes = 4 if LOG else 2
    for direction in tl.static_range(2):
        most = tl.full([BLOCK_COLUMNS], NOWHERE, tl.float32)
        total = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for span in range(spans):
            part = partial + ((pair * spans + span) * planes + direction) * pitch
            added = tl.load(part + column, mask=column < pitch, other=1.0)
            if LOG:
                peak = tl.load(part + 2 * pitch + column, mask=column < pitch, other=NOWHERE)
                higher = tl.maximum(most, peak)
                total = total * tl.exp(most - higher) + added * tl.exp(peak - higher)
                most = higher
            else:
                total += added
        factor = _balanced(marginal, most, total, LOG)
        tl.store(columns + (pair * 2 + direction) * pitch + column, factor, mask=column < pitch)


@triton.jit
def iterate(
    kernel, marginals, columns, partial, rows, frames, positions, pitch, blocks,
    FRESH: tl.constexpr, LOG: tl.constexpr, SPAN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """`_sweep` over `SPAN` rows, whose part of the columns' sums goes to memory."""
    pair, block, clip, earlier, _ = _place(blocks, frames)
    column = tl.arange(0, PADDED)
    first = tl.full([PADDED], 0.0 if LOG else 1.0, tl.float32)
    second = first
    if not FRESH:
        factors = columns + pair * 2 * pitch + column
        first = tl.load(factors, mask=column < pitch, other=0.0)
        second = tl.load(factors + pitch, mask=column < pitch, other=0.0)
    begin = block * SPAN
    first_most, first_total, second_most, second_total = _sweep(
        kernel, marginals, rows, pair, clip * frames + earlier,
        begin, tl.minimum(begin + SPAN, positions), positions, pitch, first, second, FRESH,
        LOG, BLOCK_ROWS, PADDED,
    )  # fmt: skip
    planes = 4 if LOG else 2
    partial += (pair * blocks + block) * planes * pitch + column
    tl.store(partial, first_total, mask=column < pitch)
    tl.store(partial + pitch, second_total, mask=column < pitch)
    if LOG:
        tl.store(partial + 2 * pitch, first_most, mask=column < pitch)
        tl.store(partial + 3 * pitch, second_most, mask=column < pitch)


@triton.jit
def _deliver(
    kernel, masks, marginals, columns, rows, parts, pair, block, blocks, clip, earlier, later,
    frames, positions, slots, pitch, by_clip, by_frame, by_slot, by_position,
    LOG: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The masks moved both ways by a block of rows: to its own rows, and its part of the columns.

    (t,j) has both factors; (j,t) still lacks those of the rows, y.
    """
    begin = block * BLOCK_ROWS
    row = begin + tl.arange(0, BLOCK_ROWS)
    slot = tl.arange(0, SLOTS)
    matrix = kernel + (pair * positions + begin) * pitch
    matrix += (tl.arange(0, BLOCK_ROWS) * pitch)[:, None]
    parts += pair * (1 + blocks) * slots * pitch
    outside = NOWHERE if LOG else 0.0
    x = tl.load(rows + pair * positions + row, mask=row < positions, other=outside)
    moved = tl.zeros([BLOCK_ROWS, SLOTS], tl.float32)
    most = tl.full([BLOCK_ROWS], NOWHERE, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, pitch, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = (row < positions)[:, None] & (column < pitch)[None, :]
        tile = tl.load(matrix + column[None, :], mask=inside, other=outside)
        factors = columns + pair * 2 * pitch + column
        first = tl.load(factors, mask=column < pitch, other=outside)
        second = tl.load(factors + pitch, mask=column < pitch, other=outside)
        mask = _masks(
            masks, clip, later, column, positions, slots,
            by_clip, by_frame, by_slot, by_position, SLOTS,
        )  # fmt: skip
        moved = _moved(tile, x, first, mask, moved, kernel, LOG)
        most, total = _accumulate(most, total, tile.to(tl.float32), second[None, :], 1, LOG)
    if not LOG:
        moved *= x[:, None]
    tl.store(
        parts + slot[None, :] * pitch + row[:, None],
        moved,
        mask=(row < positions)[:, None] & (slot < slots)[None, :],
    )
    own = clip * frames + earlier
    y = _balanced(_marginal(marginals, own, row, positions, LOG), most, total, LOG)
    mask = _masks(
        masks, clip, earlier, row, positions, slots,
        by_clip, by_frame, by_slot, by_position, SLOTS,
    )  # fmt: skip
    parts += (1 + block) * slots * pitch
    for start in range(0, pitch, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        inside = (row < positions)[:, None] & (column < pitch)[None, :]
        tile = tl.load(matrix + column[None, :], mask=inside, other=outside)
        second = tl.load(
            columns + (pair * 2 + 1) * pitch + column, mask=column < pitch, other=outside
        )
        added = tl.zeros([BLOCK_COLUMNS, SLOTS], tl.float32)
        added = _moved(tl.trans(tile), second, y, mask, added, kernel, LOG)
        if not LOG:
            added *= second[:, None]
        tl.store(
            parts + slot[None, :] * pitch + column[:, None],
            added,
            mask=(column < pitch)[:, None] & (slot < slots)[None, :],
        )


@triton.jit
def transport(
    kernel, masks, marginals, columns, rows, parts,
    frames, positions, slots, pitch, blocks, by_clip, by_frame, by_slot, by_position,
    LOG: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_deliver` for one block of rows."""
    pair, block, clip, earlier, later = _place(blocks, frames)
    _deliver(
        kernel, masks, marginals, columns, rows, parts, pair, block, blocks, clip, earlier, later,
        frames, positions, slots, pitch, by_clip, by_frame, by_slot, by_position,
        LOG, SLOTS, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip


@triton.jit
def whole(
    features, inverses, marginals, masks, kernel, columns, rows, parts,
    frames, positions, width, slots, pitch, blocks, iterations, shift, slope,
    by_clip, by_frame, by_position, by_width,
    mask_by_clip, mask_by_frame, mask_by_slot, mask_by_position,
    COSINE: tl.constexpr, LOG: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    SWEEP_ROWS: tl.constexpr,
):  # fmt: skip
    """All of a pair, one pass after the other; the columns' sums and factors stay in registers.

    Between passes a barrier: threads read what others of this program have written to memory.
    """
    pair, _, clip, earlier, later = _place(1, frames)
    for first_row in range(0, positions, BLOCK_ROWS):
        for first_column in range(0, pitch, BLOCK_COLUMNS):
            _store_tile(
                features, inverses, kernel, pair, clip, earlier, later, first_row, first_column,
                frames, positions, width, pitch, shift, slope,
                by_clip, by_frame, by_position, by_width,
                COSINE, LOG, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH,
            )  # fmt: skip
    tl.debug_barrier()

    column = tl.arange(0, PADDED)
    goal = _marginal(marginals, clip * frames + later, column, positions, LOG)
    first = tl.full([PADDED], 0.0 if LOG else 1.0, tl.float32)
    second = first
    for step in range(iterations):
        first_most, first_total, second_most, second_total = _sweep(
            kernel, marginals, rows, pair, clip * frames + earlier, 0, positions,
            positions, pitch, first, second, step == 0, LOG, SWEEP_ROWS, PADDED,
        )  # fmt: skip
        first = _balanced(goal, first_most, first_total, LOG)
        second = _balanced(goal, second_most, second_total, LOG)
    factors = columns + pair * 2 * pitch + column
    tl.store(factors, first, mask=column < pitch)
    tl.store(factors + pitch, second, mask=column < pitch)
    tl.debug_barrier()

    for block in range(blocks):
        _deliver(
            kernel, masks, marginals, columns, rows, parts, pair, block, blocks,
            clip, earlier, later, frames, positions, slots, pitch,
            mask_by_clip, mask_by_frame, mask_by_slot, mask_by_position,
            LOG, SLOTS, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip


@triton.jit
def collect(
    parts, targets, frames, positions, slots, pitch, blocks, spans,
    SLOTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A frame's targets: what came from the other frames in order, each in the order of its parts.

    Part 0 of a pair goes to its earlier frame, the others to the later one.
    """
    program = tl.program_id(0)
    number = (program // blocks).to(tl.int64)
    clip = number // frames
    frame = number % frames
    column = program % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    slot = tl.arange(0, SLOTS)
    inside = (slot < slots)[:, None] & (column < positions)[None, :]
    total = tl.zeros([SLOTS, BLOCK_COLUMNS], tl.float32)
    for other in range(frames):
        if other != frame:
            earlier = tl.minimum(frame, other)
            later = tl.maximum(frame, other)
            pair = clip * (frames * (frames - 1) // 2) + later * (later - 1) // 2 + earlier
            begin = tl.where(frame < other, 0, 1)
            for part in range(begin, tl.where(frame < other, 1, 1 + spans)):
                place = (pair * (1 + spans) + part) * slots
                total += tl.load(
                    parts + (place + slot)[:, None] * pitch + column[None, :],
                    mask=inside,
                    other=0.0,
                )
    tl.store(
        targets + (number * slots + slot)[:, None] * positions + column[None, :],
        total,
        mask=inside,
    )
