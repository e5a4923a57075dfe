"""mask_losses from one read of the logits and targets, forward and backward; no mask is stored.

With `M = softmax_N(logits)` of a frame, `|M_n|` its norms over the positions and `u = M/|M|`:

    alignment       -Σ targets·log(M+δ), or with the log-softmax for δ = 0
    regularisation  Σ_n c_n,  c_n = Σ_{m≠n} u_n·u_m = Σ_{m≠n} (M Mᵀ)_nm / (|M_n| |M_m|)
    d alignment     M·Σ_n pull - pull,  pull = targets·M/(M+δ), or targets for δ = 0
    d regularisation, in M    2 (Σ_{m≠n} u_m - c_n u_n) / |M_n|, through the softmax's gradient

Forward, a program a frame: it walks over L in tiles [N, BLOCK], N padded to a power of two, and
keeps the Gram matrix M Mᵀ and the alignment's terms in registers. So the norms, which are known
only after the last position, need no second walk. At the end it writes 1/|M| and c, N numbers each,
which are all that backward needs beside the inputs, and the frame's two sums. One more program adds
these over the frames, in one order on every run.

Backward, a program a frame and tile: it recomputes M and writes the gradient. An upstream gradient
that is absent drops its half, and with the alignment's the read of the targets.

At 128 frames, N 16, logits and targets in float32, L 256 / 1024 / 1500:
* forward reads 4.2 / 17 / 25 MB: 1.0 / 3.9 / 5.7 µs at 4.3 TB/s; backward moves half as much again.
  What else leaves the chip, sums and vectors, is 17 KB.
* a forward tile 16 x 256 is 16 values a thread, with 8 warps, of the logits, the targets and the
  alignment's terms. Its Gram product is 0.13 MFLOP, three times that for float32 by TF32: 0.3
  GFLOP in all at L 1500. One product 16 x 16 has work for two warps, and the others would repeat
  it with all its operands in their registers; so each warp multiplies its eighth of the positions
  (PARTS) into a Gram matrix of its own, 8 numbers a thread, which are added at the end. Rows of
  16 run as HMMA; HGMMA needs 64.
* 128 programs keep the 132 multiprocessors of an H200 busy, each with 32 KB of reads in flight or
  more where 4.3 TB/s at 0.7 µs of latency need 23 KB. Parts of a frame in programs of their own
  would serve fewer frames better, but need a third launch, which costs as much as the whole read.
* backward has 256 / 1024 / 1536 programs of 16 x 128, 16 values a thread with 4 warps.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launching import launch
from .precision import upcast
from .registration import register
from .triton_helpers import dot, rounded

# As in `torch.nn.functional.normalize`: norms below count as this, and as constants.
SMALLEST_NORM = 1e-12
_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)
# Frames whose sums are added at a time.
BLOCK_FRAMES = 1024


@triton.jit
def _frame_of(tensor, frames_per_clip, clip_stride, frame_stride):
    """Where frame `program_id(0)` of `[B,T,N,L]` begins."""
    frame = tl.program_id(0).to(tl.int64)
    return tensor + frame // frames_per_clip * clip_stride + frame % frames_per_clip * frame_stride


@triton.jit
def _tile(frame, slot, position, slots, positions, slot_stride, position_stride):
    """A frame's `[slot, position]` in float32, 0 outside."""
    return tl.load(
        frame + slot[:, None] * slot_stride + position[None, :] * position_stride,
        mask=(slot < slots)[:, None] & (position < positions)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _softmax(logits, slot, slots):
    """Masks and their logarithms (of the log-softmax); the padding slots get 0."""
    exists = (slot < slots)[:, None]
    logits = tl.where(exists, logits, float("-inf"))
    logits -= tl.max(logits, axis=0)[None, :]
    weights = tl.exp(logits)
    total = tl.sum(weights, axis=0)[None, :]
    return weights / total, tl.where(exists, logits - tl.log(total), 0.0)


@triton.jit
def _with_products(gram, masks, PARTS: tl.constexpr):
    """`gram` plus the products of the slots of `masks [N,positions]`: `[N,N]`, or in PARTS parts
    of the positions `[PARTS,N,N]`, which go to warps of their own.
    """
    if PARTS == 1:
        return dot(masks, tl.trans(masks), gram)
    else:
        width: tl.constexpr = masks.shape[1] // PARTS
        parts = tl.permute(tl.reshape(masks, [masks.shape[0], PARTS, width]), (1, 0, 2))
        return dot(parts, tl.permute(parts, (0, 2, 1)), gram)


@triton.jit
def _frame_losses(
    logits, targets, sums, inverse_norms, others, frames_per_clip, slots, positions, delta,
    logits_clip, logits_frame, logits_slot, logits_position,
    targets_clip, targets_frame, targets_slot, targets_position,
    LOG_SOFTMAX: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Both sums of frame `program_id(0)` to `sums [2,frames]`; 1/|M_n| and c_n to `[frames,N]`."""
    slot = tl.arange(0, PADDED).to(tl.int64)
    logits = _frame_of(logits, frames_per_clip, logits_clip, logits_frame)
    targets = _frame_of(targets, frames_per_clip, targets_clip, targets_frame)
    if PARTS == 1:
        gram = tl.zeros([PADDED, PADDED], tl.float32)
    else:
        gram = tl.zeros([PARTS, PADDED, PADDED], tl.float32)
    terms = tl.zeros([PADDED, BLOCK], tl.float32)
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK).to(tl.int64)
        tile = _tile(logits, slot, position, slots, positions, logits_slot, logits_position)
        target = _tile(targets, slot, position, slots, positions, targets_slot, targets_position)
        masks, log_masks = _softmax(tile, slot, slots)
        if not LOG_SOFTMAX:
            log_masks = tl.log(masks + delta)
        terms += target * log_masks
        masks = tl.where((position < positions)[None, :], masks, 0.0)
        gram = _with_products(gram, masks, PARTS)
    if PARTS > 1:
        gram = tl.sum(gram, axis=0)

    row, column = tl.arange(0, PADDED)[:, None], tl.arange(0, PADDED)[None, :]
    diagonal = tl.where(row == column, gram, 0.0)
    norm = tl.sqrt(tl.sum(diagonal, axis=1))
    inverse = 1.0 / tl.maximum(norm, _SMALLEST_NORM)
    across = 1.0 / tl.maximum(tl.sqrt(tl.sum(diagonal, axis=0)), _SMALLEST_NORM)
    cosines = tl.where(row == column, 0.0, gram * inverse[:, None] * across[None, :])
    cosine = tl.sum(cosines, axis=1)

    frame = tl.program_id(0).to(tl.int64)
    vector = frame * slots + slot
    tl.store(inverse_norms + vector, inverse, mask=slot < slots)
    # A norm that counts as a constant pulls nothing back.
    tl.store(others + vector, tl.where(norm < _SMALLEST_NORM, 0.0, cosine), mask=slot < slots)
    tl.store(sums + frame, -tl.sum(terms))
    tl.store(sums + tl.num_programs(0).to(tl.int64) + frame, tl.sum(cosine))


@triton.jit
def _total(sums, alignment, regularisation, frames, pairs, slot_pairs, BLOCK: tl.constexpr):
    """Both losses from `sums [2,frames]`."""
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for start in range(0, frames, BLOCK):
        frame = start + tl.arange(0, BLOCK).to(tl.int64)
        first += tl.load(sums + frame, mask=frame < frames, other=0.0)
        second += tl.load(sums + frames + frame, mask=frame < frames, other=0.0)
    tl.store(alignment, tl.sum(first) / pairs)
    tl.store(regularisation, tl.sum(second) / slot_pairs)


@triton.jit
def _gradient(
    logits, targets, out, inverse_norms, others, grad_alignment, grad_regularisation,
    frames_per_clip, slots, positions, delta, pairs, slot_pairs,
    logits_clip, logits_frame, logits_slot, logits_position,
    targets_clip, targets_frame, targets_slot, targets_position,
    LOG_SOFTMAX: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of frame `program_id(0)`, positions `program_id(1)`."""
    slot = tl.arange(0, PADDED).to(tl.int64)
    position = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    frame = tl.program_id(0).to(tl.int64)
    inside = (slot < slots)[:, None] & (position < positions)[None, :]
    logits = _frame_of(logits, frames_per_clip, logits_clip, logits_frame)
    tile = _tile(logits, slot, position, slots, positions, logits_slot, logits_position)
    masks, _ = _softmax(tile, slot, slots)
    gradient = tl.zeros([PADDED, BLOCK], tl.float32)
    if grad_alignment is not None:
        targets = _frame_of(targets, frames_per_clip, targets_clip, targets_frame)
        pull = _tile(targets, slot, position, slots, positions, targets_slot, targets_position)
        if not LOG_SOFTMAX:
            pull *= masks / (masks + delta)
        factor = tl.load(grad_alignment).to(tl.float32) / pairs
        gradient += (masks * tl.sum(pull, axis=0)[None, :] - pull) * factor
    if grad_regularisation is not None:
        vector = frame * slots + slot
        inverse = tl.load(inverse_norms + vector, mask=slot < slots, other=0.0)[:, None]
        cosine = tl.load(others + vector, mask=slot < slots, other=0.0)[:, None]
        unit = masks * inverse
        # Of one slot the total is its own unit vector, and the difference exactly 0.
        by_mask = (tl.sum(unit, axis=0)[None, :] - unit - cosine * unit) * inverse
        factor = 2 * tl.load(grad_regularisation).to(tl.float32) / slot_pairs
        gradient += masks * (by_mask - tl.sum(masks * by_mask, axis=0)[None, :]) * factor
    where = out + (frame * slots + slot[:, None]) * positions + position[None, :]
    tl.store(where, rounded(gradient, out), mask=inside)


def _counts(logits: Tensor) -> tuple[int, int]:
    """What the sums of alignment and regularisation are divided by."""
    clips, frames, slots, _ = logits.shape
    clips = max(clips, 1)
    return clips * max(frames * (frames - 1), 1), clips * frames * max(slots * (slots - 1), 1)


def _padded(slots: int) -> int:
    """Rows of a tile: the tensor cores take 16 or more."""
    return max(16, triton.next_power_of_2(slots))


def _takes_log_softmax(delta: float) -> bool:
    """Whether δ is 0, as float32 has it."""
    return delta < torch.finfo(torch.float32).tiny


def _forward(
    logits: Tensor, targets: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Alignment and regularisation; 1/|M_n| and c_n `[B,T,N]`; all float32."""
    clips, frames_per_clip, slots, positions = logits.shape
    frames = clips * frames_per_clip
    alignment, regularisation = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    inverse_norms, others = (
        logits.new_empty(logits.shape[:3], dtype=torch.float32) for _ in range(2)
    )
    sums = logits.new_empty(2, frames, dtype=torch.float32)
    launch(
        _frame_losses, (frames,), logits, targets, sums, inverse_norms, others, frames_per_clip,
        slots, positions, delta, *logits.stride(), *targets.stride(),
        LOG_SOFTMAX=_takes_log_softmax(delta), PADDED=_padded(slots),
        **tuning.options("mask_losses", logits, slots),
        flops=2 * frames * positions * slots**2,
    )  # fmt: skip
    launch(
        _total, (1,), sums, alignment, regularisation, frames, *_counts(logits), BLOCK=BLOCK_FRAMES
    )
    return alignment, regularisation, inverse_norms, others


def _backward(
    grad_alignment: Tensor | None,
    grad_regularisation: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    inverse_norms: Tensor,
    others: Tensor,
    delta: float,
) -> Tensor:
    """The gradient of the logits, in their dtype; that of a loss may be absent."""
    clips, frames_per_clip, slots, positions = logits.shape
    out = logits.new_empty(logits.shape)
    chosen = tuning.options("mask_losses.backward", logits, slots)
    launch(
        _gradient, (clips * frames_per_clip, triton.cdiv(positions, chosen["BLOCK"])),
        logits, targets, out, inverse_norms, others, grad_alignment, grad_regularisation,
        frames_per_clip, slots, positions, delta, *_counts(logits),
        *logits.stride(), *targets.stride(),
        LOG_SOFTMAX=_takes_log_softmax(delta), PADDED=_padded(slots), **chosen,
    )  # fmt: skip
    return out


def _plain(logits: Tensor, targets: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_forward` in plain torch."""
    logits, targets = upcast(logits, targets)
    pairs, slot_pairs = _counts(logits)
    masks = torch.softmax(logits, dim=2)
    log_softmax = _takes_log_softmax(delta)
    log_masks = torch.log_softmax(logits, dim=2) if log_softmax else torch.log(masks + delta)
    norms = torch.linalg.vector_norm(masks, dim=-1)
    inverse_norms = 1 / norms.clamp_min(SMALLEST_NORM)
    unit = masks * inverse_norms[..., None]
    cosines = unit @ unit.mT
    cosines.diagonal(dim1=-2, dim2=-1).zero_()
    others = cosines.sum(-1)
    alignment = -(targets * log_masks).sum() / pairs
    regularisation = others.sum() / slot_pairs
    return alignment, regularisation, inverse_norms, others.masked_fill(norms < SMALLEST_NORM, 0)


def _plain_backward(
    grad_alignment: Tensor | None,
    grad_regularisation: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    inverse_norms: Tensor,
    others: Tensor,
    delta: float,
) -> Tensor:
    """`_backward` in plain torch."""
    dtype = logits.dtype
    logits, targets = upcast(logits, targets)
    pairs, slot_pairs = _counts(logits)
    masks = torch.softmax(logits, dim=2)
    gradient = torch.zeros_like(masks, memory_format=torch.contiguous_format)
    if grad_alignment is not None:
        pull = targets if _takes_log_softmax(delta) else targets * masks / (masks + delta)
        gradient += (masks * pull.sum(2, keepdim=True) - pull) * (grad_alignment / pairs)
    if grad_regularisation is not None:
        unit = masks * inverse_norms[..., None]
        by_mask = unit.sum(2, keepdim=True) - unit - others[..., None] * unit
        by_mask *= inverse_norms[..., None] * (2 * grad_regularisation / slot_pairs)
        gradient += masks * (by_mask - (masks * by_mask).sum(2, keepdim=True))
    return gradient.to(dtype)


def _fake(logits: Tensor, targets: Tensor, delta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alignment, regularisation = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    inverse_norms, others = (
        logits.new_empty(logits.shape[:3], dtype=torch.float32) for _ in range(2)
    )
    return alignment, regularisation, inverse_norms, others


def _fake_backward(
    grad_alignment: Tensor | None,
    grad_regularisation: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    inverse_norms: Tensor,
    others: Tensor,
    delta: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


_operator = register("mask_losses", _forward, _plain, _fake)
_operator_backward = register("mask_losses_backward", _backward, _plain_backward, _fake_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.delta = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, targets, *output[2:])


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
    if not ctx.needs_input_grad[0] or (grads[0] is None and grads[1] is None):
        return None, None, None
    return _operator_backward(*grads[:2], *ctx.saved_tensors, ctx.delta), None, None


_operator.register_autograd(_differentiate, setup_context=_save)


def mask_losses(logits: Tensor, targets: Tensor, *, delta: float = 1e-8) -> tuple[Tensor, Tensor]:
    """The operation of `ops.py`, fused."""
    alignment, regularisation, _, _ = _operator(logits, targets, float(delta))
    return alignment, regularisation
