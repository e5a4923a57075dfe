"""instance_consistency fused with its matching: embeddings in, loss and coefficients out.

A program owns (clip b, semantic n, FRAMES frames t of the student) and walks over the teacher's
frames j, FRAMES at a time. PP is P rounded up to a power of two, FRAMES = BLOCK_ROWS / PP; rows
beyond P or T are masked. For a tile:

1. similarities `[FRAMES·PP, FRAMES·PP]`, one product over D in chunks, both operands read in place
   through their strides, 16-bit ones as they are (their products are exact in float32), float32
   ones as three TF32 products. The margin form divides by the norms, and walks over D once more
   for the distances, by differences: the Gram form would lose small ones.
2. the tile becomes `[FRAMES², PP²]`: a row for each matching problem (t,j), which `cheapest` of
   `assignment` solves in registers, at most all its permutations at once.
3. loss terms, masked and weighted, are summed; the derivatives by the similarities (in the margin
   form: by the distances, divided by them) are stored as coefficients `[B,N,TP,TP]`, float32.

The weights are final: the clips' count of valid slots is made by the program itself from T·N·P
flags, the batch's by one torch sum beforehand. The loss is one sum over the partial results.
The backward is one small kernel: `grad_student[t,p] = grad · Σ_jq c[tp,jq] teacher[j,q]`, or
`Σ_jq c[tp,jq] (student[t,p] - teacher[j,q])`. Keeping coefficients instead of the gradient saves
524 KB where the gradient has 6.3 MB, rounds the gradient once, after its multiplication with a
loss scale (fp16 would lose it before), and lets small differences stay differences.

At B 32, T 4, N 16, P 4, D 384, bf16: tiles of 16 x 16 with one step of j, 512 programs of 4 warps.
* forward: both embeddings once, 12.6 MB, 2.9 µs at 4.3 TB/s; 0.1 GFLOP; 0.5 MB of coefficients.
  In a program 16 x 16 similarities (2 a thread), 16 problems x 32 totals in float64 (4 a thread);
  chunks of 128 of D, 4 KB an operand and stage. The margin form sums 16 x 16 x 16 differences, 32
  a thread, and reads its rows again, from L1 or L2.
* backward: the teacher, the coefficients, and the gradient out: 13.1 MB, 3 µs. 1536 programs, each
  16 x 128 of the gradient, 16 accumulators a thread.
Launches: forward 2 (3 with "batch"), backward 1. A tile of 16 rows takes the small tensor-core
instruction (HMMA), also on sm_90, whose large one needs 64 rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import eager, tuning
from .assignment import cheapest
from .launching import launch
from .registration import register
from .triton_helpers import dot, rounded


@triton.jit
def _count(
    valid, frames, semantics, valid_t, valid_n, valid_p, P: tl.constexpr, BLOCK: tl.constexpr
):
    """How many of a clip's flags are set."""
    total = 0
    for start in range(0, frames * semantics * P, BLOCK):
        place = (start + tl.arange(0, BLOCK)).to(tl.int64)
        slot, semantic, frame = place % P, place // P % semantics, place // (P * semantics)
        flag = tl.load(
            valid + frame * valid_t + semantic * valid_n + slot * valid_p,
            mask=frame < frames,
            other=0,
        )
        total += tl.sum((flag != 0).to(tl.int32), axis=0)
    return total


@triton.jit
def _by_frames(tile, FRAMES: tl.constexpr, PADDED: tl.constexpr):
    """`[FRAMES·PADDED, FRAMES·PADDED]` -> `[FRAMES², PADDED²]`: frames (t,j), slots (p,q)."""
    split = tl.permute(tl.reshape(tile, [FRAMES, PADDED, FRAMES, PADDED]), (0, 2, 1, 3))
    return tl.reshape(split, [FRAMES * FRAMES, PADDED * PADDED])


