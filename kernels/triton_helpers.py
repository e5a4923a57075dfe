"""Device functions that several kernels use."""

import triton
import triton.language as tl

from .launching import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, accumulator):
    """`accumulator + a·b` in float32: 16-bit operands as they are, float32 ones as three TF32
    products, which keeps about 21 bits of the mantissa.
    """
    if _INTERPRETED:
        # The interpreter would multiply the bit patterns of bf16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@triton.jit
def rounded(value, like):
    """The float32 `value` in the dtype that the pointer `like` points to, rounded to nearest."""
    kind: tl.constexpr = like.dtype.element_ty
    if _INTERPRETED and kind == tl.bfloat16:
        # The interpreter would cut the low bits off.
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -65536).to(tl.float32, bitcast=True)
    return value.to(kind)
