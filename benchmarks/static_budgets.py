"""What `bench static` allows a kernel: spills, shared memory and slower products are exceptions."""

from dataclasses import dataclass

from smtc.kernels.aot import KIB, SHARED_PER_MULTIPROCESSOR

MOST_SPILL_BYTES = 256
MOST_SHARED_BYTES = {name: size - KIB for name, size in SHARED_PER_MULTIPROCESSOR.items()}
"""No exception goes beyond these: 163 KiB on sm_80, 227 KiB on sm_90 and sm_100."""


@dataclass(frozen=True)
class Budget:
    """Bytes of spills a thread and of shared memory a program; `reason` of an exception.

    `slower_products` allows products on an older kind of tensor-core instruction than their tile
    could have.
    """

    spill_bytes: int
    shared_bytes: int
    slower_products: bool = False
    reason: str = ""


# The rows of sm_80 also serve sm_86, sm_89 and sm_120, whose programs have 99 KiB.
USUAL = {
    "sm_80": Budget(0, 99 * KIB),
    "sm_90": Budget(0, MOST_SHARED_BYTES["sm_90"]),
    "sm_100": Budget(0, MOST_SHARED_BYTES["sm_100"]),
}

_ONCE = "addresses and row factors, stored before the loop over tiles and loaded in it"
_SMALLER = "half as many positions a tile would spill nothing and double the products' steps"
_UPRIGHT = "float32 is made to be right rather than fast: rows of 64 for the masks' products"

EXCEPTIONS: dict[tuple[str, str, str, str], Budget] = {}
"""By operation, kernel, architecture and dtype of the case."""


def budget(op: str, kernel: str, architecture: str, dtype: str) -> Budget:
    """What a kernel may take."""
    return EXCEPTIONS.get((op, kernel, architecture, dtype), USUAL[architecture])
