"""sinkhorn in the log domain: one read of the cost an iteration, vectors kept for the backward.

Logarithms are to base 2, since the GPU has `2^x` and `log2 x`: with `s = -cost·log2(e)/ε` the plan
is `2^(s[l,m] + f[l] + g[m])`. An iteration, from g = 0, with `LSE = log2 Σ 2^`, is

    u[l] = LSE_m (s + g),  f = log2 r - u          v[m] = LSE_l (s + f),  g = log2 c - v

A program of `_iterate` owns ROWS rows, a tile of whole rows at a time. With the tile in registers
it finds u of these rows, and from the same tile their part of v, which is again an LSE: one number
a column. `_combine` adds up the parts of all programs, in their order, and `_plan` writes the plan
after the last iteration. Sums are relative to their largest term, so scores of any size are safe;
beyond the edge a score is -∞. Where a row is wider than 2048, the tile has a part of the row: the
first part stays, the others are read a second time, while they are in a cache.

What is kept for the backward are u and v of all K iterations. With G the gradient of the plan,
`a = Σ_m G·plan` and `b_K = Σ_l G·plan` (`_plan_sums`), then for k = K…1, with a = 0 below K,

    a_k[l] = a[l] - Σ_m 2^(s + f_k - v_k) b_k[m]
    b_{k-1}[m] = - Σ_l 2^(s + g_{k-1} - u_k) a_k[l]

in one read of the cost again (`_pull_back`). The powers are shares of a row or column, at most 1;
from u and v rather than f and g they are exactly 1 where there is one row or column, and the
gradient exactly 0. All a_k and b_k are kept, vectors as well, so that `_cost_gradient` adds the
2K + 1 terms of an element up in registers and writes it once: nothing of the cost's size exists but
G and the gradient. The marginals' gradients are `Σ_k a_k / r` and `Σ_k b_k / c`.

At B·T·(T-1) = 384 problems, L = M = 256 / 1024 / 1500, cost in float32, K = 3:
* device memory: the cost is 0.10 / 1.61 / 3.46 GB. Forward reads it 4 times and writes the plan:
  0.50 / 8.1 / 17.3 GB, 0.12 / 1.9 / 4.0 ms at 4.3 TB/s. Backward reads the cost 5 times, G twice
  and writes once: 0.81 / 12.9 / 27.6 GB, 0.19 / 3.0 / 6.4 ms. The parts, one number for 64
  elements, written and read, add 3 % to an iteration. In bf16 the reads of the cost are half.
* powers and logarithms: 2 an element and iteration, and 3 a column and tile of 16x256, 8x1024 or
  4x2048 elements (1500 is padded). With the plan's that is 8 / 8 / 12 an element forward, 13 / 13 /
  16 backward. At 16 a clock and multiprocessor, 132 of them at 1.7 GHz, 3.6e12/s: 0.06 / 0.9 /
  2.9 ms and 0.09 / 1.5 / 3.8 ms, below the bytes; in bf16 the two are near each other.
* registers: 32 scores a thread at L = 256 and 1024, 16 at 1500, and with what is done to them 95 to
  128: 16 warps a multiprocessor, in 5 to 1 programs. Tiles of twice the size would leave one
  program of 8 warps. No products, so no tensor cores.
* programs: 1536 / 6144 / 9216. One multiprocessor cannot hold a problem (262 KB at L = 256) and the
  programs of a launch cannot wait for each other, so an iteration is two launches. Atomic sums
  instead of parts would change their order from run to run.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launching import launch
from .registration import register
from .triton_helpers import rounded

LN_2 = math.log(2)


@triton.jit
def _tile(pointer, row, column, rows, columns, row_stride, column_stride, OTHER: tl.constexpr):
    """A tile of a matrix in float32; `OTHER` beyond the edge."""
    return tl.load(
        pointer + row[:, None] * row_stride + column[None, :] * column_stride,
        mask=(row < rows)[:, None] & (column < columns)[None, :],
        other=OTHER,
    ).to(tl.float32)


@triton.jit
def _scores(cost, row, column, rows, columns, row_stride, column_stride, slope):
    """`s = slope·cost` with slope < 0: -∞ beyond the edge, where the cost counts as infinite."""
    infinity: tl.constexpr = float("inf")
    return slope * _tile(cost, row, column, rows, columns, row_stride, column_stride, infinity)


@triton.jit
def _or_zero(largest):
    """`largest`, and 0 for -∞, whose difference with itself is not a number."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _log_sum(values, AXIS: tl.constexpr):
    """`log2 Σ 2^values` along an axis, -∞ for an empty sum."""
    largest = _or_zero(tl.max(values, AXIS))
    return largest + tl.log2(tl.sum(tl.exp2(values - tl.expand_dims(largest, AXIS)), AXIS))


