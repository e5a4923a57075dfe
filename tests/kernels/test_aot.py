# ruff: noqa: N803
"""Ahead-of-time compilation: specialised like Triton's launcher, measures held against ptxas.

The compiler is off in the interpreter, which the other tests need; so `examples` runs in a process
of its own, which imports this file.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from smtc.kernels import aot
from smtc.kernels.launching import Launch, launch, recording


@triton.jit
def _arguments(
    x, flags, numbers, odd, absent, one, even, uneven, large, scale, BLOCK: tl.constexpr
):
    place = tl.arange(0, BLOCK) * one + even + uneven + large + tl.load(numbers)
    value = tl.load(x + place, mask=tl.load(flags + place), other=0.0) * scale
    if absent is not None:
        value += 1
    tl.store(odd + place, value)


@triton.jit
def _narrow(x, out, stride, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place * stride).to(tl.float32))


@triton.jit
def _product(x, y, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, 1024, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(x + row[:, None] * 1024 + k[None, :])
        right = tl.load(y + k[:, None] * COLUMNS + column[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], total)


@triton.jit
def _refused(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 2, "too large")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def arguments() -> Launch:
    x = meta(64)
    flags, numbers = meta(64, dtype=torch.bool), meta(1, dtype=torch.int64)
    given = (x, flags, numbers, meta(65)[1:], None, 1, 48, 17, 2**40, 0.5)
    return Launch(_arguments, (1,), given, {"BLOCK": 64, "num_warps": 2}, 0)


def product(rows: int, columns: int, dtype: torch.dtype, warps: int = 4) -> Launch:
    given = (meta(rows, 1024, dtype=dtype), meta(1024, columns, dtype=dtype), meta(rows, columns))
    options = {"ROWS": rows, "COLUMNS": columns, "DEPTH": 32, "num_warps": warps}
    return Launch(_product, (1,), given, options, 0)


def examples() -> dict[str, object]:
    """What becomes of the kernels above."""
    source = aot.source_of(arguments(), "sm_90")
    found: dict[str, object] = {
        "arguments": dataclasses.asdict(source),
        "same": source == aot.source_of(arguments(), "sm_90"),
        "plain": dataclasses.asdict(aot.compile_for(arguments(), "sm_90")),
    }
    for stride in (1, 3):
        given = (meta(1024), meta(1024, dtype=torch.float32), stride)
        launched = Launch(_narrow, (1,), given, {"BLOCK": 1024}, 0)
        found[f"stride {stride}"] = aot.compile_for(launched, "sm_80").narrow_loads
    for rows, dtype, architecture in (
        (64, torch.bfloat16, "sm_80"),
        (64, torch.bfloat16, "sm_90"),
        (16, torch.bfloat16, "sm_90"),
        (64, torch.float16, "sm_100"),
    ):
        compiled = aot.compile_for(product(rows, 64, dtype), architecture)
        name = f"{rows} {str(dtype).removeprefix('torch.')} {architecture}"
        found[name] = [dict(compiled.tensor_cores), list(map(str, compiled.products))]
    spilled = product(256, 256, torch.bfloat16)
    found["spilled"] = dataclasses.asdict(aot.compile_for(spilled, "sm_90"))
    try:
        aot.compile_for(Launch(_refused, (1,), (meta(1),), {"BLOCK": 2}, 0), "sm_90")
    except RuntimeError as error:
        found["refused"] = str(error)
    # The last, as it changes Triton's settings.
    found["ptxas"] = ptxas(aot.source_of(spilled, "sm_90"))
    return found


def ptxas(source: aot.Source) -> dict[str, int]:
    """What the assembler itself says when `source` is compiled anew."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as said:
        aot.compile_source.__wrapped__(source)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said.getvalue())
    registers = re.search(r"Used (\d+) registers", said.getvalue())
    assert spills and registers, said.getvalue()
    stack, stored = map(int, spills.groups())
    return {"registers": int(registers[1]), "spill_bytes": max(stack, stored)}


