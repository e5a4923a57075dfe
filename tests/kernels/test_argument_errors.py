"""Every refused argument: operation, argument, what was expected and what came are named."""

import math

import pytest
import torch

from smtc import kernels

BAD_NUMBERS = [0.0, -1.0, math.nan, math.inf]


def correlation(**changed):
    arguments = {
        "query": torch.zeros(2, 3, 4),
        "reference": torch.zeros(2, 5, 4),
        "weight": torch.zeros(6, 5),
        "bias": torch.zeros(6),
        "index": torch.tensor([1, 0]),
    }
    return kernels.correlation_projection(**(arguments | changed))


def attention(**changed):
    arguments = {
        "queries": torch.zeros(2, 3, 4, 5),
        "keys": torch.zeros(2, 6, 5),
        "values": torch.zeros(2, 6, 5),
        "mask": torch.ones(2, 3, 6, dtype=torch.bool),
        "logit_bias": torch.zeros(2, 3, 4),
        "scale": 1.0,
        "epsilon": 1e-8,
    }
    return kernels.masked_slot_attention(**(arguments | changed))


def sinkhorn(**changed):
    arguments = {
        "cost": torch.zeros(2, 3, 4),
        "row_marginal": torch.ones(2, 3),
        "column_marginal": torch.ones(2, 4),
        "epsilon": 1.0,
        "iterations": 1,
    }
    return kernels.sinkhorn(**(arguments | changed))


def transport(**changed):
    arguments = {
        "features": torch.ones(2, 3, 4, 5),
        "masks": torch.ones(2, 3, 6, 4),
        "epsilon": 1.0,
        "iterations": 1,
    }
    return kernels.transport_alignment(**(arguments | changed))


def mask_losses(**changed):
    arguments = {"logits": torch.zeros(2, 3, 4, 5), "targets": torch.zeros(2, 3, 4, 5)}
    return kernels.mask_losses(**(arguments | changed))


def instances(**changed):
    arguments = {
        "student_embeddings": torch.ones(1, 2, 3, 4, 5),
        "teacher_embeddings": torch.ones(1, 2, 3, 4, 5),
        "student_valid": torch.ones(1, 2, 3, 4, dtype=torch.bool),
        "teacher_valid": torch.ones(1, 2, 3, 4, dtype=torch.bool),
        "form": "cosine",
        "margin": 0.5,
    }
    return kernels.instance_consistency(**(arguments | changed))


def negatives(**changed):
    arguments = {
        "student_embeddings": torch.ones(1, 2, 3, 4, 5),
        "teacher_embeddings": torch.ones(1, 2, 3, 4, 5),
        "student_valid": torch.ones(1, 2, 3, 4, dtype=torch.bool),
        "margin": 0.5,
    }
    return kernels.active_negatives(**(arguments | changed))


CALLS = [correlation, attention, sinkhorn, transport, mask_losses, instances, negatives]


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_above_are_accepted(call):
    call()