@triton.jit
def _log_add(first, second):
    """`log2 (2^first + 2^second)`."""
    largest = _or_zero(tl.maximum(first, second))
    return largest + tl.log2(tl.exp2(first - largest) + tl.exp2(second - largest))


@triton.jit
def _own_rows(rows, ROWS: tl.constexpr):
    """The problem of a program on the grid `[problems · blocks of ROWS rows]`, its rows' range."""
    blocks = tl.cdiv(rows, ROWS)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    return problem, begin, tl.minimum(begin + ROWS, rows)


@triton.jit
def _own_tile(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The problem, rows and columns of a program on `[problems · row blocks · column blocks]`."""
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    place = tl.program_id(0) // across
    down = tl.cdiv(rows, BLOCK_ROWS)
    problem = (place // down).to(tl.int64)
    row = (place % down).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % across).to(tl.int64) * BLOCK_COLUMNS
    return problem, row, column + tl.arange(0, BLOCK_COLUMNS)


@triton.jit
def _vector(pointer, place, size):
    """Entries of a vector; 0 beyond its end."""
    return tl.load(pointer + place, mask=place < size, other=0.0)


@triton.jit
def _column_potential(log_columns, column_sums, column, columns):
    """g of some columns; the 0 before the first iteration, where `column_sums` is None."""
    if column_sums is None:
        return tl.zeros([column.shape[0]], tl.float32)
    else:
        return _vector(log_columns, column, columns) - _vector(column_sums, column, columns)


@triton.jit
def _iterate(
    cost, log_rows, log_columns, before, row_sums, parts, rows, columns, slope,
    batch_stride, row_stride, column_stride,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """u of ROWS rows, and their part of v `[problems,blocks,M]`.

    `before` is the last iteration's v, None in the first. WHOLE: one tile has all columns; else
    ROWS is BLOCK_ROWS, one tile has all rows.
    """
    problem, begin, end = _own_rows(rows, ROWS)
    cost += problem * batch_stride
    log_rows += problem * rows
    log_columns += problem * columns
    if before is not None:
        before += problem * columns
    parts += tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    first_g = _column_potential(log_columns, before, column, columns)
    part = tl.full([BLOCK_COLUMNS], float("-inf"), tl.float32)
    for start_row in range(begin, end, BLOCK_ROWS):
        row = start_row + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        first = _scores(cost, row, column, rows, columns, row_stride, column_stride, slope)
        u = _log_sum(first + first_g[None, :], 1)
        if not WHOLE:
            for start in range(BLOCK_COLUMNS, columns, BLOCK_COLUMNS):
                there = start + column
                scores = _scores(cost, row, there, rows, columns, row_stride, column_stride, slope)
                g = _column_potential(log_columns, before, there, columns)
                u = _log_add(u, _log_sum(scores + g[None, :], 1))
        # Rows beyond the edge have the sum -∞, and -∞ - -∞ below is not a number.
        u = tl.where(row < rows, u, 0.0)
        tl.store(row_sums + problem * rows + row, u, mask=row < rows)
        f = _vector(log_rows, row, rows) - u
        part = _log_add(part, _log_sum(first + f[:, None], 0))
        if not WHOLE:
            for start in range(BLOCK_COLUMNS, columns, BLOCK_COLUMNS):
                there = start + column
                scores = _scores(cost, row, there, rows, columns, row_stride, column_stride, slope)
                tl.store(parts + there, _log_sum(scores + f[:, None], 0), mask=there < columns)
    tl.store(parts + column, part, mask=column < columns)


@triton.jit
def _combine(
    parts, column_sums, blocks, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """v of `BLOCK_COLUMNS` columns from the parts of all row blocks, in their order."""
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    problem = (tl.program_id(0) // across).to(tl.int64)
    start = (tl.program_id(0) % across).to(tl.int64) * BLOCK_COLUMNS
    column = start + tl.arange(0, BLOCK_COLUMNS)
    parts += problem * blocks * columns
    nothing: tl.constexpr = float("-inf")
    total = tl.full([BLOCK_COLUMNS], nothing, tl.float32)
    for start in range(0, blocks, BLOCK_ROWS):
        block = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        values = _tile(parts, block, column, blocks, columns, columns, 1, nothing)
        total = _log_add(total, _log_sum(values, 0))
    tl.store(column_sums + problem * columns + column, total, mask=column < columns)


@triton.jit
def _plan(
    cost, log_rows, log_columns, row_sums, column_sums, out, rows, columns, slope,
    batch_stride, row_stride, column_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the plan."""
    problem, row, column = _own_tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    cost += problem * batch_stride
    scores = _scores(cost, row, column, rows, columns, row_stride, column_stride, slope)
    down, across = problem * rows, problem * columns
    f = _vector(log_rows + down, row, rows) - _vector(row_sums + down, row, rows)
    g = _column_potential(log_columns + across, column_sums + across, column, columns)
    tl.store(
        out + (down + row)[:, None] * columns + column[None, :],
        tl.exp2(scores + f[:, None] + g[None, :]),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


@triton.jit
def _plan_sums(
    cost, grad, log_rows, log_columns, row_sums, column_sums, totals, parts, rows, columns, slope,
    batch_stride, row_stride, column_stride, grad_batch, grad_row, grad_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of `G·plan`: over the columns, and over `BLOCK_ROWS` rows `[problems,blocks,M]`."""
    problem, begin, _ = _own_rows(rows, BLOCK_ROWS)
    row = begin + tl.arange(0, BLOCK_ROWS)
    cost += problem * batch_stride
    grad += problem * grad_batch
    down, across = problem * rows, problem * columns
    parts += tl.program_id(0).to(tl.int64) * columns
    f = _vector(log_rows + down, row, rows) - _vector(row_sums + down, row, rows)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        scores = _scores(cost, row, column, rows, columns, row_stride, column_stride, slope)
        g = _column_potential(log_columns + across, column_sums + across, column, columns)
        given = _tile(grad, row, column, rows, columns, grad_row, grad_column, 0.0)
        values = tl.exp2(scores + f[:, None] + g[None, :]) * given
        total += tl.sum(values, 1)
        tl.store(parts + column, tl.sum(values, 0), mask=column < columns)
    tl.store(totals + down + row, total, mask=row < rows)


@triton.jit
def _column_share(scores, f, column_sums, grad_columns, column, columns):
    """How the scores of a tile act on v, times the gradient of g."""
    share = scores + f[:, None] - _vector(column_sums, column, columns)[None, :]
    return tl.exp2(share) * _vector(grad_columns, column, columns)[None, :]


@triton.jit
def _row_share(scores, g, row_sums, grad_rows):
    """How the scores of a tile act on u, times the gradient of f."""
    return tl.exp2(scores + g[None, :] - row_sums[:, None]) * grad_rows[:, None]


@triton.jit
def _pull_back(
    cost, log_rows, log_columns, row_sums, column_sums, before, totals, grad_columns, grad_rows,
    parts, rows, columns, slope, batch_stride, row_stride, column_stride,
    ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The gradient of f in one iteration, and its rows' part of the gradient of the g before.

    `before` is the v before; None in the first iteration, where no part is asked for. `totals` is
    what the plan itself gives to f, None before the last iteration. ROWS, WHOLE as in `_iterate`.
    """
    problem, begin, end = _own_rows(rows, ROWS)
    cost += problem * batch_stride
    log_rows += problem * rows
    log_columns += problem * columns
    row_sums += problem * rows
    column_sums += problem * columns
    grad_columns += problem * columns
    parts += tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    if before is not None:
        before += problem * columns
        first_g = _column_potential(log_columns, before, column, columns)
    part = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for start_row in range(begin, end, BLOCK_ROWS):
        row = start_row + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        u = _vector(row_sums, row, rows)
        f = _vector(log_rows, row, rows) - u
        first = _scores(cost, row, column, rows, columns, row_stride, column_stride, slope)
        grad = -tl.sum(_column_share(first, f, column_sums, grad_columns, column, columns), 1)
        if not WHOLE:
            for start in range(BLOCK_COLUMNS, columns, BLOCK_COLUMNS):
                there = start + column
                scores = _scores(cost, row, there, rows, columns, row_stride, column_stride, slope)
                values = _column_share(scores, f, column_sums, grad_columns, there, columns)
                grad -= tl.sum(values, 1)
        if totals is not None:
            grad += _vector(totals + problem * rows, row, rows)
        tl.store(grad_rows + problem * rows + row, grad, mask=row < rows)
        if before is not None:
            part -= tl.sum(_row_share(first, first_g, u, grad), 0)
            if not WHOLE:
                for start in range(BLOCK_COLUMNS, columns, BLOCK_COLUMNS):
                    there = start + column
                    scores = _scores(
                        cost, row, there, rows, columns, row_stride, column_stride, slope
                    )
                    g = _column_potential(log_columns, before, there, columns)
                    values = _row_share(scores, g, u, grad)
                    tl.store(parts + there, -tl.sum(values, 0), mask=there < columns)
    if before is not None:
        tl.store(parts + column, part, mask=column < columns)


@triton.jit
def _cost_gradient(
    cost, grad, log_rows, log_columns, row_sums, column_sums, grad_rows, grad_columns, out,
    rows, columns, row_step, column_step, iterations, slope, factor,
    batch_stride, row_stride, column_stride, grad_batch, grad_row, grad_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the cost's gradient, `factor` times that of the scores: from the plan backwards.

    The sums and their gradients are those of the last iteration; the one before is a step away.
    """
    problem, row, column = _own_tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    cost += problem * batch_stride
    grad += problem * grad_batch
    scores = _scores(cost, row, column, rows, columns, row_stride, column_stride, slope)
    down, across = problem * rows, problem * columns
    log_r = _vector(log_rows + down, row, rows)
    log_c = _vector(log_columns + across, column, columns)
    f = log_r - _vector(row_sums + down, row, rows)
    g = log_c - _vector(column_sums + across, column, columns)
    total = _tile(grad, row, column, rows, columns, grad_row, grad_column, 0.0)
    total *= tl.exp2(scores + f[:, None] + g[None, :])
    for step in range(iterations):
        u = _vector(row_sums + down, row, rows)
        total -= _column_share(
            scores, log_r - u, column_sums + across, grad_columns + across, column, columns
        )
        across -= column_step
        g = tl.zeros([BLOCK_COLUMNS], tl.float32)
        if step < iterations - 1:
            g = log_c - _vector(column_sums + across, column, columns)
        total -= _row_share(scores, g, u, _vector(grad_rows + down, row, rows))
        down -= row_step
    tl.store(
        out + (problem * rows + row)[:, None] * columns + column[None, :],
        rounded(factor * total, out),
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


def _options(kernel: str, cost: Tensor) -> dict[str, int]:
    """The table's choice, with tiles no larger than the matrix needs."""
    rows, columns = cost.shape[1:]
    chosen = tuning.options(f"sinkhorn.{kernel}", cost, columns)
    for name, size in (("BLOCK_ROWS", rows), ("BLOCK_COLUMNS", columns)):
        chosen[name] = min(chosen[name], max(16, triton.next_power_of_2(size)))
    return chosen


def _row_options(cost: Tensor) -> dict[str, int]:
    """Options of `_iterate` and `_pull_back`."""
    chosen = _options("rows", cost)
    chosen["WHOLE"] = cost.shape[2] <= chosen["BLOCK_COLUMNS"]
    if not chosen["WHOLE"]:
        chosen["ROWS"] = chosen["BLOCK_ROWS"]
    return chosen


def _parts(cost: Tensor, rows: int) -> Tensor:
    """For sums over each block of `rows` rows: `[problems, blocks, columns]`."""
    problems, all_rows, columns = cost.shape
    return cost.new_empty(problems, triton.cdiv(all_rows, rows), columns, dtype=torch.float32)


def _tiles(cost: Tensor, chosen: dict[str, int]) -> tuple[int, ...]:
    """The grid of a program a tile, on the one axis that is not limited to 65535."""
    problems, rows, columns = cost.shape
    down = triton.cdiv(rows, chosen["BLOCK_ROWS"])
    return (problems * down * triton.cdiv(columns, chosen["BLOCK_COLUMNS"]),)


def _log2(marginal: Tensor) -> Tensor:
    return marginal.float().log2().contiguous()


def _slope(epsilon: float) -> float:
    """Scores to base 2 of a cost of 1."""
    # Never 0 in float32: beyond the edge it multiplies infinity.
    return -max(1 / (LN_2 * epsilon), torch.finfo(torch.float32).tiny)


def _forward(
    cost: Tensor, row_marginal: Tensor, column_marginal: Tensor, epsilon: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan `[B,L,M]`, u `[iterations,B,L]` and v `[iterations,B,M]`: float32."""
    plan, row_sums, column_sums = _fake(cost, row_marginal, column_marginal, epsilon, iterations)
    problems, rows, columns = cost.shape
    logs = _log2(row_marginal), _log2(column_marginal)
    chosen, combining = _row_options(cost), _options("combine", cost)
    parts = _parts(cost, chosen["ROWS"])
    grid = (problems * parts.shape[1],)
    across = (problems * triton.cdiv(columns, combining["BLOCK_COLUMNS"]),)
    numbers = (rows, columns, _slope(epsilon), *cost.stride())
    for step in range(iterations):
        before = column_sums[step - 1] if step else None
        launch(_iterate, grid, cost, *logs, before, row_sums[step], parts, *numbers, **chosen)
        launch(_combine, across, parts, column_sums[step], parts.shape[1], columns, **combining)
    chosen = _options("tiles", cost)
    tiles = _tiles(cost, chosen)
    launch(_plan, tiles, cost, *logs, row_sums[-1], column_sums[-1], plan, *numbers, **chosen)
    return plan, row_sums, column_sums


def _backward(
    grad: Tensor,
    cost: Tensor,
    row_marginal: Tensor,
    column_marginal: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    epsilon: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of cost and marginals, in their dtypes; those not `wanted` are empty."""
    iterations, (problems, rows, columns) = len(row_sums), cost.shape
    grad_rows, grad_columns = torch.empty_like(row_sums), torch.empty_like(column_sums)
    logs = _log2(row_marginal), _log2(column_marginal)
    chosen = _options("sums", cost)
    parts = _parts(cost, chosen["BLOCK_ROWS"])
    totals = row_sums.new_empty(problems, rows)
    size, strides = (rows, columns, _slope(epsilon)), (*cost.stride(), *grad.stride())
    launch(
        _plan_sums, (problems * parts.shape[1],), cost, grad, *logs, row_sums[-1],
        column_sums[-1], totals, parts, *size, *strides, **chosen,
    )  # fmt: skip
    torch.sum(parts, 1, out=grad_columns[-1])
    chosen = _row_options(cost)
    parts = _parts(cost, chosen["ROWS"])
    grid = (problems * parts.shape[1],)
    for step in reversed(range(iterations)):
        before = column_sums[step - 1] if step else None
        launch(
            _pull_back, grid, cost, *logs, row_sums[step], column_sums[step], before,
            totals if step == iterations - 1 else None, grad_columns[step], grad_rows[step],
            parts, *size, *cost.stride(), **chosen,
        )  # fmt: skip
        if step:
            torch.sum(parts, 1, out=grad_columns[step - 1])
    grad_cost = cost.new_empty(cost.shape if wanted[0] else 0)
    if wanted[0]:
        chosen = _options("tiles", cost)
        last = (row_sums[-1], column_sums[-1], grad_rows[-1], grad_columns[-1])
        launch(
            _cost_gradient, _tiles(cost, chosen), cost, grad, *logs, *last, grad_cost, rows,
            columns, problems * rows, problems * columns, iterations, _slope(epsilon),
            -1 / epsilon, *strides, **chosen,
        )  # fmt: skip
    return (
        grad_cost,
        _marginal_gradient(grad_rows, row_marginal, wanted[1]),
        _marginal_gradient(grad_columns, column_marginal, wanted[2]),
    )


def _marginal_gradient(grad_potentials: Tensor, marginal: Tensor, wanted: bool) -> Tensor:
    """From the potentials' gradients `[iterations,B,L]`: each potential has the logarithm."""
    if not wanted:
        return marginal.new_empty(0)
    return (grad_potentials.sum(0) / marginal).to(marginal.dtype).contiguous()


def _plain(
    cost: Tensor, row_marginal: Tensor, column_marginal: Tensor, epsilon: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_forward`."""
    scores = cost.float() * _slope(epsilon)
    log_rows, log_columns = _log2(row_marginal), _log2(column_marginal)
    f, g = torch.zeros_like(log_rows), torch.zeros_like(log_columns)
    row_sums, column_sums = [], []
    for _ in range(iterations):
        row_sums.append(torch.logsumexp(LN_2 * (scores + g[:, None, :]), 2) / LN_2)
        f = log_rows - row_sums[-1]
        column_sums.append(torch.logsumexp(LN_2 * (scores + f[:, :, None]), 1) / LN_2)
        g = log_columns - column_sums[-1]
    plan = (scores + f[:, :, None] + g[:, None, :]).exp2().contiguous()
    return plan, torch.stack(row_sums), torch.stack(column_sums)


def _plain_backward(
    grad: Tensor,
    cost: Tensor,
    row_marginal: Tensor,
    column_marginal: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    epsilon: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`."""
    scores = cost.float() * _slope(epsilon)
    f, g = _log2(row_marginal) - row_sums, _log2(column_marginal) - column_sums
    grad_scores = grad * (scores + f[-1, :, :, None] + g[-1, :, None, :]).exp2()
    grad_rows, grad_columns = torch.zeros_like(f), torch.zeros_like(g)
    grad_rows[-1], grad_columns[-1] = grad_scores.sum(2), grad_scores.sum(1)
    for step in reversed(range(len(f))):
        share = (scores + f[step][:, :, None] - column_sums[step][:, None, :]).exp2()
        share *= grad_columns[step][:, None, :]
        grad_scores -= share
        grad_rows[step] -= share.sum(2)
        before = g[step - 1] if step else torch.zeros_like(g[0])
        share = (scores + before[:, None, :] - row_sums[step][:, :, None]).exp2()
        share *= grad_rows[step][:, :, None]
        grad_scores -= share
        if step:
            grad_columns[step - 1] = -share.sum(1)
    grad_cost = (grad_scores / -epsilon).to(cost.dtype).contiguous()
    return (
        grad_cost if wanted[0] else cost.new_empty(0),
        _marginal_gradient(grad_rows, row_marginal, wanted[1]),
        _marginal_gradient(grad_columns, column_marginal, wanted[2]),
    )


def _fake(
    cost: Tensor, row_marginal: Tensor, column_marginal: Tensor, epsilon: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    problems, rows, columns = cost.shape
    plan = cost.new_empty(problems, rows, columns, dtype=torch.float32)
    row_sums = plan.new_empty(iterations, problems, rows)
    return plan, row_sums, plan.new_empty(iterations, problems, columns)


def _fake_backward(
    grad: Tensor,
    cost: Tensor,
    row_marginal: Tensor,
    column_marginal: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    epsilon: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        tensor.new_empty(tensor.shape if want else (0,))
        for tensor, want in zip((cost, row_marginal, column_marginal), wanted, strict=True)
    )
    return first, second, third


_operator = register("sinkhorn", _forward, _plain, _fake)
_operator_backward = register("sinkhorn_backward", _backward, _plain_backward, _fake_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.epsilon = inputs[3]


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The log-sums are returned for this alone: nothing else depends on them."""
    wanted = list(ctx.needs_input_grad[:3])
    grads = _operator_backward(grad, *ctx.saved_tensors, ctx.epsilon, wanted)
    first, second, third = (
        value if want else None for value, want in zip(grads, wanted, strict=True)
    )
    return first, second, third, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


def sinkhorn(
    cost: Tensor,
    row_marginal: Tensor,
    column_marginal: Tensor,
    *,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """The operation of `ops.py`, fused."""
    plan: Tensor
    plan, _, _ = _operator(cost, row_marginal, column_marginal, epsilon, iterations)
    return plan
