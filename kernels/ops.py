"""The public operations: what they compute, argument checks, dispatch.

Letters: B clips or frames, T frames a clip, L and M positions (rows of the grid one after another),
D and E widths, N semantic slots, G groups, P slots a group. Tensors are float64, float32, bfloat16
or float16 unless said; an operation computes in float32, in float64 where an input is, whatever
autocast says. A batch of 0 gives empty results and losses of 0. A wrong argument is a `ValueError`
that names it, what was expected and what came.

`impl` chooses the implementation: "eager" is plain torch; "triton" the fused kernels, which need a
CUDA device (or TRITON_INTERPRET=1), no float64 and not more slots than `dispatch.MOST_SLOTS`, else
a `ValueError`; "auto" the kernels where they can run and pay, else eager, and says so once in the
log "smtc". The kernels have gradients of the first order, in reverse mode only.
"""

from typing import Literal

import torch
from torch import Tensor

from .checks import FLOATS, Arguments
from .dispatch import implementation

Impl = Literal["auto", "eager", "triton"]

MOST_MATCHED = 8
"""The most slots that the exact assignment handles."""


def correlation_projection(
    query: Tensor,
    reference: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The correlation of frames with reference frames, projected: paper Eq. 2-3, `h_c`.

    `out[b] = query[b] · reference[index[b]]ᵀ · weightᵀ + bias`, raw dot products, in the order with
    fewer multiplications. Products run in the query's dtype and accumulate in float32;
    differentiable in all but `index`.

    Args:
        query: `[B,L,D]` features.
        reference: `[R,M,D]` features, in the query's dtype.
        weight: `[E,M]`, cast to the query's dtype.
        bias: `[E]` or None, cast likewise.
        index: `[B]` int64, the reference of each query, in 0…R-1; repeats are allowed. None: R = B,
            each its own. On a GPU, and when compiled, its range is not checked, since reading it
            would stall the device: a number beyond it reads memory that is no reference.

    Returns:
        `[B,L,E]` in the query's dtype.
    """
    op = "correlation_projection"
    arguments = Arguments(op)
    arguments.tensor("query", query, "B L D")
    arguments.tensor("reference", reference, "B M D" if index is None else "R M D", [query.dtype])
    arguments.tensor("weight", weight, "E M")
    if bias is not None:
        arguments.tensor("bias", bias, "E")
    if index is not None:
        arguments.tensor("index", index, "B", [torch.int64])
        if index.device.type == "cpu" and not torch.compiler.is_compiling() and len(index):
            least, most = int(index.min()), int(index.max())
            if least < 0 or most >= len(reference):
                arguments.fail("index", f"values in 0…{len(reference) - 1}", f"{least}…{most}")
    return implementation(op, impl, query, reference, weight, bias)(
        query, reference, weight, bias, index=index
    )


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """One iteration of slot attention, G groups of P competing slots: paper Eq. 4-5 and 7.

    `logits = scale · queries·keysᵀ + logit_bias`, `W = softmax` of the logits over the P slots of a
    group. Without a mask `A = (W+ε) / Σ_L(W+ε)`, with one `A = (W+ε)·mask / (Σ_L (W+ε)·mask +
    1e-8)`: a group whose mask is empty gets zero updates and zero gradients. `updates = A·values`.
    The semantic stage is one group of N slots, the instance stage N groups of P.

    Logits, softmax and normalisation are float32 (float64 where an input is); the product with the
    values runs in the values' dtype. Differentiable in all but `mask`.

    Args:
        queries: `[B,G,P,D]`.
        keys: `[B,L,D]`.
        values: `[B,L,D]`; may be `keys` itself.
        mask: `[B,G,L]` bool, or 0 and 1 in a number type; None: every position counts.
        scale: factor of the dot products, 1/√D in the paper.
        epsilon: ε > 0.
        logit_bias: `[B,G,P]`, added unscaled at every position.
        return_logits: False spares the second result.

    Returns:
        updates `[B,G,P,D]` in the values' dtype, and logits `[B,G,P,L]` (before the softmax) or
        None.
    """
    op = "masked_slot_attention"
    arguments = Arguments(op)
    arguments.tensor("queries", queries, "B G P D")
    arguments.tensor("keys", keys, "B L D")
    arguments.tensor("values", values, "B L D")
    if mask is not None:
        kinds = (torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS)
        arguments.tensor("mask", mask, "B G L", kinds)
        mask = mask.detach()
    if logit_bias is not None:
        arguments.tensor("logit_bias", logit_bias, "B G P")
    arguments.number("scale", scale)
    arguments.number("epsilon", epsilon, above=0)
    return implementation(op, impl, queries, keys, values, mask, logit_bias)(
        queries,
        keys,
        values,
        mask,
        scale=scale,
        epsilon=epsilon,
        logit_bias=logit_bias,
        return_logits=return_logits,
    )


def sinkhorn(
    cost: Tensor,
    row_marginal: Tensor,
    column_marginal: Tensor,
    *,
    epsilon: float,
    iterations: int,
    impl: Impl = "auto",
) -> Tensor:
    """The entropic transport plan after a fixed number of Sinkhorn iterations: paper Eq. 8.

    In the log domain, from zero potentials, rows first; so the columns' sums are exact and the
    rows' nearly. The plan of `costᵀ` is not the transposed plan. Differentiable through the
    iterations in cost and both marginals; for the backward only the cost and the potentials are
    kept.

    Args:
        cost: `[B,L,M]`.
        row_marginal: `[B,L]`, positive.
        column_marginal: `[B,M]`, positive.
        epsilon: regularisation > 0, in the cost's units.
        iterations: at least 1.

    Returns:
        plan `[B,L,M]`, float32 (float64 where an input is).
    """
    op = "sinkhorn"
    arguments = Arguments(op)
    arguments.tensor("cost", cost, "B L M")
    arguments.tensor("row_marginal", row_marginal, "B L")
    arguments.tensor("column_marginal", column_marginal, "B M")
    arguments.number("epsilon", epsilon, above=0)
    arguments.count("iterations", iterations)
    return implementation(op, impl, cost, row_marginal, column_marginal)(
        cost, row_marginal, column_marginal, epsilon=epsilon, iterations=iterations
    )


def transport_alignment(
    features: Tensor,
    masks: Tensor,
    *,
    epsilon: float,
    iterations: int,
    marginals: Literal["uniform", "l1"] = "uniform",
    cost: Literal["cosine", "dot"] = "cosine",
    impl: Impl = "auto",
) -> Tensor:
    """The teacher's masks, transported to each frame from all others: paper Eq. 8-9.

    `targets[t,n,u] = Σ_{j≠t} Σ_v π_tj[u,v] masks[j,n,v]`, where `π_tj` is the `sinkhorn` plan of
    frames t and j. With one frame there is no pair and the targets are 0. Not differentiable.

    Args:
        features: `[B,T,L,D]`, without requires_grad.
        masks: `[B,T,N,L]`, without requires_grad.
        epsilon: Sinkhorn's regularisation > 0.
        iterations: Sinkhorn's iterations, at least 1.
        marginals: "uniform", or "l1": the L1 norms of the unit-norm features, rescaled to sum 1.
        cost: "cosine": 1 - cos; "dot": -F_t·F_j/√D of the features as they come.

    Returns:
        targets `[B,T,N,L]`, float32 (float64 where an input is).
    """
    op = "transport_alignment"
    arguments = Arguments(op)
    arguments.tensor("features", features, "B T L D")
    arguments.tensor("masks", masks, "B T N L")
    arguments.constant("features", features)
    arguments.constant("masks", masks)
    arguments.number("epsilon", epsilon, above=0)
    arguments.count("iterations", iterations)
    arguments.choice("marginals", marginals, ("uniform", "l1"))
    arguments.choice("cost", cost, ("cosine", "dot"))
    return implementation(op, impl, features, masks)(
        features, masks, epsilon=epsilon, iterations=iterations, marginals=marginals, cost=cost
    )


def mask_losses(
    logits: Tensor, targets: Tensor, *, delta: float = 1e-8, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Semantic alignment and mask regularisation from one softmax: paper Eq. 9-10.

    With `M = softmax_N(logits)`: alignment is `-Σ targets·log(M+δ) / (B·T·(T-1))` (B alone for T =
    1, where targets are 0); regularisation is the cosine of `M_n` and `M_m`, averaged over clips,
    frames and ordered pairs n ≠ m (0 for N = 1). Differentiable once, in the logits; the targets
    are constants.

    Args:
        logits: `[B,T,N,L]`.
        targets: `[B,T,N,L]`, of `transport_alignment`.
        delta: δ ≥ 0; at 0 the logarithm is the log-softmax.

    Returns:
        alignment and regularisation, scalars in float32 (float64 where an input is).
    """
    op = "mask_losses"
    arguments = Arguments(op)
    arguments.tensor("logits", logits, "B T N L")
    arguments.tensor("targets", targets, "B T N L")
    arguments.not_negative("delta", delta)
    return implementation(op, impl, logits, targets)(logits, targets.detach(), delta=delta)


def assignment(cost: Tensor, *, impl: Impl = "auto") -> Tensor:
    """The one-to-one matching of least total cost: ε of paper Eq. 12.

    Exact, in float64 and on the device; of equal minima the lexicographically first permutation.
    Not differentiable.

    Args:
        cost: `[...,P,P]`, rows to columns, P ≤ 8.

    Returns:
        permutation `[...,P]` int64: the column of each row.
    """
    op = "assignment"
    arguments = Arguments(op)
    arguments.tensor("cost", cost, "... P P")
    arguments.at_most("cost", "P", MOST_MATCHED)
    return implementation(op, impl, cost)(cost.detach())


def instance_consistency(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    student_valid: Tensor,
    teacher_valid: Tensor,
    *,
    form: Literal["cosine", "l2_margin"],
    margin: float,
    normaliser: Literal["batch", "clip"] = "batch",
    impl: Impl = "auto",
) -> Tensor:
    """Consistency of matched instances between frames: paper Eq. 12, or the released form.

    The P student slots of frame t are matched with the P teacher slots of frame j and the same
    semantic by the `assignment` of greatest total cosine, valid or not; q ranges over the other
    teacher slots than the partner ε(p).

    * "l2_margin", over t ≠ j: `valid_t · (valid_j[ε(p)] ‖O_t[p] - Ô_j[ε(p)]‖ + Σ_q relu(margin -
      ‖O_t[p] - Ô_j[q]‖))`, summed and divided by B; `normaliser` has no part in it. The gradient at
      distance 0 is 0.
    * "cosine", over all T² pairs: `valid_t · (mean_q relu(cos - margin) - valid_j[ε(p)] · cos)` on
      embeddings of unit norm (cos is their dot product), divided by the number of valid terms:
      "batch" divides the whole sum (+1e-10), "clip" each clip's, by at least 1, and averages clips.

    Differentiable in the student's embeddings; the teacher's are constants. Without a valid
    instance loss and gradient are exactly 0. For P = 1 there is no q.

    Args:
        student_embeddings: `[B,T,N,P,D]`, P ≤ 8.
        teacher_embeddings: `[B,T,N,P,D]`.
        student_valid: `[B,T,N,P]` bool.
        teacher_valid: `[B,T,N,P]` bool.
        form: "cosine" or "l2_margin".
        margin: where negatives start to count.
        normaliser: "batch" or "clip".

    Returns:
        a scalar in float32 (float64 where an input is).
    """
    op = "instance_consistency"
    arguments = _instance_arguments(op, student_embeddings, teacher_embeddings, student_valid)
    arguments.tensor("teacher_valid", teacher_valid, "B T N P", [torch.bool])
    arguments.choice("form", form, ("cosine", "l2_margin"))
    arguments.number("margin", margin)
    arguments.choice("normaliser", normaliser, ("batch", "clip"))
    return implementation(op, impl, student_embeddings, teacher_embeddings)(
        student_embeddings,
        teacher_embeddings.detach(),
        student_valid,
        teacher_valid,
        form=form,
        margin=margin,
        normaliser=normaliser,
    )


def active_negatives(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    student_valid: Tensor,
    *,
    margin: float,
    impl: Impl = "auto",
) -> Tensor:
    """The share of the "l2_margin" negatives that are nearer than the margin, for the log.

    Counted over the terms of `instance_consistency`: valid student slots, t ≠ j, q ≠ ε(p); 0 where
    there is none. No gradient. Arguments as there; returns a scalar in 0…1, float32 (float64 where
    an input is).
    """
    op = "active_negatives"
    arguments = _instance_arguments(op, student_embeddings, teacher_embeddings, student_valid)
    arguments.number("margin", margin)
    return implementation(op, impl, student_embeddings, teacher_embeddings)(
        student_embeddings.detach(), teacher_embeddings.detach(), student_valid, margin=margin
    )


def _instance_arguments(op: str, student: Tensor, teacher: Tensor, valid: Tensor) -> Arguments:
    arguments = Arguments(op)
    arguments.tensor("student_embeddings", student, "B T N P D")
    arguments.at_most("student_embeddings", "P", MOST_MATCHED)
    arguments.tensor("teacher_embeddings", teacher, "B T N P D")
    arguments.tensor("student_valid", valid, "B T N P", [torch.bool])
    return arguments
