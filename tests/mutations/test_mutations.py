"""Each kernel with one deliberate fault: its tests have to notice. Run by `make test-slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


class Fault(NamedTuple):
    """A source line of `kernels/<op>.py`, or of `file`, and what stands there instead."""

    op: str
    what: str
    old: str
    new: str
    file: str = ""


FAULTS = [
    Fault(
        "correlation_projection",
        "reads the own frame instead of the referenced one",
        "referred = tl.load(index + own)",
        "referred = own",
    ),
    Fault(
        "correlation_projection",
        "drops the last reference positions",
        "for start in range(0, inner, BLOCK_INNER)",
        "for start in range(0, inner - 1, BLOCK_INNER)",
    ),
    Fault(
        "correlation_projection",
        "leaves the last column unwritten",
        "mask=(row < rows)[:, None] & (column < columns)[None, :],",
        "mask=(row < rows)[:, None] & (column < columns - 1)[None, :],",
    ),
    Fault(
        "correlation_projection",
        "forgets the earlier width blocks of a tile",
        "tile = dot(left, right, tile)",
        "tile = dot(left, right, tile * 0)",
    ),
    Fault(
        "correlation_projection",
        "sums the reference's gradient over the wrong frames",
        "own = tl.load(order + place)",
        "own = place",
    ),
    Fault(
        "mask_losses",
        "gives the padding slots weight",
        'logits = tl.where(exists, logits, float("-inf"))',
        "logits = tl.where(exists, logits, 0.0)",
    ),
    Fault(
        "mask_losses",
        "drops the last positions",
        "for start in range(0, positions, BLOCK):",
        "for start in range(0, positions // BLOCK * BLOCK, BLOCK):",
    ),
    Fault(
        "mask_losses",
        "divides by the wrong norm",
        "gram * inverse[:, None] * across[None, :]",
        "gram * inverse[:, None] * inverse[:, None]",
    ),
    Fault(
        "mask_losses",
        "leaves out the gradient of the norms",
        "by_mask = (tl.sum(unit, axis=0)[None, :] - unit - cosine * unit) * inverse",
        "by_mask = (tl.sum(unit, axis=0)[None, :] - unit) * inverse",
    ),
    Fault(
        "sinkhorn",
        "rescales one of two partial sums only",
        "tl.exp2(first - largest) + tl.exp2(second - largest)",
        "tl.exp2(first - largest) + tl.exp2(second)",
    ),
    Fault(
        "sinkhorn",
        "drops the last row of a block",
        "return problem, begin, tl.minimum(begin + ROWS, rows)",
        "return problem, begin, tl.minimum(begin + ROWS, rows - 1)",
    ),
    Fault(
        "sinkhorn",
        "writes a transposed plan",
        "scores + f[:, None] + g[None, :]),\n        mask",
        "tl.trans(scores) + f[:, None] + g[None, :]),\n        mask",
    ),
    Fault(
        "sinkhorn",
        "pulls back from the neighbouring column",
        "share = scores + f[:, None] - _vector(column_sums, column, columns)[None, :]",
        "share = scores + f[:, None] - _vector(column_sums, column + 1, columns)[None, :]",
    ),
    Fault(
        "assignment",
        "reads the cost transposed",
        "place = row * PADDED + ((code >> (4 * row)) & 15)",
        "place = row + PADDED * ((code >> (4 * row)) & 15)",
    ),
    Fault(
        "assignment",
        "keeps the choices of later rows",
        "choice = tl.where((size == row)[None, :], chosen, choice)",
        "choice = tl.where((size >= row)[None, :], chosen, choice)",
    ),
    Fault(
        "instance_consistency",
        "counts pairs of a frame with itself",
        "counted = counted & (t != j)",
        "counted = counted & (t != t + 1)",
    ),
    Fault(
        "instance_consistency",
        "swaps student and teacher slots of a pair",
        "((code[:, None] >> (4 * p).to(tl.int32)) & 15) == q",
        "((code[:, None] >> (4 * q).to(tl.int32)) & 15) == p",
    ),
    Fault(
        "instance_consistency",
        "reads the wrong teacher frame",
        "j * other_t + q * other_p",
        "t * other_t + q * other_p",
    ),
    Fault(
        "instance_consistency",
        "matches by similarity without norms",
        "similarity = similarity / norms",
        "similarity = similarity / 1.0",
    ),
    Fault(
        "masked_slot_attention",
        "adds ε after the mask",
        "weights = (_softmax(score, slots, GROUPS, SLOTS, BLOCK) + epsilon) * counted",
        "weights = _softmax(score, slots, GROUPS, SLOTS, BLOCK) * counted + epsilon",
    ),
    Fault(
        "masked_slot_attention",
        "drops the last positions",
        "for start in range(0, positions, BLOCK):",
        "for start in range(0, positions - positions % BLOCK, BLOCK):",
    ),
    Fault(
        "masked_slot_attention",
        "lets a missing slot compete",
        "tl.where(slot < slots, logits",
        "tl.where(slot <= slots, logits",
    ),
    Fault(
        "masked_slot_attention",
        "forgets the mean's share of the gradient",
        "slope = (tl.reshape(slope, [GROUPS, SLOTS, BLOCK]) - mean) * (share * counted)",
        "slope = tl.reshape(slope, [GROUPS, SLOTS, BLOCK]) * (share * counted)",
    ),
    Fault(
        "transport_alignment",
        "transports along the transposed plan",
        "        y = tl.where(fresh, 0.0 if LOG else 1.0, y)\n",
        "",
        file="transport_passes",
    ),
    Fault(
        "transport_alignment",
        "takes the masks of the wrong frame",
        "begin = tl.where(frame < other, 0, 1)",
        "begin = tl.where(frame < other, 1, 0)",
        file="transport_passes",
    ),
    Fault(
        "transport_alignment",
        "loses the columns' factor",
        "added *= second[:, None]",
        "added *= 1.0",
        file="transport_passes",
    ),
    Fault(
        "transport_alignment",
        "lets places outside the matrix count",
        "return tl.where(inside, (score - shift) * slope, NOWHERE)",
        "return (score - shift) * slope",
        file="transport_passes",
    ),
]


def run(tmp_path: Path, fault: Fault) -> subprocess.CompletedProcess[str]:
    """The operation's tests of its kernel, with the fault."""
    mutation = tmp_path / "mutation.json"
    name = fault.file or fault.op
    copy = tmp_path / f"{name}.py"
    mutation.write_text(
        json.dumps({"name": name, "old": fault.old, "new": fault.new, "copy": str(copy)})
    )
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "mutating"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"tests/kernels/test_{fault.op}.py", "-k", "the_kernel"]
    environment = os.environ | {
        "SMTC_MUTATION": str(mutation),
        "PYTHONPATH": str(Path(__file__).parent),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.op} {fault.what}")
def test_a_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    done = run(tmp_path, fault)
    assert done.returncode == 1, done.stdout + done.stderr  # 1: tests ran and failed
    assert "FAILED" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted({fault.op for fault in FAULTS}))
def test_without_a_fault_the_same_tests_pass(op: str, tmp_path: Path) -> None:
    fault = next(fault for fault in FAULTS if fault.op == op)
    done = run(tmp_path, fault._replace(new=fault.old))
    assert done.returncode == 0, done.stdout + done.stderr
