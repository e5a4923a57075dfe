"""transport_alignment without a plan: one matrix for both directions of a pair of frames.

For each pair t<j of a clip `K = exp(-cost/ε)` [L,L] is built once, rows u of frame t and columns v
of frame j. Direction (t,j) iterates on K from y = 1, direction (j,t) on Kᵀ from y' = 1, so both
alternate row factors with column factors, and one read of K serves both:

    (t,j)  x = r_t / (K y)     y  = r_j / (Kᵀ x)    target_t[n,u] += x_u  Σ_v K_uv y_v  M_j[n,v]
    (j,t)  y' = r_t / (K x')   x' = r_j / (Kᵀ y')   target_j[n,v] += x'_v Σ_u K_uv y'_u M_t[n,u]

`_sweep` holds whole rows of K: it finds their factors and at once adds their part of the columns'
sums. (j,t) is half a step behind: in its first sweep y' is 1, and its last y' is found by the pass
that moves the masks. I iterations are I + 1 reads of K and one write.

K is written once and kept: recomputing it would cost 2·D FLOP an element a pass where reading costs
2 bytes. It is bf16 for 16-bit features, also for float16, which lacks the range for e⁻⁴⁰; the sums
use K as it was rounded. The masks times y are split in two bf16 numbers: two products, no upcast of
K, and an error of 2⁻¹⁷ instead of 2⁻⁹ beside K's. For float32 features K is float32. Norms are
taken once and multiply the Gram tile afterwards; there is no normalised copy.

The scaling form above holds where `scaling_is_safe`. Else the same passes run on the score -cost/ε
(`LOG`): factors are logarithms, sums are relative to their largest term, partial sums are a maximum
and a sum. The score is float32 for all features: in bf16 a score of 400 would be off by up to 1.

* In passes: `build` (a Gram tile a program), I times `iterate` (`SPAN` rows a program) and
  `combine` (adds the spans' parts in their order), `transport` (a block of rows of K a program,
  read twice, the second time from L2), `collect` (adds pairs and blocks of each frame in their
  order).
* Up to 256 positions in one launch: `whole` does these for one pair. Its 131 KB of K are its own
  and lie in L1 and L2; the columns' sums stay in registers, so nothing is combined. Before a pass
  reads what other threads of the program wrote there is a barrier. With `measure` and `collect`
  that is 3 launches instead of 10.

At 32 clips of 4 frames (192 pairs), D = 384, N = 16, I = 3, bf16, L = 256 / 1024 / 1500, counted
for 790 TFLOP/s, 4.3 TB/s of device memory and 5.5 TB/s of L2 on 132 multiprocessors:
* Gram: 9.7 / 155 / 332 GFLOP, 12 / 196 / 420 µs. A tile of 128x256 reads 295 KB for 25 MFLOP: 1.8 /
  4.1 GB, 330 / 740 µs of L2 at 1024 / 1500, which bounds it. `whole` has tiles of 128x128: 151 MB,
  27 µs, and 192 programs on 132 multiprocessors leave a part of these idle.
* K is 25 / 403 / 864 MB. One write and 4 reads at 1024 / 1500: 2.0 / 4.3 GB, 470 / 1000 µs of
  device memory; the second read of `transport` 73 / 157 µs of L2.
* Parts: the columns' sums of a span of 128 rows are 8 bytes a column, 3 % of K a pass; the moved
  masks of a block of 256 rows are 64 bytes a column, 12 % of K, written and read.
* Sum: 0.95 / 2.0 ms where nothing overlaps and K, of all clips at once, comes from device memory.
  Clips in chunks whose K stays in L2 (2 at L = 1024) would read at 5.5 instead of 4.3 TB/s, but
  take 16 times 10 launches of 5 µs each, so chunks bound memory only: 512 MiB of K, 1 / 2 chunks.
* Registers: the tile of 128x256 fp32 is 128 a thread with 8 warps. `_sweep` holds 8192 elements, 32
  a thread with 8 warps, in rows padded to a power of two (1500 to 2048: no bytes, a third more
  arithmetic, which is 35 µs a pass at 1024). Its sums and factors of the columns are another 32.
* The rows of a bf16 K begin at multiples of 128 bytes, so that 16 bytes a thread are read. Products
  with the masks have 16 columns, the least of `tl.dot`.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import eager, tuning
from . import transport_passes as passes
from .eager import scaling_is_safe
from .launching import launch
from .registration import register

# Rows of the matrix begin at multiples of this, so that 16 bytes are read at a time.
ALIGNMENT = 64
# What `whole` has room for: at 128 slots it would need more shared memory than sm_90 has.
MOST_POSITIONS_A_PROGRAM = 256
MOST_SLOTS_A_PROGRAM = 64


class _Settings(NamedTuple):
    """Sinkhorn's settings; `log` for logarithms instead of factors."""

    iterations: int
    epsilon: float
    cost: str
    log: bool

    def score(self, width: int) -> tuple[float, float]:
        """Shift and slope of `-cost/ε = (product - shift) · slope`."""
        if self.cost == "cosine":
            return 1.0, 1 / self.epsilon
        return 0.0, 1 / (self.epsilon * math.sqrt(width))