SHAPES = [
    (correlation, {"query": torch.zeros(3, 4)}, r"query: .*\[B, L, D\].*got \[3, 4\]"),
    (correlation, {"query": torch.zeros(2, 0, 4)}, r"query: .*no size 0 but.*, got \[2, 0, 4\]"),
    (correlation, {"reference": torch.zeros(2, 5, 3)}, r"reference: .*D=4\].*got \[2, 5, 3\]"),
    (
        correlation,
        {"reference": torch.zeros(3, 5, 4), "index": None},
        r"reference: .*\[B=2, M, D=4\].*got \[3, 5, 4\]",
    ),
    (correlation, {"weight": torch.zeros(6, 4)}, r"weight: .*\[E, M=5\].*got \[6, 4\]"),
    (correlation, {"bias": torch.zeros(5)}, r"bias: .*\[E=6\].*got \[5\]"),
    (correlation, {"index": torch.tensor([0])}, r"index: .*\[B=2\].*got \[1\]"),
    (attention, {"queries": torch.zeros(2, 4, 5)}, r"queries: .*\[B, G, P, D\].*got \[2, 4, 5\]"),
    (attention, {"keys": torch.zeros(2, 6, 4)}, r"keys: .*D=5\].*got \[2, 6, 4\]"),
    (attention, {"values": torch.zeros(2, 5, 5)}, r"values: .*L=6, D=5\].*got \[2, 5, 5\]"),
    (attention, {"mask": torch.zeros(2, 3, 5)}, r"mask: .*\[B=2, G=3, L=6\].*got \[2, 3, 5\]"),
    (attention, {"logit_bias": torch.zeros(2, 3)}, r"logit_bias: .*P=4\].*got \[2, 3\]"),
    (sinkhorn, {"cost": torch.zeros(3, 4)}, r"cost: .*\[B, L, M\].*got \[3, 4\]"),
    (sinkhorn, {"row_marginal": torch.ones(2, 4)}, r"row_marginal: .*L=3\].*got \[2, 4\]"),
    (sinkhorn, {"column_marginal": torch.ones(2, 3)}, r"column_marginal: .*M=4\].*got \[2, 3\]"),
    (transport, {"features": torch.ones(2, 3, 4)}, r"features: .*\[B, T, L, D\].*got \[2, 3, 4\]"),
    (transport, {"masks": torch.ones(2, 3, 6, 5)}, r"masks: .*N, L=4\].*got \[2, 3, 6, 5\]"),
    (mask_losses, {"logits": torch.zeros(4, 5)}, r"logits: .*\[B, T, N, L\].*got \[4, 5\]"),
    (mask_losses, {"targets": torch.zeros(2, 3, 4, 1)}, r"targets: .*L=5\].*got \[2, 3, 4, 1\]"),
    (instances, {"student_embeddings": torch.ones(4, 5)}, r"student_embeddings: .*got \[4, 5\]"),
    (
        instances,
        {"teacher_embeddings": torch.ones(1, 2, 3, 4, 6)},
        r"teacher_embeddings: .*P=4, D=5\].*got \[1, 2, 3, 4, 6\]",
    ),
    (
        instances,
        {"student_valid": torch.ones(1, 2, 3, 5, dtype=torch.bool)},
        r"student_valid: .*P=4\].*got \[1, 2, 3, 5\]",
    ),
    (
        instances,
        {"teacher_valid": torch.ones(1, 2, 3, dtype=torch.bool)},
        r"teacher_valid: .*P=4\].*got \[1, 2, 3\]",
    ),
    (negatives, {"student_valid": torch.ones(1, dtype=torch.bool)}, r"student_valid: .*got \[1\]"),
]
WHOLE = torch.int64
DTYPES = [
    (correlation, {"query": torch.zeros(2, 3, 4, dtype=WHOLE)}, r"query: .*float32.*got int64"),
    (
        correlation,
        {"reference": torch.zeros(2, 5, 4).double()},
        r"reference: expected dtype float32, got float64",
    ),
    (correlation, {"weight": torch.zeros(6, 5, dtype=WHOLE)}, r"weight: .*got int64"),
    (correlation, {"bias": torch.zeros(6, dtype=WHOLE)}, r"bias: .*got int64"),
    (correlation, {"index": torch.zeros(2)}, r"index: expected dtype int64, got float32"),
    (attention, {"queries": torch.zeros(2, 3, 4, 5).bool()}, r"queries: .*got bool"),
    (attention, {"keys": torch.zeros(2, 6, 5).int()}, r"keys: .*got int32"),
    (attention, {"values": torch.zeros(2, 6, 5).int()}, r"values: .*got int32"),
    (attention, {"mask": torch.zeros(2, 3, 6).cfloat()}, r"mask: .*bool.*got complex64"),
    (attention, {"logit_bias": torch.zeros(2, 3, 4).int()}, r"logit_bias: .*got int32"),
    (sinkhorn, {"cost": torch.zeros(2, 3, 4).int()}, r"cost: .*got int32"),
    (transport, {"masks": torch.ones(2, 3, 6, 4).bool()}, r"masks: .*got bool"),
    (mask_losses, {"targets": torch.zeros(2, 3, 4, 5).int()}, r"targets: .*got int32"),
    (instances, {"student_valid": torch.ones(1, 2, 3, 4)}, r"student_valid: .*bool, got float32"),
    (instances, {"teacher_valid": torch.ones(1, 2, 3, 4)}, r"teacher_valid: .*bool, got float32"),
]
SETTINGS = [
    *[(attention, {"epsilon": value}, r"epsilon: .*finite number > 0") for value in BAD_NUMBERS],
    *[(sinkhorn, {"epsilon": value}, r"epsilon: .*finite number > 0") for value in BAD_NUMBERS],
    *[(transport, {"epsilon": value}, r"epsilon: .*finite number > 0") for value in BAD_NUMBERS],
    *[(sinkhorn, {"iterations": n}, rf"iterations: .*at least 1, got {n}") for n in (0, -1, 2.0)],
    *[(transport, {"iterations": n}, rf"iterations: .*at least 1, got {n}") for n in (0, True)],
    (attention, {"scale": math.nan}, r"scale: expected a finite number, got nan"),
    (transport, {"marginals": "l2"}, r"marginals: expected one of uniform, l1, got 'l2'"),
    (transport, {"cost": "l2"}, r"cost: expected one of cosine, dot, got 'l2'"),
    (mask_losses, {"delta": -1e-8}, r"delta: expected a finite number >= 0, got -1e-08"),
    (mask_losses, {"delta": math.inf}, r"delta: .*got inf"),
    (instances, {"form": "l2"}, r"form: expected one of cosine, l2_margin, got 'l2'"),
    (instances, {"normaliser": "none"}, r"normaliser: expected one of batch, clip, got 'none'"),
    (instances, {"margin": math.nan}, r"margin: .*got nan"),
    (negatives, {"margin": math.inf}, r"margin: .*got inf"),
    (correlation, {"index": torch.tensor([0, 2])}, r"index: expected values in 0…1, got 0…2"),
    (correlation, {"index": torch.tensor([-1, 0])}, r"index: expected values in 0…1, got -1…0"),
]