@triton.jit
def _similarities(
    student, teacher, inside_s, inside_t, width, student_d, teacher_d,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Products of the rows at `student` and `teacher`, pointers `[BLOCK_ROWS]`."""
    same: tl.constexpr = student.dtype.element_ty == teacher.dtype.element_ty
    tile = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        d = start + tl.arange(0, BLOCK_WIDTH).to(tl.int64)
        left = tl.load(
            student[:, None] + d[None, :] * student_d,
            mask=inside_s[:, None] & (d < width)[None, :],
            other=0.0,
        )
        right = tl.load(
            teacher[None, :] + d[:, None] * teacher_d,
            mask=inside_t[None, :] & (d < width)[:, None],
            other=0.0,
        )
        if same:
            tile = dot(left, right, tile)
        else:
            tile = dot(left.to(tl.float32), right.to(tl.float32), tile)
    return tile


@triton.jit
def _distances(
    student, teacher, inside_s, inside_t, width, student_d, teacher_d,
    BLOCK_ROWS: tl.constexpr, BLOCK_DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """Distances of the rows by direct differences, and the product of their norms."""
    squares = tl.zeros([BLOCK_ROWS, BLOCK_ROWS, BLOCK_DIFFERENCE], tl.float32)
    own = tl.zeros([BLOCK_ROWS, BLOCK_DIFFERENCE], tl.float32)
    other = tl.zeros([BLOCK_ROWS, BLOCK_DIFFERENCE], tl.float32)
    for start in range(0, width, BLOCK_DIFFERENCE):
        d = start + tl.arange(0, BLOCK_DIFFERENCE).to(tl.int64)
        left = tl.load(
            student[:, None] + d[None, :] * student_d,
            mask=inside_s[:, None] & (d < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        right = tl.load(
            teacher[:, None] + d[None, :] * teacher_d,
            mask=inside_t[:, None] & (d < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        difference = left[:, None, :] - right[None, :, :]
        squares += difference * difference
        own += left * left
        other += right * right
    own_norm = tl.maximum(tl.sqrt(tl.sum(own, axis=1)), 1e-12)
    other_norm = tl.maximum(tl.sqrt(tl.sum(other, axis=1)), 1e-12)
    return tl.sqrt(tl.sum(squares, axis=2)), own_norm[:, None] * other_norm[None, :]


@triton.jit
def _clipped(value):
    """`relu`, which keeps NaN."""
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _match(
    student, teacher, student_valid, teacher_valid, batch_count, losses, coefficients, nearer,
    clips, frames, semantics, tiles, width, margin,
    student_b, student_t, student_n, student_p, student_d,
    teacher_b, teacher_t, teacher_n, teacher_p, teacher_d,
    own_b, own_t, own_n, own_p, other_b, other_t, other_n, other_p,
    COSINE: tl.constexpr, BY_CLIP: tl.constexpr, P: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_DIFFERENCE: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):  # fmt: skip
    """Program (b, n, tile) writes the partial loss `losses[b,n,tile]` and rows of
    `coefficients[b,n,TP,TP]`, or counts in `nearer[b,n,tile]` the negatives within the margin.
    """
    FRAMES: tl.constexpr = BLOCK_ROWS // PADDED
    PROBLEMS: tl.constexpr = FRAMES * FRAMES
    program = tl.program_id(0).to(tl.int64)
    clip, semantic = program // (tiles * semantics), program // tiles % semantics
    first = program % tiles * FRAMES
    own_flags = student_valid + clip * own_b
    if COSINE:
        if BY_CLIP:
            flags = _count(own_flags, frames, semantics, own_t, own_n, own_p, P, BLOCK_COUNT)
            weight = 1.0 / (tl.maximum((flags * frames).to(tl.float32), 1.0) * clips)
        else:
            weight = 1.0 / ((tl.load(batch_count) * frames).to(tl.float32) + 1e-10)
    else:
        weight = 1.0 / clips

    row = tl.arange(0, BLOCK_ROWS).to(tl.int64)
    frame, slot = first + row // PADDED, row % PADDED
    rows = student + clip * student_b + semantic * student_n + frame * student_t + slot * student_p
    inside = (frame < frames) & (slot < P)
    # The tile by problems: student frame t and slot p, teacher frame j and slot q.
    problem = tl.arange(0, PROBLEMS).to(tl.int64)[:, None]
    element = tl.arange(0, PADDED * PADDED).to(tl.int64)[None, :]
    t, p, q = first + problem // FRAMES, element // PADDED, element % PADDED
    valid = tl.load(
        own_flags + semantic * own_n + t * own_t + p * own_p, mask=(t < frames) & (p < P), other=0
    )
    total = tl.zeros([PROBLEMS, PADDED * PADDED], tl.float32)
    for start in range(0, frames, FRAMES):
        other_frame = start + row // PADDED
        others = (
            teacher + clip * teacher_b + semantic * teacher_n
            + other_frame * teacher_t + slot * teacher_p
        )  # fmt: skip
        inside_other = (other_frame < frames) & (slot < P)
        similarity = _similarities(
            rows, others, inside, inside_other, width, student_d, teacher_d,
            BLOCK_ROWS, BLOCK_WIDTH,
        )  # fmt: skip
        j = start + problem % FRAMES
        stored = (t < frames) & (j < frames) & (p < P) & (q < P)
        counted = stored & (valid != 0)
        if not COSINE:
            distance, norms = _distances(
                rows, others, inside, inside_other, width, student_d, teacher_d,
                BLOCK_ROWS, BLOCK_DIFFERENCE,
            )  # fmt: skip
            similarity = similarity / norms
            distance = _by_frames(distance, FRAMES, PADDED)
            counted = counted & (t != j)
        similarity = _by_frames(similarity, FRAMES, PADDED)
        code = cheapest(-similarity, P, PADDED)
        matched = ((code[:, None] >> (4 * p).to(tl.int32)) & 15) == q
        if nearer is not None:
            total += (counted & (matched == 0) & (distance < margin)).to(tl.float32)
        else:
            partner = tl.load(
                teacher_valid + clip * other_b + semantic * other_n + j * other_t + q * other_p,
                mask=stored,
                other=0,
            )
            gate = (partner != 0).to(tl.float32)
            if COSINE:
                share: tl.constexpr = 1.0 / (P - 1) if P > 1 else 1.0
                term = tl.where(matched, -similarity * gate, _clipped(similarity - margin) * share)
                slope = tl.where(matched, -gate, (similarity > margin).to(tl.float32) * share)
            else:
                term = tl.where(matched, distance * gate, _clipped(margin - distance))
                slope = tl.where(matched, gate, -(distance < margin).to(tl.float32))
                slope = tl.where(distance > 0, slope / tl.where(distance > 0, distance, 1.0), 0.0)
            total += tl.where(counted, term, 0.0)
            if coefficients is not None:
                matrix = coefficients + program // tiles * (frames * P) * (frames * P)
                tl.store(
                    matrix + (t * P + p) * (frames * P) + j * P + q,
                    tl.where(counted, slope * weight, 0.0),
                    mask=stored,
                )
    summed = tl.sum(tl.sum(total, axis=1), axis=0)
    if nearer is not None:
        tl.store(nearer + program, summed.to(tl.int32))
    else:
        tl.store(losses + program, summed * weight)


@triton.jit
def _student_gradient(
    grad, coefficients, student, teacher, out, frames, semantics, slots, tiles, width,
    student_b, student_t, student_n, student_p, student_d,
    teacher_b, teacher_t, teacher_n, teacher_p, teacher_d,
    COSINE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (b, n, tile of rows (t,p)), columns `program_id(1)` of `out[b,t,n,p]`."""
    program = tl.program_id(0).to(tl.int64)
    clip, semantic = program // (tiles * semantics), program // tiles % semantics
    places = frames * slots
    row = program % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH).to(tl.int64)
    matrix = coefficients + program // tiles * places * places
    others = teacher + clip * teacher_b + semantic * teacher_n
    frame, slot = row // slots, row % slots
    inside = (row < places)[:, None] & (d < width)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    if COSINE:
        for start in range(0, places, BLOCK_INNER):
            place = start + tl.arange(0, BLOCK_INNER).to(tl.int64)
            factor = tl.load(
                matrix + row[:, None] * places + place[None, :],
                mask=(row < places)[:, None] & (place < places)[None, :],
                other=0.0,
            )
            other_rows = others + place // slots * teacher_t + place % slots * teacher_p
            other = tl.load(
                other_rows[:, None] + d[None, :] * teacher_d,
                mask=(place < places)[:, None] & (d < width)[None, :],
                other=0.0,
            )
            total = dot(factor, other.to(tl.float32), total)
    else:
        rows = student + clip * student_b + semantic * student_n
        rows += frame * student_t + slot * student_p
        own = tl.load(rows[:, None] + d[None, :] * student_d, mask=inside, other=0.0).to(tl.float32)
        for place in range(places):
            factor = tl.load(matrix + row * places + place, mask=row < places, other=0.0)
            other_row = others + (place // slots).to(tl.int64) * teacher_t
            other_row += (place % slots).to(tl.int64) * teacher_p
            other = tl.load(other_row + d * teacher_d, mask=d < width, other=0.0).to(tl.float32)
            total += factor[:, None] * (own - other[None, :])
    total *= tl.load(grad).to(tl.float32)
    # out is contiguous, [B,T,N,P,D]
    target = ((clip * frames + frame) * semantics + semantic) * slots + slot
    tl.store(out + target[:, None] * width + d[None, :], rounded(total, out), mask=inside)


def _start(
    student: Tensor,
    teacher: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    batch_count: Tensor | None,
    losses: Tensor | None,
    coefficients: Tensor | None,
    nearer: Tensor | None,
    cosine: bool,
    by_clip: bool,
    margin: float,
) -> None:
    """Fill `losses` and `coefficients`, or `nearer`: `[B,N,tiles]`, `[B,N,TP,TP]`."""
    clips, frames, semantics, slots, width = student.shape
    chosen = tuning.options("instance_consistency", student, frames * slots)
    tiles = _tiles(student)
    launch(
        _match, (clips * semantics * tiles,), student, teacher, student_valid, teacher_valid,
        batch_count, losses, coefficients, nearer, clips, frames, semantics, tiles, width, margin,
        *student.stride(), *teacher.stride(), *student_valid.stride(), *teacher_valid.stride(),
        COSINE=cosine, BY_CLIP=by_clip, P=slots, PADDED=triton.next_power_of_2(slots), **chosen,
        flops=2 * clips * semantics * (frames * slots) ** 2 * width,
    )  # fmt: skip


def _tiles(student: Tensor) -> int:
    """Programs a clip and semantic."""
    frames, slots = student.shape[1], student.shape[3]
    chosen = tuning.options("instance_consistency", student, frames * slots)
    frames_a_tile = chosen["BLOCK_ROWS"] // triton.next_power_of_2(slots)
    tiles: int = triton.cdiv(frames, frames_a_tile)
    return tiles


def _forward(
    student: Tensor,
    teacher: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    form: str,
    margin: float,
    normaliser: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and the coefficients `[B,N,TP,TP]`, both float32; empty if no gradient is wanted."""
    clips, frames, semantics, slots, _ = student.shape
    losses = student.new_empty(clips, semantics, _tiles(student), dtype=torch.float32)
    size = (clips, semantics, frames * slots, frames * slots) if want_gradient else (0,)
    coefficients = student.new_empty(size, dtype=torch.float32)
    cosine, by_clip = form == "cosine", normaliser == "clip"
    count = student_valid.sum() if cosine and not by_clip else None
    _start(
        student, teacher, student_valid, teacher_valid, count, losses,
        coefficients if want_gradient else None, None, cosine, by_clip, margin,
    )  # fmt: skip
    return losses.sum(), coefficients


def _backward(
    grad: Tensor,
    coefficients: Tensor,
    student: Tensor | None,
    teacher: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The student's gradient `[B,T,N,P,D]` in `dtype`; `student` only in the margin form."""
    clips, frames, semantics, slots, width = teacher.shape
    out = teacher.new_empty(teacher.shape, dtype=dtype)
    chosen = tuning.options("instance_consistency.backward", teacher, frames * slots)
    tiles = triton.cdiv(frames * slots, chosen["BLOCK_ROWS"])
    own = teacher if student is None else student
    launch(
        _student_gradient,
        (clips * semantics * tiles, triton.cdiv(width, chosen["BLOCK_WIDTH"])),
        grad, coefficients, own, teacher, out, frames, semantics, slots, tiles, width,
        *own.stride(), *teacher.stride(), COSINE=student is None, **chosen,
        flops=2 * clips * semantics * (frames * slots) ** 2 * width if student is None else 0,
    )  # fmt: skip
    return out


def _plain(
    student: Tensor,
    teacher: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    form: str,
    margin: float,
    normaliser: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """As `_forward`."""
    student, teacher = student.float(), teacher.float()
    clips, frames, _, slots, _ = student.shape
    gate = teacher_valid.transpose(1, 2)[:, :, None, :, None, :].float()  # [B,N,1,T,1,P]
    counted = student_valid.transpose(1, 2)[:, :, :, None, :, None]  # [B,N,T,1,P,1]
    if form == "l2_margin":
        distance, matched = eager._distances(student, teacher)
        counted = eager._other_frames(student_valid)
        term = torch.where(matched, distance * gate, torch.relu(margin - distance))
        slope = torch.where(matched, gate, -(distance < margin).float())
        slope = torch.where(distance > 0, slope / distance, 0)
        weight = student.new_full((clips,), 1 / max(clips, 1))
    else:
        pairs = eager._instance_pairs(student) @ eager._instance_pairs(teacher).mT
        similarity = eager._by_frames(pairs, frames)
        matched = eager._matched(similarity)
        share = 1 / max(slots - 1, 1)
        term = torch.where(matched, -similarity * gate, torch.relu(similarity - margin) * share)
        slope = torch.where(matched, -gate, (similarity > margin).float() * share)
        count = frames * student_valid.flatten(1).sum(1).float()
        if normaliser == "clip":
            weight = 1 / (count.clamp_min(1) * clips)
        else:
            weight = (1 / (count.sum() + 1e-10)).expand(clips)
    weighted = counted * weight.view(-1, *[1] * 5)
    if want_gradient:
        coefficients = (slope * weighted).transpose(3, 4).flatten(4, 5).flatten(2, 3).contiguous()
    else:
        coefficients = student.new_empty(0)
    return (term * weighted).sum(), coefficients


def _plain_backward(
    grad: Tensor,
    coefficients: Tensor,
    student: Tensor | None,
    teacher: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """As `_backward`."""
    frames, slots = teacher.shape[1], teacher.shape[3]
    others = eager._instance_pairs(teacher.float())  # [B,N,TP,D]
    if student is None:
        out = coefficients @ others
    else:
        own = eager._instance_pairs(student.float())
        out = torch.zeros_like(own)
        for place in range(frames * slots):
            difference = own - others[:, :, place, None]
            out += coefficients[..., place, None] * difference
    out = (out * grad).unflatten(2, (frames, slots)).transpose(1, 2)
    return out.to(dtype, memory_format=torch.contiguous_format)


def _fake(
    student: Tensor,
    teacher: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    form: str,
    margin: float,
    normaliser: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    clips, frames, semantics, slots, _ = student.shape
    size = (clips, semantics, frames * slots, frames * slots) if want_gradient else (0,)
    return student.new_empty((), dtype=torch.float32), student.new_empty(size, dtype=torch.float32)


def _fake_backward(
    grad: Tensor,
    coefficients: Tensor,
    student: Tensor | None,
    teacher: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return teacher.new_empty(teacher.shape, dtype=dtype)


def _nearer(student: Tensor, teacher: Tensor, student_valid: Tensor, margin: float) -> Tensor:
    """The share of the margin form's negatives that are nearer than the margin, float32."""
    clips, frames, semantics, slots, _ = student.shape
    nearer = student.new_empty(clips, semantics, _tiles(student), dtype=torch.int32)
    _start(
        student, teacher, student_valid, student_valid, None, None, None, nearer, False, False,
        margin,
    )  # fmt: skip
    negatives = student_valid.sum() * ((frames - 1) * (slots - 1))
    return (nearer.sum() / negatives.clamp_min(1)).float()


def _plain_nearer(student: Tensor, teacher: Tensor, student_valid: Tensor, margin: float) -> Tensor:
    return eager.active_negatives(student, teacher, student_valid, margin=margin)


def _fake_nearer(student: Tensor, teacher: Tensor, student_valid: Tensor, margin: float) -> Tensor:
    return student.new_empty((), dtype=torch.float32)


_operator = register("instance_consistency", _forward, _plain, _fake)
_operator_backward = register(
    "instance_consistency_backward", _backward, _plain_backward, _fake_backward
)
_operator_nearer = register("active_negatives", _nearer, _plain_nearer, _fake_nearer)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, _, _, form, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = student.dtype
    ctx.save_for_backward(output[1], student if form == "l2_margin" else None, teacher)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gradient = _operator_backward(grad, *ctx.saved_tensors, ctx.dtype)
    return gradient, None, None, None, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)


def instance_consistency(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    *,
    form: str,
    margin: float,
    normaliser: str = "batch",
) -> Tensor:
    """The operation of `ops.py`, fused."""
    want_gradient = torch.is_grad_enabled() and student_embeddings.requires_grad
    loss: Tensor = _operator(
        student_embeddings, teacher_embeddings, student_valid, teacher_valid,
        form, margin, normaliser, want_gradient,
    )[0]  # fmt: skip
    return loss


def active_negatives(
    student_embeddings: Tensor, teacher_embeddings: Tensor, student_valid: Tensor, *, margin: float
) -> Tensor:
    """The share of the margin form's negatives nearer than the margin, on the same kernel."""
    share: Tensor = _operator_nearer(student_embeddings, teacher_embeddings, student_valid, margin)
    return share