@pytest.fixture(scope="module")
def compiled() -> dict:
    """`examples()`, without the interpreter."""
    command = "import json, test_aot; print(json.dumps(test_aot.examples()))"
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=Path(__file__).parent,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_arguments_are_specialised_as_the_launcher_does(compiled: dict) -> None:
    found = compiled["arguments"]
    types = dict(found["signature"])
    assert types == {
        "x": "*bf16",
        "flags": "*u1",
        "numbers": "*i64",
        "odd": "*bf16",
        "absent": "constexpr",
        "one": "constexpr",
        "even": "i32",
        "uneven": "i32",
        "large": "i64",
        "scale": "fp32",
        "BLOCK": "constexpr",
    }
    names = list(types)
    assert {names[path[0]]: value for path, value in found["constants"]} == {
        "absent": None,
        "one": 1,
        "BLOCK": 64,
    }
    aligned = {names[path[0]] for path, pairs in found["attributes"] if pairs}
    assert aligned == {"x", "flags", "numbers", "even", "large"}
    assert found["options"] == [["num_warps", 2]] and found["kernel"] == "_arguments"


def test_equal_launches_are_one_source(compiled: dict) -> None:
    assert compiled["same"]


def test_a_kernel_without_products_has_no_tensor_core_instructions(compiled: dict) -> None:
    plain = compiled["plain"]
    assert plain["tensor_cores"] == {} and plain["products"] == []
    assert plain["warps"] == 2 and plain["registers"] > 0 and plain["spill_bytes"] == 0
    assert plain["programs_per_multiprocessor"] == 32


def test_loads_of_single_16_bit_numbers_are_counted(compiled: dict) -> None:
    assert compiled["stride 1"] == 0 and compiled["stride 3"] > 0


@pytest.mark.parametrize(
    ("name", "kind", "tile"),
    [
        ("64 bfloat16 sm_80", "HMMA", "64x64x32 bf16"),
        ("64 bfloat16 sm_90", "HGMMA", "64x64x32 bf16"),
        ("16 bfloat16 sm_90", "HMMA", "16x64x32 bf16"),
        ("64 float16 sm_100", "UTCHMMA", "64x64x32 f16"),
    ],
)
def test_products_and_their_instructions_are_found(
    compiled: dict, name: str, kind: str, tile: str
) -> None:
    kinds, tiles = compiled[name]
    assert list(kinds) == [kind] and kinds[kind] > 0
    assert tiles == [tile]


def test_spills_are_those_of_ptxas(compiled: dict) -> None:
    spilled = compiled["spilled"]
    assert spilled["spill_bytes"] > 256
    assert {key: spilled[key] for key in compiled["ptxas"]} == compiled["ptxas"]
    assert spilled["shared_bytes"] > 0 and spilled["programs_per_multiprocessor"] == 2


def test_a_kernel_that_does_not_compile_is_named(compiled: dict) -> None:
    assert compiled["refused"].startswith("_refused does not compile for sm_90")
    assert "too large" in compiled["refused"]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_kib", "warps", "columns", "programs"),
    [
        ("sm_90", 255, 48, 8, 0, 1),
        ("sm_90", 128, 0, 8, 0, 2),
        ("sm_90", 129, 0, 8, 0, 1),
        ("sm_90", 32, 0, 4, 0, 16),
        ("sm_90", 16, 0, 1, 0, 32),
        ("sm_90", 32, 113, 4, 0, 2),
        ("sm_90", 32, 114, 4, 0, 1),
        ("sm_80", 32, 163, 4, 0, 1),
        ("sm_80", 32, 164, 4, 0, 0),
        ("sm_100", 32, 16, 4, 512, 1),
        ("sm_100", 32, 16, 4, 640, 0),
    ],
)
def test_programs_fit_by_the_scarcest_resource(
    architecture: str, registers: int, shared_kib: int, warps: int, columns: int, programs: int
) -> None:
    shared = shared_kib * aot.KIB
    assert aot._programs(architecture, registers, shared, warps, columns) == programs


@pytest.mark.parametrize(
    ("instruction", "width"),
    [("STL", 4), ("STL.64", 8), ("LDL.LU.128", 16), ("LDG.E.U16.CONSTANT", 2), ("LDG.E.U8", 1)],
)
def test_the_width_of_an_instruction(instruction: str, width: int) -> None:
    assert aot._width(instruction) == width


def test_the_interpreter_is_refused_with_the_remedy() -> None:
    with recording("sm_90") as seen:
        launch(_narrow, (1,), meta(64), meta(64), 1, BLOCK=64)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        aot.compile_for(seen[0], "sm_90")