@pytest.mark.parametrize(("call", "changed", "message"), [*SHAPES, *DTYPES, *SETTINGS])
def test_refused(call, changed, message):
    with pytest.raises(ValueError, match=rf"^\w+: {message}"):
        call(**changed)


@pytest.mark.parametrize("impl", ["cuda", "", "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_unknown_implementation(call, impl):
    with pytest.raises(ValueError, match=rf"impl: .*auto, eager, triton, got '{impl}'"):
        call(impl=impl)


def test_other_device():
    with pytest.raises(ValueError, match=r"weight: expected device cpu.*got meta"):
        correlation(weight=torch.zeros(6, 5, device="meta"))


def test_not_a_tensor():
    with pytest.raises(ValueError, match=r"cost: expected a tensor \[B, L, M\], got list"):
        sinkhorn(cost=[[1.0]])
    with pytest.raises(ValueError, match=r"assignment: cost: expected a tensor.*got list"):
        kernels.assignment([[1.0]])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)])
def test_assignment_needs_squares(shape):
    with pytest.raises(
        ValueError, match=rf"assignment: cost: .*P.*got \[{', '.join(map(str, shape))}\]"
    ):
        kernels.assignment(torch.zeros(shape))


def test_more_than_eight_slots():
    with pytest.raises(ValueError, match=r"assignment: cost: expected P of at most 8, got 9"):
        kernels.assignment(torch.zeros(9, 9))
    embeddings = torch.zeros(1, 2, 1, 9, 3)
    with pytest.raises(ValueError, match=r"student_embeddings: expected P of at most 8, got 9"):
        instances(student_embeddings=embeddings, teacher_embeddings=embeddings)