def one_program_a_pair(positions: int, slots: int) -> bool:
    """Whether one program does all of a pair.

    However few pairs there are: the separate passes take longer to start than such a program runs.
    """
    return positions <= MOST_POSITIONS_A_PROGRAM and slots <= MOST_SLOTS_A_PROGRAM


def _padded(size: int) -> int:
    """The next power of two that a product's tile can have."""
    return max(16, triton.next_power_of_2(size))


def _forward(
    features: Tensor, masks: Tensor, epsilon: float, iterations: int, marginals: str, cost: str
) -> Tensor:
    """`[B,T,N,L]` float32."""
    clips, frames, positions, _ = features.shape
    slots = masks.shape[2]
    targets = features.new_empty(clips, frames, slots, positions, dtype=torch.float32)
    pairs = frames * (frames - 1) // 2
    if clips * pairs == 0:
        return targets.zero_()
    inverses, shares = _measured(features, marginals)
    settings = _Settings(iterations, epsilon, cost, not scaling_is_safe(cost, epsilon))
    sixteen = features.dtype != torch.float32 and not settings.log
    kind = torch.bfloat16 if sixteen else torch.float32
    pitch = triton.cdiv(positions, ALIGNMENT) * ALIGNMENT
    limit = tuning.options("transport_alignment.chunk", features, positions)["MEBIBYTES"] * 2**20
    chunk = min(clips, max(1, limit // (pairs * positions * pitch * kind.itemsize)))
    kernel = features.new_empty(chunk * pairs, positions, pitch, dtype=kind)
    transport = _in_one_launch if one_program_a_pair(positions, slots) else _in_passes
    for first in range(0, clips, chunk):
        some = slice(first, first + chunk)
        parts = transport(
            features[some], masks[some], inverses[some], shares[some], kernel, settings
        )
        _collected(parts, targets[some])
    return targets


def _measured(features: Tensor, marginals: str) -> tuple[Tensor, Tensor]:
    """1/|F| and the marginals `[B,T,L]`, float32."""
    clips, frames, positions, width = features.shape
    inverses, weights = (
        features.new_empty(clips, frames, positions, dtype=torch.float32) for _ in range(2)
    )
    chosen = tuning.options("transport_alignment.measure", features, positions)
    blocks = triton.cdiv(positions, chosen["BLOCK_ROWS"])
    launch(
        passes.measure, (clips * frames * blocks,), features, inverses, weights,
        frames, positions, width, blocks, *features.stride(),
        UNIFORM=marginals == "uniform", WIDTH_BLOCKS=triton.cdiv(width, chosen["BLOCK_WIDTH"]),
        **chosen,
    )  # fmt: skip
    if marginals == "l1":
        weights /= weights.sum(-1, keepdim=True).clamp_min_(1e-12)
    return inverses, weights


def _in_one_launch(
    features: Tensor,
    masks: Tensor,
    inverses: Tensor,
    marginals: Tensor,
    kernel: Tensor,
    settings: _Settings,
) -> Tensor:
    """What each pair adds to its frames `[pairs,1+blocks,N,pitch]`: the earlier, then the later."""
    clips, frames, positions, width = features.shape
    slots, pitch = masks.shape[2], kernel.shape[-1]
    pairs = clips * frames * (frames - 1) // 2
    chosen = tuning.options("transport_alignment.whole", kernel, positions)
    padded = triton.next_power_of_2(pitch)
    sweep_rows = max(1, chosen.pop("HELD") // padded)
    blocks = triton.cdiv(positions, chosen["BLOCK_ROWS"])
    columns = marginals.new_empty(pairs, 2, pitch)
    rows = marginals.new_empty(pairs, positions)
    parts = marginals.new_empty(pairs, 1 + blocks, slots, pitch)
    launch(
        passes.whole, (pairs,), features, inverses, marginals, masks, kernel, columns, rows, parts,
        frames, positions, width, slots, pitch, blocks, settings.iterations,
        *settings.score(width), *features.stride(), *masks.stride(),
        COSINE=settings.cost == "cosine", LOG=settings.log, SLOTS=_padded(slots), PADDED=padded,
        SWEEP_ROWS=sweep_rows, **chosen, flops=pairs * positions**2 * (2 * width + 4 * slots),
    )  # fmt: skip
    return parts


def _in_passes(
    features: Tensor,
    masks: Tensor,
    inverses: Tensor,
    marginals: Tensor,
    kernel: Tensor,
    settings: _Settings,
) -> Tensor:
    """As `_in_one_launch`, in a launch a pass, with many programs a pair."""
    clips, frames, positions, width = features.shape
    slots, pitch, log = masks.shape[2], kernel.shape[-1], settings.log
    pairs = clips * frames * (frames - 1) // 2
    build = tuning.options("transport_alignment.build", features, positions)
    column_blocks = triton.cdiv(pitch, build["BLOCK_COLUMNS"])
    blocks = triton.cdiv(positions, build["BLOCK_ROWS"]) * column_blocks
    launch(
        passes.build, (pairs * blocks,), features, inverses, kernel,
        frames, positions, width, pitch, blocks, column_blocks, *settings.score(width),
        *features.stride(),
        COSINE=settings.cost == "cosine", LOG=log, **build, flops=2 * pairs * positions**2 * width,
    )  # fmt: skip

    iterate = tuning.options("transport_alignment.iterate", kernel, positions)
    padded = triton.next_power_of_2(pitch)
    iterate["BLOCK_ROWS"] = min(iterate["SPAN"], max(1, iterate.pop("HELD") // padded))
    blocks = triton.cdiv(positions, iterate["SPAN"])
    columns = marginals.new_empty(pairs, 2, pitch)
    partial = marginals.new_empty(pairs, blocks, 4 if log else 2, pitch)
    rows = marginals.new_empty(pairs, positions)
    for step in range(settings.iterations):
        launch(
            passes.iterate, (pairs * blocks,), kernel, marginals, columns, partial, rows,
            frames, positions, pitch, blocks, FRESH=step == 0, LOG=log, PADDED=padded, **iterate,
        )  # fmt: skip
        _combined(partial, marginals, columns, frames, log)

    last = tuning.options("transport_alignment.transport", kernel, positions)
    # With more slots the accumulators stay as large as with 64.
    last["BLOCK_ROWS"] = max(16, last["BLOCK_ROWS"] * 64 // max(64, _padded(slots)))
    blocks = triton.cdiv(positions, last["BLOCK_ROWS"])
    parts = marginals.new_empty(pairs, 1 + blocks, slots, pitch)
    launch(
        passes.transport, (pairs * blocks,), kernel, masks, marginals, columns, rows, parts,
        frames, positions, slots, pitch, blocks, *masks.stride(),
        LOG=log, SLOTS=_padded(slots), **last, flops=4 * pairs * positions**2 * slots,
    )  # fmt: skip
    return parts


def _combined(partial: Tensor, marginals: Tensor, columns: Tensor, frames: int, log: bool) -> None:
    """Fill `columns [pairs,2,pitch]` from the sums of row blocks `[pairs,spans,planes,pitch]`."""
    pairs, spans, _, pitch = partial.shape
    positions = marginals.shape[-1]
    chosen = tuning.options("transport_alignment.combine", partial, positions)
    blocks = triton.cdiv(pitch, chosen["BLOCK_COLUMNS"])
    launch(
        passes.combine, (pairs * blocks,), partial, marginals, columns,
        frames, positions, pitch, blocks, spans, LOG=log, **chosen,
    )  # fmt: skip


def _collected(parts: Tensor, targets: Tensor) -> None:
    """Fill `targets [B,T,N,L]` from the pairs' `parts [pairs,1+spans,N,pitch]`."""
    clips, frames, slots, positions = targets.shape
    chosen = tuning.options("transport_alignment.collect", parts, positions)
    blocks = triton.cdiv(positions, chosen["BLOCK_COLUMNS"])
    launch(
        passes.collect, (clips * frames * blocks,), parts, targets,
        frames, positions, slots, parts.shape[-1], blocks, parts.shape[1] - 1,
        SLOTS=triton.next_power_of_2(slots), **chosen,
    )  # fmt: skip


def _plain(
    features: Tensor, masks: Tensor, epsilon: float, iterations: int, marginals: str, cost: str
) -> Tensor:
    """As `_forward`, in plain torch."""
    return eager.transport_alignment(
        features, masks, epsilon=epsilon, iterations=iterations, marginals=marginals, cost=cost
    )


def _fake(
    features: Tensor, masks: Tensor, epsilon: float, iterations: int, marginals: str, cost: str
) -> Tensor:
    clips, frames, positions, _ = features.shape
    return features.new_empty(clips, frames, masks.shape[2], positions, dtype=torch.float32)


_operator = register("transport_alignment", _forward, _plain, _fake)


def transport_alignment(
    features: Tensor,
    masks: Tensor,
    *,
    epsilon: float,
    iterations: int,
    marginals: str = "uniform",
    cost: str = "cosine",
) -> Tensor:
    """The operation of `ops.py`, fused."""
    out: Tensor = _operator(features, masks, epsilon, iterations, marginals, cost)
    return out
