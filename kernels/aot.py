"""Compiling kernels for GPUs that are not there, and reading what became of them.

Triton and its `ptxas` need no GPU to compile, and the disassembly tells what a GPU would be given:
registers, spills, shared memory and whether products run on the tensor cores. So these are checked
on any machine, of launches that `launching.recording` wrote down from meta tensors.
"""

import functools
import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from .launching import INTERPRETED, Launch

KIB = 1024
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_PER_MULTIPROCESSOR = {"sm_80": 164 * KIB, "sm_90": 228 * KIB, "sm_100": 228 * KIB}
"""CUDA C++ Programming Guide, technical specifications per compute capability; one KiB less is a
program's most."""

# The same table, alike on the three architectures.
_REGISTERS_PER_PARTITION = 65536 // 4
_MOST_WARPS = 64
_MOST_PROGRAMS = 32
# What the system takes of every program's shared memory, and the columns of sm_100's tensor memory.
_RESERVED_SHARED = 1 * KIB
_TENSOR_COLUMNS = 512

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?([A-Z][\w.]*)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"(?:HG|IG|QG|UTC\w*|H|I|D|Q|O)MMA")
_PRODUCT = re.compile(
    r"tt\.dot(?:_scaled)? .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+> ->"
)


@dataclass(frozen=True)
class Source:
    """All that decides the machine code of a launch; equal sources compile to the same."""

    module: str
    kernel: str
    architecture: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]


class Product(NamedTuple):
    """One `tl.dot` of a tile: `[rows,depth] · [depth,columns]`."""

    rows: int
    columns: int
    depth: int
    operand: str
    """Triton's name of the operands' type: "bf16", "f32"."""

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth} {self.operand}"


@dataclass(frozen=True)
class Compiled:
    """What a program of a compiled kernel takes of a multiprocessor."""

    registers: int
    """Of a thread."""
    spill_bytes: int
    """Of a thread: its stack frame, or the bytes of the instructions that write to it (what
    `ptxas -v` calls spill stores) where these are more."""
    shared_bytes: int
    warps: int
    tensor_cores: dict[str, int]
    """How often each kind of tensor-core instruction stands in the machine code."""
    products: tuple[Product, ...]
    narrow_loads: int
    """Instructions that load less than 4 bytes a thread from device memory."""
    programs_per_multiprocessor: int
    """How many fit at a time."""

    @property
    def occupancy(self) -> float:
        """Resident warps, as a share of the most that a multiprocessor takes."""
        return self.programs_per_multiprocessor * self.warps / _MOST_WARPS


def compile_for(launch: Launch, architecture: str) -> Compiled:
    """Compile the kernel of a launch for `architecture` ("sm_90"), as a GPU's first call would."""
    return compile_source(source_of(launch, architecture))


def source_of(launch: Launch, architecture: str) -> Source:
    """The source of a launch, specialised by Triton's own launcher: on integers that are 1 or
    divisible by 16, and on the alignment of tensors, which meta tensors have too.
    """
    if INTERPRETED:
        raise RuntimeError(
            "kernels cannot be compiled in Triton's interpreter; unset TRITON_INTERPRET"
        )
    kernel = launch.kernel
    backend = make_backend(_target(architecture))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialised, _ = bind(*launch.arguments, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialised, None
    )
    options = {
        name: value for name, value in launch.options.items() if name not in kernel.arg_names
    }
    return Source(
        kernel.fn.__module__,
        kernel.__name__,
        architecture,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((path, tuple(map(tuple, found))) for path, found in attributes.items()),
        tuple(sorted(options.items())),
    )


@functools.cache
def compile_source(source: Source) -> Compiled:
    """Compile, or take from Triton's own cache, and disassemble. `RuntimeError` names the kernel
    that does not compile.
    """
    kernel = getattr(importlib.import_module(source.module), source.kernel)
    attributes = {path: [list(pair) for pair in found] for path, found in source.attributes}
    written = ASTSource(kernel, dict(source.signature), dict(source.constants), attributes)
    try:
        binary = triton.compile(
            written, target=_target(source.architecture), options=dict(source.options)
        )
    except Exception as error:
        raise RuntimeError(
            f"{source.kernel} does not compile for {source.architecture}: {error}"
        ) from error
    return _read(source.architecture, binary)


def _target(architecture: str) -> GPUTarget:
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def _read(architecture: str, binary: Any) -> Compiled:
    """Registers and stack from the resource usage, the rest from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage, code = re.search(r"REG:(\d+) STACK:(\d+)", text), _INSTRUCTION.findall(text)
    if usage is None or not code:
        raise RuntimeError(f"cuobjdump shows no machine code: {text[:500]}")
    registers, stack = map(int, usage.groups())
    stored = sum(_width(name) for name in code if name.startswith("STL"))
    kinds = Counter(name.partition(".")[0] for name in code)
    loads = [name for name in code if name.startswith(("LDG", "LDGSTS"))]
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    columns = getattr(binary.metadata, "tmem_size", 0)
    return Compiled(
        registers=registers,
        spill_bytes=max(stack, stored),
        shared_bytes=shared,
        warps=warps,
        tensor_cores={kind: n for kind, n in sorted(kinds.items()) if _TENSOR_CORE.fullmatch(kind)},
        products=_products(binary.asm["ttir"]),
        narrow_loads=sum(_width(name) < 4 for name in loads),
        programs_per_multiprocessor=_programs(architecture, registers, shared, warps, columns),
    )


def _width(instruction: str) -> int:
    """Bytes a thread that a load or store moves: its suffix, or 4."""
    parts = instruction.split(".")
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[part] for part in parts if part in widths), 4)


def _products(intermediate: str) -> tuple[Product, ...]:
    """The products of a kernel in Triton's intermediate language, each once."""
    found = _PRODUCT.findall(intermediate)
    products = [Product(int(m), int(n), int(k), operand) for m, k, operand, n in found]
    return tuple(dict.fromkeys(products))


def _programs(architecture: str, registers: int, shared: int, warps: int, columns: int) -> int:
    """How many programs fit on a multiprocessor, by registers (dealt out to the warps of each of
    its four partitions in units of 256), shared memory, tensor memory and warps.
    """
    of_a_warp = -(-registers * 32 // 256) * 256
    fitting = [
        _MOST_PROGRAMS,
        _MOST_WARPS // warps,
        4 * (_REGISTERS_PER_PARTITION // of_a_warp) // warps,
        SHARED_PER_MULTIPROCESSOR[architecture] // (shared + _RESERVED_SHARED),
    ]
    if columns:
        fitting.append(_TENSOR_COLUMNS // columns)
    return min(fitting)
