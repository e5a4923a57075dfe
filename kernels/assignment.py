"""assignment as one kernel: many problems a program, no host copy.

A program owns BLOCK problems, each a row of PP·PP costs (PP: P rounded up to a power of two) in
float32; sums are float64 as in `eager.py`, where sums of float32 costs are exact, so that ties do
not depend on the order of addition.

* P ≤ 4: the P! permutations are an axis of a tile, `totals[BLOCK,P!]`. Permutation k is worked out
  from k in the factorial number system, so no table is read; row r adds the costs gathered at
  `(r, column_r(k))`. The first least total is the lexicographically first permutation.
* P > 4: dynamic programming over sets S of columns, `h[BLOCK,2^P]`: `h[S]` is the least cost of
  the rows from |S| on, given that the rows before took S,

      h[S] = min over c not in S of cost[|S|,c] + h[S + {c}],   h[all columns] = 0,

  one level a row, last row first. For every S the first best c is kept; walking from the empty set
  along these gives the lexicographically first of the cheapest permutations. A level is computed
  for all sets at once: P² gathers of 2^P instead of the 2^P·P steps on one thread, whose indexing
  would send the table to local memory.

A permutation is passed on as one int32 code of 4 bits a row (`column of row r = code >> 4r & 15`),
which `instance_consistency` turns into a mask without a gather.

At B 32, T 4, N 16, P 4 there are 8192 problems: costs 262 KB in bf16, permutations 262 KB out, 0.1
µs of memory. 64 problems a program make 128 programs of 4 warps; `totals` is 64 x 32 float64, 16 a
thread, 32 registers. At P 8 a program of 4 problems holds 4 x 256 float64 and int32: 8 values a
thread with 4 warps, 24 registers for h and the choices and as many for the level in the making.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import eager, tuning
from .launching import launch
from .registration import register


@triton.jit
def _permutation(rank, P: tl.constexpr):
    """The code of permutation `rank`, in 0…P!-1, in lexicographic order."""
    code = rank * 0
    for row in tl.static_range(P - 1, -1, -1):
        # The digits of the factorial number system, last row first. Each row's digit counts the
        # columns left to it, so a later column at or above it moves up by one.
        own = rank % (P - row)
        rank = rank // (P - row)
        moved = own << (4 * row)
        for later in tl.static_range(row + 1, P):
            column = (code >> (4 * later)) & 15
            moved |= (column + (column >= own).to(tl.int32)) << (4 * later)
        code = moved
    return code


@triton.jit
def _by_permutations(cost, P: tl.constexpr, PADDED: tl.constexpr):
    """`cheapest` by comparing all permutations of at most four columns."""
    COUNT: tl.constexpr = 24 if P == 4 else (6 if P == 3 else P)
    RANKS: tl.constexpr = 32 if P == 4 else (8 if P == 3 else P)
    PROBLEMS: tl.constexpr = cost.shape[0]
    # Places past the last permutation repeat it, and so never come first.
    code = _permutation(tl.minimum(tl.arange(0, RANKS), COUNT - 1), P)
    totals = tl.zeros([PROBLEMS, RANKS], tl.float64)
    for row in tl.static_range(P):
        place = row * PADDED + ((code >> (4 * row)) & 15)
        place = tl.broadcast_to(place[None, :], [PROBLEMS, RANKS])
        totals += tl.gather(cost, place, axis=1).to(tl.float64)
    least = tl.argmin(totals, axis=1, tie_break_left=True)
    # The bound matters where costs are NaN.
    return _permutation(tl.minimum(least, COUNT - 1), P)


@triton.jit
def _by_sets(cost, P: tl.constexpr, PADDED: tl.constexpr):
    """`cheapest` by dynamic programming over the sets of taken columns."""
    SETS: tl.constexpr = 2**P
    PROBLEMS: tl.constexpr = cost.shape[0]
    taken = tl.arange(0, SETS)
    size = taken * 0
    for member in tl.static_range(P):
        size += (taken >> member) & 1
    element = tl.arange(0, PADDED * PADDED)
    best = tl.zeros([PROBLEMS, SETS], tl.float64)
    choice = tl.zeros([PROBLEMS, SETS], tl.int32)
    for step in range(P):
        row = P - 1 - step
        least = tl.full([PROBLEMS, SETS], float("inf"), tl.float64)
        chosen = tl.full([PROBLEMS, SETS], -1, tl.int32)
        for column in range(P):
            at = (element == row * PADDED + column)[None, :]
            own = tl.sum(tl.where(at, cost, 0.0), axis=1)
            onward = tl.broadcast_to((taken | (1 << column))[None, :], [PROBLEMS, SETS])
            total = own[:, None].to(tl.float64) + tl.gather(best, onward, axis=1)
            free = (((taken >> column) & 1) == 0)[None, :]
            # The first free column counts even where its cost is infinite.
            better = free & ((chosen < 0) | (total < least))
            least = tl.where(better, total, least)
            chosen = tl.where(better, column, chosen)
        # Sets of another size than `row` get sums that nothing reads, but each choice once.
        best = least
        choice = tl.where((size == row)[None, :], chosen, choice)
    state = tl.zeros([PROBLEMS, 1], tl.int32)
    code = tl.zeros([PROBLEMS, 1], tl.int32)
    for reached in range(P):
        following = tl.gather(choice, state, axis=1)
        code |= following << (4 * reached)
        state |= 1 << following
    return tl.reshape(code, [PROBLEMS])


@triton.jit
def cheapest(cost, P: tl.constexpr, PADDED: tl.constexpr):
    """Codes `[X]` of the cheapest permutations of float32 costs `[X,PADDED·PADDED]`.

    Row r, column c of a problem is at `r·PADDED + c`; only rows and columns below P are read.
    """
    if P <= 4:
        return _by_permutations(cost, P, PADDED)
    else:
        return _by_sets(cost, P, PADDED)


@triton.jit
def _assign(
    cost, columns, problems, by_problem, by_row, by_column,
    P: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The permutations of BLOCK problems."""
    problem = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element = tl.arange(0, PADDED * PADDED).to(tl.int64)
    row, column = element // PADDED, element % PADDED
    own = tl.load(
        cost + problem[:, None] * by_problem + (row * by_row + column * by_column)[None, :],
        mask=(problem < problems)[:, None] & ((row < P) & (column < P))[None, :],
        other=0.0,
    ).to(tl.float32)
    code = cheapest(own, P, PADDED)
    slot = tl.arange(0, PADDED)
    tl.store(
        columns + problem[:, None] * P + slot[None, :],
        ((code[:, None] >> (4 * slot)[None, :]) & 15).to(tl.int64),
        mask=(problem < problems)[:, None] & (slot < P)[None, :],
    )


def _forward(cost: Tensor) -> Tensor:
    """`[...,P]` int64."""
    size = cost.shape[-1]
    problems = math.prod(cost.shape[:-2])
    # A view, unless the leading axes cannot be walked with one stride.
    flat = cost.reshape(problems, size, size)
    out = cost.new_empty(cost.shape[:-1], dtype=torch.int64)
    chosen = tuning.options("assignment", cost, size)
    launch(
        _assign, (triton.cdiv(problems, chosen["BLOCK"]),), flat, out, problems, *flat.stride(),
        P=size, PADDED=triton.next_power_of_2(size), **chosen,
    )  # fmt: skip
    return out


def _fake(cost: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[:-1], dtype=torch.int64)


_operator = register("assignment", _forward, eager.assignment, _fake)


def assignment(cost: Tensor) -> Tensor:
    """The operation of `ops.py`, fused."""
    out: Tensor = _operator(cost)
    return out
